"""``run --any-host``: looks for a machine with a free GPU, and runs the command there by the user's own ssh.

The lease is the business of the ``gpupool-sync run`` over there: it lasts as long as the command, whatever becomes of
this process or the connection.  So nothing is leased here, and what was seen free may be gone when it is asked for.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import click

from gpupool_sync.cli._running import (
    Background,
    Signals,
    say,
    start_failed,
    working_pool,
)
from gpupool_sync.cli.run import SHORT, Order, run_here, supervise
from gpupool_sync.errors import AcquireTimeout, GPUPoolError, NoSuchGPU
from gpupool_sync.progress import Progress

if TYPE_CHECKING:
    from gpupool_sync.pool import GPUPool
    from gpupool_sync.status import Explanation, MachineInfo

#: Seconds between two looks at machines none of which had a free GPU.
LOOK_AGAIN = 3.0
#: How the ``run`` over there says that no GPU was free: it uses this status for nothing else.
NONE_FREE = 121

#: What ssh ends with when it is itself that failed; the command may end so too.
SSH_FAILED = 255

#: What a server says of itself goes on a command line: never an option of ssh.
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@attrs.frozen
class _Place:
    """One machine that may have what is asked for."""

    endpoint_id: str
    machine: MachineInfo
    free: int
    possible: int
    uuids: Mapping[str, str | None]  # of its cards, by global id


@attrs.frozen
class _Seen:
    """One look at all machines."""

    explanation: Explanation
    places: Sequence[_Place]  # the best first
    unknown: bool  # some have not answered

    def free(self, count: int) -> list[_Place]:
        """Where so many are free."""
        return [place for place in self.places if place.free >= count]


def run_anywhere(
    order: Order, endpoints: str | None, ssh: str, program: str, directory: str | None, signals: Signals
) -> int:
    """
    Run the command where a GPU is free; returns the exit status.

    Raises:
        Interrupted: by a signal, before the command ran.
        GPUPoolError: no machine can ever have what is asked for.
    """
    end = None if order.terms.timeout is None else time.monotonic() + order.terms.timeout
    try:
        prefix = shlex.split(ssh)
    except ValueError as exc:
        raise click.UsageError(f"--ssh {ssh!r}: {exc}") from None
    if not prefix:
        raise click.UsageError("--ssh names no program")
    with working_pool(endpoints, progress=False) as pool:
        seen = _look(pool, order, signals)
        while True:
            possible = [place for place in seen.places if place.possible >= _count(order)]
            if not possible and not seen.unknown:
                lines = "\n".join("  " + line for line in seen.explanation.lines(20))
                raise NoSuchGPU(f"no machine can ever satisfy {seen.explanation.request}:\n{lines}")
            # One that is the only one may be waited for over there, in the queue.
            only = len(possible) == 1 and not seen.unknown
            for place in possible if only else seen.free(_count(order)):
                left = None if end is None else max(0.0, end - time.monotonic())
                patience = left if only else SHORT if left is None else min(SHORT, left)
                if place.machine.usable:
                    status = _try_here(order, endpoints, place, patience, signals)
                else:
                    argv = [*prefix, *_over_there(order, place, patience, program, directory)]
                    status = _try_there(argv, place, signals)
                if status is not None:
                    return status
            if end is None or time.monotonic() < end:
                seen = _wait(pool, order, signals, seen, end)
            else:
                lines = "\n".join("  " + line for line in seen.explanation.lines(20))
                raise AcquireTimeout(f"{seen.explanation.request} in any machine: none could be had in time:\n{lines}")


def _count(order: Order) -> int:
    return int(order.terms.request.get("count", 1))


def _look(pool: GPUPool, order: Order, signals: Signals) -> _Seen:
    def look() -> _Seen:
        explanation = pool.explain(**{**order.terms.request, "local": False})
        machines = pool.machines()
        places = []
        for endpoint_id, machine in machines.items():
            cards = [card for card in explanation.cards if card.global_gpu_id.rpartition(":")[0] == endpoint_id]
            codes = [card.code for card in cards]
            possible = sum(not code.startswith("filter") and code != "fault" for code in codes)
            if machine is not None:
                uuids = {card.global_gpu_id: card.uuid for card in cards}
                places.append(_Place(endpoint_id, machine, codes.count("free"), possible, uuids))
        # Here first: it needs no ssh.
        places.sort(key=lambda place: (not place.machine.usable, -place.free))
        return _Seen(explanation, places, None in machines.values())

    return Background(look).wait(signals)


def _wait(pool: GPUPool, order: Order, signals: Signals, seen: _Seen, end: float | None) -> _Seen:
    """The first look at which one is free, or for which the time is over."""
    begin = time.monotonic()
    progress = Progress(True)
    try:
        while True:
            progress.tell(time.monotonic() - begin, None, lambda: seen.explanation)  # noqa: B023 - called at once
            until = time.monotonic() + LOOK_AGAIN
            until = until if end is None else min(until, end)
            Background(lambda: threading.Event().wait(max(0.0, until - time.monotonic()))).wait(signals)  # noqa: B023
            before, seen = seen, _look(pool, order, signals)
            over = end is not None and time.monotonic() >= end
            if over or seen.unknown != before.unknown or any(seen.free(_count(order))):
                return seen
    finally:
        progress.close()


def _try_here(
    order: Order, endpoints: str | None, place: _Place, patience: float | None, signals: Signals
) -> int | None:
    """The command's exit status; None: there was no GPU after all."""
    request = {**order.terms.request, "endpoint": (place.endpoint_id,)}
    try:
        terms = attrs.evolve(order.terms, request=request, timeout=patience)
        return run_here(attrs.evolve(order, terms=terms), endpoints, signals)
    except AcquireTimeout:
        return None


