"""Failures and recoveries: each pair of them is a test, with real servers."""

from __future__ import annotations

import threading
import time

import pytest

from gpupool_sync import AcquireTimeout
from helpers import eventually

#: What fails, how, and what is said of it.  Partial: server1 fails, the others do not; else it is alone.
FAILURES = {
    "connection_failures": (lambda server: server.kill(), "refused the connection", False),
    "service_failures_4xx": (lambda server: server.fail(404), "status 404", False),
    "service_failures_5xx": (lambda server: server.fail(500), "status 500", False),
    "service_failures_error_body": (lambda server: server.error_body("no driver"), "no driver", False),
    "timeout_failures": (lambda server: server.hang(), "no complete answer within", False),
    "partial_failures": (lambda server: server.fail(503), "status 503", True),
}


@pytest.fixture(params=FAILURES)
def failing(request, make_pool, fleet, names):
    """A pool, and functions that begin the failure of server1 and end it; what is said of it; who else is there."""
    begin, told, partial = FAILURES[request.param]
    # A breaker that nobody half-opens in the time of a test, unless the test says how.
    pool = make_pool(names if partial else names[:1], endpoint_timeout=0.5, max_stats_age=900.0)
    pool.open()
    assert pool.refresh(30)

    class Failing:
        def __init__(self):
            self.pool = pool
            self.told = told
            self.others = {"server2", "server3"} if partial else set()

        def begin(self):
            begin(fleet[0])

        def end(self):
            fleet[0].heal()

        @property
        def state(self):
            return pool.status().endpoints[0]

    return Failing()


def test_circuit_breaker_prevents_cascading_failures(failing):
    """After two failures nobody is sent there; the other endpoints' breakers stay closed; one good answer closes it."""
    failing.begin()
    eventually(lambda: failing.state.breaker != "closed", 40)
    assert failing.told in failing.state.last_error
    assert {each.breaker for each in failing.pool.status().endpoints[1:]} <= {"closed"}
    with pytest.raises(AcquireTimeout, match="server1: is down"):
        failing.pool.acquire(timeout=0, endpoint="server1")
    failing.end()
    eventually(lambda: failing.state.breaker == "closed", 40)
    assert failing.state.breaker_changes >= 2


def test_exponential_backoff_retries_failed_endpoints_with_increasing_delays(failing):
    """The pause until the next probe doubles, up to the health check interval, less up to a quarter of jitter."""
    failing.begin()
    eventually(lambda: failing.state.breaker != "closed", 40)
    polled = failing.pool._state.engine.endpoints["server1"]
    polled._longest_pause = 1000.0
    pauses = []
    for failed in range(6):
        polled._opened = failed
        pauses.append(polled.pause())
    assert all(0.05 * 2**n * 0.75 <= pause <= 0.05 * 2**n for n, pause in enumerate(pauses))
    polled._opened, polled._longest_pause = 50, 0.2
    assert 0.15 <= polled.pause() <= 0.2


def test_health_checks_detect_endpoint_recovery(failing):
    """By themselves and periodically: nobody asks for anything."""
    failing.begin()
    eventually(lambda: not failing.state.is_healthy, 40)
    seen = failing.state.last_seen
    failing.end()
    eventually(lambda: failing.state.is_healthy, 40)
    assert failing.state.last_seen > seen
    assert failing.state.last_error is None


def test_graceful_degradation_continues_with_reduced_capacity(failing):
    """What was held stays held; the other endpoints grant; without any, requests wait until it is back."""
    held = failing.pool.acquire(timeout=20, endpoint="server1")
    failing.begin()
    eventually(lambda: failing.state.breaker != "closed", 40)
    assert not held.lost
    if failing.others:
        with failing.pool.gpu(timeout=20) as gpu:
            assert gpu.endpoint_id in failing.others
        failing.end()
        return
    got = []
    waiting = threading.Thread(target=lambda: got.append(failing.pool.acquire(timeout=50)), daemon=True)
    waiting.start()
    eventually(lambda: failing.pool.status().blocked_workers == 1, 20)
    assert not got
    failing.end()
    waiting.join(50)
    assert got[0].endpoint_id == "server1"


def test_all_endpoints_down_requests_queue_until_one_recovers(pool, fleet):
    """First come, first served; whoever has a timeout hears of it in time, and why."""
    for server in fleet:
        server.kill()
    eventually(lambda: all(each.breaker != "closed" for each in pool.status().endpoints), 40)
    with pytest.raises(AcquireTimeout, match=r"server3: is down"):
        pool.acquire(timeout=0.1)
    order = []

    def wait(number):
        with pool.gpu(timeout=50, endpoint="server2"):
            order.append(number)
            time.sleep(0)

    threads = []
    for number in range(2):
        threads.append(threading.Thread(target=wait, args=(number,), daemon=True))
        threads[-1].start()
        eventually(lambda number=number: pool.status().blocked_workers == number + 1, 20)
    fleet[1].restart()
    for thread in threads:
        thread.join(50)
    assert sorted(order) == [0, 1]
    assert pool.status().healthy_endpoints == 1
