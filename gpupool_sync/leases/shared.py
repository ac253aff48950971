"""What several stores keep in the same way: who wants hints, and which ids are gone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from gpupool_sync.leases.base import Hint

#: Ids that are remembered as gone inside one process, where a delayed duplicate is at most a thread's time slice late:
#: a number bounds the memory better than the ten minutes that arbiters behind a network need.
MAX_GONE = 10_000


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
        self._ids: set[str] = set()
        self._order: deque[str] = deque()

    def __contains__(self, lease_id: object) -> bool:
        return lease_id in self._ids

    def add(self, lease_id: str) -> None:
        if lease_id not in self._ids:
            self._order.append(lease_id)
            self._ids.add(lease_id)
            if len(self._order) > MAX_GONE:
                self._ids.discard(self._order.popleft())
