"""What the commands share: options, a pool that grants nothing, and words for people."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import click

from gpupool_sync.display import plain as plain
from gpupool_sync.display import plural as plural
from gpupool_sync.display import seconds as seconds
from gpupool_sync.status import to_jsonable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gpupool_sync.pool import GPUPool

F = TypeVar("F", bound=Callable[..., Any])

#: Columns of a console that is no terminal: what is piped must not be cut to the width of nobody's window.
PIPE_WIDTH = 240

#: Seconds that a server may be silent before a line says whom we wait for.
PATIENCE = 1.5


def write(text: str) -> None:
    """To stderr, above a bar that is drawn there: rich replaces `sys.stderr`, and click would look behind it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a terminal that is gone, or was never there
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def complain(error: object) -> None:
    """What went wrong, in as many lines as it has; the same words as click's own errors begin with."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    write("\n".join([f"Error: {plain(lines[0])}", *map(plain, lines[1:])]))


def warn(text: object) -> None:
    """What may go wrong."""
    write(f"Warning: {plain(text)}")


#: What an arbiter's scope means to a reader.
SCOPES = {
    "process": "among the threads of one process",
    "container": "among the processes and users of this container (or whatever else sees the same lock directory)",
    "host": "among all processes and users of this machine",
    "everybody": "among everybody who can reach the GPU",
}


class Number(click.FloatRange):
    """A float; what is none is told in words that people use."""

    name = "number"


class Seconds(Number):
    """A duration."""

    name = "number of seconds"


class Count(click.IntRange):
    """How many."""

    name = "whole number"


@attrs.define
class Call:
    """What the outermost level must know of the command that runs."""

    as_json: bool = False


def _remember_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    call = ctx.find_object(Call)
    if call is not None:
        call.as_json = value
    return value


def json_option(command: F) -> F:
    """``--json``"""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        # Eager: errors in the options that follow are already told as JSON.
        is_eager=True,
        callback=_remember_json,
        help="Print one JSON value: durations in float seconds, times in ISO 8601 UTC, an error as an object.",
    )(command)


def client_options(command: F) -> F:
    """The options of every command that looks at servers."""
    command = json_option(command)
    command = click.option(
        "--timeout",
        type=Seconds(min=0, min_open=True, max=86400),
        metavar="SECONDS",
        help="Seconds for one exchange with a server, retries included.  [default: GPU_ENDPOINT_TIMEOUT, else 10]",
    )(command)
    return endpoints_option(command)


def endpoints_option(command: F) -> F:
    """``--endpoints``"""
    return click.option(
        "--endpoints",
        metavar="URLS",
        callback=_without_secrets,
        help="The servers: comma-separated URLs or name=URL, without credentials.  "
        "[default: GPU_SERVICE_ENDPOINTS and its kin, else this machine's own GPUs]",
    )(command)


#: The arguments of `GPUPool.acquire` that say what is asked for, but for ``local``.
_REQUEST_OPTIONS = (
    click.option("--model", metavar="TEXT", help="Only GPUs whose name contains this, in any case.  [default: any]"),
    click.option(
        "--uuid",
        multiple=True,
        metavar="UUID",
        help="Only this GPU; a beginning is enough; repeatable.  [default: any]",
    ),
    click.option("--endpoint", multiple=True, metavar="ID", help="Only at this endpoint; repeatable.  [default: any]"),
    click.option(
        "--exclude",
        multiple=True,
        metavar="ID",
        help="Not this GPU (server1:0 or UUID) or endpoint; repeatable.  [default: none]",
    ),
    click.option("--min-free-memory-mb", type=Number(), metavar="MIB", help="MiB that must be free.  [default: any]"),
    click.option(
        "--max-utilization-percent",
        type=Number(),
        metavar="PERCENT",
        help="Percent of load that must not be exceeded.  [default: the threshold of the settings]",
    ),
    click.option(
        "--memory-mb", type=Number(), metavar="MIB", help="Share a GPU: so many MiB of it.  [default: the whole GPU]"
    ),
    click.option(
        "--max-holders",
        type=Count(min=1),
        metavar="N",
        help="Share a GPU: one of N places.  [default: the whole GPU]",
    ),
    click.option("-n", "--count", type=Count(min=1), metavar="N", help="So many GPUs of one host.  [default: 1]"),
    click.option("--busy-ok", is_flag=True, help="Also a GPU that others compute on.  [default: only an idle one]"),
)


#: How the GPU of a command is leased, and what the command is told of it.
_LEASE_OPTIONS = (
    click.option(
        "--timeout",
        type=Seconds(min=0, max=10_000_000),
        metavar="SECONDS",
        help="How long to wait for a GPU; 0: not at all.  [default: as long as it takes]",
    ),
    click.option("--note", metavar="TEXT", help="Shown to others beside the lease.  [default: none]"),
    click.option(
        "--visible",
        type=click.Choice(["uuid", "index"]),
        help="How CUDA_VISIBLE_DEVICES names the GPUs; index: for programs that parse numbers.  "
        "[default: GPU_POOL_VISIBLE, else uuid]",
    ),
    click.option(
        "--on-lost",
        type=click.Choice(["kill", "warn"]),
        default="kill",
        show_default=True,
        help="What becomes of a command whose lease is lost, so that others may get the GPU.",
    ),
    click.option(
        "--grace",
        type=Seconds(min=0, max=86400),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Between SIGTERM and SIGKILL for a command that has to end.",
    ),
)


@attrs.frozen
class Terms:
    """What `lease_options` say; durations in seconds."""

    request: Mapping[str, Any]
    timeout: float | None
    note: str | None
    visible: str | None
    on_lost: str
    grace: float


def lease_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options of `request_options`, and those of commands that run on what is leased: one argument, *terms*."""

    @functools.wraps(command)
    def collected(**given: Any) -> int:
        rest = {name: given.pop(name) for name in list(given) if name not in names}
        terms = {name: given.pop(name) for name in ("timeout", "note", "visible", "on_lost", "grace")}
        return command(terms=Terms(request=asked_for(given), **terms), **rest)

    for option in reversed(_LEASE_OPTIONS):
        collected = option(collected)
    collected = request_options(collected)
    params: list[click.Parameter] = getattr(collected, "__click_params__")  # noqa: B009 - click's way to hand them on
    names = {param.name for param in params[-len(_REQUEST_OPTIONS) - len(_LEASE_OPTIONS) :]}
    return collected


