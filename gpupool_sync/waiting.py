"""Who waits in this process, and what wakes them.

A waiter sleeps on a plain lock: its acquire and release are single C calls, so that Ctrl-C in a caller cannot leave
a `Condition` half entered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from gpupool_sync.errors import TooManyWaiting

#: Seconds after which a waiter looks again by itself: hints are hints, and readings change.
RECHECK = 1.0
#: Beyond so many waiters each re-check comes later in proportion, so that they do not eat the processor.
MANY_WAITERS = 64


class Waiter:
    """One caller that waits for a card; `id` is that of its claim."""

    __slots__ = ("_asleep", "id")

    def __init__(self, id: str) -> None:
        self.id = id
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wait(self, timeout: float) -> bool:
        """Sleep until woken, or *timeout* seconds; whether it was woken. A wake-up before the call counts."""
        return self._asleep.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Wake it; several wake-ups before it looks are one."""
        try:
            self._asleep.release()
        except RuntimeError:  # it is awake already
            return


class WaitingRoom:
    """The waiters of one pool, in the order of their arrival."""

    def __init__(self, max_waiting: int | None) -> None:
        self._max_waiting = max_waiting
        # Guards changes of _waiters. Innermost; waking happens outside.
        self._lock = threading.Lock()
        self._waiters: dict[str, Waiter] = {}
        self.most = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def join(self, waiter: Waiter) -> None:
        """
        Come in.

        Raises:
            TooManyWaiting: `max_waiting` wait already.
        """
        with self._lock:
            if self._max_waiting is not None and len(self._waiters) >= self._max_waiting:
                raise TooManyWaiting(
                    f"{len(self._waiters)} callers wait for a GPU already, and max_waiting={self._max_waiting}"
                )
            self._waiters[waiter.id] = waiter
            self.most = max(self.most, len(self._waiters))

    def leave(self, waiter: Waiter) -> None:
        """Go, whether served or not; idempotent."""
        with self._lock:
            self._waiters.pop(waiter.id, None)

    def hint(self, ids: Iterable[str]) -> None:
        """The `Hint` of a store: wake those whose tickets may have become servable."""
        for claim_id in ids:
            waiter = self._waiters.get(claim_id)
            if waiter is not None:
                waiter.wake()

    def wake_oldest(self, number: int) -> None:
        """Wake the *number* who have waited longest: cards came into view that no ticket names yet."""
        with self._lock:
            oldest = [waiter for _, waiter in zip(range(number), self._waiters.values())]  # noqa: B905 - meant to end early
        for waiter in oldest:
            waiter.wake()

    def wake_all(self) -> None:
        """Wake everybody: the pool closes."""
        self.wake_oldest(len(self._waiters))

    def recheck(self) -> float:
        """Seconds that a waiter sleeps at most."""
        return RECHECK * max(1.0, len(self._waiters) / MANY_WAITERS)
