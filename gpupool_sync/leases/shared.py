"""What several stores keep in the same way: who wants hints, which ids are gone, which cards are closed."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from gpupool_sync.leases.base import CLOSED_TIME, Hint
from gpupool_sync.models import Reason

#: Ids that are remembered as gone inside one process, where a delayed duplicate is at most a thread's time slice late:
#: a number bounds the memory better than the ten minutes that arbiters behind a network need.
MAX_GONE = 10_000

#: Why a card that nobody holds is not granted.
CLOSED = Reason(
    "closed",
    "its last holder did not give it back (its lease expired or was revoked); it opens when a reading shows it empty, "
    f"or {CLOSED_TIME:.0f} s after that end",
)


def is_open(closed_at: float, emptied: float | None, now: float) -> bool:
    """Whether a card that was closed at *closed_at* may be granted; *emptied*: seconds since it was seen empty."""
    return now - closed_at >= CLOSED_TIME or (emptied is not None and now - emptied > closed_at)


def reopen(closed: dict[str, float], emptied: Mapping[str, float], now: float) -> list[str]:
    """Take the cards that may be granted again out of *closed*, and return them. Under its owner's lock."""
    opened = [key for key, closed_at in closed.items() if is_open(closed_at, emptied.get(key), now)]
    for key in opened:
        del closed[key]
    return opened


def user_name() -> str:
    """Whose process this is, for people; the number of a user without a name, as in containers."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid()) if hasattr(os, "getuid") else "?"


class Subscribers:
    """Who is told of hints. `tell` runs without a lock: whoever it calls may take any."""

    def __init__(self) -> None:
        # Guards changes of _hints, which is replaced and never changed.
        self._lock = threading.Lock()
        self._hints: tuple[Hint, ...] = ()

    def add(self, hint: Hint, on_last: Callable[[], None] | None = None) -> Callable[[], None]:
        """Register *hint*; returns the call that removes it, which calls *on_last* when nobody is left."""
        with self._lock:
            self._hints = (*self._hints, hint)

        def unsubscribe() -> None:
            with self._lock:
                self._hints = tuple(other for other in self._hints if other is not hint)
                last = not self._hints
            if last and on_last is not None:
                on_last()

        return unsubscribe

    def tell(self, ids: Iterable[str]) -> None:
        """Pass the ids on to everybody."""
        for hint in self._hints:
            hint(ids)


class Gone:
    """The last `MAX_GONE` ids that ended. Not thread-safe: used under its owner's lock."""

    def __init__(self) -> None:
        # A dictionary, not a set: one that cannot grow for want of memory refuses the new key, while a set takes it,
        # until it is full and a look for what is not in it never ends (CPython 3.11).
        self._ids: dict[str, None] = {}
        # The oldest first. The dictionary has them in this order too, but to find the first behind thousands that were
        # deleted it passes all of their places.
        self._order: deque[str] = deque()

    def __contains__(self, lease_id: object) -> bool:
        return lease_id in self._ids

    def add(self, lease_id: str) -> None:
        if lease_id not in self._ids:
            # An interrupt in between leaves one in the order that is not there, or there twice: it goes the sooner.
            self._order.append(lease_id)
            self._ids[lease_id] = None
            while len(self._order) > MAX_GONE:
                self._ids.pop(self._order.popleft(), None)
