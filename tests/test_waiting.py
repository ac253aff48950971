"""Who listens to an arbiter, and what it says when that is gone."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpupool_sync import GPUPool, waiting
from gpupool_sync.errors import LeaseStoreError
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
