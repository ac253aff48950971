"""The demonstration: one pool, three servers, one of which dies and comes back.

Nothing is drawn here.  `Demo.run` hands a `View` to whoever wants to show it.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import attrs

from gpupool_sync.clock import Deadline
from gpupool_sync.config import Endpoint
from gpupool_sync.errors import GPUPoolError
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.pool import GPUPool
from gpupool_sync.server import require_extra
from gpupool_sync.status import EndpointStatus, Status
from gpupool_sync.testing import FakeFleet, FakeServer

#: GPUs of the servers.
SIZES = (8, 4, 2)
#: Which of them dies.
VICTIM = 1
#: Threads that run jobs: more than GPUs, so that there are always some that wait.
WORKERS = 24
#: Seconds that the demonstration may take, everything included.
LIMIT = 60.0
#: Seconds of these that are kept for taking everything down.
RESERVE = 8.0
#: Jobs that the killed server must run after its return before the work may end.
WANTED_AFTER_RECOVERY = 3
#: Seconds in which servers start.
PATIENCE = 30.0
#: Seconds between two looks of the pool at a server: short, so that death and return are seen while one watches.
POLL_INTERVAL = 0.3
#: Seconds at most between two attempts to reach the dead server, and for its gradual return.
HEALTH_CHECK_INTERVAL = 1.0
#: Seconds between two views.
TICK = 0.1

Mood = Literal["say", "bad", "good"]


class DemoOverdue(GPUPoolError):
    """The demonstration would not have ended in its time, and was ended."""


@attrs.frozen
class Event:
    """Something that happened, *at* seconds after the beginning."""

    at: float
    text: str
    mood: Mood = "say"


@attrs.frozen
class Place:
    """One GPU and the job on it."""

    local_gpu_id: int
    job: int | None


@attrs.frozen
class ServerView:
    """One server as the pool sees it."""

    id: str
    state: Literal["up", "silent", "down", "returning"]
    places: Sequence[Place]
    jobs_done: int


@attrs.frozen
class View:
    """The demonstration at one moment; times in seconds."""

    elapsed: float
    servers: Sequence[ServerView]
    jobs_done: int
    jobs_failed: int
    jobs_asked: int  # more are run until the server that came back has had some
    waiting: int
    events: Sequence[Event]


@attrs.frozen
class Result:
    """How it went."""

    jobs_done: int
    jobs_failed: int
    double_holds: int
    leaked: int
    per_endpoint: Mapping[str, int]
    killed: str | None
    recovered: bool
    jobs_on_killed_after_recovery: int
    wait_p50_s: float | None
    wait_p99_s: float | None
    _asked: int

    @property
    def ok(self) -> bool:
        """Whether everything went as it should."""
        return (
            self.jobs_done >= self._asked
            and not self.jobs_failed
            and not self.double_holds
            and not self.leaked
            and self.killed is not None
            and self.recovered
            and self.jobs_on_killed_after_recovery > 0
        )


class HoldLog:
    """
    Who used which GPU when, noted by the jobs themselves.

    It knows nothing of pools and leases, so it can contradict them: begin is noted after the grant, end before the
    release, so an overlap is a true one.
    """

    def __init__(self) -> None:
        # Guards _holds.
        self._lock = threading.Lock()
        self._holds: list[tuple[str, float, float]] = []

    @contextlib.contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """Note the hold around a block."""
        begin = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            with self._lock:
                self._holds.append((key, begin, end))

    def overlaps(self) -> int:
        """How many holds began before an earlier one of the same GPU had ended."""
        with self._lock:
            holds = sorted(self._holds, key=lambda hold: hold[1])
        until: dict[str, float] = {}
        found = 0
        for key, begin, end in holds:
            found += begin < until.get(key, begin)
            until[key] = max(end, until.get(key, end))
        return found


class Demo:
    """
    One run.

    Args:
        jobs: how many at least; more are added until the server that came back has had some.
        seconds_per_job: on average; each takes from half to one and a half of it.
        seed: makes the jobs' lengths the same in every run.
        limit: seconds after which the run is ended as a failure (default 60).
    """

    def __init__(
        self, *, jobs: int = 60, seconds_per_job: float = 0.8, seed: int | None = None, limit: float | None = None
    ) -> None:
        self._asked = jobs
        self._mean = seconds_per_job
        self._seed = random.randrange(2**32) if seed is None else seed  # noqa: S311 - lengths of jobs, no secret
        self._limit = LIMIT if limit is None else limit
        self._begin = time.monotonic()
        self._deadline = Deadline.after(max(0.0, self._limit - RESERVE))
        self._stop = threading.Event()
        self._holds = HoldLog()
        # Guards what follows: additions only.
        self._lock = threading.Lock()
        self._given = 0
        self._done = 0
        self._failed = 0
        self._waits: list[float] = []
        self._per_endpoint: dict[str, int] = {}
        self._events: list[Event] = []
        self._killed: str | None = None
        self._restarted_at: float | None = None  # time.monotonic()
        self._recovered_at: float | None = None  # time.monotonic()
        self._began_after_recovery = 0
        self._first_after_recovery: int | None = None  # number of the job
        self._after_recovery = 0  # those of them that are done
        self._director_failed = False

    # -- the stage ---------------------------------------------------------------------------------------------

    def run(self, watch: Callable[[View], None] | None = None) -> Result:
        """
        Start the servers, run the jobs, take everything down.

        Args:
            watch: called with a `View` ten times a second, on the caller's thread.

        Raises:
            MissingExtra: the servers need the extra ``server``.
            DemoOverdue: it would not have ended in its time.
        """
        require_extra("server", "fastapi", "uvicorn")
        self._say("starting three servers, each a process of its own")
        with FakeFleet(list(SIZES), start_timeout=self._deadline.within(PATIENCE)) as fleet:
            endpoints = [Endpoint(server.url, name=f"server{number}") for number, server in enumerate(fleet, 1)]
            store = MemoryStore()
            pool = GPUPool(
                endpoints,
                lease_store=store,
                poll_interval=POLL_INTERVAL,
                health_check_interval=HEALTH_CHECK_INTERVAL,
                endpoint_timeout=1.0,
                endpoint_max_retries=0,
                breaker_failures=2,
                # All of these, so that nobody's environment changes what a stranger sees.
                strategy="availability",
                memory_threshold=80.0,
                utilization_threshold=90.0,
                max_stats_age=5.0,
                max_waiting=WORKERS,
                name="demo",
            )
            threads: list[threading.Thread] = []
            try:
                pool.open(wait=True)
                gpus = " + ".join(str(size) for size in SIZES)
                self._say(f"one pool of {gpus} GPUs; {WORKERS} threads want one each for {self._asked} jobs")
                threads = [
                    threading.Thread(target=self._work, args=(pool,), name=f"gpupool-demo-{number}", daemon=True)
                    for number in range(WORKERS)
                ]
                director = threading.Thread(
                    target=self._direct,
                    args=(pool, endpoints[VICTIM].id, fleet[VICTIM]),
                    name="gpupool-demo-director",
                    daemon=True,
                )
                threads.insert(0, director)
                for thread in threads:
                    thread.start()
                self._look_on(pool, threads, watch)
                # Before the pool is closed, which would give back whatever was forgotten.
                leaked = len(store.leases())
                if not self._failed:
                    self._say(f"all {self._done} jobs are done", "good")
                if watch is not None:
                    watch(self._view(pool.status()))
                return self._result(leaked)
            finally:
                self._stop.set()
                pool.close()
                end = Deadline.after(RESERVE / 2)
                # The director first: it must not start a server that the fleet has just stopped.
                for thread in threads:
                    if thread.ident is not None:  # it was started
                        thread.join(end.remaining())

    def _look_on(
        self, pool: GPUPool, threads: Sequence[threading.Thread], watch: Callable[[View], None] | None
    ) -> None:
        while any(thread.is_alive() for thread in threads):
            if self._deadline.passed():
                where = "jobs were left"
                if self._recovered_at is None:
                    where = "the killed server was not back"
                elif not self._began_after_recovery:
                    where = "the killed server was back, but got no job"
                raise DemoOverdue(
                    f"not done within {self._limit:g} s, so it was ended: "
                    f"{self._done} of {self._asked} jobs done, and {where}"
                )
            if watch is not None:
                watch(self._view(pool.status()))
            self._stop.wait(TICK)

    def _say(self, text: str, mood: Mood = "say") -> None:
        with self._lock:
            self._events.append(Event(time.monotonic() - self._begin, text, mood))

    # -- the jobs ----------------------------------------------------------------------------------------------

    def _work(self, pool: GPUPool) -> None:
        while (number := self._next_job()) is not None:
            try:
                self._job(pool, number)
            except Exception as exc:
                if self._stop.is_set():
                    return
                with self._lock:
                    self._failed += 1
                self._say(f"job {number} failed: {type(exc).__name__}: {str(exc).partition(chr(10))[0]}", "bad")

    def _next_job(self) -> int | None:
        with self._lock:
            if self._stop.is_set() or (self._given >= self._asked and not self._more_needed()):
                return None
            self._given += 1
            return self._given

    def _more_needed(self) -> bool:
        """Whether the server that was killed is still to show that it serves again."""
        if self._director_failed or self._deadline.passed():
            return False
        return self._recovered_at is None or self._began_after_recovery < WANTED_AFTER_RECOVERY

    def _job(self, pool: GPUPool, number: int) -> None:
        length = self._mean * random.Random(f"{self._seed}-{number}").uniform(0.5, 1.5)  # noqa: S311
        asked_at = time.monotonic()
        with pool.gpu(timeout=self._deadline.remaining(), note=f"job {number}") as gpu:
            begun_at = time.monotonic()
            with self._holds.holding(gpu.uuid or gpu.global_gpu_id):
                after_recovery = self._begun_after_recovery(gpu.endpoint_id, number)
                cut_short = self._stop.wait(length)
        if cut_short:
            return
        with self._lock:
            self._done += 1
            self._waits.append(begun_at - asked_at)
            self._per_endpoint[gpu.endpoint_id] = self._per_endpoint.get(gpu.endpoint_id, 0) + 1
            self._after_recovery += after_recovery

    def _begun_after_recovery(self, endpoint_id: str, number: int) -> bool:
        """Whether the job that begins runs on the killed server after its return."""
        with self._lock:
            # Before its restart the pool knew it to be down and granted nothing there; so what begins after it began
            # after its return, seen by the director or not.
            if endpoint_id != self._killed or self._restarted_at is None:
                return False
            self._began_after_recovery += 1
            self._first_after_recovery = self._first_after_recovery or number
            return True

    # -- the accident ------------------------------------------------------------------------------------------

    def _direct(self, pool: GPUPool, victim: str, server: FakeServer) -> None:
        try:
            if not self._wait_until(lambda: self._done * 3 >= self._asked):
                return
            begin = time.monotonic()
            self._killed = victim
            server.kill()
            self._say(f"{victim} is killed; its jobs go on, new ones go elsewhere", "bad")
            if not self._wait_until(lambda: self._seen(pool, victim).breaker != "closed"):
                return
            self._say(f"the pool noticed after {time.monotonic() - begin:.1f} s: {victim} gets no jobs", "bad")
            if not self._wait_until(lambda: self._done * 3 >= self._asked * 2):
                return
            self._say(f"{victim} is started again")
            begin = self._restarted_at = time.monotonic()
            server.restart(self._deadline.within(PATIENCE))
            if not self._wait_until(lambda: self._back(self._seen(pool, victim))):
                return
            self._recovered_at = time.monotonic()
            back_after = self._recovered_at - begin
            self._say(f"{victim} answers again after {back_after:.1f} s and gets jobs, few at first", "good")
            if self._wait_until(lambda: self._first_after_recovery is not None):
                self._say(f"job {self._first_after_recovery} is the first on {victim} since", "good")
        except Exception as exc:
            self._director_failed = True
            if not self._stop.is_set():
                self._say(f"restarting {victim} failed: {type(exc).__name__}: {exc}", "bad")

    def _wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true before the time was over."""
        while not condition():
            if self._deadline.passed() or self._stop.wait(0.02):
                return False
        return True

    @staticmethod
    def _seen(pool: GPUPool, endpoint_id: str) -> EndpointStatus:
        for each in pool.status().endpoints:
            if each.endpoint_id == endpoint_id and isinstance(each, EndpointStatus):
                return each
        raise GPUPoolError(f"the pool lost the endpoint {endpoint_id}")

    @staticmethod
    def _back(seen: EndpointStatus) -> bool:
        return seen.is_healthy and seen.breaker == "closed"

    # -- the report --------------------------------------------------------------------------------------------

    def _view(self, status: Status) -> View:
        servers = []
        with self._lock:
            per_endpoint = dict(self._per_endpoint)
            events = tuple(self._events)
            done, failed = self._done, self._failed
        for each in status.endpoints:
            assert isinstance(each, EndpointStatus)
            state: Literal["up", "silent", "down", "returning"] = "up"
            if each.breaker != "closed":
                state = "down"
            elif not each.is_healthy:
                state = "silent"
            elif each.endpoint_id == self._killed and self._recovered_at is not None:
                state = "returning" if time.monotonic() - self._recovered_at < HEALTH_CHECK_INTERVAL else "up"
            places = [
                Place(card.local_gpu_id, _job_of(card.note) if card.holders else None)
                for card in status.gpus
                if card.endpoint_id == each.endpoint_id
            ]
            servers.append(ServerView(each.endpoint_id, state, places, per_endpoint.get(each.endpoint_id, 0)))
        return View(
            elapsed=time.monotonic() - self._begin,
            servers=servers,
            jobs_done=done,
            jobs_failed=failed,
            jobs_asked=self._asked,
            waiting=status.blocked_workers,
            events=events,
        )

    def _result(self, leaked: int) -> Result:
        with self._lock:
            waits = sorted(self._waits)
            return Result(
                jobs_done=self._done,
                jobs_failed=self._failed,
                double_holds=self._holds.overlaps(),
                leaked=leaked,
                per_endpoint=dict(sorted(self._per_endpoint.items())),
                killed=self._killed,
                recovered=self._recovered_at is not None,
                jobs_on_killed_after_recovery=self._after_recovery,
                wait_p50_s=_at(waits, 0.50),
                wait_p99_s=_at(waits, 0.99),
                asked=self._asked,
            )


def _at(values: Sequence[float], share: float) -> float | None:
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def _job_of(note: str | None) -> int | None:
    """The number in a note of ours."""
    digits = "".join(itertools.takewhile(str.isdigit, (note or "").removeprefix("job ")))
    return int(digits) if digits else None
