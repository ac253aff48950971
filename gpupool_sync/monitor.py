"""Who is polled when: one schedule, one thread that keeps it, executors that do the blocking.

The scheduling thread never does I/O.  Every command to it goes through `_Commands`, which holds no lock while it takes
one, so Ctrl-C in a caller cannot leave a lock of the schedule held.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Union

from gpupool_sync.clock import Deadline
from gpupool_sync.counting import POLL_BOUNDS, Durations, summary
from gpupool_sync.discovery import Found, Watch
from gpupool_sync.endpoint import TURN_PATIENCE, PolledEndpoint
from gpupool_sync.errors import EndpointUnavailable, GPUPoolError
from gpupool_sync.models import Snapshot
from gpupool_sync.starting import start
from gpupool_sync.transport import NoTurn

logger = logging.getLogger(__name__)

#: Polls of answering endpoints that run at the same time. Measured with 1000 endpoints at 20 ms: 64 take 0.66 to 0.85
#: of the time of 32 for the same processor time.
FAST_LANE = 64
#: Probes of sick endpoints that run at the same time.
SICK_LANE = 4
#: A poll that takes longer than this many seconds leaves its lane's count, so that it cannot starve the others: when 50
#: of 1000 new endpoints say nothing, they hold nearly the whole lane for so long.
SLOW = 0.1
#: Threads per lane, slow ones included.
MAX_THREADS = {"fast": 128, "sick": 32}
#: The longest sleep of the scheduling thread, seconds: what nobody pokes for is noticed after this.
TICK = 1.0
#: Nudges (a release wants a new reading) cause polls at least so many seconds apart.
NUDGE_GAP = 0.5
#: The first reading waits for stragglers so many seconds after the first answer.
STRAGGLERS = 0.25


# Not the generator of `random`, whose state programs set, and forked ones share.
_chance = random.SystemRandom().random

#: What is on the schedule: endpoints, and sources of endpoints.
Polled = Union[PolledEndpoint, Watch]  # noqa: UP007 - an alias that runs on Python 3.10


class _Commands:
    """
    What other threads want of the scheduling thread.

    Not `queue.SimpleQueue`: up to Python 3.12 its ``get(timeout)`` waits for ever if the time ends while the process is
    stopped and the thread is the one that the next signal falls to (Ctrl-C right after SIGCONT).  Not `queue.Queue`,
    whose lock an interrupt can leave taken.
    """

    __slots__ = ("_news", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        # Guards nothing: released when there is something to do, it wakes who waits.
        self._news = threading.Lock()
        self._news.acquire()

    def put(self, command: Callable[[], None]) -> None:
        """From any thread. An interrupt in between leaves it to the next look, `TICK` seconds later at most."""
        self._waiting.append(command)
        with contextlib.suppress(RuntimeError):  # there is something to do already
            self._news.release()

    def wait(self, timeout: float) -> None:
        """Until there is something to do, or *timeout* seconds."""
        if not self._waiting:
            self._news.acquire(timeout=timeout)

    def pause(self, timeout: float) -> None:
        """So many seconds, unless something comes that was not there before."""
        self._news.acquire(timeout=timeout)

    def take(self) -> Iterator[Callable[[], None]]:
        """All that there is, one by one; what is not taken stays."""
        with contextlib.suppress(IndexError):  # nothing is left; another thread may take as well, when all ends
            while True:
                yield self._waiting.popleft()


class _Entry:
    """The schedule's view of one endpoint or source; touched by the scheduling thread only."""

    __slots__ = (
        "asked",
        "began",
        "due",
        "early",
        "endpoint",
        "lane",
        "next_round",
        "not_before",
        "nudged",
        "queued",
        "round",
        "run",
        "running",
        "watched",
    )

    def __init__(self, endpoint: Polled) -> None:
        self.endpoint = endpoint
        self.due = math.inf  # time.monotonic()
        self.began = 0.0  # of the last poll
        self.asked: float | None = None  # when another poll is wanted, asked for while one was under way
        self.nudged = False  # written by any thread: a nudge is under way, another one would change nothing
        self.not_before = 0.0  # the server asked to be left alone until then
        self.run: object = None  # the poll that is under way; another one than this is out of date
        self.running = False
        self.watched = True  # polled again and again; otherwise when somebody asks
        self.early = 2  # so many polls still come early, at random
        self.queued = False
        self.lane = "fast"
        # Who waits for the poll that is under way, and who for the one after it: a caller of refresh() must not be
        # served by an answer that may be older than its call.
        self.round: list[Future[None]] = []
        self.next_round: list[Future[None]] = []


