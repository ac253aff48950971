"""The keeper: leases with a ttl are renewed in time, and a lost one is told once and for good."""

from __future__ import annotations

import logging
import threading

import pytest

from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.keeper import LOST, Keeper
from helpers import eventually


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds) -> None:
        self.now += seconds


class Store:
    """An arbiter that renews, fails or forgets as the test wants."""

    description = "the store of a test"

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.gone: set[str] = set()
        self.error: Exception | None = None
        self.during = lambda: None
        self.gate = threading.Event()
        self.gate.set()

    def renew(self, ids):
        self.requests.append(list(ids))
        self.gate.wait(30)
        self.during()
        if self.error is not None:
            raise self.error
        return {each: each not in self.gone for each in ids}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lost():
    return []


@pytest.fixture
def keeper(clock, lost, monkeypatch):
    """A keeper without a thread: the test takes its steps."""
    made = Keeper(lost.append, clock=clock, spawn=lambda work: work())
    monkeypatch.setattr(made, "ensure_running", lambda: None)
    return made


def test_a_lease_is_renewed_at_a_third_of_its_ttl(keeper, clock):
    """Long before anybody could take it."""
    store = Store()
    keeper.add("a", store, 30.0, clock())
    clock.advance(9.9)
    keeper.step()
    assert store.requests == []
    clock.advance(0.1)
    keeper.step()
    assert store.requests == [["a"]]
    assert keeper.good_until("a") == clock() + 24.0


def test_fifty_leases_of_one_arbiter_renew_in_one_request(keeper, clock):
    """Also when they were granted at different times."""
    store, other = Store(), Store()
    for number in range(50):
        keeper.add(f"lease-{number}", store, 30.0, clock() + number / 10.0)
    keeper.add("elsewhere", other, 30.0, clock())
    clock.advance(10.0)
    keeper.step()
    assert [len(ids) for ids in store.requests] == [50]
    assert other.requests == [["elsewhere"]]
    clock.advance(9.0)
    keeper.step()
    assert len(store.requests) == 1
    clock.advance(1.0)
    keeper.step()
    assert [len(ids) for ids in store.requests] == [50, 50]


def test_a_holder_gives_up_before_the_arbiter_does(keeper, clock, lost):
    """At 0.8 of the ttl since the last renewal that succeeded was sent."""
    store = Store()
    store.error = LeaseStoreError("down")
    keeper.add("a", store, 10.0, clock())
    assert keeper.good_until("a") == clock() + 8.0
    while clock() < 1007.9:
        clock.advance(0.5)
        keeper.step()
    assert len(store.requests) > 5
    assert lost == ["a"]
    assert keeper.good_until("a") == 1008.0


def test_an_arbiter_that_comes_back_in_time_costs_nothing(keeper, clock, lost):
    """A renewal that fails is repeated soon."""
    store = Store()
    store.error = LeaseStoreError("down")
    keeper.add("a", store, 10.0, clock())
    clock.advance(4.0)
    keeper.step()
    store.error = None
    clock.advance(0.5)
    keeper.step()
    assert keeper.good_until("a") == clock() + 8.0
    assert lost == []


def test_the_time_of_the_answer_does_not_count(keeper, clock):
    """The ttl is counted from before the renewal was sent, however slow its answer."""
    store = Store()
    store.during = lambda: clock.advance(2.0)
    keeper.add("a", store, 30.0, clock())
    clock.advance(10.0)
    keeper.step()
    assert keeper.good_until("a") == 1010.0 + 24.0


def test_lost_is_final(keeper, clock, lost):
    """An answer that comes after the holder had to give up revives nothing."""
    store = Store()
    store.during = lambda: clock.advance(10.0)
    keeper.add("a", store, 10.0, clock())
    clock.advance(4.0)
    keeper.step()
    assert keeper.good_until("a") == 1008.0
    keeper.step()
    keeper.step()
    assert lost == ["a"]
    assert len(store.requests) == 1


def test_a_lease_that_the_arbiter_does_not_know_is_lost_at_once(keeper, clock, lost):
    """Revoked, or expired there."""
    store = Store()
    store.gone = {"a"}
    keeper.add("a", store, 30.0, clock())
    keeper.add("b", store, 30.0, clock())
    clock.advance(10.0)
    keeper.step()
    keeper.step()
    assert lost == ["a"]
    assert keeper.good_until("a") == LOST
    assert keeper.good_until("b") == clock() + 24.0


