"""GPUs that are taken away from their holders, and cards that stay closed afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import attrs
import pytest

from cards import Cards, local_pool
from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, GPUPoolError, LeaseLost, NoSuchGPU, devices
from gpupool_sync.choosing import is_empty
from gpupool_sync.cli import main
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from helpers import eventually
from redis_server import RedisServer, needs_redis
from test_host_processes import Worker

linux = pytest.mark.skipif(sys.platform != "linux", reason="kernel locks of Linux")


@pytest.fixture
def cards():
    return Cards(1)


@pytest.fixture(params=["memory", pytest.param("host", marks=linux)])
def pool(request, monkeypatch, tmp_path, cards):
    store = MemoryStore() if request.param == "memory" else HostStore(str(tmp_path / "locks"))
    with local_pool(monkeypatch, cards, lease_store=store) as made:
        yield made


def take(pool, gpu="GPU-00000000", **options):
    (lease,) = pool.revoke(gpu, **options)
    return lease


# -- the holder --------------------------------------------------------------------------------------------------


def test_the_holder_is_told_and_lets_go(pool):
    """on_lost hears of it, the handle says so for good, and the lease is over."""
    told = threading.Event()
    gpu = pool.acquire(timeout=10, on_lost=lambda gpu: told.set())
    lease = take(pool)

    assert (lease.gpus, lease.own, lease.token) == ([gpu.global_gpu_id], True, gpu.fencing_token)
    assert gpu.lost, "it is told at once to who asks"
    with pytest.raises(LeaseLost, match=r"revoked by .* pid"):
        gpu.check()
    assert told.wait(20)
    eventually(lambda: not pool.leases().leases, message="the holder's pool lets go")
    assert gpu.lost
    gpu.release()
    with pool.gpu(timeout=20) as again:
        assert again.fencing_token > gpu.fencing_token
        assert not again.lost


def test_an_on_lost_that_raises_does_not_keep_the_gpu(pool):
    """A mistake in the user's callback costs a line in the log."""
    seen = []

    def on_lost(gpu):
        seen.append(gpu)
        raise ZeroDivisionError

    pool.acquire(timeout=10, on_lost=on_lost)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
        take(pool)
        eventually(lambda: not pool.leases().leases)
        eventually(lambda: len(seen) == 2)
    assert seen[1] is ZeroDivisionError


def test_a_forgotten_gpu_can_be_taken_back(pool):
    """The handle is gone, its lease is not: whoever looks after the machine ends it."""

    def forget(warned):
        pool.acquire(timeout=10)
        eventually(lambda: len(warned))  # on a thread of the pool

    with pytest.warns(ResourceWarning, match="gone without release") as warned:
        forget(warned)
    take(pool)
    eventually(lambda: not pool.leases().leases)


def test_what_still_runs_on_the_gpu_keeps_it(pool):
    """A command that was started with the lease is not taken its card from under its feet."""
    gpu = pool.acquire(timeout=10)
    child = gpu.popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    take(pool)
    eventually(lambda: gpu.lost)
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=1.5)
    assert pool.leases().leases
    child.communicate(b"\n", timeout=20)
    eventually(lambda: not pool.leases().leases)


def test_nobody_holds_it(pool):
    """One clear error for a GPU that is free, or is none."""
    pool.open(wait=True)
    for name in ("GPU-00000000", "local:7", "nonsense"):
        with pytest.raises(NoSuchGPU, match=f"nobody holds {name}"):
            pool.revoke(name)


def test_the_gpu_of_somebody_else_needs_force(pool):
    """Names of people and machines are compared, not process ids: another shell of one's own is oneself."""
    gpu = pool.acquire(timeout=10)
    pool._state.holder = attrs.evolve(pool._state.holder, user="somebody-else")

    with pytest.raises(GPUPoolError, match="force"):
        pool.revoke(gpu.uuid)
    assert not gpu.lost
    with pytest.raises(NoSuchGPU):
        pool.revoke(gpu.global_gpu_id, token=gpu.fencing_token + 1, force=True)
    assert take(pool, gpu.uuid, token=gpu.fencing_token, force=True).own is False
    assert gpu.lost


