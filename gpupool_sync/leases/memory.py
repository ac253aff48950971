"""The arbiter of one process: leases in a dictionary.

It excludes among the threads and pools of one process and nobody else; `scope` says so.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from gpupool_sync.clock import boottime
from gpupool_sync.errors import LeaseLost, LeaseStoreError
from gpupool_sync.leases.base import (
    Claim,
    Granted,
    Hint,
    Lease,
    LeaseInfo,
    Outcome,
    Queued,
    Refused,
    Scope,
    Share,
    TicketInfo,
    Wanted,
)
from gpupool_sync.leases.shared import CLOSED, Gone, Subscribers, reopen
from gpupool_sync.leases.tickets import TicketQueue
from gpupool_sync.models import Reason

#: Refusals explain at most so many cards: a claim may name thousands.
_MAX_REASONS = 64

_NOBODY: tuple[Lease, ...] = ()


class MemoryStore:
    """
    A `LeaseStore` for one process.

    An interrupt (Ctrl-C) can fall between any two statements, also under the lock.  So every change of several
    dictionaries is ordered such that a half-done claim is undone by `release` of its id, and a half-done release is
    completed by repeating it.
    """

    scope: Scope = "process"
    needs_listener = False
    description = "memory:"

    def __init__(self, *, clock: Callable[[], float] = boottime) -> None:
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        # Guards everything below. Innermost: held for dictionary work only; hints are called after it is let go.
        # A plain Lock: its `with` is atomic under interrupts, that of Condition and RLock's Python twin is not.
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}  # by id
        self._cards: dict[str, tuple[Lease, ...]] = {}  # the leases on each held card, replaced as a whole
        self._released_at: dict[str, float] = {}
        self._revoked: dict[str, str] = {}  # lease id -> by whom; its holder has not let go yet
        self._closed: dict[str, float] = {}  # card key -> when the revoked lease on it ended
        self._gone = Gone()
        self._token = 0
        self._queue = TicketQueue()
        self._hints = Subscribers()

    # -- claiming ----------------------------------------------------------------------------------------------

    def claim(self, claim: Claim) -> Outcome:
        with self._lock:
            outcome, hints = self._claim_locked(claim)
        if hints:
            self._hints.tell(hints)
        return outcome

    def _claim_locked(self, claim: Claim) -> tuple[Outcome, list[str]]:
        known = self._leases.get(claim.id)
        if known is not None:
            if (known.holder, len(known.cards), known.share) != (claim.holder, claim.count, claim.share):
                raise LeaseStoreError(f"{self.description}: this lease id is in use with another request")
            if claim.id in self._revoked:
                raise LeaseLost(f"this lease was revoked by {self._revoked[claim.id]}")
            return Granted(known), []
        if claim.id in self._gone:
            raise LeaseLost("this lease was released or withdrawn before")
        ticket = self._queue.get(claim.id)
        if ticket is not None and (ticket.claim.holder, ticket.claim.count, ticket.claim.share) != (
            claim.holder,
            claim.count,
            claim.share,
        ):
            raise LeaseStoreError(f"{self.description}: this ticket id is in use with another request")
        now = self._clock()
        opened = reopen(self._closed, claim.emptied, now) if self._closed else []
        picked, hints = self._queue.choose(claim, now, self._fits_locked)
        if picked is not None:
            lease = self._grant_locked(claim, picked, now)
            if self._queue:
                self._queue.remove(claim.id)
                if claim.share is None:
                    self._queue.taken(picked)
                hints += self._queue.hints(opened, now, self._fits_locked)
            return Granted(lease), hints
        outcome = Queued(self._queue.put(claim, now)) if claim.queue else Refused(self._reasons_locked(claim))
        if opened and self._queue:
            hints += self._queue.hints(opened, now, self._fits_locked)
        return outcome, hints

    def _fits_locked(self, wanted: Wanted, share: Share | None, pending: Sequence[Share | None]) -> bool:
        return wanted.key not in self._closed and self._beside_locked(wanted, share, pending)

    def _beside_locked(self, wanted: Wanted, share: Share | None, pending: Sequence[Share | None]) -> bool:
        leases = self._cards.get(wanted.key, _NOBODY)
        if not leases and not pending:
            return share is None or share.memory_mb is None or share.memory_mb <= (wanted.room_mb or 0.0)
        if share is None:
            return False
        others = [lease.share for lease in leases] + list(pending)
        if share.places is not None:
            limits = [share.places]
            for other in others:
                if other is None or other.places is None:  # another mode: whole, or by memory
                    return False
                limits.append(other.places)
            return len(others) < min(limits)
        asked = share.memory_mb or 0.0
        for other in others:
            if other is None or other.memory_mb is None:  # another mode: whole, or by places
                return False
            asked += other.memory_mb
        return asked <= (wanted.room_mb or 0.0)

    def _grant_locked(self, claim: Claim, keys: Sequence[str], now: float) -> Lease:
        self._token = max(self._token + 1, int(time.time() * 1000))
        lease = Lease(
            id=claim.id,
            holder=claim.holder,
            cards=tuple(keys),
            token=self._token,
            share=claim.share,
            note=claim.note,
            granted_at=now,
        )
        # The lease first, then its cards: see the class docstring.
        self._leases[claim.id] = lease
        for key in keys:
            self._cards[key] = (*self._cards.get(key, _NOBODY), lease)
        return lease

    def _reasons_locked(self, claim: Claim) -> dict[str, Reason]:
        reasons: dict[str, Reason] = {}
        for group in claim.groups:
            for wanted in group:
                if len(reasons) >= _MAX_REASONS:
                    return reasons
                leases = self._cards.get(wanted.key)
                if leases:
                    reasons[wanted.key] = Reason("held", f"held by {leases[0].holder}")
                elif wanted.key in self._closed:
                    reasons[wanted.key] = CLOSED
                elif not self._fits_locked(wanted, claim.share, ()):
                    reasons[wanted.key] = Reason("no-room", "too little memory is left for the share")
                else:
                    reasons[wanted.key] = Reason("queue", "kept for somebody who has waited longer")
        return reasons

    # -- giving back -------------------------------------------------------------------------------------------

    def release(self, ids: Iterable[str]) -> None:
        with self._lock:
            now = self._clock()
            freed: list[str] = []
            for lease_id in ids:
                lease = self._leases.get(lease_id)
                if lease is not None:
                    revoked = lease_id in self._revoked
                    for key in lease.cards:
                        if revoked and lease.share is None:
                            self._closed[key] = now
                        rest = tuple(other for other in self._cards.get(key, _NOBODY) if other.id != lease_id)
                        if rest:
                            self._cards[key] = rest
                        else:
                            # Readings from before its end still count against a card that was revoked.
                            self._released_at[key] = lease.granted_at if revoked else now
                            self._cards.pop(key, None)
                    freed += lease.cards
                    self._leases.pop(lease_id, None)
                    self._revoked.pop(lease_id, None)
                self._gone.add(lease_id)
                if self._queue:
                    self._queue.remove(lease_id)
            # Who is next for a card that has just been closed is told too, to look whether it is empty.
            hints = self._queue.hints(freed, now, self._beside_locked) if self._queue else []
        if hints:
            self._hints.tell(hints)

    withdraw = release

    def renew(self, ids: Sequence[str]) -> Mapping[str, bool]:
        # Leases of this arbiter live as long as their process: there is nothing to renew, only to look up.
        with self._lock:
            return {lease_id: lease_id in self._leases and lease_id not in self._revoked for lease_id in ids}

    def revoke(self, key: str, token: int, by: str) -> bool:
        with self._lock:
            for lease in self._cards.get(key, _NOBODY):
                if lease.token == token:
                    self._revoked.setdefault(lease.id, by)
                    return True
        return False

    def why_gone(self, lease_id: str) -> str | None:
        by = self._revoked.get(lease_id)
        return None if by is None else f"it was revoked by {by}"

    def closed(self) -> Mapping[str, float]:
        return dict(self._closed) if self._closed else {}

    # -- hints -------------------------------------------------------------------------------------------------

    def subscribe(self, hint: Hint) -> Callable[[], None]:
        return self._hints.add(hint)

    def listen(self, timeout: float) -> None:
        """Never needed: hints are called by whoever releases."""

    # -- looking -----------------------------------------------------------------------------------------------

    def _info(self, lease: Lease, now: float) -> LeaseInfo:
        return LeaseInfo(
            cards=lease.cards,
            holder=lease.holder,
            token=lease.token,
            share=lease.share,
            note=lease.note,
            since=max(0.0, now - lease.granted_at),
        )

    def crowded(self) -> bool:
        return bool(self._queue)

    def is_held(self, key: str) -> bool:
        # One dictionary look-up is atomic; a lock here would be taken for every card of every choice.
        return key in self._cards

    def holders_of(self, key: str) -> Sequence[LeaseInfo]:
        leases = self._cards.get(key)
        if not leases:
            return ()
        now = self._clock()
        return tuple(self._info(lease, now) for lease in leases)

    def released_at(self, key: str) -> float | None:
        return self._released_at.get(key)

    def descriptors(self, lease_id: str) -> Sequence[int]:
        return ()

    def leases(self) -> Sequence[LeaseInfo]:
        with self._lock:
            leases = list(self._leases.values())
        now = self._clock()
        return [self._info(lease, now) for lease in leases]

    def queue(self) -> Sequence[TicketInfo]:
        with self._lock:
            return self._queue.infos(self._clock())

    # -- life --------------------------------------------------------------------------------------------------

    def forget_after_fork(self) -> None:
        """The child is another process: it starts with an empty book (and is not excluded from its parent's cards)."""
        self._reset()

    def close(self) -> None:
        """Nothing to let go of: leases of other pools of this process live in the same book."""


_shared: MemoryStore | None = None
# Guards the making of _shared: two pools opened at once by two threads must share one book.
_shared_lock = threading.Lock()


def shared_store() -> MemoryStore:
    """The book of this process: all pools that name it ("memory:") exclude one another."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = MemoryStore()
        return _shared


def _after_fork_in_child() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    if _shared is not None:
        _shared.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
