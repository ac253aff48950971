"""Renews the leases that have a ttl, and tells when one is lost.

A lease is good until 0.8 of its ttl after its last successful renewal was *sent*: the arbiter counts from later, so the
holder always gives up before a rival can have the card.  Lost is final: an answer that comes after that instant
revives nothing.  Whoever asks compares the clock with `Keeper.good_until`; the keeper's thread is needed for renewals
and for `on_lost`, not for the truth.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping

from gpupool_sync.clock import boottime
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases.base import LeaseStore
from gpupool_sync.starting import start

logger = logging.getLogger(__name__)

#: Share of the ttl after which the holder gives up.
GIVE_UP = 0.8
#: Share of the ttl after which a lease is renewed.
RENEW = 1.0 / 3.0
#: Share of the ttl between two attempts at an arbiter that does not answer.
RETRY = 1.0 / 20.0
#: Arbiters that are asked at the same time.
MAX_AT_ONCE = 32
#: Seconds that the thread sleeps at most: clocks that count suspend go on while timers stand still.
LONGEST_SLEEP = 1.0
#: Seconds that the thread stays with nothing to keep: where leases are short, one thread does for many of them.
LINGER = 2.0

#: `Keeper.good_until` of a lease that is lost.
LOST = -math.inf


class _Kept:
    __slots__ = ("due", "good_until", "id", "store", "told", "ttl")

    def __init__(self, lease_id: str, store: LeaseStore, ttl: float, sent_at: float) -> None:
        self.id = lease_id
        self.store = store
        self.ttl = ttl
        self.good_until = sent_at + GIVE_UP * ttl
        self.due = sent_at + RENEW * ttl
        self.told = False  # on_lost was called


def _start_thread(work: Callable[[], None]) -> None:
    start(threading.Thread(target=work, name="gpupool-keeper-renewal", daemon=True))


class Keeper:
    """
    Keeps the leases of one pool.

    One thread watches the clock; it starts with the first lease and ends `LINGER` seconds after the last.  Each
    arbiter is asked on a thread of its own, by one request for all of its leases, so that one that hangs delays no
    other.

    Args:
        on_lost: called with a lease's id when it is lost, once, on the keeper's thread; what it raises is logged.
        spawn: runs a renewal; by default on a thread.
    """

    def __init__(
        self,
        on_lost: Callable[[str], object],
        *,
        clock: Callable[[], float] = boottime,
        name: str = "gpupool-keeper",
        spawn: Callable[[Callable[[], None]], None] = _start_thread,
    ) -> None:
        self._on_lost = on_lost
        self._clock = clock
        self._name = name
        self._spawn = spawn
        # Guards what follows; never held during a renewal or on_lost. Callers take the lock itself: its `with` is
        # atomic under interrupts, that of a Condition can be left half entered.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._kept: dict[str, _Kept] = {}
        self._busy: set[int] = set()  # ids of the stores that are being asked
        self._woken = False
        self._wakes_at = math.inf  # by the clock, when the thread looks again by itself; while it is awake: inf
        self._stopping = False
        self._thread: threading.Thread | None = None

    def add(self, lease_id: str, store: LeaseStore, ttl: float, sent_at: float) -> None:
        """
        Keep a lease.

        Args:
            ttl: seconds, as the arbiter told it.
            sent_at: `clock.boottime` before the claim was sent that was granted.
        """
        with self._lock:
            self._kept[lease_id] = kept = _Kept(lease_id, store, ttl, sent_at)
            if kept.due < self._wakes_at:  # rarely: it is due in a third of its ttl
                self._woken = True
                self._changed.notify_all()
            running = self._thread is not None
        if not running:
            self.ensure_running()

    def remove(self, lease_id: str) -> None:
        """Keep it no more: before it is released. Idempotent."""
        with self._lock:
            self._kept.pop(lease_id, None)

    def good_until(self, lease_id: str) -> float | None:
        """
        The `clock.boottime` at which the lease is lost unless it is renewed before; None: it is not kept here.

        Never takes a lock.  Once that instant has passed, it does not move any more.
        """
        kept = self._kept.get(lease_id)
        return None if kept is None else kept.good_until

    def __len__(self) -> int:
        return len(self._kept)

    def threads(self) -> int:
        """How many threads of this keeper are alive: its own, and one for each arbiter that is being asked."""
        with self._lock:
            return (self._thread is not None) + len(self._busy)

    def ensure_running(self) -> None:
        """Start the thread if there is something to keep and it does not run; supervision."""
        with self._lock:
            if self._stopping or not self._kept or self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            start(thread)
            self._thread = thread

    def stop(self, timeout: float = 5.0) -> None:
        """Renew no more; waits up to *timeout* seconds for the thread. Leases end with their ttl."""
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
            if thread.is_alive():
                logger.warning("the thread %s does not stop: on_lost has not returned", thread.name)

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        me = threading.current_thread()
        with self._lock:
            # Whoever started it may have been interrupted before it was noted; then perhaps another one was started.
            if self._thread is None:
                self._thread = me
            if self._thread is not me:
                return
        try:
            self._keep()
        except BaseException:
            with self._changed:
                self._thread = None  # `ensure_running` starts another
            raise

    def _keep(self) -> None:
        idle_since: float | None = None
        while True:
            try:
                pause = self.step()
            except Exception:
                logger.exception("keeping the leases broke; going on")
                pause = LONGEST_SLEEP
            with self._changed:
                if self._stopping:
                    return
                if self._kept:
                    idle_since = None
                else:
                    now = time.monotonic()
                    idle_since = now if idle_since is None else idle_since
                    pause = idle_since + LINGER - now
                    if pause <= 0.0:
                        # Decided under the lock: whoever adds one now starts another thread.
                        self._thread = None
                        return
                if not self._woken:
                    pause = min(pause, LONGEST_SLEEP)
                    self._wakes_at = self._clock() + pause
                    self._changed.wait(pause)
                    self._wakes_at = math.inf
                self._woken = False

    def step(self) -> float:
        """Report what is lost, renew what is due; returns the seconds until there is something to do."""
        now = self._clock()
        lost: list[_Kept] = []
        due: dict[int, list[_Kept]] = {}
        with self._changed:
            for kept in self._kept.values():
                if now >= kept.good_until:
                    if not kept.told:
                        kept.told = True
                        lost.append(kept)
                elif id(kept.store) not in self._busy:
                    due.setdefault(id(kept.store), []).append(kept)
            # All leases of a store together, as soon as one is due: next time they are due together.
            ready = sorted((min(each.due for each in mine), key) for key, mine in due.items())
            begun = [key for at, key in ready if at <= now][: MAX_AT_ONCE - len(self._busy)]
            self._busy.update(begun)
            next_at = min(
                [kept.good_until for kept in self._kept.values() if not kept.told]
                + [at for at, key in ready if key not in begun and at > now],
                default=math.inf,
            )
        for key in begun:
            self._begin(due[key])
        for kept in lost:
            self._report(kept)
        return min(LONGEST_SLEEP, max(0.0, next_at - self._clock()))

    def _begin(self, leases: list[_Kept]) -> None:
        try:
            self._spawn(lambda: self._renew(leases))
        except RuntimeError:  # no thread to be had: later, perhaps
            logger.warning("no thread could be started to renew %d leases", len(leases))
            self._finish(leases, None, self._clock())

    def _renew(self, leases: list[_Kept]) -> None:
        store = leases[0].store
        sent_at = self._clock()
        alive = None
        try:
            alive = store.renew([kept.id for kept in leases])
        except LeaseStoreError as exc:
            logger.warning("%d leases could not be renewed: %s", len(leases), exc)
        except Exception:
            logger.exception("renewing at %s broke", store.description)
        finally:
            self._finish(leases, alive, sent_at)

    def _finish(self, leases: list[_Kept], alive: Mapping[str, bool] | None, sent_at: float) -> None:
        with self._changed:
            self._busy.discard(id(leases[0].store))
            now = self._clock()
            for kept in leases:
                answer = None if alive is None else alive.get(kept.id)
                if now >= kept.good_until:
                    continue  # whoever asked meanwhile was told that it is lost
                if answer is None:
                    kept.due = now + RETRY * kept.ttl
                elif answer:
                    kept.good_until = sent_at + GIVE_UP * kept.ttl
                    kept.due = sent_at + RENEW * kept.ttl
                else:
                    kept.good_until = LOST
            self._woken = True
            self._changed.notify_all()

    def _report(self, kept: _Kept) -> None:
        with self._changed:
            if self._kept.get(kept.id) is not kept:
                return  # released meanwhile
        try:
            self._on_lost(kept.id)
        except Exception:
            logger.exception("on_lost raised")
