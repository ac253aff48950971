"""Whom to ask, in which order: the decisions of the pool that no lock, clock or network is needed for.

The pool and ``benchmarks/simulate.py`` call the same functions, so what the simulation finds holds for the pool.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from gpupool_sync.models import EndpointView, GPURequest

#: Seconds over which it is counted what others take.
RIVALS_TIME = 10.0
#: Arbiters at which a waiter leaves tickets at once; more follow while it stands at the head of a queue.
FIRST_TICKETS = 4
#: Arbiters that a waiter asks in one round at most, besides those that hinted or seem to have free cards.
TICKETS_PER_ROUND = 8
#: Arbiters with cards that seem free, and that a waiter asks in one round at most.
TRIES_PER_ROUND = 8
#: Seconds between two rounds while there may be arbiters where nobody waits.
WIDEN_EVERY = 0.25
#: Seconds after which a ticket is left anew, where the arbiter is one of several: cards may have come or gone.
REASK = 10.0


class Candidate(Protocol):
    """One endpoint that may grant, seen through one request."""

    @property
    def view(self) -> EndpointView:
        """What the strategy sees of it."""

    @property
    def free(self) -> Sequence[Any]:
        """Its cards that would do and are not leased, as far as is known."""

    @property
    def share(self) -> float:
        """The share of its decisions that it gets: below 1 for a while after a recovery, 0 if its last poll failed."""


class Ranking(Protocol):
    """What is needed of a strategy here."""

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        """As in `strategies.Strategy`."""

    def feedback(self, endpoint_id: str, granted: bool) -> None:
        """As in `strategies.Strategy`."""


_C = TypeVar("_C", bound=Candidate)


def ready(seen: Iterable[_C], request: GPURequest) -> list[_C]:
    """Those that have enough free cards."""
    count = request.count
    return [each for each in seen if len(each.free) >= count]


def ordered(seen: Sequence[_C], request: GPURequest, strategy: Ranking, chance: Callable[[], float]) -> list[_C]:
    """
    Those that have enough free cards, as they shall be asked.

    One whose last poll failed comes last; one that has just recovered is among the first with a growing probability,
    so that not everybody turns to it at once.
    """
    able = ready(seen, request)
    if not able:
        return able
    first = able
    later: list[_C] = []
    if len(able) > 1 and any(each.share < 1.0 for each in able):
        first = []
        for each in able:
            (first if each.share >= 1.0 or chance() < each.share else later).append(each)
        if not first:
            first, later = later, []
    order = strategy.order([each.view for each in first], request)
    if len(first) > 1:
        by_id = {each.view.endpoint_id: each for each in first}
        first = [by_id[view.endpoint_id] for view in order]
    return first + later


def attempts(
    seen: Sequence[_C], request: GPURequest, strategy: Ranking, chance: Callable[[], float]
) -> Generator[_C, bool, None]:
    """
    Whom to claim at, one after the other; the generator is sent whether that claim was granted.

    Ordered anew after a refusal: strategies learn from it (a crowd is at the best endpoint).
    """
    left = list(seen)
    while True:
        order = ordered(left, request, strategy, chance)
        if not order:
            return
        granted = yield order[0]
        strategy.feedback(order[0].view.endpoint_id, granted)
        if granted:
            return
        left.remove(order[0])


class Rivals:
    """
    How many cards others take per second, as far as the readings tell: a sum that fades.

    Not thread-safe: used under its owner's lock.
    """

    __slots__ = ("_at", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = -math.inf  # when _sum was right

    def took(self, cards: int, now: float) -> None:
        """Readings showed at *now* (seconds by any clock) that somebody else has taken so many cards."""
        self._sum = self._left(now) + cards
        self._at = now

    def per_second(self, now: float) -> float:
        """The rate, over some `RIVALS_TIME` seconds."""
        return self._left(now) / RIVALS_TIME

    def _left(self, now: float) -> float:
        return self._sum * math.exp(min(0.0, self._at - now) / RIVALS_TIME) if self._sum else 0.0


class Tickets:
    """
    At which of several arbiters one waiter asks, round by round.

    A ticket everywhere would make one queue of all of them, and cost as many requests a second as there are
    arbiters, of every waiter.  So a waiter begins with a few, and leaves more only while it is at the head of a
    queue: while all its arbiters have somebody older waiting no card lies idle for want of its ticket, and who has
    waited longest has tickets almost everywhere.

    Not thread-safe: it belongs to one waiting call.
    """

    __slots__ = ("_at_head", "_left")

    def __init__(self) -> None:
        self._left: dict[Hashable, float] = {}  # arbiter -> when the ticket there was left last; the oldest first
        self._at_head: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._left)

    def __contains__(self, arbiter: object) -> bool:
        return arbiter in self._left

    def round(
        self, arbiters: Sequence[Hashable], promising: Sequence[Hashable], hinted: Iterable[Hashable], now: float
    ) -> list[Hashable]:
        """
        The arbiters to ask now.

        Args:
            arbiters: all that have cards which would do, those to be preferred first.
            promising: those of them that seem to have free cards, in the order of the strategy.
            hinted: those that said that it may be our turn.
            now: any clock that only goes forward, in seconds.
        """
        known = set(arbiters)
        plan = dict.fromkeys(each for each in hinted if each in known)
        plan.update(dict.fromkeys(promising[:TRIES_PER_ROUND]))
        if len(arbiters) <= FIRST_TICKETS:
            plan.update(dict.fromkeys(arbiters))
            return list(plan)
        wanted = 0
        if len(self._left) < FIRST_TICKETS:
            wanted = FIRST_TICKETS - len(self._left)
        elif self._at_head:
            wanted = TICKETS_PER_ROUND
        for each in arbiters:
            if wanted <= 0:
                break
            if each not in self._left and each not in plan:
                plan[each] = None
                wanted -= 1
        due = [each for each, left in self._left.items() if now - left >= REASK and each in known and each not in plan]
        plan.update(dict.fromkeys(due[:TICKETS_PER_ROUND]))
        return list(plan)

    def pause(self) -> float:
        """Seconds until the next round is due, if nothing happens before."""
        return WIDEN_EVERY if self._at_head else math.inf

    def left(self, arbiter: Hashable, position: int | None, now: float) -> None:
        """A ticket was left, or not (*position* None): how many stand before it."""
        self._left.pop(arbiter, None)
        self._left[arbiter] = now
        if position == 0:
            self._at_head.add(arbiter)
        else:
            self._at_head.discard(arbiter)


_ID = TypeVar("_ID", bound=Hashable)


class Watched(Generic[_ID]):
    """
    Which of many endpoints a process polls: all, or a random subset that stays the same while it does.

    Without it the requests that a server gets grow with the number of processes.  When a whole subset refuses, it is
    widened: to twice its size, and from then on by exchanging one half, so that every endpoint has its turn.

    Not thread-safe: used under its owner's lock.
    """

    def __init__(self, ids: Iterable[_ID], most: int, chance: random.Random) -> None:
        self.most = most
        away = list(ids)
        if len(away) > most:
            chance.shuffle(away)
        self._here: dict[_ID, None] = dict.fromkeys(away[:most])  # who came first is first
        self._away: deque[_ID] = deque(away[most:])  # whose turn is next is first
        self._chance = chance

    def __len__(self) -> int:
        return len(self._here)

    def __iter__(self) -> Iterator[_ID]:
        return iter(self._here)

    def __contains__(self, endpoint_id: object) -> bool:
        return endpoint_id in self._here

    def widen(self, *, everywhere: bool = False) -> tuple[list[_ID], list[_ID]]:
        """
        Watch more: who is new, and who is not watched any more.

        With *everywhere* twice as many as now, whatever their number, and nobody leaves: for what is found nowhere yet.
        """
        number = len(self._here) if everywhere else self.most
        come = [self._away.popleft() for _ in range(min(number, len(self._away)))]
        self._here.update(dict.fromkeys(come))
        return come, [] if everywhere else self._leave(2 * self.most)

    def narrow(self) -> list[_ID]:
        """Back to the size that was asked for: those who leave, the earliest first."""
        return self._leave(self.most)

    def _leave(self, most: int) -> list[_ID]:
        leave = list(self._here)[: max(0, len(self._here) - most)]
        for endpoint_id in leave:
            del self._here[endpoint_id]
        self._away.extend(leave)
        return leave

    def replace(self, endpoint_id: _ID) -> _ID | None:
        """Watch another one instead of one that is down; None: there is none, or it was not watched."""
        if endpoint_id not in self._here or not self._away:
            return None
        del self._here[endpoint_id]
        self._away.append(endpoint_id)
        new = self._away.popleft()
        self._here[new] = None
        return new

    def add(self, endpoint_id: _ID) -> bool:
        """Another endpoint is there; whether it is watched from now on."""
        if len(self._here) < self.most:
            self._here[endpoint_id] = None
            return True
        # Not always the last: its turn comes at some time.
        self._away.insert(self._chance.randrange(len(self._away) + 1), endpoint_id)
        return False

    def remove(self, endpoint_id: _ID) -> list[_ID]:
        """An endpoint is not there any more; who is watched instead, if it was."""
        if endpoint_id not in self._here:
            with contextlib.suppress(ValueError):
                self._away.remove(endpoint_id)
            return []
        del self._here[endpoint_id]
        if len(self._here) >= self.most or not self._away:
            return []
        new = self._away.popleft()
        self._here[new] = None
        return [new]
