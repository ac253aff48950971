"""The queue of one arbiter: who is next for a card, as plain data without locks, threads or clocks.

A card goes to the oldest ready ticket that wants it.  A ticket that was hinted and has not spoken for `ANSWER_TIME` is
passed over until it speaks again, so a stopped or dead waiter delays the others by that second at most, once.
Nothing is ever *given* to a ticket: its owner has to claim.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from gpupool_sync.leases.base import Claim, Share, TicketInfo, Wanted

#: Seconds that a hinted waiter has to claim before the card goes to the next one.
ANSWER_TIME = 1.0
#: Seconds that re-asks may move a ticket forward, all told, so that a wrong `waited` cannot jump the queue for ever.
MAX_FORWARD = 60.0
#: Seconds after which a ticket for several cards that has not spoken holds nothing back any more.
RESERVE_TIME = 3 * ANSWER_TIME

#: Whether a card can serve a share (None: the whole card) beside its leases and beside the shares in the third
#: argument, which older tickets are about to take.
Fits = Callable[[Wanted, "Share | None", Sequence["Share | None"]], bool]


class Ticket:
    """One place in the queue; made and changed by `TicketQueue` only."""

    __slots__ = ("claim", "first_place", "hinted_at", "keys", "offered", "place", "seq", "spoke_at", "wanted")

    def __init__(self, claim: Claim, now: float, seq: int) -> None:
        self.seq = seq
        self.first_place = self.place = now - claim.waited
        self.hinted_at: float | None = None  # of the oldest hint that was not answered
        self.offered: str | None = None  # a card that the hint was about
        self.rewrite(claim, now)

    def rewrite(self, claim: Claim, now: float) -> None:
        self.claim = claim
        self.wanted = {wanted.key: wanted for group in claim.groups for wanted in group}
        self.keys = self.wanted.keys()
        self.spoke_at = now
        self.hinted_at = None

    @property
    def order(self) -> tuple[float, int]:
        return self.place, self.seq

    def ready(self, now: float) -> bool:
        """Whether it still counts: not hinted, or hinted so recently that its answer may be under way."""
        return self.hinted_at is None or now - self.hinted_at < ANSWER_TIME

    def __lt__(self, other: Ticket) -> bool:
        return self.order < other.order


class _Plan:
    """The cards that are free now, and what the tickets looked at so far would take of them."""

    def __init__(self, fits: Fits) -> None:
        self._fits = fits
        self._pending: dict[str, list[Share | None]] = {}

    def fits(self, wanted: Wanted, share: Share | None) -> bool:
        return self._fits(wanted, share, self._pending.get(wanted.key, ()))

    def take(self, keys: Iterable[str], share: Share | None) -> None:
        for key in keys:
            self._pending.setdefault(key, []).append(share)

    def pick(self, claim: Claim, among: Collection[str] | None = None) -> list[str] | None:
        """`count` cards of the first group that has them, in the claim's order of preference."""
        for group in claim.groups:
            found: list[str] = []
            for wanted in group:
                if (among is None or wanted.key in among) and self.fits(wanted, claim.share):
                    found.append(wanted.key)
                    if len(found) == claim.count:
                        return found
        return None

    def collect(self, claim: Claim) -> list[str]:
        """The fullest part of one group: what a ticket for several cards holds back while it waits for the rest."""
        parts = (
            [wanted.key for wanted in group if self.fits(wanted, claim.share)][: claim.count]
            for group in claim.groups
            if len(group) >= claim.count
        )
        return max(parts, key=len, default=[])


#: Fits wherever any share by memory does.
_LEAST = Share(memory_mb=1e-6)


def _least(share: Share) -> Share:
    """The smallest one that may stand beside *share*: there is room left as long as this one fits, not its equal."""
    return share if share.memory_mb is None else _LEAST


