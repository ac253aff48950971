"""Worker processes that own a GPU each: `GPUPool.executor`, and `GPUPool.map` on top of it.

A worker is started by `gpu.popen`, so its lease lives exactly as long as it does, and CUDA sees its one GPU from before
the worker's first import.  It is an interpreter of its own that imports the main module under another name, as the
``spawn`` method of `multiprocessing` does, whose helpers do that here too.

Between us and a worker there are two pipes: pickled tasks go down, an empty message tells it to end; up come, for each
task, an empty message ("begun") and the pickled answer.  Nobody relies on the end of a pipe alone: whatever is forked
here has a copy of our ends.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from multiprocessing import connection, process, spawn
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import attrs

from gpupool_sync.errors import (
    AcquireTimeout,
    ConfigError,
    GPUPoolError,
    LeaseLost,
    PoolClosed,
    RemoteGPUError,
)
from gpupool_sync.starting import start

if TYPE_CHECKING:
    import subprocess

    from gpupool_sync.handle import GPU

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that a worker may take to end after it was told to, and a task after Ctrl-C.
END_TIME = 30.0
#: Seconds between two looks whether a worker lives, and whether anybody still has the executor.
LOOK = 1.0
#: Seconds after which a slot that ended by an error is replaced, as long as there is work.
SLOT_RETRY = 10.0
#: Seconds after which an error of a slot is told again, if it is of the same kind as one before.
TELL_AGAIN = 3600.0
#: Workers in a row that may die before they are ready for a task.
DEATHS_AT_START = 3
#: Seconds without a task after which a worker gives its GPU back.
IDLE_TIMEOUT = 300.0
#: What a worker executes: its mask is in its environment, as it was started with it, before anything is imported.
_BOOT = (
    "import sys; sys.path[:] = sys.argv.pop().split('\\n'); "
    "from gpupool_sync.executor import serve; serve(*map(int, sys.argv[1:]))"
)
_END = b""

_numbers = itertools.count(1)


class Acquiring(Protocol):
    """``pool.gpu(…)``."""

    def __enter__(self) -> GPU: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...
    def cancel(self) -> None: ...


class Pool(Protocol):
    """The pool, as an executor sees it."""

    @property
    def gpu(self) -> Callable[..., Any]: ...
    def cards_known(self) -> int: ...


class WorkerDied(BrokenExecutor, GPUPoolError):
    """The process that ran a task ended before it had a result; the others are not concerned."""


class WorkersBroken(BrokenExecutor, GPUPoolError):
    """No worker can be started: what it does before its first task fails. `__cause__` says how, if it was an error."""


class _Remote(Exception):
    """The traceback of a worker, as the cause of what it raised."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text}"


