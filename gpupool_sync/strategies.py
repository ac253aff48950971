"""In which order the endpoints are asked: `availability`, `round_robin`, `weighted`, or the user's own.

A strategy ranks, it never decides who holds a card: the readings it sees are seconds old, and the arbiter may
refuse any of its choices.  So whatever a strategy does, the worst case is a slower answer, never a wrong one.

Strategies are called without locks, from many threads.  ``copy.copy`` of one, and pickling it, give a
strategy with the same settings, a lock of its own and no memory: what a forked or spawned process needs.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from gpupool_sync.errors import ConfigError
from gpupool_sync.models import EndpointView, GPURequest

logger = logging.getLogger(__name__)

#: Endpoints closer to the best than this share of free cards count as equally good.
NEAR_TIE = 0.05

#: How many endpoints that are out of sight a strategy remembers, besides those it sees.
REMEMBERED_ENDPOINTS = 1024

# Our own generator, not that of `random`: training scripts call random.seed(0), and a hundred of them would
# then make the same "random" choice.  Threads may share it: its random() is a single C call.
_shared_random = random.Random()  # noqa: S311 - spreads load, guards nothing
if hasattr(os, "register_at_fork"):
    # Forked workers would all inherit the same state, and choose alike.
    os.register_at_fork(after_in_child=_shared_random.seed)


def _generator(seed: int | None) -> random.Random:
    return _shared_random if seed is None else random.Random(seed)  # noqa: S311 - as above


class Strategy(Protocol):
    """
    Ranks the endpoints for one request.

    Called without any lock held, perhaps from many threads at once, so it must guard what it keeps between
    calls.

    One that also has ``ideal_shares(endpoints)``, which maps the ids of *endpoints* to the shares of grants that it
    wants them to have (any numbers of at least 0, only their proportion counts), has its `effectiveness` told in
    `pool.stats()`.
    """

    @property
    def name(self) -> str:
        """What settings, statistics and logs call it."""

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        """
        Return *endpoints* in the order in which they shall be asked.

        The pool passes healthy endpoints only, each with at least one card that would do.
        """

    def feedback(self, endpoint_id: str, granted: bool) -> None:
        """Hear whether the endpoint's arbiter granted a claim or refused it."""


class CountingStrategy:
    """What the built-in strategies have in common: they count what they chose and what came of it."""

    name = "?"

    def __init__(self) -> None:
        # Guards all that follows here, and the state of the subclasses.  Innermost lock: held for arithmetic
        # and dictionary work only, never while calling what the user gave us.
        self._lock = threading.Lock()
        #: By endpoint: first choices, grants, refusals.
        self._counts: dict[str, list[int]] = {}
        self._in_sight: Sequence[EndpointView] = ()  # those of the latest decision
        self._decisions = 0
        self._grants = 0
        self._refusals = 0

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        """Return *endpoints*, the one to ask first at the front."""
        raise NotImplementedError

    def ideal_shares(self, endpoints: Sequence[EndpointView]) -> Mapping[str, float] | None:
        """
        The shares of grants that *endpoints*, one or more, should have, which sum up to 1; None: not defined.

        What the grants are measured by, over many of them; a single one goes where `order` says.
        """
        return None

    @property
    def has_ideal(self) -> bool:
        """Whether `ideal_shares` says anything."""
        return type(self).ideal_shares is not CountingStrategy.ideal_shares

    def feedback(self, endpoint_id: str, granted: bool) -> None:
        """Count what the arbiter said."""
        with self._lock:
            self._count_feedback_locked(endpoint_id, granted)

    def decisions(self) -> dict[str, int]:
        """How often each endpoint was the first choice."""
        with self._lock:
            return {endpoint_id: count[0] for endpoint_id, count in self._counts.items() if count[0]}

    def stats(self) -> dict[str, Any]:
        """What was decided and what came of it: totals, and the same by endpoint."""
        with self._lock:
            return {
                "strategy": self.name,
                "decisions": self._decisions,
                "grants": self._grants,
                "refusals": self._refusals,
                "endpoints": {
                    endpoint_id: {"decisions": count[0], "grants": count[1], "refusals": count[2]}
                    for endpoint_id, count in self._counts.items()
                },
            }

    def _count_decision_locked(self, ordered: Sequence[EndpointView]) -> None:
        self._decisions += 1
        self._in_sight = ordered
        self._count_of_locked(ordered[0].endpoint_id)[0] += 1

    def _count_feedback_locked(self, endpoint_id: str, granted: bool) -> None:
        if granted:
            self._grants += 1
        else:
            self._refusals += 1
        self._count_of_locked(endpoint_id)[1 if granted else 2] += 1

    def _count_of_locked(self, endpoint_id: str) -> list[int]:
        count = self._counts.get(endpoint_id)
        if count is None:
            _forget_oldest(self._counts, self._in_sight)
            count = self._counts[endpoint_id] = [0, 0, 0]
        return count

    def _settings(self) -> tuple[Any, ...]:
        return ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), self._settings())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._settings()))})"