class TicketQueue:
    """
    Tickets in the order of service.

    Not thread-safe: the arbiter calls it under its own lock and passes the time in.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, Ticket] = {}
        self._order: list[Ticket] = []  # sorted by Ticket.order
        self._seq = 0
        #: Cards that came free while somebody waited and were not claimed since.
        self._loose: set[str] = set()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, claim_id: object) -> bool:
        return claim_id in self._tickets

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._order)

    def get(self, claim_id: str) -> Ticket | None:
        return self._tickets.get(claim_id)

    def put(self, claim: Claim, now: float) -> int:
        """Add or rewrite the ticket of *claim*; returns how many who want any of the same cards stand before it."""
        ticket = self._tickets.get(claim.id)
        if ticket is None:
            self._seq += 1
            ticket = Ticket(claim, now, self._seq)
            # The list first: a ticket that is only in the list is swept by `remove`, while one that is only in the
            # dict would be taken for queued. An interrupt can fall between any two statements.
            bisect.insort(self._order, ticket)
            self._tickets[claim.id] = ticket
        else:
            place = max(ticket.first_place - MAX_FORWARD, min(ticket.place, now - claim.waited))
            if place < ticket.place:
                self._order.remove(ticket)
                ticket.place = place
                bisect.insort(self._order, ticket)
            ticket.rewrite(claim, now)
        return self._position(ticket)

    def load(self, claim: Claim, place: float, hinted_at: float | None, spoke_at: float) -> Ticket:
        """Add a ticket as somebody else's book has it; the order of equal places is that of the calls."""
        self._seq += 1
        ticket = Ticket(claim, spoke_at, self._seq)
        ticket.first_place = ticket.place = place
        ticket.hinted_at = hinted_at
        bisect.insort(self._order, ticket)
        self._tickets[claim.id] = ticket
        return ticket

    def _position(self, ticket: Ticket) -> int:
        position = 0
        for other in self._order:
            if other is ticket:
                break
            if other.claim.groups is ticket.claim.groups or not other.keys.isdisjoint(ticket.keys):
                position += 1
        return position

    def remove(self, claim_id: str) -> bool:
        """Drop the ticket, if there is one."""
        ticket = self._tickets.get(claim_id)
        if ticket is None:
            stray = [t for t in self._order if t.claim.id == claim_id]
            for t in stray:
                self._order.remove(t)
            return bool(stray)
        if ticket in self._order:
            self._order.remove(ticket)
        self._tickets.pop(claim_id, None)
        if not self._order:
            self._loose.clear()
        return True

    def spoke(self, claim_id: str, now: float) -> None:
        """The ticket's owner was heard of: it is ready again."""
        ticket = self._tickets.get(claim_id)
        if ticket is not None:
            ticket.spoke_at = now
            ticket.hinted_at = None

    def choose(self, claim: Claim, now: float, fits: Fits) -> tuple[list[str] | None, list[str]]:
        """
        The cards that *claim* may take now without passing an older ready ticket, or None.

        Returns them with the ids of the older tickets that stand in the way and have not been hinted yet: whoever
        is held back for somebody makes sure that that somebody knows.
        """
        plan = _Plan(fits)
        if not self._order:
            return plan.pick(claim), []
        mine = {wanted.key for group in claim.groups for wanted in group if plan.fits(wanted, claim.share)}
        if len(mine) < claim.count:
            return None, []
        own = self._tickets.get(claim.id)
        place = own.order if own is not None else (now - claim.waited, self._seq + 1)
        self._loose |= mine
        hints = self._serve(plan, now, before=place, contested=mine)
        return plan.pick(claim, mine), hints

    def _serve(
        self, plan: _Plan, now: float, before: tuple[float, int] | None, contested: Collection[str]
    ) -> list[str]:
        """Let the ready tickets take, in order, what is free; returns those of them that must still be hinted."""
        hints: list[str] = []
        head_found = False  # only the first live ticket that cannot be served yet may hold cards back
        free = set(self._loose)
        for ticket in self._order:
            if not free or (before is not None and ticket.order >= before):
                break
            if not ticket.ready(now):
                continue
            claim = ticket.claim
            # A wish for several cards starves behind wishes for one, a wish for a whole card behind shares.
            greedy = claim.count > 1 or claim.share is None
            collects = not head_found and greedy and claim.reserve and now - ticket.spoke_at < RESERVE_TIME
            head_found = head_found or (collects and claim.count > 1)
            if ticket.keys.isdisjoint(free):
                continue
            # An older ticket with a choice takes what the present claim does not want, if it can.
            picked = plan.pick(claim, free - set(contested)) or plan.pick(claim, free)
            if picked is None and claim.count > 1:
                picked = plan.pick(claim)
            if picked is not None:
                if ticket.hinted_at is None:
                    hints.append(claim.id)
                    ticket.hinted_at = now
                    ticket.offered = picked[0]
            elif collects and claim.count > 1:
                picked = plan.collect(claim)
            elif collects:
                head_found = True
                # Only shares stand on these cards: one of them takes no more, and empties.
                picked = [wanted.key for group in claim.groups for wanted in group if wanted.key in free][:1]
            if picked:
                plan.take(picked, claim.share)
                free = {
                    key
                    for key in free
                    if key not in picked
                    or (claim.share is not None and plan.fits(ticket.wanted[key], _least(claim.share)))
                }
        return hints

    def hints(self, freed: Iterable[str], now: float, fits: Fits) -> list[str]:
        """The tickets to tell that one of *freed*, or what is still loose, may be theirs."""
        if not self._order:
            return []
        self._loose.update(freed)
        return self._serve(_Plan(fits), now, before=None, contested=())

    def taken(self, keys: Iterable[str]) -> None:
        """These cards were granted as a whole."""
        self._loose.difference_update(keys)

    def infos(self, now: float) -> list[TicketInfo]:
        return [
            TicketInfo(
                position=index,
                holder=ticket.claim.holder,
                cards=tuple(ticket.keys),
                count=ticket.claim.count,
                share=ticket.claim.share,
                waited=max(0.0, now - ticket.place),
                note=ticket.claim.note,
            )
            for index, ticket in enumerate(self._order)
        ]
