"""The demonstration: worker processes with a pool each, and three servers.  A worker is killed, and a server.

Nothing is drawn here.  `Demo.run` hands a `View` to whoever wants to show it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import attrs

from gpupool_sync.clock import Deadline
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.errors import GPUPoolError, LeaseStoreError
from gpupool_sync.leases.base import LeaseInfo
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.pool import GPUPool
from gpupool_sync.server import require_extra
from gpupool_sync.status import EndpointStatus, Status
from gpupool_sync.testing import _START, FakeFleet, FakeServer

#: GPUs of the servers.
SIZES = (8, 4, 2)
#: Which of them dies.
VICTIM = 1
#: Processes that run jobs, and jobs that each runs at a time: more than GPUs, so that there are always some that wait.
WORKERS = 6
THREADS = 4
#: Seconds that the demonstration may take, everything included.
LIMIT = 60.0
#: Seconds of these that are kept for taking everything down.
RESERVE = 8.0
#: Seconds that the lease of a dead worker lasts, at least: twice a job's mean length, so that none outlasts its lease
#: while its server is dead.
MIN_TTL = 2.0
#: Who arbitrates; None: each server its own GPUs.
LEASE_STORE: str | None = None
#: Share of the jobs that wait until both accidents are over, lest all are done before.
HELD_BACK = 0.1
#: Jobs that the killed server must run after its return before the work may end.
WANTED_AFTER_RECOVERY = 1
#: Seconds that the killed server stays dead at least, so that one sees it.
OUTAGE = 1.5
#: Seconds in which servers start.
PATIENCE = 30.0
#: Seconds between two looks of a pool at a server: short, so that death and return are seen while one watches.
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
    orphaned: bool = False  # the worker that had it was killed, and nobody has it again yet


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
    workers: Sequence[bool] = ()  # whether each lives


@attrs.frozen
class Result:
    """How it went."""

    jobs_done: int
    jobs_failed: int
    jobs_run_again: int  # their worker was killed
    double_holds: int
    leaked: int
    killed_worker: str | None
    gpus_of_killed_worker: Sequence[str]
    gpus_back_after_s: float | None  # until the last of them had another job; None: one has not
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
            and bool(self.gpus_of_killed_worker)
            and self.gpus_back_after_s is not None
            and self.killed is not None
            and self.recovered
            and self.jobs_on_killed_after_recovery > 0
        )


class HoldLog:
    """
    Who used which GPU when, as the workers noted it, on the clock that all processes share.

    It knows nothing of pools and leases, so it can contradict them: begin is noted after the grant, end before the
    release, so an overlap is a true one.
    """

    def __init__(self) -> None:
        self._holds: list[tuple[str, float, float]] = []

    def add(self, key: str, begin: float, end: float) -> None:
        """The GPU was in use from *begin* to *end*, seconds of ``time.monotonic``."""
        self._holds.append((key, begin, end))

    def overlaps(self) -> int:
        """How many holds began before an earlier one of the same GPU had ended."""
        until: dict[str, float] = {}
        found = 0
        for key, begin, end in sorted(self._holds, key=lambda hold: hold[1]):
            found += begin < until.get(key, begin)
            until[key] = max(end, until.get(key, end))
        return found


@attrs.frozen
class _Job:
    number: int
    seconds: float


@attrs.define
class _Hold:
    """A job on its GPU, now."""

    key: str
    gpu: str  # its public id
    endpoint_id: str
    begin: float


class _Worker:
    """A process that runs jobs; see `_demo_worker`."""

    def __init__(self, number: int, settings: Mapping[str, Any]) -> None:
        self.name = f"worker {number}"
        # Guarded by the lock of the demo, with all that it knows.
        self.ready = False
        self.alive = True
        self.gone = threading.Event()  # it has ended, and all that it noted was read
        self.killed = False
        self.jobs: dict[int, _Job] = {}  # given, and not done yet, by number
        self.holds: dict[int, _Hold] = {}  # by number of the job
        self.died_at = 0.0
        self.left_jobs: Sequence[int] = ()
        root = str(Path(__file__).resolve().parent.parent)
        # Its own: of a file for all, the last line may be what another one is just writing.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, "gpupool_sync._demo_worker", root],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # Ctrl-C is for us: it ends with us, as its input does.
                start_new_session=True,
            )
        except BaseException:
            self._errors.close()
            raise
        self.send({"name": self.name, **settings})

    def send(self, order: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is dead, which its notes' end will tell
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def notes(self) -> Iterable[dict[str, Any]]:
        """What it notes, until it ends."""
        assert self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self.process.stdout:
                if line.endswith(b"\n"):  # killed in the middle of one
                    yield json.loads(line)

    def last_words(self) -> str:
        """The last line that it wrote to its standard error, after a colon. Not after `end`."""
        # By position: the offset of the file is the process's too.
        fd = self._errors.fileno()
        lines = os.pread(fd, 4000, max(0, os.fstat(fd).st_size - 4000)).decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def end(self) -> None:
        """Now, whatever it does."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(RESERVE / 4)
        for file in (self.process.stdin, self.process.stdout, self._errors):
            assert file is not None
            with contextlib.suppress(OSError):
                file.close()


