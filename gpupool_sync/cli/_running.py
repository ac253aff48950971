"""What ``run`` and ``map`` share: signals as events, asking for a GPU, and the words and numbers of their ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from gpupool_sync.cli._common import Terms, complain, plain, warn, write
from gpupool_sync.errors import AcquireTimeout, GPUPoolError, RemoteGPUError
from gpupool_sync.holding import LEASE_LOST

if TYPE_CHECKING:
    from gpupool_sync.pool import GPUPool, _Acquiring

T = TypeVar("T")

#: Exit statuses, those of timeout(1), env(1) and the shells.
NO_GPU_IN_TIME = 124
OUR_FAILURE = 125
CANNOT_RUN = 126
NOT_FOUND = 127
BY_SIGNAL = 128

#: Signals that end a program that does not know them; SIGUSR1 and SIGUSR2 are messages to one that does.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
MESSAGES = (signal.SIGUSR1, signal.SIGUSR2)

#: Longest seconds between two looks at what no signal has told.
LOOK = 0.5


def say(text: object) -> None:
    """One line of ours among what the command says."""
    write(f"gpupool-sync: {plain(text)}")


# -- signals -----------------------------------------------------------------------------------------------------


@attrs.frozen
class Event:
    """A signal that came; `by_kernel`: from the terminal, so to every process in the foreground."""

    number: int
    by_kernel: bool = False
    pid: int = 0  # who sent it; 0: unknown


class Signals:
    """
    The signals of this process as events that its main thread waits for, from ``with`` to `end`.

    Blocked instead of handled, because only so the kernel says who sent one: Ctrl-C reaches the command by itself, and
    must not be passed on a second time.  Enter it before the first thread starts: threads inherit what is blocked.
    Signals that are ignored (nohup) stay so, also for the command.
    """

    def __init__(self, *wanted: signal.Signals) -> None:
        self._wanted = [each for each in wanted if signal.getsignal(each) is not signal.SIG_IGN]
        if signal.getsignal(signal.SIGTSTP) is not signal.SIG_IGN:
            self._wanted.append(signal.SIGTSTP)
        self._noted: deque[int] = deque()
        self._before: set[int] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if not hasattr(signal, "sigtimedwait"):
            raise GPUPoolError("this command needs a system that has sigtimedwait(), such as Linux")
        self._set = {*self._wanted, signal.SIGCONT, signal.SIGCHLD}
        self._before = set(signal.pthread_sigmask(signal.SIG_BLOCK, self._set))
        for each in self._wanted:
            # Ctrl-Z, too: it would stop us while the command, which is just being started, runs on.
            self._handlers[each] = signal.signal(each, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append(number)

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Around the start of a command, which must not inherit that signals are blocked; meanwhile they are noted."""
        assert self._before is not None
        blocked = signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def wait(self, timeout: float = LOOK) -> Event | None:
        """The next one; None: no news, or only that a child has changed or `wake` was called."""
        with contextlib.suppress(IndexError):
            return Event(self._noted.popleft())
        # No longer than that: a thread that somebody else started may have caught the signal that was to wake us.
        info = signal.sigtimedwait(self._set, max(0.0, min(timeout, LOOK)))
        if info is None or info.si_signo == signal.SIGCHLD:
            return None
        return Event(info.si_signo, info.si_code > 0, info.si_pid)

    def end(self) -> None:
        """Everything as before; what has come meanwhile is forgotten. Idempotent."""
        before, self._before = self._before, None
        if before is None:
            return
        while signal.sigtimedwait(self._set, 0) is not None:
            pass
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def wake() -> None:
    """From any thread: `Signals.wait` returns."""
    os.kill(os.getpid(), signal.SIGCHLD)


def stop_here() -> None:
    """Stop this process, as Ctrl-Z does; returns when it is continued."""
    os.kill(os.getpid(), signal.SIGSTOP)


class Interrupted(Exception):
    """A signal ended the wait for a GPU."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = BY_SIGNAL + number


# -- the pool ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working_pool(endpoints: str | None, *, progress: bool) -> Iterator[GPUPool]:
    """An open pool; its warnings are lines. *progress* as of `GPUPool`."""
    from gpupool_sync.pool import GPUPool

    def show(message: Warning | str, *where: object, **more: object) -> None:
        warn(message)

    logger, handler = logging.getLogger("gpupool_sync"), _Said(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            # Who has set the variable knows best.
            asked = progress and not os.environ.get("GPU_POOL_PROGRESS")
            with GPUPool(endpoints, progress=True if asked else None if progress else False) as pool:
                yield pool
    finally:
        logger.removeHandler(handler)


class _Said(logging.Handler):
    """The package's warnings, as lines like ours."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg is not LEASE_LOST:  # our own `on_lost` says so, and what becomes of the command
            say(record.getMessage())


