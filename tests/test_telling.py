"""The teller: arbiters hear of what has ended, and nobody waits for that."""

from __future__ import annotations

import logging
import threading

import pytest

from gpupool_sync import AcquireTimeout, GPUPool, telling
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.telling import MAX_AGE, MAX_AT_ONCE, RETRY_AFTER, Teller
from gpupool_sync.testing import FakeFleet
from helpers import eventually, run_threads


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Store:
    """An arbiter that hears, fails or hangs as the test wants."""

    def __init__(self, description="the store of a test", *, hangs=False) -> None:
        self.description = description
        self.heard: list[list[str]] = []
        self.error: Exception | None = None
        self.asked = threading.Event()
        self.gate = threading.Event()
        if not hangs:
            self.gate.set()

    def release(self, ids):
        self.asked.set()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.heard.append(list(ids))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def teller(clock):
    made = Teller(clock)
    yield made
    eventually(lambda: made.threads() == 0, message="no thread is left")


def told(teller):
    """Wait until nobody is being told."""
    teller.finish(60)


def test_nobody_waits_for_an_arbiter_that_hangs(teller):
    """Neither who has it told, nor the other arbiters, however many hang."""
    hanging = [Store(hangs=True) for _ in range(5)]
    others = [Store() for _ in range(5)]
    for number, store in enumerate([*hanging, *others]):
        teller.tell(store, [f"id-{number}"])
    eventually(lambda: all(store.heard for store in others))
    assert all(store.asked.wait(60) and not store.heard for store in hanging)
    assert all(teller.owes(store) for store in hanging)
    for store in hanging:
        store.gate.set()
    told(teller)
    assert [store.heard for store in hanging] == [[[f"id-{number}"]] for number in range(5)]
    assert not any(teller.owes(store) for store in [*hanging, *others])


def test_what_comes_meanwhile_is_told_together(teller):
    """One arbiter is told by one thread at a time."""
    store = Store(hangs=True)
    teller.tell(store, ["a"])
    assert store.asked.wait(60)
    for claim_id in "bcdb":
        teller.tell(store, [claim_id])
    store.gate.set()
    told(teller)
    assert store.heard == [["a"], ["b", "c", "d"]]


def test_no_more_threads_than_there_may_be(teller):
    """The others are told when there is room."""
    stores = [Store(hangs=True) for _ in range(MAX_AT_ONCE + 8)]
    for store in stores:
        teller.tell(store, ["a"])
    eventually(lambda: sum(store.asked.is_set() for store in stores) == MAX_AT_ONCE)
    assert teller.threads() == MAX_AT_ONCE
    for store in stores:
        store.gate.set()
    told(teller)
    assert all(store.heard == [["a"]] for store in stores)


@pytest.mark.parametrize("error", [LeaseStoreError("it is away"), RuntimeError("it is broken")], ids=["away", "broken"])
def test_what_was_not_heard_is_told_again(teller, clock, caplog, error):
    """After a while, and not again and again."""
    store = Store()
    store.error = error
    with caplog.at_level(logging.INFO, logger="gpupool_sync"):
        teller.tell(store, ["a"])
        told(teller)
    assert "the store of a test" in caplog.text
    assert teller.owes(store)
    store.asked.clear()
    teller.repeat()
    told(teller)
    assert not store.asked.is_set()  # it is too early
    store.error = None
    clock.now += RETRY_AFTER
    teller.repeat()
    told(teller)
    assert store.heard == [["a"]]
    assert not teller.owes(store)


def test_something_new_is_told_at_once_with_what_is_owed(teller):
    """It may hear again."""
    store = Store()
    teller.tell(store, ["a"], after=RETRY_AFTER)
    told(teller)
    assert not store.asked.is_set()
    teller.tell(store, ["b"])
    told(teller)
    assert store.heard == [["a", "b"]]


def test_what_nobody_needs_to_know_any_more_is_forgotten(teller, clock):
    """Every lease has ended by then."""
    store = Store()
    store.error = LeaseStoreError("it is away")
    teller.tell(store, ["a"])
    told(teller)
    clock.now += MAX_AGE - 1.0
    teller.repeat()
    told(teller)
    assert teller.owes(store)
    clock.now += 1.0
    teller.repeat()
    assert not teller.owes(store)


def test_what_can_be_owed_is_bounded(teller, monkeypatch):
    """An arbiter that never comes back must not eat the memory."""
    monkeypatch.setattr(telling, "MAX_OWED", 3)
    store = Store()
    for number in range(9):
        teller.tell(store, [str(number)], after=RETRY_AFTER)
    teller.tell(store, [])
    told(teller)
    assert store.heard == [["0", "1", "2"]]


