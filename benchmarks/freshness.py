"""How fresh many endpoints are kept, and at what cost: in the long run, and with some that swallow every request.

In the long run: 1000 endpoints at the default interval, and how much of one processor the pool uses for it, whatever it
does with the answers included.  Black-holed: 5 % of the endpoints take the question and say nothing; measured is the
time from the opening of a new pool until every other endpoint is in its table, and the same for a pool that knows them
by then and is asked to read everything anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import attrs

from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, patched, room_for_files, say, take_turns
from benchmarks._server import Servers
from gpupool_sync import GPUPool
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import Snapshot
from gpupool_sync.table import Table

TITLE = "Keeping many endpoints fresh"

DELAY = 0.02
#: Share of the endpoints that say nothing.
BLACK = 0.05
#: Percent of one processor, and ratio of the times.
CPU, TIME = 20.0, 1.2
TIMEOUT = 60.0
#: Seconds for an exchange where some say nothing: for so long each of them holds a thread.
EXCHANGE = 2.0


def run(mode: Mode) -> Report:
    """First the long run, then the black holes."""
    most = mode.pick(smoke=4, quick=1000, full=1000)
    sizes = (4,) if mode.smoke else (100, 1000)
    if not room_for_files(most * 6 + 256):
        return Report([], [f"{most} endpoints need {most * 6 + 256} open files, which `ulimit -n` does not allow"])
    rows = [_long_run(mode, most)]
    for size in sizes:
        rows += _black_holed(mode, size)
    return Report(
        rows,
        [f"Every endpoint answers after {1000 * DELAY:g} ms; where some are silent a poll may take {EXCHANGE:g} s."],
    )


def _long_run(mode: Mode, size: int) -> Row:
    say(f"freshness: {size} endpoints in the long run")
    with (
        Servers(size, DELAY) as servers,
        GPUPool(servers.urls, lease_store=MemoryStore(), watch=size, name="benchmark") as pool,
    ):
        if not pool.refresh(TIMEOUT):
            raise RuntimeError("not every endpoint was read in time")
        # A turn is one interval: each endpoint is read once in it.
        seconds = 0.5 if mode.smoke else 5.0
        shares = []
        for _ in range(mode.rounds):
            cpu, begin, polls = time.process_time(), time.perf_counter(), pool.stats()["polls"]
            time.sleep(seconds)
            if not mode.smoke and pool.stats()["polls"] - polls < 0.9 * size:
                raise RuntimeError("the figures are worth nothing: not every endpoint was read")
            shares.append(100.0 * (time.process_time() - cpu) / (time.perf_counter() - begin))
    return Row(f"{size} endpoints at the default interval: share of a processor", shares, unit="%", target=CPU)


# -- some that say nothing ------------------------------------------------------------------------------------------


@attrs.define
class Fresh:
    """Tells when each of some endpoints was read; there is one of them at a time."""

    endpoints: frozenset[str] = frozenset()
    missing: set[str] = attrs.Factory(set)
    done: threading.Event = attrs.Factory(threading.Event)

    def expect(self, endpoints: frozenset[str]) -> None:
        self.missing, self.done = set(endpoints), threading.Event()

    def seen(self, endpoint_id: str) -> None:
        self.missing.discard(endpoint_id)
        if not self.missing:
            self.done.set()

    def wait(self) -> None:
        if not self.done.wait(TIMEOUT):
            raise RuntimeError(f"never read: {sorted(self.missing)[:5]}")


@contextlib.contextmanager
def _watched() -> Iterator[Fresh]:
    """Notes what enters the table of any pool."""
    fresh = Fresh()
    update = Table.update

    def noted(self: Table, snapshot: Snapshot) -> Snapshot | None:
        before = update(self, snapshot)
        fresh.seen(snapshot.endpoint_id)
        return before

    with patched(Table, "update", noted):
        yield fresh


def _make(urls: list[str]) -> GPUPool:
    return GPUPool(
        urls,
        lease_store=MemoryStore(),
        endpoint_timeout=EXCHANGE,
        breaker_failures=1,
        watch=len(urls),
        name="benchmark",
    )


def _black_holed(mode: Mode, size: int) -> list[Row]:
    say(f"freshness: {size} endpoints, some silent")
    bad = max(1, round(BLACK * size))
    with Servers(size, DELAY, bad, "silent") as some, Servers(size, DELAY) as none, _watched() as fresh:
        cases = {"some": (some.urls, _ids(some.urls[bad:])), "none": (none.urls, _ids(none.urls[bad:]))}
        cold = take_turns(
            [Contender(name, lambda case=case: _first(fresh, *case)) for name, case in cases.items()], mode.rounds
        )
        with contextlib.ExitStack() as stack:
            pools = {}
            for name, (urls, healthy) in cases.items():
                fresh.expect(healthy)
                pools[name] = (stack.enter_context(_make(urls)), healthy)
                pools[name][0].open()
                fresh.wait()
            _settle(pools["some"][0], bad)
            warm = take_turns(
                [Contender(name, lambda case=case: _again(fresh, *case)) for name, case in pools.items()], mode.rounds
            )
    return [
        Row(
            f"{size} endpoints, {bad} silent: {told}",
            column(found, "some", "wall"),
            "none silent",
            column(found, "none", "wall"),
            target=TIME,
        )
        for found, told in ((cold, "a new pool has read the others"), (warm, "a pool has read the others anew"))
    ]


def _ids(urls: list[str]) -> frozenset[str]:
    return frozenset(url.removeprefix("http://").replace(":", "-") for url in urls)


def _settle(pool: GPUPool, bad: int) -> None:
    end = time.monotonic() + TIMEOUT
    while sum(each.breaker != "closed" for each in pool.status().endpoints) < bad:
        if time.monotonic() > end:
            raise RuntimeError("the breakers do not open")
        time.sleep(0.1)


def _first(fresh: Fresh, urls: list[str], healthy: frozenset[str]) -> Measures:
    fresh.expect(healthy)
    begin = time.perf_counter()
    with _make(urls) as pool:
        pool.open()
        fresh.wait()
        return {"wall": time.perf_counter() - begin}


def _again(fresh: Fresh, pool: GPUPool, healthy: frozenset[str]) -> Measures:
    fresh.expect(healthy)
    begin = time.perf_counter()
    pool.refresh(0.0)  # asks, and does not wait for those who say nothing
    fresh.wait()
    return {"wall": time.perf_counter() - begin}
