"""What every way of reading cards promises."""

from __future__ import annotations

from typing import Protocol

from gpupool_sync.clock import boottime
from gpupool_sync.devices.host import host_identity
from gpupool_sync.errors import GPUPoolError
from gpupool_sync.models import Sample


class DeviceError(GPUPoolError):
    """This machine's cards cannot be read at all: no driver, no answer, or no sense in it."""


class Reader(Protocol):
    """
    One way to look at one machine's cards.

    `read` is called by one thread at a time; `close` by any, also during a `read`.
    """

    #: For people: "NVML", "nvidia-smi", "8 simulated cards", or why there are none.
    description: str

    def read(self, timeout: float) -> Sample:
        """
        Look at every card, within about *timeout* seconds.

        A card that is lost or does not answer is a `GPUFault` of the sample and costs no other card its reading.

        Raises:
            DeviceError: no card can be read.
        """

    def close(self) -> None:
        """Let go of the driver; idempotent, and bounded even if the driver hangs."""


class NoReader:
    """A machine without any way to read cards: it has none as far as anybody can tell."""

    #: False: an empty sample means "cannot look", not "looked and found none".
    available = False

    def __init__(self, description: str) -> None:
        self.description = description

    def read(self, timeout: float) -> Sample:
        return Sample(gpus=(), taken_at=boottime(), host=host_identity(), problems=(self.description,))

    def close(self) -> None:
        """Nothing to let go of."""
