"""The pool over arbiters of other machines: our own servers, and Redis."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import warnings

import attrs
import pytest

from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, LeaseLost
from gpupool_sync.clock import boottime
from gpupool_sync.engine import arrived
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.looking import look
from gpupool_sync.models import GPURequest
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually
from redis_server import PROGRAM, RedisServer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def running_fleet():
    with FakeFleet([2, 1], names=["alpha", "beta"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(running_fleet):
    for server in running_fleet:
        server.heal()
    return running_fleet


def make_pool(fleet, **options):
    named = [Endpoint(server.url, name=server.name) for server in fleet]
    defaults = {"poll_interval": 0.1, "health_check_interval": 0.3, "endpoint_timeout": 20.0, "ttl": 30.0}
    return GPUPool(named, **{**defaults, **options})


@pytest.fixture
def redis_server(tmp_path):
    """A Redis that has been known for a while: a new one refuses until it is sure that it has lost nothing."""
    from gpupool_sync.leases.redis import RedisStore

    server = RedisServer(tmp_path / "redis").start()
    known = RedisStore(server.url, quarantine=0.0)
    known.leases()
    known.close()
    yield server
    server.kill()


def _work(endpoints, path, rounds, options):
    log = HoldLog(path)
    with GPUPool(endpoints, **options) as pool:
        for _ in range(rounds):
            with pool.gpu(timeout=120) as gpu, log.holding(gpu.uuid, gpu.fencing_token):
                pass


def race(endpoints, path, options):
    """Four spawned processes share the cards; their own log of holds is judged."""
    context = multiprocessing.get_context("spawn")
    arguments = (endpoints, str(path), 15, options)
    processes = [context.Process(target=_work, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    assert [process.exitcode for process in processes] == [0] * 4
    log = HoldLog(path)
    assert len(log.holds()) == 60
    assert log.overlaps() == []
    assert log.token_regressions() == []


def test_a_server_of_ours_arbitrates_for_everybody(fleet):
    """Without any set-up, leases on our servers exclude everybody who asks them, and nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with make_pool(fleet) as one, make_pool(fleet) as two:
            one.open(wait=True)
            two.open(wait=True)
            held = [one.acquire(timeout=20) for _ in range(3)]
            assert {gpu.scope for gpu in held} == {"everybody"}
            assert one.status().endpoints[0].arbiter.startswith("server http://127.0.0.1")
            with pytest.raises(AcquireTimeout, match="held by"):
                two.acquire(timeout=0)
            got: list[str] = []
            thread = threading.Thread(target=lambda: got.append(two.acquire(timeout=40).uuid))
            thread.start()
            eventually(lambda: two.stats()["waiting"] == 1)
            held[1].release()
            thread.join(40)
            assert got == [held[1].uuid]


def test_processes_that_share_servers_never_share_a_card(fleet, tmp_path):
    """Spawned processes over two servers: no overlap, growing tokens, nobody starves."""
    endpoints = [Endpoint(server.url, name=server.name) for server in fleet]
    race(endpoints, tmp_path / "log", {"poll_interval": 0.2, "health_check_interval": 1.0})


def test_leases_are_renewed_while_they_are_held(fleet):
    """A lease outlives its ttl many times over as long as its holder lives."""
    with make_pool(fleet, ttl=3.0) as pool, pool.gpu(timeout=20) as gpu:
        store = pool._state.engine.store_of(gpu.endpoint_id)
        first = pool._state.engine.keeper.good_until(gpu._tie.grant.id)
        eventually(
            lambda: pool._state.engine.keeper.good_until(gpu._tie.grant.id) > first + 6.0, message="two ttls pass"
        )
        gpu.check()
        assert store.is_held(gpu.uuid)


