"""Who computes on this machine's cards, against who holds them: each mismatch is told once.

A lease is a claim that the card does not check.  What the readings show of processes tells when a program of ours
uses a card that it did not ask for, or somebody else's uses ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import attrs

from gpupool_sync.models import Card, ComputeProcess

logger = logging.getLogger(__name__)

#: The first pid namespace of every Linux kernel (PROC_PID_INIT_INO, include/linux/proc_ns.h). In others the driver's
#: process ids are not ours.
_FIRST_NAMESPACE = "pid:[4026531836]"
#: So many generations a process is traced back.
_GENERATIONS = 64
#: Warnings that are remembered; after so many they may be repeated.
_REMEMBERED = 1000
#: Shares the card among processes on purpose, and shows as one of its own.
_SHARERS = ("nvidia-cuda-mps",)


@attrs.frozen
class Claimed:
    """Who has a lease on a card, as far as that matters here."""

    ours: bool  # this pool's
    shared: bool
    pids: frozenset[int]  # of the holders on this machine


def sees_the_drivers_pids(link: str = "/proc/self/ns/pid") -> bool:
    """Whether process ids mean the same to the driver and to us."""
    try:
        return os.readlink(link) == _FIRST_NAMESPACE
    except OSError:
        return False


def parent_of(pid: int, proc: Path = Path("/proc")) -> int | None:
    """The process that *pid* is a child of, by ``/proc``; None if that is not told."""
    try:
        # After the name, which is in brackets and may contain anything; then state and parent.
        fields = (proc / str(pid) / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return int(fields[1])
    except (OSError, ValueError, IndexError):
        return None


class Bystanders:
    """Compares readings with leases; one for each pool, used by the polls' threads in turns."""

    def __init__(
        self,
        *,
        parent_of: Callable[[int], int | None] = parent_of,
        enabled: Callable[[], bool] = sees_the_drivers_pids,
    ) -> None:
        self._parent_of = parent_of
        self._enabled: bool | None = None
        self._find_out = enabled
        self._suspected: dict[str, set[tuple[int, bool]]] = {}
        self._told: set[tuple[str, int, bool]] = set()

    def look(self, cards: Iterable[Card], claimed: Callable[[str], Claimed]) -> None:
        """
        Log a warning for each process that is where it should not be, in this reading and in the one before.

        A process may begin before the reading and the lease after it, so one alone proves nothing.
        """
        if self._enabled is None:
            self._enabled = self._find_out()
        if not self._enabled:
            return
        suspected: dict[str, set[tuple[int, bool]]] = {}
        for card in cards:
            for process in card.reading.processes or ():
                if process.pid is None or (process.name or "").startswith(_SHARERS):
                    continue
                who = claimed(card.key)
                ours = self._is_of(process.pid, {os.getpid()})
                if who.ours == ours or (who.ours and who.shared):
                    continue
                # Somebody computes on our card, or we on one that is not ours, unless it is our parent's.
                if ours and any(self._is_of(os.getpid(), {pid}) for pid in who.pids):
                    continue
                if not ours and self._is_of(process.pid, who.pids):
                    continue
                suspected.setdefault(card.key, set()).add((process.pid, ours))
                if (process.pid, ours) in self._suspected.get(card.key, ()):
                    self._tell(card, process, ours)
        self._suspected = suspected

    def _is_of(self, pid: int, ancestors: Collection[int]) -> bool:
        """Whether it is one of them, or a descendant."""
        current: int | None = pid
        for _ in range(_GENERATIONS):
            if current in ancestors:
                return True
            if current is None or current <= 1:
                return False
            current = self._parent_of(current)
        return False

    def _tell(self, card: Card, process: ComputeProcess, ours: bool) -> None:
        if (told := (card.key, process.pid or 0, ours)) in self._told:
            return
        if len(self._told) >= _REMEMBERED:
            self._told.clear()
        self._told.add(told)
        if ours:
            logger.warning(
                "%s, of this program, computes on %s without holding it: its lease is over, or it never had one; what "
                "has initialised CUDA keeps memory there until it ends (gpu.run() and pool.executor() end before that)",
                process,
                card.global_gpu_id,
            )
        else:
            logger.warning(
                "%s computes on %s, which this pool holds, and is none of its children: it has not asked for the GPU, "
                "or not at the same arbiter",
                process,
                card.global_gpu_id,
            )
