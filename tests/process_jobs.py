"""
What tests run in other processes: jobs for workers over invented cards, and scripts that end in odd ways.

Jobs are functions, so that every start method of `multiprocessing` finds them.  A script is run as
``process_jobs.py NAME``; see `test_multiprocessing.py`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import gpupool_sync
from cards import HERE, Cards
from gpupool_sync import AcquireTimeout, GPUPool, PoolClosed, devices
from helpers import HoldLog

#: Seconds after which a process that hangs shows where, and ends.
PATIENCE = 100.0
PACKAGE = str(Path(gpupool_sync.__file__).parent) + os.sep


def uuid_of(index: int) -> str:
    return f"GPU-{index:08d}"


def die_when_stuck(seconds: int = 120) -> None:
    """
    End this process when it hangs, and show where.

    By a signal: the watchdog of `faulthandler` is a thread, for which a forked child would wait at its end.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
    signal.alarm(seconds)


def equip(number: int) -> None:
    """This process sees so many invented cards from now on."""
    devices.open_reader = lambda: Cards(number)  # type: ignore[assignment]
    devices.host_identity = lambda: HERE  # type: ignore[assignment]


# -- jobs ------------------------------------------------------------------------------------------------------


def take_turns(pool: GPUPool, log: HoldLog, number: int, rounds: int) -> int:
    """Use cards one after the other, and note it."""
    equip(number)
    with pool:
        for _ in range(rounds):
            with pool.gpu(timeout=PATIENCE) as gpu, log.holding(gpu.uuid, gpu.fencing_token):
                time.sleep(0.001)
    return os.getpid()


def hold_for_ever(pool: GPUPool, log: HoldLog, number: int) -> None:
    """Be killed while a card is held."""
    equip(number)
    gpu = pool.acquire(timeout=PATIENCE)
    log.begin(gpu.uuid, gpu.fencing_token, who=f"victim {os.getpid()}")
    while True:
        signal.pause()


_pool: GPUPool | None = None
_log: HoldLog | None = None


def start_worker(pool: GPUPool, log: HoldLog, number: int) -> None:
    """An initializer that keeps the pool for all tasks of the worker."""
    global _pool, _log
    equip(number)
    _pool, _log = pool, log


def one_turn(_: object) -> int:
    assert _pool is not None
    assert _log is not None
    with _pool.gpu(timeout=PATIENCE) as gpu, _log.holding(gpu.uuid, gpu.fencing_token):
        time.sleep(0.001)
    return os.getpid()


def hold_in_worker() -> None:
    assert _pool is not None
    assert _log is not None
    with _pool.gpu(timeout=PATIENCE) as gpu:
        _log.begin(gpu.uuid, gpu.fencing_token, who=f"victim {os.getpid()}")
        while True:
            signal.pause()


_queue = None


def start_with_numbers(queue, log: HoldLog, number: int) -> None:
    """An initializer as old scripts have it: the queue is a global of the worker."""
    global _queue, _log
    equip(number)
    _queue, _log = queue, log


def one_number(rounds: int) -> int:
    """Use numbers of the worker's queue, one after the other."""
    assert _queue is not None
    assert _log is not None
    for _ in range(rounds):
        number = _queue.get(timeout=PATIENCE)
        try:
            with _log.holding(str(number)):
                time.sleep(0.001)
        finally:
            _queue.put(number)
    return os.getpid()


def numbers_in_turn(queue, log: HoldLog, number: int, rounds: int) -> int:
    start_with_numbers(queue, log, number)
    return one_number(rounds)


def keep_a_number(queue, log: HoldLog, number: int) -> None:
    """A worker that takes a number when it starts, and never puts it back."""
    start_with_numbers(queue, log, number)
    log.begin(str(queue.get(timeout=PATIENCE)), who=f"victim {os.getpid()}")


def nothing(_: object = None) -> int:
    return os.getpid()


def keep_a_number_for_ever(queue, log: HoldLog, number: int) -> None:
    keep_a_number(queue, log, number)
    while True:
        signal.pause()


def same_queue(queue, number: int) -> int:
    """A queue that comes with each task."""
    equip(number)
    return id(queue)


def raise_with_a_gpu(pool: GPUPool, number: int) -> None:
    equip(number)
    with pool.gpu(timeout=PATIENCE):
        raise RuntimeError("as ordered")


def describe(pool: GPUPool) -> dict[str, object]:
    """What a pool is in another process."""
    return {"repr": repr(pool), "held": pool.stats()["held"], "on_lost": getattr(pool._state.on_lost, "__name__", None)}


def note_lost(gpu: object) -> None:
    """An `on_lost` that a pickle can name."""


def stranger(connection, pool: GPUPool, number: int) -> None:
    """A process that tries to get cards as it is told, and answers whether it had them."""
    equip(number)
    with pool:
        while (asked := connection.recv()) is not None:
            uuid, timeout, request = asked
            try:
                with pool.gpu(uuid=uuid, timeout=timeout, **request):
                    connection.send(True)
            except AcquireTimeout as exc:
                connection.send(str(exc))
    connection.close()


# -- stopping a thread anywhere ----------------------------------------------------------------------------------


def _in_sight(frame):
    """What may be a lock of the code that runs in *frame*: attributes of its object, names of its module."""
    for name in ("self", "state"):
        owner = frame.f_locals.get(name)
        yield from getattr(owner, "__dict__", {}).values()
        yield from (getattr(owner, slot, None) for slot in getattr(type(owner), "__slots__", ()))
    yield from frame.f_globals.values()


def _is_locked(value: object) -> bool:
    return isinstance(value, type(_LOCK)) and value.locked()


_LOCK = threading.Lock()


