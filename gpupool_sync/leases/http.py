"""The arbiter of another host, asked through its server (``server.leases``).

Fail closed: whatever is not a clear answer grants nothing.  Every request can be repeated with the same ids, so an
answer that was lost is found again by asking again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from gpupool_sync import wire
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.errors import BadAnswer, EndpointUnavailable, LeaseLost, LeaseStoreError
from gpupool_sync.leases import documents
from gpupool_sync.leases.base import (
    Claim,
    Granted,
    Hint,
    Lease,
    LeaseInfo,
    NotAsked,
    Outcome,
    Queued,
    Refused,
    Scope,
    StoreClosed,
    TicketInfo,
)
from gpupool_sync.leases.documents import BadDocument, digest
from gpupool_sync.leases.shared import Subscribers, is_open
from gpupool_sync.transport import Answer, NoTurn, Pace, Transport, Turn, retry_after

#: Seconds that what an answer said of other holders is believed.
HEARSAY_TIME = 2.0
#: Ids in one request for renewal or release.
BATCH = 500
#: Under `max_rate`, listening takes one turn in so many at most.
LISTEN_TURNS = 10
#: Ids whose release could not be told yet; beyond that the ttl has to do.
MAX_OWED = 10_000


class _Mine:
    """A lease of this process."""

    __slots__ = ("lease", "until")

    def __init__(self, lease: Lease, until: float) -> None:
        self.lease = lease
        self.until = until  # when the arbiter may have freed it, on our clock


class HTTPStore:
    """
    A `LeaseStore` for the cards of one server, among everybody who asks that server.

    Its leases have a ttl: somebody has to renew them.  `settings` tell the ttl of claims that name none, and how long
    an exchange may take.  *mark* ends each id that the server is told: a pool may come to one server by two stores, as
    by two URLs or when an endpoint was taken out and added anew, and what ends a claim at one of them must not end a
    lease that the other has for the same caller.

    Under the `max_rate` of *endpoint*, whose *pace* is that of its other requests too, renewals and releases are sent
    at once all the same: a lease must not be lost, nor a card be kept from others, for a limit on our curiosity.  They
    are counted, so that what can wait waits for them.  A claim waits a second for its turn and is not made otherwise.
    """

    scope: Scope = "everybody"
    needs_listener = True
    #: Seconds of one long poll for hints: less than the server keeps the tickets of who is silent (`TICKET_TTL`).
    listen_time = 4.0

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        mark: str = "",
        *,
        pace: Pace | None = None,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._clock = clock
        self._mark = mark
        self._ttl = settings.ttl
        self._timeout = settings.endpoint_timeout
        self.description = f"server {endpoint.url}"
        self._transport = Transport(endpoint, max_retries=settings.endpoint_max_retries, pace=pace)
        rate = endpoint.max_rate
        self._listen_time = 0.0 if rate is None else min(LISTEN_TURNS / rate, documents.MAX_WAIT)
        self._fresh_state()
        _stores.add(self)

    def _fresh_state(self) -> None:
        # Guards the dictionaries below: lookups and changes only, never during an exchange.
        self._lock = threading.Lock()
        self._leases: dict[str, _Mine] = {}  # by lease id
        self._cards: dict[str, tuple[str, ...]] = {}  # card key -> lease ids of this process, replaced as a whole
        self._tickets: dict[str, str] = {}  # claim id -> holder id
        self._hearsay: dict[str, tuple[float, tuple[LeaseInfo, ...]]] = {}  # card key -> heard at, who has it
        self._released_at: dict[str, float] = {}
        self._released_token: dict[str, int] = {}  # card key -> token of this process' last lease on it
        self._closed_cards: dict[str, float] = {}  # card key -> heard at that it is closed
        self._why: dict[str, str] = {}  # lease id -> why it is gone
        self._owed: dict[str, None] = {}  # ids whose release did not arrive
        self._hints = Subscribers()
        # Set while there are tickets, or nobody should wait for one.
        self._awake = threading.Event()
        self._closed = False
        self._not_before = 0.0  # by our clock: until then the server asked to be left alone

    # -- claiming ----------------------------------------------------------------------------------------------

    def claim(self, claim: Claim) -> Outcome:
        left = self._not_before - self._clock()
        if left > 0:
            # Renewals and releases are sent all the same: they are few, and others wait for what they do.
            raise NotAsked(f"{self.description}: not asked, it wants to be left alone for {left:.0f} more s")
        self._settle()
        anew = claim.id not in self._tickets
        if claim.queue:
            # Before the request: a hint may overtake its answer.
            with self._lock:
                self._tickets[claim.id] = claim.holder.id
                self._awake.set()
        sent = self._clock()
        body = documents.claim_document(claim, self._ttl if claim.ttl is None else claim.ttl)
        (body["id"],) = self._told([claim.id])
        try:
            answer = self._post("/v1/leases", body, self._timeout, Turn.SOON)
        except NotAsked:
            if anew:
                with self._lock:
                    self._drop_ticket_locked(claim.id)
            raise
        document = self._document(answer)
        try:
            if answer.status == 200:
                return Granted(self._granted(claim, documents.read_grant(document), sent))
            if answer.status == 202:
                self._hear(claim, document)
                return Queued(documents.read_position(document))
            if answer.status == 409:
                reasons = documents.read_reasons(document)
                self._hear(claim, document)
                return Refused(reasons)
        except BadDocument as exc:
            raise self._unclear(f"its answer cannot be used: {exc}") from exc
        if answer.status == 410:
            self._forget([claim.id], released=False)
            raise LeaseLost(wire.error_message(document) or "this lease is gone")
        raise self._refused(answer, document)

    def _told(self, ids: Iterable[str]) -> list[str]:
        """These ids, as the server knows them."""
        return [claim_id + self._mark for claim_id in ids]

    def _granted(self, claim: Claim, told: documents.GrantDocument, sent: float) -> Lease:
        if len(told.cards) != claim.count:
            raise BadDocument(f"{len(told.cards)} cards were granted and {claim.count} asked for")
        if not any({wanted.key for wanted in group}.issuperset(told.cards) for group in claim.groups):
            # Somebody else's card, or cards of two hosts: nobody may compute on what was not asked for.
            raise BadDocument("other cards were granted than asked for")
        now = self._clock()
        lease = Lease(
            id=claim.id,
            holder=claim.holder,
            cards=told.cards,
            token=told.token,
            share=claim.share,
            note=claim.note,
            granted_at=now - told.since,
            ttl=told.ttl,
        )
        with self._lock:
            known = self._leases.get(claim.id)
            if known is not None and known.lease.token == lease.token:
                lease = known.lease
            self._leases[claim.id] = _Mine(lease, sent + told.ttl)
            for key in lease.cards:
                self._hearsay.pop(key, None)
                self._closed_cards.pop(key, None)
                ids = self._cards.get(key, ())
                if claim.id not in ids:
                    self._cards[key] = (*ids, claim.id)
            self._drop_ticket_locked(claim.id)
        return lease

    def _hear(self, claim: Claim, document: Mapping[str, Any]) -> None:
        """Remember who has the cards that were asked for."""
        now = self._clock()
        asked = [wanted.key for group in claim.groups for wanted in group]
        told = _by_card(documents.read_lease_infos(document.get("holders", [])))
        closed = documents.read_closed(document)
        with self._lock:
            if self._closed_cards:
                for key in asked:
                    self._closed_cards.pop(key, None)
            # Of others nothing was asked, so nothing is kept.
            self._closed_cards.update(dict.fromkeys(set(closed).intersection(asked), now))
            for key in asked:
                if others := self._others_locked(key, told.get(key, ())):
                    self._hearsay[key] = (now, others)
                else:
                    self._hearsay.pop(key, None)

    def _drop_ticket_locked(self, claim_id: str) -> None:
        self._tickets.pop(claim_id, None)
        if not self._tickets and not self._closed:
            self._awake.clear()

    # -- keeping and giving back -------------------------------------------------------------------------------

    def renew(self, ids: Sequence[str]) -> Mapping[str, bool]:
        alive: dict[str, bool] = {}
        for batch in _batches(ids):
            sent = self._clock()
            # Shorter than other requests: a renewal that hangs can only be repeated.
            timeout = min(self._timeout, self._ttl / 6.0)
            answer = self._post("/v1/leases/renew", {"ids": self._told(batch)}, timeout, Turn.NOW)
            document = self._document(answer)
            if answer.status != 200:
                raise self._refused(answer, document)
            try:
                told = dict(zip(batch, documents.read_alive(document, len(batch)), strict=True))
                why = dict(zip(batch, documents.read_why(document, len(batch)), strict=True))
            except BadDocument as exc:
                raise self._unclear(f"its answer cannot be used: {exc}") from exc
            with self._lock:
                self._why.update((lease_id, text) for lease_id, text in why.items() if text is not None)
                for lease_id in batch:
                    mine = self._leases.get(lease_id)
                    if mine is not None and told[lease_id]:
                        mine.until = sent + (mine.lease.ttl or self._ttl)
            self._forget([lease_id for lease_id in batch if not told[lease_id]], released=False)
            alive.update(told)
        with contextlib.suppress(LeaseStoreError):
            self._settle()
        return alive

    def release(self, ids: Iterable[str]) -> None:
        """What does not arrive is repeated with the next claim or renewal; until then the ttl ends it."""
        mine = list(ids)
        self._forget(mine, released=True)
        if self._why:
            for lease_id in mine:
                self._why.pop(lease_id, None)
        with self._lock:
            # First owed, then paid: an interrupt in between leaves it owed.
            if len(self._owed) < MAX_OWED:
                self._owed.update(dict.fromkeys(mine))
        self._pay(mine)

    withdraw = release

    def revoke(self, key: str, token: int, by: str) -> bool:
        answer = self._post("/v1/leases/revoke", documents.revocation_document(key, token, by), self._timeout)
        document = self._document(answer)
        if answer.status != 200:
            raise self._refused(answer, document)
        try:
            return documents.read_found(document)
        except BadDocument as exc:
            raise self._unclear(f"its answer cannot be used: {exc}") from exc

    def why_gone(self, lease_id: str) -> str | None:
        return self._why.get(lease_id)

    def closed(self) -> Mapping[str, float]:
        if not self._closed_cards:
            return {}
        now = self._clock()
        with self._lock:
            for key in [key for key, at in self._closed_cards.items() if is_open(at, None, now)]:
                del self._closed_cards[key]
            return dict(self._closed_cards)

    def _pay(self, ids: Sequence[str]) -> None:
        for batch in _batches(ids):
            answer = self._post("/v1/leases/release", {"ids": self._told(batch)}, self._timeout, Turn.NOW)
            document = self._document(answer)
            # A page that something in between serves, or an error, is no word of the arbiter: it is told again.
            if answer.status != 200 or "error" in document:
                raise self._refused(answer, document)
            with self._lock:
                for each in batch:
                    self._owed.pop(each, None)

    def _settle(self) -> None:
        """Tell the releases that did not arrive; a server that cannot hear them fails what comes next."""
        if self._owed:
            with self._lock:
                owed = list(self._owed)
            self._pay(owed)

    def _forget(self, ids: Iterable[str], *, released: bool) -> None:
        now = self._clock()
        with self._lock:
            for lease_id in ids:
                self._drop_ticket_locked(lease_id)
                mine = self._leases.pop(lease_id, None)
                if mine is None:
                    continue
                for key in mine.lease.cards:
                    left = tuple(each for each in self._cards.get(key, ()) if each != lease_id)
                    if left:
                        self._cards[key] = left
                    else:
                        self._cards.pop(key, None)
                        if released:
                            self._released_at[key] = now
                            self._released_token[key] = mine.lease.token

    # -- hints -------------------------------------------------------------------------------------------------

    def subscribe(self, hint: Hint) -> Callable[[], None]:
        return self._hints.add(hint)

    def listen(self, timeout: float) -> None:
        begin = time.monotonic()
        if not self._awake.wait(timeout):
            return
        with self._lock:
            holders = list(dict.fromkeys(self._tickets.values()))[: documents.MAX_HOLDERS]
        if not holders:
            return
        left = min(max(begin + timeout - time.monotonic(), self._listen_time), documents.MAX_WAIT)
        body = {"holder": holders[0] if len(holders) == 1 else holders, "timeout": left}
        try:
            answer = self._post("/v1/wait", body, left + self._timeout)
        except NotAsked:
            self._transport.pause(timeout)  # waiters look again by themselves
            return
        document = self._document(answer)
        if answer.status != 200:
            raise self._refused(answer, document)
        try:
            told = documents.read_hints(document)
        except BadDocument as exc:
            raise self._unclear(f"its answer cannot be used: {exc}") from exc
        if not told:
            return
        with self._lock:
            tickets = list(self._tickets)
        by_digest = dict(zip(map(digest, self._told(tickets)), tickets, strict=True))
        mine = [by_digest[each] for each in told if each in by_digest]
        if mine:
            self._hints.tell(mine)

    # -- looking -----------------------------------------------------------------------------------------------

    def _heard(self, key: str, now: float) -> tuple[float, tuple[LeaseInfo, ...]] | None:
        heard = self._hearsay.get(key)
        return heard if heard is not None and now - heard[0] < HEARSAY_TIME else None

    def crowded(self) -> bool:
        return False

    def is_held(self, key: str) -> bool:
        # Single look-ups are atomic; a lock here would be taken for every card of every choice.
        now = self._clock()
        return any(now < mine.until for mine in self._mine(key)) or self._heard(key, now) is not None

    def _mine(self, key: str) -> list[_Mine]:
        return [mine for lease_id in self._cards.get(key, ()) if (mine := self._leases.get(lease_id)) is not None]

    def holders_of(self, key: str) -> Sequence[LeaseInfo]:
        now = self._clock()
        found = [
            LeaseInfo(
                cards=mine.lease.cards,
                holder=mine.lease.holder,
                token=mine.lease.token,
                share=mine.lease.share,
                note=mine.lease.note,
                since=max(0.0, now - mine.lease.granted_at),
                expires_in=mine.until - now,
            )
            for mine in self._mine(key)
            if now < mine.until
        ]
        heard = self._heard(key, now)
        if heard is not None:
            at, infos = heard
            own = {info.token for info in found}
            found += [attrs.evolve(info, since=info.since + now - at) for info in infos if info.token not in own]
        return tuple(found)

    def released_at(self, key: str) -> float | None:
        return self._released_at.get(key)

    def descriptors(self, lease_id: str) -> Sequence[int]:
        return ()

    def leases(self) -> Sequence[LeaseInfo]:
        document = self._get("/v1/leases")
        try:
            closed = documents.read_closed(document)
            infos = documents.read_lease_infos(document.get("leases"))
        except BadDocument as exc:
            raise self._unclear(f"its answer cannot be used: {exc}") from exc
        now = self._clock()
        told = _by_card(infos)
        with self._lock:
            # As first heard: displays ask again and again, and a reading from after the first time counts.
            self._closed_cards = {key: self._closed_cards.get(key, now) for key in closed}
            # Newer than what was heard before: who is not in it has gone.
            self._hearsay = {
                key: (now, others) for key, infos_of in told.items() if (others := self._others_locked(key, infos_of))
            }
        return infos

    def _others_locked(self, key: str, infos: Iterable[LeaseInfo]) -> tuple[LeaseInfo, ...]:
        """Those of other processes: what this one holds, or has just let go of, it knows better."""
        own = {mine.lease.token for mine in self._mine(key)} | {self._released_token.get(key)}
        return tuple(info for info in infos if info.token not in own)

    def queue(self) -> Sequence[TicketInfo]:
        document = self._get("/v1/queue")
        try:
            return documents.read_ticket_infos(document.get("queue"))
        except BadDocument as exc:
            raise self._unclear(f"its answer cannot be used: {exc}") from exc

    # -- exchanges ---------------------------------------------------------------------------------------------

    def _post(self, path: str, body: Mapping[str, object], timeout: float, turn: Turn = Turn.WAIT) -> Answer:
        try:
            answer = self._transport.post(path, body, Deadline.after(timeout), turn)
        except NoTurn as exc:
            raise NotAsked(f"{self.description}: {exc.message}") from exc
        except (EndpointUnavailable, BadAnswer) as exc:
            kind = StoreClosed if self._closed else LeaseStoreError
            raise kind(f"{self.description}: {exc.message}") from exc
        if answer.status == 429:  # 503 is said of this one request, by servers of ours that are busy
            self._not_before = self._clock() + (retry_after(answer) or 0.0)
        return answer

    def _get(self, path: str) -> Mapping[str, Any]:
        try:
            answer = self._transport.get(path, Deadline.after(self._timeout), Turn.SOON)
        except NoTurn as exc:
            raise NotAsked(f"{self.description}: {exc.message}") from exc
        except (EndpointUnavailable, BadAnswer) as exc:
            raise LeaseStoreError(f"{self.description}: {exc.message}") from exc
        document = self._document(answer)
        if answer.status != 200:
            raise self._refused(answer, document)
        return document

    def _document(self, answer: Answer) -> dict[str, Any]:
        try:
            return wire.load_document(answer.body)
        except BadAnswer as exc:
            message = exc.message
        raise self._unclear(f"answered with status {answer.status} and {message}")

    def _refused(self, answer: Answer, document: Mapping[str, Any]) -> LeaseStoreError:
        if answer.status == 404:
            return self._unclear("grants no leases")
        said = wire.error_message(document)
        return self._unclear(f"answered with status {answer.status}{f': {said}' if said else ''}")

    def _unclear(self, message: str) -> LeaseStoreError:
        return LeaseStoreError(f"{self.description}: {message}")

    # -- life --------------------------------------------------------------------------------------------------

    def forget_after_fork(self) -> None:
        self._transport.forget_after_fork()
        self._fresh_state()

    def close(self) -> None:
        """Close the connections; exchanges under way fail at once."""
        self._closed = True
        self._awake.set()
        self._transport.close()


def _by_card(infos: Iterable[LeaseInfo]) -> dict[str, tuple[LeaseInfo, ...]]:
    found: dict[str, tuple[LeaseInfo, ...]] = {}
    for info in infos:
        for key in info.cards:
            found[key] = (*found.get(key, ()), info)
    return found


def _batches(ids: Sequence[str]) -> Iterable[list[str]]:
    for begin in range(0, len(ids), BATCH):
        yield list(ids[begin : begin + BATCH])


#: Every store of this process, for a forked child.
_stores: weakref.WeakSet[HTTPStore] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
