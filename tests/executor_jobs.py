"""
What workers of executors do in tests, and scripts with an executor that end in odd ways.

A script is run as ``executor_jobs.py NAME DIRECTORY``; see `test_executor.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpupool_sync import GPUPool
from helpers import eventually

#: What a module sees that is imported for the first task, as CUDA programs are.
MASK_AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")


def mask_at_import():
    return MASK_AT_IMPORT


#: Seconds after which what a test forgot ends by itself.
PATIENCE = 60


def what_i_see(_=None):
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(path):
    """In the first process that gets here."""
    if not path.exists():
        path.touch()
        die()
    return os.getpid()


def divide(a, b):
    return a / b


def wait_for(path):
    eventually(path.exists, PATIENCE)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def tell_and_wait(here, go):
    """Say which process this is, and wait."""
    tell(here, os.getpid())
    return wait_for(go)


def tell(path, text):
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def told(path):
    eventually(path.exists, PATIENCE)
    return int(path.read_text())


def tell_and_sleep(here):
    tell(here, os.getpid())
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        tell(here.with_name(f"{here.name}-interrupted"), os.getpid())
        raise


def leave_a_child(here, *, fork):
    """Start what outlives the task."""
    if fork:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(PATIENCE,))
        child.start()
    else:
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({PATIENCE})"])
    tell(here, child.pid)
    return child.pid


def leave_a_child_and_die(here):
    leave_a_child(here, fork=True)
    die()


def never_end():
    threading.Thread(target=time.sleep, args=(PATIENCE,)).start()
    return os.getpid()


def say(what):
    print(what)


def fail(text):
    raise ValueError(text)


class NotAgain:
    """Pickles, and cannot be unpickled where it arrives."""

    def __reduce__(self):
        return fail, ("not here",)


def not_again():
    return NotAgain()


def large(megabytes):
    return b"x" * (megabytes << 20)


def remember(number):
    global _remembered
    _remembered = number


def recall():
    return _remembered


_remembered = None


class Rude(Exception):
    """Needs two arguments, and has one when it is unpickled."""

    def __init__(self, a, b):
        super().__init__(a)


def be_rude():
    raise Rude(1, 2)


def nested():
    with GPUPool() as pool:
        return pool.map(what_i_see, range(2), progress=False)


# -- scripts -------------------------------------------------------------------------------------------------------


def left_alone(directory):
    """Tasks and no shutdown: they are done before the interpreter ends."""
    executor = GPUPool().executor(max_workers=1)
    for number in range(3):
        executor.submit(tell, directory / f"done-{number}", number)


def interrupted(directory, how):
    """Ctrl-C while a result is waited for."""
    pool = GPUPool()
    if how == "map":
        pool.map(tell_and_sleep, [directory / "task", directory / "second"], max_workers=1)
    elif how == "with":
        with pool.executor(max_workers=1) as executor:
            executor.submit(tell_and_sleep, directory / "task")
            executor.submit(tell, directory / "second", 0).result()
    else:
        executor = pool.executor(max_workers=1)
        executor.submit(tell_and_sleep, directory / "task")
        executor.submit(tell, directory / "second", 0).result()


def victim(directory):
    """Be killed while a worker works."""
    GPUPool().executor(max_workers=1).submit(tell_and_sleep, directory / "task").result()


def forked_while_it_runs(directory):
    """A child that was forked before has our ends of the pipes; it is no user of the executor."""
    with GPUPool() as pool, pool.executor(max_workers=1) as executor:
        executor.submit(what_i_see).result(PATIENCE)
        pid = os.fork()
        if pid == 0:
            try:
                executor.submit(what_i_see)
            except RuntimeError as exc:
                tell(directory / "child", 1 if "fork" in str(exc) else 0)
            executor.shutdown()
            eventually((directory / "go").exists, PATIENCE)
            os._exit(0)
        told(directory / "child")
        begin = time.monotonic()
        executor.shutdown()
        tell(directory / "seconds", int(time.monotonic() - begin))
        (directory / "go").touch()
        os.waitpid(pid, 0)


def unguarded(directory):
    """No ``if __name__ == "__main__"``: says so, and does not start workers without end."""
    script = directory / "script.py"
    script.write_text(
        "from gpupool_sync import GPUPool\npool = GPUPool()\nprint(pool.map(abs, [1], max_workers=1, progress=False))\n"
    )
    os.execv(sys.executable, [sys.executable, str(script)])


if __name__ == "__main__":
    name, directory, *more = sys.argv[1:]
    globals()[name](Path(directory), *more)
