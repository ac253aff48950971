"""Lock files and directories that somebody deletes or replaces, and file systems that take no more."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import threading

import pytest

from cards import Cards, local_pool
from gpupool_sync.errors import LeaseLost, LeaseStoreError
from gpupool_sync.leases.base import Granted, Queued, Refused, Share
from gpupool_sync.leases.host import HostStore
from helpers import eventually
from lease_server import api_now, server_of_leases
from test_leases_contract import Clock, claim, granted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernel locks of Linux")


def delete(locks):
    (locks / "gpu-GPU-1").unlink()


def replace(locks):
    (locks / "new").touch()
    (locks / "new").chmod(0o666)
    (locks / "new").rename(locks / "gpu-GPU-1")


def put_aside(locks):
    (locks / "gpu-GPU-1").rename(locks / "aside")


def delete_directory(locks):
    shutil.rmtree(locks)


def replace_directory(locks):
    shutil.rmtree(locks)
    HostStore(str(locks)).close()


def put_directory_aside(locks):
    locks.rename(locks.parent / "aside")


WAYS = [delete, replace, put_aside, delete_directory, replace_directory, put_directory_aside]


@pytest.fixture
def locks(tmp_path):
    return tmp_path / "locks"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(locks, clock):
    made = HostStore(str(locks), clock=clock)
    yield made
    made.close()


@pytest.mark.parametrize("way", WAYS)
def test_the_holder_notices_that_its_lock_is_gone(store, locks, way):
    """Deleted, replaced or moved, the file or all of the directory: it is said why, also to a repeated claim."""
    wish, other = claim("GPU-1"), claim("GPU-2")
    granted(store.claim(wish))
    granted(store.claim(other))
    assert store.why_gone(wish.id) is None
    way(locks)

    assert f"{locks}" in store.why_gone(wish.id)
    assert "was deleted or replaced" in store.why_gone(wish.id)
    assert store.renew([wish.id]) == {wish.id: False}
    with pytest.raises(LeaseLost, match="was deleted or replaced"):
        store.claim(wish)
    assert (store.why_gone(other.id) is None) is ("directory" not in way.__name__), "others are not concerned"


@pytest.mark.parametrize("way", WAYS)
def test_this_process_at_least_grants_no_card_twice(store, locks, way):
    """The kernel would grant the new file's lock; the process knows what it holds."""
    wish = claim("GPU-1")
    granted(store.claim(wish))
    way(locks)
    assert isinstance(store.claim(claim("GPU-1")), Refused)
    assert isinstance(store.claim(claim("GPU-1", share=Share(places=2))), Refused)
    assert isinstance(store.claim(claim("GPU-1", queue=True)), Queued)
    granted(store.claim(claim("GPU-2")))  # also where the whole directory had to be made again


@pytest.mark.parametrize("way", WAYS)
def test_a_card_without_its_lock_is_closed_when_its_holder_lets_go(store, locks, clock, way):
    """Its job may still run: the next one waits until the card is seen empty, and has a larger token."""
    wish = claim("GPU-1")
    token = store.claim(wish).lease.token
    way(locks)
    store.release([wish.id])
    other = HostStore(str(locks), clock=clock)
    assert other.claim(claim("GPU-1", who="b")).reasons["GPU-1"].code == "closed"
    clock.advance(1.0)
    assert other.claim(claim("GPU-1", who="b", emptied={"GPU-1": 0.5})).lease.token > token
    other.close()


def test_a_card_that_somebody_else_took_meanwhile_stays_theirs(store, locks):
    """The former holder's last word does not touch the new file."""
    wish = claim("GPU-1")
    granted(store.claim(wish))
    delete(locks)
    other = HostStore(str(locks))
    theirs = claim("GPU-1", who="b")
    granted(other.claim(theirs))
    store.release([wish.id])
    assert other.why_gone(theirs.id) is None
    assert [info.holder.name for info in other.leases()] == ["b"]
    assert isinstance(store.claim(claim("GPU-1")), Refused)
    other.close()


def test_shares_of_a_deleted_file(store, locks):
    """Sharers notice too, and no further share is granted beside them here."""
    share = Share(memory_mb=1000.0)
    wish = claim("GPU-1", share=share, room=80000.0)
    granted(store.claim(wish))
    delete(locks)
    assert "was deleted or replaced" in store.why_gone(wish.id)
    assert isinstance(store.claim(claim("GPU-1", share=share, room=80000.0)), Refused)
    store.release([wish.id])
    granted(store.claim(claim("GPU-1", share=share, room=80000.0)))


