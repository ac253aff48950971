"""Who waits in this process, and what wakes them.

A waiter sleeps on a plain lock: its acquire and release are single C calls, so that Ctrl-C in a caller cannot leave
a `Condition` half entered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from gpupool_sync.errors import LeaseStoreError, TooManyWaiting
from gpupool_sync.leases.base import LeaseStore
from gpupool_sync.starting import start

logger = logging.getLogger(__name__)

#: Seconds after which a waiter looks again by itself: hints are hints, and readings change.
RECHECK = 1.0
#: After a claim that its arbiter did not hear, or a connection for hints that broke: seconds until the next try, which
#: double up to RECHECK.
RETRY = 0.1
#: Seconds that the thread of a listener waits for a waiter that listens by itself to leave that to the thread.
YIELD_TIME = 0.1
#: So many of those who have waited longest look again when hints may have been lost.
LOOK_AGAIN = 8
#: Beyond so many waiters each re-check comes later in proportion, so that they do not eat the processor.
MANY_WAITERS = 64


class Waiter:
    """One caller that waits for a card; `id` is that of its claim."""

    __slots__ = ("_asleep", "_ears", "hints", "id")

    def __init__(self, id: str) -> None:
        self.id = id
        #: While it listens by itself: the thread, and what ends its listening.
        self._ears: tuple[int, Callable[[], None]] | None = None
        #: Which arbiters hinted, by `id`; whoever waits takes them out. Appending and popping are atomic.
        self.hints: list[int] = []
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wait(self, timeout: float) -> bool:
        """Sleep until woken, or *timeout* seconds; whether it was woken. A wake-up before the call counts."""
        return self._asleep.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Wake it; several wake-ups before it looks are one."""
        with contextlib.suppress(RuntimeError):  # it is awake already; or listens still, as another one heard its end
            self._asleep.release()
        ears = self._ears
        if ears is not None and ears[0] != threading.get_ident():
            ears[1]()

    def listen(self, store: OwnEars, timeout: float, alone: Callable[[], bool] = lambda: True) -> bool:
        """`wait`, while this thread itself hears the hints of *store*; until it is not *alone* at that any more."""
        end = time.monotonic() + timeout
        try:
            # Before the first look: who wakes it after that ends the listening.
            self._ears = threading.get_ident(), store.end_listening
            while not self._asleep.acquire(blocking=False):
                left = end - time.monotonic()
                if left <= 0.0 or not alone():
                    return False
                store.listen(left)
            return True
        finally:
            self._ears = None


@runtime_checkable
class OwnEars(Protocol):
    """A `LeaseStore` to which any number of threads may listen, each by itself."""

    def listen(self, timeout: float) -> None:
        """As in `LeaseStore`."""

    def is_listening(self) -> bool:
        """Whether hints can come to `listen` already."""

    def end_listening(self) -> None:
        """Make whoever is in `listen` come back, soon."""


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

    def rename(self, waiter: Waiter, id: str) -> None:
        """Its claim has another id from now on."""
        with self._lock:
            self._waiters.pop(waiter.id, None)
            waiter.id = id
            self._waiters[id] = waiter

    def leave(self, waiter: Waiter) -> None:
        """Go, whether served or not; idempotent."""
        with self._lock:
            self._waiters.pop(waiter.id, None)

    def hint(self, ids: Iterable[str], arbiter: int | None = None) -> None:
        """The `Hint` of a store, whose `id` is *arbiter*: wake those whose tickets may have become servable."""
        for claim_id in ids:
            waiter = self._waiters.get(claim_id)
            if waiter is not None:
                if arbiter is not None:
                    waiter.hints.append(arbiter)
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

    def recheck(self, failures: int = 0) -> float:
        """Seconds that a waiter sleeps at most, after so many claims in a row that did not arrive."""
        longest = RECHECK * max(1.0, len(self._waiters) / MANY_WAITERS)
        # Without a ticket it has no place: a connection that was cut once must not cost it the turn.
        return min(longest, _retry_after(failures)) if failures else longest


def _retry_after(failures: int) -> float:
    """Seconds until the next try, after so many in a row that failed."""
    return min(RECHECK, RETRY * 2.0 ** min(failures - 1, 10))


