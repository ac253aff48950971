"""16 processes want 8 cards of one host for 5 ms each, again and again: who gets how many, and how long each waits.

Ours is a `GPUPool` in each process over the kernel locks of the host.  Beside it a `multiprocessing.Semaphore(8)`,
which counts and knows no cards, no order and no dead holders; and the loop that people write around `flock`: try each
card's file, sleep a millisecond, try again.  The processes of all three live from the first round to the last; in a
turn those of one contender work and the others sleep.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks._cards import HERE, StillCards
from benchmarks._crowd import TIMEOUT, Take, contend, context, crowd
from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, parent_of_locks, say, take_turns

TITLE = "Fairness between processes"

CARDS = 8
PROCESSES = 16
#: Seconds that a card is held.
HOLD = 0.005
#: The same where the processors have time to spare.
LONG_HOLD = 0.05
#: Share of the time that cards are held, beside that of the semaphore.
BUSY = 0.95
#: Seconds between two tries of the loop around flock.
POLL = 0.001

#: Name of the measure, what it is, unit.
MEASURES = (
    ("busy", "share of the time that a card is held", "%"),
    ("even", "fewest ÷ most grants of a process", ""),
    ("tail", "p99 ÷ p50 of the waits", ""),
    ("p50", "wait, p50", "s"),
    ("p99", "wait, p99", "s"),
    ("longest", "wait, longest", "s"),
    ("cpu", "processor time per grant", "s"),
)


def run(mode: Mode) -> Report:
    """In each turn all processes of a contender begin at the same instant and stop after the same time."""
    say("fairness")
    seconds = 0.2 if mode.smoke else mode.pick(smoke=1, quick=2, full=5)
    processes = mode.pick(smoke=2, quick=PROCESSES, full=PROCESSES)
    directory = tempfile.mkdtemp(prefix="gpupool-fairness-", dir=parent_of_locks())
    try:
        semaphore = context.Semaphore(CARDS)
        with (
            crowd(processes, _ours, directory) as ours,
            crowd(processes, _semaphore, semaphore) as counted,
            crowd(processes, _polled, directory) as polled,
        ):
            found = take_turns(
                [
                    Contender("ours", lambda: _turn(ours, seconds, HOLD)),
                    Contender("semaphore", lambda: _turn(counted, seconds, HOLD)),
                    Contender("flock", lambda: _turn(polled, seconds, HOLD)),
                    Contender("long", lambda: _turn(ours, seconds, LONG_HOLD)),
                ],
                mode.rounds,
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    rows = []
    for measure, told, unit in MEASURES:
        target = {"even": 0.9, "tail": 1.5}.get(measure)
        mine = column(found, "ours", measure)
        if target is not None:
            rows.append(Row(told, mine, unit=unit, target=target, at_least=measure == "even"))
        for name, against in (("semaphore", f"Semaphore({CARDS})"), ("flock", "flock, polled")):
            aimed = BUSY if (measure, name) == ("busy", "semaphore") else None
            rows.append(Row(told, mine, against, column(found, name, measure), unit=unit, target=aimed, at_least=True))
    for measure, told, unit in MEASURES:
        rows.append(Row(f"{1000 * LONG_HOLD:g} ms holds: {told}", column(found, "long", measure), unit=unit))
    return Report(
        rows,
        [
            f"{processes} processes, {CARDS} cards, turns of {seconds:g} s.",
            "Ideal is that each waits as long as it holds.",
        ],
    )


def _turn(pipes: Sequence[Connection], seconds: float, hold: float) -> Measures:
    told = contend(pipes, seconds, hold)
    waits = sorted(wait for each in told for wait in each["waits"])
    grants = [len(each["waits"]) for each in told]
    p50, p99 = statistics.median(waits), waits[int(0.99 * len(waits))]
    return {
        "busy": 100.0 * sum(each["held"] for each in told) / (CARDS * seconds),
        "even": min(grants) / max(grants),
        "tail": p99 / p50,
        "p50": p50,
        "p99": p99,
        "longest": waits[-1],
        "cpu": sum(each["cpu"] for each in told) / len(waits),
    }


# -- the contenders --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ours(directory: str) -> Iterator[Take]:
    from gpupool_sync import GPUPool, devices

    cards = StillCards(0, CARDS)
    devices.open_reader = lambda *args, **kwargs: cards
    devices.host_identity = lambda: HERE
    with GPUPool(lease_store=f"host:{directory}/locks") as pool:
        pool.refresh(10.0)
        yield lambda: pool.gpu(timeout=TIMEOUT)


@contextlib.contextmanager
def _semaphore(semaphore: Any) -> Iterator[Take]:
    yield lambda: semaphore


@contextlib.contextmanager
def _polled(directory: str) -> Iterator[Take]:
    files = [
        os.open(f"{directory}/card-{index}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for index in range(CARDS)
    ]

    @contextlib.contextmanager
    def take() -> Iterator[None]:
        file = None
        while file is None:
            # Each begins elsewhere, or all of them would crowd at the first card.
            for candidate in random.sample(files, CARDS):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(candidate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file = candidate
                    break
            else:
                time.sleep(POLL)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    yield take
