"""Every way in which an endpoint fails, with every way back; and who gets the work meanwhile.  Real servers."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter

import pytest

from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, acquiring
from gpupool_sync.clock import boottime
from gpupool_sync.config import Settings
from gpupool_sync.leases.base import Granted, NotAsked
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from gpupool_sync.transport import Pace
from helpers import eventually, run_threads
from servers import Server, answer, answer_when_released, cut_off, refusing
from test_leases_contract import claim

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def running_fleet():
    with FakeFleet([2, 2, 2], names=["left", "middle", "right"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(running_fleet):
    for server in running_fleet:
        server.heal()
    return running_fleet


def make_pool(servers, **options):
    named = [Endpoint(server.url, name=server.name) for server in servers]
    defaults = {
        "lease_store": MemoryStore(),
        "poll_interval": 0.05,
        "health_check_interval": 0.2,
        "endpoint_timeout": 20.0,
        "breaker_failures": 2,
    }
    return GPUPool(named, **{**defaults, **options})


def state(pool, name):
    return next(each for each in pool.status().endpoints if each.endpoint_id == name)


def is_open(pool, name):
    """Whether the breaker keeps callers away; half-open it is while a probe is under way, maybe most of the time."""
    return state(pool, name).breaker in ("open", "half-open")


#: What fails, and what the last error says.  "partial": one endpoint of two fails, the other goes on.
FAILURES = {
    "connection": (lambda server: server.kill(), "refused the connection"),
    "service 4xx": (lambda server: server.fail(404), "status 404"),
    "service 5xx": (lambda server: server.fail(503), "status 503"),
    "service error body": (lambda server: server.error_body("no driver"), "no driver"),
    "timeout": (lambda server: server.hang(), "no complete answer within"),
    "partial": (lambda server: server.fail(500), "status 500"),
}


@pytest.fixture(params=FAILURES)
def failure(request, fleet):
    """Makes what the parameter names fail; tells the servers of the pool, and which of them fail."""
    fail, told = FAILURES[request.param]
    broken = fleet[:1]
    servers = fleet[:2] if request.param == "partial" else broken

    class Failure:
        def __init__(self):
            self.all_of_them = servers
            # Elsewhere no poll is ever too slow, however busy the machine is.
            self.options = {"endpoint_timeout": 1.5} if request.param == "timeout" else {}
            self.well = [each for each in servers if each not in broken]
            self.text = told

        def begin(self):
            for each in broken:
                fail(each)

        def end(self):
            for each in broken:
                each.heal()

    return Failure()


# -- each failure, each recovery -------------------------------------------------------------------------------


def test_the_breaker_opens_and_closes(failure):
    """Circuit breaker: after two failures nobody is sent there; one good answer and it is back."""
    with make_pool(failure.all_of_them, **failure.options) as pool:
        pool.open(wait=True)
        failure.begin()
        eventually(lambda: is_open(pool, "left"), timeout=30, message="the breaker opens")
        down = state(pool, "left")
        assert failure.text in down.last_error
        assert (down.is_healthy, down.available_gpus, down.total_gpus) == (False, 0, 2)
        with pytest.raises(AcquireTimeout, match="left: is down"):
            pool.acquire(timeout=0, endpoint="left")
        failure.end()
        eventually(lambda: state(pool, "left").breaker == "closed", timeout=30, message="the breaker closes")
        with pool.gpu(timeout=20, endpoint="left") as gpu:
            assert gpu.endpoint_id == "left"
        assert pool.stats()["endpoints"]["left"]["breaker_changes"] >= 3


def test_pauses_between_attempts_grow(failure):
    """Exponential backoff: each probe of a server that is down comes later than the one before, up to the longest."""
    with make_pool(failure.all_of_them, **failure.options, health_check_interval=0.4) as pool:
        pool.open(wait=True)
        failure.begin()
        polled = pool._state.engine.endpoints["left"]
        eventually(lambda: polled._opened >= 3, timeout=40, message="three probes in vain")
        # From the shortest, 0.05 s, by doubling; jitter takes up to a quarter, and never adds.
        assert all(0.3 <= polled.pause() <= 0.4 for _ in range(50))
        failure.end()
        eventually(lambda: state(pool, "left").is_healthy, timeout=30, message="it is back")
        assert polled.pause() == 0.05


def test_health_checks_find_the_recovery(failure):
    """Health checks: nobody asks for a GPU, and all the same it is noticed that the server is back."""
    with make_pool(failure.all_of_them, **failure.options) as pool:
        pool.open(wait=True)
        seen = state(pool, "left").last_seen
        failure.begin()
        eventually(lambda: not state(pool, "left").is_healthy, timeout=30)
        assert state(pool, "left").last_seen >= seen
        failure.end()
        eventually(lambda: state(pool, "left").is_healthy, timeout=30, message="found by the polls alone")
        assert pool.status().available_gpus == 2 * len(failure.all_of_them)
        assert pool.stats()["requests"] == 0


def test_the_pool_goes_on_with_what_is_left(failure):
    """Graceful degradation: what answers is granted at once; what does not is waited for, and nobody gets an error."""
    with make_pool(failure.all_of_them, **failure.options) as pool:
        pool.open(wait=True)
        failure.begin()
        eventually(lambda: is_open(pool, "left"), timeout=30)
        status = pool.status()
        assert (status.healthy_endpoints, status.total_gpus) == (len(failure.well), 2 * len(failure.well))
        handles = [pool.acquire(timeout=0) for _ in range(status.total_gpus)]
        assert {gpu.endpoint_id for gpu in handles} == {each.name for each in failure.well}
        got = []
        threads = [threading.Thread(target=lambda: got.append(pool.acquire(timeout=50))) for _ in range(2)]
        for each in threads:
            each.start()
        eventually(lambda: pool.stats()["waiting"] == 2, message="requests queue")
        failure.end()
        for each in threads:
            each.join(50)
        assert [gpu.endpoint_id for gpu in got] == ["left", "left"]
        assert got[0].uuid != got[1].uuid


# -- failures of the connection that the fleet does not have ---------------------------------------------------


def summary():
    return (
        b'{"gpu_count": 1, "timestamp": "t", "gpus_summary": '
        b'[{"gpu_id": 0, "name": "A100", "memory_usage_percent": 1.0, "utilization_percent": 0.0}]}'
    )


@pytest.mark.parametrize(
    ("scripts", "told"),
    [
        ((cut_off(summary(), 40),) * 3, "broke off after 40 of"),
        ((answer(b"<html>busy</html>", times=1),) * 3, "JSON"),
        ((answer(summary()[:-5], times=1),) * 3, "JSON"),
    ],
    ids=["broken off", "not JSON", "half a document"],
)
def test_half_an_answer_is_a_failure_and_the_next_whole_one_counts(scripts, told):
    """Nothing is granted from what is incomplete."""
    with Server(*scripts, answer_when_released(summary())) as server:
        options = {"poll_interval": 0.05, "health_check_interval": 0.1, "breaker_failures": 2, "endpoint_timeout": 40.0}
        with GPUPool(server.url, lease_store=MemoryStore(), endpoint_max_retries=0, **options) as pool:
            with pytest.raises(AcquireTimeout, match=told):
                pool.acquire(timeout=0)
            server.release()
            assert pool.acquire(timeout=20).local_gpu_id == 0
            assert server.connections >= 4


def test_a_server_that_repeats_its_reading_is_stale_until_it_has_a_new_one(caplog):
    """It answers well and at once, but with one timestamp for ever: nobody has looked at its cards since."""
    frozen = threading.Event()
    numbers = itertools.count()

    def body(request):
        return summary().replace(b'"t"', b'"frozen"' if frozen.is_set() else b'"%d"' % next(numbers))

    def codes(pool):
        return [card.code for card in pool.explain().cards]

    options = {"poll_interval": 0.02, "max_stats_age": 1.5, "endpoint_timeout": 20.0}
    with (
        Server(answer(body)) as server,
        GPUPool([Endpoint(server.url, name="left")], lease_store=MemoryStore(), **options) as pool,
    ):
        with pool.gpu(timeout=20):
            pass
        frozen.set()
        eventually(lambda: codes(pool) == ["stale"], message="its readings grow old")
        polls = len(server.requests)
        eventually(lambda: len(server.requests) > polls + 3, message="it goes on answering")
        with pytest.raises(AcquireTimeout, match=r"left: its server repeats a reading of \d+ s ago"):
            pool.acquire(timeout=0)
        seen = state(pool, "left")
        assert (seen.is_healthy, seen.stale, seen.available_gpus) == (True, True, 0)
        assert "repeats a reading" in pool.status().gpus[0].why_not
        assert sum("has not changed for more than 1.5 s" in each.getMessage() for each in caplog.records) == 1
        frozen.clear()
        with pool.gpu(timeout=20) as gpu:
            assert gpu.endpoint_id == "left"
        assert not state(pool, "left").problems


def test_a_port_that_refuses_and_answers_later():
    """A server that is started after the pool."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(refusing())
        pool = stack.enter_context(GPUPool([Endpoint(url, name="late")], lease_store=MemoryStore(), poll_interval=0.05))
        with pytest.raises(AcquireTimeout, match="late: has not answered yet: the server refused the connection"):
            pool.acquire(timeout=0)


