"""``gpupool-sync status``: the servers, their cards, and who holds them."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from gpupool_sync.cli._common import (
    SCOPES,
    Count,
    Listing,
    Seconds,
    client_options,
    left_out_note,
    looking_pool,
    make_console,
    milliseconds,
    on_screen,
    plain,
    plural,
    print_json,
    seconds,
    window_width,
)
from gpupool_sync.status import CardStatus, EndpointStatus, Status

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from gpupool_sync.pool import GPUPool


@click.command()
@client_options
@click.option(
    "--watch",
    is_flag=False,
    flag_value=2.0,
    type=Seconds(min=0.1, max=86400),
    metavar="[SECONDS]",
    help="Read all servers again every so many seconds (2 if no number is given), until Ctrl-C.  [default: once]",
)
@click.option(
    "--count",
    type=Count(min=1),
    metavar="N",
    help="With --watch: stop after so many readings.  [default: go on until Ctrl-C]",
)
def status(endpoints: str | None, timeout: float | None, as_json: bool, watch: float | None, count: int | None) -> int:
    """
    Show the servers, their GPUs, and who holds them.

    A GPU counts as free if a whole one would be granted now, as far as this command can see; the last lines say how far
    that is. Exit status 1 if no server answers.
    """
    if as_json and watch is not None:
        raise click.UsageError("--json prints one value; leave --watch out")
    if count is not None and watch is None:
        raise click.UsageError("--count counts the readings of --watch; give both")
    with looking_pool(endpoints, timeout, patience=watch) as pool:
        if watch is not None:
            with contextlib.suppress(KeyboardInterrupt):  # the way to end it
                _watch(pool, watch, count)
            return 0
        state = pool.status()
        if as_json:
            print_json(state)
        else:
            console = make_console()
            console.print(render(state, window_width(console)))
        # For scripts: a pool none of whose servers answers is of no use to anybody.
        return 0 if state.healthy_endpoints else 1


def _watch(pool: GPUPool, interval: float, count: int | None) -> None:
    if not on_screen():
        for state in _readings(pool, interval, count):
            click.echo(summary(state))
        return
    from rich.live import Live

    console = make_console()
    with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="crop") as live:
        for state in _readings(pool, interval, count):
            live.update(render(state, window_width(console)), refresh=True)


def _readings(pool: GPUPool, interval: float, count: int | None) -> Iterator[Status]:
    never = threading.Event()
    number = 0
    while True:
        begin = time.monotonic()
        yield pool.status()
        number += 1
        if count is not None and number >= count:
            return
        never.wait(max(0.0, begin + interval - time.monotonic()))
        # One hung server must not stop the view: its row says how old it is.
        pool.refresh(timeout=max(interval, 1.0))


def summary(state: Status) -> str:
    """One line."""
    at = state.taken_at.strftime("%Y-%m-%dT%H:%M:%SZ")
    line = f"{at} {_totals(state)}{f'; {plain(state.hint)}' if state.hint else ''}"
    for each in state.endpoints:
        assert isinstance(each, EndpointStatus)
        if not each.is_healthy:
            line += f"; {plain(each.endpoint_id)}: {plain(each.last_error or 'no answer yet')}"
    for source in state.sources:
        if source.problem:
            line += f"; {plain(source.source)}: {plain(source.problem)}"
    return line


def _totals(state: Status) -> str:
    return (
        f"{state.available_gpus} of {plural(state.total_gpus, 'GPU')} free, "
        f"{state.healthy_endpoints} of {plural(state.total_endpoints, 'server')} healthy"
    )


def render(state: Status, width: int | None = None) -> RenderableType:
    """Two tables, for a window of *width* characters, and what is to be said about them."""
    from rich.console import Group
    from rich.text import Text

    servers = Listing(
        ("Endpoint", "URL", "State", "Breaker", "Free", "Response", "Age", "Leases by", "From"),
        right=("Free", "Response", "Age"),
        spare=("Age", "Response", "Breaker", "URL", "Leases by", "From"),
    )
    notes: list[Text] = [Text(plain(state.hint), style="bold red")] if state.hint else []
    endpoints = [each for each in state.endpoints if isinstance(each, EndpointStatus)]
    for each in endpoints:
        servers.add(
            Text(plain(each.endpoint_id), style="bold"),
            Text(plain(each.url)),
            _state(each),
            _breaker(each),
            Text(f"{each.available_gpus}/{each.total_gpus}"),
            _response(each),
            Text("–" if each.age is None else seconds(each.age)),
            # Before its first answer nobody knows who arbitrates its cards.
            Text("–" if each.last_seen is None else f"{plain(each.arbiter)} ({plain(each.scope)})"),
            Text(plain(each.origin)),
        )
        if each.last_error:
            notes.append(Text(f"{plain(each.endpoint_id)}: {plain(each.last_error)}", style="red"))
        notes += [Text(f"{plain(each.endpoint_id)}: {plain(problem)}", style="yellow") for problem in each.problems]
    notes += [
        Text(f"{plain(each.source)}: {plain(each.problem)}", style="red") for each in state.sources if each.problem
    ]
    table, left_out = servers.table(width)
    parts: list[RenderableType] = [table, Text("")]
    if state.gpus:
        cards = Listing(
            ("GPU", "Model", "Memory", "Load", "Temp", "Holder"),
            right=("Memory", "Load", "Temp"),
            wrapped={"Holder": 16},
            spare=("Memory", "Load", "Model", "Temp"),
        )
        for card in state.gpus:
            cards.add(
                Text(plain(card.global_gpu_id), style="bold"),
                Text(plain(card.name)),
                Text(_memory(card)),
                Text(_percent(card.utilization_percent)),
                Text("–" if card.temperature_c is None else f"{card.temperature_c:.0f} °C"),
                _holder(card),
            )
        table, missing = cards.table(width)
        parts += [table, Text("")]
        left_out = [*left_out, *missing]
    parts += notes
    parts.append(Text(_totals(state), style="bold"))
    known = {each.scope for each in endpoints if each.last_seen is not None}
    parts += [Text(line, style="dim") for line in scope_notes(known)]
    return Group(*parts, *left_out_note(left_out))


def scope_notes(scopes: set[str]) -> list[str]:
    """How far the leases that are shown reach."""
    if "process" in scopes:
        return [
            f"Leases hold {SCOPES['process']}: this command does not see those of other processes, "
            "so a GPU that is free here may be held there."
        ]
    return [f"Leases hold {SCOPES[scope]} (scope {scope})." for scope in sorted(scopes) if scope in SCOPES]


def _state(each: EndpointStatus) -> Text:
    from rich.text import Text

    if not each.is_healthy:
        return Text("down" if each.breaker != "closed" else "no answer", style="bold red")
    if each.stale:
        return Text("stale", style="yellow")
    if each.draining:
        return Text("draining", style="yellow")
    return Text("healthy", style="green")


def _breaker(each: EndpointStatus) -> Text:
    """Its state; of one that has flapped while we looked (``--watch``) also how the server did."""
    from rich.text import Text

    text = Text(each.breaker, style="" if each.breaker == "closed" else "red")
    if each.breaker_changes and each.availability is not None:
        # Down, and never up on such a display: 99.9 % must not read as if nothing had happened.
        text.append(f", up {math.floor(100.0 * each.availability)} %", style="yellow")
    return text


def _response(each: EndpointStatus) -> Text:
    """The mean, and p95 where it is much longer."""
    from rich.text import Text

    mean, slow = each.response_time_ms, each.response_p95_ms
    text = Text(milliseconds(mean))
    if mean is not None and slow is not None and slow > 2.0 * mean:
        text.append(f", p95 {milliseconds(slow)}", style="yellow")
    return text


def _holder(card: CardStatus) -> Text:
    from rich.text import Text

    if card.holders:
        text = ", ".join(card.holders)
        if card.held_for is not None:
            text += f", for {seconds(card.held_for)}"
        if card.note:
            text += f": {card.note}"
        return Text(plain(text), style="cyan")
    if card.is_available:
        return Text("free", style="green")
    return Text(plain(card.why_not or "not available"), style="yellow")


def _memory(card: CardStatus) -> str:
    """GiB where the server tells them, else percent."""
    if card.memory_used_mb is not None and card.memory_total_mb is not None:
        return f"{card.memory_used_mb / 1024:.1f} / {card.memory_total_mb / 1024:.1f} GiB"
    return _percent(card.memory_usage_percent)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} %"