# -- the card ----------------------------------------------------------------------------------------------------


def test_a_closed_card_opens_when_its_memory_is_empty(pool, cards):
    """What the last holder left there keeps everybody out until a reading shows that it is gone."""
    cards.set(0, memory_used_mb=4000.0, memory_usage_percent=5.0, processes=None)
    gpu = pool.acquire(timeout=10)
    take(pool)
    eventually(lambda: gpu.released and not pool.leases().leases)  # first the handle is, then its lease
    with pytest.raises(AcquireTimeout, match="did not give it back"):
        pool.acquire(timeout=0)
    assert [card.code for card in pool.explain().cards] == ["closed"]
    got = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(timeout=30)))
    waiter.start()
    eventually(lambda: pool.stats()["waiting"] == 1)
    assert not got
    cards.set(0, memory_used_mb=10.0, memory_usage_percent=0.0)
    waiter.join(30)
    assert [each.uuid for each in got] == [gpu.uuid]


def test_an_old_reading_does_not_open_a_closed_card(monkeypatch, tmp_path):
    """It shows the card empty as it was before its last holder's job: explain() and status() say that it is closed."""
    options = {"poll_interval": 3600.0, "health_check_interval": 3600.0}
    cards = Cards(1)
    with (
        local_pool(monkeypatch, cards, lease_store=f"host:{tmp_path / 'locks'}", **options) as pool,
        local_pool(monkeypatch, cards, lease_store=f"host:{tmp_path / 'locks'}", **options) as other,
    ):
        other.open(wait=True)
        gpu = pool.acquire(timeout=20)
        take(pool)
        eventually(lambda: gpu.released and not pool.leases().leases)
        # What another process wrote is looked at a few times a second.
        eventually(lambda: [card.code for card in other.explain().cards] != ["held"])
        (verdict,) = other.explain().cards
        assert (verdict.code, "did not give it back" in verdict.text) == ("closed", True)
        assert [card.is_available for card in other.status().gpus] == [False]
        other.refresh(timeout=20)
        assert [card.code for card in other.explain().cards] == ["free"]
        other.acquire(timeout=0).release()


def test_others_are_granted_while_a_card_is_closed(monkeypatch):
    """A closed card costs nobody else's wait."""
    cards = Cards(2)
    with local_pool(monkeypatch, cards) as pool:
        gpu = pool.acquire(timeout=10)
        cards.set(gpu.local_gpu_id, memory_used_mb=4000.0, memory_usage_percent=5.0, processes=None)
        pool.refresh()
        take(pool, gpu.uuid)
        eventually(lambda: gpu.released and not pool.leases().leases)
        for _ in range(3):
            with pool.gpu(timeout=10) as other:
                assert other.uuid != gpu.uuid


@pytest.mark.parametrize(
    ("changes", "empty"),
    [
        ({"processes": ()}, True),
        ({"processes": (), "memory_used_mb": 70000.0}, True),
        ({"processes": None, "memory_used_mb": 500.0}, True),
        ({"processes": None, "memory_used_mb": 1600.0}, True),
        ({"processes": None, "memory_used_mb": 1700.0}, False),
        ({"processes": None, "memory_used_mb": 700.0, "memory_total_mb": None}, False),
        ({"processes": None, "memory_used_mb": None, "memory_usage_percent": 1.0}, True),
        ({"processes": None, "memory_used_mb": None, "memory_usage_percent": 3.0}, False),
        ({"processes": None, "memory_used_mb": None, "memory_usage_percent": None}, False),
    ],
)
def test_what_counts_as_empty(cards, changes, empty):
    """No process where they are told, next to no memory where not; what is unknown is not empty."""
    cards.set(0, **changes)
    assert is_empty(cards.gpus[0]) is empty


