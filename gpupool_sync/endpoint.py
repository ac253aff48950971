"""One endpoint: where its statistics come from, its breaker, its health, its numbers.

Every error of a library or a server becomes ours here or in `transport`, once.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import math
import random
import re
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import attrs
import pybreaker

from gpupool_sync import devices, wire
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.counting import Uptime, share_of, summary
from gpupool_sync.errors import BadAnswer, EndpointUnavailable, GPUPoolError, unpin
from gpupool_sync.models import Card, Sample, Snapshot, card_key
from gpupool_sync.transport import Pace, Transport, Turn, pace_of, retry_after

if TYPE_CHECKING:
    from gpupool_sync.leases.base import LeaseStore

logger = logging.getLogger(__name__)

#: Response times are those of so many last successes.
KEPT_RESPONSES = 100
#: A reintroduced endpoint starts with this share of the decisions it would get.
FIRST_SHARE = 0.1
#: Seconds between the first polls of an endpoint that has never answered; doubles up to the poll interval.
FIRST_PAUSE = 0.125
#: Seconds that a poll waits for its turn under `max_rate`; it comes back later if that is further away. More than
#: claims wait (`transport.SOON`): they could take every turn otherwise.
TURN_PATIENCE = 2.0
#: So many polls in a row have to bring the same timestamp before it is taken for the same sample.
REPEATS = 3
#: pybreaker would end the open period by the wall clock, which steps; the monitor ends it by the monotonic one.
_NEVER = 100 * 365 * 86400.0


_serials = itertools.count(1)


class Source(Protocol):
    """Where an endpoint's samples come from."""

    def await_turn(self, deadline: Deadline) -> None: ...
    def fetch(self, deadline: Deadline) -> Sample: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...
    def forget_after_fork(self) -> None: ...


class OtherStatus(EndpointUnavailable):
    """The server was reached, and answered with another status than 200."""


class TooManyRequests(OtherStatus):
    """The server is alive and asks for patience: no sign of sickness."""


class HTTPSource:
    """A statistics server."""

    def __init__(self, endpoint: Endpoint, *, max_retries: int, pace: Pace | None = None) -> None:
        self._id = endpoint.id
        self._transport = Transport(endpoint, max_retries=max_retries, pace=pace)

    def await_turn(self, deadline: Deadline) -> None:
        self._transport.await_turn(deadline)

    def fetch(self, deadline: Deadline) -> Sample:
        answer = self._transport.get("/gpu/summary", deadline, Turn.TAKEN)
        if answer.status != 200:
            wait = retry_after(answer)
            kind = TooManyRequests if answer.status == 429 else OtherStatus
            asked = f" and asks to be left alone for {wait:g} s" if wait is not None else ""
            raise kind(self._id, f"answered with status {answer.status}{asked}", wait)
        # The age is that of the moment when the server answered, which was after we asked: an answer that was long
        # on its way must not look fresher than it is.
        begin = boottime() - answer.elapsed
        age, problem = _sample_age(answer.headers.get(wire.AGE_HEADER))
        sample = wire.parse_summary(answer.body, endpoint_id=self._id, taken_at=begin - age)
        return attrs.evolve(sample, problems=(*sample.problems, problem)) if problem else sample

    def abort(self) -> None:
        self._transport.abort()

    def close(self) -> None:
        self._transport.close()

    def forget_after_fork(self) -> None:
        self._transport.forget_after_fork()


def _sample_age(text: str | None) -> tuple[float, str | None]:
    """Seconds between the sample and the answer; without the header 0, as nothing is known."""
    if text is None:
        return 0.0, None
    try:
        age = float(text)
    except ValueError:
        age = math.nan
    if not 0.0 <= age < math.inf:
        # A server that claims an age and garbles it may be serving anything: too old to grant from.
        return math.inf, f"the header {wire.AGE_HEADER} is not an age in seconds"
    return age, None