def test_a_released_lease_is_neither_renewed_nor_lost(keeper, clock, lost):
    """Who gave it back hears no more of it."""
    store = Store()
    keeper.add("a", store, 10.0, clock())
    keeper.remove("a")
    keeper.remove("a")
    clock.advance(100.0)
    keeper.step()
    assert (store.requests, lost, keeper.good_until("a"), len(keeper)) == ([], [], None, 0)


def test_an_error_in_on_lost_is_logged_and_kills_nothing(clock, monkeypatch, caplog):
    """A heartbeat that raises is not a heartbeat that died."""
    told = []

    def on_lost(lease_id):
        told.append(lease_id)
        raise ValueError("of the user")

    keeper = Keeper(on_lost, clock=clock, spawn=lambda work: work())
    monkeypatch.setattr(keeper, "ensure_running", lambda: None)
    store = Store()
    store.error = RuntimeError("a bug in the store")
    keeper.add("a", store, 10.0, clock())
    keeper.add("b", store, 10.0, clock())
    clock.advance(5.0)
    with caplog.at_level(logging.ERROR):
        keeper.step()
        clock.advance(5.0)
        keeper.step()
    assert sorted(told) == ["a", "b"]
    assert "on_lost raised" in caplog.text
    assert "renewing at the store of a test broke" in caplog.text


def test_one_thread_renews_and_ends_when_nothing_is_left(lost):
    """The real thread: it renews, and goes by itself."""
    keeper = Keeper(lost.append)
    store = Store()
    assert keeper._thread is None
    keeper.add("a", store, 60.0, keeper._clock() - 20.5)
    thread = keeper._thread
    eventually(lambda: store.requests, message="it renews")
    assert thread.name == "gpupool-keeper"
    assert thread.daemon
    keeper.remove("a")
    thread.join(10)
    assert not thread.is_alive()
    keeper.add("b", store, 60.0, keeper._clock())
    assert keeper._thread.is_alive()
    keeper.stop()
    assert lost == []


def test_an_arbiter_that_hangs_delays_no_other(lost):
    """Each is asked on a thread of its own, and only once at a time."""
    keeper = Keeper(lost.append)
    hung, alive = Store(), Store()
    hung.gate.clear()
    now = keeper._clock()
    keeper.add("hung", hung, 3.0, now - 1.0)
    eventually(lambda: hung.requests, message="it is asked")
    keeper.add("alive", alive, 9.0, now - 3.0)
    eventually(lambda: len(alive.requests) >= 2, message="the other one is renewed again and again")
    eventually(lambda: lost == ["hung"], message="the lease at the hung one is lost in time")
    assert len(hung.requests) == 1
    hung.gate.set()
    keeper.stop()
    assert keeper.good_until("alive") > now


def test_a_thread_that_died_is_started_again(lost, monkeypatch):
    """Supervision: the next look at it does."""
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    keeper = Keeper(lost.append)
    dying = threading.Event()

    def die():
        dying.set()
        raise SystemExit  # not an error that the keeper would survive

    keeper.step = die
    keeper.add("a", Store(), 60.0, keeper._clock())
    assert dying.wait(20)
    eventually(lambda: keeper._thread is None, message="the thread is gone")
    del keeper.step
    keeper.ensure_running()
    assert keeper._thread.is_alive()
    keeper.stop()


def test_leases_that_follow_one_another_share_a_thread(lost):
    """To start one for each would cost more than all else that is done for a short lease."""
    keeper = Keeper(lost.append)
    store = Store()
    keeper.add("first", store, 60.0, keeper._clock())
    thread = keeper._thread
    for number in range(50):
        keeper.remove("first" if number == 0 else f"lease-{number}")
        keeper.add(f"lease-{number + 1}", store, 60.0, keeper._clock())
        assert keeper._thread is thread
    keeper.stop()
    assert not thread.is_alive()
    assert store.requests == lost == []


def test_a_lease_that_is_due_before_the_others_wakes_the_thread(lost, monkeypatch):
    """It sleeps until the first of those that it knew is due."""
    monkeypatch.setattr("gpupool_sync.keeper.LONGEST_SLEEP", 600.0)
    keeper = Keeper(lost.append)
    early, late = Store(), Store()
    keeper.add("late", late, 3000.0, keeper._clock())
    eventually(lambda: 500.0 < keeper._wakes_at - keeper._clock() <= 600.0, message="it sleeps for long")
    keeper.add("early", early, 60.0, keeper._clock() - 19.0)
    eventually(lambda: early.requests == [["early"]], message="it is renewed when it is due")
    keeper.stop()
    assert late.requests == lost == []
