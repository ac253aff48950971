"""
An error that was caught keeps nothing alive.

A frame that has a variable with the error that was raised through it is a cycle, which only Python's collector ends; a
frame keeps its callers' frames, and these the handle that an interrupt has left behind.  That handle's death is how the
pool learns that it has to release.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import threading
import weakref

import pytest

from cards import Cards, local_pool
from gpupool_sync import Endpoint, GPUPool, acquiring, holding, starting
from gpupool_sync.config import Settings
from gpupool_sync.errors import EndpointUnavailable, GPUPoolError
from gpupool_sync.leases import host
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.leases.redis import RedisStore
from gpupool_sync.testing import FakeFleet
from helpers import eventually
from servers import Server, answer, close_after_request, cut_off, hang, head, refusing, reset_after_request
from test_leases_contract import claim


class Anchor:
    """What a caller has on its stack, as `with pool.gpu()` has."""


def pinned(call, *errors):
    """Whether the caller's frame is still there after *call* has failed; what it raised."""
    raised = []

    def caller():
        anchor = Anchor()
        try:
            call()
        except errors as exc:
            raised.append(type(exc))
        return weakref.ref(anchor)

    gc.collect()
    gc.disable()
    try:
        reference = caller()
        return reference() is not None, raised
    finally:
        gc.enable()


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("there", [True, False], ids=["granted all the same", "refused"])
def test_a_full_file_system(monkeypatch, tmp_path, there):
    """The ticket cannot be left; who gets a card all the same has it without."""
    with contextlib.closing(HostStore(str(tmp_path / "locks"))) as store:
        taken = claim("a", who="other")
        store.claim(taken)
        if there:
            store.release([taken.id])
        monkeypatch.setattr(host.HostStore, "_leave_ticket", no_room)
        monkeypatch.setattr(host.HostStore, "crowded", lambda store: True)
        wish = claim("a", queue=True)
        kept, raised = pinned(lambda: store.claim(wish), GPUPoolError)
        assert not kept
        assert bool(raised) is not there


@pytest.mark.parametrize("cards", ["ab", "a"], ids=["one has room", "none has room"])
def test_a_card_whose_record_cannot_be_written(monkeypatch, tmp_path, cards):
    """A card that was held before has room for its record."""
    with contextlib.closing(HostStore(str(tmp_path / "locks"))) as store:
        taken = claim("b")
        store.claim(taken)
        store.release([taken.id])
        lock = HostStore._lock_card
        monkeypatch.setattr(HostStore, "_lock_card", lambda store, key: no_room() if key == "a" else lock(store, key))
        kept, raised = pinned(lambda: store.claim(claim(*cards)), GPUPoolError)
        assert not kept
        assert bool(raised) is (cards == "a")