class DeviceSource:
    """This machine's own cards, read without a server."""

    def __init__(self) -> None:
        self._passthrough = devices.passthrough_asked_for()
        self._reader: devices.Reader | None = None
        self.description = "not read yet"

    def await_turn(self, deadline: Deadline) -> None:
        """It is always our turn."""

    def fetch(self, deadline: Deadline) -> Sample:
        reader = self._reader
        if reader is None:
            reader = devices.open_reader()
            if self._passthrough:
                reader = devices.Passthrough(reader)
            self._reader = reader
        left = deadline.remaining()
        try:
            return reader.read(10.0 if left is None else left)
        finally:
            self.description = reader.description  # it may have found out something

    def abort(self) -> None:
        """A driver call cannot be interrupted; its thread is a daemon and is left behind."""

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def forget_after_fork(self) -> None:
        # NVML is not fork-safe; the child opens its own at its first poll.
        self._reader = None


@attrs.frozen
class Numbers:
    """An endpoint's counters at one moment; times in seconds but where the name says otherwise."""

    successes: int = 0
    failures: int = 0
    consecutive_failures: int = 0
    response_seconds: float = 0.0  # of all successes
    response_time_ms: float | None = None  # mean of the last successes
    response_p50_ms: float | None = None
    response_p95_ms: float | None = None
    healthy_seconds: float = 0.0
    watched_seconds: float = 0.0  # since the first poll ended
    last_seen: datetime.datetime | None = None  # aware, UTC
    last_error: str | None = None
    breaker: str = "closed"
    breaker_changes: int = 0
    healthy: bool = False
    reintroduced: float = 1.0  # share of the decisions it gets, 0 to 1

    @property
    def success_rate(self) -> float | None:
        return share_of(self.successes, self.successes + self.failures)

    @property
    def availability(self) -> float | None:
        return share_of(self.healthy_seconds, self.watched_seconds)


class _Listener(pybreaker.CircuitBreakerListener):
    def __init__(self, owner: PolledEndpoint) -> None:
        self._owner = owner

    def state_change(self, cb: object, old_state: object, new_state: object) -> None:
        self._owner._breaker_changed(getattr(new_state, "name", str(new_state)))


