"""Reading many statistics servers once: the pool's monitor, requests one by one, 32 threads, aiohttp gather.

Every endpoint answers `/gpu/summary` of eight GPUs after 20 ms, all of them from one other process.  The connections
are warm, and each contender ends with the parsed answers of all endpoints.  What our side does besides (strict
validation, breaker, health and response times, the table) is in its figures.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from benchmarks._harness import (
    Contender,
    Measures,
    Mode,
    Report,
    Row,
    column,
    missing,
    peer,
    room_for_files,
    say,
    take_turns,
    timed,
)
from benchmarks._server import GPUS, Servers
from gpupool_sync import GPUPool
from gpupool_sync.leases.memory import MemoryStore

TITLE = "Reading many endpoints once, 20 ms each"

DELAY = 0.02
THREADS = 32
#: Largest ratio of the processor time to that of the threads, with 100 endpoints and more.
TARGET = 0.5
#: Rounds with 1000 endpoints, each of which has a sequential sweep of 20 s.
MOST_ROUNDS = 7
TIMEOUT = 60.0
#: Sockets of each endpoint on either side: the pool's, the sessions', aiohttp's, and the listener.
SOCKETS = 4


def run(mode: Mode) -> Report:
    """Every size with a server process of its own."""
    rows: list[Row] = []
    notes: list[str] = []
    sizes = (1, 3) if mode.smoke else (1, 10, 100, 1000)
    for size in sizes:
        if not room_for_files(size * SOCKETS + 256):
            notes.append(f"{size} endpoints need {size * SOCKETS + 256} open files, which `ulimit -n` does not allow")
            continue
        say(f"sweep: {size} endpoints")
        servers = Servers(size, DELAY)
        with servers:
            rows += _one_size(mode, servers.urls)
        if servers.cpu_per_answer is not None and size == sizes[-1]:
            notes.append(
                f"The server spends {servers.cpu_per_answer * 1e6:.0f} µs of processor time on an answer, in a process "
                "of its own."
            )
    if peer("aiohttp") is None:
        notes.append(missing("aiohttp"))
    if mode.rounds > MOST_ROUNDS:
        notes.append(f"1000 endpoints: {MOST_ROUNDS} rounds.")
    if mode.name == "quick":
        notes.append(
            "1000 endpoints one by one take 20 s: a quick run does that once, with one round of ours beside it."
        )
    return Report(rows, notes)


def _one_size(mode: Mode, urls: Sequence[str]) -> list[Row]:
    size = len(urls)
    # Short sweeps are repeated within a turn, so that a turn is long beside the clock and the scheduler.
    repeat = 1 if mode.smoke else max(1, min(10, 500 // size))
    with contextlib.ExitStack() as stack:
        sweeps = {"ours": stack.enter_context(_ours(urls))}
        sessions = stack.enter_context(_sessions(urls))
        sweeps["threads"] = stack.enter_context(_threads(sessions))
        if peer("aiohttp") is not None:
            sweeps["aiohttp"] = stack.enter_context(_aiohttp(urls))
        for sweep in sweeps.values():
            sweep()  # connects; that of the threads also for the sequential one
        one_by_one = _one_by_one(sessions)

        contenders = [Contender(name, _turn(sweep, size, repeat)) for name, sweep in sweeps.items()]
        # A sequential sweep of 1000 takes 20 s: once is enough to show it, and outside of the full run all we have.
        aside = size >= 1000 and not mode.full
        if not aside:
            contenders.append(Contender("sequential", _turn(one_by_one, size, 1 if size >= 100 else min(2, repeat))))
        rounds = min(mode.rounds, MOST_ROUNDS) if size >= 1000 else mode.rounds
        found = take_turns(contenders, rounds, warm=size < 1000)
        if aside:
            alone = [_turn(one_by_one, size, 1)(), _turn(sweeps["ours"], size, 1)()]
            found |= {"sequential": alone[:1], "ours beside it": alone[1:]}

    rows: list[Row] = []
    names = {
        "sequential": "requests, one by one",
        "threads": f"{THREADS} threads + requests",
        "aiohttp": "aiohttp gather",
    }
    for measure, what in (("wall", "time of a sweep"), ("cpu", "processor time per endpoint")):
        for name, told in names.items():
            if name in found:
                mine = "ours beside it" if name == "sequential" and aside else "ours"
                rows.append(
                    Row(
                        f"{size}: {what}",
                        column(found, mine, measure),
                        told,
                        column(found, name, measure),
                        target=TARGET if (measure, name) == ("cpu", "threads") and size >= 100 else None,
                    )
                )
    return rows


def _turn(sweep: Callable[[], object], size: int, repeat: int) -> Callable[[], Measures]:
    def turn() -> Measures:
        def work() -> None:
            for _ in range(repeat):
                sweep()

        measures = timed(work, repeat)
        return {"wall": measures["wall"], "cpu": measures["cpu"] / size}

    return turn


# -- the contenders: each yields a function that reads every endpoint once ------------------------------------------


@contextlib.contextmanager
def _ours(urls: Sequence[str]) -> Iterator[Callable[[], object]]:
    # An interval of an hour: nothing is polled but what a turn asks for.
    pool = GPUPool(
        list(urls),
        lease_store=MemoryStore(),
        poll_interval=3600.0,
        endpoint_timeout=TIMEOUT,
        watch=len(urls),  # all of them, also where a pool would watch a part
        name="benchmark",
    )

    def sweep() -> None:
        if not pool.refresh(TIMEOUT):
            raise RuntimeError("not every endpoint was read in time")

    with pool:
        sweep()
        yield sweep
        bad = [key for key, each in pool.stats()["endpoints"].items() if each["failures"] or not each["healthy"]]
        if bad or len(pool.status().gpus) != GPUS * len(urls):
            raise RuntimeError(f"the figures are worth nothing: polls failed at {bad[:3]}")


@contextlib.contextmanager
def _sessions(urls: Sequence[str]) -> Iterator[list[Callable[[], Any]]]:
    """One plain session for each endpoint, as a function that reads it."""
    with contextlib.ExitStack() as stack:
        readers: list[Callable[[], Any]] = []
        for url in urls:
            session = stack.enter_context(requests.Session())
            readers.append(lambda session=session, url=f"{url}/gpu/summary": _get(session, url))
        yield readers


def _get(session: requests.Session, url: str) -> Any:
    answer = session.get(url, timeout=TIMEOUT)
    answer.raise_for_status()
    return answer.json()


def _one_by_one(readers: Sequence[Callable[[], Any]]) -> Callable[[], object]:
    return lambda: _checked([read() for read in readers])


@contextlib.contextmanager
def _threads(readers: Sequence[Callable[[], Any]]) -> Iterator[Callable[[], object]]:
    with ThreadPoolExecutor(THREADS) as executor:
        yield lambda: _checked(list(executor.map(lambda read: read(), readers)))


@contextlib.contextmanager
def _aiohttp(urls: Sequence[str]) -> Iterator[Callable[[], object]]:
    import aiohttp

    asked = [f"{url}/gpu/summary" for url in urls]
    loop = asyncio.new_event_loop()

    async def opened() -> aiohttp.ClientSession:
        # It would close connections idle for 15 s, which they are while another contender takes its turn; polled every
        # few seconds they would stay warm, and those of the others stay so in any case.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3600.0)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT))

    session = loop.run_until_complete(opened())

    async def read(url: str) -> Any:
        async with session.get(url) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(read, asked))

    async def closed() -> None:
        await session.close()
        await asyncio.sleep(0)  # its transports end in the next turn of the loop

    try:
        yield lambda: _checked(loop.run_until_complete(gather()))
    finally:
        loop.run_until_complete(closed())
        loop.close()


def _checked(answers: Sequence[Any]) -> None:
    if any(answer["gpu_count"] != GPUS for answer in answers):
        raise RuntimeError("the figures are worth nothing: an answer was not that of the server")