# -- who gets the work -----------------------------------------------------------------------------------------


def shares(pool, number):
    """Where so many GPUs in a row come from."""
    found = Counter()
    for _ in range(number):
        with pool.gpu(timeout=30) as gpu:
            found[gpu.endpoint_id] += 1
    return found


@pytest.mark.parametrize("strategy", ["round_robin", "weighted"])
def test_load_is_redistributed_and_gradually_given_back(fleet, strategy, monkeypatch):
    """A failed server's share goes to the others in equal parts; back again, it starts with a tenth of it."""
    with make_pool(fleet, strategy=strategy, health_check_interval=1000.0, max_stats_age=900.0) as pool:
        pool.open(wait=True)
        for each in shares(pool, 60).values():
            assert each == pytest.approx(20, abs=2)
        polled = pool._state.engine.endpoints["left"]
        fleet[0].fail(500)
        eventually(lambda: polled.open, timeout=30, message="it fails")
        found = shares(pool, 60)
        assert found["left"] == 0
        assert found["middle"] == pytest.approx(30, abs=3)
        assert found["right"] == pytest.approx(30, abs=3)
        fleet[0].heal()
        pool.refresh(30)
        assert state(pool, "left").breaker == "closed"
        # Which decisions it takes part in is drawn; here every draw comes up equally often.
        draws = iter([(7 * n % 20 + 0.5) / 20 for n in range(100_000)])
        monkeypatch.setattr(acquiring, "_random", lambda: next(draws))
        at_first = shares(pool, 100)["left"]
        assert 1 <= at_first <= 20
        polled._recovered_at = boottime() - 500.0  # half of the health check interval
        later = shares(pool, 100)["left"]
        assert at_first < later
        polled._recovered_at = boottime() - 1000.0
        for each in shares(pool, 99).values():
            assert each == pytest.approx(33, abs=4)


