"""The teller: arbiters hear of what has ended, and nobody waits for that."""

from __future__ import annotations

import logging
import threading

import pytest

from gpupool_sync import AcquireTimeout, GPUPool, PoolClosed, telling
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases.base import StoreClosed
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

    scope = "everybody"
    __hash__ = None  # a user's own may be like that

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
        teller.tell([store], [f"id-{number}"])
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
    teller.tell([store], ["a"])
    assert store.asked.wait(60)
    for claim_id in "bcdb":
        teller.tell([store], [claim_id])
    store.gate.set()
    told(teller)
    assert store.heard == [["a"], ["b", "c", "d"]]


def test_no_more_threads_than_there_may_be(teller):
    """The others are told when there is room."""
    stores = [Store(hangs=True) for _ in range(MAX_AT_ONCE + 8)]
    for store in stores:
        teller.tell([store], ["a"])
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
        teller.tell([store], ["a"])
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
    teller.tell([store], ["a"], after=RETRY_AFTER)
    told(teller)
    assert not store.asked.is_set()
    teller.tell([store], ["b"])
    told(teller)
    assert store.heard == [["a", "b"]]


def test_what_nobody_needs_to_know_any_more_is_forgotten(teller, clock):
    """Every ttl has ended by then. Those of this machine have none."""
    store, local = Store(), Store()
    local.scope = "host"
    for each in (store, local):
        each.error = LeaseStoreError("it is away")
    teller.tell([store, local], ["a"])
    told(teller)
    clock.now += MAX_AGE - 1.0
    teller.repeat()
    told(teller)
    assert teller.owes(store)
    clock.now += 1.0
    teller.repeat()
    told(teller)
    assert not teller.owes(store)
    assert teller.owes(local)


def test_what_can_be_owed_is_bounded(teller, clock, monkeypatch):
    """An arbiter that never comes back must not eat the memory."""
    monkeypatch.setattr(telling, "MAX_OWED", 3)
    store = Store()
    store.error = LeaseStoreError("it is away")
    for number in range(9):
        teller.tell([store], [str(number)], after=RETRY_AFTER)
    for number in range(9):
        store.asked.clear()
        store.gate.clear()
        teller.tell([store], [])
        assert store.asked.wait(60)
        teller.tell([store], [f"meanwhile-{number}"])
        store.gate.set()
        told(teller)
    store.error = None
    teller.tell([store], [])
    told(teller)
    assert store.heard == [["0", "1", "2"]]


def test_a_closed_arbiter_is_owed_nothing(teller):
    """Who gives up while a pool closes may be late."""
    store = Store()
    store.error = StoreClosed("closed")
    teller.tell([store], ["a"])
    told(teller)
    assert store.asked.is_set()
    assert not teller.owes(store)


def test_the_end_waits_a_little_and_no_longer(teller):
    """A pool closes although a server hangs."""
    store = Store(hangs=True)
    teller.tell([store], ["a"])
    assert store.asked.wait(60)
    teller.finish(0.01)
    assert store.heard == []
    store.gate.set()
    told(teller)
    assert store.heard == [["a"]]


def test_without_a_thread_it_is_told_later(teller, monkeypatch):
    """A limit of the container is not ours to complain of: the next look tells."""

    def no_thread(thread):
        raise RuntimeError("can't start new thread")

    store = Store()
    with monkeypatch.context() as patched:
        patched.setattr(telling, "start", no_thread)
        teller.tell([store], ["a"])
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
            teller.tell([stores[turn % 3]], [f"{number}-{turn}"])

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
        eventually(lambda: len(pool.leases().queue) == 1, timeout=60)  # the others know; this one does not yet
        gate.set()
        eventually(lambda: not pool.leases().queue, timeout=60)
        assert pool.stats()["store_errors"] == 0


@pytest.mark.real
def test_who_gives_up_does_not_wait_until_all_know(servers, deaf):
    """Its time has passed."""
    gate, make_deaf = deaf
    with GPUPool(servers.urls, poll_interval=0.1) as holding, GPUPool(servers.urls, poll_interval=0.1) as pool:
        held = [holding.acquire(timeout=60) for _ in range(3)]
        given_up = threading.Event()
        acquiring = pool.gpu(timeout=100)

        def wait():
            with pytest.raises(PoolClosed, match="cancelled"), acquiring:
                pass
            given_up.set()

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: waiting_everywhere(pool, 1), timeout=60)
        make_deaf()
        acquiring.cancel()
        assert given_up.wait(60)
        thread.join(60)
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


# -- two ways to one server -----------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("change", ["the endpoint is added anew", "the other URL is taken"])
def test_what_ends_on_one_way_to_a_server_does_not_end_on_the_other(servers, change):
    """Its ticket by the former way is withdrawn; the lease that it has by the new one stays."""
    url = servers[0].url
    by_name = url.replace("127.0.0.1", "localhost")
    urls = [url] if "anew" in change else [url, by_name]
    with GPUPool([url], poll_interval=0.1) as others, GPUPool(urls, poll_interval=0.1) as pool:
        held = others.acquire(timeout=60)
        granted = []
        thread = threading.Thread(target=lambda: granted.append(pool.acquire(timeout=100)))
        thread.start()
        eventually(lambda: others.leases().queue, timeout=60)
        (former,) = next(iter(pool._state.grants.values())).asked
        if "anew" in change:
            pool.remove_endpoint(next(iter(pool._state.engine.endpoints)))
            pool.add_endpoint(url)
        else:
            pool.drain_endpoint(
                next(each.endpoint_id for each in pool.status().endpoints if each.url in former.description)
            )
        eventually(lambda: len(others.leases().queue) == 2, timeout=60, message="it stands in line by the new way")
        held.release()
        thread.join(60)
        eventually(lambda: not pool._state.teller.owes(former), timeout=60)
        assert not others.leases().queue
        assert len(others.leases().leases) == 1
        with pytest.raises(AcquireTimeout):
            others.acquire(timeout=0)
        granted[0].release()
        assert others.acquire(timeout=60).uuid == granted[0].uuid