class Background(Generic[T]):
    """*function* on a thread of its own, so that signals are served while it waits for others."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpupool-cli", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as exc:
            self._error = exc
        finally:
            self._done.set()
            wake()

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done.is_set()

    def result(self) -> T:
        """What the function returned, or raised; once it is done."""
        if self._error is not None:
            raise self._error
        return self._result[0]

    def join(self, timeout: float) -> None:
        """Until it has ended."""
        self._thread.join(timeout)

    def wait(self, signals: Signals) -> T:
        """
        The result.

        Raises:
            Interrupted: a signal came first.
        """
        while not self.done:
            event = signals.wait()
            if event is None or event.number == signal.SIGCONT:
                continue
            if event.number == signal.SIGTSTP:
                stop_here()
                continue
            raise Interrupted(event.number)
        return self.result()


class Asking(Background[Any]):
    """For one GPU, or several of one host, that programs of this machine can use."""

    def __init__(
        self,
        pool: GPUPool,
        terms: Terms,
        on_lost: Callable[[Any], object] | None = None,
    ) -> None:
        self._pool = pool
        self._request = dict(terms.request)
        self._timeout = terms.timeout
        self._more: dict[str, Any] = {"note": terms.note, "on_lost": on_lost}
        self._acquiring: _Acquiring[Any] | None = None
        self._cancelled = False
        self._begin = time.monotonic()
        super().__init__(self._acquire)

    @property
    def waited(self) -> float:
        """Seconds."""
        return time.monotonic() - self._begin

    @property
    def place(self) -> int | None:
        """In the shortest queue that it waits in, counted from 1; None: no arbiter has told."""
        grant = None if self._acquiring is None else self._acquiring._grant
        return None if grant is None or grant.position is None else grant.position + 1

    def _acquire(self) -> Any:
        end = None if self._timeout is None else time.monotonic() + self._timeout
        request = self._request
        names = usable_endpoints(self._pool, request, self._timeout)
        if names is not None:
            request["endpoint"] = names
        rest = None if end is None else max(0.0, end - time.monotonic())
        count = request.pop("count", None)
        if count is None:
            self._acquiring = self._pool.gpu(rest, **request, **self._more)
        else:
            self._acquiring = self._pool.gpus(count, rest, **request, **self._more)
        if self._cancelled:
            self._acquiring.cancel()
        # Not `acquire`, which nobody could end. The lease lasts as long as this object, or until it is released.
        return self._acquiring.__enter__()

    def cancel(self) -> None:
        """Nobody wants it any more: what may come all the same is given back."""
        self._cancelled = True  # before the look: it may just be being made
        if self._acquiring is not None:
            self._acquiring.cancel()

    def give_up(self) -> None:
        """Cancel, and give the arbiters a moment to hear of it."""
        self.cancel()
        self.join(2.0)


def usable_endpoints(pool: GPUPool, request: Mapping[str, Any], timeout: float | None) -> Sequence[str] | None:
    """
    To which endpoints the request must be limited for a command of this machine; None: to none.

    Raises:
        RemoteGPUError: there is none.
    """
    machines = pool.machines(timeout)
    asked = request.get("endpoint") or tuple(machines)
    elsewhere = [name for name, machine in machines.items() if machine is not None and not machine.usable]
    if not any(name in elsewhere for name in asked):
        return None
    # One that has not answered yet may be usable.
    names = [name for name in asked if name not in elsewhere]
    if not names:
        hosts = sorted({machine.name for name in asked if (machine := machines.get(name)) is not None})
        raise RemoteGPUError(
            f"the GPUs of {', '.join(asked[:5])} are in other machines ({', '.join(hosts[:5])}), so a command of this "
            "one cannot use them; --any-host runs it over there, by ssh"
        )
    return names


@contextlib.contextmanager
def visible_as(visible: str | None) -> Iterator[None]:
    """``--visible`` for what is started meanwhile, and what that starts."""
    before = os.environ.get("GPU_POOL_VISIBLE")
    if visible is not None:
        os.environ["GPU_POOL_VISIBLE"] = visible
    try:
        yield
    finally:
        if visible is not None and before is not None:
            os.environ["GPU_POOL_VISIBLE"] = before
        elif visible is not None:
            del os.environ["GPU_POOL_VISIBLE"]


def passed_on() -> tuple[int, ...]:
    """Descriptors that the shell meant for the command, such as those of ``<(…)`` and of make's job server."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if int(name) > 2 and os.get_inheritable(int(name)):
                    found.append(int(name))
    return tuple(found)


def start_failed(command: Sequence[str], error: OSError) -> int:
    """Say why a command did not start; returns what shells return then."""
    complain(f"{command[0]}: {error.strerror or error}")
    return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN


def our_failure(error: GPUPoolError) -> int:
    """Say what is wrong; returns the exit status that means it."""
    complain(error)
    return NO_GPU_IN_TIME if isinstance(error, AcquireTimeout) else OUR_FAILURE


def on_our_terminal() -> bool:
    """Whether stderr is a person's terminal and we are in the foreground there, so that a line can be drawn over."""
    try:
        in_front = os.tcgetpgrp(2) == os.getpgrp()
    except OSError:
        return False
    return in_front and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