class Stepped:
    """
    A thread that runs *work*, and stops before the *at*-th line of the package that it comes to.

    `wait` returns when it stands there (or has ended before), `go_on` lets it go and waits for its end.
    """

    def __init__(self, work, at: int, files: str = "") -> None:
        self._work = work
        self._at = at
        self._prefix = PACKAGE + files
        self._here, self._go = threading.Event(), threading.Event()
        self.lines = 0
        #: Lines that were reached with a lock held: by place, the first number.
        self.locked: dict[str, int] = {}
        self.place = "its end"
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stepped", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            self._work()
        except BaseException as exc:
            self.error = exc
        finally:
            sys.settrace(before)
            self._here.set()

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(self._prefix) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            place = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
            if place not in self.locked and any(map(_is_locked, _in_sight(frame))):
                self.locked[place] = self.lines
            if self.lines == self._at:
                self.place = place
                self._here.set()
                self._go.wait(PATIENCE)
        return self._line

    def wait(self) -> None:
        assert self._here.wait(PATIENCE)

    def let_go(self) -> None:
        self._go.set()

    def go_on(self) -> None:
        self._go.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"the thread that stood at {self.place} ends"
        if self.error is not None:
            raise self.error


# -- scripts: each prints one line of JSON -------------------------------------------------------------------------


def say(**answer: object) -> None:
    print(json.dumps(answer), flush=True)


def exits_in_block() -> None:
    """``sys.exit`` in a block of the main thread."""
    with GPUPool(poll_interval=60.0).gpu(timeout=PATIENCE) as gpu:
        say(uuid=gpu.uuid)
        sys.exit(3)


def exits_in_thread() -> None:
    """``sys.exit`` in a block of a thread ends that block only."""
    pool = GPUPool(poll_interval=60.0)

    def work() -> None:
        with pool.gpu(timeout=PATIENCE):
            sys.exit(3)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)
    say(held=pool.stats()["held"], leases=len(pool.leases().leases))


def ends_with_leases() -> None:
    """The interpreter ends while handles are out, without a release or a close."""
    pool = GPUPool(poll_interval=60.0)
    globals()["kept"] = pool.acquire(timeout=PATIENCE)
    say(uuid=globals()["kept"].uuid)


def ends_with_a_waiter(*, daemon: bool) -> None:
    """The interpreter ends while a thread waits for a card for ever."""
    pool = GPUPool(poll_interval=60.0)
    globals()["kept"] = pool.acquire(timeout=PATIENCE)

    def wait() -> None:
        try:
            pool.acquire()
        except PoolClosed:
            if not daemon:
                say(told="PoolClosed")

    threading.Thread(target=wait, daemon=daemon).start()
    end = time.monotonic() + PATIENCE
    while len(pool.leases().queue) != 1 and time.monotonic() < end:
        time.sleep(0.005)
    say(waiting=len(pool.leases().queue), uuid=globals()["kept"].uuid)


def child_leaves_the_parents_block() -> None:
    """A forked child ends as scripts do: out of its parent's blocks, by an error, through the interpreter's end."""
    child = 0
    try:
        with GPUPool(poll_interval=60.0) as pool, pool.gpu(timeout=PATIENCE) as gpu:
            child = os.fork()
            if child == 0:
                die_when_stuck()
                raise RuntimeError("as ordered")
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            gpu.check()
            rival = GPUPool(poll_interval=60.0, name="rival")
            refused = False
            try:
                rival.acquire(uuid=gpu.uuid, timeout=0)
            except AcquireTimeout:
                refused = True
            held = [lease.gpus for lease in pool.leases().leases]
            say(child=status, held=pool.stats()["held"], refused=refused, leases=len(held), uuid=gpu.uuid)
    except RuntimeError:
        assert child == 0
        sys.exit(5)


def fork_during_first_import() -> None:
    """
    Fork while another thread imports what an opening pool needs.

    The child would find modules that nobody finishes; so the fork has to wait for the import.
    """
    pool = GPUPool(poll_interval=60.0)
    work = Stepped(lambda: pool.acquire(timeout=PATIENCE).release(), 5, files="keeper.py")
    work.wait()
    threading.Timer(0.3, work.let_go).start()
    child = os.fork()
    if child == 0:
        die_when_stuck()
        with pool.gpu(timeout=10) as gpu:
            good = gpu.uuid == uuid_of(1) or gpu.uuid == uuid_of(0)
        os._exit(0 if good else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    work.go_on()
    pool.close()
    say(child=status, place=work.place)


def orphan_of_a_waiter() -> None:
    """A waiter forks a child, says so, and stays until it is killed; the child lives on without using the pool."""
    pool = GPUPool(poll_interval=60.0, name="orphaned")
    threading.Thread(target=pool.acquire, daemon=True).start()
    end = time.monotonic() + PATIENCE
    while not any(each.holder.startswith("orphaned") for each in pool.leases().queue) and time.monotonic() < end:
        time.sleep(0.005)
    if os.fork() == 0:
        say(child=os.getpid())  # itself: now it has let go of what was the parent's
    while True:
        signal.pause()


def main() -> None:
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    die_when_stuck(int(PATIENCE))
    equip(int(sys.argv[2]))
    scripts = {
        "exits_in_block": exits_in_block,
        "exits_in_thread": exits_in_thread,
        "ends_with_leases": ends_with_leases,
        "ends_with_a_waiter": lambda: ends_with_a_waiter(daemon=False),
        "ends_with_a_daemon_waiter": lambda: ends_with_a_waiter(daemon=True),
        "child_leaves_the_parents_block": child_leaves_the_parents_block,
        "fork_during_first_import": fork_during_first_import,
        "orphan_of_a_waiter": orphan_of_a_waiter,
    }
    scripts[sys.argv[1]]()


if __name__ == "__main__":
    main()
