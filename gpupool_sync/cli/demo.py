"""``gpupool-sync demo``: the first thing that a stranger sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from gpupool_sync.cli._common import (
    Count,
    Seconds,
    json_option,
    make_console,
    on_screen,
    plain,
    plural,
    print_json,
    quiet_log,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType
    from rich.text import Text

    from gpupool_sync.demo import Event, Result, ServerView, View

#: Events that the live view shows.
SHOWN_EVENTS = 7
#: Jobs between two lines of progress where nothing can be drawn.
PROGRESS_STEP = 10
#: Seconds of work that fit into the time of the demo on the 10 GPUs that are there while one server is dead.
MOST_WORK = 300.0

_MOODS = {"say": "", "good": "green", "bad": "red"}
_STATES = {
    "up": ("●", "green", "up"),
    "silent": ("●", "yellow", "silent"),
    "down": ("✗", "bold red", "down"),
    "returning": ("●", "bright_yellow", "returning"),
}
# Neighbouring jobs look different.
_PALETTE = ("blue", "magenta", "cyan", "green", "dark_orange3", "purple4", "deep_pink4", "dodger_blue3")


@click.command()
@click.option("--jobs", type=Count(1, 1000), default=60, show_default=True, metavar="N", help="Jobs to run.")
@click.option(
    "--seconds-per-job",
    type=Seconds(0.01, 10),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds that a job takes on average.",
)
@click.option(
    "--seed", type=int, metavar="N", help="Makes the jobs' lengths the same in every run.  [default: at random]"
)
@json_option
def demo(jobs: int, seconds_per_job: float, seed: int | None, as_json: bool) -> int:
    """
    Share out 14 simulated GPUs; lose a worker, then a server; take their GPUs back.

    Three simulated servers and six worker processes on this machine, and more jobs than GPUs. One worker is killed in
    the middle of its jobs, and others get its GPUs and its jobs. Then one server is killed and started again. Exit
    status 0 only if every job ran, no GPU was held twice, no lease leaked, the killed worker's GPUs came back, and the
    killed server served again. Takes some 15 s, at most 60.
    """
    if jobs * seconds_per_job > MOST_WORK:
        raise click.UsageError(f"--jobs × --seconds-per-job: at most {MOST_WORK:g} s of work fit into the demo's time")
    from gpupool_sync.demo import Demo

    with quiet_log():
        show = Demo(jobs=jobs, seconds_per_job=seconds_per_job, seed=seed)
        if as_json:
            result = show.run()
            print_json(result)
        else:
            console = make_console()
            with _drawn(console) if on_screen() else _told() as watch:
                result = show.run(watch)
            console.print(_summary(result))
    return 0 if result.ok else 1


# -- where nothing can be drawn --------------------------------------------------------------------------------


@contextlib.contextmanager
def _told() -> Iterator[Callable[[View], None]]:
    told = 0
    next_progress = PROGRESS_STEP

    def watch(view: View) -> None:
        nonlocal told, next_progress
        for event in view.events[told:]:
            click.echo(f"{event.at:5.1f} s  {plain(event.text)}")
        told = len(view.events)
        if view.jobs_done >= next_progress and any(map(_busy, view.servers)):
            next_progress = (view.jobs_done // PROGRESS_STEP + 1) * PROGRESS_STEP
            busy = ", ".join(
                f"{plain(server.id)} {_busy(server)}/{len(server.places)}"
                + ("" if server.state == "up" else f" ({_STATES[server.state][2]})")
                for server in view.servers
            )
            click.echo(f"{view.elapsed:5.1f} s  {_progress(view)} jobs done, {view.waiting} wait; GPUs at work: {busy}")

    yield watch


def _progress(view: View) -> str:
    more = view.jobs_done - view.jobs_asked
    return f"{view.jobs_done} of {view.jobs_asked}" if more <= 0 else f"{view.jobs_asked} and {more} more"


def _busy(server: ServerView) -> int:
    return sum(place.job is not None for place in server.places)


# -- on a terminal ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _drawn(console: Console) -> Iterator[Callable[[View], None]]:
    from rich.live import Live
    from rich.text import Text

    first = Text("starting servers and workers, each a process of its own …", "dim")
    with Live(first, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda view: live.update(_picture(view), refresh=True)


def _picture(view: View) -> RenderableType:
    from rich.box import ROUNDED
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    servers = Table.grid(padding=(0, 2))
    for server in view.servers:
        mark, style, word = _STATES[server.state]
        servers.add_row(
            Text(mark, style),
            Text(plain(server.id), "bold"),
            Text(f"{word:<9}", style),
            _cells(server),
            Text(f"{server.jobs_done} done", "dim"),
        )
    workers = Text("workers  ", "bold")
    for number, alive in enumerate(view.workers, 1):
        workers.append(f"● {number}  " if alive else f"✗ {number}  ", "green" if alive else "bold red")
    progress = Table.grid(padding=(0, 2))
    progress.add_row(
        Text("jobs", "bold"),
        ProgressBar(total=view.jobs_asked, completed=view.jobs_done, width=36),
        Text(_progress(view)),
        Text(f"{view.waiting} wait in line", "yellow" if view.waiting else "dim"),
    )
    shown = view.events[-SHOWN_EVENTS:]
    lines = [_line(event) for event in shown] + [Text("")] * (SHOWN_EVENTS - len(shown))
    return Panel(
        Group(servers, Text(""), workers, progress, Text(""), *lines),
        title=Text("gpupool_sync: six worker processes, three servers", "bold"),
        title_align="left",
        subtitle=Text(f"{view.elapsed:.1f} s", "dim"),
        subtitle_align="right",
        box=ROUNDED,
        padding=(1, 2),
        width=80,
    )


def _cells(server: ServerView) -> Text:
    """One box for each GPU: the number of the job on it."""
    from rich.text import Text

    text = Text()
    gone = server.state == "down"
    for place in server.places:
        if place.job is not None:
            colour = _PALETTE[place.job % len(_PALETTE)]
            text.append(f"{place.job:^4}", f"bold white on {colour}" + (" dim" if gone else ""))
        elif place.orphaned:
            text.append(" †  ", "bold red on grey15")
        else:
            text.append(" ✗  " if gone else " ·  ", "red on grey15" if gone else "dim on grey15")
        text.append(" ")
    return text


def _line(event: Event) -> Text:
    from rich.text import Text

    return Text.assemble(
        (f"{event.at:5.1f} s  ", "dim"), (plain(event.text), _MOODS[event.mood]), no_wrap=True, overflow="ellipsis"
    )


# -- the end ---------------------------------------------------------------------------------------------------


def _summary(result: Result) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    def line(well: bool, text: str) -> Text:
        return Text.assemble(("✓ ", "bold green") if well else ("✗ ", "bold red"), plain(text))

    shared = ", ".join(f"{endpoint_id} {jobs}" for endpoint_id, jobs in result.per_endpoint.items())
    lines = [
        line(not result.jobs_failed, f"{plural(result.jobs_done, 'job')} done, {result.jobs_failed} failed ({shared})"),
        line(
            not result.double_holds,
            f"{result.double_holds} double holds: no GPU had two jobs at once, say the jobs' own notes"
            if not result.double_holds
            else f"{result.double_holds} double holds: GPUs had two jobs at once",
        ),
        line(not result.leaked, f"{result.leaked} leases leaked"),
        line(
            result.gpus_back_after_s is not None,
            f"{result.killed_worker} was killed; others had its {plural(len(result.gpus_of_killed_worker), 'GPU')} "
            f"{result.gpus_back_after_s:.1f} s later, and did its jobs"
            if result.gpus_back_after_s is not None
            else f"{result.killed_worker or 'no worker'} was killed, and its GPUs did not come back",
        ),
        line(
            result.recovered and result.jobs_on_killed_after_recovery > 0,
            f"{result.killed} was killed and came back; it has done "
            f"{plural(result.jobs_on_killed_after_recovery, 'job')} since"
            if result.recovered
            else f"{result.killed or 'no server'} was killed and did not come back",
        ),
    ]
    if result.wait_p50_s is not None and result.wait_p99_s is not None:
        lines.append(
            Text(f"  a job waited {result.wait_p50_s:.2f} s (p50), {result.wait_p99_s:.2f} s (p99) for its GPU", "dim")
        )
    if result.ok:
        lines.append(
            Text(
                "  next: gpupool-sync serve on your GPU machines; set GPU_SERVICE_ENDPOINTS; gpupool-sync doctor", "dim"
            )
        )
    return Group(*lines)
