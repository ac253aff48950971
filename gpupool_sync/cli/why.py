"""``gpupool-sync why``: a verdict for each card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from gpupool_sync.cli._common import (
    Listing,
    asked_for,
    client_options,
    left_out_note,
    looking_pool,
    make_console,
    plain,
    plural,
    print_json,
    request_options,
    window_width,
)
from gpupool_sync.cli.status import scope_notes
from gpupool_sync.status import EndpointStatus


@click.command()
@client_options
@request_options
@click.option(
    "--local/--any",
    default=None,
    help="Only this machine's GPUs, or those of any.  [default: this machine's if the pool has some, else any]",
)
def why(endpoints: str | None, timeout: float | None, as_json: bool, local: bool | None, **request: Any) -> int:
    """
    Explain, GPU by GPU, why a request is or is not granted now.

    The options are the arguments of pool.acquire(). Nothing is taken. Exit status 0, also if nothing is free.
    """
    from rich.text import Text

    with looking_pool(endpoints, timeout) as pool:
        explanation = pool.explain(local=local, **asked_for(request))
        state = pool.status()
    if as_json:
        print_json(explanation)
        return 0
    console = make_console()
    free = f"{explanation.free} of {plural(len(explanation.cards), 'GPU')} free"
    console.print(Text(plain(f"{free} for {explanation.request}"), style="bold"))
    left_out: Sequence[str] = ()
    if explanation.cards:
        cards = Listing(("GPU", "Model", "Verdict"), wrapped={"Verdict": 16}, spare=("Model",))
        for card in explanation.cards:
            cards.add(
                Text(plain(card.global_gpu_id), style="bold"),
                Text(plain(card.name)),
                Text(plain(card.text), style="green" if card.code == "free" else "yellow"),
            )
        table, left_out = cards.table(window_width(console))
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
    for note in left_out_note(left_out):
        console.print(note)
    return 0
