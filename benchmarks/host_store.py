"""Acquire and release of one of this machine's cards, alone on it: beside bare flock, filelock, redis-py's Lock, Ray.

Bare flock is the least that takes a card so that others see it: open the card's file, lock it, look that the path still
leads to it, write who has it, unlock, close.  filelock and redis-py's Lock know one lock and no cards; a Ray task
with ``num_gpus=1`` is given a card by a scheduler, which keeps the worker process (``max_calls=0``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator

from benchmarks._cards import keys_of, lease_pairs, local_pool, pool_pairs
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
    timed,
)
from benchmarks._services import NO_REDIS, has_redis, redis_server
from gpupool_sync.leases.host import HostStore

TITLE = "Acquire and release on one host, alone"

GPUS = 8
#: Largest ratio to each of them.
TARGETS = {"flock": 4.0, "filelock": 0.67, "redis": 0.25, "ray": 0.05}
NAMES = {"flock": "bare flock", "filelock": "filelock", "redis": "redis-py Lock", "ray": "Ray task"}

#: Does *n* pairs of acquire and release.
Pairs = Callable[[int], object]


def run(mode: Mode) -> Report:
    """The store by itself, and the pool over it."""
    say("host_store")
    notes: list[str] = []
    number = mode.pick(smoke=5, quick=1000, full=2000)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpupool-host-", dir=parent_of_locks()))
        store = HostStore(f"{directory}/locks")
        stack.callback(store.close)
        pool = stack.enter_context(local_pool(GPUS, store=store))
        pairs: dict[str, tuple[Pairs, int]] = {
            "store": (lease_pairs(store, keys_of(GPUS)), number),
            "pool": (pool_pairs(pool), number),
            "flock": (stack.enter_context(_flock(directory)), number),
        }
        if peer("filelock") is None:
            notes.append(missing("filelock"))
        else:
            pairs["filelock"] = (stack.enter_context(_filelock(directory)), number)
        if not has_redis():
            notes.append(NO_REDIS)
        else:
            pairs["redis"] = (stack.enter_context(redis_lock()), number // 4 + 1)
        found = take_turns([_contender(name, *each) for name, each in pairs.items()], mode.rounds)
        ray = _ray(mode, pairs, notes)
    rows = []
    for ours, what in (("store", "claim + release at the `host` store"), ("pool", "`with pool.gpu()`, `host` store")):
        for name, told in NAMES.items():
            seen = ray if name == "ray" else found
            if name in seen:
                theirs = column(seen, name, "wall")
                rows.append(Row(what, column(seen, ours, "wall"), told, theirs, target=TARGETS[name]))
    return Report(rows, notes)


def _contender(name: str, pairs: Pairs, number: int) -> Contender:
    return Contender(name, lambda: timed(lambda: pairs(number), number))


# -- the contenders ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _flock(directory: str) -> Iterator[Pairs]:
    path = f"{directory}/card-0"
    record = json.dumps({"holder": "somebody", "pid": os.getpid()}).encode()
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def pairs(number: int) -> None:
        for _ in range(number):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino != os.stat(path).st_ino:
                raise RuntimeError("the file was replaced")
            os.pwrite(descriptor, record, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    yield pairs


@contextlib.contextmanager
def _filelock(directory: str) -> Iterator[Pairs]:
    from filelock import FileLock

    lock = FileLock(f"{directory}/filelock")

    def pairs(number: int) -> None:
        for _ in range(number):
            with lock:
                pass

    yield pairs


@contextlib.contextmanager
def redis_lock() -> Iterator[Pairs]:
    """redis-py's own, at a Redis of its own."""
    import redis

    with redis_server() as url, contextlib.closing(redis.Redis.from_url(url)) as client:

        def pairs(number: int) -> None:
            for _ in range(number):
                with client.lock("card", timeout=60.0):
                    pass

        yield pairs


def _ray(mode: Mode, pairs: dict[str, tuple[Pairs, int]], notes: list[str]) -> dict[str, list[Measures]]:
    """Ours and Ray's, apart from the others: its processes are never quite idle."""
    if mode.smoke or peer("ray") is None:
        notes.append(missing("ray", "bench-ray") if not mode.smoke else "Ray is left out of a smoke run.")
        return {}
    with contextlib.ExitStack() as stack:
        try:
            task = stack.enter_context(_ray_task())
        except Exception as exc:  # it starts some processes of its own, which may fail in many ways
            notes.append(f"Ray was left out, it does not start here: {type(exc).__name__}: {str(exc)[:200]}")
            return {}
        contenders = [_contender(name, *pairs[name]) for name in ("store", "pool")]
        return take_turns([*contenders, _contender("ray", task, 200)], mode.rounds)


@contextlib.contextmanager
def _ray_task() -> Iterator[Pairs]:
    import ray

    ray.init(
        num_cpus=2,
        num_gpus=GPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
    )
    try:

        @ray.remote(num_gpus=1, num_cpus=0, max_calls=0)
        def nothing() -> None: ...

        def pairs(number: int) -> None:
            for _ in range(number):
                ray.get(nothing.remote(), timeout=60.0)

        yield pairs
    finally:
        ray.shutdown()
