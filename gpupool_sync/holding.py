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


def collect_dropped(state: PoolState) -> None:
    """Release what interrupts left behind, and warn of handles that are gone."""
    while state.dropped:
        try:
            reference = state.dropped[0]
        except IndexError:  # another thread was faster
            return
        # Looked at first and taken out last: an interrupt in between only makes it happen again.
        grant = state.watched.get(reference)
        if grant is not None and not grant.released:
            _collect(state, grant)
        state.watched.pop(reference, None)
        with contextlib.suppress(ValueError):
            state.dropped.remove(reference)


def _collect(state: PoolState, grant: Grant) -> None:
    """A claim that nobody can use or release any more."""
    if grant.lease is None or not grant.delivered:
        # Not _give_up for a lease: a child of popen() may still run.
        give_up(state, grant) if grant.lease is None else release(state, grant)
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


def release(state: PoolState, grant: Grant) -> None:
    """Give back a lease, once its commands have ended; idempotent. Not in a forked child."""
    if grant.released or grant.pid != os.getpid():
        return
    bequest = grant.bequest
    handed_over = False
    if grant.children and any(child.running() for child in list(grant.children)):
        if bequest is None or not bequest.kept:
            # Freeing a card in use is worse than keeping it; the monitor's thread looks again.
            if grant not in state.leaving:
                state.leaving.append(grant)
            return
        handed_over = True  # the process that renews for the command gives it back
    engine = state.engine
    if engine is not None and grant.lease is not None and grant.lease.ttl is not None:
        grant.why_lost()  # lost is final: looked at once more before the keeper forgets it
        engine.keeper.remove(grant.id)
    # Idempotent at the store, so an interrupt before the next line only makes it happen again.
    if not handed_over:
        _release_at_stores(state, grant)
    grant.released = True
    if bequest is not None:
        bequest.let_go() if handed_over else bequest.end()
    _forget(state, grant)
    if grant.lease is not None:
        state.counters.released(time.monotonic() - grant.begun_at)
        forget_mask(grant)
        if engine is not None and grant.snapshot is not None:
            state.touch(grant.snapshot.endpoint_id)
            if time.monotonic() - grant.begun_at >= SHORT_LEASE:
                engine.monitor.nudge(grant.snapshot.endpoint_id)


def give_up(state: PoolState, grant: Grant) -> None:
    """Undo a claim whose caller will never have it."""
    if grant.pid == os.getpid():
        _release_at_stores(state, grant)
        grant.released = True
    _forget(state, grant)


def _release_at_stores(state: PoolState, grant: Grant) -> None:
    asked = list(grant.asked)
    if grant.lease is None and len(asked) > 1:
        # It stood in line at many: whoever gives up, by Ctrl-C perhaps, need not wait for all of them.
        withdraw(state, asked, grant.id)
        return
    for store in asked:
        try:
            store.release([grant.id])
        except LeaseStoreError as exc:
            # The caller has done its part, and the others are told all the same. Nobody renews the lease any more, so
            # it ends with its ttl at the latest; until then it is tried again.
            what = ", ".join(card.global_gpu_id for card in grant.cards) or "a claim that was given up"
            level = logging.WARNING if grant.lease is not None else logging.INFO
            logger.log(level, "the release of %s did not arrive yet: %s", what, exc)
            state.teller.tell(store, [grant.id], after=RETRY_AFTER)


def withdraw(state: PoolState, stores: Iterable[LeaseStore], claim_id: str) -> None:
    """Leave the queues of arbiters: of those on this machine at once, of others without waiting for it."""
    for store in stores:
        if store.scope == "everybody":
            state.teller.tell(store, [claim_id])
            continue
        try:
            store.withdraw([claim_id])
        except LeaseStoreError as exc:
            logger.info("a ticket at %s was not withdrawn yet: %s", store.description, exc)
            state.teller.tell(store, [claim_id], after=RETRY_AFTER)


def _forget(state: PoolState, grant: Grant) -> None:
    state.grants.pop(grant.id, None)
    all_grants.pop(grant.id, None)
    state.watched.pop(grant.tie_ref, None)
    grant.tie_ref = None  # with it goes the callback: nobody need hear of the anchor's end any more


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
