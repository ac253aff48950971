"""From a release in one process until a waiter in another runs: the `host` store, filelock, redis-py's Lock, BLPOP.

The waiter has waited for 5 to 105 ms by then, at random, so that those who look again now and then (filelock each 50
ms, redis-py's Lock each 100 ms) are met anywhere between two looks.  BLPOP is no lock: a bare message through Redis.
The clock is that of the machine, the same for both processes.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import attrs

from benchmarks._cards import HERE, StillCards
from benchmarks._crowd import TIMEOUT, answer, processes
from benchmarks._harness import (
    Contender,
    Measures,
    Mode,
    Report,
    Row,
    column,
    missing,
    parent_of_locks,
    peer,
    say,
    take_turns,
)
from benchmarks._services import NO_REDIS, has_redis, redis_server

TITLE = "From a release in one process to the waiter in another"

#: Largest ratio of the medians.
TARGETS = {"filelock": 1 / 30, "redis": 1 / 100, "blpop": 1.5}
NAMES = {"filelock": "filelock", "redis": "redis-py Lock", "blpop": "Redis BLPOP"}
#: Seconds that the waiter waits before the release, at least and at most.
WAITED = (0.005, 0.105)


@attrs.frozen
class Baton:
    """A thing that one process at a time holds."""

    take: Callable[[], object]  # waits for it
    give: Callable[[], object]


def run(mode: Mode) -> Report:
    """Each contender in this process and in one other."""
    say("wakeup")
    passes = mode.pick(smoke=2, quick=11, full=21)
    notes: list[str] = []
    makers: dict[str, tuple[Callable[..., Any], str]] = {}
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpupool-wakeup-", dir=parent_of_locks()))
        makers["ours"] = (_ours, directory)
        if peer("filelock") is None:
            notes.append(missing("filelock"))
        else:
            makers["filelock"] = (_filelock, directory)
        if not has_redis():
            notes.append(NO_REDIS)
        else:
            url = stack.enter_context(redis_server())
            makers |= {"redis": (_lock, url), "blpop": (_blpop, url)}
        contenders = []
        for name, (make, argument) in makers.items():
            pipe = stack.enter_context(processes(1, _wait, make, argument))[0]
            baton = stack.enter_context(make(argument))
            contenders.append(Contender(name, lambda baton=baton, pipe=pipe: _passes(baton, pipe, passes)))
        found = take_turns(contenders, mode.rounds)
    rows = []
    for measure, told in (("p50", "p50"), ("most", "longest")):
        for name in found:
            if name != "ours":
                mine, theirs = column(found, "ours", measure), column(found, name, measure)
                target = TARGETS[name] if measure == "p50" else None
                rows.append(Row(f"release → the waiter runs, {told}", mine, NAMES[name], theirs, target=target))
    if not rows:
        rows = [Row("release → the waiter runs, p50", column(found, "ours", "p50"))]
    return Report(rows, [*notes, f"{passes} passes in each round."])


def _passes(baton: Baton, pipe: Connection, number: int) -> Measures:
    times = []
    for _ in range(number):
        baton.take()
        pipe.send("wait")
        answer(pipe)  # it is about to ask
        time.sleep(random.uniform(*WAITED))
        begin = time.monotonic()
        baton.give()
        times.append(answer(pipe) - begin)
        answer(pipe)  # it has given it back
    return {"p50": statistics.median(times), "most": max(times)}


def _wait(pipe: Connection, make: Callable[..., Any], argument: object) -> None:
    with make(argument) as baton:
        pipe.send("ready")
        while pipe.recv() is not None:
            pipe.send("asking")
            baton.take()
            now = time.monotonic()
            pipe.send(now)
            baton.give()
            pipe.send("given back")


# -- the contenders: the same on both sides -------------------------------------------------------------------------


@contextlib.contextmanager
def _ours(directory: str) -> Iterator[Baton]:
    from benchmarks._harness import patched
    from gpupool_sync import GPUPool, devices

    cards = StillCards(0, 1)
    with (
        patched(devices, "open_reader", lambda *args, **kwargs: cards),
        patched(devices, "host_identity", lambda: HERE),
        GPUPool(lease_store=f"host:{directory}/locks", name="benchmark") as pool,
    ):
        pool.refresh(10.0)
        held = []
        yield Baton(lambda: held.append(pool.acquire(timeout=TIMEOUT)), lambda: held.pop().release())


@contextlib.contextmanager
def _filelock(directory: str) -> Iterator[Baton]:
    from filelock import FileLock

    lock = FileLock(f"{directory}/filelock")
    yield Baton(lock.acquire, lock.release)


@contextlib.contextmanager
def _lock(url: str) -> Iterator[Baton]:
    import redis

    with contextlib.closing(redis.Redis.from_url(url)) as client:
        lock = client.lock("card", timeout=60.0)
        yield Baton(lambda: lock.acquire(blocking=True), lock.release)


@contextlib.contextmanager
def _blpop(url: str) -> Iterator[Baton]:
    import redis

    with contextlib.closing(redis.Redis.from_url(url)) as client:
        if not client.exists("made"):
            client.set("made", 1)
            client.lpush("baton", "it")
        yield Baton(lambda: client.blpop("baton", timeout=60), lambda: client.lpush("baton", "it"))
