"""What the breaker, health, response times and counters of an endpoint add to each call of its server.

The call itself is a function that returns at once, or sleeps for 2 ms as an exchange does.  By eight threads: whether
they hinder one another at one endpoint (in a pool one endpoint is polled by one thread at a time).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, say, take_turns, timed
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.config import Settings
from gpupool_sync.endpoint import PolledEndpoint
from gpupool_sync.models import HostIdentity, Sample

TITLE = "Breaker and bookkeeping of a call"

THREADS = 8
EXCHANGE = 0.002
#: Seconds that are added; ratio by eight threads.
ADDED, TOGETHER = 5e-6, 1.1


class Server:
    """Answers after *delay* seconds that it has no cards."""

    def __init__(self, delay: float) -> None:
        self._delay = delay

    def await_turn(self, deadline: Deadline) -> None: ...

    def fetch(self, deadline: Deadline) -> Sample:
        if self._delay:
            time.sleep(self._delay)
        return Sample((), boottime(), host=HostIdentity("elsewhere", "elsewhere"))

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def forget_after_fork(self) -> None: ...


def run(mode: Mode) -> Report:
    """One thread and a call that takes no time, then eight threads and one that takes some."""
    say("bookkeeping")
    number = mode.pick(smoke=50, quick=10_000, full=30_000)
    found = _compared(mode, 0.0, number, 1)
    with_it, bare = column(found, "polled", "cpu"), column(found, "bare", "cpu")
    added = [max(0.0, mine - other) for mine, other in zip(with_it, bare, strict=True)]
    calls = mode.pick(smoke=2, quick=100, full=300)
    together = _compared(mode, EXCHANGE, calls, THREADS)
    return Report(
        [
            Row("processor time added to a call", added, target=ADDED),
            Row(
                f"{THREADS} threads, calls of {1000 * EXCHANGE:g} ms",
                column(together, "polled", "wall"),
                "bare calls",
                column(together, "bare", "wall"),
                target=TOGETHER,
            ),
        ]
    )


def _compared(mode: Mode, delay: float, number: int, threads: int) -> dict[str, list[Measures]]:
    source = Server(delay)
    endpoint = PolledEndpoint("server", "http://server:8000", source, Settings(), local=None)
    deadline = Deadline.after(None)
    calls: dict[str, Callable[[], object]] = {"polled": endpoint.poll, "bare": lambda: source.fetch(deadline)}

    def turn(call: Callable[[], object]) -> None:
        def work() -> None:
            for _ in range(number):
                call()

        if threads == 1:
            work()
            return
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return take_turns(
        [Contender(name, lambda call=call: timed(lambda: turn(call), number)) for name, call in calls.items()],
        mode.rounds,
    )