@attrs.define
class _Orphan:
    """A GPU whose worker was killed."""

    gpu: str
    since: float
    back_after: float | None = None


class Demo:
    """
    One run.

    Args:
        jobs: how many at least; more are added until what was killed has been seen to serve again.
        seconds_per_job: on average; each takes from half to one and a half of it.
        seed: makes the jobs' lengths the same in every run.
        limit: seconds after which the run is ended as a failure (default 60).
    """

    def __init__(
        self, *, jobs: int = 60, seconds_per_job: float = 2.0, seed: int | None = None, limit: float | None = None
    ) -> None:
        self._asked = jobs
        self._mean = seconds_per_job
        self._ttl = max(MIN_TTL, 2 * seconds_per_job)
        self._seed = random.randrange(2**32) if seed is None else seed  # noqa: S311 - lengths of jobs, no secret
        self._limit = LIMIT if limit is None else limit
        self._begin = time.monotonic()
        self._deadline = Deadline.after(max(0.0, self._limit - RESERVE))
        self._stop = threading.Event()
        # Guards what follows, and what it says of each worker: additions and lookups. Orders are sent outside.
        self._lock = threading.RLock()
        self._workers: list[_Worker] = []
        self._holds = HoldLog()
        self._given = 0
        self._again: deque[_Job] = deque()
        self._run_again = 0
        self._done = 0
        self._failed = 0
        self._ending = False
        self._waits: list[float] = []
        self._per_endpoint: dict[str, int] = {}
        self._events: list[Event] = []
        self._orphans: dict[str, _Orphan] = {}  # by key
        self._killed_worker: str | None = None
        self._killed: str | None = None
        self._restarted_at: float | None = None  # time.monotonic()
        self._recovered_at: float | None = None  # time.monotonic()
        self._first_after_recovery: int | None = None  # number of the job
        self._began_after_recovery = 0
        self._after_recovery = 0  # those of them that are done
        self._accidents_over = False
        self._director_failed = False

    # -- the stage ---------------------------------------------------------------------------------------------

    def run(self, watch: Callable[[View], None] | None = None) -> Result:
        """
        Start the servers and the workers, run the jobs, take everything down.

        Args:
            watch: called with a `View` ten times a second, on the caller's thread.

        Raises:
            MissingExtra: the servers need the extra ``server``.
            DemoOverdue: it would not have ended in its time.
        """
        require_extra("server", "fastapi", "uvicorn")
        self._say(f"starting three servers and {WORKERS} workers, all of them processes")
        with contextlib.ExitStack() as ending:
            fleet = ending.enter_context(FakeFleet(list(SIZES), start_timeout=self._deadline.within(PATIENCE)))
            endpoints = [Endpoint(server.url, name=f"server{number}") for number, server in enumerate(fleet, 1)]
            options: dict[str, Any] = {
                "poll_interval": POLL_INTERVAL,
                "health_check_interval": HEALTH_CHECK_INTERVAL,
                "endpoint_timeout": 1.0,
                "endpoint_max_retries": 0,
                "breaker_failures": 2,
                # All of these, so that nobody's environment changes what a stranger sees.
                "strategy": "availability",
                "memory_threshold": 80.0,
                "utilization_threshold": 90.0,
                "max_stats_age": 5.0,
                "max_waiting": THREADS,
                "ttl": self._ttl,
            }
            # Shows how a pool sees the servers; it leases nothing.
            pool = GPUPool(endpoints, lease_store=MemoryStore(), name="onlooker", **options)
            ending.callback(pool.close)
            arbiters = [HTTPStore(each, Settings(endpoint_timeout=1.0, endpoint_max_retries=0)) for each in endpoints]
            for arbiter in arbiters:
                ending.callback(arbiter.close)
            ending.callback(self._end_workers)
            self._start_workers(endpoints, options)
            pool.open(wait=True)
            self._wait_until(lambda: all(worker.ready or not worker.alive for worker in self._workers))
            gpus = " + ".join(map(str, SIZES))
            self._say(f"{self._asked} jobs, {WORKERS * THREADS} at a time, want one of {gpus} GPUs each")
            director = threading.Thread(
                target=self._direct,
                args=(pool, arbiters, endpoints[VICTIM].id, fleet[VICTIM]),
                name="gpupool-demo-director",
                daemon=True,
            )
            # Before the fleet ends: it must not start a server that the fleet has just stopped.
            ending.callback(director.join, RESERVE / 4)
            ending.callback(self._stop.set)
            director.start()
            self._look_on(pool, director, watch)
            # Before the workers end, which would give back whatever was forgotten.
            leaked = self._leaked(arbiters)
            if not self._failed:
                self._say(f"all {self._done} jobs are done", "good")
            if watch is not None:
                watch(self._view(pool.status()))
            return self._result(leaked)

    def _start_workers(self, endpoints: Sequence[Endpoint], options: Mapping[str, Any]) -> None:
        settings = {
            "endpoints": {each.id: each.url for each in endpoints},
            "options": {**options, "lease_store": LEASE_STORE},
            "threads": THREADS,
            "patience": self._limit,
        }
        for number in range(1, WORKERS + 1):
            worker = _Worker(number, settings)
            self._workers.append(worker)
            threading.Thread(
                target=self._listen, args=(worker,), name=f"gpupool-demo-listener-{number}", daemon=True
            ).start()

    def _end_workers(self) -> None:
        self._stop.set()
        with self._lock:
            self._ending = True
        for worker in self._workers:
            worker.send(None)
        end = Deadline.after(RESERVE / 4)
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(end.remaining())
            worker.end()

    def _look_on(self, pool: GPUPool, director: threading.Thread, watch: Callable[[View], None] | None) -> None:
        while not self._finished() or director.is_alive():
            if self._deadline.passed():
                raise DemoOverdue(
                    f"not done within {self._limit:g} s, so it was ended: "
                    f"{self._done} of {self._asked} jobs done, and {self._missing()}"
                )
            self._hand_out()
            if watch is not None:
                watch(self._view(pool.status()))
            self._stop.wait(TICK)

    def _missing(self) -> str:
        lost = [orphan.gpu for orphan in self._orphans.values() if orphan.back_after is None]
        if lost:
            return f"{', '.join(lost)} of the killed {self._killed_worker} did not come back"
        if self._killed is not None and self._recovered_at is None:
            return "the killed server was not back"
        if self._recovered_at is not None and not self._began_after_recovery:
            return "the killed server was back, but got no job"
        return "jobs were left"

    def _leaked(self, arbiters: Sequence[HTTPStore]) -> int:
        """Leases that are left when all jobs are done; what a dead server was not told ends with its ttl."""
        left = 0

        def none_left() -> bool:
            nonlocal left
            left = len(_leases(arbiters))
            return not left

        self._wait_until(none_left, Deadline.after(self._deadline.within(self._ttl + 1.0)))
        return left

    def _say(self, text: str, mood: Mood = "say") -> None:
        with self._lock:
            self._events.append(Event(time.monotonic() - self._begin, text, mood))

    # -- the jobs ----------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give jobs to workers that have room."""
        orders: list[tuple[_Worker, _Job]] = []
        with self._lock:
            while not self._stop.is_set():
                free = [each for each in self._workers if each.ready and each.alive and len(each.jobs) < THREADS]
                job = self._next_job() if free else None
                if job is None:
                    break
                worker = min(free, key=lambda each: len(each.jobs))
                worker.jobs[job.number] = job
                orders.append((worker, job))
        for worker, job in orders:
            worker.send({"job": job.number, "seconds": job.seconds})

    def _next_job(self) -> _Job | None:
        if self._again:
            return self._again.popleft()
        # Until the worker dies there must be jobs in the middle of which it can.
        enough = self._given >= self._asked * (1 - HELD_BACK) and self._killed_worker is not None
        if enough and not (self._accidents_over and self._given < self._asked) and not self._more_needed():
            return None
        if self._director_failed and self._given >= self._asked:
            return None
        self._given += 1
        length = self._mean * random.Random(f"{self._seed}-{self._given}").uniform(0.5, 1.5)  # noqa: S311
        return _Job(self._given, length)

    def _more_needed(self) -> bool:
        """Whether what was killed is still to show that it serves again."""
        if self._director_failed or not self._accidents_over or self._deadline.passed():
            return False
        return self._began_after_recovery < WANTED_AFTER_RECOVERY or any(
            orphan.back_after is None for orphan in self._orphans.values()
        )

    def _finished(self) -> bool:
        with self._lock:
            if not any(worker.alive for worker in self._workers):
                self._stop.set()
                return True
            left = self._again or any(worker.jobs for worker in self._workers)
            return not left and self._given >= self._asked and not self._more_needed()

    # -- the workers' notes ------------------------------------------------------------------------------------

    def _listen(self, worker: _Worker) -> None:
        for note in worker.notes():
            with self._lock:
                self._noted(worker, note)
            self._hand_out()
        status = worker.process.wait()
        with self._lock:
            self._bury(worker, time.monotonic())
            worker.alive = False
            worker.gone.set()
            if not worker.killed and not self._ending:
                self._failed += 1
                self._say(f"{worker.name} ended by itself, with status {status}{worker.last_words()}", "bad")
        self._hand_out()

    def _noted(self, worker: _Worker, note: Mapping[str, Any]) -> None:
        what = note["note"]
        if what == "ready":
            worker.ready = True
            return
        number = note["job"]
        if what == "begin":
            worker.holds[number] = hold = _Hold(note["key"], note["gpu"], note["endpoint"], note["at"])
            self._began(number, hold)
            return
        if what == "end":
            self._ended(worker.holds[number], note["at"])
            return
        job = worker.jobs.pop(number)
        ended = worker.holds.pop(number, None)
        if what == "done" and ended is not None:
            self._done += 1
            self._waits.append(note["waited"])
            self._per_endpoint[ended.endpoint_id] = self._per_endpoint.get(ended.endpoint_id, 0) + 1
            self._after_recovery += self._is_after_recovery(ended)
        elif what == "lost":
            self._run_again += 1
            self._again.append(job)
            self._say(f"job {number} lost its GPU and is run again")
        elif not self._stop.is_set():
            self._failed += 1
            self._say(f"job {number} failed: {note.get('why')}", "bad")

    def _began(self, number: int, hold: _Hold) -> None:
        orphan = self._orphans.get(hold.key)
        if orphan is not None and orphan.back_after is None and hold.begin >= orphan.since:
            orphan.back_after = hold.begin - orphan.since
            left = sum(each.back_after is None for each in self._orphans.values())
            if not left:
                self._say(
                    f"its GPUs were seen empty, and others have them: {self._back_after():.1f} s after it", "good"
                )
        if self._is_after_recovery(hold):
            self._began_after_recovery += 1
            self._first_after_recovery = self._first_after_recovery or number

    def _ended(self, hold: _Hold, at: float) -> None:
        self._holds.add(hold.key, hold.begin, at)
        hold.begin = float("inf")  # entered

    def _bury(self, worker: _Worker, died_at: float) -> None:
        """Its jobs are for others, its GPUs nobody's."""
        worker.died_at = died_at
        worker.left_jobs = sorted(worker.jobs)
        if worker.killed:
            for hold in worker.holds.values():
                self._orphans[hold.key] = _Orphan(hold.gpu, died_at)
            self._run_again += len(worker.jobs)
        for hold in worker.holds.values():
            if hold.begin < died_at:
                self._ended(hold, died_at)
        worker.holds.clear()
        self._again.extend(worker.jobs.values())
        worker.jobs.clear()

    def _is_after_recovery(self, hold: _Hold) -> bool:
        """Whether the job runs on the killed server after its return: nobody grants there while it is dead."""
        return hold.endpoint_id == self._killed and self._restarted_at is not None and hold.begin >= self._restarted_at

    def _back_after(self) -> float | None:
        times = [orphan.back_after for orphan in self._orphans.values()]
        return None if not times or None in times else max(each for each in times if each is not None)

    # -- the accidents -----------------------------------------------------------------------------------------

    def _direct(self, pool: GPUPool, arbiters: Sequence[HTTPStore], victim: str, server: FakeServer) -> None:
        try:
            if self._kill_a_worker(pool, arbiters) and self._kill_a_server(pool, victim, server):
                with self._lock:
                    self._accidents_over = True
                if self._wait_until(lambda: self._first_after_recovery is not None):
                    self._say(f"job {self._first_after_recovery} is the first on {victim} since", "good")
        except Exception as exc:
            self._director_failed = True
            if not self._stop.is_set():
                self._failed += 1
                self._say(f"the accidents went wrong: {type(exc).__name__}: {exc}", "bad")

    def _kill_a_worker(self, pool: GPUPool, arbiters: Sequence[HTTPStore]) -> bool:
        """Kill -9 the one that has most GPUs, and see its leases end; whether they did in time."""
        if not self._wait_until(lambda: self._done * 6 >= self._asked and any(each.holds for each in self._workers)):
            return False
        while not self._orphans:
            with self._lock:
                worker = max((each for each in self._workers if each.alive), key=lambda each: len(each.holds))
                worker.killed = True
                self._killed_worker = worker.name
            worker.process.kill()
            # What it noted last may still be in the pipe.
            if not worker.gone.wait(self._deadline.within(PATIENCE)):
                return False
            jobs = _listed([str(number) for number in worker.left_jobs])
            self._say(f"{worker.name} is killed (kill -9) amid its jobs {jobs or '(none)'}", "bad")
            self._expect_back(worker, _leases(arbiters), pool)
        self._say(f"it had {_listed([orphan.gpu for orphan in self._orphans.values()])}", "bad")
        self._say(f"others do its jobs; nobody renews its leases, so they end (ttl {self._ttl:g} s)")
        return self._wait_until(lambda: not any(_is_of(worker, lease) for lease in _leases(arbiters)), tick=TICK)

    def _expect_back(self, worker: _Worker, leases: Sequence[LeaseInfo], pool: GPUPool) -> None:
        """Also what it had leased, and had no time to say so."""
        names = {card.uuid: card.global_gpu_id for card in pool.status().gpus}
        with self._lock:
            for lease in leases:
                if _is_of(worker, lease):
                    for key in lease.cards:
                        self._orphans.setdefault(key, _Orphan(names.get(key, key), worker.died_at))

    def _kill_a_server(self, pool: GPUPool, victim: str, server: FakeServer) -> bool:
        """Kill it, and start it again; whether it was back in time."""
        if not self._wait_until(lambda: self._done * 3 >= self._asked or self._given == self._done):
            return False
        begin = time.monotonic()
        self._killed = victim
        server.kill()
        self._say(f"{victim} is killed; its jobs go on, new ones go elsewhere", "bad")
        if not self._wait_until(lambda: self._seen(pool, victim).breaker != "closed"):
            return False
        self._say(f"the pools notice after {time.monotonic() - begin:.1f} s: {victim} gets no jobs", "bad")
        end = Deadline.after(OUTAGE)
        if not self._wait_until(end.passed):
            return False
        self._say(f"{victim} is started again; it knows its leases")
        begin = self._restarted_at = time.monotonic()
        server.restart(self._deadline.within(PATIENCE))
        if not self._wait_until(lambda: self._back(self._seen(pool, victim))):
            return False
        self._recovered_at = time.monotonic()
        back_after = self._recovered_at - begin
        self._say(f"{victim} answers again after {back_after:.1f} s and gets jobs, few at first", "good")
        return True

    def _wait_until(self, condition: Callable[[], bool], end: Deadline | None = None, *, tick: float = 0.02) -> bool:
        """Whether it came true before the time was over."""
        end = end or self._deadline
        while not condition():
            if end.passed() or self._stop.wait(tick):
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
            alive = [worker.alive for worker in self._workers]
            given = sum(len(worker.jobs) for worker in self._workers)
            jobs = {hold.key: number for worker in self._workers for number, hold in worker.holds.items()}
            orphaned = {key for key, orphan in self._orphans.items() if orphan.back_after is None}
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
                Place(card.local_gpu_id, jobs.get(card.uuid or card.global_gpu_id), card.uuid in orphaned)
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
            waiting=given - len(jobs),
            events=events,
            workers=alive,
        )

    def _result(self, leaked: int) -> Result:
        with self._lock:
            waits = sorted(self._waits)
            return Result(
                jobs_done=self._done,
                jobs_failed=self._failed,
                jobs_run_again=self._run_again,
                double_holds=self._holds.overlaps(),
                leaked=leaked,
                killed_worker=self._killed_worker,
                gpus_of_killed_worker=[orphan.gpu for orphan in self._orphans.values()],
                gpus_back_after_s=self._back_after(),
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


def _leases(arbiters: Iterable[HTTPStore]) -> list[LeaseInfo]:
    """What the servers that answer say."""
    found: list[LeaseInfo] = []
    for arbiter in arbiters:
        with contextlib.suppress(LeaseStoreError):
            found += arbiter.leases()
    return found


def _is_of(worker: _Worker, lease: LeaseInfo) -> bool:
    return lease.holder.pid == worker.process.pid


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
