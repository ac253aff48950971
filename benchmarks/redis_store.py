"""The Redis store: beside two PINGs, which is what two exchanges cost, and beside redis-py's Lock.

Both ask one Redis on loopback.  Alone, each takes and gives back; with 16 processes each takes any of 8 cards and gives
it back at once, and who finds none free looks again after a millisecond.  A Lock is one card, so its users try one
after the other, beginning anywhere; it knows no queue and no card that would do as well.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from benchmarks._cards import HERE, StillCards, claims_of, keys_of, lease_pairs, local_pool, pool_pairs
from benchmarks._crowd import TIMEOUT, Take, contend, crowd
from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, say, take_turns, timed
from benchmarks._services import NO_REDIS, has_redis, redis_server

TITLE = "Leases at a Redis"

GPUS = 8
PROCESSES = 16
#: Seconds between two looks when no card is free.
POLL = 0.001
#: Largest ratio to two PINGs and to the Lock; smallest of the rates.
PINGS, LOCK, RATE = 2.0, 1.5, 2.5


def run(mode: Mode) -> Report:
    """One process, then 16."""
    if not has_redis():
        return Report([], [NO_REDIS])
    return Report([*_alone(mode), *_together(mode)])


def _alone(mode: Mode) -> list[Row]:
    import redis

    from gpupool_sync.leases.redis import RedisStore

    say("redis_store: one process")
    number = mode.pick(smoke=5, quick=500, full=1000)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(redis_server())
        # It was started just now and has lost nothing: there are no holders of before whom it would have to wait for.
        store = RedisStore(url, quarantine=0.0)
        stack.callback(store.close)
        client = stack.enter_context(contextlib.closing(redis.Redis.from_url(url)))
        pool = stack.enter_context(local_pool(GPUS, store=store))

        def pings(times: int) -> None:
            for _ in range(times):
                client.ping()
                client.ping()

        def locks(times: int) -> None:
            for _ in range(times):
                with client.lock("card", timeout=60.0):
                    pass

        pairs = {"store": lease_pairs(store, keys_of(GPUS)), "pool": pool_pairs(pool), "pings": pings, "lock": locks}
        found = take_turns(
            [Contender(name, lambda each=each: timed(lambda: each(number), number)) for name, each in pairs.items()],
            mode.rounds,
        )
    return [
        Row(what, column(found, ours, "wall"), against, column(found, theirs, "wall"), target=target)
        for ours, what in (("store", "claim + release, 1 process"), ("pool", "`with pool.gpu()`, 1 process"))
        for theirs, against, target in (("pings", "two PINGs", PINGS), ("lock", "redis-py Lock", LOCK))
    ]


def _together(mode: Mode) -> list[Row]:
    say("redis_store: many processes")
    number = mode.pick(smoke=2, quick=PROCESSES, full=PROCESSES)
    seconds = 0.1 if mode.smoke else mode.pick(smoke=1, quick=1, full=3)

    def turn(pipes: Sequence[Connection]) -> Measures:
        told = contend(pipes, seconds, 0.0)
        return {"rate": sum(len(each["waits"]) for each in told) / seconds}

    with (
        redis_server() as url,
        crowd(number, _store, url) as stores,
        crowd(number, _pool, url) as pools,
        crowd(number, _locks, url) as locks,
    ):
        crowds = {"store": stores, "pool": pools, "locks": locks}
        found = take_turns(
            [Contender(name, lambda each=each: turn(each)) for name, each in crowds.items()],
            mode.rounds,
        )
    theirs = column(found, "locks", "rate")
    return [
        Row(
            f"claim + release, {number} processes",
            column(found, "store", "rate"),
            "redis-py Lock",
            theirs,
            unit="/s",
            target=RATE,
            at_least=True,
        ),
        Row(
            f"`with pool.gpu()`, {number} processes, in the order of asking",
            column(found, "pool", "rate"),
            "redis-py Lock",
            theirs,
            unit="/s",
        ),
    ]


# -- the contenders, each in processes of its own -------------------------------------------------------------------


@contextlib.contextmanager
def _store(url: str) -> Iterator[Take]:
    from gpupool_sync.leases.base import Granted
    from gpupool_sync.leases.redis import RedisStore

    store = RedisStore(url, quarantine=0.0)
    make = claims_of(keys_of(GPUS))

    @contextlib.contextmanager
    def take() -> Iterator[None]:
        claim = make()
        while not isinstance(outcome := store.claim(claim), Granted):
            time.sleep(POLL)
        yield
        store.release([outcome.lease.id])

    yield take
    store.close()


@contextlib.contextmanager
def _pool(url: str) -> Iterator[Take]:
    from gpupool_sync import GPUPool, devices
    from gpupool_sync.leases.redis import RedisStore

    cards = StillCards(1, GPUS)
    devices.open_reader = lambda *args, **kwargs: cards
    devices.host_identity = lambda: HERE
    with GPUPool(lease_store=RedisStore(url, quarantine=0.0, namespace="pools")) as pool:
        pool.refresh(10.0)
        yield lambda: pool.gpu(timeout=TIMEOUT)


@contextlib.contextmanager
def _locks(url: str) -> Iterator[Take]:
    import redis

    with contextlib.closing(redis.Redis.from_url(url)) as client:
        locks = [client.lock(f"card-{index}", timeout=60.0, thread_local=False) for index in range(GPUS)]

        @contextlib.contextmanager
        def take() -> Iterator[None]:
            while True:
                first = random.randrange(GPUS)
                lock = next((each for each in locks[first:] + locks[:first] if each.acquire(blocking=False)), None)
                if lock is not None:
                    break
                time.sleep(POLL)
            yield
            lock.release()

        yield take
