"""``gpupool-sync leases``: who holds what, and who waits."""

from __future__ import annotations

import click

from gpupool_sync.cli._common import client_options, looking_pool, make_console, make_table, plain, print_json, seconds
from gpupool_sync.cli.status import scope_notes
from gpupool_sync.status import LeasesStatus


@click.command()
@client_options
def leases(endpoints: str | None, timeout: float | None, as_json: bool) -> int:
    """
    Show every lease and every waiting claim that the arbiters of the pool know.

    Who holds which GPU, since when, with which note, until when (leases of servers and Redis end unless they are
    renewed); and who waits, in the order of service.
    """
    with looking_pool(endpoints, timeout) as pool:
        state = pool.leases()
    if as_json:
        print_json(state)
        return 0
    make_console().print(*_render(state), sep="\n")
    return 0


def _render(state: LeasesStatus) -> list[object]:
    from rich.text import Text

    parts: list[object] = []
    if state.leases:
        table = make_table("GPU", "Holder", "Held for", "Ends in", "Share", "Token", "Note", "Arbiter")
        for lease in state.leases:
            ends = "with its process" if lease.expires_in is None else seconds(lease.expires_in)
            row = (", ".join(lease.gpus), lease.holder, seconds(lease.since), ends, lease.share or "whole")
            table.add_row(*(Text(plain(each)) for each in (*row, lease.token, lease.note or "", lease.arbiter)))
        parts.append(table)
    if state.queue:
        table = make_table("Place", "Waits", "For", "Wants", "Note", "Arbiter")
        for ticket in state.queue:
            line = (ticket.position + 1, ticket.holder, seconds(ticket.waited), ticket.wants, ticket.note or "")
            table.add_row(*(Text(plain(each)) for each in (*line, ticket.arbiter)))
        parts.append(table)
    parts.append(Text(f"{len(state.leases)} leases, {len(state.queue)} waiting", style="bold"))
    parts += [Text(line, style="dim") for line in scope_notes(set(state.scopes))]
    parts += [Text(plain(line), style="yellow") for line in state.problems]
    return parts