class PolledEndpoint:
    """
    One endpoint with its breaker, health and response times.

    `poll` is called by one thread at a time (the monitor sees to it); everything else from any thread.
    """

    def __init__(
        self,
        id: str,
        url: str,
        source: Source,
        settings: Settings,
        *,
        local: bool | None,
        pace: Pace | None = None,
    ) -> None:
        self.id = id
        self.url = url
        #: Of all requests to its server, those about leases included; None: no limit.
        self.pace = pace
        #: Tells this object's snapshots from those of others of the same id.
        self.serial = next(_serials)
        #: By which its server arbitrates its own cards; set once, before any of its snapshots is granted from.
        self.server: LeaseStore | None = None
        self.drained = False  # by the user
        self.leaving = False  # its source lists it no more
        #: Whether the last poll brought an answer, if only a bad one; None before the first.
        self.reached: bool | None = None
        self._source = source
        self._local = local
        self._timeout = settings.endpoint_timeout
        self._poll_interval = settings.poll_interval
        self._longest_pause = max(settings.health_check_interval, settings.poll_interval)
        self._breaker_failures = settings.breaker_failures
        self._max_stats_age = settings.max_stats_age
        # The timestamp of the last sample, when the one that had it first was taken, and how many had it since; of
        # the polls alone, which never overlap.
        self._repeated: tuple[str | None, float, int] = (None, 0.0, 0)
        self._make_locks()
        self._numbers = self._window = Numbers()
        # Of each success, counted apart: a new value for every poll would cost more than all else that it does here.
        self._successes = 0
        self._response_seconds = 0.0
        self._last_seen: float | None = None  # time.time()
        self._uptime = Uptime()
        self._responses: deque[float] = deque(maxlen=KEPT_RESPONSES)  # seconds
        self._recovered_at: float | None = None
        self._opened = 0  # probes that failed in a row since the breaker opened

    def _make_locks(self) -> None:
        # Guards _numbers, the three that are counted apart, _window, _uptime, _responses, _recovered_at and _opened:
        # counting only, no I/O, no logging.
        self._lock = threading.Lock()
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=self._breaker_failures,
            reset_timeout=_NEVER,
            # The real error also on the call that trips.
            throw_new_error_on_trip=False,
            listeners=[_Listener(self)],
            name=self.id,
        )

    @property
    def description(self) -> str:
        """Where the readings come from, for people."""
        return getattr(self._source, "description", self.url)

    @property
    def draining(self) -> bool:
        """Whether nothing new is granted at it."""
        return self.drained or self.leaving

    @property
    def open(self) -> bool:
        """Whether the breaker keeps callers away (also while a probe is under way)."""
        return self._numbers.breaker != "closed"

    @property
    def sick(self) -> bool:
        """Whether the last poll failed: such endpoints are polled apart, so that they cannot starve the others."""
        return self._numbers.consecutive_failures > 0

    def numbers(self) -> Numbers:
        """The counters since the beginning, as one consistent value."""
        with self._lock:
            numbers = self._numbers_locked()
            responses = list(self._responses)
        mean = sum(responses) / len(responses) if responses else None
        spread = summary(sorted(responses))
        return attrs.evolve(
            numbers,
            response_time_ms=_ms(mean),
            response_p50_ms=_ms(spread["p50"]),
            response_p95_ms=_ms(spread["p95"]),
            reintroduced=self.reintroduced(),
        )

    def _numbers_locked(self) -> Numbers:
        uptime = self._uptime
        uptime.advance()
        seen = self._last_seen
        return attrs.evolve(
            self._numbers,
            successes=self._successes,
            response_seconds=self._response_seconds,
            last_seen=None if seen is None else datetime.datetime.fromtimestamp(seen, datetime.timezone.utc),
            healthy_seconds=uptime.healthy,
            watched_seconds=uptime.watched,
        )

    def stats(self, *, reset: bool = False, all_time: bool = False) -> dict[str, Any]:
        """
        The counters of the window, which ends with *reset*, or with *all_time* since the beginning; and what is now.
        """
        now = self.numbers()
        with self._lock:
            # Once more, as the window ends with exactly what is told: what is counted in between belongs to the next.
            sums = self._numbers_locked()
            before = Numbers() if all_time else self._window
            if reset:
                self._window = sums
        successes = sums.successes - before.successes
        failures = sums.failures - before.failures
        watched = sums.watched_seconds - before.watched_seconds
        healthy = sums.healthy_seconds - before.healthy_seconds
        stats = {
            "healthy": sums.healthy,
            "breaker": sums.breaker,
            "breaker_changes": sums.breaker_changes - before.breaker_changes,
            "successes": successes,
            "failures": failures,
            "success_rate": share_of(successes, successes + failures),
            "healthy_seconds": healthy,
            "watched_seconds": watched,
            "availability": share_of(healthy, watched),
            "response_time_ms": now.response_time_ms,
            "response_p50_ms": now.response_p50_ms,
            "response_p95_ms": now.response_p95_ms,
        }
        return {**stats, "response_seconds": sums.response_seconds} if all_time else stats

    def reintroduced(self) -> float:
        """The share of its decisions that the endpoint gets, 0 to 1: less than 1 for a while after a recovery."""
        recovered_at = self._recovered_at
        if recovered_at is None:
            return 1.0
        share = FIRST_SHARE + (1 - FIRST_SHARE) * (boottime() - recovered_at) / self._longest_pause
        return min(1.0, share)

    # -- polling -----------------------------------------------------------------------------------------------

    def poll(self) -> Snapshot:
        """
        Read the endpoint once, within `endpoint_timeout` from its turn under `max_rate`.

        Raises:
            NoTurn: its turn is too far away to wait for; nothing was asked, and nothing counted.
            EndpointUnavailable: the server is down, slow or turns us away.
            BadAnswer: it answered, but not with GPU statistics.
        """
        # Before the breaker hears of it: an own cap tells nothing of the server.
        if self.pace is not None:
            self._source.await_turn(Deadline.after(TURN_PATIENCE))
        if self.open:
            # The open period is over when the monitor polls again. That poll is the only probe: polls of one
            # endpoint never overlap, and lease requests go by `open`, which stays True until the probe succeeded.
            self._breaker.half_open()
        begin = boottime()
        deadline = Deadline.after(self._timeout)
        patience: TooManyRequests | None = None
        sample: Sample | None = None
        try:
            sample = self._source.fetch(deadline)
        except TooManyRequests as exc:
            patience = exc
        except GPUPoolError as exc:
            self._broke(exc)
            raise
        except Exception as exc:
            unpin(exc)
            failure = EndpointUnavailable(self.id, f"reading it broke: {type(exc).__name__}: {exc}")
            try:
                self._broke(failure)
                raise failure from exc
            finally:
                del failure  # it has this frame
        now = boottime()
        # Noted before the breaker hears of it: who sees it closed must not be told that the endpoint is not well.
        if sample is not None:
            self._succeeded(now - begin)
        # Afterwards, as call() holds the breaker's lock during the call. Mostly there is nothing that a success ends.
        if self.open or self._breaker.fail_counter:
            self._breaker.call(_nothing)
        if sample is None:
            assert patience is not None
            self._failed(patience)
            try:
                raise patience
            finally:
                del patience  # it has this frame
        return self._snapshot(sample, now)

    def _broke(self, error: GPUPoolError) -> None:
        # Noted before the breaker hears of it, so that what it logs when it opens can say why.
        self._failed(error)
        # Not of the error itself: its traceback would hold the breaker's frames, and they it.
        try:
            self._breaker.call(_fail)
        except _Failed as exc:
            unpin(exc)

    def _aged(self, sample: Sample, now: float) -> tuple[Sample, bool]:
        """
        The sample, as old as it really is, and whether its server repeats it.

        A server whose timestamp stands still has not looked at its cards since, whatever it answers: so the age counts
        from where that timestamp was seen first.  Two equal ones may come from one second.  Without a timestamp nothing
        is known.
        """
        known, taken_at, number = self._repeated
        if sample.timestamp is None or sample.timestamp != known:
            self._repeated = (sample.timestamp, sample.taken_at, 1)
            return sample, False
        taken_at, number = min(taken_at, sample.taken_at), number + 1
        self._repeated = (known, taken_at, number)
        if number < REPEATS:
            return sample, False
        problems = sample.problems
        if now - taken_at > self._max_stats_age:
            # The same words each time, so that they are logged once.
            told = (
                f"its timestamp has not changed for more than {self._max_stats_age:g} s, so nothing is granted from it"
            )
            problems = (*problems, told)
        return attrs.evolve(sample, taken_at=taken_at, problems=problems), True

    def _snapshot(self, sample: Sample, now: float) -> Snapshot:
        sample, repeated = self._aged(sample, now)
        local = self._local
        if local is None:
            here = devices.host_identity()
            local = sample.host is not None and not sample.host.simulated and sample.host.id == here.id
        cards = tuple(
            Card(key=card_key(self.url, reading), endpoint_id=self.id, reading=reading) for reading in sample.gpus
        )
        return Snapshot(
            self.id, self.url, sample, cards, received_at=now, is_local=local, repeated=repeated, serial=self.serial
        )

    def _succeeded(self, elapsed: float) -> None:
        self.reached = True
        with self._lock:
            before = self._numbers
            self._responses.append(elapsed)
            self._uptime.note(True)
            self._opened = 0
            self._successes += 1
            self._response_seconds += elapsed
            self._last_seen = time.time()
            if not before.healthy:
                self._numbers = attrs.evolve(before, consecutive_failures=0, last_error=None, healthy=True)
        if before.consecutive_failures and not before.breaker_changes:
            logger.info("endpoint %s answers again", self.id)

    def _failed(self, error: GPUPoolError) -> None:
        text = error.message if isinstance(error, (EndpointUnavailable, BadAnswer)) else str(error)
        self.reached = not isinstance(error, EndpointUnavailable) or isinstance(error, OtherStatus)
        with self._lock:
            before = self._numbers
            if before.breaker != "closed":
                self._opened += 1
            self._uptime.note(False)
            self._numbers = attrs.evolve(
                before,
                failures=before.failures + 1,
                consecutive_failures=before.consecutive_failures + 1,
                last_error=text,
                healthy=False,
            )
        if not before.consecutive_failures:
            logger.info("poll of endpoint %s failed: %s", self.id, text)

    def _breaker_changed(self, state: str) -> None:
        with self._lock:
            before = self._numbers.breaker
            self._numbers = attrs.evolve(
                self._numbers, breaker=state, breaker_changes=self._numbers.breaker_changes + 1
            )
            if state == "closed" and before != "closed":
                self._recovered_at = boottime()
            error = self._numbers.last_error
        if state == "open" and before == "closed":
            logger.warning("endpoint %s is down, its breaker is open: %s", self.id, error or "polls failed")
        elif state == "closed" and before != "closed":
            logger.warning("endpoint %s is back", self.id)

    def pause(self, retry_after: float | None = None) -> float:
        """
        Seconds until the next poll is due.

        The one back-off there is: a closed breaker's endpoint is polled at the poll interval; an open one's is
        probed at a period that doubles, with jitter, from the poll interval to the health check interval.  What the
        server asked for (`Retry-After`, capped by the transport) moves the poll further away.
        """
        pause = self._poll_interval
        numbers = self._numbers
        if not self._successes and numbers.breaker == "closed":
            # It has never answered: most likely it is just starting, and somebody waits for it.
            pause = min(pause, FIRST_PAUSE * 2.0 ** min(numbers.failures, 30))
        if self.open:
            pause = min(self._longest_pause, self._poll_interval * 2.0 ** min(self._opened, 30))
            # Down to three quarters, never up: the health check interval is a promise.
            pause *= random.uniform(0.75, 1.0)  # noqa: S311 - jitter, no secret
        return max(pause, retry_after or 0.0)

    # -- life --------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """Make a poll that is under way on another thread fail at once."""
        self._source.abort()

    def close(self) -> None:
        """Let go of connections; idempotent."""
        self._source.close()

    def forget_after_fork(self) -> None:
        """In a forked child: new locks and connections; the parent's are its own."""
        numbers = self._numbers
        self._make_locks()
        self._numbers = attrs.evolve(numbers, breaker="closed", consecutive_failures=0)
        self._uptime, self._window = Uptime(), attrs.evolve(self._window, healthy_seconds=0.0, watched_seconds=0.0)
        self._source.forget_after_fork()


def _nothing() -> None:
    """A call that succeeded, told to the breaker."""


class _Failed(Exception):
    """The breaker passes on what it is told."""


def _fail() -> NoReturn:
    """A call that failed, told to the breaker."""
    raise _Failed


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000.0 * seconds


def local_endpoint_id() -> str:
    """The id of this machine's own cards when they are read without a server: its short host name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname().split(".")[0]) or "localhost"


def make_endpoint(endpoint: Endpoint, settings: Settings) -> PolledEndpoint:
    """The endpoint that a statistics server is."""
    pace = pace_of(endpoint)
    source = HTTPSource(endpoint, max_retries=settings.endpoint_max_retries, pace=pace)
    return PolledEndpoint(endpoint.id, endpoint.url, source, settings, local=endpoint.local, pace=pace)


def make_local_endpoint(settings: Settings) -> PolledEndpoint:
    """The endpoint that this machine is when none is configured."""
    return PolledEndpoint(local_endpoint_id(), "local:", DeviceSource(), settings, local=True)