def test_a_recovering_server_is_the_last_resort_meanwhile(fleet):
    """Its reduced share keeps nobody waiting: when the others are full, it is granted."""
    with make_pool(fleet[:2], health_check_interval=1000.0, max_stats_age=900.0) as pool:
        pool.open(wait=True)
        fleet[0].fail(500)
        eventually(lambda: pool._state.engine.endpoints["left"].open, timeout=30)
        fleet[0].heal()
        pool.refresh(30)
        assert pool._state.engine.endpoints["left"].reintroduced() < 0.2
        assert Counter(pool.acquire(timeout=0).endpoint_id for _ in range(4)) == {"left": 2, "middle": 2}


def test_the_literal_strategy_takes_the_highest_share(fleet):
    """``spread=False``: the highest percentage first, whatever a crowd does."""
    with make_pool(fleet[:2], strategy_options={"spread": False}) as pool:
        pool.open(wait=True)
        for _ in range(20):
            pool._state.strategy.feedback("middle", False)  # a crowd, which makes the default strategy draw
        first = pool.acquire(timeout=0)
        for _ in range(10):
            with pool.gpu(timeout=0) as gpu:
                assert gpu.endpoint_id != first.endpoint_id


# -- rate limits -----------------------------------------------------------------------------------------------


def test_the_own_cap_is_kept(fleet):
    """``max_rate`` bounds the polls, however often others ask for them."""
    server = fleet[0]
    capped = Endpoint(server.url, name="left", max_rate=20)
    with GPUPool([capped], lease_store=MemoryStore(), poll_interval=0.01, endpoint_timeout=5.0) as pool:
        pool.open(wait=True)
        before, begin = server.request_count(), time.monotonic()
        for _ in range(5):
            assert pool.refresh(30)
        polled, took = server.request_count() - before, time.monotonic() - begin
        assert polled >= 4
        assert polled <= 20 * took + 2


def test_the_own_cap_holds_for_leases_too(fleet):
    """
    Polls, claims and waits share one cap, counted at the server, while four threads struggle for two cards.

    Releases and renewals are sent at once, and the others wait for them: only those that came last may be ahead.
    """
    server, rate = fleet[0], 30
    capped = Endpoint(server.url, name="left", max_rate=rate)
    with GPUPool([capped], poll_interval=0.02, health_check_interval=0.1, endpoint_timeout=5.0) as pool:
        pool.open(wait=True)
        at_once = ("/v1/leases/release", "/v1/leases/renew")

        def counted():
            return server.request_count(None), sum(map(server.request_count, at_once))

        before, urgent_before, begin = *counted(), time.monotonic()

        def work(number):
            for _ in range(5):
                with pool.gpu(timeout=60, local=False):
                    pass

        run_threads(4, work, timeout=100)
        (after, urgent_after), took = counted(), time.monotonic() - begin
        assert urgent_after - urgent_before >= 20
        assert after - before - (urgent_after - urgent_before) <= rate * took + 2
        assert after - before <= rate * took + 6
        assert pool.stats()["grants"] == 20
        assert pool.stats()["endpoints"]["left"]["failures"] == 0


