"""Whom to ask, in which order: the decisions of the pool that no lock, clock or network is needed for.

The pool and ``benchmarks/simulate.py`` call the same functions, so what the simulation finds holds for the pool.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from gpupool_sync.models import EndpointView, GPURequest

#: With more endpoints than these a process watches a subset, where no other number was set.
MOST_WATCHED = 500
#: The size of that subset: 20,000 processes then poll each of 2000 endpoints 64 times a second.
SUBSET = 32
#: Seconds over which it is counted what others take.
RIVALS_TIME = 10.0
#: Arbiters at which a waiter leaves tickets at once; more follow while it stands at the head of a queue. With fewer the
#: wait for one of few arbiters is longer than that of a central queue, with more the servers get more requests.
FIRST_TICKETS = 12
#: Refusals after which a caller waits instead of trying what else seemed free.
MOST_REFUSALS = 3
#: Arbiters that a waiter asks in one round at most, besides those that hinted or seem to have free cards; more where
#: nobody else waits.
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

    Ordered anew after a refusal: strategies learn from it (a crowd is at the best endpoint).  After `MOST_REFUSALS` the
    readings have proved to be out of date, and it is better to wait with tickets, and for newer readings.
    """
    left = list(seen)
    for _ in range(MOST_REFUSALS):
        order = ordered(left, request, strategy, chance)
        if not order:
            return
        granted = yield order[0]
        strategy.feedback(order[0].view.endpoint_id, granted)
        if granted:
            return
        left.remove(order[0])


def promising(order: Iterable[_C], waited: float, arbiter: Callable[[_C], Hashable]) -> dict[Hashable, float]:
    """
    The arbiters of the *order* of endpoints that are worth a claim to somebody who has waited so many seconds already.

    With the age of the newest reading, in seconds.  Older readings were there at the first try, which was in vain.
    """
    found: dict[Hashable, float] = {}
    for each in order:
        if each.view.age < waited:
            of = arbiter(each)
            found[of] = min(each.view.age, found.get(of, math.inf))
    return found


class Rivals:
    """
    How many cards others take per second, as far as the readings tell: a sum that fades.

    `took` is called by one thread at a time.
    """

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen = 0.0, -math.inf  # the sum, and when it was right; replaced as a whole, so any thread may read it

    def took(self, cards: int, now: float) -> None:
        """Readings showed at *now* (seconds by any clock) that somebody else has taken so many cards."""
        self._seen = self._left(now) + cards, now

    def per_second(self, now: float) -> float:
        """The rate, over some `RIVALS_TIME` seconds."""
        return self._left(now) / RIVALS_TIME

    def _left(self, now: float) -> float:
        number, at = self._seen
        return number * math.exp(min(0.0, at - now) / RIVALS_TIME) if number else 0.0


class Tickets:
    """
    At which of several arbiters one waiter asks, round by round.

    A ticket everywhere would make one queue of all of them, and cost as many requests a second as there are
    arbiters, of every waiter.  So a waiter begins with a few, and leaves more only while it is at the head of a
    queue: while all its arbiters have somebody older waiting no card lies idle for want of its ticket, and who has
    waited longest has tickets almost everywhere.  One that finds nobody before it at any of them is most likely the
    only one that waits, and asks the rest without a pause: the free card may be anywhere, and few do the same.

    Not thread-safe: it belongs to one waiting call.
    """

    __slots__ = ("_answers", "_more", "_positions", "_times", "reserving")

    def __init__(self) -> None:
        self._times: dict[Hashable, float] = {}  # arbiter -> when it was asked last; the earliest first
        self._answers: dict[Hashable, float] = {}  # arbiter -> when it was asked last and answered
        self._positions: dict[Hashable, int] = {}  # arbiter -> how many stood before us there
        self._more = False  # there are arbiters without a ticket of ours
        #: The one arbiter at which a ticket for several cards may hold free ones back.
        self.reserving: Hashable = None

    def __len__(self) -> int:
        return len(self._times)

    @property
    def position(self) -> int | None:
        """How many stand before us where they are fewest; None: there is no ticket."""
        return min(self._positions.values(), default=None)

    def round(
        self,
        arbiters: Sequence[Hashable],
        promising: Mapping[Hashable, float],
        hinted: Iterable[Hashable],
        now: float,
    ) -> list[Hashable]:
        """
        The arbiters to ask now.

        Args:
            arbiters: all that have cards which would do, those to be preferred first.
            promising: those of them that seem to have free cards, in the order of the strategy, with the age of the
                newest reading that says so, in seconds.
            hinted: those that said that it may be our turn, and those that cost nothing to ask.
            now: any clock that only goes forward, in seconds.
        """
        known = set(arbiters)
        plan = dict.fromkeys(each for each in hinted if each in known)
        # Where we were refused since the reading there is nothing new: the free card is kept for somebody.
        news = [each for each, age in promising.items() if now - age > self._answers.get(each, -math.inf)]
        plan.update(dict.fromkeys(news[:TRIES_PER_ROUND]))
        new = [each for each in arbiters if each not in self._times and each not in plan]
        if self._first_everywhere:
            wanted = max(TICKETS_PER_ROUND, len(self._times))
        else:
            wanted = TICKETS_PER_ROUND if self.position == 0 else FIRST_TICKETS - len(self._times)
        plan.update(dict.fromkeys(new[: max(0, wanted)]))
        self._more = len(new) > max(0, wanted)
        mine = [each for each in self._times if each in known and each not in plan]
        due = [each for each in mine if now - self._times[each] >= REASK][:TICKETS_PER_ROUND]
        if not plan and not due:
            due = mine[:1]  # who stands before us there, by now
        plan.update(dict.fromkeys(due))
        if self.reserving not in known:
            self.reserving = next(iter(plan), None)
        return list(plan)

    def pause(self) -> float:
        """Seconds until the next round is due, if nothing happens before."""
        if not self._more or self.position != 0:
            return math.inf
        return 0.0 if self._first_everywhere else WIDEN_EVERY

    @property
    def _first_everywhere(self) -> bool:
        """Whether nobody stands before us at any arbiter that we asked, as far as is known."""
        return bool(self._positions) and not any(self._positions.values())

    def left(self, arbiter: Hashable, position: int | None, now: float, *, answered: bool = True) -> None:
        """It was asked, and a ticket was left, or not (*position* None): how many stand before it."""
        self._times.pop(arbiter, None)
        self._times[arbiter] = now
        if answered:
            self._answers[arbiter] = now
        if position is None:
            self._positions.pop(arbiter, None)
        else:
            self._positions[arbiter] = position


