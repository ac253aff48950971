"""From a release in one thread until a waiter in another has the card: beside a bare `threading.Condition`.

The clock starts before `release` is called and stops in the waiter's thread when its `acquire` returns; the waiter
sleeps by then.  A bare Condition knows no order, no timeout that leaves nothing behind, no cards, no leases.
"""

from __future__ import annotations

import contextlib
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import attrs

from benchmarks._cards import local_pool
from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, say, take_turns

TITLE = "Hand-over between threads"

#: Largest ratio of the medians.
TARGET = 2.0
#: Seconds that the waiter gets to fall asleep.
SETTLE = 0.001
TIMEOUT = 30.0


@attrs.frozen
class Baton:
    """A thing that one thread at a time holds."""

    take: Callable[[], object]  # waits for it
    give: Callable[[], object]
    waiters: Callable[[], int]


def run(mode: Mode) -> Report:
    """Both pass the baton on many times in each round; medians and 99th percentiles of the passes."""
    say("handover")
    passes = mode.pick(smoke=5, quick=300, full=500)
    with _ours() as ours, _condition() as condition:
        found = take_turns(
            [
                Contender("ours", lambda: _passes(ours, passes)),
                Contender("condition", lambda: _passes(condition, passes)),
            ],
            mode.rounds,
        )
    return Report(
        [
            Row(
                f"release → the waiter runs, {told}",
                column(found, "ours", measure),
                "bare Condition",
                column(found, "condition", measure),
                target=TARGET if measure == "p50" else None,
            )
            for measure, told in (("p50", "p50"), ("p99", "p99"))
        ]
    )


def _passes(baton: Baton, number: int) -> Measures:
    arrived: queue.SimpleQueue[float] = queue.SimpleQueue()
    go: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def wait() -> None:
        while go.get():
            baton.take()
            arrived.put(time.perf_counter())
            baton.give()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    times: list[float] = []
    try:
        for _ in range(number):
            baton.take()
            go.put(True)
            deadline = time.monotonic() + TIMEOUT
            while not baton.waiters():
                if time.monotonic() > deadline:
                    raise RuntimeError("nobody came to wait")
                time.sleep(SETTLE / 10)
            time.sleep(SETTLE)
            begin = time.perf_counter()
            baton.give()
            times.append(arrived.get(timeout=TIMEOUT) - begin)
    finally:
        go.put(False)
    waiter.join(TIMEOUT)
    times.sort()
    return {"p50": statistics.median(times), "p99": times[int(0.99 * len(times))]}


@contextlib.contextmanager
def _ours() -> Iterator[Baton]:
    with local_pool(1) as pool:
        held = []

        def take() -> None:
            held.append(pool.acquire(timeout=TIMEOUT))

        yield Baton(take, lambda: held.pop().release(), lambda: pool.stats()["waiting"])


@contextlib.contextmanager
def _condition() -> Iterator[Baton]:
    changed = threading.Condition()
    free, waiting = True, 0

    def take() -> None:
        nonlocal free, waiting
        with changed:
            waiting += 1
            if not changed.wait_for(lambda: free, TIMEOUT):
                raise RuntimeError("it was never given")
            waiting -= 1
            free = False

    def give() -> None:
        nonlocal free
        with changed:
            free = True
            changed.notify()

    yield Baton(take, give, lambda: waiting)
