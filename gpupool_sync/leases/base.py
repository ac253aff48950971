"""The contract between the pool and whoever decides who holds a card.

A *store* is one arbiter as one process sees it.  `docs/design.md`, "Leases", has the reasons; one contract test
suite runs over every implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import attrs

from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.models import Reason

Scope = Literal["process", "container", "host", "everybody"]

#: Seconds that a card stays closed after a whole-card lease that its holder did not give back (it expired, or was
#: revoked), unless a reading shows it empty before: what is left of that holder may still compute on it.
CLOSED_TIME = 60.0


@attrs.frozen
class Holder:
    """Who asks: `id` is the process-wide identity of one pool, the rest is for people."""

    id: str
    name: str | None
    user: str
    host: str
    pid: int

    def __str__(self) -> str:
        who = f"{self.user}@{self.host} pid {self.pid}"
        return f"{self.name} ({who})" if self.name else who


@attrs.frozen
class Share:
    """
    A part of one card: an amount of memory, or one of `places`.

    Exactly one of the two is given.  `room_mb` is what the claimant saw of the card: total memory less what foreign
    processes use; the arbiter grants while leased + asked ≤ room.
    """

    memory_mb: float | None = None
    places: int | None = None

    def __str__(self) -> str:
        return f"{self.memory_mb:.0f} MiB" if self.memory_mb is not None else f"one of {self.places} places"


class Wanted(NamedTuple):
    """One card that would do; `room_mb` matters only to shares by memory."""

    key: str
    room_mb: float | None = None


@attrs.frozen
class Claim:
    """
    A wish for `count` cards, all from one of `groups` (a group is the cards of one host), most wanted first.

    `id` is chosen by the client (128 random bits).  It makes the claim idempotent, and it is the capability to renew
    and release what the claim is granted, so it is never displayed.
    """

    id: str = attrs.field(repr=False)
    holder: Holder
    groups: tuple[tuple[Wanted, ...], ...]
    count: int = 1
    share: Share | None = None
    ttl: float | None = None
    #: Seconds the client has waited already, at whatever arbiter; moves its ticket to the front of younger ones.
    waited: float = 0.0
    #: Leave a ticket if nothing can be granted now.
    queue: bool = False
    #: A ticket for several cards may hold free ones back until it has enough. A waiter with tickets at several
    #: arbiters sets this at one of them only: two waiters that collect at two arbiters could starve each other.
    reserve: bool = True
    note: str | None = None
    #: Of cards that `LeaseStore.closed` names: seconds since a reading showed the card empty.
    emptied: Mapping[str, float] = attrs.field(factory=dict)
    #: Of cards that a reading speaks against: seconds since that reading. It shows their holder's job, as long as they
    #: have one: such a card is granted only if it was given back after that reading. Where leases end by a ttl, that
    #: closes the card, and this is not looked at.
    busy: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class Lease:
    """A grant. Two live leases never cover the same card, but for shares of one mode that fit together."""

    id: str = attrs.field(repr=False)
    holder: Holder
    cards: tuple[str, ...]
    #: Larger than that of any earlier lease on any of the cards, across restarts and loss of the store.
    token: int
    share: Share | None
    note: str | None
    granted_at: float  # clock.boottime() of this machine
    #: Seconds from a renewal to expiry by the arbiter's clock; None: lives as long as its process.
    ttl: float | None = None


@attrs.frozen
class Granted:
    lease: Lease


@attrs.frozen
class Queued:
    """A ticket was left (or was there already); `position` 0 is the head among those who want any of the same cards."""

    position: int


@attrs.frozen
class Refused:
    """Nothing could be granted now; a reason for each card that the arbiter looked at."""

    reasons: Mapping[str, Reason]


@attrs.frozen
class LeaseInfo:
    """What others may know of a lease: everything but its id."""

    cards: tuple[str, ...]
    holder: Holder
    token: int
    share: Share | None
    note: str | None
    since: float  # seconds it has been held
    expires_in: float | None = None


@attrs.frozen
class TicketInfo:
    """What others may know of a ticket."""

    position: int
    holder: Holder
    cards: tuple[str, ...]
    count: int
    share: Share | None
    waited: float
    note: str | None


Outcome = Granted | Queued | Refused

#: Called with the ids of tickets that may have become servable. Must not block and must not raise; may be called on
#: any thread, with no lock of the store held.
Hint = Callable[[Iterable[str]], None]


class NotAsked(LeaseStoreError):
    """The arbiter was not even asked: a claim that it has never heard of need not be withdrawn."""


class StoreClosed(LeaseStoreError):
    """The store was closed, so the arbiter will not be told anything any more."""


class LeaseStore(Protocol):
    """
    One arbiter.  Every method is thread-safe and short: none waits for another holder.

    Each may do I/O and raises `LeaseStoreError` if the arbiter cannot be asked; then nothing was granted as far as
    the caller is concerned, and repeating the call with the same id finds out.
    """

    #: Among whom this arbiter excludes: this process, this container, this host, or everybody who can reach the card.
    scope: Scope
    #: For people: "memory", "host:/var/lock/gpupool_sync", "server http://…", "redis://…".
    description: str
    #: Whether hints come only while somebody is inside `listen`. False: the store calls the hint by itself.
    needs_listener: bool

    def claim(self, claim: Claim) -> Outcome:
        """
        Grant `count` cards of one group, all or nothing, or leave a ticket, or say why not.

        Idempotent by `claim.id`: repeating a granted claim returns the same lease.  The cards of a claim that is not
        granted may change from call to call (a ticket is rewritten); holder, count and share may not.

        A card whose last lease expired or was revoked is closed, and is granted only when the `emptied` of this claim
        (or of another one since) says that a reading after that end showed it empty, or when `CLOSED_TIME` has passed.

        Raises:
            LeaseLost: this id was released, revoked, withdrawn or has expired (remembered for 10 minutes), so a
                delayed duplicate cannot take a card again.
            LeaseStoreError: the arbiter cannot be asked, or the id is known with another body.
        """

    def renew(self, ids: Sequence[str]) -> Mapping[str, bool]:
        """Restart the ttl of each lease from now; False for one that is gone for good."""

    def release(self, ids: Iterable[str]) -> None:
        """
        Give back, and hint to the next in line.  Idempotent.

        An id that is unknown, lost or still a ticket is remembered as gone: a claim of it that is under way, or
        arrives late, is not granted afterwards.
        """

    def withdraw(self, ids: Iterable[str]) -> None:
        """Leave the queue; the same as `release` for an id that was granted in the meantime."""

    def revoke(self, key: str, token: int, by: str) -> bool:
        """
        Take the lease with this fencing token away from whoever holds the card; False if there is no such lease.

        Its holder is told: `why_gone` says *by* whom, `renew` answers False.  Nobody is granted the card before the
        holder lets go of it, or the kernel or the ttl ends the lease; then it is closed, as after an expiry.
        """

    def why_gone(self, lease_id: str) -> str | None:
        """
        Why a lease of this process does not hold any more though it was not released; None: as far as is known it does.

        Never asks over a network; at most it looks at what is open already, so that it can be asked at any time.
        """

    def closed(self) -> Mapping[str, float]:
        """
        The cards that are closed after an expiry or a revocation, as far as is known here; mostly none.

        With each `clock.boottime` of that end, or of when it was heard of.
        """

    def listen(self, timeout: float) -> None:
        """
        Wait up to *timeout* seconds for hints and pass them on.

        Called by one thread per arbiter and process, and only if `needs_listener`; where a store has `is_listening` and
        `end_listening` too, also by a waiter itself (`waiting.OwnEars`).
        """

    def subscribe(self, hint: Hint) -> Callable[[], None]:
        """
        Register *hint*; returns the call that removes it again.

        A hint says that a ticket may have become servable; never a promise.
        """

    def crowded(self) -> bool:
        """
        Whether somebody waited at this arbiter a moment ago, as far as is known here; False if that is not known.

        A claim without a ticket is most likely refused there, so whoever can wait leaves one at once. Never does I/O.
        """

    def is_held(self, key: str) -> bool:
        """
        Whether anybody holds the card or a share of it, as far as is known here.

        Never asks over a network; at most it looks at local files.
        """

    def holders_of(self, key: str) -> Sequence[LeaseInfo]:
        """
        Who holds the card, as far as is known here; empty if nobody. No network, as in `is_held`.

        For ranking and for explanations; only `claim` decides.
        """

    def released_at(self, key: str) -> float | None:
        """`clock.boottime` of the card's last release, as far as is known here; None if never. No network either."""

    def descriptors(self, lease_id: str) -> Sequence[int]:
        """File descriptors that keep the lease as long as any process has them open; a child may inherit them."""

    def leases(self) -> Sequence[LeaseInfo]:
        """Every lease that the arbiter knows."""

    def queue(self) -> Sequence[TicketInfo]:
        """Every ticket, in the order of service."""

    def forget_after_fork(self) -> None:
        """In a forked child: new locks, and the parent's leases are not ours (nor released)."""

    def close(self) -> None:
        """Let go of files and connections.  Leases stay; release them first."""