class Listener:
    """
    Who listens to an arbiter's hints in this process: one thread.

    It runs while somebody waits, and ends by itself when nobody has for a while.  Where the arbiter can be listened to
    by several threads, and there is one waiter only, that one listens itself: the way by another thread would cost
    as much as all the rest of a grant.
    """

    def __init__(self, store: LeaseStore) -> None:
        self._store = store
        # Guards _thread, _rooms, and the coming of _alone.
        self._lock = threading.Lock()
        self._rooms: weakref.WeakSet[WaitingRoom] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._alone: Waiter | None = None  # who listens by itself
        #: The store, if a waiter can listen to it by itself; else the thread must run before a ticket is left.
        self.ears = store if isinstance(store, OwnEars) else None

    def listen_for(self, room: WaitingRoom) -> None:
        """See to it that the thread runs as long as somebody is in *room*."""
        # Always under the lock: beside it, a thread that has just decided to end would still look alive.
        with self._lock:
            self._rooms.add(room)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="gpupool-listener", daemon=True)
                start(thread)
                self._thread = thread

    def wait(self, waiter: Waiter, room: WaitingRoom, timeout: float) -> bool:
        """Let *waiter*, who is in *room*, sleep until woken, or *timeout* seconds; whether it was woken."""
        ears = self.ears
        end = time.monotonic() + timeout
        if ears is not None and ears.is_listening() and self._is_alone(waiter, room):
            # Who comes after this look is not alone, and starts the thread.
            try:
                if waiter.listen(ears, timeout, self._no_thread):
                    return True
            finally:
                self._alone = None
            if self._no_thread():
                return False
        self.listen_for(room)
        return waiter.wait(max(0.0, end - time.monotonic()))

    def _is_alone(self, waiter: Waiter, room: WaitingRoom) -> bool:
        with self._lock:
            self._rooms.add(room)
            # Mostly there is one room.
            waiters = len(room) if len(self._rooms) == 1 else sum(map(len, self._rooms))
            alone = self._thread is None and waiters <= 1
            if alone:
                self._alone = waiter
            return alone

    def _no_thread(self) -> bool:
        return self._thread is None

    def _be_the_only_one(self) -> None:
        """
        Have the one who listens by itself leave that to this thread.

        While two listen, one of them may take what was to end the other's listening.
        """
        end = time.monotonic() + YIELD_TIME
        while self.ears is not None and self._alone is not None and time.monotonic() < end:
            self.ears.end_listening()
            time.sleep(0.001)

    def _anybody(self) -> bool:
        with self._lock:
            return any(len(room) for room in self._rooms)

    def _needed(self) -> bool:
        with self._lock:
            if any(len(room) for room in self._rooms):
                return True
            # Decided under the lock: who comes in now finds no thread and starts another one.
            self._thread = None
            return False

    def _run(self) -> None:
        me = threading.current_thread()
        with self._lock:
            # Whoever started it may have been interrupted before it was noted; then perhaps another one was started.
            if self._thread is None:
                self._thread = me
            if self._thread is not me:
                return
        try:
            self._be_the_only_one()
            self._listen_while_needed()
        except BaseException:
            with self._lock:
                self._thread = None  # the next one who waits starts another
            raise

    def _listen_while_needed(self) -> None:
        pause = threading.Event()
        told = False  # that it does not answer: once until it does again, not every second
        failures = 0  # in a row
        while self._needed():
            try:
                self._store.listen(getattr(self._store, "listen_time", RECHECK))
                told = False
                failures = 0
            except LeaseStoreError as exc:
                # With nobody left who waits, it is most likely a pool that closes, which deserves no line on a screen.
                news = not told and self._anybody()
                told = told or news
                level = logging.WARNING if news else logging.INFO
                logger.log(level, "no hints from %s: %s", self._store.description, exc)
                # What was under way to us when the connection broke is lost, and is not told again.
                with self._lock:
                    rooms = list(self._rooms)
                for room in rooms:
                    room.wake_oldest(LOOK_AGAIN)
                # Soon, as hints are not heard meanwhile; but an arbiter that is down is not asked for ever like that.
                failures += 1
                pause.wait(_retry_after(failures))
            except Exception:
                # Supervised: waiters look again by themselves each second, but they should not have to.
                logger.exception("listening to %s broke; going on", self._store.description)
                pause.wait(RECHECK)


_listeners: weakref.WeakKeyDictionary[LeaseStore, Listener] = weakref.WeakKeyDictionary()
# Guards _listeners: all pools of the process share one listener for each arbiter.
_listeners_lock = threading.Lock()


def listener(store: LeaseStore) -> Listener:
    """The listener of this process for *store*."""
    found = _listeners.get(store)
    if found is not None:
        return found
    with _listeners_lock:
        if store not in _listeners:
            _listeners[store] = Listener(store)
        return _listeners[store]


def _after_fork_in_child() -> None:
    global _listeners_lock, _listeners
    _listeners_lock = threading.Lock()
    _listeners = weakref.WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