SCRIPTS = {
    "hangs": hang(),
    "closes": close_after_request(),
    "resets": reset_after_request(),
    "cuts off": cut_off(),
    "no JSON": answer(b"<html>"),
    "no lease API": answer(b"{}", status=404),
    "broken": answer(b'{"error": {"code": "x", "message": "y"}}', status=500),
    "busy": answer(b"{}", status=429),
    "gone": answer(b"{}", status=410),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("method", ["claim", "renew", "release"])
def test_a_server_that_fails(script, method):
    """At whatever stage of whatever request."""
    calls = {
        "claim": lambda store: store.claim(claim("a", queue=True)),
        "renew": lambda store: store.renew(["a"]),
        "release": lambda store: store.release(["a"]),
    }
    with Server(SCRIPTS[script]) as server:
        store = HTTPStore(Endpoint(server.url), Settings(endpoint_timeout=0.2, endpoint_max_retries=1))
        with contextlib.closing(store):
            kept, raised = pinned(lambda: calls[method](store), GPUPoolError)
        server.release()
    assert raised
    assert not kept


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_is_not_there(scheme):
    """Nor at connecting."""
    with refusing() as url:
        store = HTTPStore(Endpoint(url.replace("http", scheme)), Settings(endpoint_timeout=1.0))
        with contextlib.closing(store):
            kept, raised = pinned(lambda: store.claim(claim("a")), GPUPoolError)
    assert raised
    assert not kept


def test_a_reading_that_fails():
    """A poll is somebody's too: of whoever tries an endpoint."""
    with refusing() as url, GPUPool([url], endpoint_timeout=1.0) as pool:
        pool.open()
        (endpoint,) = pool._state.engine.endpoints.values()
        kept, raised = pinned(endpoint.poll, GPUPoolError)
        assert raised == [EndpointUnavailable]
        assert not kept


@pytest.mark.parametrize("how", ["refuses", "closes", "garbage"])
def test_a_redis_that_fails(how):
    """The client library's frames have cycles of their own."""
    scripts = {"closes": close_after_request(), "garbage": answer(b"x" * 100)}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(refusing()) if how == "refuses" else stack.enter_context(Server(scripts[how])).url
        url = url.replace("http", "redis")
        store = None

        def ask():
            nonlocal store
            store = store or RedisStore(url)
            store.claim(claim("a"))

        pinned(ask, GPUPoolError)  # the first imports
        kept, raised = pinned(ask, GPUPoolError)
        if store is not None:
            store.close()
    assert raised
    assert not kept


def test_no_thread_to_be_had(monkeypatch):
    """Such as under a limit of the container."""

    def no_thread(self):
        raise RuntimeError("can't start new thread")

    thread = threading.Thread(target=lambda: None)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    kept, raised = pinned(lambda: starting.start(thread), RuntimeError)
    assert raised
    assert not kept


@pytest.mark.real
def test_a_call_that_times_out():
    """The explanation is made of values."""
    with FakeFleet([1]) as fleet, GPUPool(fleet.urls, poll_interval=0.1) as pool:
        with pool.gpu(timeout=60):
            kept, raised = pinned(lambda: pool.acquire(timeout=0.2), GPUPoolError)
        assert raised
        assert not kept


def kept_then(script):
    """A decent release, and then *script* on the same connection."""

    def both(connection):
        connection.request()
        body = b'{"done": true}'
        connection.send(head(200, {"Content-Type": "application/json"}, length=len(body)) + body)
        script(connection)

    return both


@pytest.mark.parametrize("script", ["hangs", "closes", "resets", "cuts off", "no JSON"])
def test_a_kept_connection_that_fails(script):
    """It takes a shorter way."""
    with Server(kept_then(SCRIPTS[script])) as server:
        store = HTTPStore(Endpoint(server.url), Settings(endpoint_timeout=0.3, endpoint_max_retries=1))
        with contextlib.closing(store):
            pinned(lambda: store.release(["a"]), GPUPoolError)
            kept, raised = pinned(lambda: store.renew(["a"]), GPUPoolError)
        server.release()
    assert raised
    assert not kept


def test_a_reading_that_is_refused():
    """A server that asks for patience."""
    with Server(SCRIPTS["busy"]) as server, GPUPool([server.url], endpoint_timeout=1.0) as pool:
        pool.open()
        (endpoint,) = pool._state.engine.endpoints.values()
        kept, raised = pinned(endpoint.poll, GPUPoolError)
    assert raised
    assert not kept


def test_a_redis_that_cannot_be_listened_to():
    """Hints come by a connection of their own."""
    with refusing() as url, contextlib.closing(RedisStore(url.replace("http", "redis"))) as store:
        store._refreshed_at = store._clock()
        pinned(lambda: store.listen(0.1), GPUPoolError)
        kept, raised = pinned(lambda: store.listen(0.1), GPUPoolError)
    assert raised
    assert not kept


class JobFailed(Exception):
    """What a user's job raises."""


def failing_arbiter():
    with refusing() as url:
        store = HTTPStore(Endpoint(url), Settings(endpoint_timeout=1.0, endpoint_max_retries=1))
        with contextlib.closing(store), pytest.raises(GPUPoolError):
            store.release(["a"])


def test_what_the_user_is_handling_meanwhile_is_left_alone():
    """It is chained to what an arbiter raises, and somebody will look at it."""

    def job():
        batch = 17
        raise JobFailed(str(batch))

    try:
        job()
    except JobFailed as exc:
        failing_arbiter()
        kept = exc.__traceback__.tb_next.tb_frame.f_locals
    assert kept == {"batch": 17}


def one_card(monkeypatch, tmp_path):
    """A pool over it, with the locks of a host."""
    return local_pool(monkeypatch, Cards(1), lease_store=HostStore(str(tmp_path / "locks")))


def test_a_generator_of_the_users_goes_on(monkeypatch, tmp_path):
    """One that holds a GPU, and survived what was thrown into it."""
    with one_card(monkeypatch, tmp_path) as pool:

        def worker():
            with pool.gpu(timeout=60) as gpu:
                while True:
                    with contextlib.suppress(JobFailed):
                        yield gpu

        working = worker()
        gpu = next(working)
        try:
            raise JobFailed
        except JobFailed as exc:
            working.throw(exc)
            failing_arbiter()
        assert next(working) is gpu
        assert not gpu.released
        working.close()
        assert gpu.released


def interrupted_once(monkeypatch, where, name, after):
    """From now on the first call of that method is interrupted, before it did anything or right after."""
    method = getattr(where, name)
    calls = []

    def once(*args):
        if threading.current_thread() is not threading.main_thread() or calls:
            return method(*args)
        calls.append(args)
        if after:
            method(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, once)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("how", ["with", "acquire"])
def test_an_interrupted_release_is_finished_though_its_traceback_is_kept(monkeypatch, tmp_path, how, after):
    """As a notebook keeps it until the next error."""
    with one_card(monkeypatch, tmp_path) as pool:
        pool.open(wait=True)
        kept = []
        interrupted_once(monkeypatch, HostStore, "release", after)
        try:
            if how == "with":
                with pool.gpu(timeout=60):
                    pass
            else:
                pool.acquire(timeout=60).release()
        except KeyboardInterrupt as exc:
            kept.append(exc)
        assert kept
        with pool.gpu(timeout=60):
            eventually(lambda: pool.stats()["held"] == 1)
        assert pool.stats()["held"] == 0
        assert kept[0].__traceback__ is not None


def test_a_claim_that_was_given_up_and_interrupted_in_that_is_undone(monkeypatch, tmp_path):
    """A second Ctrl-C; it had been granted right before the first."""
    with one_card(monkeypatch, tmp_path) as pool:
        pool.open(wait=True)
        interrupted_once(monkeypatch, HostStore, "claim", True)
        interrupted_once(monkeypatch, HostStore, "release", False)
        with pytest.raises(KeyboardInterrupt) as kept:
            pool.acquire(timeout=60)
        monkeypatch.setattr(acquiring, "collect_dropped", lambda state: None)
        pool.acquire(timeout=60).release()
        assert kept.value.__traceback__ is not None


def test_closing_finishes_what_was_interrupted(monkeypatch, tmp_path):
    """Two Ctrl-C, and the end of the `with` block right after."""
    store = HostStore(str(tmp_path / "locks"))

    def program():
        with local_pool(monkeypatch, Cards(1), lease_store=store) as pool:
            pool.open(wait=True)
            interrupted_once(monkeypatch, HostStore, "claim", True)
            interrupted_once(monkeypatch, HostStore, "release", False)
            pool.acquire(timeout=60)

    with pytest.raises(KeyboardInterrupt) as kept:
        program()
    assert kept.value.__traceback__ is not None
    assert not store._held


def test_a_release_that_breaks_does_not_end_the_polls(monkeypatch, tmp_path, caplog):
    """A store of the user's, say: it is told again and again, and the pool goes on reading."""
    monkeypatch.setattr(holding, "INTERRUPTED_AFTER", 0.0)
    broken = threading.Event()

    def breaks(store, ids):
        if broken.is_set():
            raise RuntimeError("it is broken")
        return release(store, ids)

    release = HostStore.release
    with one_card(monkeypatch, tmp_path) as pool:
        gpu = pool.acquire(timeout=60)
        broken.set()
        monkeypatch.setattr(HostStore, "release", breaks)
        monkeypatch.setattr(HostStore, "withdraw", breaks)
        with pytest.raises(RuntimeError, match="broken"):
            gpu.release()
        eventually(lambda: caplog.text.count("could not be finished") >= 2)
        polls = pool.stats()["polls"]
        eventually(lambda: pool.stats()["polls"] > polls + 2)
        broken.clear()
        eventually(lambda: gpu.released)


def test_a_release_that_two_threads_finish_is_counted_once(monkeypatch, tmp_path):
    """One that is only slow is taken for an interrupted one."""
    monkeypatch.setattr(holding, "INTERRUPTED_AFTER", 0.0)
    overtaken = threading.Event()
    release = HostStore.release

    def slowly(store, ids):
        release(store, ids)
        if threading.current_thread() is threading.main_thread():
            assert overtaken.wait(60)
        else:
            overtaken.set()

    with one_card(monkeypatch, tmp_path) as pool:
        gpu = pool.acquire(timeout=60)
        monkeypatch.setattr(HostStore, "release", slowly)
        monkeypatch.setattr(HostStore, "withdraw", slowly)
        gpu.release()
        eventually(lambda: not pool.stats()["held"])
        stats = pool.stats()
        assert (stats["grants"], stats["releases"]) == (1, 1)
