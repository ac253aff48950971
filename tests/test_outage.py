"""When most endpoints vanish at once it is told once that our own network may be the cause, and that they are back."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, keeper
from gpupool_sync.cli.status import render, summary
from gpupool_sync.clock import boottime
from gpupool_sync.keeper import GIVE_UP
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.outage import LEAST_ENDPOINTS, TEXT, Outages
from gpupool_sync.testing import FakeFleet
from helpers import eventually

WINDOW = 10.0


class World:
    """Endpoints that are polled, and what an `Outages` is told of them."""

    def __init__(self, *polled):
        self.now = 1000.0
        self.polled = list(polled)
        self.outages = Outages(WINDOW)
        for each in polled:
            assert self.tell(each, True) is None

    def tell(self, endpoint_id, reached, later=0.0):
        self.now += later
        return self.outages.note(endpoint_id, reached, self.now, lambda: self.polled)

    @property
    def under_way(self):
        return self.outages.text is not None


def test_more_than_half_at_once_is_an_outage_and_it_is_told_once():
    """The third of five begins it; what fails and recovers while it lasts says no more."""
    world = World(*"abcde")
    assert [world.tell(each, False, 1.0) for each in "ab"] == [None, None]
    assert not world.under_way
    assert world.tell("c", False, 1.0) == (3, 5)
    assert world.outages.text == TEXT
    assert [world.tell(each, False, 1.0) for each in "abcde"] == [None] * 5
    assert [world.tell(each, True, 60.0) for each in "ab"] == [None, None]
    assert world.under_way
    assert world.tell("c", True) == (2, 5)
    assert not world.under_way


def test_servers_that_fail_one_after_the_other_are_none():
    """Each of them had its own reason: between two falls there is more than the window."""
    world = World(*"abcde")
    assert [world.tell(each, False, WINDOW + 1) for each in "abcde"] == [None] * 5
    assert not world.under_way


@pytest.mark.parametrize(
    ("polled", "fallen"), [("abcd", "ab"), ("ab", "ab"), ("a", "a"), ("abcdefg", "abc")], ids=lambda value: str(value)
)
def test_half_of_them_or_too_few_are_none(polled, fallen):
    """Half may have a switch in common; of two endpoints both may be one machine."""
    world = World(*polled)
    assert [world.tell(each, False) for each in fallen] == [None] * len(fallen)
    assert not world.under_way
    assert len(polled) < LEAST_ENDPOINTS or 2 * len(fallen) <= len(polled)


def test_those_that_were_dead_before_or_never_answered_do_not_count():
    """Of six, three were down for long: two of the other three are most of them."""
    world = World(*"abcde")
    world.polled.append("f")
    world.tell("f", False)
    world.tell("d", False)
    world.tell("e", False)
    assert world.tell("a", False, WINDOW + 1) is None
    assert world.tell("b", False) == (2, 3)
    # Nor do they keep it from ending, or their return end it.
    assert [world.tell(each, True) for each in "def"] == [None] * 3
    assert world.under_way
    assert world.tell("a", True) is None
    assert world.tell("b", True) == (0, 2)


def test_what_is_still_down_afterwards_begins_no_second_one():
    """An outage that is over is over: the next one needs its own falls."""
    world = World(*"abcd")
    [world.tell(each, False) for each in "abc"]
    assert world.tell("a", True) is None
    assert world.tell("b", True) == (1, 3)
    assert world.tell("a", False) is None
    assert not world.under_way
    assert world.tell("d", False) == (2, 3)


def test_endpoints_that_are_polled_instead_of_dead_ones_tell_of_the_end():
    """Where a subset is watched, those that are down may never be asked again."""
    world = World(*"abcd")
    [world.tell(each, False) for each in "abc"]
    world.polled = ["d", "x", "y", "z"]
    assert world.tell("x", False) is None
    assert world.tell("y", True) is None
    assert world.under_way
    assert world.tell("z", True) == (1, 3)
    assert not world.under_way


def test_the_end_of_those_that_it_hit_is_its_end():
    """A pool whose user has removed the dead endpoints does not speak of its network for ever."""
    world = World(*"abcd")
    [world.tell(each, False) for each in "abc"]
    for each in "abc":
        world.polled.remove(each)
        told = world.tell(each, None)
    assert told == (0, 0)
    assert not world.under_way


# -- a pool ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running_fleet():
    with FakeFleet([1, 1, 1, 1], names=["north", "east", "south", "west"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(running_fleet):
    for server in running_fleet:
        server.heal()
    return running_fleet


@pytest.fixture
def pool(fleet, caplog):
    caplog.set_level(logging.INFO, logger="gpupool_sync.membership")
    named = [Endpoint(server.url, name=server.name) for server in fleet]
    options = {"poll_interval": 0.05, "health_check_interval": 0.2, "endpoint_timeout": 20.0, "breaker_failures": 2}
    with GPUPool(named, lease_store=MemoryStore(), **options) as pool:
        pool.open(wait=True)
        eventually(lambda: pool.status().healthy_endpoints == 4)
        yield pool


def told(caplog):
    """What was logged of our network: level and message."""
    return [
        (each.levelname, each.getMessage())
        for each in caplog.records
        if each.name == "gpupool_sync.membership" and "endpoints" in each.getMessage()
    ]


@pytest.mark.real
def test_a_pool_tells_it_once_goes_on_and_recovers_by_itself(fleet, pool, caplog):
    """Leases stay, what answers is granted, and nobody has to do anything for the end of it."""
    held = pool.acquire(timeout=20, endpoint="north")
    for server in fleet[:3]:
        server.kill()
    eventually(lambda: pool.status().hint == TEXT, message="it is an outage")
    # Until then they are a last resort, by their last readings.
    eventually(lambda: [each.breaker for each in pool.status().endpoints].count("closed") == 1)
    assert not held.lost
    with pool.gpu(timeout=20) as gpu:
        assert gpu.endpoint_id == "west"
        with pytest.raises(AcquireTimeout, match="this machine's own network"):
            pool.acquire(timeout=0)
    for shown in (str(pool.explain()), pool.explain()._repr_html_(), summary(pool.status())):
        assert "own network" in shown
    assert "own network" in pool.status()._repr_html_()
    assert TEXT in [str(each) for each in render(pool.status()).renderables]
    for server in fleet[:3]:
        server.restart()
    eventually(lambda: pool.status().healthy_endpoints == 4, message="they are found again")
    assert pool.status().hint is None
    assert pool.explain().hint is None
    assert not held.lost
    levels, messages = zip(*told(caplog), strict=True)
    assert levels == ("WARNING", "INFO")
    assert "of 4 endpoints became unreachable within" in messages[0]
    assert "reachable again" in messages[1]
    pool.release(held)


TTL = 60.0
VANISH = {"killed": lambda server: server.kill(), "frozen": lambda server: server.freeze()}


@pytest.mark.real
@pytest.mark.parametrize("how", VANISH)
def test_a_lease_outlives_an_outage_that_hits_its_arbiter(fleet, caplog, monkeypatch, how):
    """Where endpoints grant the leases: renewals fail for less than the ttl, then the lease is renewed again."""
    # Many renewals, and yet a ttl that a slow machine does not use up.
    monkeypatch.setattr(keeper, "RENEW", 0.02)
    caplog.set_level(logging.INFO)
    named = [Endpoint(server.url, name=server.name) for server in fleet]
    options = {"poll_interval": 0.05, "health_check_interval": 0.2, "endpoint_timeout": 4.0, "breaker_failures": 2}

    def leases_of(server):
        return requests.get(f"{server.url}/v1/leases", timeout=30).json()["leases"]

    with GPUPool(named, ttl=TTL, **options) as pool, ThreadPoolExecutor(1) as apart:
        pool.open(wait=True)
        eventually(lambda: pool.status().healthy_endpoints == 4)
        # Looked at from inside while servers are frozen: status() asks each of them, and waits for its answer.
        state = pool._state
        held = pool.acquire(timeout=20, endpoint="north")
        good_until = held._tie.grant.good_until
        first = good_until()
        eventually(lambda: good_until() > first, message="it is renewed")
        for server in fleet[:3]:
            VANISH[how](server)
        gone = boottime()
        eventually(lambda: state.outages.text == TEXT, message="it is an outage")
        eventually(lambda: "leases could not be renewed" in caplog.text, message="a renewal has failed")
        polled = state.engine.endpoints.values()
        eventually(lambda: [each.numbers().breaker for each in polled].count("closed") == 1)
        assert not held.lost
        held.check()
        with pool.gpu(timeout=20) as gpu:
            assert gpu.endpoint_id == "west"
            with pytest.raises(AcquireTimeout, match="this machine's own network"):
                pool.acquire(timeout=0)
            waiting = apart.submit(pool.acquire, timeout=90)
            eventually(lambda: len(state.waiting) == 1, message="somebody waits meanwhile")
            assert good_until() < gone + GIVE_UP * TTL, "nothing has renewed it"
            held.check()
            for server in fleet[:3]:
                server.heal()
            back = boottime()
            later = waiting.result(100)
            assert later.endpoint_id in ("east", "south")
        eventually(lambda: pool.status().healthy_endpoints == 4, message="they are found again")
        eventually(lambda: good_until() >= back + GIVE_UP * TTL, message="the lease is renewed again")
        held.check()
        (lease,) = leases_of(fleet[0])
        assert lease["token"] == held.fencing_token
        assert pool.status().hint is None
        levels, messages = zip(*told(caplog), strict=True)
        assert levels == ("WARNING", "INFO")
        assert "of 4 endpoints became unreachable within" in messages[0]
        assert "reachable again" in messages[1]
        token = held.fencing_token
        pool.release(later)
        pool.release(held)
        assert leases_of(fleet[0]) == []
        with pool.gpu(timeout=20, endpoint="north") as again:
            assert again.fencing_token > token


@pytest.mark.real
def test_servers_that_answer_with_errors_are_no_matter_of_the_network(fleet, pool, caplog):
    """All of them say 503: they were reached."""
    for server in fleet:
        server.fail(503)
    eventually(lambda: pool.status().healthy_endpoints == 0)
    assert pool.status().hint is None
    assert not told(caplog)


@pytest.mark.real
@pytest.mark.parametrize("end", ["close", "remove"])
def test_closing_a_pool_or_removing_endpoints_is_no_outage(fleet, pool, caplog, end, monkeypatch):
    """Polls that we end ourselves tell nothing, however many."""
    for server in fleet:
        server.hang()
    under_way = pool._state.engine.monitor._lanes["fast"].started
    names = {server.name for server in fleet}
    eventually(lambda: set(under_way) == names, message="each of them is being polled")
    if end == "remove":
        for name in ("north", "east", "south"):
            pool.remove_endpoint(name)
        assert pool.status().hint is None
    monitor = pool._state.engine.monitor
    stop, polled = monitor.stop, list(pool._state.engine.endpoints.values())

    def stop_later(timeout):
        eventually(lambda: all(each.sick for each in polled), message="the polls under way have failed")
        return stop(timeout)

    monkeypatch.setattr(monitor, "stop", stop_later)
    pool.close()
    assert not told(caplog)
