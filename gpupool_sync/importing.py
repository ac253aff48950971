"""Imports that a fork waits for.

A module that another thread is just importing stays half imported in a forked child, which would wait for it for ever.
So what a pool imports at its first use, rather than with this package, it imports under one lock.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager

#: Seconds that a fork waits for imports at most.
LONGEST_IMPORT = 5.0

# Guards no data. Taken after a pool's `lifecycle`; reentrant, as an import may fork.
_opening = threading.RLock()
_forking = threading.local()  # whether this thread, which forks, has _opening


def importing() -> AbstractContextManager[bool]:
    """``with importing():`` around late imports: the lock itself, as its ``with`` is atomic under interrupts."""
    return _opening


def _before_fork() -> None:
    _forking.waited = False
    _forking.waited = _opening.acquire(timeout=LONGEST_IMPORT)


def _after_fork_in_parent() -> None:
    if _forking.waited:
        _opening.release()


def _after_fork_in_child() -> None:
    global _opening
    _opening = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
