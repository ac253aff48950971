"""Threads that are started from the user's thread."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from gpupool_sync.starting import start

INTERRUPTED = """
import random, signal, threading
from gpupool_sync.starting import start

armed = False

def handler(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, handler)
chance = random.Random(1)
hits = 0
made = []
for _ in range(4000):
    made.append(threading.Thread(target=lambda: None, daemon=True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.000001 + chance.random() * 0.00015)
        armed = True
        start(made[-1])
        armed = False
    except KeyboardInterrupt:
        hits += 1
signal.setitimer(signal.ITIMER_REAL, 0)
for thread in made:
    if thread.ident is not None:
        thread.join(10)
print(hits, sum(thread.is_alive() for thread in made))
"""


def test_ctrl_c_during_a_start_is_a_ctrl_c_and_the_thread_runs():
    """`Thread.start` raises RuntimeError some ten times in these four thousand, and leaves some forty threads stuck."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERRUPTED], capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 0, done.stderr
    hits, stuck = map(int, done.stdout.split())
    assert hits > 100, "the interrupts hit something"
    assert stuck == 0


def test_a_thread_that_cannot_be_started_says_why(monkeypatch):
    """Not in a thread that nobody looks at."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    with pytest.raises(RuntimeError, match="can't start new thread"):
        start(threading.Thread(target=print))


def test_it_returns_when_the_thread_runs():
    """As `Thread.start` does: it can be joined at once."""
    ran = threading.Event()
    thread = threading.Thread(target=ran.set)

    start(thread)
    thread.join()

    assert ran.is_set()