def test_a_deleted_queue_is_made_again(store, locks, clock):
    """It holds no locks: leases stay, and who waits leaves its ticket anew."""
    wish, waiting = claim("GPU-1"), claim("GPU-1", who="b", queue=True)
    granted(store.claim(wish))
    store.claim(waiting)
    shutil.rmtree(locks / "queue")
    assert store.why_gone(wish.id) is None
    assert isinstance(store.claim(waiting), Queued)
    assert [ticket.holder.name for ticket in store.queue()] == ["b"]
    clock.advance(1.0)
    with contextlib.closing(HostStore(str(locks), clock=clock)) as other:
        assert isinstance(other.claim(claim("GPU-1", queue=True, who="c")), Queued)
        assert [ticket.holder.name for ticket in other.queue()] == ["b", "c"]
    store.release([wish.id])
    granted(store.claim(waiting))


def test_a_directory_that_cannot_be_made_again_is_named(store, locks, tmp_path):
    """One clear error; and the store works again as soon as the directory can be made."""
    away = tmp_path.parent / f"{tmp_path.name}-away"
    granted(store.claim(claim("GPU-1")))
    tmp_path.rename(away)
    try:
        with pytest.raises(LeaseStoreError, match="the directory above it is missing"):
            store.claim(claim("GPU-2"))
        with pytest.raises(LeaseStoreError, match="the directory above it is missing"):
            store.leases()
    finally:
        away.rename(tmp_path)
    granted(store.claim(claim("GPU-2")))


def test_hints_arrive_in_the_new_directory(store, locks, clock):
    """The socket of the former one nobody finds; a waiter that spoke since is hinted in the new one."""
    hints = []
    unsubscribe = store.subscribe(hints.extend)
    first, waiting = HostStore(str(locks), clock=clock), claim("GPU-1", who="b", queue=True)
    granted(first.claim(claim("GPU-1")))
    assert isinstance(store.claim(waiting), Queued)
    delete_directory(locks)
    second, theirs = HostStore(str(locks), clock=clock), claim("GPU-1", who="c")
    granted(second.claim(theirs))
    assert isinstance(store.claim(waiting), Queued)
    second.release([theirs.id])
    eventually(lambda: (store.listen(0.05), waiting.id in hints)[1])
    granted(store.claim(waiting))
    unsubscribe()
    first.close()
    second.close()


@pytest.mark.parametrize("way", [delete, put_directory_aside])
def test_a_pool_tells_its_holder(monkeypatch, tmp_path, way):
    """gpu.lost, gpu.check() and on_lost; then the pool lets go, and goes on in what is there now."""
    locks, told = tmp_path / "locks", threading.Event()
    with local_pool(monkeypatch, Cards(1), lease_store=HostStore(str(locks))) as pool:
        gpu = pool.acquire(timeout=20, on_lost=lambda gpu: told.set())
        if way is delete:
            (locks / "gpu-GPU-00000000").unlink()
        else:
            way(locks)
        assert gpu.lost
        with pytest.raises(LeaseLost, match="was deleted or replaced"):
            gpu.check()
        assert told.wait(20)
        with pool.gpu(timeout=20) as again:  # Cards(1) is seen empty, so that it opens
            assert not again.lost
            assert again.fencing_token > gpu.fencing_token


def test_a_remote_holder_is_told_with_its_next_renewal(tmp_path):
    """The server's locks are files like any."""
    clock = Clock()
    with server_of_leases(tmp_path / "locks", clock=clock):
        granter = api_now().granter
        wish = claim("GPU-1")
        assert isinstance(granter.claim(wish)[0], Granted)
        assert granter.renew([wish.id]) == ([True], {})
        delete(tmp_path / "locks")
        alive, why = granter.renew([wish.id])
        assert alive == [False]
        assert "was deleted or replaced" in why[wish.id]


# -- nothing more can be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [None, Share(places=2)])
@pytest.mark.parametrize("fails", ["the room for a record", "the record"])
def test_a_claim_that_fails_leaves_nothing_locked(store, locks, monkeypatch, fails, share):
    """Also while somebody keeps the exception: its traceback keeps the frames, and these the descriptors."""
    write = os.pwrite

    def full(fd, data, offset):
        if fails == "the record" and not data.strip():
            return write(fd, data, offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(LeaseStoreError, match="that is full") as kept:
            store.claim(claim("GPU-1", "GPU-2", share=share, count=1 if share else 2))
    other = HostStore(str(locks))
    granted(other.claim(claim("GPU-1", "GPU-2", count=2)))
    assert kept.value.__cause__ is not None
    other.close()
