"""``GPU_POOL_PASSTHROUGH=1``: the CPU in the place of a GPU, for programs that are written on a laptop.

Only where this machine has no GPU and nobody configured an endpoint, and never without being asked for: a GPU
that cannot be read, or an arbiter that is down, stays an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import attrs

from gpupool_sync.clock import boottime
from gpupool_sync.devices.base import DeviceError, NoReader, Reader
from gpupool_sync.devices.host import host_identity
from gpupool_sync.errors import ConfigError
from gpupool_sync.models import GPUReading, Sample

logger = logging.getLogger(__name__)

VARIABLE = "GPU_POOL_PASSTHROUGH"
#: So many places there are at least, so that what asks for several GPUs runs too.
FEWEST = 8
#: What NVML says on a machine whose library has been installed without a GPU.
_NO_GPU = {"NVMLError_DriverNotLoaded", "NVMLError_LibraryNotFound", "NVMLError_NotFound"}


def asked_for(environ: Mapping[str, str] | None = None) -> bool:
    """
    Whether the variable says so.

    Raises:
        ConfigError: it says neither yes nor no.
    """
    text = (os.environ if environ is None else environ).get(VARIABLE, "").strip().lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    raise ConfigError(f"{VARIABLE}={text!r}: 1 or 0 is allowed")


class Passthrough:
    """Reads like *reader*; where that finds no GPU in this machine, places on the CPU stand in."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._said = False
        self.description = reader.description

    def read(self, timeout: float) -> Sample:
        try:
            sample = self._reader.read(timeout)
        except DeviceError as exc:
            if type(exc.__cause__).__name__ not in _NO_GPU:
                raise
        else:
            hidden = not isinstance(self._reader, NoReader) and os.environ.get("CUDA_VISIBLE_DEVICES") is not None
            if sample.gpus or sample.faults or hidden:
                return sample
        if not self._said:
            self._said = True
            self.description = f"{self._reader.description} ({VARIABLE}: the CPU stands in)"
            logger.warning(
                "this machine has no GPU, and %s is set: what is granted is the CPU, as device 'cpu'", VARIABLE
            )
        places = max(FEWEST, os.cpu_count() or 1)
        return Sample(
            gpus=tuple(GPUReading(local_gpu_id=number, name="CPU") for number in range(places)),
            taken_at=boottime(),
            host=attrs.evolve(host_identity(), passthrough=True),
        )

    def close(self) -> None:
        self._reader.close()
