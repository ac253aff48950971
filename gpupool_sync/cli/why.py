"""``gpupool-sync why``: a verdict for each card."""

from __future__ import annotations

from typing import Any

import click

from gpupool_sync.cli._common import client_options, looking_pool, make_console, make_table, plain, print_json
from gpupool_sync.cli.status import scope_notes
from gpupool_sync.status import EndpointStatus


@click.command()
@client_options
@click.option("--model", metavar="TEXT", help="Only GPUs whose name contains this, in any case.  [default: any]")
@click.option(
    "--uuid", multiple=True, metavar="UUID", help="Only this GPU; a beginning is enough; repeatable.  [default: any]"
)
@click.option("--endpoint", multiple=True, metavar="ID", help="Only at this endpoint; repeatable.  [default: any]")
@click.option(
    "--exclude",
    multiple=True,
    metavar="ID",
    help="Not this GPU (server1:0 or UUID) or endpoint; repeatable.  [default: none]",
)
@click.option("--min-free-memory-mb", type=float, metavar="MIB", help="MiB that must be free.  [default: any]")
@click.option(
    "--max-utilization-percent",
    type=float,
    metavar="PERCENT",
    help="Percent of load that must not be exceeded.  [default: the threshold of the settings]",
)
@click.option(
    "--memory-mb", type=float, metavar="MIB", help="Share a GPU: so many MiB of it.  [default: the whole GPU]"
)
@click.option(
    "--max-holders",
    type=click.IntRange(min=1),
    metavar="N",
    help="Share a GPU: one of N places.  [default: the whole GPU]",
)
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="So many GPUs of one host.  [default: 1]")
@click.option(
    "--local/--any",
    default=None,
    help="Only this machine's GPUs, or those of any.  [default: this machine's if the pool has some, else any]",
)
@click.option("--busy-ok", is_flag=True, help="Also a GPU that others compute on.  [default: only an idle one]")
def why(
    endpoints: str | None,
    timeout: float | None,
    as_json: bool,
    uuid: tuple[str, ...],
    endpoint: tuple[str, ...],
    exclude: tuple[str, ...],
    busy_ok: bool,
    **request: Any,
) -> int:
    """
    Explain, GPU by GPU, why a request is or is not granted now.

    The options are the arguments of pool.acquire(). Nothing is taken. Exit status 0, also if nothing is free.
    """
    from rich.text import Text

    request["uuid"], request["endpoint"], request["exclude"] = uuid or None, endpoint or None, exclude or None
    request["busy_ok"] = busy_ok
    with looking_pool(endpoints, timeout) as pool:
        explanation = pool.explain(**{name: value for name, value in request.items() if value is not None})
        state = pool.status()
    if as_json:
        print_json(explanation)
        return 0
    console = make_console()
    console.print(
        Text(plain(f"{explanation.free} of {len(explanation.cards)} GPUs are free for {explanation.request}"), "bold")
    )
    if explanation.cards:
        table = make_table("GPU", "Model", "Verdict")
        for card in explanation.cards:
            table.add_row(
                Text(plain(card.global_gpu_id), style="bold"),
                Text(plain(card.name)),
                Text(plain(card.text), style="green" if card.code == "free" else "yellow"),
            )
        console.print(Text(""), table, Text(""), sep="\n")
    for endpoint_id, text in explanation.endpoints.items():
        console.print(Text(plain(f"{endpoint_id}: {text}"), style="red"))
    endpoints_seen = [each for each in state.endpoints if isinstance(each, EndpointStatus)]
    for each in endpoints_seen:
        for problem in each.problems:
            console.print(Text(plain(f"{each.endpoint_id}: {problem}"), style="yellow"))
    if explanation.elsewhere:
        console.print(
            Text(f"{explanation.elsewhere} free in other machines: --any (local=False) asks for those too", "dim")
        )
    for line in scope_notes({each.scope for each in endpoints_seen}):
        console.print(Text(line, style="dim"))
    return 0
