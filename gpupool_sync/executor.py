"""Worker processes that own a GPU each: `GPUPool.executor`, and the queue of GPU numbers that old scripts pass around.

A worker is started by `gpu.popen`, so its lease lives exactly as long as it does, and CUDA sees its one GPU from before
the worker's first import.  It is an interpreter of its own that imports the main module under another name, as the
``spawn`` method of `multiprocessing` does, whose helpers do that here too.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from multiprocessing import connection, process, reduction, spawn
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs

from gpupool_sync.errors import ConfigError, GPUPoolError, PoolClosed

if TYPE_CHECKING:
    import subprocess

    from gpupool_sync.handle import GPU

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that a worker may take to end after it was told to.
END_TIME = 10.0
#: What a worker executes: nothing is imported before the mask is in its environment, as it was started with it.
_BOOT = (
    "import sys; sys.path[:] = __import__('json').loads(sys.argv.pop()); "
    "from gpupool_sync.executor import serve; serve(*map(int, sys.argv[1:]))"
)

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


@attrs.define(eq=False)
class _Work:
    future: Future[Any]
    task: bytes
    what: str


class WorkerDied(BrokenExecutor, GPUPoolError):
    """The process that ran a task ended before it had a result; the others are not concerned."""


class _Remote(Exception):
    """The traceback of a worker, as the cause of what it raised."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text}"