class GPUExecutor(Executor):
    """
    A `concurrent.futures.Executor` whose every worker process owns one GPU; made by `GPUPool.executor`.

    Workers are started as tasks come, up to *max_workers* and as GPUs come free, and keep their GPU until `shutdown`,
    or until they had nothing to do for *idle_timeout*.  A worker that dies costs its task (`WorkerDied`); its GPU is
    given back and another worker takes its place.  What a task leaves running ends with its worker.

    Tasks and results must pickle.  What is defined in a notebook needs ``cloudpickle``, which is used if it is there.

    ``with`` waits for all tasks, as every executor does; Ctrl-C in the block cancels those that have not begun and
    interrupts the others.
    """

    def __init__(
        self,
        pool: Pool,
        max_workers: int | None = None,
        *,
        mp_context: str = "spawn",
        initializer: Callable[..., object] | None = None,
        initargs: Sequence[Any] = (),
        max_tasks_per_child: int | None = None,
        idle_timeout: float | None = IDLE_TIMEOUT,
        **request: Any,
    ) -> None:
        for name, number in (("max_workers", max_workers), ("max_tasks_per_child", max_tasks_per_child)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ConfigError(f"{name}={number!r}: a whole number of at least 1 is allowed, or None")
        if idle_timeout is not None and (
            isinstance(idle_timeout, bool)
            or not isinstance(idle_timeout, (int, float))
            or not 0 <= idle_timeout <= sys.float_info.max
        ):
            raise ConfigError(f"idle_timeout={idle_timeout!r}: seconds of at least 0 are allowed, or None for never")
        if mp_context != "spawn":
            raise ConfigError(
                f"mp_context={mp_context!r}: 'spawn' is allowed; a forked child has what its parent imported, and CUDA "
                "that was initialised there does not work in it"
            )
        if initializer is not None and not callable(initializer):
            raise ConfigError(f"initializer={initializer!r}: a function is allowed")
        pool.gpu(**request)  # acquires nothing; what cannot be asked for is said here, and not by every task
        self._crew = _Crew(
            pool,
            request,
            max_workers,
            max_tasks_per_child,
            idle_timeout,
            None if initializer is None else _dump((initializer, tuple(initargs), {})),
        )
        # The workers' threads have the crew, not us: who drops an executor, as a notebook cell that is run again
        # does, shall not leave the GPUs taken.
        self._crew.owner = weakref.ref(self)
        _crews.add(self._crew)
        _register_exit_hook()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """
        Run ``fn(*args, **kwargs)`` in a worker, on its GPU.

        Raises:
            RuntimeError: after `shutdown`, or in a forked child.
            PoolClosed: the pool of this executor was closed.
            WorkersBroken: the initializer failed.
            GPUPoolError: the task cannot be pickled.
        """
        if getattr(process.current_process(), "_inheriting", False):
            raise RuntimeError(
                "a worker imports the main module, which began to submit tasks there; put that below "
                "if __name__ == '__main__':"
            )
        task = _dump((fn, args, kwargs))
        _require_importable(task)
        return self._crew.submit(_Work(task, getattr(fn, "__qualname__", None) or repr(fn)))

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """
        Like `concurrent.futures.Executor.map`; a worker is sent *chunksize* items at a time.

        Args:
            timeout: seconds from this call until the last result may be asked for.

        Raises:
            TimeoutError: (while iterating) a result did not come in time; what has not begun is cancelled.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be at least 1")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        chunks = super().map(functools.partial(_chunk, fn), _chunks(chunksize, *iterables), timeout=timeout)
        return itertools.chain.from_iterable(chunks)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """
        End the workers when the tasks are done, and give their GPUs back.

        Args:
            wait: return only when all of that has happened.
            cancel_futures: cancel the tasks that no worker has begun.
        """
        self._crew.end(cancel=cancel_futures)
        if wait:
            self._crew.join()

    def terminate_workers(self) -> None:
        """End all workers at once, and with them what they do (`WorkerDied`); cancel what they have not begun."""
        self._crew.end(cancel=True)
        self._crew.signal(signal.SIGKILL, "by terminate_workers()")
        self._crew.join()

    def __repr__(self) -> str:
        return f"<GPUExecutor with workers on {', '.join(gpu for gpu, _ in self.workers) or 'no GPU yet'}>"

    @property
    def workers(self) -> list[tuple[str, int]]:
        """Global GPU id and process id of each worker that runs."""
        return self._crew.workers()

    def pool_closed(self) -> None:
        """The pool was closed: tasks that no worker has begun fail with `PoolClosed`, workers end with their task."""
        self._crew.fail_all(lambda: PoolClosed("the pool of this executor is closed"), for_ever=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._crew.interrupt()
        else:
            self.shutdown()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an executor belongs to its process and cannot be passed to a task; submit from here, for instance with "
            "what a task returned"
        )


@attrs.define(eq=False)
class _Work:
    task: bytes
    what: str
    again: bool = False  # a worker was sent it and died before it began


class _Crew:
    """The slots of an executor, and the tasks they have not begun."""

    def __init__(
        self,
        pool: Pool,
        request: dict[str, Any],
        max_workers: int | None,
        max_tasks: int | None,
        idle_timeout: float | None,
        initializer: bytes | None,
    ) -> None:
        self.pool = pool
        self.request = request
        self.max_tasks = max_tasks
        self.idle_timeout = idle_timeout
        self.initializer = initializer
        # A script that has ended has no __file__ any more, while its tasks are still to be done.
        self._main = _preparation("")
        self.owner: Callable[[], object] = lambda: self
        self._max_workers = max_workers
        self._pid = os.getpid()
        # Guards what follows, and the flags of the slots; never held while a GPU is acquired, a worker is talked to or
        # a callback of a future may run. The condition says that there is work, or that the end has come; its waiters
        # look again by themselves (LOOK), as an interrupt may cost a notification.
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._queue: OrderedDict[Future[Any], _Work] = OrderedDict()
        self._slots: set[_Slot] = set()
        self._ending = False
        self._refuse: Callable[[], BaseException] | None = None
        self._deaths = 0  # in a row, of workers that were not ready yet
        self._gpus = 0  # known when slots were last started
        self._again_at = math.inf  # time.monotonic(): when slots are started in place of those that failed
        self._told: dict[tuple[type, int | None], float] = {}  # kinds of errors of slots -> when they were told last

    # -- from outside ------------------------------------------------------------------------------------------

    def submit(self, work: _Work) -> Future[Any]:
        if self._pid != os.getpid():
            raise RuntimeError(
                f"this executor belongs to process {self._pid}, of which this one is a fork; make another"
            )
        future: Future[Any] = Future()
        future.add_done_callback(self._forget_cancelled)
        queued = False
        try:
            with self.lock:
                if self._refuse is not None:
                    raise self._refuse()
                if self._ending:
                    raise RuntimeError("cannot schedule new futures after shutdown")
                queued = True
                self._queue[future] = work
                self._changed.notify()
            self.start_slots()
        except BaseException as exc:
            # Without a thread the others do it, if there are any. After an interrupt nobody has the future, so nobody
            # shall.
            no_thread = queued and isinstance(exc, RuntimeError)
            with self.lock:
                others = no_thread and self._slots
                taken_back = not others and self._queue.pop(future, None) is not None
            if taken_back or not no_thread:
                raise
        return future

    def _forget_cancelled(self, future: Future[Any]) -> None:
        if not future.cancelled():
            return
        with self.lock:
            mine = self._queue.pop(future, None) is not None
        if mine:
            future.set_running_or_notify_cancel()  # or concurrent.futures.wait() would wait for it for ever
            self._dismiss()

    def end(self, *, cancel: bool = False) -> None:
        """Take no more tasks; with *cancel*, not even those that are queued."""
        if self._pid != os.getpid():
            return  # a forked child leaves the parent's `with` block: the workers are not its own
        with self.lock:
            self._ending = True
            self._changed.notify_all()
            queued = list(self._queue) if cancel else []
        for future in queued:
            future.cancel()
        self._dismiss()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of all slots; whether it has come within *timeout* seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._pid == os.getpid():
            # Again and again: what has a GPU may start others, as long as there are tasks.
            with self.lock:
                threads = [slot.thread for slot in self._slots if slot.thread is not threading.current_thread()]
            if not threads:
                break
            threads[0].join(None if end is None else max(0.0, end - time.monotonic()))
            if threads[0].is_alive():
                return False
        return True

    def interrupt(self) -> None:
        """Ctrl-C: what runs is interrupted, what does not end then is killed, the rest is cancelled."""
        self.end(cancel=True)
        self.signal(signal.SIGINT, "by an interrupt")
        if not self.join(END_TIME):
            self.signal(signal.SIGKILL, "by an interrupt")
            self.join()

    def signal(self, number: int, why: str) -> None:
        if self._pid != os.getpid():
            return
        with self.lock:
            slots = list(self._slots)
        for slot in slots:
            slot.signal(number, why)

    def workers(self) -> list[tuple[str, int]]:
        with self.lock:
            found = [slot.worker for slot in self._slots if slot.worker is not None]
        return [(worker.gpu_id, worker.pid) for worker in found] if self._pid == os.getpid() else []

    def fail_all(self, error: Callable[[], BaseException], *, for_ever: bool) -> None:
        """What no worker has begun fails; *for_ever*: so does what is submitted from now on."""
        if self._pid != os.getpid():
            return
        with self.lock:
            if for_ever:
                self._refuse = self._refuse or error
                self._ending = True
            failed = list(self._queue.items())
            self._queue.clear()
            self._changed.notify_all()
        for future, work in failed:
            if work.again or future.set_running_or_notify_cancel():
                future.set_exception(error())
        self._dismiss()

    # -- from the slots ----------------------------------------------------------------------------------------

    def told_first(self, name: str) -> bytes:
        """What makes a worker of a process."""
        return pickle.dumps(({**self._main, **_preparation(name)}, self.initializer))

    def start_slots(self) -> None:
        """As many as there is work for, GPUs for, and leave for."""
        gpus = self.pool.cards_known()
        limit = max(1, gpus) if self._max_workers is None else self._max_workers
        while True:
            slot = _Slot(self)
            # Started under the lock, or somebody might join it before; a new thread does not take it so early.
            with self.lock:
                self._gpus, self._again_at = gpus, math.inf
                if len(self._slots) >= limit or len(self._queue) <= sum(not each.busy for each in self._slots):
                    return
                try:
                    self._slots.add(slot)
                    start(slot.thread)
                except BaseException:
                    self._slots.discard(slot)  # if it runs all the same, it adds itself
                    self._again_at = time.monotonic() + SLOT_RETRY
                    raise

    def grow(self) -> None:
        """
        Start slots for GPUs that have come since, and in place of those that failed. While a task runs: raises nothing.

        All tasks may be submitted by then, and all slots run long ones: nothing else would.
        """
        try:
            more = self._max_workers is None and self.pool.cards_known() > self._gpus
            if (more or time.monotonic() >= self._again_at) and self.has_work():
                self.start_slots()
        except Exception as exc:  # no thread to be had, no memory
            logger.info("an executor starts no further worker for now: %s", exc)

    def begin(self, slot: _Slot) -> None:
        with self.lock:
            self._slots.add(slot)

    def goes_on(self, slot: _Slot) -> bool:
        """Whether the slot is to acquire a GPU; if not, it is one of us no more: work that comes needs another."""
        with self.lock:
            if self._queue and not slot.cancelled:
                return True
            self._slots.discard(slot)
            return False

    def has_work(self) -> bool:
        with self.lock:
            return bool(self._queue)

    def take(self, slot: _Slot, worker: _Worker) -> tuple[Future[Any], _Work] | None:
        """The next task; None when the worker is to end."""
        end = None if self.idle_timeout is None else time.monotonic() + self.idle_timeout
        with self._changed:
            slot.busy = False
            while slot.why is None and worker.lives():
                if self._queue:
                    future, work = self._queue.popitem(last=False)
                    if work.again or future.set_running_or_notify_cancel():
                        slot.busy = True
                        break
                    continue
                now = time.monotonic()
                if self._ending or self.owner() is None or (end is not None and now >= end):
                    return None
                self._changed.wait(LOOK if end is None else min(LOOK, end - now))
            else:
                return None
        self._dismiss()
        return future, work

    def put_back(self, future: Future[Any], work: _Work) -> None:
        """The worker died before it began this."""
        work.again = True
        with self.lock:
            self._queue[future] = work
            self._queue.move_to_end(future, last=False)
            self._changed.notify()

    def not_busy(self, slot: _Slot) -> None:
        # Before the result is known: who submits the next task then shall find this worker, and start no other.
        with self.lock:
            slot.busy = False

    def ready(self) -> None:
        with self.lock:
            self._deaths = 0

    def died_at_start(self, how: str) -> None:
        with self.lock:
            self._deaths += 1
            too_many = self._deaths >= DEATHS_AT_START
        logger.warning("%s before it was ready for a task", how)
        if too_many:
            self.fail_all(
                lambda: WorkersBroken(f"{how} before it was ready for a task, as others before"), for_ever=True
            )

    def gone(self, slot: _Slot, error: BaseException | None) -> None:
        with self.lock:
            self._slots.discard(slot)
            last = not self._slots
        if error is None:
            return
        if last or isinstance(error, PoolClosed):
            # No GPU can be had for any task.
            self.fail_all(lambda: error, for_ever=False)
            return
        for_good = isinstance(error, (RemoteGPUError, ConfigError))
        kind = type(error), getattr(error, "errno", None)  # not the text, which may name a file that is new each time
        now = time.monotonic()
        with self.lock:
            news = now >= self._told.get(kind, -math.inf) + TELL_AGAIN
            if news:
                self._told[kind] = now
            if not for_good:
                self._again_at = now + SLOT_RETRY
        level = logging.WARNING if news and not isinstance(error, AcquireTimeout) else logging.INFO
        how = "" if for_good else f" for {SLOT_RETRY:g} s"
        logger.log(level, "an executor does with one worker less%s: %s", how, error)

    def _dismiss(self) -> None:
        """At the end nobody shall wait for a GPU for which there is no task."""
        with self.lock:
            if not self._ending or self._queue:
                return
            useless = [slot for slot in self._slots if slot.worker is None]
        for slot in useless:
            slot.cancel()


class _Slot:
    """One worker at a time, and the thread that acquires for it and talks to it."""

    def __init__(self, crew: _Crew) -> None:
        self._crew = crew
        self.busy = False  # with a task
        self.cancelled = False  # is to wait for no GPU any more
        self.why: str | None = None  # the worker was ended from here
        self.worker: _Worker | None = None
        self._acquiring: Acquiring | None = None
        self.thread = threading.Thread(target=self._run, name=f"gpupool-executor-{next(_numbers)}", daemon=True)

    def cancel(self) -> None:
        """Wait for no GPU any more."""
        self.cancelled = True  # before the look: the thread may just be about to begin
        acquiring = self._acquiring
        if acquiring is not None:
            acquiring.cancel()

    def signal(self, number: int, why: str) -> None:
        """To the worker and all that it started."""
        self.why = self.why or why
        worker = self.worker
        if worker is not None:
            worker.signal(number)

    def _lost(self, gpu: Any) -> None:
        """The lease is gone, so nobody of ours may compute there. On a thread of the pool's: nothing is waited for."""
        try:
            gpu.check()
        except LeaseLost as exc:
            self.signal(signal.SIGKILL, f"because {exc}")
        told = self._crew.request.get("on_lost")
        if told is not None:
            told(gpu)

    def _run(self) -> None:
        crew, error = self._crew, None
        crew.begin(self)
        try:
            while crew.goes_on(self):
                self._with_a_gpu()
        except BaseException as exc:
            error = exc
        finally:
            crew.gone(self, error)

    def _with_a_gpu(self) -> None:
        crew = self._crew
        self.why = None
        acquiring: Acquiring = crew.pool.gpu(**{**crew.request, "on_lost": self._lost})
        self._acquiring = acquiring
        try:
            if self.cancelled:
                return
            with acquiring as gpu:
                if not crew.has_work():  # others were faster
                    return
                with contextlib.suppress(RuntimeError):  # no thread to be had
                    crew.start_slots()  # now it is known how many GPUs there are
                self._use(gpu)
        except PoolClosed:
            if not self.cancelled:
                raise
        except LeaseLost as exc:
            logger.warning("no worker was started: %s", exc)
        except RemoteGPUError:
            raise RemoteGPUError(
                "the workers of an executor run on this machine, where the pool has no GPU; run this script on the "
                "machine that has them"
            ) from None
        finally:
            self._acquiring = None

    def _use(self, gpu: GPU) -> None:
        """Have a worker on *gpu* do tasks until it dies, has done its share, or has nothing to do."""
        crew = self._crew
        worker = _Worker(gpu, crew.told_first(f"gpupool-worker-{gpu.global_gpu_id}"), crew.grow)
        try:
            self.worker = worker
            if self.why is not None:  # in between
                worker.signal(signal.SIGKILL)
            if not self._ready(worker):
                return
            done = 0
            while crew.max_tasks is None or done < crew.max_tasks:
                taken = crew.take(self, worker)
                if taken is None:
                    return
                done += 1
                alive = self._do(worker, *taken)
                del taken  # the result is the caller's to keep
                if not alive:
                    return
        finally:
            worker.end()
            with crew.lock:
                self.busy = False
                self.worker = None

    def _ready(self, worker: _Worker) -> bool:
        """Whether it has imported the main module and run the initializer."""
        crew = self._crew
        answer = worker.receive()
        if answer is None:
            if self.why is None:
                crew.died_at_start(worker.death(None))
            return False
        ok, error, told = pickle.loads(answer)  # noqa: S301 - of our own child
        if ok:
            crew.ready()
            return True

        def broken() -> BaseException:
            raised = WorkersBroken(f"a worker failed before its first task: {type(error).__name__}: {error}")
            error.__cause__ = _Remote(told)
            raised.__cause__ = error
            return raised

        if self.why is None:
            crew.fail_all(broken, for_ever=True)
        return False

    def _do(self, worker: _Worker, future: Future[Any], work: _Work) -> bool:
        """Have it do a task; whether it lives on."""
        crew = self._crew
        try:
            begun, answer = worker.do(work.task)
        except Exception as exc:  # no memory for its answer: whoever waits for it must not do so for ever
            future.set_exception(GPUPoolError(f"the result of {work.what} could not be received: {exc!r}"))
            worker.signal(signal.SIGKILL)  # it may be in the middle of sending, and reads nothing meanwhile
            return False
        if answer is None:
            # Not a task that no worker can even receive: once more, not for ever.
            if not begun and not work.again and self.why is None:
                crew.put_back(future, work)
            else:
                future.set_exception(WorkerDied(f"{worker.death(self.why)} while it ran {work.what}"))
            return False
        crew.not_busy(self)
        try:
            ok, value, told = pickle.loads(answer)  # noqa: S301 - of our own child
        except BaseException as exc:
            future.set_exception(GPUPoolError(f"the result of {work.what} cannot be unpickled: {exc!r}"))
            return True
        if ok:
            future.set_result(value)
        else:
            value.__cause__ = _Remote(told)
            future.set_exception(value)
        return True


class _Worker:
    """The process, seen from here."""

    def __init__(self, gpu: GPU, told_first: bytes, meanwhile: Callable[[], None]) -> None:
        import subprocess

        self._meanwhile = meanwhile  # called while it is waited for, every LOOK seconds
        self.gpu_id = gpu.global_gpu_id
        theirs_in, self._tasks = connection.Pipe(duplex=False)
        self._results, theirs_out = connection.Pipe(duplex=False)
        try:
            ends = (theirs_in.fileno(), theirs_out.fileno())
            path = "\n".join(each for each in sys.path if isinstance(each, str))
            numbers = (*ends, os.getpid())
            # In a session of its own: Ctrl-C is for us to pass on, once, and what a task starts can be ended with it.
            # From a terminal two processes cannot read.
            self._process: subprocess.Popen[bytes] = gpu.popen(
                [os.fsdecode(spawn.get_executable()), *_flags(), "-c", _BOOT, *map(str, numbers), path],
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            self._tasks.close()
            self._results.close()
            raise
        finally:
            theirs_in.close()
            theirs_out.close()
        self.pid = self._process.pid
        self._send(told_first)

    def lives(self) -> bool:
        return self._process.poll() is None

    def _send(self, message: bytes) -> bool:
        try:
            self._tasks.send_bytes(message)
        except OSError:  # it is dead
            return False
        return True

    def receive(self) -> bytes | None:
        """Its next message; None if it has died."""
        while True:
            # Not the end of the pipe alone: what a task has forked may keep it open.
            if connection.wait([self._results], LOOK) or (not self.lives() and self._results.poll()):
                try:
                    return self._results.recv_bytes()
                except (EOFError, OSError):
                    return None
            if not self.lives():
                return None
            self._meanwhile()

    def do(self, task: bytes) -> tuple[bool, bytes | None]:
        """Have it do a task: whether it began, and its answer if it lived to give one."""
        if not self._send(task) or self.receive() is None:
            return False, None
        return True, self.receive()

    def signal(self, number: int) -> None:
        """To it and all that it started, but for what left its session. Nothing to nobody."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, number)

    def death(self, why: str | None) -> str:
        """How it ended."""
        import subprocess

        try:
            status = self._process.wait(END_TIME)
        except subprocess.TimeoutExpired:
            how = "closed its pipe"
        else:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        if why is not None:
            how = f"was ended {why}"
        return f"the worker process {self.pid} on {self.gpu_id} {how}"

    def end(self) -> None:
        """Tell it that there is nothing more to do, and wait."""
        import subprocess

        self._send(_END)
        self._tasks.close()
        try:
            self._process.wait(END_TIME)
        except subprocess.TimeoutExpired:
            logger.warning("the worker process %d does not end and is killed", self.pid)
        # Also after an orderly end: the GPU is somebody else's now, and what the tasks left running may compute there.
        self.signal(signal.SIGKILL)
        try:
            self._process.wait(END_TIME)
        except subprocess.TimeoutExpired:  # the pool keeps the lease until it has
            logger.error("the worker process %d was killed and has not ended; a driver may be stuck", self.pid)
        self._results.close()


# -- in the worker -------------------------------------------------------------------------------------------------


def serve(tasks_fd: int, results_fd: int, parent: int) -> None:
    """The main loop of a worker process; ends with the other side."""
    for fd in (tasks_fd, results_fd):
        os.set_inheritable(fd, False)  # not for what a task starts: it would keep the pipes open
    tasks = connection.Connection(tasks_fd, writable=False)
    results = connection.Connection(results_fd, readable=False)

    def in_child() -> None:
        for pipe in (tasks, results):
            with contextlib.suppress(OSError):
                pipe.close()

    os.register_at_fork(after_in_child=in_child)
    threading.Thread(target=_end_with, args=(parent,), name="gpupool-parent", daemon=True).start()
    try:
        started = _start(tasks.recv_bytes())
        results.send_bytes(started)
        while task := tasks.recv_bytes():
            results.send_bytes(b"")
            answer = _answer(task)
            _flush()
            results.send_bytes(answer)
            del task, answer
    except (EOFError, OSError, KeyboardInterrupt):  # nobody is there, or waits, any more
        return


def _start(told: bytes) -> bytes:
    """Become what a process of the parent's is: with its main module, and what the initializer does."""
    here = process.current_process()
    try:
        data, initializer = pickle.loads(told)  # noqa: S301 - of our own parent
        here._inheriting = True  # type: ignore[attr-defined]
        try:
            spawn.prepare(data)
        finally:
            del here._inheriting  # type: ignore[attr-defined]
        if initializer is not None:
            _call(initializer)
    except BaseException as exc:
        return _failure(exc)
    finally:
        _flush()
    return pickle.dumps((True, None, None))


def _end_with(parent: int) -> None:
    """
    Wait for the death of the process that started us, and end.

    A task may run for hours, and the kernel tells nobody of a pipe that nobody reads from.
    """
    try:
        import select

        fd = os.pidfd_open(parent)
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        while os.getppid() == parent:
            waiting.poll()
            time.sleep(0.01)  # it is dead; in a moment we are somebody else's
    except (AttributeError, OSError):  # not on this system
        while os.getppid() == parent:
            time.sleep(LOOK)
    # With all that was started here; nobody is left to whom an orderly end would matter.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _flush() -> None:
    """What a task printed is seen when it is done."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _call(task: bytes) -> Any:
    fn, args, kwargs = pickle.loads(task)  # noqa: S301 - of our own parent
    return fn(*args, **kwargs)


def _answer(task: bytes) -> bytes:
    try:
        return _dump((True, _call(task), None))
    except BaseException as exc:
        return _failure(exc)


def _failure(exc: BaseException) -> bytes:
    told = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
    try:
        message = _dump((False, exc, told))
        pickle.loads(message)  # noqa: S301 - many exceptions pickle, and cannot be unpickled
    except BaseException:
        message = _dump((False, GPUPoolError(f"{type(exc).__name__}: {exc}"), told))
    return message


def _chunks(size: int, *iterables: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], ...]]:
    items = zip(*iterables, strict=False)
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def _chunk(fn: Callable[..., T], items: Iterable[tuple[Any, ...]]) -> list[T]:
    return [fn(*each) for each in items]


# -- pickling ------------------------------------------------------------------------------------------------------


def _interactive() -> bool:
    """Whether the main module cannot be imported by others: a notebook, ``python -c``."""
    main = sys.modules.get("__main__")
    return main is not None and getattr(main, "__file__", None) is None and getattr(main, "__spec__", None) is None


def _dump(value: Any) -> bytes:
    """
    Pickle it; what is defined in an interactive main module by value, where cloudpickle is there.

    By the plain pickler, not that of multiprocessing: torch teaches that one to send the address of a tensor, which
    lives no longer than its process.

    Raises:
        GPUPoolError: it cannot be pickled.
    """
    try:
        if _interactive():
            with contextlib.suppress(ImportError):
                import cloudpickle

                return bytes(cloudpickle.dumps(value))
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception as exc:
        raise GPUPoolError(f"what goes to a worker process or comes from it must pickle: {exc}") from exc


def _require_importable(task: bytes) -> None:
    """It pickles as a name that no worker can import: better said here than by each of them."""
    import importlib.util

    if b"__main__" in task and _interactive() and importlib.util.find_spec("cloudpickle") is None:
        raise GPUPoolError(
            "a worker process cannot import what is defined in a notebook or by python -c: install cloudpickle "
            "(pip install cloudpickle), or move it to a module"
        )


def _preparation(name: str) -> dict[str, Any]:
    """What makes a process like this one, for `spawn.prepare`."""
    data: dict[str, Any] = spawn.get_preparation_data(name)
    # Pickles only while multiprocessing itself starts a process; it is bytes.
    if "authkey" in data:
        data["authkey"] = bytes(data["authkey"])
    return data


def _flags() -> list[str]:
    """The options of this interpreter, for another one: ``-W error``, ``-X dev``, …"""
    import subprocess

    flags = getattr(subprocess, "_args_from_interpreter_flags", None)  # private: without it, the default ones
    return [] if flags is None else list(flags())


# -- mapping -------------------------------------------------------------------------------------------------------


def run_map(executor: GPUExecutor, fn: Callable[[Any], T], items: Iterable[Any], *, progress: bool) -> Iterator[T]:
    """Results of ``fn(item)`` in the order of the items; with a progress bar on a terminal."""
    futures = [executor.submit(fn, item) for item in items]
    if not progress or not sys.stderr.isatty():
        yield from _results(futures)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(getattr(fn, "__name__", "tasks"), total=len(futures))
        for future in futures:
            future.add_done_callback(lambda _: bar.advance(shown))
        yield from _results(futures)


def _results(futures: Sequence[Future[T]]) -> Iterator[T]:
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


# -- at the end ----------------------------------------------------------------------------------------------------

_crews: weakref.WeakSet[_Crew] = weakref.WeakSet()
_exit_hook_registered = False


def _register_exit_hook() -> None:
    """End all executors when the interpreter does, as those of the standard library: tasks are done first."""
    global _exit_hook_registered
    if not _exit_hook_registered:
        _exit_hook_registered = True
        register = getattr(threading, "_register_atexit", None)
        if register is None:  # pragma: no cover - no such interpreter so far
            import atexit

            register = atexit.register
        # Later than the pools' own hook, so it is called before: the last registered comes first.
        register(_end_all)


def _end_all() -> None:
    crews = list(_crews)
    if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
        # Ctrl-C has ended the script: nobody wants what is still to be done.
        for crew in crews:
            crew.interrupt()
    for crew in crews:
        crew.end()
    for crew in crews:
        crew.join()


def _after_fork_in_child() -> None:
    global _crews
    _crews = weakref.WeakSet()  # the workers are the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
