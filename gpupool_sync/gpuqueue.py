"""The queue of GPU numbers that old scripts pass around, with leases behind it: `GPUPool.as_queue`."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gpupool_sync.clock import Deadline
from gpupool_sync.errors import AcquireTimeout, ConfigError

if TYPE_CHECKING:
    from gpupool_sync.handle import GPU
    from gpupool_sync.models import Card

logger = logging.getLogger(__name__)

_ORDER = "CUDA_DEVICE_ORDER"


class Pool(Protocol):
    """The pool, as a queue sees it."""

    @property
    def gpu(self) -> Callable[..., Any]: ...
    @property
    def acquire(self) -> Callable[..., Any]: ...
    def numbered_cards(self) -> tuple[bool, Mapping[str, Sequence[Card]]]: ...
    def status(self) -> Any: ...


class GPUQueue:
    """
    ``get()`` and ``put()`` of GPU numbers, each with a lease behind it; made by `GPUPool.as_queue`.

    For scripts that hand out numbers by a ``multiprocessing.Manager().Queue()``: it is used in the same way and can be
    passed to other processes, but a process that dies with a number gives it back, and other users are kept out.

    The numbers are those of nvidia-smi; MIG instances have none, and are left out.
    CUDA by default counts otherwise where the cards differ, so `get` sets
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` in this process, unless the variable is set.
    """

    def __init__(self, pool: Pool, numbers: int | Iterable[int] | None = None, **request: Any) -> None:
        what = "a count of GPUs (numbers from 0) or their numbers are allowed, or None for all"
        if isinstance(numbers, int) and (isinstance(numbers, bool) or numbers < 1):
            raise ConfigError(f"as_queue({numbers!r}): {what}")
        try:
            chosen = None if numbers is None else frozenset(range(numbers) if isinstance(numbers, int) else numbers)
        except TypeError:
            raise ConfigError(f"as_queue({numbers!r}): {what}") from None
        if chosen is not None and not (chosen and all(type(each) is int and each >= 0 for each in chosen)):
            raise ConfigError(f"as_queue({numbers!r}): {what}")
        for name in ("timeout", "local"):
            if name in request:
                raise ConfigError(f"{name}={request[name]!r}: a queue hands out this machine's GPUs, and get() waits")
        pool.gpu(**request)  # acquires nothing; what cannot be asked for is said here
        self._pool = pool
        self._numbers = chosen
        self._request = request
        self._id = os.urandom(8).hex()
        self._fresh_state()
        _originals[self._id] = self
        _queues.add(self)

    def _fresh_state(self) -> None:
        # Guards _out.
        self._lock = threading.Lock()
        self._out: dict[int, list[GPU]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _queue_again, (self._id, self._pool, self._numbers, self._request)

    def _restrictions(self) -> tuple[dict[str, Any], frozenset[str]]:
        """What to ask the pool for, and the global ids that will do."""
        request = dict(self._request)
        asked = _listed(request.get("endpoint"))
        real, cards = self._pool.numbered_cards()
        if asked:
            cards = {endpoint_id: cards[endpoint_id] for endpoint_id in cards if endpoint_id in asked}
        if real:
            request["local"] = True
        elif len(cards) > 1:
            raise ConfigError(
                f"the simulated GPUs of {', '.join(cards)} have the same numbers: say which, as in "
                f"as_queue(endpoint={next(iter(cards))!r})"
            )
        else:
            request["endpoint"] = list(cards) or asked
        others: list[str] = []
        good: list[str] = []
        for card in (card for each in cards.values() for card in each):
            # CUDA counts no MIG instances: by the number that we give one it would find nothing.
            counted = not (card.reading.uuid or "").startswith("MIG-")
            chosen = counted and (self._numbers is None or card.reading.local_gpu_id in self._numbers)
            (good if chosen else others).append(card.global_gpu_id)
        if others:
            request["exclude"] = [*_listed(request.get("exclude")), *others]
        return request, frozenset(good)

    def get(self, block: bool = True, timeout: float | None = None) -> int:
        """
        The number of a GPU of this machine that nobody else has until `put`.

        Raises:
            queue.Empty: none came free within *timeout* seconds, or at once if not *block*.
            NoSuchGPU: this machine has no such GPU.
            ConfigError: the pool has nothing but simulated GPUs of several servers; say which by ``endpoint=``.
        """
        import queue

        deadline = Deadline.after(timeout if block else 0)
        while True:
            request, good = self._restrictions()
            try:
                gpu: GPU = self._pool.acquire(timeout=deadline.remaining(), **request)
            except AcquireTimeout as exc:
                raise queue.Empty(str(exc)) from exc
            if gpu.global_gpu_id in good:
                break
            gpu.release()  # one that came into view just now, and may not be of the numbers that were asked for
        number = gpu.local_gpu_id
        with self._lock:
            self._out.setdefault(number, []).append(gpu)
        if os.environ.setdefault(_ORDER, "PCI_BUS_ID") != "PCI_BUS_ID":
            logger.warning("%s=%s: CUDA may take another GPU for number %d", _ORDER, os.environ[_ORDER], number)
        return number

    def get_nowait(self) -> int:
        """The same, without waiting."""
        return self.get(block=False)

    def put(self, number: int, block: bool = True, timeout: float | None = None) -> None:
        """
        Give back what `get` returned, in the process that got it.

        A number that this process has not got is ignored, with a line in the log: scripts fill their queue with all
        numbers before they begin.
        """
        with self._lock:
            gpus = self._out.get(number)
            gpu = gpus.pop() if gpus else None
            if not gpus:
                self._out.pop(number, None)
        if gpu is None:
            logger.info("GPU %s was put into the queue, but was not got from it here", number)
            return
        gpu.release()

    def put_nowait(self, number: int) -> None:
        """The same; `put` never waits."""
        self.put(number)

    def qsize(self) -> int:
        """How many numbers `get` could return now, as far as is known."""
        good = self._restrictions()[1]
        return sum(gpu.is_available and gpu.global_gpu_id in good for gpu in self._pool.status().gpus)

    def empty(self) -> bool:
        """Whether `get` would wait, as far as is known."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Never: `put` does not wait."""
        return False

    def __repr__(self) -> str:
        numbers = "all GPUs" if self._numbers is None else f"GPUs {', '.join(map(str, sorted(self._numbers)))}"
        return f"<GPUQueue of {numbers} of this machine, {sum(map(len, self._out.values()))} out>"


def _listed(names: Any) -> Sequence[str]:
    return (names,) if isinstance(names, str) else tuple(names or ())


# -- in other processes --------------------------------------------------------------------------------------------

# By id. A queue that comes with each task is the same one each time: what one task got another can put, and its pool is
# opened once. Single dict operations only, which are atomic.
_originals: weakref.WeakValueDictionary[str, GPUQueue] = weakref.WeakValueDictionary()
_copies: dict[str, GPUQueue] = {}
_queues: weakref.WeakSet[GPUQueue] = weakref.WeakSet()


def _queue_again(name: str, pool: Pool, numbers: Iterable[int] | None, request: dict[str, Any]) -> GPUQueue:
    known = _originals.get(name)
    if known is None:
        made = GPUQueue(pool, numbers, **request)
        made._id = name
        known = _copies.setdefault(name, made)
        _originals[name] = known
    return known


def _after_fork_in_child() -> None:
    for each in list(_queues):
        with contextlib.suppress(Exception):
            each._fresh_state()  # what the parent has out is not ours to put back


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
