"""What a pool of many endpoints remembers of them for a moment: here for an hour, and with three of them."""

from __future__ import annotations

import pytest

from gpupool_sync import AcquireTimeout, GPUPool, looking, state
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, run_threads

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def fleet():
    with FakeFleet([2, 2, 2]) as fleet:
        yield fleet


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def pool(fleet, store, monkeypatch):
    monkeypatch.setattr(looking, "MANY_ENDPOINTS", 0)
    monkeypatch.setattr(looking, "SIGHT_TIME", 3600.0)
    with GPUPool(fleet.urls, lease_store=store, poll_interval=3600, health_check_interval=3600) as pool:
        pool.open(wait=True)
        yield pool


def test_its_own_claims_and_releases_are_seen_at_once(pool):
    """Every GPU is found without a refusal, and each that is given back is found again."""
    held = [pool.acquire(timeout=0) for _ in range(6)]
    assert len({gpu.global_gpu_id for gpu in held}) == 6
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0)
    for gpu in held:
        gpu.release()
        with pool.gpu(timeout=0) as again:
            assert again.uuid == gpu.uuid
        pool._state.touch("another")  # what is not known any more does no harm
        held[held.index(gpu)] = pool.acquire(timeout=0)
    assert pool.stats()["refused"] == 0


def test_what_others_changed_costs_a_refusal_or_a_second_look_at_most(pool, fleet, store):
    """The arbiter decides: nothing is granted twice, and nothing that is free is missed."""
    pool.acquire(timeout=0).release()  # all six are remembered as free
    with GPUPool(fleet.urls, lease_store=store) as other:
        theirs = [other.acquire(timeout=20) for _ in range(5)]
        mine = pool.acquire(timeout=0)
        assert mine.uuid not in {gpu.uuid for gpu in theirs}
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=0)
        theirs[0].release()
        assert pool.acquire(timeout=0).uuid == theirs[0].uuid


def test_a_drained_endpoint_is_not_remembered(pool):
    """No grant after the call."""
    pool.acquire(timeout=0).release()
    first, second, third = (endpoint.endpoint_id for endpoint in pool.status().endpoints)
    pool.drain_endpoint(first)
    pool.remove_endpoint(second)
    held = [pool.acquire(timeout=0) for _ in range(2)]
    assert {gpu.endpoint_id for gpu in held} == {third}
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0)


def test_requests_that_nobody_repeats_are_forgotten(pool):
    """Memory stays bounded."""
    for number in range(100):
        pool.acquire(timeout=0, max_utilization_percent=50 + number / 10).release()
    assert len(pool._state.sights) <= looking.REMEMBERED_REQUESTS + 1
    for _ in range(100):
        pool.acquire(timeout=0).release()
    assert all(len(sight.touched) <= state.MOST_TOUCHED for sight in pool._state.sights.values())


def test_no_two_holders_overlap(pool):
    """Twelve threads, six GPUs."""
    log = HoldLog()

    def work(number):
        for _ in range(40):
            with pool.gpu(timeout=60) as gpu, log.holding(gpu.uuid, gpu.fencing_token):
                pass

    run_threads(12, work)
    assert len(log.holds()) == 480
    assert log.overlaps() == []
    assert log.token_regressions() == []