_ID = TypeVar("_ID", bound=Hashable)


def watch_most(setting: int | None, endpoints: int) -> int:
    """How many of so many endpoints a process watches."""
    if setting is not None:
        return setting
    return endpoints if endpoints <= MOST_WATCHED else SUBSET


class Watched(Generic[_ID]):
    """
    Which of many endpoints a process polls: all, or a random subset that stays the same while it does.

    Without it the requests that a server gets grow with the number of processes.  When a whole subset refuses, it is
    widened: to twice its size, and from then on by exchanging one half, so that every endpoint has its turn.

    Not thread-safe: used under its owner's lock.

    Args:
        always: those among *ids* that are watched whatever their number.
    """

    def __init__(self, ids: Iterable[_ID], most: int, chance: random.Random, always: Iterable[_ID] = ()) -> None:
        self.most = most
        self._chance = chance
        self._always = set(always)
        away = list(ids)
        if len(away) > most:
            chance.shuffle(away)
            away.sort(key=lambda each: each not in self._always)  # stable: the rest stays shuffled
        number = max(most, len(self._always.intersection(away)))
        self._here: dict[_ID, None] = dict.fromkeys(away[:number])  # who came first is first
        self._away: deque[_ID] = deque(away[number:])  # whose turn is next is first

    def __len__(self) -> int:
        return len(self._here)

    def __iter__(self) -> Iterator[_ID]:
        return iter(self._here)

    def __contains__(self, endpoint_id: object) -> bool:
        return endpoint_id in self._here

    @property
    def complete(self) -> bool:
        """Whether there is nobody else."""
        return not self._away

    def widen(self, *, everywhere: bool = False) -> tuple[list[_ID], list[_ID]]:
        """
        Watch more: who is new, and who is not watched any more.

        With *everywhere* twice as many as now, whatever their number, and nobody leaves: for what is found nowhere yet.
        """
        number = max(1, len(self._here)) if everywhere else self.most
        come = [self._away.popleft() for _ in range(min(number, len(self._away)))]
        self._here.update(dict.fromkeys(come))
        return come, [] if everywhere else self._leave(2 * self.most)

    def want(self, ids: Iterable[_ID]) -> list[_ID]:
        """Watch these, if they are endpoints at all; who is new."""
        wanted = set(ids)
        come = [each for each in self._away if each in wanted]
        for endpoint_id in come:
            self._away.remove(endpoint_id)
        self._here.update(dict.fromkeys(come))
        return come

    def narrow(self, keep: _ID | None = None) -> list[_ID]:
        """Back to the size that was asked for, with *keep*: those who leave, the earliest first."""
        if keep in self._here:
            del self._here[keep]
            self._here[keep] = None
        return self._leave(self.most)

    def _leave(self, most: int) -> list[_ID]:
        surplus = max(0, len(self._here) - most)
        leave = [each for each in self._here if each not in self._always][:surplus]
        for endpoint_id in leave:
            del self._here[endpoint_id]
        self._away.extend(leave)
        return leave

    def replace(self, endpoint_id: _ID) -> _ID | None:
        """Watch another one instead of one that is down; None: there is none, or it was not watched."""
        if endpoint_id not in self._here or endpoint_id in self._always or not self._away:
            return None
        del self._here[endpoint_id]
        new = self._away.popleft()
        self._away.append(endpoint_id)
        self._here[new] = None
        return new

    def add(self, endpoint_id: _ID, *, always: bool = False) -> bool:
        """Another endpoint is there; whether it is watched from now on."""
        if always:
            self._always.add(endpoint_id)
        if always or len(self._here) < self.most:
            self._here[endpoint_id] = None
            return True
        # Not always the last: its turn comes at some time.
        self._away.insert(self._chance.randrange(len(self._away) + 1), endpoint_id)
        return False

    def remove(self, endpoint_id: _ID) -> list[_ID]:
        """An endpoint is not there any more; who is watched instead, if it was."""
        self._always.discard(endpoint_id)
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
