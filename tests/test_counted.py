"""What the pool costs its servers and its process, counted where it arrives: at real servers on loopback."""

from __future__ import annotations

import gc
import json
import os
import threading
import time

import pytest

from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, holding
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from helpers import connections_to, eventually, run_threads
from servers import Server, answer, head

SUMMARY = json.dumps(
    {
        "gpu_count": 2,
        "gpus_summary": [
            {"gpu_id": n, "name": "A100", "memory_usage_percent": 1.0, "utilization_percent": 0.0} for n in range(2)
        ],
        "timestamp": "2026-01-01T00:00:00",
    }
).encode()


def make_pool(endpoints, **options):
    defaults = {"lease_store": MemoryStore(), "poll_interval": 60.0, "health_check_interval": 60.0}
    return GPUPool(endpoints, **{**defaults, **options})


def test_100_polls_use_one_connection():
    """Connections are kept, and no request is made beside the polls."""
    with Server(answer(SUMMARY)) as server, make_pool(server.url, poll_interval=0.01) as pool:
        eventually(lambda: len(server.requests) >= 100, timeout=30, message="100 polls")
        assert pool.status().healthy_endpoints == 1
        assert server.connections == 1
        assert {each.path for each in server.requests} == {"/gpu/summary"}


def test_1000_acquires_cause_no_health_request(monkeypatch):
    """Whether an endpoint is well is known from the polls; without releases there is not one more request."""
    with Server(answer(SUMMARY)) as server, make_pool(server.url) as pool:
        pool.open(wait=True)
        for _ in range(1000):
            pool.acquire(timeout=0, max_holders=1000)
        assert pool.stats()["held"] == 1000
        assert [each.path for each in server.requests] == ["/gpu/summary"]


def test_1000_releases_are_one_nudge_each_half_second(monkeypatch):
    """A release wants a new reading; a thousand want the same one."""
    monkeypatch.setattr(holding, "SHORT_LEASE", 0.0)
    with Server(answer(SUMMARY)) as server, make_pool(server.url) as pool:
        pool.open(wait=True)
        begin = time.monotonic()
        for _ in range(1000):
            pool.acquire(timeout=0).release()
        assert len(server.requests) <= 2 + (time.monotonic() - begin) / 0.5
        eventually(lambda: len(server.requests) >= 2, message="there is a nudge")


def test_a_release_at_once_wants_no_new_reading(monkeypatch):
    """Nothing has been put on the GPU by then; after a longer lease one is wanted."""
    monkeypatch.setattr(holding, "SHORT_LEASE", 60.0)
    with Server(answer(SUMMARY)) as server, make_pool(server.url) as pool:
        pool.open(wait=True)
        for _ in range(3):
            pool.acquire(timeout=0).release()
        before = len(server.requests)
        gpu = pool.acquire(timeout=0)
        monkeypatch.setattr(holding, "SHORT_LEASE", 0.0)
        gpu.release()
        eventually(lambda: len(server.requests) == before + 1, message="there is a nudge")
        assert before == 1


def test_100_refreshes_at_the_same_time_are_at_most_two_polls():
    """All of them wait for a poll that began after their call; they share it."""
    hold, release, polls = threading.Event(), threading.Event(), []

    def script(connection):
        while True:
            polls.append(connection.request().path)
            if hold.is_set():
                while not release.is_set():
                    connection.pause(0.01)
            connection.send(head(length=len(SUMMARY)) + SUMMARY)

    with Server(script) as server, make_pool(server.url, endpoint_timeout=50.0) as pool:
        pool.open(wait=True)
        hold.set()
        before = len(polls)
        ended = []
        threads = [threading.Thread(target=lambda: ended.append(pool.refresh(50))) for _ in range(100)]
        for each in threads:
            each.start()
        (entry,) = pool._state.engine.monitor._entries.values()
        eventually(lambda: len(entry.round) + len(entry.next_round) == 100, message="all of them wait")
        assert not ended
        release.set()
        for each in threads:
            each.join(50)
        assert ended == [True] * 100
        assert 1 <= len(polls) - before <= 2


@pytest.fixture(scope="module")
def fleet():
    with FakeFleet([2, 1]) as fleet:
        yield fleet


@pytest.mark.real
def test_50_leases_renew_in_one_request():
    """However many leases a process has at a server: one request each third of the ttl."""
    with FakeFleet([50]) as fleet:
        (server,) = fleet
        with GPUPool(server.url, poll_interval=60.0, health_check_interval=60.0, ttl=6.0) as pool:
            pool.open(wait=True)
            held = run_threads(50, lambda number: pool.acquire(timeout=30))
            assert {gpu.scope for gpu in held} == {"everybody"}
            first = server.request_count("/v1/leases/renew")
            good_until = [gpu._tie.grant.good_until() for gpu in held]
            eventually(
                lambda: all(gpu._tie.grant.good_until() > before for gpu, before in zip(held, good_until, strict=True)),
                message="each lease has been renewed",
            )
            # One; a second may have begun before the counting was done.
            assert server.request_count("/v1/leases/renew") - first <= 2
            for gpu in held:
                gpu.check()


@pytest.mark.real
@pytest.mark.parametrize("use", ["polls", "leases", "waiter", "failures"])
def test_after_close_descriptors_and_threads_are_as_before(use, fleet):
    """Whatever the pool was used for."""

    def once():
        endpoints = [Endpoint(each.url, name=each.name) for each in fleet]
        with GPUPool(endpoints, poll_interval=0.05, health_check_interval=0.1) as pool:
            pool.open(wait=True)
            if use == "leases":
                held = [pool.acquire(timeout=20) for _ in range(3)]
                held[0].release()
            elif use == "waiter":
                with pool.gpus(2), pool.gpu(), pytest.raises(AcquireTimeout):
                    pool.acquire(timeout=0.2)
            elif use == "failures":
                fleet[0].fail(500)
                eventually(lambda: pool.stats()["endpoints"][fleet[0].name]["failures"] > 3)
                fleet[0].heal()
                pool.remove_endpoint(fleet[1].name)

    once()  # what is made once for the process
    eventually(lambda: not [each for each in threading.enumerate() if each.name.startswith("gpupool")])
    gc.collect()  # or what others left to the collector goes in between
    threads, descriptors = set(threading.enumerate()), opened()
    once()
    eventually(lambda: set(threading.enumerate()) <= threads, message=threading.enumerate)
    eventually(lambda: opened() == descriptors, message=lambda: f"{opened()} and before {descriptors}")
    assert connections_to(*(each.port for each in fleet)) == 0


def opened():
    """What this process has open, but for the pipes of the fleet and of pytest: kinds, with their number."""
    kinds: dict[str, int] = {}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        kind = target.partition("[")[0] if ":[" in target else target
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds
