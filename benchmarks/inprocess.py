"""``with pool.gpu()`` without waiting: beside psycopg_pool and SQLAlchemy's QueuePool, which hand out connections.

All three hand out one of eight things to one thread, or to eight threads, that give it back at once.  The connections
are fakes that do nothing, so nobody pays for a database; ours are cards in memory, leased in the memory store.  What
is compared is the book-keeping of a pool.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks._cards import large_pool, local_pool
from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, missing, peer, say, take_turns, timed

TITLE = "Acquire and release in one process, memory store"

GPUS = 8
THREADS = 8
#: Largest ratio to each of them, in one thread; and seconds with 8000 GPUs.
TARGETS = {"psycopg_pool": 3.0, "sqlalchemy": 2.5}
MANY = 1e-3

#: Does *n* pairs of acquire and release.
Pairs = Callable[[int], object]


def run(mode: Mode) -> Report:
    """One thread, eight threads, and 8000 GPUs."""
    # Enough that each thread has its turn several times: a handful of fast pairs would end within one time slice of the
    # interpreter (5 ms), and the threads would run one after the other.
    pairs = mode.pick(smoke=20, quick=3000, full=5000)
    rows: list[Row] = []
    notes: list[str] = []
    names = {"psycopg_pool": "psycopg_pool", "sqlalchemy": "SQLAlchemy QueuePool"}
    with contextlib.ExitStack() as stack:
        makers = {"psycopg_pool": _psycopg, "sqlalchemy": _sqlalchemy}
        books = {"ours": stack.enter_context(_ours())}
        for name, make in makers.items():
            if peer(name) is None:
                notes.append(missing(name))
            else:
                books[name] = stack.enter_context(make())
        for threads, what in ((1, "1 thread"), (THREADS, f"{THREADS} threads")):
            say(f"inprocess: {what}")
            found = take_turns(
                [Contender(name, _turn(book, pairs, threads)) for name, book in books.items()], mode.rounds
            )
            rows += [
                Row(
                    f"acquire + release, {what}",
                    column(found, "ours", "wall"),
                    names[name],
                    column(found, name, "wall"),
                    target=TARGETS[name] if threads == 1 else None,
                )
                for name in books
                if name != "ours"
            ] or [Row(f"acquire + release, {what}", column(found, "ours", "wall"))]
    rows += _many(mode)
    return Report(rows, notes)


def _many(mode: Mode) -> list[Row]:
    hosts = mode.pick(smoke=10, quick=1000, full=1000)
    say(f"inprocess: {hosts * GPUS} GPUs")
    with large_pool(hosts, GPUS) as large, local_pool(GPUS) as small:
        found = take_turns(
            [
                Contender("large", _turn(_with_block(large), mode.pick(smoke=5, quick=100, full=300), 1)),
                Contender("small", _turn(_with_block(small), mode.pick(smoke=20, quick=2000, full=5000), 1)),
            ],
            mode.rounds,
        )
    what = f"acquire + release, {hosts * GPUS} GPUs of {hosts} endpoints"
    return [
        Row(what, column(found, "large", "wall"), target=MANY),
        Row(
            what,
            column(found, "large", "wall"),
            f"ours with {GPUS} GPUs of one",
            column(found, "small", "wall"),
        ),
    ]


def _turn(pairs: Pairs, number: int, threads: int) -> Callable[[], Measures]:
    """*number* pairs in each thread; seconds per pair, counted over all of them."""
    if threads == 1:
        return lambda: timed(lambda: pairs(number), number)

    def turn() -> Measures:
        ready = threading.Barrier(threads + 1)
        ends: list[float] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                ready.wait(10)
                pairs(number)
                ends.append(time.perf_counter())
            except BaseException as exc:
                errors.append(exc)
                raise

        workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        ready.wait(10)
        begin = time.perf_counter()
        for worker in workers:
            worker.join(60)
        if errors or len(ends) < threads:
            raise RuntimeError(f"the figures are worth nothing: {errors or 'a thread did not end'}")
        return {"wall": (max(ends) - begin) / (number * threads)}

    return turn


# -- the contenders ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ours() -> Iterator[Pairs]:
    with local_pool(GPUS) as pool:
        yield _with_block(pool)


def _with_block(pool: Any) -> Pairs:
    def pairs(number: int) -> None:
        for _ in range(number):
            with pool.gpu():
                pass

    return pairs


class _NoDatabase:
    """As much of a psycopg connection as its pool looks at."""

    class pgconn:  # noqa: N801 - psycopg's name
        transaction_status = 0  # TransactionStatus.IDLE

    _pool: Any = None
    _created_at = 0.0
    _expire_at = 0.0
    closed = False

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> _NoDatabase:
        return cls()

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> _NoDatabase:
        return self

    def __exit__(self, *args: object) -> None: ...


@contextlib.contextmanager
def _psycopg() -> Iterator[Pairs]:
    from psycopg_pool import ConnectionPool

    fake: Any = _NoDatabase
    with ConnectionPool(connection_class=fake, min_size=GPUS, max_size=GPUS, open=False) as pool:
        pool.wait(10)

        def pairs(number: int) -> None:
            for _ in range(number):
                with pool.connection():
                    pass

        yield pairs


class _NoDriver:
    """As much of a DB-API connection as SQLAlchemy's pool looks at."""

    def rollback(self) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def _sqlalchemy() -> Iterator[Pairs]:
    from sqlalchemy.pool import QueuePool

    creator: Any = _NoDriver
    pool = QueuePool(creator, pool_size=GPUS, max_overflow=0)

    def pairs(number: int) -> None:
        for _ in range(number):
            connection = pool.connect()
            connection.close()

    try:
        yield pairs
    finally:
        pool.dispose()