def _proportional(endpoints: Sequence[EndpointView], weights: Sequence[float]) -> dict[str, float]:
    """Shares in proportion to *weights*; equal ones where nothing weighs anything."""
    whole = sum(weights)
    if not whole > 0:
        return {view.endpoint_id: 1.0 / len(endpoints) for view in endpoints}
    return {view.endpoint_id: weight / whole for view, weight in zip(endpoints, weights, strict=True)}


def _forget_oldest(memory: dict[str, Any], endpoints: Sequence[EndpointView]) -> None:
    """Drop what is known of endpoints that are not in sight, oldest first, until *memory* is small again."""
    surplus = len(memory) - len(endpoints) - REMEMBERED_ENDPOINTS
    if surplus <= 0:
        return
    in_sight = {view.endpoint_id for view in endpoints}
    # More than the surplus, so that a stream of new names does not come here each time.
    away = (name for name in memory if name not in in_sight)
    for name in list(islice(away, surplus + REMEMBERED_ENDPOINTS // 2)):
        del memory[name]


class Availability(CountingStrategy):
    """
    The endpoint with the largest free share of its cards first; in a crowd, a draw by the number of free
    cards, the fresh readings before the old ones.

    Shares within 5 percentage points of the best count as equal; then the larger number of free cards goes
    first, then chance decides.

    Every pool sees about the same seconds-old readings, so "best first" sends all of them to one server.  There
    are two signs of a crowd.  Readings show how many cards others have taken lately: if those who did so since
    the reading of the best endpoint may have emptied half of it, this one draws.  And a refusal: from then on it
    draws, until `CALM` claims in a row were granted; if going back to best first is soon refused, the crowd is
    still there, and each time that happens it draws twice as long.  Grants are counted, not seconds: who runs
    jobs of ten minutes asks six times an hour, and evidence that ages by the clock would be gone by the next
    request.  Who is alone sees neither sign and always gets the best.

    In a crowd a card that is seen free is soon gone, so a fresh reading is worth more than many free cards: each
    `FADING` seconds of age divide an endpoint's chance by e.  Pools poll at moments of their own, so each of
    them has others that are fresh.

    `spread=False` always takes the highest share first.  With a `seed` the choices repeat.
    """

    name = "availability"

    #: Grants in a row after which the crowd is taken to be gone; doubled while it comes back, up to
    #: LONGEST_CALM.
    CALM = 8
    LONGEST_CALM = 256
    #: In a crowd a reading that is so many seconds older counts for 1/e of a fresh one.
    FADING = 0.25

    def __init__(self, spread: bool = True, seed: int | None = None) -> None:
        super().__init__()
        self._spread = spread
        self._seed = seed
        self._random = _generator(seed)
        # Guarded by _lock, as the counts are.
        self._patience = self.CALM
        self._draws_left = 0  # grants still to come until best first is tried again; 0: best first
        self._best_first_grants = 0  # in a row, since the last crowd

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        """Return *endpoints* best first, or, in a crowd, drawn in proportion to their free cards."""
        if not endpoints:
            return endpoints
        if len(endpoints) == 1:
            ordered = list(endpoints)
        else:
            # One read of an int; a feedback at this very moment may count or not.
            ordered = [] if self._draws_left else self._best_first(endpoints)
            if not ordered or (self._spread and self._soon_taken(ordered[0])):
                ordered = self._draw(endpoints)
        with self._lock:
            self._count_decision_locked(ordered)
        return ordered

    def feedback(self, endpoint_id: str, granted: bool) -> None:
        """A refusal is evidence of a crowd; many grants in a row are evidence of calm."""
        with self._lock:
            self._count_feedback_locked(endpoint_id, granted)
            if not self._spread:
                return
            if not granted:
                if not self._draws_left:
                    soon = self._best_first_grants < self._patience and self._refusals > 1
                    self._patience = min(2 * self._patience, self.LONGEST_CALM) if soon else self.CALM
                    self._best_first_grants = 0
                self._draws_left = self._patience
            elif self._draws_left:
                self._draws_left -= 1
            else:
                self._best_first_grants += 1

    def ideal_shares(self, endpoints: Sequence[EndpointView]) -> Mapping[str, float] | None:
        """In proportion to the GPUs that are free at this moment."""
        return _proportional(endpoints, [max(view.free_gpus, 0) for view in endpoints])

    def stats(self) -> dict[str, Any]:
        """As of every strategy; also `crowded`: whether it draws at present."""
        stats = super().stats()
        stats["crowded"] = self._draws_left > 0
        return stats

    def _best_first(self, endpoints: Sequence[EndpointView]) -> list[EndpointView]:
        tie = NEAR_TIE if self._spread else 0.0
        chance = self._random.random
        shares = [view.free_gpus / view.total_gpus if view.total_gpus > 0 else 0.0 for view in endpoints]
        indices = sorted(range(len(shares)), key=shares.__getitem__, reverse=True)
        # The whole part ranks by count, the fraction by chance.
        ranks = [view.free_gpus + chance() for view in endpoints]
        ordered: list[int] = []
        start, count = 0, len(indices)
        while start < count:
            bound = shares[indices[start]] - tie - 1e-9
            end = start + 1
            while end < count and shares[indices[end]] >= bound:
                end += 1
            if end - start == 1:
                ordered.append(indices[start])
            else:
                ordered.extend(sorted(indices[start:end], key=ranks.__getitem__, reverse=True))
            start = end
        return [endpoints[index] for index in ordered]

    @staticmethod
    def _soon_taken(best: EndpointView) -> bool:
        # If all who took something since its reading took it there, more than half of what it showed is gone.
        return best.rivals_per_second * best.age > 0.5 * best.free_gpus

    def _draw(self, endpoints: Sequence[EndpointView]) -> list[EndpointView]:
        # A weighted random permutation (Efraimidis and Spirakis): by exponential variates whose rates are the
        # weights, here their logarithms.  1 - chance() is never 0.  What has nothing free comes last, in random order.
        chance, log, fading = self._random.random, math.log, self.FADING
        keys = [
            log(-log(1.0 - chance()) / view.free_gpus) + view.age / fading if view.free_gpus > 0 else 1e9 + chance()
            for view in endpoints
        ]
        return [endpoints[index] for index in sorted(range(len(keys)), key=keys.__getitem__)]

    def _settings(self) -> tuple[Any, ...]:
        return (self._spread, self._seed)


class RoundRobin(CountingStrategy):
    """
    Every endpoint in turn: whichever was the first choice longest ago is the first choice now.

    The turn is taken when the order is asked for, so threads that ask at the same moment get different
    endpoints. An endpoint that was away is next when it comes back, once: it does not catch up.  Those never
    chosen yet go first, in random order, so that a hundred scripts started together do not all begin at the
    same one.
    """

    name = "round_robin"

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._seed = seed
        self._random = _generator(seed)
        # Guarded by _lock, as the counts are.
        self._turn = 0
        # By endpoint: the turn at which it was last the first choice; at random from 0 to -1 if it never was.
        self._chosen: dict[str, float] = {}

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        """Return *endpoints*, the least recently chosen first."""
        if not endpoints:
            return endpoints
        with self._lock:
            chosen = self._chosen
            try:
                keys = [chosen[view.endpoint_id] for view in endpoints]
            except KeyError:
                for view in endpoints:
                    if view.endpoint_id not in chosen:
                        chosen[view.endpoint_id] = -self._random.random()
                _forget_oldest(chosen, endpoints)
                keys = [chosen[view.endpoint_id] for view in endpoints]
            ordered = [endpoints[index] for index in sorted(range(len(keys)), key=keys.__getitem__)]
            self._turn += 1
            chosen[ordered[0].endpoint_id] = self._turn
            self._count_decision_locked(ordered)
        return ordered

    def ideal_shares(self, endpoints: Sequence[EndpointView]) -> Mapping[str, float] | None:
        """Equal among those that can grant."""
        return _proportional(endpoints, [1] * len(endpoints))

    def _settings(self) -> tuple[Any, ...]:
        return (self._seed,)


class Weighted(CountingStrategy):
    """
    In proportion to total GPUs, as evenly spaced as can be: smooth weighted round robin, as in nginx.

    Each decision owes every endpoint in sight its share of one decision; the one that is owed most gets it,
    the others follow by what they are owed.  Nothing is added for an endpoint while it is away, and never
    more than `MOST_OWED` in all, so neither its coming back nor another's leaving causes a burst.  The very
    first decision is drawn in proportion, so that a hundred scripts started together do not all begin at the
    largest endpoint.
    """

    name = "weighted"

    #: In a set that does not change nothing comes near it (about 1); it bounds what changes can pile up.
    MOST_OWED = 1.5

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._seed = seed
        self._random = _generator(seed)
        # By endpoint: decisions owed to it.  Guarded by _lock.  In decisions, not in weights as nginx has it,
        # so that it means the same after the set has changed.
        self._owed: dict[str, float] = {}

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        """Return *endpoints*, the one that is owed most first."""
        if not endpoints:
            return endpoints
        weights = [max(view.total_gpus, 0) for view in endpoints]
        total = sum(weights)
        if not total:
            weights, total = [1] * len(weights), len(weights)
        most = self.MOST_OWED
        with self._lock:
            owed = self._owed
            known = owed.get
            now = [
                min(known(view.endpoint_id, 0.0) + weight / total, most)
                for view, weight in zip(endpoints, weights, strict=True)
            ]
            indices = sorted(range(len(now)), key=now.__getitem__, reverse=True)
            if not self._decisions:
                first = self._random.choices(indices, [weights[index] for index in indices])[0]
                indices.remove(first)
                indices.insert(0, first)
            now[indices[0]] = max(now[indices[0]] - 1.0, -most)
            owed.update(zip([view.endpoint_id for view in endpoints], now, strict=True))
            _forget_oldest(owed, endpoints)
            ordered = [endpoints[index] for index in indices]
            self._count_decision_locked(ordered)
        return ordered

    def ideal_shares(self, endpoints: Sequence[EndpointView]) -> Mapping[str, float] | None:
        """In proportion to all GPUs of those that can grant."""
        return _proportional(endpoints, [max(view.total_gpus, 0) for view in endpoints])

    def _settings(self) -> tuple[Any, ...]:
        return (self._seed,)


class UserStrategy(CountingStrategy):
    """
    A strategy of the user's, guarded: whatever it returns or raises, each endpoint is asked exactly once.

    Endpoints that it does not return are asked last, in the given order.  If it raises, the given order
    stands. The first fault of each kind is logged; the strategy goes on being asked.
    """

    def __init__(
        self,
        order: Callable[[Sequence[EndpointView], GPURequest], Iterable[EndpointView]],
        feedback: Callable[[str, bool], object] | None,
        name: str,
        spec: object,
        ideal: Callable[[Sequence[EndpointView]], Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self._order = order
        self._feedback = feedback
        self._ideal = ideal
        self._spec = spec
        # Kinds of faults that were logged.  A race logs twice at worst.
        self._logged: set[str] = set()

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        """Ask the user's strategy and make its answer a permutation of *endpoints*."""
        if not endpoints:
            return endpoints
        given = tuple(endpoints)  # what is handed out may be sorted in place, or emptied
        try:
            # The bound is for generators without end.
            answer = list(islice(self._order(list(given), request), 2 * len(given) + 16))
        except Exception:
            self._log_once("raise", "strategy %s failed; the endpoints are asked in their given order", exc=True)
            answer = list(given)
        missing = {view.endpoint_id: view for view in given}
        ordered: list[EndpointView] = []
        for item in answer:
            view = missing.pop(item.endpoint_id, None) if isinstance(item, EndpointView) else None
            if view is None:
                self._log_once("odd", "strategy %s returned an endpoint twice, or something else; it is left out")
            else:
                ordered.append(view)
        ordered.extend(missing.values())
        with self._lock:
            self._count_decision_locked(ordered)
        return ordered

    @property
    def has_ideal(self) -> bool:
        """Whether the user's strategy defines them."""
        return self._ideal is not None

    def ideal_shares(self, endpoints: Sequence[EndpointView]) -> Mapping[str, float] | None:
        """Ask the user's strategy, if it defines them, and make its answer shares that sum up to 1."""
        if self._ideal is None:
            return None
        try:
            answer = self._ideal(list(endpoints))
            weights = [float(answer.get(view.endpoint_id, 0.0)) for view in endpoints]
        except Exception:
            self._log_once("ideal", "strategy %s failed on ideal_shares, its effectiveness is not told", exc=True)
            return None
        if not all(0.0 <= weight < math.inf for weight in weights) or not 0.0 < sum(weights) < math.inf:
            self._log_once("odd ideal", "strategy %s gave ideal_shares that are no shares; they are left out")
            return None
        return _proportional(endpoints, weights)

    def feedback(self, endpoint_id: str, granted: bool) -> None:
        """Count it and pass it on, if the user's strategy wants to hear."""
        super().feedback(endpoint_id, granted)
        if self._feedback is not None:
            try:
                self._feedback(endpoint_id, granted)
            except Exception:
                self._log_once("feedback", "strategy %s failed on feedback, which is ignored", exc=True)

    def _log_once(self, kind: str, message: str, exc: bool = False) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning(message, self.name, exc_info=exc)

    def __reduce__(self) -> tuple[Any, ...]:
        return (make_strategy, (self._spec,))

    def __repr__(self) -> str:
        return f"UserStrategy({self._spec!r})"


#: The strategies that settings can name.
STRATEGIES: dict[str, Callable[..., CountingStrategy]] = {
    Availability.name: Availability,
    RoundRobin.name: RoundRobin,
    Weighted.name: Weighted,
}


def make_strategy(spec: object, options: Mapping[str, Any] | None = None) -> CountingStrategy:
    """
    Make the strategy that *spec* means.

    Args:
        options: keyword arguments of a built-in strategy that *spec* names, as `config` has checked them.
        spec: the name of a built-in strategy ('-' and case do not matter); an object with a method `order`,
            and `feedback`, `ideal_shares` and `name` if it likes; or a function that does what `order` does.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(spec, CountingStrategy):
        return spec
    if isinstance(spec, str):
        factory = STRATEGIES.get(spec.strip().casefold().replace("-", "_"))
        if factory is not None:
            return factory(**(options or {}))
    elif isinstance(spec, type):
        raise ConfigError(f"strategy={spec.__name__}: this is a class; pass an object, such as {spec.__name__}()")
    elif callable(order := getattr(spec, "order", None)):
        feedback = getattr(spec, "feedback", None)
        name = getattr(spec, "name", None)
        if not isinstance(name, str) or not name:
            name = type(spec).__name__
        ideal = getattr(spec, "ideal_shares", None)
        return UserStrategy(
            order, feedback if callable(feedback) else None, name, spec, ideal if callable(ideal) else None
        )
    elif callable(spec):
        return UserStrategy(spec, None, getattr(spec, "__name__", type(spec).__name__), spec)
    raise ConfigError(
        f"strategy={spec!r}: {', '.join(STRATEGIES)}, an object with a method 'order', "
        "or a function (endpoints, request) -> endpoints is allowed"
    )