def test_the_end_waits_a_little_and_no_longer(teller):
    """What a closed arbiter was to be told, nobody needs to know."""
    store = Store(hangs=True)
    teller.tell(store, ["a"])
    assert store.asked.wait(60)
    teller.finish(0.01)
    assert store.heard == []
    teller.forget([store])
    assert not teller.owes(store)
    store.gate.set()
    eventually(lambda: store.heard == [["a"]])


def test_without_a_thread_it_is_told_later(teller, monkeypatch):
    """A limit of the container is not ours to complain of: the next look tells."""

    def no_thread(thread):
        raise RuntimeError("can't start new thread")

    store = Store()
    with monkeypatch.context() as patched:
        patched.setattr(telling, "start", no_thread)
        teller.tell(store, ["a"])
        teller.finish(60)
    assert not store.asked.is_set()
    teller.repeat()
    told(teller)
    assert store.heard == [["a"]]


def test_from_many_threads_everything_is_told_once(teller):
    """Nothing gets lost where a thread ends while another one has something to tell."""
    stores = [Store() for _ in range(3)]

    def work(number):
        for turn in range(200):
            teller.tell(stores[turn % 3], [f"{number}-{turn}"])

    run_threads(6, work)
    eventually(lambda: not any(map(teller.owes, stores)))
    heard = [claim_id for store in stores for ids in store.heard for claim_id in ids]
    assert sorted(heard) == sorted(f"{number}-{turn}" for number in range(6) for turn in range(200))


# -- in a pool ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers():
    with FakeFleet([1, 1, 1]) as fleet:
        yield fleet


@pytest.fixture
def deaf(servers, monkeypatch):
    """The last server hears of no end of a claim until this is set; `deaf.asked` is set when one should be told."""
    gate = threading.Event()
    gate.asked = threading.Event()
    release = HTTPStore.release

    def slowly(store, ids):
        if store.description.endswith(servers[2].url):
            gate.asked.set()
            assert gate.wait(120)
        release(store, ids)

    yield gate, lambda: monkeypatch.setattr(HTTPStore, "release", slowly)
    gate.set()


def waiting_everywhere(pool, number):
    """So many callers have a ticket at each of the servers."""
    queue = pool.leases().queue
    return len(queue) == 3 * number


@pytest.mark.real
def test_who_is_served_does_not_wait_until_the_others_know(servers, deaf):
    """The tickets at other arbiters are withdrawn behind its back, and its release goes to one arbiter."""
    gate, make_deaf = deaf
    with GPUPool(servers.urls, poll_interval=0.1) as holding, GPUPool(servers.urls, poll_interval=0.1) as pool:
        held = {gpu.url: gpu for gpu in [holding.acquire(timeout=60) for _ in range(3)]}
        granted, released = threading.Event(), threading.Event()

        def wait():
            with pool.gpu(timeout=100) as gpu:
                assert gpu.url == servers[0].url
                granted.set()
            released.set()

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: waiting_everywhere(pool, 1), timeout=60)
        make_deaf()
        held[servers[0].url].release()
        assert granted.wait(60)
        assert released.wait(60)
        thread.join(60)
        assert gate.asked.wait(60)
        queue = pool.leases().queue
        assert len(queue) == 1  # the others know; this one does not yet
        gate.set()
        eventually(lambda: not pool.leases().queue, timeout=60)
        assert pool.stats()["store_errors"] == 0


@pytest.mark.real
def test_who_gives_up_does_not_wait_until_all_know(servers, deaf):
    """Its time has passed."""
    gate, make_deaf = deaf
    with GPUPool(servers.urls, poll_interval=0.1) as holding, GPUPool(servers.urls, poll_interval=0.1) as pool:
        held = [holding.acquire(timeout=60) for _ in range(3)]
        make_deaf()
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=2.0)
        assert gate.asked.wait(60)
        gate.set()
        eventually(lambda: not pool.leases().queue, timeout=60)
        assert len(held) == 3


@pytest.mark.real
def test_closing_waits_until_they_know(servers, deaf, monkeypatch):
    """A pool that ends leaves no ticket behind."""
    gate, make_deaf = deaf
    finish = Teller.finish

    def finishing(teller, timeout):
        gate.set()
        finish(teller, 60)

    with GPUPool(servers.urls, poll_interval=0.1) as holding:
        held = {gpu.url: gpu for gpu in [holding.acquire(timeout=60) for _ in range(3)]}
        pool = GPUPool(servers.urls, poll_interval=0.1)
        thread = threading.Thread(target=lambda: pool.acquire(timeout=100))
        thread.start()
        eventually(lambda: waiting_everywhere(holding, 1), timeout=60)
        make_deaf()
        held[servers[1].url].release()
        thread.join(60)
        assert gate.asked.wait(60)
        monkeypatch.setattr(Teller, "finish", finishing)
        pool.close()
        assert not holding.leases().queue