def _try_there(argv: Sequence[str], place: _Place, signals: Signals) -> int | None:
    """The same, by ssh."""
    try:
        with signals.as_before():
            process = subprocess.Popen(argv)
    except OSError as exc:
        return start_failed(argv, exc)
    status = supervise(process, signals)
    if status == NONE_FREE:
        return None
    if status == SSH_FAILED:
        say(f"{argv[0]} to {place.machine.name} ended with {SSH_FAILED}: if it could not connect, it said why")
    return status


def _over_there(order: Order, place: _Place, patience: float | None, program: str, directory: str | None) -> list[str]:
    """What follows after ssh on its command line."""
    host = place.machine.name
    if not _HOST.fullmatch(host):
        raise GPUPoolError(f"{place.endpoint_id} says that its machine is called {host!r}, which ssh cannot be told")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    # A terminal over there hangs up by itself when ssh is gone.
    words = ["--none-free-status", str(NONE_FREE), *([] if on_terminal else ["--hang-up"])]
    for name, value in order.terms.request.items():
        if name == "endpoint":
            continue  # of this pool; over there it is that machine
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if name == "exclude" and (each := _known_there(each, place)) is None:
                continue
            words += [option, f"{each:.15g}" if isinstance(each, float) else str(each)]
    more = {
        "--timeout": None if patience is None else f"{patience:.3f}",
        "--note": order.terms.note,
        "--visible": order.terms.visible,
        "--on-lost": order.terms.on_lost,
        "--grace": f"{order.terms.grace:.15g}",
    }
    words += [word for option, value in more.items() if value is not None for word in (option, value)]
    where = os.getcwd() if directory is None else directory
    # *program* is not quoted: it may begin with ~, or be several words.
    line = f"cd {shlex.quote(where)} && exec {program} run {shlex.join([*words, '--', *order.command])}"
    return [*(["-t"] if on_terminal else []), host, "--", line]


def _known_there(name: str, place: _Place) -> str | None:
    """An excluded GPU by a name that means it over there; None: it is not there."""
    if name == place.endpoint_id or name.startswith(("GPU-", "MIG-")):
        return name
    if name not in place.uuids:
        return None
    uuid = place.uuids[name]
    if uuid is None:
        raise GPUPoolError(f"{name} has no UUID, so it cannot be excluded in {place.machine.name}")
    return uuid
