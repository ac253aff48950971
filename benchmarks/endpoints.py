"""What many endpoints cost against one, all of them well, or some of them failing.

Each endpoint has eight GPUs and answers at once, from one other process; of those that fail nobody listens, or they
answer 500, or they take the question and say nothing.  Measured are the first grant of a pool that has just been made,
and pairs of acquire and release in a pool whose breakers have seen enough, while it goes on polling.  The leases are in
the memory store, so that only endpoints are compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, say, take_turns, timed
from benchmarks._server import FAULTS, Servers
from gpupool_sync import AcquireTimeout, GPUPool
from gpupool_sync.leases.memory import MemoryStore

TITLE = "Many endpoints against one, and failing ones"

SHARE = 0.3
#: Seconds for an exchange: what a silent endpoint costs whoever waits for it.
TIMEOUT = 0.5
POLL_INTERVAL = 0.5


def run(mode: Mode) -> Report:
    """Each size and each way to fail beside one endpoint that is well."""
    rows: list[Row] = []
    sizes = (2,) if mode.smoke else (1, 10, 100)
    for size in sizes:
        for fault in (None, *FAULTS):
            if fault is not None and size == 1:
                continue
            say(f"endpoints: {size}, {fault or 'all well'}")
            rows += _beside_one(mode, size, 0 if fault is None else max(1, round(SHARE * size)), fault or FAULTS[0])
    say("endpoints: all failing")
    rows += [_none_left(mode, size, fault) for size in sizes for fault in FAULTS]
    return Report(rows, [f"An exchange with an endpoint may take {TIMEOUT:g} s, polls come every {POLL_INTERVAL:g} s."])


def _make(urls: list[str]) -> GPUPool:
    return GPUPool(
        urls,
        lease_store=MemoryStore(),
        poll_interval=POLL_INTERVAL,
        health_check_interval=2.0,
        endpoint_timeout=TIMEOUT,
        endpoint_max_retries=1,
        breaker_failures=2,
        name="benchmark",
    )


@contextlib.contextmanager
def _settled(urls: list[str], bad: int) -> Iterator[GPUPool]:
    """An open pool that knows which endpoints fail."""
    with _make(urls) as pool:
        end = time.monotonic() + 60.0
        while sum(each.breaker != "closed" for each in pool.status().endpoints) < bad:
            if time.monotonic() > end:
                raise RuntimeError("the breakers do not open")
            time.sleep(0.05)
        yield pool


def _pairs(pool: GPUPool, number: int) -> Measures:
    def work() -> None:
        for _ in range(number):
            with pool.gpu(timeout=30.0):
                pass

    return timed(work, number)


def _first_grant(urls: list[str]) -> Measures:
    begin = time.perf_counter()
    with _make(urls) as pool, pool.gpu(timeout=30.0):
        return {"wall": time.perf_counter() - begin}


def _beside_one(mode: Mode, size: int, bad: int, fault: str) -> list[Row]:
    number = mode.pick(smoke=10, quick=500, full=3000)
    rounds = min(mode.rounds, 7)
    what = f"{size} endpoints" if size > 1 else "1 endpoint"
    if bad:
        what += f", {bad} {fault}"
    with Servers(size, 0.0, bad, fault) as many, Servers(1, 0.0) as one:
        rows = []
        with _settled(many.urls, bad) as pool, _settled(one.urls, 0) as alone:
            found = take_turns(
                [Contender("many", lambda: _pairs(pool, number)), Contender("one", lambda: _pairs(alone, number))],
                rounds,
            )
            mine, theirs = column(found, "many", "wall"), column(found, "one", "wall")
            rows.append(Row(f"{what}: acquire + release", mine, "1 endpoint", theirs))
        found = take_turns(
            [
                Contender("many", lambda: _first_grant(many.urls)),
                Contender("one", lambda: _first_grant(one.urls)),
            ],
            rounds,
        )
        mine, theirs = column(found, "many", "wall"), column(found, "one", "wall")
        rows.append(Row(f"{what}: first grant of a new pool", mine, "1 endpoint", theirs))
        return rows


def _none_left(mode: Mode, size: int, fault: str) -> Row:
    """By how much a wait for endpoints none of which works is longer than its timeout."""
    asked = 0.2
    late = []
    with Servers(size, 0.0, size, fault) as servers, _settled(servers.urls, size) as pool:
        for _ in range(mode.rounds):
            begin = time.perf_counter()
            try:
                pool.acquire(timeout=asked)
            except AcquireTimeout:
                late.append(time.perf_counter() - begin - asked)
    what = f"{size} endpoints, all {fault}" if size > 1 else f"1 endpoint, {fault}"
    return Row(f"{what}: AcquireTimeout after its timeout", late)
