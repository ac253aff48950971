"""Counting: what happened since the beginning, and since somebody last asked for a fresh start.

What is counted is never set back.  A window (`pop_stats`) remembers what the sums were at its begin, so that readers
who pop, and others who want sums that only grow (Prometheus), do not disturb each other.
"""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpupool_sync.models import EndpointView

#: Quantiles are those of so many of the last durations.
KEPT_DURATIONS = 1000
#: Seconds that divide the waits and holds of a histogram.
USE_BOUNDS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 6 * 3600.0, 24 * 3600.0)
#: Seconds that divide the polls of a histogram.
POLL_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Endpoints that judging a grant may look at, on average: with more, not every grant is judged.
JUDGED_ENDPOINTS = 4
#: What `Counters.add` counts, with the names that `pool.stats()` tells.
NAMES = ("requests", "grants", "releases", "queued", "timeouts", "refused", "claims", "store_errors", "forgotten")


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """Count, p50, p95, p99 and largest of *values*, which are sorted."""

    def at(share: float) -> float | None:
        return values[min(len(values) - 1, int(share * len(values)))] if values else None

    return {
        "count": len(values),
        "p50": at(0.50),
        "p95": at(0.95),
        "p99": at(0.99),
        "max": values[-1] if values else None,
    }


class Durations:
    """The last durations, and a histogram of all there ever were; it has no lock, whoever owns it guards it."""

    __slots__ = ("_bounds", "_counts", "_recent", "_seconds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._recent: deque[float] = deque(maxlen=KEPT_DURATIONS)
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self._seconds += seconds
        self._counts[bisect_left(self._bounds, seconds)] += 1

    def recent(self, *, reset: bool = False) -> list[float]:
        """The last ones, not sorted, which may be done when no lock is held; with *reset* they are forgotten."""
        values = list(self._recent)
        if reset:
            self._recent.clear()
        return values

    def histogram(self) -> dict[str, Any]:
        """Of all there ever were: their sum in seconds, and how many were at most so many seconds long."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return {
            "sum": self._seconds,
            "buckets": dict(zip(bounds, itertools.accumulate(self._counts), strict=True)),
        }


class Uptime:
    """
    For how many seconds something was watched, and healthy; it has no lock, whoever owns it guards it.

    Watching begins with the first word on its health. By the monotonic clock: while this machine sleeps, nobody
    watches.
    """

    __slots__ = ("_at", "_clock", "_healthy", "healthy", "watched")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at: float | None = None
        self._healthy = False
        self.watched = 0.0
        self.healthy = 0.0

    def note(self, healthy: bool) -> None:
        """From now on it is healthy, or is not."""
        if self._at is None:
            self._at = self._clock()
        else:
            self.advance()
        self._healthy = healthy

    def advance(self) -> None:
        """Bring `watched` and `healthy` up to this moment."""
        if self._at is None:
            return
        now = self._clock()
        self.watched += now - self._at
        if self._healthy:
            self.healthy += now - self._at
        self._at = now


def share_of(part: float, whole: float) -> float | None:
    """*part* of *whole*, from 0 to 1; None if there was nothing yet."""
    return part / whole if whole else None


_Sums = tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int], Mapping[str, float]]
_NO_SUMS: _Sums = ({}, {}, {}, {})


class Counters:
    """What a pool counts: requests and what became of them, waits, holds, and how the grants are distributed."""

    def __init__(self) -> None:
        # Guards everything below: additions and copies only; no sorting, and nothing of the user's is called.
        self._lock = threading.Lock()
        self._begun = self._window = time.monotonic()  # of everything; of the window
        self._counts: dict[str, int] = {}
        self._grants: dict[str, int] = {}  # by endpoint
        self._forced: dict[str, int] = {}  # by endpoint: grants when there was no other to choose
        self._ideal: dict[str, float] = {}  # of the other grants, how many each endpoint should have had
        self._before = _NO_SUMS  # the four at the begin of the window
        self._waits = Durations(USE_BOUNDS)
        self._holds = Durations(USE_BOUNDS)
        self._unjudged = 0  # choices since the last one whose ideal was asked for
        self._skip = 0  # so many more are left out

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + number

    def granted(
        self,
        endpoint_id: str,
        waited: float,
        claims: int,
        queued: bool,
        choice: Sequence[EndpointView],
        ideal_shares: Callable[[Sequence[EndpointView]], Mapping[str, float] | None],
    ) -> None:
        """
        Count a grant.

        Args:
            choice: the endpoints that could have granted when it was decided; less than two: there was no choice.
            ideal_shares: the strategy's; called without a lock, and not at every grant when there are many endpoints.
        """
        forced = len(choice) < 2
        # _skip is read without the lock: two threads at once judge one more, and each grant still has its weight once.
        ideal = None if forced or self._skip > 0 else ideal_shares(choice)
        with self._lock:
            counts = self._counts
            counts["grants"] = counts.get("grants", 0) + 1
            counts["claims"] = counts.get("claims", 0) + claims
            if queued:
                counts["queued"] = counts.get("queued", 0) + 1
            self._grants[endpoint_id] = self._grants.get(endpoint_id, 0) + 1
            self._waits.add(waited)
            if forced:
                self._forced[endpoint_id] = self._forced.get(endpoint_id, 0) + 1
                return
            self._unjudged += 1
            if ideal is None:
                self._skip -= 1
                return
            # It stands for those that were left out before it.
            weight, self._unjudged = self._unjudged, 0
            self._skip = len(choice) // JUDGED_ENDPOINTS
            for name, share in ideal.items():
                self._ideal[name] = self._ideal.get(name, 0.0) + weight * share

    def released(self, held: float) -> None:
        with self._lock:
            self._counts["releases"] = self._counts.get("releases", 0) + 1
            self._holds.add(held)

    def read(self, *, has_ideal: bool = True, reset: bool = False, all_time: bool = False) -> dict[str, Any]:
        """
        The counters of the window, which ends with *reset*; or *all_time*: since the beginning, with histograms.

        Without *has_ideal* the strategy has no ideal to measure its grants by.
        """
        with self._lock:
            now = time.monotonic()
            sums = dict(self._counts), dict(self._grants), dict(self._forced), dict(self._ideal)
            before = _NO_SUMS if all_time else self._before
            seconds = now - (self._begun if all_time else self._window)
            waits, holds = self._waits.recent(reset=reset), self._holds.recent(reset=reset)
            histograms = (self._waits.histogram(), self._holds.histogram()) if all_time else ({}, {})
            if reset:
                self._window = now
                self._before = sums
                self._unjudged = self._skip = 0  # the first grant of a window is judged
        counts, grants = _less(sums[0], before[0]), _less(sums[1], before[1])
        forced, judged = _less(sums[2], before[2]), _less(sums[3], before[3])
        ideal = _ideal(grants, forced, judged) if has_ideal else {}
        granted = counts.get("grants", 0)
        shares, ideal_shares = _shares(grants), _shares(ideal)
        return {
            "seconds": seconds,
            **{name: counts.get(name, 0) for name in NAMES},
            "grants_per_second": granted / seconds if seconds else 0.0,
            "grants_by_endpoint": grants,
            "shares": shares,
            "ideal_shares": ideal_shares,
            "effectiveness": effectiveness(shares, ideal_shares),
            "wait": {**summary(sorted(waits)), **histograms[0]},
            "hold": {**summary(sorted(holds)), **histograms[1]},
            # Not `ideal`: that may fall a little, which Prometheus would take for a restart.
            **(
                {"ideal_grants": {name: forced.get(name, 0) + judged.get(name, 0.0) for name in ideal}}
                if all_time
                else {}
            ),
        }


def effectiveness(shares: Mapping[str, float], ideal: Mapping[str, float]) -> float | None:
    """1 − ½·Σ|share − ideal share|: from 1, as the strategy wants it, to 0; None if either is not known."""
    if not shares or not ideal:
        return None
    # The names in one order: the sum of floats depends on it, and equal shares must give exactly the same.
    names = sorted({*shares, *ideal})
    return max(0.0, 1.0 - 0.5 * sum(abs(shares.get(name, 0.0) - ideal.get(name, 0.0)) for name in names))


def _less(sums: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What was added since; names without any are left out."""
    return {name: more for name, value in sums.items() if (more := value - before.get(name, 0))}


def _ideal(grants: Mapping[str, int], forced: Mapping[str, int], judged: Mapping[str, float]) -> dict[str, float]:
    """
    How the grants should have been distributed: those without a choice as they were, the others as was judged.

    Nothing where there were choices, and none has been judged.
    """
    chosen = sum(grants.values()) - sum(forced.values())
    if chosen > 0 and not judged:
        return {}
    # Choices whose ideal was not asked for are taken to be like those where it was.
    weight = chosen / sum(judged.values()) if judged else 0.0
    names = [*grants, *(name for name in judged if name not in grants)]
    ideal = {name: forced.get(name, 0) + weight * judged.get(name, 0.0) for name in names}
    return {name: number for name, number in ideal.items() if number}


def _shares(numbers: Mapping[str, float]) -> dict[str, float]:
    whole = sum(numbers.values())
    return {name: number / whole for name, number in numbers.items()} if whole else {}
