"""What is held: each claim from before it is made to its release, however that comes about."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.handle import GPU, GPUs, Grant, Tie, forget_mask
from gpupool_sync.leases.base import LeaseStore
from gpupool_sync.starting import start
from gpupool_sync.state import PoolState, all_grants
from gpupool_sync.telling import RETRY_AFTER

logger = logging.getLogger(__name__)

#: What is logged of a lost lease: its GPUs, and why.
LEASE_LOST = "the lease on %s is lost: %s"

#: Seconds after which a release is taken to have been interrupted, beyond what its arbiter may take to answer.
INTERRUPTED_AFTER = 0.5
#: A release wants a new reading, unless the lease was shorter than so many seconds: nobody has put anything on a GPU by
#: then. A poll takes the interpreter for a millisecond, and who comes and goes quickly waits for just that.
SHORT_LEASE = 0.1


def new_grant(state: PoolState, note: str | None, on_lost: Callable[[Any], object] | None) -> Grant:
    """A claim to be: `watch` it before it is made."""
    grant = Grant(os.urandom(16).hex(), note)
    grant.on_lost = on_lost or state.on_lost
    grant.owner = state.owner
    return grant


def watch(state: PoolState, anchor: object, grant: Grant) -> None:
    """
    Learn of the death of *anchor*, through a callback that runs no Python and takes no lock.

    Must come before the claim: an interrupt after the claim then finds the reference in place.
    """
    reference = weakref.ref(anchor, state.dropped.append)
    grant.tie_ref = reference
    state.watched[reference] = grant


def collect_dropped(state: PoolState, *, wait: bool = True) -> None:
    """Release what interrupts left behind, and warn of handles that are gone; `release` tells of *wait*."""
    while state.dropped:
        try:
            reference = state.dropped[0]
        except IndexError:  # another thread was faster
            return
        # Looked at first and taken out last: an interrupt in between only makes it happen again.
        grant = state.watched.get(reference)
        if grant is not None and not grant.released:
            _collect(state, grant, wait)
        state.watched.pop(reference, None)
        with contextlib.suppress(ValueError):
            state.dropped.remove(reference)


def finish_interrupted(state: PoolState, *, at_once: bool = False) -> None:
    """
    Finish what began to be given back and was not, whoever still keeps the handle: by the traceback of a Ctrl-C, say.

    Another thread may still be at it: all of it may happen twice.
    """
    now = time.monotonic()
    for grant in list(state.grants.values()):
        if grant.ending is None or grant.pid != os.getpid():
            continue
        elsewhere = any(store.scope == "everybody" for store in list(grant.asked))
        patience = INTERRUPTED_AFTER + (state.settings.endpoint_timeout if elsewhere else 0.0)
        if not at_once and (grant.ending == 0.0 or now - grant.ending < patience):
            # Since the first look, not since it began: a process that was stopped has had no time for it.
            grant.ending = grant.ending or now
            continue
        try:
            if grant.released:
                _finish(state, grant, _outlived(grant))
            else:
                _undo(state, grant, wait=False)
        except Exception:
            # A store of the user's, perhaps. The monitor's thread must go on.
            logger.exception("a release that was interrupted could not be finished; it is tried again")
            grant.ending = now


def _undo(state: PoolState, grant: Grant, wait: bool) -> None:
    # Not give_up() for a lease: a child of popen() may still run.
    give_up(state, grant, wait=wait) if grant.lease is None else release(state, grant, wait=wait)


def _collect(state: PoolState, grant: Grant, wait: bool) -> None:
    """A claim that nobody can use or release any more."""
    if grant.lease is None or not grant.delivered:
        _undo(state, grant, wait)
        return
    state.counters.add("forgotten")
    grant.forgotten = True
    names = ", ".join(card.global_gpu_id for card in grant.cards)
    text = (
        f"the handle of {names}, acquired at {grant.place}, is gone without release(); the GPU stays leased "
        "until pool.release_all(), pool.close() or the end of the process"
    )
    logger.warning("%s", text)
    file, _, line = grant.place.rpartition(":")
    try:
        warnings.warn_explicit(text, ResourceWarning, file, int(line))
    except ResourceWarning:  # made an error: on this thread nobody could handle it
        return


def release(state: PoolState, grant: Grant, *, wait: bool = True) -> None:
    """
    Give back a lease, once its commands have ended; idempotent. Not in a forked child.

    *wait*: until an arbiter elsewhere has heard it, or has not.
    """
    if grant.released or grant.pid != os.getpid():
        return
    if grant.ending is None:
        grant.ending = 0.0
    handed_over = _outlived(grant)
    if handed_over and (grant.bequest is None or not grant.bequest.kept):
        # Freeing a card in use is worse than keeping it; the monitor's thread looks again.
        if grant not in state.leaving:
            state.leaving.append(grant)
        return
    engine = state.engine
    if engine is not None and grant.lease is not None and grant.lease.ttl is not None:
        grant.why_lost()  # lost is final: looked at once more before the keeper forgets it
        engine.keeper.remove(grant.id)
    # Idempotent at the store, so an interrupt before the next line only makes it happen again.
    if not handed_over:  # else the process that renews for the command gives it back
        _release_at_stores(state, grant, wait)
    grant.released = True
    _finish(state, grant, handed_over)


def _outlived(grant: Grant) -> bool:
    """Whether a command that has the lease still runs."""
    return bool(grant.children) and any(child.running() for child in list(grant.children))


def _finish(state: PoolState, grant: Grant, handed_over: bool) -> None:
    """What is left to do once the arbiters know. All of it may be repeated; it is counted once."""
    if grant.bequest is not None:
        grant.bequest.let_go() if handed_over else grant.bequest.end()
    if grant.lease is not None:
        forget_mask(grant)
    if not _forget(state, grant) or grant.lease is None:
        return
    state.counters.released(time.monotonic() - grant.begun_at)
    engine = state.engine
    if engine is not None and grant.snapshot is not None:
        state.touch(grant.snapshot.endpoint_id)
        if time.monotonic() - grant.begun_at >= SHORT_LEASE:
            engine.monitor.nudge(grant.snapshot.endpoint_id)


def give_up(state: PoolState, grant: Grant, *, wait: bool = True) -> None:
    """Undo a claim whose caller will never have it; *wait* as in `release`."""
    if grant.pid == os.getpid():
        if grant.ending is None:
            grant.ending = 0.0
        if state.engine is not None:
            state.engine.keeper.remove(grant.id)  # it may have been granted right before
        # It may have stood in line at many: whoever gives up, by Ctrl-C perhaps, need not wait for all of them.
        _release_at_stores(state, grant, wait and len(grant.asked) == 1)
        grant.released = True
    _forget(state, grant)


def _release_at_stores(state: PoolState, grant: Grant, wait: bool) -> None:
    asked = list(grant.asked)
    if wait:
        # The arbiter that granted; others are there only after an interrupt.
        store = grant.store if grant.store in asked else asked[0] if asked else None
        if store is not None:
            asked.remove(store)
            try:
                store.release([grant.id])
            except LeaseStoreError as exc:
                # The caller has done its part. Nobody renews the lease any more, so it ends with its ttl at the latest;
                # until then it is tried again.
                what = ", ".join(card.global_gpu_id for card in grant.cards) or "a claim that was given up"
                level = logging.WARNING if grant.lease is not None else logging.INFO
                logger.log(level, "the release of %s did not arrive yet: %s", what, exc)
                state.teller.tell([store], [grant.id], after=RETRY_AFTER)
    withdraw(state, asked, grant.id)


def withdraw(state: PoolState, stores: Iterable[LeaseStore], claim_id: str) -> None:
    """Have arbiters told that a claim has ended: those of this machine at once, others without waiting for it."""
    elsewhere: list[LeaseStore] = []
    for store in stores:
        if store.scope == "everybody":
            elsewhere.append(store)
            continue
        try:
            store.withdraw([claim_id])
        except LeaseStoreError as exc:
            logger.info("the end of a claim did not reach %s yet: %s", store.description, exc)
            state.teller.tell([store], [claim_id], after=RETRY_AFTER)
    if elsewhere:
        state.teller.tell(elsewhere, [claim_id])


def _forget(state: PoolState, grant: Grant) -> bool:
    """Whether it was still known; to this process, as *state* may be that of another pool than its own."""
    state.grants.pop(grant.id, None)
    state.watched.pop(grant.tie_ref, None)
    grant.tie_ref = None  # with it goes the callback: nobody need hear of the anchor's end any more
    return all_grants.pop(grant.id, None) is not None


def release_all(state: PoolState) -> None:
    """`GPUPool.release_all`."""
    orphans = [grant for grant in list(all_grants.values()) if grant.owner() is None]
    for grant in [*state.grants.values(), *orphans]:
        # Claims that are under way are not ours to end; after close() they end themselves.
        if grant.lease is not None:
            release(state, grant)


def release_when_children_end(state: PoolState) -> None:
    """Leases of commands that still run: nobody but a thread of their own will look after them."""
    grants = list(state.leaving)
    if not grants:
        return

    def wait(owner: object) -> None:
        for grant in grants:
            for child in list(grant.children):
                child.wait()
            release(state, grant)

    # With the pool: its leases are not those of one that is gone.
    start(threading.Thread(target=wait, args=(state.owner(),), name="gpupool-children", daemon=True))
    state.leaving.clear()


def look_for_losses(state: PoolState) -> None:
    """Leases without a ttl do not pass by the keeper: has one been revoked, or its lock been taken away?"""
    lost = [
        grant.id
        for grant in list(state.grants.values())
        if grant.lease is not None and grant.lease.ttl is None and not grant.told and grant.why_lost() is not None
    ]
    if lost:
        # A thread of its own: on_lost is the user's, and may take as long as it likes.
        start(threading.Thread(target=_leases_lost, args=(state, lost), name="gpupool-lost", daemon=True))


def _leases_lost(state: PoolState, lease_ids: Sequence[str]) -> None:
    for lease_id in lease_ids:
        lease_lost(state, lease_id)


def lease_lost(state: PoolState, lease_id: str) -> None:
    """Tell it: on the keeper's thread, or one of its own."""
    grant = state.grants.get(lease_id)
    if grant is None or grant.released or grant.lease is None or grant.told:
        return
    grant.told = True
    why = grant.why_lost() or "its arbiter took it back"
    grant.lost = why
    if grant.bequest is not None:
        grant.bequest.lose(why)
    names = ", ".join(card.global_gpu_id for card in grant.cards)
    logger.warning(LEASE_LOST, names, why)
    try:
        owner = state.owner()
        if grant.on_lost is not None and owner is not None:
            tie = Tie(grant)
            grant.on_lost(GPU(owner, tie, grant.cards[0]) if len(grant.cards) == 1 else GPUs(owner, tie))
    finally:
        if grant.store is not None and grant.store.why_gone(grant.id) is not None:
            # Revoked: its holder was told, so now it lets go. (One that expired its arbiter has freed.) The card
            # stays closed until it is seen empty.
            release(state, grant)
