"""Whether it is this machine's own network that fails: what most endpoints that vanish at once have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

#: With fewer endpoints than these that were reached lately, nothing is concluded.
LEAST_ENDPOINTS = 3
#: What people are told while it lasts.
TEXT = "most endpoints became unreachable at about the same time: the likely cause is this machine's own network"


class Outages:
    """
    Notices that most endpoints cannot be reached any more, all at once, and that they can be again.

    Servers fail one by one.  An outage begins when more than half of those that were reached lately, of three at least,
    became unreachable within *window* seconds; it ends when more than half of those that it has hit are reached again.
    It decides nothing: people are told where to look.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        # Guards everything below: dictionary work only; polled() is called under it, and must not block.
        self._lock = threading.Lock()
        self._reached: dict[str, bool] = {}  # by endpoint id: whether its last poll was answered, however
        self._fell: dict[str, float] = {}  # when those became unreachable that had been reached before
        self._apart: set[str] = set()  # while it lasts: endpoints that it has not hit
        self._under_way = False

    @property
    def text(self) -> str | None:
        """What is to be said of the pool as a whole, while an outage lasts."""
        return TEXT if self._under_way else None

    def note(
        self, endpoint_id: str, reached: bool | None, now: float, polled: Callable[[], Collection[str]]
    ) -> tuple[int, int] | None:
        """
        An endpoint was reached or not, or (None) the pool has it no more.

        Args:
            now: seconds by any clock, the same at each call.
            polled: tells the ids of the endpoints that are polled over a network at present.

        Returns:
            None but where an outage begins or ends with this: then how many endpoints are unreachable now, and of how
            many.  `text` says which of the two it is.
        """
        if self._reached.get(endpoint_id) is reached:
            return None  # mostly
        with self._lock:
            before = self._reached.pop(endpoint_id, None)
            self._fell.pop(endpoint_id, None)
            if reached is not None:
                self._reached[endpoint_id] = reached
            if reached is False:
                self._apart.discard(endpoint_id)
                if before:
                    self._fell[endpoint_id] = now
            return self._end_locked(polled()) if self._under_way else self._begin_locked(polled(), now)

    def _begin_locked(self, polled: Collection[str], now: float) -> tuple[int, int] | None:
        fallen = [each for each in polled if now - self._fell.get(each, float("-inf")) <= self.window]
        lately = len(fallen) + sum(1 for each in polled if self._reached.get(each))
        if lately < LEAST_ENDPOINTS or 2 * len(fallen) <= lately:
            return None
        self._under_way = True
        self._apart = set(self._reached).difference(fallen)
        return len(fallen), lately

    def _end_locked(self, polled: Collection[str]) -> tuple[int, int] | None:
        # Those that are polled instead of dead ones, since then, tell as much about the network.
        hit = [self._reached[each] for each in polled if each in self._reached and each not in self._apart]
        down = hit.count(False)
        if down and 2 * down >= len(hit):
            return None
        self._under_way = False
        self._apart = set()
        self._fell.clear()  # who is still down is so for another reason
        return down, len(hit)