class GPUExecutor(Executor):
    """
    A `concurrent.futures.Executor` whose every worker process owns one GPU; made by `GPUPool.executor`.

    Workers are started as tasks come, up to *max_workers* and as GPUs come free, and keep their GPU until `shutdown`.
    A worker that dies costs its task (`WorkerDied`); its GPU is given back and another worker takes its place.

    Tasks and results must pickle.  What is defined in a notebook needs ``cloudpickle``, which is used if it is there.
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
        **request: Any,
    ) -> None:
        for name, number in (("max_workers", max_workers), ("max_tasks_per_child", max_tasks_per_child)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ConfigError(f"{name}={number!r}: a whole number of at least 1 is allowed, or None")
        if mp_context != "spawn":
            raise ConfigError(
                f"mp_context={mp_context!r}: 'spawn' is allowed; a forked child has what its parent imported, and CUDA "
                "that was initialised there does not work in it"
            )
        if initializer is not None and not callable(initializer):
            raise ConfigError(f"initializer={initializer!r}: a function is allowed")
        self._pool = pool
        self._request = request
        self._max_workers = max_workers
        self._max_tasks = max_tasks_per_child
        self._initializer = None if initializer is None else _dump((initializer, tuple(initargs), {}))
        # Guards what follows; never held while a GPU is acquired or a worker is talked to. The condition says that
        # there is work, or that the end has come.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[_Work] = deque()
        self._slots: set[_Slot] = set()
        self._idle = 0
        self._ending = False
        _executors.add(self)
        _register_exit_hook()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """
        Run ``fn(*args, **kwargs)`` in a worker, on its GPU.

        Raises:
            RuntimeError: after `shutdown`.
            GPUPoolError: the task cannot be pickled.
        """
        if getattr(process.current_process(), "_inheriting", False):
            raise RuntimeError(
                "a worker imports the main module, which began to submit tasks there; put that below "
                "if __name__ == '__main__':"
            )
        future: Future[T] = Future()
        work = _Work(future, _dump((fn, args, kwargs)), getattr(fn, "__qualname__", repr(fn)))
        with self._lock:
            if self._ending:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._queue.append(work)
            self._changed.notify()
        self._start_slots()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """
        End the workers when the tasks are done, and give their GPUs back.

        Args:
            wait: return only when all of that has happened.
            cancel_futures: cancel the tasks that no worker has begun.
        """
        with self._lock:
            self._ending = True
            if cancel_futures:
                while self._queue:
                    self._queue.pop().future.cancel()
            self._changed.notify_all()
            slots = list(self._slots)
            useless = [slot for slot in slots if not slot.has_gpu] if not self._queue else []
        for slot in useless:
            slot.cancel()
        if wait:
            for slot in slots:
                slot.thread.join()

    @property
    def workers(self) -> list[tuple[str, int]]:
        """Global GPU id and process id of each worker that runs."""
        with self._lock:
            return [slot.runs for slot in self._slots if slot.runs is not None]

    # -- slots -------------------------------------------------------------------------------------------------

    def _start_slots(self) -> None:
        """As many as there is work for, GPUs for, and leave for."""
        cards = max(1, self._pool.cards_known())
        limit = cards if self._max_workers is None else self._max_workers
        while True:
            with self._lock:
                starting = sum(not slot.has_gpu for slot in self._slots)
                if len(self._slots) >= limit or len(self._queue) <= self._idle + starting:
                    return
                slot = _Slot(self)
                self._slots.add(slot)
            slot.thread.start()

    def _take(self) -> _Work | None:
        """The next task; None when the end has come."""
        with self._changed:
            self._idle += 1
            try:
                while True:
                    while self._queue:
                        work = self._queue.popleft()
                        if work.future.set_running_or_notify_cancel():
                            return work
                    if self._ending:
                        return None
                    self._changed.wait()
            finally:
                self._idle -= 1

    def _needed(self) -> bool:
        with self._lock:
            return bool(self._queue) or not self._ending

    def _fail_all(self, error: BaseException) -> None:
        """No GPU can be had for any task."""
        with self._lock:
            failed, self._queue = list(self._queue), deque()
        for work in failed:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(error)

    def _gone(self, slot: _Slot) -> None:
        with self._lock:
            self._slots.discard(slot)


class _Slot:
    """One worker at a time, and the thread that acquires for it and talks to it."""

    def __init__(self, executor: GPUExecutor) -> None:
        self._executor = executor
        self.has_gpu = False
        self.runs: tuple[str, int] | None = None
        self._acquiring: Acquiring | None = None
        self._cancelled = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"gpupool-executor-{next(_numbers)}", daemon=True)

    def cancel(self) -> None:
        """Wait for no GPU any more."""
        self._cancelled.set()
        acquiring = self._acquiring
        if acquiring is not None:
            acquiring.cancel()

    def _run(self) -> None:
        executor = self._executor
        try:
            while executor._needed() and not self._cancelled.is_set():
                acquiring: Acquiring = executor._pool.gpu(**executor._request)
                self._acquiring = acquiring
                if self._cancelled.is_set():
                    return
                with acquiring as gpu:
                    self.has_gpu = True
                    executor._start_slots()  # now it is known how many GPUs there are
                    self._use(gpu)
                self.has_gpu = False
        except BaseException as exc:
            if not self._cancelled.is_set() or not isinstance(exc, PoolClosed):
                executor._fail_all(exc)
        finally:
            self.has_gpu = False
            executor._gone(self)

    def _use(self, gpu: GPU) -> None:
        """Have a worker on *gpu* do tasks until it dies, has done its share, or the end has come."""
        executor = self._executor
        worker = _Worker(gpu, executor._initializer)
        try:
            self.runs = (gpu.global_gpu_id, worker.pid)
            done = 0
            while executor._max_tasks is None or done < executor._max_tasks:
                work = executor._take()
                if work is None:
                    return
                done += 1
                if not worker.do(work):
                    return
        finally:
            self.runs = None
            worker.end()


class _Worker:
    """The process, seen from here."""

    def __init__(self, gpu: GPU, initializer: bytes | None) -> None:
        self._gpu = gpu
        self._ready: BaseException | None = None
        self._name = f"gpupool-worker-{gpu.global_gpu_id}"
        theirs_in, self._tasks = connection.Pipe(duplex=False)
        self._results, theirs_out = connection.Pipe(duplex=False)
        try:
            ends = (theirs_in.fileno(), theirs_out.fileno())
            command = [sys.executable, *_flags(), "-c", _BOOT, *map(str, ends), json.dumps(sys.path)]
            self._process: subprocess.Popen[bytes] = gpu.popen(command, pass_fds=ends)
        except BaseException:
            self._tasks.close()
            self._results.close()
            raise
        finally:
            theirs_in.close()
            theirs_out.close()
        self.pid = self._process.pid
        data = spawn.get_preparation_data(self._name)
        self._send(pickle.dumps((_plain(data), initializer)))

    def _send(self, message: bytes) -> bool:
        try:
            self._tasks.send_bytes(message)
        except OSError:  # it is dead, which the next receive will tell
            return False
        return True

    def do(self, work: _Work) -> bool:
        """Have it do a task; whether it lives on."""
        self._send(work.task)
        try:
            answer = self._results.recv_bytes()
        except (EOFError, OSError):
            work.future.set_exception(self._death(work.what))
            return False
        try:
            ok, value, told = pickle.loads(answer)  # noqa: S301 - of our own child
        except BaseException as exc:
            work.future.set_exception(GPUPoolError(f"the result of {work.what} cannot be unpickled: {exc!r}"))
            return True
        if ok:
            work.future.set_result(value)
            return True
        value.__cause__ = _Remote(told)
        work.future.set_exception(value)
        # One whose initializer failed is of no use.
        return ok is not None

    def _death(self, what: str) -> WorkerDied:
        try:
            status = self._process.wait(END_TIME)
        except Exception:
            self._process.kill()
            status = self._process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return WorkerDied(f"the worker process {self.pid} on {self._gpu.global_gpu_id} {how} while it ran {what}")

    def end(self) -> None:
        """Tell it that there is nothing more to do, and wait."""
        import subprocess

        self._tasks.close()
        try:
            self._process.wait(END_TIME)
        except subprocess.TimeoutExpired:
            logger.warning("the worker process %d does not end and is killed", self.pid)
            self._process.kill()
            self._process.wait()
        finally:
            self._results.close()


# -- in the worker -------------------------------------------------------------------------------------------------


def serve(tasks_fd: int, results_fd: int) -> None:
    """The main loop of a worker process; ends with the other side."""
    for fd in (tasks_fd, results_fd):
        os.set_inheritable(fd, False)  # not for what a task starts: it would keep the pipes open
    tasks = connection.Connection(tasks_fd, writable=False)
    results = connection.Connection(results_fd, readable=False)
    try:
        data, initializer = pickle.loads(tasks.recv_bytes())  # noqa: S301 - of our own parent
    except EOFError:
        return
    broken: bytes | None = None
    try:
        process.current_process()._inheriting = True  # type: ignore[attr-defined]
        try:
            spawn.prepare(data)
        finally:
            del process.current_process()._inheriting  # type: ignore[attr-defined]
        if initializer is not None:
            _call(initializer)
    except BaseException as exc:
        broken = _failure(exc, None)
    while True:
        try:
            task = tasks.recv_bytes()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        answer = broken if broken is not None else _answer(task)
        try:
            results.send_bytes(answer)
        except OSError:  # nobody waits for it any more
            return
        del task, answer


def _call(task: bytes) -> Any:
    fn, args, kwargs = pickle.loads(task)  # noqa: S301 - of our own parent
    return fn(*args, **kwargs)


def _answer(task: bytes) -> bytes:
    try:
        return _dump((True, _call(task), None))
    except BaseException as exc:
        return _failure(exc, False)


def _failure(exc: BaseException, ok: bool | None) -> bytes:
    told = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
    try:
        message = _dump((ok, exc, told))
        pickle.loads(message)  # noqa: S301 - many exceptions pickle, and cannot be unpickled
    except BaseException:
        message = _dump((ok, GPUPoolError(f"{type(exc).__name__}: {exc}"), told))
    return message


# -- pickling ------------------------------------------------------------------------------------------------------


def _dump(value: Any) -> bytes:
    """Pickle it; what is defined in an interactive main module by value, where cloudpickle is there."""
    main = sys.modules.get("__main__")
    if main is not None and getattr(main, "__file__", None) is None and getattr(main, "__spec__", None) is None:
        try:
            import cloudpickle  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            pass
        else:
            return bytes(cloudpickle.dumps(value))
    try:
        return bytes(reduction.ForkingPickler.dumps(value))
    except (pickle.PicklingError, AttributeError, TypeError) as exc:
        raise GPUPoolError(f"what goes to a worker process or comes from it must pickle: {exc}") from exc


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    # Pickles only while multiprocessing itself starts a process; it is bytes.
    if "authkey" in data:
        data["authkey"] = bytes(data["authkey"])
    return data


def _flags() -> list[str]:
    """The options of this interpreter, for another one: ``-W error``, ``-X dev``, …"""
    import subprocess

    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


# -- the queue of GPU numbers --------------------------------------------------------------------------------------


class GPUQueue:
    """
    ``get()`` and ``put()`` of GPU numbers, each with a lease behind it; made by `GPUPool.as_queue`.

    For scripts that hand out numbers by a ``multiprocessing.Manager().Queue()``: it is used in the same way and can be
    passed to other processes, but a process that dies with a number gives it back, and other users are kept out.
    """

    def __init__(self, pool: Any, numbers: int | Iterable[int] | None = None, **request: Any) -> None:
        what = "a count of GPUs (numbers from 0) or their numbers are allowed, or None for all"
        if isinstance(numbers, bool) or (isinstance(numbers, int) and numbers < 1):
            raise ConfigError(f"as_queue({numbers!r}): {what}")
        try:
            self._numbers = (
                None if numbers is None else frozenset(range(numbers) if isinstance(numbers, int) else numbers)
            )
        except TypeError:
            raise ConfigError(f"as_queue({numbers!r}): {what}") from None
        self._pool = pool
        self._request = {"local": True, **request}
        self._fresh_state()

    def _fresh_state(self) -> None:
        # Guards _out.
        self._lock = threading.Lock()
        self._out: dict[int, list[GPU]] = {}
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _queue_again, (self._pool, self._numbers, self._request)

    def _in_this_process(self) -> None:
        if self._pid != os.getpid():  # forked: what the parent has out is not ours to put back
            self._fresh_state()

    def get(self, block: bool = True, timeout: float | None = None) -> int:
        """
        The number of a GPU of this machine that nobody else has until `put`.

        Raises:
            queue.Empty: none came free within *timeout* seconds, or at once if not *block*.
            NoSuchGPU: this machine has no such GPU.
        """
        import queue

        from gpupool_sync.errors import AcquireTimeout

        self._in_this_process()
        request = self._request
        if self._numbers is not None:
            others = [each.global_gpu_id for each in self._pool.status().gpus if each.local_gpu_id not in self._numbers]
            request = {**request, "exclude": [*_listed(request.get("exclude")), *others]}
        try:
            gpu: GPU = self._pool.acquire(timeout=timeout if block else 0, **request)
        except AcquireTimeout as exc:
            raise queue.Empty(str(exc)) from exc
        with self._lock:
            self._out.setdefault(gpu.local_gpu_id, []).append(gpu)
        return gpu.local_gpu_id

    def get_nowait(self) -> int:
        """The same, without waiting."""
        return self.get(block=False)

    def put(self, number: int, block: bool = True, timeout: float | None = None) -> None:
        """
        Give back what `get` returned, in the process that got it.

        A number that this process has not got is ignored, with a line in the log: scripts fill their queue with all
        numbers before they begin.
        """
        self._in_this_process()
        with self._lock:
            gpus = self._out.get(number)
            gpu = gpus.pop() if gpus else None
            if not gpus:
                self._out.pop(number, None)
        if gpu is None:
            logger.info("GPU %s was put into the queue, but was not got from it here", number)
            return
        gpu.release()

    put_nowait = put


def _listed(names: Any) -> Sequence[str]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _queue_again(pool: Any, numbers: Iterable[int] | None, request: dict[str, Any]) -> GPUQueue:
    return GPUQueue(pool, numbers, **request)


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

_executors: weakref.WeakSet[GPUExecutor] = weakref.WeakSet()
_exit_hook_registered = False


def _register_exit_hook() -> None:
    """End all executors when the interpreter does, as those of the standard library: tasks are done first."""
    global _exit_hook_registered
    if not _exit_hook_registered:
        _exit_hook_registered = True
        # Later than the pools' own hook, so it is called before: the last registered comes first.
        threading._register_atexit(_end_all)  # type: ignore[attr-defined]


def _end_all() -> None:
    for executor in list(_executors):
        executor.shutdown()


def _after_fork_in_child() -> None:
    global _executors
    _executors = weakref.WeakSet()  # the workers are the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