def test_a_lost_lease_is_told_and_final(fleet):
    """When its server cannot be reached for too long, the holder is told before anybody else could have the card."""
    told: list[object] = []
    with make_pool(fleet, ttl=1.0, on_lost=told.append) as pool:
        gpu = pool.acquire(timeout=20, endpoint="beta")
        fleet[1].kill()
        eventually(lambda: gpu.lost, timeout=20, message="the lease is lost")
        with pytest.raises(LeaseLost, match="beta:0 is lost"):
            gpu.check()
        eventually(lambda: told, message="on_lost is called")
        assert told[0].global_gpu_id == gpu.global_gpu_id
        fleet[1].restart()
        gpu.release()
        assert gpu.lost
        assert pool.stats()["held"] == 0


def test_a_release_that_does_not_arrive_raises_nothing(fleet):
    """A block ends without an error although its server is gone; the card comes back when the server does."""
    with make_pool(fleet, ttl=2.0) as pool:
        with pool.gpu(timeout=20, endpoint="beta"):
            fleet[1].kill()
        fleet[1].restart()
        pool.acquire(timeout=40, endpoint="beta").release()


@pytest.mark.external_service
@pytest.mark.skipif(PROGRAM is None, reason="redis-server is not installed")
def test_a_redis_pool_excludes_everybody(fleet, redis_server, tmp_path):
    """With ``lease_store='redis://…'`` every client that names it is excluded, whatever the servers are."""
    endpoints = [Endpoint(server.url, name=server.name) for server in fleet]
    options = {"lease_store": redis_server.url, "poll_interval": 0.2, "health_check_interval": 1.0}
    with GPUPool(endpoints, **options) as pool, pool.gpu(timeout=20) as gpu:
        assert gpu.scope == "everybody"
        assert pool.status().endpoints[0].arbiter.startswith("redis://")
    race(endpoints, tmp_path / "log", options)


ELSEWHERE = """
import sys
from gpupool_sync import Endpoint, GPUPool

with GPUPool([Endpoint(sys.argv[1], name="beta")]) as pool, pool.gpu(timeout=60) as gpu:
    print(gpu.uuid, flush=True)
    sys.stdin.read()
"""


def test_what_another_process_has_is_seen_with_the_readings(fleet):
    """Without a claim in vain: an idle job leaves its card as empty as before."""
    server = fleet[1]
    with make_pool([server]) as pool:
        pool.refresh(30)

        def free():
            (seen,) = look(pool._state, pool._state.engine, GPURequest())
            assert len(seen.wanted) == 1, "it is worth a ticket in any case"
            return len(seen.free)

        assert free() == 1
        with subprocess.Popen(
            [sys.executable, "-c", ELSEWHERE, server.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            try:
                assert other.stdout.readline().startswith("GPU-")
                eventually(lambda: free() == 0, 30)
                other.stdin.close()
                assert other.wait(30) == 0
                eventually(lambda: free() == 1, 30)
            finally:
                other.kill()


def test_a_lease_at_another_arbiter_takes_nothing_from_a_reading(fleet):
    """Who chose an arbiter for everything does not get what somebody has from the server, and computes on."""
    server = fleet[1]
    with make_pool([server]) as theirs, make_pool([server], lease_store=MemoryStore()) as pool, theirs.gpu(timeout=60):
        server.busy(0, 95.0)

        def reading():
            (snapshot,) = theirs._state.table.view()[0].values()
            return snapshot.cards[0].reading

        eventually(lambda: reading().leased and reading().memory_usage_percent == 95.0, 30)
        pool.refresh(30)
        with pytest.raises(AcquireTimeout, match=r"memory|process"):
            pool.acquire(timeout=0.5)


def test_ones_own_short_leases_are_no_rivals(fleet):
    """A reading may say that a card is leased which has been given back before the reading arrived."""
    server = fleet[1]
    with make_pool([server]) as pool:
        pool.refresh(30)
        (snapshot,) = pool._state.table.view()[0].values()
        with pool.gpu(timeout=60):
            pass
        card = attrs.evolve(snapshot.cards[0], reading=attrs.evolve(snapshot.cards[0].reading, leased=True))
        sample = attrs.evolve(snapshot.sample, taken_at=snapshot.sample.taken_at + 0.001)
        arrived(pool._state, attrs.evolve(snapshot, cards=(card,), sample=sample))
        assert pool._state.rivals.per_second(boottime()) == 0.0