class _Lane:
    """A bounded number of polls at a time; the slow ones do not count."""

    def __init__(self, name: str, width: int, threads: int, prefix: str) -> None:
        self.width = width
        self.threads = threads
        self.backlog: deque[_Entry] = deque()
        self.started: dict[str, float] = {}  # endpoint id -> time.monotonic(), the oldest first
        self.executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=f"{prefix}-{name}")

    def free(self, now: float) -> bool:
        if len(self.started) < self.width:
            return True
        if len(self.started) >= self.threads:
            return False
        slow = sum(1 for _ in itertools.takewhile(lambda begin: now - begin >= SLOW, self.started.values()))
        return len(self.started) - slow < self.width

    def oldest_quick(self, now: float) -> float | None:
        """When the oldest poll began that still counts."""
        return next((begin for begin in self.started.values() if now - begin < SLOW), None)


class Monitor:
    """
    Polls every endpoint when it is due and hands each snapshot on as it arrives; likewise sources of endpoints.

    *on_snapshot*, *on_found* and *on_failure* are called on worker threads, *housekeeping* on the scheduling thread at
    least every `TICK` seconds; neither may block.  *housekeeping* returns False to say that nobody needs the monitor
    any more.
    """

    def __init__(
        self,
        endpoints: Iterable[Polled],
        *,
        on_snapshot: Callable[[Snapshot], None],
        on_failure: Callable[[Polled], None],
        on_found: Callable[[Found], None] = lambda found: None,
        housekeeping: Callable[[], bool],
        name: str,
        unwatched: Collection[str] = (),
    ) -> None:
        self._on_snapshot = on_snapshot
        self._on_failure = on_failure
        self._on_found = on_found
        self._housekeeping = housekeeping
        self._name = name
        self._commands = _Commands()
        self._entries: dict[str, _Entry] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._tiebreak = itertools.count()
        self._stopping = False
        self._lanes: dict[str, _Lane] = {}
        # Guards _thread: there is never more than one scheduling thread.
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._died = False  # the scheduling thread ended though nobody stopped it
        # Guards the four below: additions and copies only.
        self._count_lock = threading.Lock()
        self._polls = 0
        self._poll_seconds = 0.0
        self._window = (0, 0.0)  # what they were when somebody began to count anew
        self._durations = Durations(POLL_BOUNDS)
        self.restarts = 0
        for endpoint in endpoints:
            self._entries[endpoint.id] = entry = _Entry(endpoint)
            entry.watched = endpoint.id not in unwatched

    # -- called from any thread --------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads; the first polls begin at once."""
        self._lanes = {
            "fast": _Lane("poll", FAST_LANE, MAX_THREADS["fast"], self._name),
            "sick": _Lane("probe", SICK_LANE, MAX_THREADS["sick"], self._name),
        }
        for entry in self._entries.values():
            if entry.watched:
                self._schedule(entry, 0.0)
        with self._start_lock:
            self._start_thread_locked()

    def _start_thread_locked(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}-monitor", daemon=True)
        start(thread)
        self._thread = thread  # not before it runs: a thread that is not started yet looks like one that died

    def ensure_running(self) -> None:
        """Restart the scheduling thread if something killed it."""
        # Not Thread.is_alive(): interrupted in the wrong place, it marks a living thread as ended (CPython 3.11).
        if not self._died or self._stopping:
            return
        with self._start_lock:
            if self._died and not self._stopping:
                self._died = False
                self.restarts += 1
                logger.error("the monitor's thread died; starting another one")
                self._start_thread_locked()

    def poll_soon(self, endpoint_ids: Iterable[str]) -> list[Future[None]]:
        """
        Ask for a poll that begins after this call.

        Calls are coalesced: whatever their number, an endpoint is polled at most once more after the poll that is
        under way.  Each future is done when its endpoint has answered or failed.
        """
        futures: list[Future[None]] = []
        wanted: list[tuple[str, Future[None]]] = []
        for endpoint_id in endpoint_ids:
            future: Future[None] = Future()
            futures.append(future)
            wanted.append((endpoint_id, future))
        self._commands.put(lambda: self._want(wanted))
        return futures

    def nudge(self, endpoint_id: str) -> None:
        """
        Say that a new reading would be welcome: for hot paths, without waiting.

        Coalesced, at most one poll each `NUDGE_GAP`; an endpoint that is down keeps its own pace.
        """
        entry = self._entries.get(endpoint_id)
        if entry is not None and not entry.nudged:
            entry.nudged = True
            self._commands.put(lambda: self._nudge(entry))

    def add(self, endpoint: Polled, *, watched: bool = True) -> None:
        """Take an endpoint into the schedule; its first poll begins at once, or when somebody asks."""
        self._commands.put(lambda: self._add(endpoint, watched))

    def watch(self, come: Iterable[str], gone: Iterable[str] = ()) -> None:
        """Poll *come* from now on, at once and at the interval; *gone* only when somebody asks."""
        changes = {**dict.fromkeys(gone, False), **dict.fromkeys(come, True)}
        self._commands.put(lambda: self._watch(changes))

    def remove(self, endpoint_id: str) -> None:
        """Take an endpoint out of the schedule; a poll that is under way ends unheard."""
        self._commands.put(lambda: self._remove(endpoint_id))

    def stop(self, timeout: float = 5.0) -> bool:
        """
        Stop the threads and wait for them up to *timeout* seconds; whether all of them stopped.

        The caller aborts the endpoints' exchanges, so polls under way end soon.
        """
        self._stopping = True
        self._commands.put(lambda: None)
        deadline = Deadline.after(timeout)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(deadline.remaining())
        for lane in self._lanes.values():
            lane.executor.shutdown(wait=False, cancel_futures=True)
        self._settle_everything()
        stuck = [worker for worker in self._workers() if not _joined(worker, deadline)]
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            stuck.append(thread)
        for worker in stuck:
            logger.warning("thread %s did not stop within %g s", worker.name, timeout)
        return not stuck

    def _workers(self) -> list[threading.Thread]:
        prefixes = (f"{self._name}-poll_", f"{self._name}-probe_")
        me = threading.current_thread()
        return [t for t in threading.enumerate() if t is not me and t.name.startswith(prefixes)]

    def threads(self) -> int:
        """How many threads of this monitor are alive."""
        thread = self._thread
        return len(self._workers()) + (1 if thread is not None and thread.is_alive() else 0)

    def stats(self, *, reset: bool = False, all_time: bool = False) -> dict[str, Any]:
        """Polls of the window, which ends with *reset*; or with *all_time* since the beginning, with a histogram."""
        with self._count_lock:
            polls, seconds = self._polls, self._poll_seconds
            before = (0, 0.0) if all_time else self._window
            recent = self._durations.recent(reset=reset)
            histogram = self._durations.histogram() if all_time else {}
            if reset:
                self._window = polls, seconds
        return {
            "polls": polls - before[0],
            "poll_seconds": seconds - before[1],
            "poll": {**summary(sorted(recent)), **histogram},
        }

    # -- the scheduling thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._keep_schedule()
        finally:
            self._died = not self._stopping

    def _keep_schedule(self) -> None:
        while not self._stopping:
            try:
                self._step()
            except Exception:
                # Supervised: an error here must not end all polling. The wait keeps a persistent one from spinning.
                logger.exception("the schedule of the monitor broke; going on")
                self._commands.pause(TICK)

    def _step(self) -> None:
        self._commands.wait(self._sleep())
        for command in self._commands.take():
            command()
        if self._stopping:
            return
        if not self._housekeeping():
            self._stopping = True
            for each in self._entries.values():
                each.endpoint.abort()
            for lane in self._lanes.values():
                lane.executor.shutdown(wait=False, cancel_futures=True)
            self._settle_everything()
            return
        now = time.monotonic()
        while self._heap and self._heap[0][0] <= now:
            due, _, endpoint_id = heapq.heappop(self._heap)
            entry = self._entries.get(endpoint_id)
            if entry is None or entry.due != due or entry.queued or entry.running:
                continue  # removed, rescheduled since, or on its way already
            entry.queued = True
            self._lanes["sick" if entry.endpoint.sick else "fast"].backlog.append(entry)
        for name, lane in self._lanes.items():
            while lane.backlog and lane.free(now):
                self._dispatch(lane.backlog.popleft(), name, now)

    def _sleep(self) -> float:
        now = time.monotonic()
        until = TICK
        if self._heap:
            until = min(until, self._heap[0][0] - now)
        for lane in self._lanes.values():
            if lane.backlog and lane.started:
                # Woken when the oldest quick poll turns slow and makes room.
                quick = lane.oldest_quick(now)
                until = min(until, quick + SLOW - now) if quick is not None else until
        return max(0.0, until)

    def _schedule(self, entry: _Entry, pause: float) -> None:
        entry.due = time.monotonic() + pause
        heapq.heappush(self._heap, (entry.due, next(self._tiebreak), entry.endpoint.id))

    def _dispatch(self, entry: _Entry, lane_name: str, now: float) -> None:
        entry.queued = entry.nudged = False
        entry.running = True
        entry.began = now
        entry.lane = lane_name
        entry.round, entry.next_round = entry.next_round, []
        lane = self._lanes[lane_name]
        lane.started[entry.endpoint.id] = now
        entry.run = run = object()
        try:
            lane.executor.submit(self._poll, entry, run)
        except RuntimeError as exc:
            if "shutdown" in str(exc):
                # The interpreter ends and takes no more work: so do we.
                self._stopping = True
                self._settle_everything()
                return
            # No new thread is to be had (a limit of the container). The work is queued all the same and runs should
            # another worker be free; by then it may be out of date, and notices.
            logger.warning("polls are delayed: %s", exc)
            entry.run = None
            entry.running = False
            lane.started.pop(entry.endpoint.id, None)
            entry.next_round, entry.round = entry.round + entry.next_round, []
            self._schedule(entry, TICK)

    def _want(self, wanted: Sequence[tuple[str, Future[None]]]) -> None:
        for endpoint_id, future in wanted:
            wanting = self._entries.get(endpoint_id)
            if wanting is None or self._stopping:
                future.set_exception(EndpointUnavailable(endpoint_id, "not an endpoint of this pool (any more)"))
                continue
            wanting.next_round.append(future)
            self._bring_forward(wanting, 0.0)

    def _nudge(self, entry: _Entry) -> None:
        if self._entries.get(entry.endpoint.id) is entry and not entry.endpoint.open:
            self._bring_forward(entry, max(entry.began + NUDGE_GAP, entry.not_before))

    def _bring_forward(self, entry: _Entry, at: float) -> None:
        if entry.running:
            entry.asked = at if entry.asked is None else min(at, entry.asked)
        elif not entry.queued and at < entry.due:
            self._schedule(entry, max(0.0, at - time.monotonic()))

    def _add(self, endpoint: Polled, watched: bool) -> None:
        entry = self._entries[endpoint.id] = _Entry(endpoint)
        entry.watched = watched
        if watched:
            self._schedule(entry, 0.0)

    def _watch(self, changes: Mapping[str, bool]) -> None:
        for endpoint_id, watched in changes.items():
            entry = self._entries.get(endpoint_id)
            if entry is None or entry.watched == watched:
                continue
            entry.watched = watched
            if watched:
                self._bring_forward(entry, 0.0)
            elif not entry.next_round:
                entry.due = math.inf

    def _remove(self, endpoint_id: str) -> None:
        entry = self._entries.pop(endpoint_id, None)
        if entry is not None:
            for lane in self._lanes.values():
                if entry in lane.backlog:
                    lane.backlog.remove(entry)
            _settle(entry.next_round)

    def _put_off(self, entry: _Entry, pause: float) -> None:
        """Nothing was asked yet: whoever waits for this poll goes on waiting."""
        self._lanes[entry.lane].started.pop(entry.endpoint.id, None)
        entry.running = False
        entry.asked = None
        entry.next_round, entry.round = entry.round + entry.next_round, []
        if self._entries.get(entry.endpoint.id) is entry:
            self._schedule(entry, pause)
        else:
            _settle(entry.next_round)

    def _done(self, entry: _Entry, begin: float, pause: float, asked: float | None) -> None:
        entry.not_before = 0.0 if asked is None else begin + asked
        self._lanes[entry.lane].started.pop(entry.endpoint.id, None)
        entry.running = False
        elapsed = time.monotonic() - begin
        with self._count_lock:
            self._polls += 1
            self._poll_seconds += elapsed
            self._durations.add(elapsed)
        _settle(entry.round)
        if self._entries.get(entry.endpoint.id) is not entry:
            return
        if entry.early and not entry.endpoint.sick:
            # All are read at the opening. The next polls come up to half an interval early, which spreads them:
            # some reading is always fresh, and a hundred scripts that start together do not go on polling together.
            entry.early -= 1
            pause *= 1.0 - 0.5 * _chance()
        # Counted from the beginning: a slow answer must not stretch the interval, nor cause a burst.
        due = begin + max(pause, asked or 0.0)
        if entry.asked is not None:
            due = min(due, max(entry.asked, entry.not_before))
            entry.asked = None
        elif not entry.watched:
            entry.due = math.inf
            return
        self._schedule(entry, max(0.0, due - time.monotonic()))

    def _settle_everything(self) -> None:
        for entry in list(self._entries.values()):
            _settle(entry.round)
            _settle(entry.next_round)
        # Commands that nobody will run any more may carry futures that somebody waits for.
        for command in self._commands.take():
            command()

    # -- the worker threads ------------------------------------------------------------------------------------

    def _poll(self, entry: _Entry, run: object) -> None:
        if entry.run is not run:
            return
        endpoint = entry.endpoint
        begin = time.monotonic()
        asked: float | None = None
        later: float | None = None
        try:
            result = endpoint.poll()
            if not self._stopping:
                self._on_found(result) if isinstance(result, Found) else self._on_snapshot(result)
        except NoTurn as exc:
            # When it is near enough to be taken, and a little: clocks are read one after the other.
            later = max(0.0, (exc.retry_after or 0.0) - TURN_PATIENCE) + 0.01
        except GPUPoolError as exc:
            asked = exc.retry_after if isinstance(exc, EndpointUnavailable) else None
            if not self._stopping:
                self._on_failure(endpoint)
        except Exception:
            logger.exception("poll of %s broke", endpoint.id)
        finally:
            if later is None:
                pause = endpoint.pause(asked)
                self._commands.put(lambda: self._done(entry, begin, pause, asked))
            else:
                put_off = later
                self._commands.put(lambda: self._put_off(entry, put_off))


def _settle(futures: list[Future[None]]) -> None:
    while futures:
        future = futures.pop()
        if not future.done():
            future.set_result(None)


def _joined(thread: threading.Thread, deadline: Deadline) -> bool:
    thread.join(deadline.remaining())
    return not thread.is_alive()


def wait_for(futures: Sequence[Future[None]], deadline: Deadline, *, enough: Callable[[], bool] | None = None) -> bool:
    """
    Wait until all *futures* are done, or `STRAGGLERS` seconds after *enough* is true; whether all are done.
    """
    pending = set(futures)
    while enough is not None and pending and not deadline.passed():
        if enough():
            deadline = Deadline.after(deadline.within(STRAGGLERS))
            break
        pending = wait(pending, timeout=deadline.remaining(), return_when="FIRST_COMPLETED").not_done
    return not wait(pending, timeout=deadline.remaining()).not_done
