"""Who listens to an arbiter, and what it says when that is gone."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpupool_sync import GPUPool, waiting
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from gpupool_sync.waiting import Listener, Waiter, WaitingRoom
from helpers import eventually


class Deaf:
    """A store whose arbiter answers as `answers` says, over and over."""

    description = "server of nobody"

    def __init__(self) -> None:
        self.answers = False
        self.failures = self.successes = 0

    def listen(self, timeout):
        if self.answers:
            self.successes += 1
        else:
            self.failures += 1
            raise LeaseStoreError("no answer")


@pytest.fixture
def told(caplog):
    """How often a warning came."""
    caplog.set_level(logging.INFO, logger="gpupool_sync")
    return lambda: sum(record.levelno == logging.WARNING for record in caplog.records)


def test_an_arbiter_that_is_gone_is_told_once(monkeypatch, told):
    """A wait of hours for a server that is down is not a screen full of the same line; a new outage is news."""
    monkeypatch.setattr(waiting, "RECHECK", 0.001)
    store, room, waiter = Deaf(), WaitingRoom(None), Waiter("one")
    listener = Listener(store)
    room.join(waiter)
    try:
        listener.listen_for(room)
        eventually(lambda: store.failures >= 5, 20)
        assert told() == 1
        store.answers = True
        eventually(lambda: store.successes >= 2, 20)
        store.answers, before = False, store.failures
        eventually(lambda: store.failures >= before + 5, 20)
        assert told() == 2
    finally:
        room.leave(waiter)
        eventually(lambda: listener._thread is None, 20)


@pytest.mark.real
def test_who_waits_is_told_once_that_the_server_is_gone(monkeypatch, caplog):
    """Asked again and again, as it may come back; on the screen it is news once."""
    caplog.set_level(logging.INFO, logger="gpupool_sync")
    monkeypatch.setattr(waiting, "RECHECK", 0.02)

    def refusals(level):
        return sum(record.levelno >= level and "no lease from" in record.getMessage() for record in caplog.records)

    with FakeFleet([1]) as fleet, GPUPool(fleet.urls, poll_interval=0.2) as pool:
        held = pool.acquire(timeout=30)
        with ThreadPoolExecutor(1) as threads:
            waits = threads.submit(pool.acquire, timeout=50)
            try:
                eventually(lambda: pool.stats()["waiting"] == 1, 20)
                fleet[0].kill()
                eventually(lambda: refusals(logging.INFO) >= 5, 30)
                assert refusals(logging.WARNING) == 1
            finally:
                fleet[0].restart()
                held.release()
            waits.result(50).release()


class Flaky(MemoryStore):
    """A store whose arbiter does not hear the first few claims."""

    def __init__(self, deaf: int) -> None:
        super().__init__()
        self.deaf = deaf
        self.heard = 0

    def claim(self, claim):
        if self.deaf:
            self.deaf -= 1
            raise LeaseStoreError("the connection was cut")
        self.heard += 1
        return super().claim(claim)


@pytest.mark.real
def test_a_claim_that_did_not_arrive_is_made_again_soon(monkeypatch):
    """Without a ticket it has no place in the queue: a second later somebody younger would be served first."""
    monkeypatch.setattr(waiting, "RECHECK", 300.0)
    store = Flaky(4)
    with FakeFleet([1]) as fleet, GPUPool(fleet.urls, lease_store=store) as pool, pool.gpu(timeout=60):
        assert store.heard == 1


def test_claims_that_do_not_arrive_come_ever_more_slowly():
    """An arbiter that is down is not asked ten times a second by everybody who waits."""
    room = WaitingRoom(None)
    pauses = [room.recheck(failures) for failures in range(8)]
    assert pauses[0] == waiting.RECHECK
    assert pauses[1] == waiting.RETRY
    assert pauses[1:] == sorted(pauses[1:])
    assert pauses[-1] == waiting.RECHECK


def test_hints_that_may_be_lost_make_the_oldest_look_again(monkeypatch):
    """What was under way when the connection broke is not told again."""
    monkeypatch.setattr(waiting, "RECHECK", 0.001)
    store, room = Deaf(), WaitingRoom(None)
    waiters = [Waiter(str(number)) for number in range(waiting.LOOK_AGAIN + 1)]
    for waiter in waiters:
        room.join(waiter)
    listener = Listener(store)
    try:
        listener.listen_for(room)
        assert all(waiter.wait(20.0) for waiter in waiters[:-1])
        assert not waiters[-1].wait(0.0)
    finally:
        for waiter in waiters:
            room.leave(waiter)
        eventually(lambda: listener._thread is None, 20)


def test_hints_are_listened_for_again_soon(monkeypatch):
    """Between two tries none is heard: whoever is told of its turn then would miss it."""
    monkeypatch.setattr(waiting, "RECHECK", 300.0)
    monkeypatch.setattr(waiting, "RETRY", 0.001)
    store, room, waiter = Deaf(), WaitingRoom(None), Waiter("one")
    listener = Listener(store)
    room.join(waiter)
    try:
        listener.listen_for(room)
        eventually(lambda: store.failures >= 3, 20)
        store.answers = True
        eventually(lambda: store.successes >= 2, 20)
    finally:
        room.leave(waiter)
        eventually(lambda: listener._thread is None, 20)


class Ears:
    """A store that anybody can listen to: it passes a hint to `waiter` when `hint` is called."""

    description = "ears"

    def __init__(self) -> None:
        self.listeners: list[str] = []
        self.listening = threading.Semaphore(0)
        self._come = threading.Semaphore(0)
        self.waiter: Waiter | None = None

    def is_listening(self):
        return True

    def end_listening(self):
        self._come.release()

    def hint(self, waiter):
        self.waiter = waiter
        self._come.release()

    def listen(self, timeout):
        self.listeners.append(threading.current_thread().name)
        self.listening.release()
        self._come.acquire(timeout=timeout)
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.wake()


def test_who_waits_alone_listens_without_a_thread():
    """The way by another thread would cost as much as all the rest of a grant."""
    store, room, waiter = Ears(), WaitingRoom(None), Waiter("one")
    listener = Listener(store)
    room.join(waiter)
    with ThreadPoolExecutor(1) as threads:
        woken = threads.submit(listener.wait, waiter, room, 50.0)
        assert store.listening.acquire(timeout=20)
        store.hint(waiter)
        assert woken.result(20) is True
        assert len(set(store.listeners)) == 1
    assert listener._thread is None


def test_who_listens_alone_is_woken_by_others_too():
    """Such as a pool that closes: that is no hint of the arbiter."""
    store, room, waiter = Ears(), WaitingRoom(None), Waiter("one")
    listener = Listener(store)
    room.join(waiter)
    with ThreadPoolExecutor(1) as threads:
        woken = threads.submit(listener.wait, waiter, room, 50.0)
        assert store.listening.acquire(timeout=20)
        room.wake_all()
        assert woken.result(20) is True


def test_who_listens_alone_comes_back_in_time():
    """It has a deadline, and looks again by itself now and then."""
    store, room, waiter = Ears(), WaitingRoom(None), Waiter("one")
    room.join(waiter)
    assert Listener(store).wait(waiter, room, 0.01) is False


def test_a_second_waiter_brings_the_thread():
    """Who listens by itself may be served at any time, and then does not hear for others any more."""
    store, room = Ears(), WaitingRoom(None)
    first, second = Waiter("first"), Waiter("second")
    listener = Listener(store)
    room.join(first)
    with ThreadPoolExecutor(2) as threads:
        alone = threads.submit(listener.wait, first, room, 50.0)
        assert store.listening.acquire(timeout=20)
        room.join(second)
        with_thread = threads.submit(listener.wait, second, room, 50.0)
        assert store.listening.acquire(timeout=20)
        assert store.listeners[-1] == "gpupool-listener"
        first.wake()
        assert alone.result(20) is True
        room.leave(first)
        store.hint(second)
        assert with_thread.result(20) is True
        room.leave(second)
        eventually(lambda: listener._thread is None or store.end_listening(), 20)


def test_the_thread_listens_when_who_listened_alone_has_left(tmp_path):
    """While both listen, one of them may take the message that was to wake the other."""
    store, room = HostStore(str(tmp_path / "locks")), WaitingRoom(None)
    listener = Listener(store)
    first, second = Waiter("first"), Waiter("second")
    room.join(first)
    store._need_socket()  # as a ticket does
    began = threading.Event()
    listen = store.listen

    def noted(timeout):
        began.set()
        listen(timeout)

    store.listen = noted
    with ThreadPoolExecutor(2) as threads:
        alone = threads.submit(listener.wait, first, room, 50.0)
        assert began.wait(20)
        room.join(second)
        with_thread = threads.submit(listener.wait, second, room, 50.0)
        eventually(lambda: listener._thread is not None and listener._alone is None, 20)
        assert first._ears is None
        room.wake_all()
        assert alone.result(20) is with_thread.result(20) is True
        room.leave(first)
        room.leave(second)
    store.end_listening()
    eventually(lambda: listener._thread is None, 20)
    store.close()


def test_who_listens_alone_is_woken_again():
    """The end of its listening may be lost once, such as to a server in the same process."""
    ended = []
    waiter = Waiter("one")
    waiter._ears = -1, lambda: ended.append(True)
    waiter.wake()
    waiter.wake()
    assert len(ended) == 2
