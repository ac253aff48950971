"""What the commands share: options, a pool that grants nothing, and words for people."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
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

    from gpupool_sync.pool import GPUPool

F = TypeVar("F", bound=Callable[..., Any])

#: Columns of a console that is no terminal: what is piped must not be cut to the width of nobody's window.
PIPE_WIDTH = 240

#: What an arbiter's scope means to a reader.
SCOPES = {
    "process": "among the threads of one process",
    "container": "among the processes and users of this container (or whatever else sees the same lock directory)",
    "host": "among all processes and users of this machine",
    "everybody": "among everybody who can reach the GPU",
}


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
        type=click.FloatRange(min=0, min_open=True, max=86400),
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
    click.option("--min-free-memory-mb", type=float, metavar="MIB", help="MiB that must be free.  [default: any]"),
    click.option(
        "--max-utilization-percent",
        type=float,
        metavar="PERCENT",
        help="Percent of load that must not be exceeded.  [default: the threshold of the settings]",
    ),
    click.option(
        "--memory-mb", type=float, metavar="MIB", help="Share a GPU: so many MiB of it.  [default: the whole GPU]"
    ),
    click.option(
        "--max-holders",
        type=click.IntRange(min=1),
        metavar="N",
        help="Share a GPU: one of N places.  [default: the whole GPU]",
    ),
    click.option(
        "-n", "--count", type=click.IntRange(min=1), metavar="N", help="So many GPUs of one host.  [default: 1]"
    ),
    click.option("--busy-ok", is_flag=True, help="Also a GPU that others compute on.  [default: only an idle one]"),
)


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
def looking_pool(endpoints: str | None, timeout: float | None) -> Iterator[GPUPool]:
    """An open pool whose servers have all answered or failed once; it sees the leases that its arbiter knows."""
    from gpupool_sync.errors import ExclusivityWarning
    from gpupool_sync.pool import GPUPool

    with quiet_log():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pool = GPUPool(endpoints, endpoint_timeout=timeout)
        for warning in caught:
            click.echo(f"Warning: {plain(warning.message)}", err=True)
        with warnings.catch_warnings():
            # Nothing is leased here; how far leases reach is part of what the commands say.
            warnings.simplefilter("ignore", ExclusivityWarning)
            pool.open()
        with pool:
            pool.open(wait=True)
            yield pool


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


def make_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table in the one look of this command line; columns named in *right* have numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        # Numbers and names are of no use in part; only words wrap.
        table.add_column(
            Text(column), justify="right" if column in right else "left", no_wrap=column in right, overflow="fold"
        )
    return table
