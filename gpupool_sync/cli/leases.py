"""``gpupool-sync leases``: who holds what, and who waits."""

from __future__ import annotations

import click

from gpupool_sync.cli._common import (
    Listing,
    client_options,
    left_out_note,
    looking_pool,
    make_console,
    plain,
    plural,
    print_json,
    seconds,
    window_width,
)
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
    console = make_console()
    console.print(*_render(state, window_width(console)), sep="\n")
    return 0


def _render(state: LeasesStatus, width: int | None) -> list[object]:
    from rich.text import Text

    parts: list[object] = []
    left_out: list[str] = []
    held = Listing(
        ("GPU", "Holder", "Held for", "Ends in", "Share", "Token", "Note", "Arbiter"),
        wrapped={"Holder": 16, "Note": 12},
        spare=("Held for", "Note", "Share", "Ends in", "Arbiter", "Token"),
    )
    for lease in state.leases:
        ends = "with its process" if lease.expires_in is None else seconds(lease.expires_in)
        row = (", ".join(lease.gpus), lease.holder, seconds(lease.since), ends, lease.share or "whole")
        held.add(*(Text(plain(each)) for each in (*row, lease.token, lease.note or "", lease.arbiter)))
    waiting = Listing(
        ("Place", "Waits", "For", "Wants", "Note", "Arbiter"),
        wrapped={"Waits": 16, "Note": 12},
        spare=("For", "Note", "Wants", "Arbiter"),
    )
    for ticket in state.queue:
        line = (ticket.position + 1, ticket.holder, seconds(ticket.waited), ticket.wants, ticket.note or "")
        waiting.add(*(Text(plain(each)) for each in (*line, ticket.arbiter)))
    for listing in (held, waiting):
        if listing.rows:
            table, missing = listing.table(width)
            parts += [table, Text("")]
            left_out += missing
    parts.append(Text(f"{plural(len(state.leases), 'lease')}, {len(state.queue)} waiting", style="bold"))
    parts += [Text(line, style="dim") for line in scope_notes(set(state.scopes))]
    parts += [Text(plain(line), style="yellow") for line in state.problems]
    return parts + left_out_note(left_out)
