"""The two clocks, and the one deadline that an operation hands down.

``time.monotonic`` is what the waits of `threading` count by, but it stands still while the machine sleeps.
Ages (of readings, of leases) must go on during sleep: a laptop that wakes up must not take yesterday's
reading for a fresh one.  Hence `boottime` (CLOCK_BOOTTIME, Linux; elsewhere the monotonic clock).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial


def _boot_clock() -> Callable[[], float]:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic if clock is None else partial(time.clock_gettime, clock)


#: Seconds since boot, sleep included (where the platform has such a clock).
boottime: Callable[[], float] = _boot_clock()


class Deadline:
    """
    An instant on the monotonic clock, or never.

    One is made where an operation starts and is passed down, so that retries and steps share it.
    """

    __slots__ = ("at",)

    def __init__(self, at: float | None) -> None:
        #: ``time.monotonic()`` of the instant; None means never.
        self.at = at

    @classmethod
    def after(cls, timeout: float | None) -> Deadline:
        """The instant *timeout* seconds from now; None means never."""
        return cls(None if timeout is None else time.monotonic() + timeout)

    def remaining(self) -> float | None:
        """Seconds left, at least 0; None means without end."""
        if self.at is None:
            return None
        return max(0.0, self.at - time.monotonic())

    def passed(self) -> bool:
        """Whether the instant has come."""
        return self.at is not None and time.monotonic() >= self.at

    def within(self, seconds: float) -> float:
        """The smaller of *seconds* and what is left, at least 0."""
        left = self.remaining()
        return seconds if left is None else min(seconds, left)

    def __repr__(self) -> str:
        left = self.remaining()
        return "Deadline(never)" if left is None else f"Deadline(in {left:.3f} s)"
