"""A process that watches a subset of many servers: which it polls, and what it finds all the same."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpupool_sync import AcquireTimeout, GPUPool, NoSuchGPU
from gpupool_sync.testing import FakeFleet
from helpers import eventually

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def servers():
    with FakeFleet(["1xA100", "1xA100", "1xA100", "1xH100"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(servers):
    yield servers
    for server in servers:
        server.heal()


def watched(pool):
    return {each.endpoint_id for each in pool.status().endpoints if each.watched}


def read(pool):
    return {each.endpoint_id for each in pool.status().endpoints if each.last_seen is not None}


def test_only_the_subset_is_polled(fleet):
    """`status()` lists every server and says which are watched; the others get no request."""
    with GPUPool(fleet.urls, watch=2, poll_interval=0.05) as pool:
        pool.open(wait=True)
        mine = watched(pool)
        assert len(mine) == 2
        eventually(lambda: pool.stats()["polls"] >= 12, message="the subset is polled again and again")
        assert read(pool) == mine == watched(pool)
        assert len(pool.status().endpoints) == 4


def test_all_are_watched_where_nothing_else_is_asked_for(fleet):
    """Four servers are not many."""
    with GPUPool(fleet.urls) as pool:
        pool.open(wait=True)
        assert len(watched(pool)) == 4


def test_a_subset_that_refuses_is_widened_until_the_last_free_gpu_is_found(fleet):
    """Four GPUs are had though one server is watched; afterwards the subset is small again."""
    with GPUPool(fleet.urls, watch=1, poll_interval=0.2) as pool:
        held = [pool.acquire(timeout=30) for _ in range(4)]
        assert len({gpu.uuid for gpu in held}) == 4
        assert len(watched(pool)) == 1
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=0.5)
        assert len(watched(pool)) <= 2
        for gpu in held:
            gpu.release()


def test_what_only_one_server_has_is_found_wherever_it_is(fleet):
    """Nothing in the subset suits, so more are asked at once, not interval by interval."""
    with GPUPool(fleet.urls, watch=1, poll_interval=60) as pool:
        begin = time.monotonic()
        with pool.gpu(timeout=30, model="H100") as gpu:
            assert "H100" in gpu.name
        assert time.monotonic() - begin < 30
        assert len(watched(pool)) == 1


def test_a_server_that_is_named_is_asked_without_a_search(fleet):
    """By its id; it need not be watched before."""
    with GPUPool(fleet.urls, watch=1, poll_interval=60) as pool:
        pool.open(wait=True)
        other = next(each.endpoint_id for each in pool.status().endpoints if not each.watched)
        with pool.gpu(timeout=20, endpoint=other) as gpu:
            assert gpu.endpoint_id == other
        assert len(read(pool)) == 2, "the watched one, and the named one"


def test_no_such_gpu_only_after_all_were_asked(fleet):
    """What no server has is told at once, but not before each of them has answered."""
    with GPUPool(fleet.urls, watch=2, poll_interval=60) as pool:
        with pytest.raises(NoSuchGPU):
            pool.acquire(timeout=30, model="B200")
        assert len(read(pool)) == 4


def test_a_dead_member_is_replaced(fleet):
    """The breaker of a watched server opens, and another server is watched in its place."""
    with GPUPool(fleet.urls, watch=2, poll_interval=0.05, breaker_failures=2, endpoint_max_retries=0) as pool:
        pool.open(wait=True)
        before = watched(pool)
        urls = {each.endpoint_id: each.url for each in pool.status().endpoints}
        dead = min(before)
        next(server for server in fleet if server.url == urls[dead]).fail(503)
        eventually(lambda: dead not in watched(pool), timeout=20, message="the dead one is replaced")
        assert len(watched(pool)) == 2
        assert before - {dead} <= watched(pool), "the others stay"


def test_servers_that_are_added_and_removed(fleet):
    """One that goes is made up for; one that comes has its turn."""
    with GPUPool(fleet.urls[:3], watch=2, poll_interval=60) as pool:
        pool.open(wait=True)
        new = pool.add_endpoint(fleet.urls[3])
        assert new not in watched(pool)
        gone = min(watched(pool))
        pool.remove_endpoint(gone)
        assert len(watched(pool)) == 2
        for endpoint_id in [each.endpoint_id for each in pool.status().endpoints if each.endpoint_id != new]:
            pool.remove_endpoint(endpoint_id)
        assert watched(pool) == {new}
        with pool.gpu(timeout=20) as gpu:
            assert gpu.endpoint_id == new


def test_explain_says_that_a_server_is_not_watched(fleet):
    """A server without a reading is not said to be silent."""
    with GPUPool(fleet.urls, watch=3, poll_interval=60) as pool:
        pool.open(wait=True)
        told = [text for text in pool.explain().endpoints.values() if "not watched" in text]
        assert len(told) == 1


def test_a_hint_of_a_server_that_is_not_watched_any_more_is_answered(fleet):
    """Its ticket has been there since: a GPU that is kept for it must not wait until the server has its turn again."""
    with GPUPool(fleet.urls, poll_interval=0.2) as holder, GPUPool(fleet.urls, watch=1, poll_interval=60) as pool:
        held = {gpu.endpoint_id: gpu for gpu in (holder.acquire(timeout=30) for _ in range(4))}
        with ThreadPoolExecutor(1) as threads:
            waits = threads.submit(pool.acquire, timeout=60)
            eventually(
                lambda: len(holder.leases().queue) == 2, message="it waits at two servers, once it has looked around"
            )
            engine = pool._state.engine
            former = watched(pool)
            while former & watched(pool):
                engine.widen()
            for endpoint_id in former:
                pool._state.table.forget(endpoint_id)  # as if what it said had become too old
            left = former.pop()
            held.pop(left).release()
            gpu = waits.result(timeout=30)
        assert gpu.endpoint_id == left
        assert left in watched(pool)
        gpu.release()
        for each in held.values():
            each.release()
