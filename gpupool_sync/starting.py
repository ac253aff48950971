"""Threads that are started from the user's thread."""

from __future__ import annotations

import _thread
import threading


def start(thread: threading.Thread) -> None:
    """
    `thread.start()` that Ctrl-C cannot break; returns when *thread* runs.

    `Thread.start` waits on a `Condition` for the new thread.  Interrupted there, it raises "release unlocked lock"
    instead of `KeyboardInterrupt`, or leaves the condition locked, on which the new thread then waits for ever.  Signal
    handlers run on the main thread only, so another one starts it, and the main thread waits on a plain lock.  After a
    `KeyboardInterrupt` out of here it is not known whether *thread* runs.

    Raises:
        RuntimeError: the system starts no more threads, or the interpreter ends.
    """
    if threading.current_thread() is not threading.main_thread():
        thread.start()
        return
    failure: list[BaseException] = []
    started = threading.Lock()
    started.acquire()

    def work() -> None:
        try:
            thread.start()
        except BaseException as exc:
            failure.append(exc)
        finally:
            started.release()

    _thread.start_new_thread(work, ())
    started.acquire()
    if failure:
        raise failure.pop()  # kept there, it would keep this frame, and this one it