def request_options(command: F) -> F:
    """What is asked for; `asked_for` makes keyword arguments of what was given."""
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return command


def asked_for(request: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `request_options` as `GPUPool.acquire` takes them: those that were given."""
    # By identity: 0 is a number that may be meant.
    return {name: value for name, value in request.items() if value is not None and value is not False and value != ()}


def _without_secrets(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and "@" in value:
        raise click.BadParameter(
            "a user or password here could be read by everybody on this machine (ps); "
            "put such URLs into GPU_SERVICE_ENDPOINTS",
            ctx=ctx,
            param=param,
        )
    return value


# -- the pool --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def looking_pool(endpoints: str | None, timeout: float | None, *, patience: float | None = None) -> Iterator[GPUPool]:
    """
    An open pool that sees the leases that its arbiters know.

    All its servers have answered or failed once; or *patience* seconds have passed, and one has answered.
    """
    from gpupool_sync.errors import ExclusivityWarning
    from gpupool_sync.pool import GPUPool

    with quiet_log():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pool = GPUPool(endpoints, endpoint_timeout=timeout)
        for warning in caught:
            warn(warning.message)
        with warnings.catch_warnings():
            # Nothing is leased here; how far leases reach is part of what the commands say.
            warnings.simplefilter("ignore", ExclusivityWarning)
            pool.open()
        with pool:
            with _silence_explained(pool):
                pool.open(wait=True, timeout=patience)
            yield pool


@contextlib.contextmanager
def _silence_explained(pool: GPUPool) -> Iterator[None]:
    """One hung server holds the answer up for the whole of its timeout: after a while that is told, on a terminal."""

    def tell() -> None:
        engine = pool._state.engine
        numbers = {} if engine is None else {each.id: each.numbers() for each in list(engine.endpoints.values())}
        silent = [name for name, of in numbers.items() if of.last_seen is None and not of.consecutive_failures]
        names = ", ".join(map(plain, silent[:3])) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        longest = pool._state.settings.endpoint_timeout
        click.echo(f"no answer yet from {names or 'anybody'}; waiting for up to {longest:g} s (--timeout)", err=True)

    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(PATIENCE, tell)
    timer.daemon, timer.name = True, "gpupool-silence"
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Keep the package's log off the screen: what it says is in the output, or would tear a live view."""
    logger = logging.getLogger("gpupool_sync")
    # With any handler at all, logging's last resort does not print to stderr.
    handler = logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# -- words -----------------------------------------------------------------------------------------------------


def print_json(value: object) -> None:
    """One value on one line."""
    click.echo(json.dumps(to_jsonable(value), allow_nan=False))


def milliseconds(value: float | None) -> str:
    """A response time for people."""
    return "–" if value is None else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


# -- the screen ------------------------------------------------------------------------------------------------


def make_console() -> Console:
    """
    A console that takes nothing for markup.

    Cells and lines must be `rich.text.Text` or `plain` strings: server text in square brackets stays what it is.
    """
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if not on_screen():
        console = Console(markup=False, highlight=False, emoji=False, width=_columns() or PIPE_WIDTH)
    return console


def _columns() -> int | None:
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


def on_screen() -> bool:
    """Whether a person's terminal shows what we print, so that a view can be drawn over itself."""
    # rich's own answer can be forced by FORCE_COLOR, which says nothing about being able to go up a line.
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


@attrs.define
class Listing:
    """
    Rows for a table in the one look of this command line.

    A table that does not fit into the window is cut up line by line, and then nobody can read it: columns in *spare*
    are left out first, the last one first.  Those in *right* are numbers; those in *wrapped* are sentences, which may
    have several lines.
    """

    columns: Sequence[str]
    right: Sequence[str] = ()
    wrapped: Mapping[str, int] = {}  # column -> characters that will do
    spare: Sequence[str] = ()
    rows: list[Sequence[Text]] = attrs.Factory(list)

    def add(self, *cells: Text) -> None:
        """One row."""
        self.rows.append(cells)

    def table(self, width: int | None) -> tuple[Table, Sequence[str]]:
        """The table, and which columns were left out; *width* in characters, None: as wide as it is."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        shown = list(self.columns)
        left_out: list[str] = []
        while width is not None and self._width(shown) > width and (spare := self._spare(shown)) is not None:
            shown.remove(spare)
            left_out.append(spare)
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        fits = width is not None and self._width(shown) <= width
        for column in shown:
            # Numbers and names are of no use in part; only sentences wrap.
            right = column in self.right
            whole = right or (fits and column not in self.wrapped)
            table.add_column(Text(column), justify="right" if right else "left", no_wrap=whole, overflow="fold")
        for cells in self.rows:
            named = dict(zip(self.columns, cells, strict=True))
            table.add_row(*(named[column] for column in shown))
        return table, left_out

    def _spare(self, shown: Sequence[str]) -> str | None:
        return next((column for column in reversed(self.spare) if column in shown), None)

    def _width(self, shown: Sequence[str]) -> int:
        between = 3 * (len(shown) - 1)
        return between + sum(self._width_of(number) for number, name in enumerate(self.columns) if name in shown)

    def _width_of(self, number: int) -> int:
        name = self.columns[number]
        natural = max(len(name), *(cells[number].cell_len for cells in self.rows), 0)
        return min(natural, max(len(name), self.wrapped.get(name, natural)))


def window_width(console: Console) -> int | None:
    """In characters; None: nobody's window, so that nothing has to be left out."""
    return console.width if on_screen() or _columns() else None


def left_out_note(left_out: Sequence[str]) -> list[Text]:
    """What a narrow window does not show."""
    from rich.text import Text

    if not left_out:
        return []
    names = ", ".join(dict.fromkeys(left_out))
    return [Text(f"This window is too narrow for: {names}. A wider one, or --json, has them.", style="dim")]