def test_renewals_and_releases_do_not_wait_for_the_own_cap(fleet):
    """The next turn is an hour away: a lease is renewed and given back all the same, and nothing else is asked."""
    server = fleet[0]
    pace = Pace(100.0)
    store = HTTPStore(Endpoint(server.url, max_rate=100.0), Settings(), pace=pace)
    with contextlib.closing(store):
        with make_pool([server]) as pool:
            pool.open(wait=True)
            card = pool._state.table.view()[0]["left"].cards[0].key
        mine = claim(card)
        assert isinstance(store.claim(mine), Granted)
        pace._next = time.monotonic() + 3600
        paths = ("/v1/leases", "/v1/leases/renew", "/v1/leases/release")
        before = [server.request_count(path) for path in paths]
        for refused in (lambda: store.claim(claim(card)), store.leases, store.queue):
            with pytest.raises(NotAsked, match="max_rate=100 allows the next request only in 3"):
                refused()
        assert store.renew([mine.id]) == {mine.id: True}
        store.release([mine.id])
        after = [server.request_count(path) for path in paths]
        assert [now - then for now, then in zip(after, before, strict=True)] == [0, 1, 1]
        # They were counted: the hour has become longer by two turns.
        assert pace._next > time.monotonic() + 3500


def test_a_ticket_of_a_claim_that_was_not_made_is_not_kept(fleet):
    """Else its listener would ask for hints that cannot come."""
    pace = Pace(1.0)
    pace._next = time.monotonic() + 3600
    with contextlib.closing(HTTPStore(Endpoint(fleet[0].url, max_rate=1.0), Settings(), pace=pace)) as store:
        before = fleet[0].request_count()
        with pytest.raises(NotAsked):
            store.claim(claim("GPU-1", queue=True))
        assert not store._tickets
        store.listen(0.01)  # nobody to listen for: returns at once
        assert fleet[0].request_count() == before


def test_a_poll_whose_turn_is_far_away_is_no_failure(fleet):
    """One request in three seconds, and more wanted: the server is well, and a refresh is a reading all the same."""
    server = fleet[0]
    capped = Endpoint(server.url, name="left", max_rate=1 / 3)
    with GPUPool([capped], lease_store=MemoryStore(), poll_interval=0.05, endpoint_timeout=0.4) as pool:
        pool.open(wait=True)
        before = server.request_count()
        assert pool.refresh(30)
        assert server.request_count() > before
        told = state(pool, "left")
        assert (told.is_healthy, told.last_error) == (True, None)
        assert pool.stats()["endpoints"]["left"]["failures"] == 0


def test_a_server_that_asks_for_patience_gets_no_claims(fleet):
    """429 with Retry-After holds for requests for leases, too; a release is sent all the same."""
    server = fleet[0]
    options = {"lease_store": None, "poll_interval": 60.0, "health_check_interval": 60.0, "max_stats_age": 900.0}
    with make_pool([server], **options) as pool:
        with pool.gpu(timeout=20):
            server.fail(429, retry_after=200)
            with pytest.raises(AcquireTimeout):
                pool.acquire(timeout=0, max_holders=1)
            (store,) = pool._state.engine.servers.values()
            assert isinstance(store, HTTPStore)
            claims = server.request_count(None)
            for _ in range(5):
                with pytest.raises(AcquireTimeout):
                    pool.acquire(timeout=0)
            assert server.request_count(None) == claims
            server.heal()
        assert server.request_count("/v1/leases/release") >= 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_moves_the_next_poll(fleet, status):
    """By what the server says, whatever the status that comes with it; only 503 is a sign of sickness."""
    with make_pool(fleet[:1], breaker_failures=1, poll_interval=0.05, max_stats_age=900.0) as pool:
        pool.open(wait=True)
        fleet[0].fail(status, retry_after=100)
        eventually(lambda: state(pool, "left").consecutive_failures, timeout=30)
        polled = pool._state.engine.endpoints["left"]
        assert polled.open is (status == 503)
        entry = pool._state.engine.monitor._entries["left"]
        eventually(lambda: entry.due > time.monotonic() + 50, message="the next poll is far away")