# -- other processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """The command line on the cards and locks that `Worker` processes use."""
    monkeypatch.setattr(devices, "open_reader", lambda: Cards(2))
    monkeypatch.setattr(devices, "host_identity", lambda: __import__("cards").HERE)
    monkeypatch.setenv("GPU_POOL_LOCK_DIR", str(tmp_path / "locks"))
    return main


@pytest.mark.real
@linux
def test_release_takes_gpus_back_from_other_processes(shell, tmp_path, capsys):
    """Told and let go; and who is stopped keeps its card, whatever is said."""
    workers = [Worker(tmp_path / "locks", 2, name) for name in ("night-run", "notebook")]
    try:
        for worker in workers:
            assert "cards" in worker.ask("acquire 60")
        workers[1].process.send_signal(signal.SIGSTOP)
        status = shell(["release", "--mine", "--wait", "10"])
        out = capsys.readouterr().out
        assert status == 1
        assert sum("given back by night-run" in line for line in out.splitlines()) == 1
        assert sum("notebook" in line and "still holds it" in line for line in out.splitlines()) == 1
        # The card of the stopped one is not granted to anybody.
        with GPUPool(poll_interval=0.1) as pool, pool.gpu(timeout=20):
            with pytest.raises(AcquireTimeout):
                pool.acquire(timeout=1.5)
            workers[1].process.send_signal(signal.SIGCONT)
            pool.acquire(timeout=20)
    finally:
        for worker in workers:
            worker.process.send_signal(signal.SIGCONT)
            worker.close()


@pytest.mark.real
@linux
def test_release_as_json(shell, tmp_path, capsys):
    """One object; nothing to do is well too."""
    worker = Worker(tmp_path / "locks", 2, "worker")
    try:
        (key,) = worker.ask("acquire 60")["cards"]
        assert shell(["release", key, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["still_held"] == []
        assert [lease["holder"].split()[0] for lease in answer["released"]] == ["worker"]
    finally:
        worker.close()
    assert shell(["release", "--mine"]) == 0
    assert "no leases" in capsys.readouterr().out
    assert shell(["release", key]) == 1
    assert "nobody holds" in capsys.readouterr().err
    assert shell(["release"]) == 2
    assert shell(["release", key, "--mine"]) == 2


@pytest.mark.real
@pytest.mark.parametrize("arbiter", ["server", pytest.param("redis", marks=needs_redis)])
def test_arbiters_with_a_ttl_tell_with_the_next_renewal(arbiter, tmp_path):
    """The holder elsewhere hears of it within a third of its ttl, lets go, and a waiter is served."""
    redis = RedisServer(tmp_path / "redis").start() if arbiter == "redis" else None
    options = {"poll_interval": 0.1, "ttl": 9.0}
    if redis is not None:
        from gpupool_sync.leases.redis import RedisStore

        known = RedisStore(redis.url, quarantine=0.0)
        known.leases()
        known.close()
        options["lease_store"] = redis.url
    try:
        with FakeFleet([1], leases=redis is None) as fleet:
            endpoint = Endpoint(fleet[0].url, name="one")
            with GPUPool([endpoint], name="holder", **options) as holder, GPUPool([endpoint], **options) as other:
                told = threading.Event()
                gpu = holder.acquire(timeout=20, on_lost=lambda gpu: told.set())
                got = []
                waiter = threading.Thread(target=lambda: got.append(other.acquire(timeout=60)))
                waiter.start()
                eventually(lambda: other.stats()["waiting"] == 1)
                take(other, "one:0")
                assert told.wait(60)
                waiter.join(60)
                assert got[0].fencing_token > gpu.fencing_token
                with pytest.raises(LeaseLost, match="revoked by"):
                    gpu.check()
    finally:
        if redis is not None:
            redis.kill()
