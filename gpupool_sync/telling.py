"""Tells arbiters that claims have ended, where nobody should wait for that.

Whoever has got a GPU need not wait until the other arbiters that it stood in line at know of it; nor need anybody wait
for an arbiter that does not hear of a release.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from gpupool_sync.clock import Deadline
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases.base import LeaseStore, StoreClosed
from gpupool_sync.starting import start

logger = logging.getLogger(__name__)

#: Arbiters that are told at the same time.
MAX_AT_ONCE = 32
#: Seconds between two attempts to tell an arbiter that did not hear.
RETRY_AFTER = 5.0
#: Seconds after which an arbiter elsewhere need not be told any more: twice the longest ttl.
MAX_AGE = 600.0
#: Ids that one arbiter can be owed; beyond that its own rules for the silent have to do.
MAX_OWED = 10_000


class _Owed:
    """What one arbiter has still to be told."""

    __slots__ = ("busy", "due", "ids", "store")

    def __init__(self, store: LeaseStore, due: float) -> None:
        self.store = store
        self.ids: dict[str, float] = {}  # claim id -> since when it is owed
        self.due = due
        self.busy = False  # a thread is telling it


class Teller:
    """
    Tells the arbiters of one pool which claims have ended: tickets are withdrawn, leases released.

    Each arbiter is told by one thread at a time, of all its claims at once, so that one that hangs delays no other.
    The threads end when nothing is due.  What an arbiter does not hear is told again by `repeat`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Guards what follows; never held while an arbiter is told.
        self._lock = threading.Lock()
        self._owed: dict[int, _Owed] = {}  # by id of the store
        self._threads: set[threading.Thread] = set()

    def tell(self, stores: Iterable[LeaseStore], ids: Sequence[str], *, after: float = 0.0) -> None:
        """
        Have these arbiters told that the claims have ended; returns at once.

        Args:
            after: seconds until then, if `repeat` is called by then; what is owed already is told with it.
        """
        now = self._clock()
        with self._lock:
            for store in stores:
                owed = self._owed.setdefault(id(store), _Owed(store, now + after))
                owed.due = min(owed.due, now + after)
                for claim_id in ids:
                    if len(owed.ids) < MAX_OWED:
                        owed.ids.setdefault(claim_id, now)
        if after <= 0.0:
            self._start_thread()

    def repeat(self) -> None:
        """Tell what is due by now; returns at once. To be called now and then."""
        if not self._owed:
            return
        now = self._clock()
        with self._lock:
            for number, owed in list(self._owed.items()):
                if owed.store.scope == "everybody":  # others have no ttl
                    owed.ids = {claim_id: at for claim_id, at in owed.ids.items() if now - at < MAX_AGE}
                if not owed.ids and not owed.busy:
                    del self._owed[number]
            due = self._due_locked() is not None
        if due:
            self._start_thread()

    def owes(self, store: LeaseStore) -> bool:
        """Whether *store* has still to be told of something."""
        return id(store) in self._owed

    def threads(self) -> int:
        """How many of its threads are alive."""
        return len(self._threads)

    def finish(self, timeout: float) -> None:
        """Wait until all that is due was told, or *timeout* seconds."""
        deadline = Deadline.after(timeout)
        while not deadline.passed():
            with self._lock:
                threads = list(self._threads)
                due = self._due_locked() is not None
            if not threads and not due:
                break
            if due and not self._start_thread():
                break  # the interpreter ends
            for thread in threads:
                thread.join(deadline.remaining())

    # -- the threads -------------------------------------------------------------------------------------------

    def _due_locked(self) -> _Owed | None:
        """Somebody whom it is time to tell."""
        now = self._clock()
        for owed in self._owed.values():
            if owed.ids and not owed.busy and owed.due <= now:
                return owed
        return None

    def _start_thread(self) -> bool:
        """One more, whether it is needed or not: it notes itself, so nothing is left behind by an interrupt here."""
        if len(self._threads) >= MAX_AT_ONCE:
            return True
        try:
            start(threading.Thread(target=self._run, name="gpupool-teller", daemon=True))
        except RuntimeError as exc:  # no thread to be had: `repeat` tries again
            logger.info("arbiters are told later of claims that ended: %s", exc)
            return False
        return True

    def _run(self) -> None:
        me = threading.current_thread()
        with self._lock:
            if len(self._threads) >= MAX_AT_ONCE:
                return
            self._threads.add(me)
        try:
            while self._tell_one(me):
                pass
        finally:
            with self._lock:
                self._threads.discard(me)

    def _tell_one(self, me: threading.Thread) -> bool:
        with self._lock:
            owed = self._due_locked()
            if owed is None:
                # Decided under the lock: who owes something from now on starts another thread.
                self._threads.discard(me)
                return False
            owed.busy = True
            told, owed.ids = owed.ids, {}
            others = self._due_locked() is not None
        if others:
            self._start_thread()  # this one may take long
        done = False
        try:
            owed.store.release(list(told))
            done = True
        except StoreClosed:
            done = True  # it never will
        except LeaseStoreError as exc:
            logger.info("%s did not hear yet of %d claims that ended: %s", owed.store.description, len(told), exc)
        except Exception:
            logger.exception("telling %s of claims that ended broke", owed.store.description)
        finally:
            with self._lock:
                owed.busy = False
                if not done:
                    owed.ids = dict(islice({**told, **owed.ids}.items(), MAX_OWED))
                    # What became due in the meantime would not arrive either.
                    owed.due = self._clock() + RETRY_AFTER
                elif not owed.ids and self._owed.get(id(owed.store)) is owed:
                    del self._owed[id(owed.store)]
        return True
