"""Grants leases on this host's cards to holders on other machines.

The server takes the same kernel locks as the processes of this host (`leases.host`), so all of them exclude one
another and stand in one queue.  What it adds is a ttl, by its own clock, and a memory: leases survive its restart.

`Granter` decides, in short file operations on a few threads; `LeaseAPI` speaks HTTP.  Long polls are futures of the
event loop, not threads.  Ids are capabilities: no log line and no GET shows one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from gpupool_sync import wire
from gpupool_sync.clock import boottime
from gpupool_sync.errors import BadAnswer, GPUPoolError, LeaseLost, LeaseStoreError
from gpupool_sync.leases import documents
from gpupool_sync.leases.base import Claim, Granted, Lease, LeaseInfo, Outcome, Queued, Refused
from gpupool_sync.leases.documents import BadDocument, digest
from gpupool_sync.leases.host import HostStore, boot_id
from gpupool_sync.models import LeaseOffer, Reason
from gpupool_sync.server.access import Audit, User, user_of
from gpupool_sync.server.asgi import Message, Receive, Scope, Send, send_answer
from gpupool_sync.server.pages import Answer

logger = logging.getLogger(__name__)

#: Seconds that a ticket lives when its holder neither claims nor waits.
TICKET_TTL = 5.0
#: Seconds that ended ids are remembered, so that a delayed duplicate of a claim takes no card.
GONE_TIME = 600.0
#: Ended ids that are remembered at most, lest a client that releases nonsense fills the memory.
MAX_GONE = 100_000
#: Tickets of remote holders.
MAX_TICKETS = 10_000
#: Long polls at the same time.
MAX_WAITERS = 4096
#: Bytes of the state file, before it is begun anew.
MAX_STATE = 1024 * 1024
#: Bytes of a request.
MAX_BODY = 1024 * 1024
#: Cards whose holders an answer tells.
MAX_TOLD = 64
#: Seconds after which a client that was turned away may come again.
RETRY_AFTER = 1
#: Seconds between two looks at deadlines and silent holders.
TICK = 0.25
#: Seconds between two signs of life in the state file.
SIGN_OF_LIFE = 1.0

#: The lease API: methods of each path, and what it is for.
PATHS: Mapping[str, Mapping[str, str]] = {
    "/v1/leases": {"GET": "Who holds which GPU", "POST": "Claim GPUs"},
    "/v1/leases/renew": {"POST": "Restart the ttl of leases"},
    "/v1/leases/release": {"POST": "Give GPUs back"},
    "/v1/leases/withdraw": {"POST": "Leave the queue"},
    "/v1/leases/revoke": {"POST": "Take a GPU away from its holder"},
    "/v1/wait": {"POST": "Wait until one's turn may have come"},
    "/v1/queue": {"GET": "Who waits for a GPU"},
}


class Conflict(LeaseStoreError):
    """An id is in use with another request."""


class Busy(LeaseStoreError):
    """A bound of this server is reached."""


class _Remote:
    """A lease of somebody elsewhere."""

    __slots__ = ("deadline", "lease", "rooms", "ttl")

    def __init__(self, lease: Lease, ttl: float, rooms: Sequence[float | None], deadline: float) -> None:
        self.lease = lease
        self.ttl = ttl
        self.rooms = tuple(rooms)
        self.deadline = deadline

    def info(self, now: float) -> LeaseInfo:
        lease = self.lease
        return LeaseInfo(
            cards=lease.cards,
            holder=lease.holder,
            token=lease.token,
            share=lease.share,
            note=lease.note,
            since=max(0.0, now - lease.granted_at),
            expires_in=max(0.0, self.deadline - now),
        )


class Granter:
    """
    The leases and tickets of remote holders; every method is thread-safe and short.

    Args:
        store: the locks of this host; nobody else in this process uses it.
        own: whether a card is one of this host's, by its UUID.
        state_path: where leases are remembered across a restart; None: nowhere.
        on_held: called with the keys of all cards that remote holders have, whenever they change.

    Raises:
        LeaseStoreError: another server uses the state file, or it belongs to somebody else.
    """

    def __init__(
        self,
        store: HostStore,
        *,
        own: Callable[[str], bool],
        state_path: str | None = None,
        ticket_ttl: float = TICKET_TTL,
        clock: Callable[[], float] = boottime,
        on_held: Callable[[frozenset[str]], object] | None = None,
        audit: Audit | None = None,
    ) -> None:
        self.store = store
        self.audit = audit or Audit()
        self.ticket_ttl = ticket_ttl
        self._own = own
        self._clock = clock
        self._boot = boot_id()
        self._on_held = on_held
        # Guards the dictionaries below. Innermost: held for dictionary work only.
        self._lock = threading.Lock()
        self._leases: dict[str, _Remote] = {}  # by id
        self._tickets: dict[str, Claim] = {}  # by id
        self._heard: dict[str, float] = {}  # holder id -> when it claimed or waited last
        self._waiting: Counter[str] = Counter()  # holder id -> long polls under way
        # id -> when it ended, oldest first; a plain dictionary passes the places of all that were deleted to find it.
        self._gone: OrderedDict[str, float] = OrderedDict()
        self._due = math.inf  # no deadline is earlier
        self._counts = dict.fromkeys(("grants", "renewals", "releases", "expiries", "revocations"), 0)
        self._version = 0
        # One claim or end of an id at a time, or a repeated claim could lock two cards. Held during file operations.
        self._stripes = [threading.Lock() for _ in range(64)]
        # One writer of the state file at a time. Held during its writing.
        self._writing = threading.Lock()
        self._written = 0
        self._written_at = -math.inf
        self._write_failed = False
        self._dirty = False
        # One caller of on_held at a time, so that the last one has the last word.
        self._telling = threading.Lock()
        self._state = None if state_path is None else _StateFile(state_path)
        if self._state is not None:
            self._retake(self._state.read())

    def close(self) -> None:
        """Let go of the files; leases stay in the state file."""
        if self._state is not None:
            self._persist()
            self._state.close()
        self.store.close()

    def _stripe(self, claim_id: str) -> threading.Lock:
        return self._stripes[hash(claim_id) % len(self._stripes)]

    # -- claiming ----------------------------------------------------------------------------------------------

    def claim(self, claim: Claim) -> tuple[Outcome, float]:
        """
        Grant, queue or refuse; with the instant that durations in the answer are counted from.

        Raises:
            LeaseLost: the id has ended.
            Conflict: it is in use with another request.
            Busy: there are too many tickets.
            LeaseStoreError: the locks cannot be used.
        """
        ttl = documents.MAX_TTL if claim.ttl is None else claim.ttl
        self.expire()
        with self._stripe(claim.id):
            now = self._clock()
            known = self._known(claim, now)
            if known is not None:
                if (why := self.store.why_gone(claim.id)) is not None:
                    raise LeaseLost(f"this lease is gone: {why}")
                # The holder counts its ttl from this request, so it must begin anew here too.
                self._extend([claim.id], now)
                return Granted(known.lease), now
            groups, strangers = self._own_cards(claim)
            if not any(len(group) >= claim.count for group in groups):
                return Refused(strangers or {}), now
            claim = attrs.evolve(claim, groups=groups)
            if claim.queue:
                self._enter_ticket(claim)
            outcome = self.store.claim_until(claim, now + ttl)
            if isinstance(outcome, Granted):
                outcome = Granted(self._enter_lease(claim, ttl, outcome.lease, now))
            elif isinstance(outcome, Refused) and strangers:
                outcome = Refused({**outcome.reasons, **strangers})
        if isinstance(outcome, Granted):
            # Before the answer: what the client hears of must survive us.
            self._remember(claim.id)
            self._tell_held()
        return outcome, now

    def _known(self, claim: Claim, now: float) -> _Remote | None:
        with self._lock:
            if claim.id in self._gone:
                raise LeaseLost("this lease was released or withdrawn, or has expired")
            self._heard[claim.holder.id] = now
            known = self._leases.get(claim.id)
            if known is not None:
                lease = known.lease
                before = (lease.holder, len(lease.cards), lease.share)
            else:
                ticket = self._tickets.get(claim.id)
                before = (claim.holder, claim.count, claim.share)
                if ticket is not None:
                    before = (ticket.holder, ticket.count, ticket.share)
        if before != (claim.holder, claim.count, claim.share):
            raise Conflict("this id is in use with another request")
        return known

    def _own_cards(self, claim: Claim) -> tuple[tuple[tuple[Any, ...], ...], dict[str, Reason]]:
        strangers: dict[str, Reason] = {}
        groups = []
        for group in claim.groups:
            mine = []
            for wanted in group:
                if self._own(wanted.key):
                    mine.append(wanted)
                elif len(strangers) < MAX_TOLD:
                    strangers[wanted.key] = Reason("not-here", "this server has no such card, or cannot read it")
            if mine:
                groups.append(tuple(mine))
        return tuple(groups), strangers

    def _enter_ticket(self, claim: Claim) -> None:
        with self._lock:
            if claim.id not in self._tickets and len(self._tickets) >= MAX_TICKETS:
                raise Busy(f"{MAX_TICKETS} claims wait here already")
            self._tickets[claim.id] = claim

    def _enter_lease(self, claim: Claim, ttl: float, granted: Lease, now: float) -> Lease:
        lease = attrs.evolve(granted, ttl=ttl)
        rooms = {wanted.key: wanted.room_mb for group in claim.groups for wanted in group}
        remote = _Remote(lease, ttl, [rooms.get(key) for key in lease.cards], now + ttl)
        with self._lock:
            self._tickets.pop(claim.id, None)
            self._leases[claim.id] = remote
            self._due = min(self._due, remote.deadline)
            self._counts["grants"] += 1
        self._note("grant", lease)
        return lease

    def _note(self, event: str, lease: Lease) -> None:
        self.audit.note(event, user=lease.holder.user, holder=str(lease.holder), cards=lease.cards, token=lease.token)

    def owner_of(self, claim_id: str) -> str | None:
        """The user who has this lease or ticket; None if there is none, or none any more."""
        with self._lock:
            remote, ticket = self._leases.get(claim_id), self._tickets.get(claim_id)
        return remote.lease.holder.user if remote is not None else None if ticket is None else ticket.holder.user

    def owner_of_card(self, key: str, token: int) -> str | None:
        """The user elsewhere who has the card by the lease with this fencing token."""
        with self._lock:
            leases = [each.lease for each in self._leases.values()]
        return next((each.holder.user for each in leases if each.token == token and key in each.cards), None)

    def _less(self) -> None:
        # Written at the next tick: should we die before, the cards' own records say that they were given back.
        self._dirty = True
        self._tell_held()

    def _tell_held(self) -> None:
        if self._on_held is not None:
            with self._telling:
                with self._lock:
                    held = frozenset(key for remote in self._leases.values() for key in remote.lease.cards)
                self._on_held(held)

    # -- keeping and ending ------------------------------------------------------------------------------------

    def renew(self, ids: Sequence[str]) -> tuple[list[bool], dict[str, str]]:
        """
        Restart the ttl of each lease; False for one that is gone, and why, if it was revoked.

        One that was revoked stands until its holder lets go of it or its ttl is over: it may still compute.
        """
        self.expire()
        revoked = {lease_id: why for lease_id in ids if (why := self.store.why_gone(lease_id)) is not None}
        extended = self._extend([lease_id for lease_id in ids if lease_id not in revoked], self._clock())
        with self._lock:
            self._counts["renewals"] += sum(extended)
        alive = iter(extended)
        return [lease_id not in revoked and next(alive) for lease_id in ids], revoked

    def revoke(self, key: str, token: int, by: str) -> bool:
        """Take a lease away, of a holder anywhere; False if there is no such lease."""
        found = self._own(key) and self.store.revoke(key, token, by)
        with self._lock:
            self._counts["revocations"] += found
        return found

    def _extend(self, ids: Sequence[str], now: float) -> list[bool]:
        until: dict[str, float] = {}
        with self._lock:
            for lease_id in ids:
                remote = self._leases.get(lease_id)
                if remote is not None:
                    until[lease_id] = remote.deadline = now + remote.ttl
        for lease_id, deadline in until.items():
            self.store.extend(lease_id, deadline)
        return [lease_id in until for lease_id in ids]

    def release(self, ids: Collection[str]) -> None:
        """End leases and tickets; ids that are not known are remembered as ended."""
        ended = False
        for claim_id in ids:
            with self._stripe(claim_id):
                ended |= self._end(claim_id)
                self.store.release([claim_id])
        if ended:
            self._less()

    def _end(self, claim_id: str) -> bool:
        with self._lock:
            self._remember_gone_locked(claim_id, self._clock())
            self._tickets.pop(claim_id, None)
            held = self._leases.pop(claim_id, None)
            self._counts["releases"] += held is not None
        if held is not None:
            self._note("release", held.lease)
        return held is not None

    def _remember_gone_locked(self, claim_id: str, now: float) -> None:
        gone = self._gone
        gone.pop(claim_id, None)
        gone[claim_id] = now
        while len(gone) > MAX_GONE or now - next(iter(gone.values())) > GONE_TIME:
            del gone[next(iter(gone))]

    def expire(self) -> None:
        """End the leases that were not renewed in time, and the tickets of holders that are silent."""
        now = self._clock()
        with self._lock:
            late: list[tuple[str, _Remote]] = []
            if now >= self._due:
                late = [(lease_id, remote) for lease_id, remote in self._leases.items() if remote.deadline <= now]
                self._counts["expiries"] += len(late)
                for lease_id, _ in late:
                    del self._leases[lease_id]
                    self._remember_gone_locked(lease_id, now)
                self._due = min((remote.deadline for remote in self._leases.values()), default=math.inf)
            silent = []
            if self._tickets:
                limit = now - self.ticket_ttl
                heard = self._heard
                silent = [
                    claim_id
                    for claim_id, claim in self._tickets.items()
                    if heard.get(claim.holder.id, -math.inf) < limit and not self._waiting[claim.holder.id]
                ]
                for claim_id in silent:
                    del self._tickets[claim_id]
        for lease_id, remote in late:
            with self._stripe(lease_id):
                self.store.expire([lease_id])
            self._note("expiry", remote.lease)
            logger.warning(
                "the lease of %s on %s was not renewed for %g s and has ended",
                remote.lease.holder,
                ", ".join(remote.lease.cards),
                remote.ttl,
            )
        dropped = False
        try:
            for claim_id in silent:
                # Not remembered as ended: who was cut off for a while may come again with the same claim.
                with self._stripe(claim_id):
                    dropped |= self._drop_ticket(claim_id)
        finally:
            # Once for all: for each of a thousand that vanish together it would read what is left of the thousand.
            if dropped:
                self.store.pass_on()
        if late:
            self._less()

    def _drop_ticket(self, claim_id: str) -> bool:
        with self._lock:
            if claim_id in self._tickets or claim_id in self._leases:  # it has come again meanwhile
                return False
        return self.store.drop_ticket(claim_id)

    # -- who was heard of --------------------------------------------------------------------------------------

    def wait_begins(self, holders: Iterable[str]) -> None:
        now = self._clock()
        with self._lock:
            for holder in holders:
                self._waiting[holder] += 1
                self._heard[holder] = now

    def wait_ends(self, holders: Iterable[str]) -> None:
        now = self._clock()
        with self._lock:
            for holder in holders:
                self._waiting[holder] -= 1
                if self._waiting[holder] <= 0:
                    del self._waiting[holder]
                self._heard[holder] = now

    def holder_of_ticket(self, claim_id: str) -> str | None:
        ticket = self._tickets.get(claim_id)
        return None if ticket is None else ticket.holder.id

    @property
    def has_tickets(self) -> bool:
        return bool(self._tickets)

    # -- looking -----------------------------------------------------------------------------------------------

    def is_leased(self, key: str) -> bool | None:
        """Whether anybody has a lease on the card, on this host or elsewhere; None: it cannot be seen at present."""
        try:
            return bool(self.store.holders_of(key))
        except LeaseStoreError:
            return None

    def holders_of(self, claim: Claim) -> list[LeaseInfo]:
        """Who has the cards that *claim* names, as far as is known without asking the kernel."""
        now = self._clock()
        keys = [wanted.key for group in claim.groups for wanted in group][:MAX_TOLD]
        remote: dict[str, LeaseInfo] = {}
        with self._lock:
            for each in self._leases.values():
                info = each.info(now)
                for key in each.lease.cards:
                    remote.setdefault(key, info)
        told: dict[int, LeaseInfo] = {}
        for key in keys:
            if key in remote:
                told[remote[key].token] = remote[key]
            elif self._own(key):
                for info in self.store.holders_of(key):
                    told.setdefault(info.token, info)
        return [info for info in told.values() if math.isfinite(info.since)]

    def numbers(self) -> dict[str, int]:
        """Leases of remote holders, and what was counted since this process began."""
        with self._lock:
            return {"leases": len(self._leases), **self._counts}

    def leases(self) -> list[LeaseInfo]:
        """Every lease on this host, of remote and of local holders."""
        now = self._clock()
        with self._lock:
            remote = [each.info(now) for each in self._leases.values()]
        mine = {(key, info.token) for info in remote for key in info.cards}
        local = [
            info
            for info in self.store.leases()
            if math.isfinite(info.since) and not any((key, info.token) in mine for key in info.cards)
        ]
        return remote + local

    # -- across a restart --------------------------------------------------------------------------------------

    def tick(self) -> None:
        """What is to be done now and then."""
        self.expire()
        with self._lock:
            living = bool(self._leases)
            if not self._tickets:
                self._heard.clear()
            elif len(self._heard) > MAX_TICKETS:
                limit = self._clock() - self.ticket_ttl
                self._heard = {holder: at for holder, at in self._heard.items() if at >= limit}
        if self._dirty or (living and self._clock() - self._written_at >= SIGN_OF_LIFE):
            self._dirty = False
            self._persist()

    def _remember(self, lease_id: str) -> None:
        """Add a lease to the state file, which need not be written anew for it."""
        if self._state is None:
            return
        with self._writing:
            with self._lock:
                remote = self._leases.get(lease_id)
            if remote is None:
                return  # it has been released meanwhile
            with contextlib.suppress(OSError):  # told by the attempt below
                if self._state.add({"alive_at": self._clock(), "lease": self._kept(remote)}):
                    return
        self._persist()

    @staticmethod
    def _kept(remote: _Remote) -> dict[str, Any]:
        return {**documents.kept_lease_document(remote.lease, remote.rooms), "deadline": remote.deadline}

    def _persist(self) -> None:
        if self._state is None:
            return
        with self._lock:
            self._version += 1
            wanted = self._version
        with self._writing:
            if self._written >= wanted:
                return  # somebody else has written what we changed
            with self._lock:
                version = self._version
                remotes = list(self._leases.values())
            now = self._clock()
            kept = [self._kept(each) for each in remotes]
            try:
                self._state.write({"v": 1, "boot": self._boot, "alive_at": now, "leases": kept})
                self._write_failed = False
            except OSError as exc:
                # The leases are the kernel's locks: they are good, but would not survive us.
                if not self._write_failed:
                    logger.warning("leases will not survive a restart: %s cannot be written: %s", self._state.path, exc)
                self._write_failed = True
            self._written, self._written_at = version, now

    def _retake(self, state: Mapping[str, Any]) -> None:
        if state.get("v") != 1 or state.get("boot") != self._boot:
            return
        now = self._clock()
        alive_at = state.get("alive_at")
        if not isinstance(alive_at, (int, float)) or now < alive_at:
            return
        retaken = 0
        for raw in state.get("leases") or ():
            try:
                lease, rooms = documents.read_kept_lease(raw)
                deadline = float(raw["deadline"])
            except (BadDocument, KeyError, TypeError, ValueError) as exc:
                logger.warning("a lease in %s cannot be read: %s", self._state and self._state.path, exc)
                continue
            assert lease.ttl is not None
            if not deadline > alive_at:
                continue
            # While we were down nobody could renew: the ttl stood still.
            deadline = min(deadline + (now - alive_at), now + lease.ttl)
            if not self._retake_one(lease, rooms, deadline):
                logger.warning("the lease of %s on %s is lost", lease.holder, ", ".join(lease.cards))
                self._gone[lease.id] = now
                continue
            self._leases[lease.id] = _Remote(lease, lease.ttl, rooms, deadline)
            self._due = min(self._due, deadline)
            retaken += 1
        if retaken:
            logger.info("%d leases of remote holders go on", retaken)
        self._persist()
        self._tell_held()

    def _retake_one(self, lease: Lease, rooms: Sequence[float | None], deadline: float) -> bool:
        pause = threading.Event()
        for _ in range(25):
            with contextlib.suppress(OSError, LeaseStoreError):
                if self.store.retake(lease, rooms, deadline):
                    return True
            # Somebody may have the lock for the instant that it takes to see whose it is.
            pause.wait(0.02)
        return False


class _StateFile:
    """
    What a server remembers, in a file that only its user can read: ids are in it.

    One JSON object a line: one with ``leases`` says all there is, one with ``lease`` adds to it.  A server that is
    killed leaves at worst an incomplete last line.  Lines are added, as putting a new file in the place of the old
    one makes some file systems write to the disk at once.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: int | None = None  # what this process has begun; None: begin anew
        try:
            self._lock_fd = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise LeaseStoreError(f"{path} cannot be used to remember leases: {exc.strerror}") from exc
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise LeaseStoreError(f"another server remembers its leases in {path}") from None

    def read(self) -> Mapping[str, Any]:
        """What was written last; nothing if there is no such file, or it is not ours."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise LeaseStoreError(f"{self.path} cannot be read: {exc.strerror}") from exc
        state: dict[str, Any] = {}
        leases: dict[str, Any] = {}
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise LeaseStoreError(f"{self.path} belongs to somebody else")
            for line in file:
                try:
                    told = json.loads(line)
                except ValueError:
                    continue
                if not isinstance(told, dict):
                    continue
                if "leases" in told:
                    leases.clear()
                more = [told["lease"]] if "lease" in told else told.get("leases")
                if isinstance(more, list):
                    leases.update((str(each["id"]), each) for each in more if isinstance(each, dict) and "id" in each)
                state.update(told)
        return {**state, "leases": list(leases.values())}

    def write(self, document: Mapping[str, Any]) -> None:
        """
        Say all there is.

        Raises:
            OSError: it cannot be written; what stood there before still does.
        """
        line = wire.dump(document) + b"\n"
        if not self._added(line):
            self._replace(line)

    def add(self, document: Mapping[str, Any]) -> bool:
        """
        Add to what was said; False if all has to be said anew.

        Raises:
            OSError: it cannot be written.
        """
        return self._added(wire.dump(document) + b"\n")

    def _added(self, line: bytes) -> bool:
        if self._file is None:
            return False
        found = os.fstat(self._file)
        if not found.st_nlink or found.st_size + len(line) > MAX_STATE:
            return False
        try:
            complete = os.write(self._file, line) == len(line)
        except OSError:
            self._forget_file()
            raise
        if not complete:  # the disk is full, or nearly
            self._forget_file()
        return complete

    def _forget_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _replace(self, line: bytes) -> None:
        fresh = f"{self.path}.{os.urandom(6).hex()}"
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(fresh, how, 0o600)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.replace(fresh, self.path)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        self._forget_file()
        self._file = descriptor

    def close(self) -> None:
        self._forget_file()
        os.close(self._lock_fd)


class LeaseAPI:
    """The lease API as an ASGI application; `start` it before, `close` it after."""

    def __init__(self, granter: Granter, *, lock_dir: str | None = None, stopping: Callable[[], bool] | None = None):
        self.granter = granter
        #: What the summary tells of this API.
        self.offer = LeaseOffer(1, lock_dir, granter.store.directory_id)
        #: Whether the server is about to end; long polls then end too.
        self.stopping: Callable[[], bool] = stopping or (lambda: False)
        #: Long polls at the same time.
        self.most_waiters = MAX_WAITERS
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="gpupool-leases")
        self._loop: asyncio.AbstractEventLoop | None = None
        # What follows is touched on the event loop's thread only.
        self._waits: dict[str, set[asyncio.Future[None]]] = {}  # by holder id
        self._number = 0
        self._pending: dict[str, dict[str, int]] = {}  # holder id -> digest of a ticket's id -> number of its hint
        self._hint_count = 0
        # Ends the thread below.
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="gpupool-server-leases", daemon=True)
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._unsubscribe = self.granter.store.subscribe(self._hint)
        self._keeper.start()

    def close(self) -> None:
        """End the threads; requests must be over. Leases stay in the state file."""
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join(10.0)
        self._threads.shutdown()
        self._unsubscribe()
        self.granter.close()

    def _keep(self) -> None:
        """Hints of other processes, deadlines, signs of life; supervised."""
        while not self._ended.is_set():
            try:
                if self.granter.has_tickets:
                    self.granter.store.listen(TICK)
                else:
                    self._ended.wait(TICK)
                self.granter.tick()
                loop = self._loop
                if loop is not None and self.stopping():
                    with contextlib.suppress(RuntimeError):  # it has ended already
                        loop.call_soon_threadsafe(self._end_waits)
            except Exception:
                logger.exception("keeping the leases broke; going on")
                self._ended.wait(TICK)

    # -- hints -------------------------------------------------------------------------------------------------

    def _hint(self, ids: Iterable[str]) -> None:
        loop = self._loop
        if loop is None:
            return
        hints = [(holder, digest(each)) for each in ids if (holder := self.granter.holder_of_ticket(each)) is not None]
        if hints:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._hinted, hints)

    def _hinted(self, hints: Iterable[tuple[str, str]]) -> None:
        if len(self._pending) > MAX_TICKETS:
            self._pending.clear()  # of holders that never came for them; every waiter asks again by itself
        for holder, which in hints:
            self._hint_count += 1
            mine = self._pending.setdefault(holder, {})
            if len(mine) < MAX_TICKETS:
                mine[which] = self._hint_count
            self._wake(holder)

    def _wake(self, holder: str) -> None:
        for future in self._waits.get(holder, ()):
            if not future.done():
                future.set_result(None)

    def _end_waits(self) -> None:
        for holder in list(self._waits):
            self._wake(holder)

    def _take_hints(self, holders: Iterable[str]) -> list[str]:
        found: dict[str, int] = {}
        for holder in holders:
            found.update(self._pending.pop(holder, {}))
        return sorted(found, key=found.__getitem__)

    def numbers(self) -> dict[str, int]:
        """What `Granter.numbers` tells, and the long polls under way."""
        return {**self.granter.numbers(), "long_polls": self._number}

    # -- HTTP --------------------------------------------------------------------------------------------------

    @staticmethod
    def knows(path: str) -> bool:
        return path in PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self.answer(scope["method"], scope["path"], scope["headers"], receive, user_of(scope))
        await send_answer(send, answer, head=scope["method"] == "HEAD")

    async def answer(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[bytes, bytes]],
        receive: Receive,
        user: User | None = None,
    ) -> Answer:
        """The answer to a request for one of `PATHS`, of this *user*; None: of anybody, as no tokens are asked for."""
        methods = PATHS[path]
        if method == "HEAD" and "GET" in methods:
            method = "GET"
        if method not in methods:
            allow = ", ".join(methods).encode()
            return _error(405, "method_not_allowed", f"{method} is not possible here", (b"allow", allow))
        self._loop = asyncio.get_running_loop()
        try:
            if method == "GET":
                return await self._run(self._list, path)
            fields = await _read(headers, receive)
            if path == "/v1/wait":
                return await self._wait(fields, receive)
            return await self._run(self._do, path, fields, user)
        except _Refusal as exc:
            return exc.answer
        except BadAnswer as exc:
            return _error(400, "bad_json", f"the body is {exc.message}")
        except BadDocument as exc:
            return _error(422, "bad_request", str(exc))
        except LeaseLost as exc:
            return _error(410, "gone", str(exc))
        except Conflict as exc:
            return _error(422, "conflict", str(exc))
        except Busy as exc:
            return _busy(str(exc))
        except GPUPoolError as exc:
            logger.warning("no lease can be granted: %s", exc)
            return _error(503, "unavailable", str(exc))
        except Exception:
            logger.exception("a request for %s broke", path)
            return _error(500, "internal", "the server has a bug; its log has the details")

    async def _run(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _list(self, path: str) -> Answer:
        if path == "/v1/leases":
            leases = [documents.lease_info_document(info) for info in self.granter.leases()]
            return _answer(200, {"leases": leases, "closed": sorted(self.granter.store.closed())})
        tickets = self.granter.store.queue()
        return _answer(200, {"queue": [documents.ticket_info_document(info) for info in tickets]})

    def _do(self, path: str, fields: Mapping[str, Any], user: User | None = None) -> Answer:
        if path == "/v1/leases":
            claim = documents.read_claim(fields)
            if user is not None:
                # Whose it is the token says, not the client.
                claim = attrs.evolve(claim, holder=attrs.evolve(claim.holder, user=user.name))
            return self._claim(claim)
        if path == "/v1/leases/revoke":
            key, token, by = documents.read_revocation(fields)
            if user is not None:
                by = f"{user.name} ({by})"
                if not user.admin and self.granter.owner_of_card(key, token) != user.name:
                    return self._forbidden(path, user, "only an admin's token takes a GPU from somebody else")
            found = self.granter.revoke(key, token, by)
            if found:
                self.granter.audit.note("force", user=None if user is None else user.name, by=by, card=key, token=token)
                logger.warning("the lease with token %d on %s was revoked by %s", token, key, by)
            return _answer(200, {"found": found})
        ids = documents.read_ids(fields)
        if user is not None and not {self.granter.owner_of(each) for each in ids} <= {user.name, None}:
            return self._forbidden(path, user, "a lease can be renewed and released with its own user's token only")
        if path == "/v1/leases/renew":
            alive, revoked = self.granter.renew(ids)
            return _answer(200, {"alive": alive, "why": [revoked.get(each) for each in ids]})
        self.granter.release(ids)
        return _answer(200, {})

    def _forbidden(self, path: str, user: User, why: str) -> Answer:
        self.granter.audit.denied(why=why, user=user.name, path=path)
        return _error(403, "forbidden", why)

    def _claim(self, claim: Claim) -> Answer:
        outcome, now = self.granter.claim(claim)
        if isinstance(outcome, Granted):
            return _answer(200, documents.grant_document(outcome.lease, now))
        holders = [documents.lease_info_document(info) for info in self.granter.holders_of(claim)]
        closed = self._closed_of(claim)
        if isinstance(outcome, Queued):
            document = {"position": outcome.position, "ticket_ttl": self.granter.ticket_ttl, "holders": holders}
            return _answer(202, {**document, "closed": closed})
        return _answer(
            409,
            {
                **wire.error_document("refused", "none of these cards can be granted now"),
                "reasons": documents.reasons_document(outcome.reasons),
                "holders": holders,
                "closed": closed,
            },
        )

    def _closed_of(self, claim: Claim) -> list[str]:
        closed = set(self.granter.store.closed())
        return [wanted.key for group in claim.groups for wanted in group if wanted.key in closed] if closed else []

    async def _wait(self, fields: Mapping[str, Any], receive: Receive) -> Answer:
        holders, timeout = documents.read_wait(fields)
        if self._number >= self.most_waiters:
            return _busy(f"{self.most_waiters} wait here already")
        hints = self._take_hints(holders)
        self.granter.wait_begins(holders)
        try:
            if not hints and timeout and not self.stopping():
                gone = await self._sleep(holders, timeout, receive)
                # What a client that has gone would have been told is for its next poll.
                hints = [] if gone else self._take_hints(holders)
        finally:
            self.granter.wait_ends(holders)
        return _answer(200, {"hints": hints})

    async def _sleep(self, holders: Sequence[str], timeout: float, receive: Receive) -> bool:
        """Until a hint comes, or the client goes, or the time is over; whether the client has gone."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        left = asyncio.ensure_future(_disconnected(receive))
        self._number += 1
        for holder in holders:
            self._waits.setdefault(holder, set()).add(woken)
        try:
            await asyncio.wait({woken, left}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            return left.done()
        finally:
            self._number -= 1
            for holder in set(holders):
                waits = self._waits[holder]
                waits.discard(woken)
                if not waits:
                    del self._waits[holder]
            woken.cancel()
            left.cancel()


class _Refusal(Exception):
    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


async def _disconnected(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


async def _read(headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> dict[str, Any]:
    """The JSON object in the body of a request."""
    fields = {name.lower(): value for name, value in headers}
    # A page in somebody's browser can send text here without asking, but not JSON.
    if fields.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
        raise _Refusal(_error(415, "not_json", "Content-Type: application/json is needed"))
    too_large = _Refusal(_error(413, "too_large", f"at most {MAX_BODY} bytes are allowed", (b"connection", b"close")))
    announced = fields.get(b"content-length", b"0")
    if not announced.isdigit() or int(announced[:20]) > MAX_BODY:
        raise too_large
    body = bytearray()  # what comes byte by byte is not copied for each of them
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refusal(_error(400, "cut_off", "the client went away"))
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise too_large
    return wire.load_document(bytes(body))


def _answer(status: int, document: object, *more: tuple[bytes, bytes]) -> Answer:
    body = wire.dump(document)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *more,
    ]
    return Answer(status, headers, body)


def _error(status: int, code: str, message: str, *more: tuple[bytes, bytes]) -> Answer:
    return _answer(status, wire.error_document(code, message), *more)


def _busy(message: str) -> Answer:
    return _error(503, "busy", message, (b"retry-after", b"%d" % RETRY_AFTER))


def open_leases(
    lock_dir: str | None,
    *,
    port: int,
    own: Callable[[str], bool],
    on_held: Callable[[frozenset[str]], object] | None = None,
    private_ok: bool = True,
    audit: Audit | None = None,
) -> LeaseAPI:
    """
    The lease API of a server on *port*, with the locks in *lock_dir* (None: the directory that this host shares).

    With *private_ok* false a directory will not do that only a part of this host sees, such as a container.

    Raises:
        LeaseStoreError: the directory cannot be used, or another server remembers its leases there.
    """
    store = HostStore(lock_dir)
    if store.private is not None and not private_ok:
        store.close()
        raise LeaseStoreError(
            f"{store.private}: processes outside would not see the leases. Mount the host's lock directory there, "
            "or say --container-ok if nobody else uses these GPUs without asking this server"
        )
    # A server per user and port: each remembers its own leases.
    name = f"server-{os.geteuid()}-{port}.state"
    granter = Granter(store, own=own, state_path=os.path.join(store.path, name), on_held=on_held, audit=audit)
    return LeaseAPI(granter, lock_dir=store.path)
