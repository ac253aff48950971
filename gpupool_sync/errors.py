"""Every error this package raises on purpose, and its one warning about exclusivity.

Arguments go to ``super().__init__``, so every error pickles without help.
"""

from __future__ import annotations

import contextlib
import sys
from types import FrameType


class GPUPoolError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(GPUPoolError, ValueError):
    """A setting, argument or environment variable has a value that cannot be used."""


class MissingExtra(GPUPoolError, ImportError):
    """A part that needs an optional dependency was used without it; the message has the pip line."""


class PoolClosed(GPUPoolError):
    """The pool was closed, before the call or while it waited."""


class TooManyWaiting(GPUPoolError):
    """`max_waiting` callers wait already; this one was turned away at once."""


class NoSuchGPU(GPUPoolError):
    """
    No configured endpoint has a GPU that could ever satisfy the request.

    Raised only when every endpoint has answered, so that it is a fact and not a guess.
    """


class AcquireTimeout(GPUPoolError, TimeoutError):
    """
    No suitable GPU became free within the caller's timeout; the message says why, card by card.

    `explanation` has the same as data (`gpupool_sync.status.Explanation`); None in a copy from another process.
    """

    explanation: object = None


class WorkerTimeoutError(AcquireTimeout):
    """`GPUWorkerPoolClient.request_gpu` waited in vain, as the predecessor calls it."""


class ServiceUnavailableError(WorkerTimeoutError):
    """The same, and no endpoint answered when the time was over."""


class LeaseLost(GPUPoolError):
    """The lease is gone: it expired, was revoked, or its arbiter could not confirm it in time."""


class StaleAssignmentError(LeaseLost):
    """A GPU was given back to a `GPUWorkerPoolClient` that had lost it before: somebody else may have used it."""


class LeaseStoreError(GPUPoolError):
    """The arbiter of a card could not be asked, or broke its contract; nothing was granted."""


class RemoteGPUError(GPUPoolError, RuntimeError):
    """The GPU is on another host, so this process cannot use it as a CUDA device."""


class EndpointUnavailable(GPUPoolError):
    """An endpoint could not be read; `endpoint_id` says which, `__cause__` why."""

    def __init__(self, endpoint_id: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(endpoint_id, message, retry_after)
        self.endpoint_id = endpoint_id
        self.message = message
        #: Seconds the server asked us to stay away, already capped; None if it did not ask.
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.endpoint_id}: {self.message}"


class BadAnswer(GPUPoolError):
    """An endpoint answered, but not with GPU statistics; `message` says what is wrong with the answer."""

    def __init__(self, endpoint_id: str, message: str) -> None:
        super().__init__(endpoint_id, message)
        self.endpoint_id = endpoint_id
        self.message = message

    def __str__(self) -> str:
        return f"{self.endpoint_id}: {self.message}" if self.endpoint_id else self.message


class ExclusivityWarning(UserWarning):
    """A card is guarded among fewer than everybody who can reach it: of another machine, or from within a container."""


def unpin(error: BaseException, above: int = 0) -> None:
    """
    Drop the variables of the frames that *error* and what it is chained to were raised through, below the caller.

    Libraries have frames with a variable for the very error that left them.  Such a cycle lives until Python's
    collector comes by, and with it the frames of all callers: so does a handle that an interrupt leaves behind there,
    whose end is what its lease is released by.

    Only frames that have ended, and that were called by the caller (or, with *above*, so many calls further up): what
    callers are handling meanwhile is theirs, and is chained to it too.
    """
    catcher = sys._getframe(1 + above)
    seen: set[int] = set()
    left: list[object] = [error]
    while left:
        each = left.pop()
        if not isinstance(each, BaseException) or id(each) in seen:
            continue
        seen.add(id(each))
        step = each.__traceback__
        if step is not None and not _is_below(step.tb_frame, catcher):
            continue
        while step is not None:
            # Clearing a generator's frame would end it, and its `with` blocks.
            if not step.tb_frame.f_code.co_flags & _GENERATOR:
                with contextlib.suppress(RuntimeError):  # it has not ended: that is where the error was caught
                    step.tb_frame.clear()
            step = step.tb_next
        left += [each.__cause__, each.__context__, *each.args, getattr(each, "reason", None)]


# `inspect.CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR`; that module takes long to import.
_GENERATOR = 0x20 | 0x80 | 0x200


def _is_below(frame: FrameType | None, catcher: FrameType) -> bool:
    while frame is not None:
        if frame is catcher:
            return True
        frame = frame.f_back
    return False
