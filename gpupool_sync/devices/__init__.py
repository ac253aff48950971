"""This machine's own cards, by whatever way there is to read them, and which machine this is.

>>> from gpupool_sync import devices
>>> devices.open_reader().read(timeout=10.0)  # doctest: +SKIP
Sample(gpus=(GPUReading(local_gpu_id=0, name='NVIDIA A100-SXM4-80GB', ...
"""

from __future__ import annotations

from gpupool_sync.devices.base import DeviceError, NoReader, Reader
from gpupool_sync.devices.host import host_identity
from gpupool_sync.devices.passthrough import Passthrough
from gpupool_sync.devices.passthrough import asked_for as passthrough_asked_for

__all__ = ["DeviceError", "NoReader", "Passthrough", "Reader", "host_identity", "open_reader", "passthrough_asked_for"]


def open_reader() -> Reader:
    """
    The best way to read this machine's cards: NVML, else nvidia-smi, else a reader that finds none and says why.

    Nothing is asked of the driver yet, so this does not hang; it does not raise either.  ``CUDA_VISIBLE_DEVICES`` is
    read here, once: a process that later masks itself goes on seeing all its cards.
    """
    # Where nothing is read, nothing of this is imported.
    import ctypes
    import shutil

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pass
    else:
        from gpupool_sync.devices.nvml import NvmlReader

        return NvmlReader()
    program = shutil.which("nvidia-smi")
    if program is not None:
        from gpupool_sync.devices.nvidia_smi import NvidiaSmiReader

        return NvidiaSmiReader(program)
    return NoReader("no GPUs can be read here: neither libnvidia-ml.so.1 (NVML) nor the program nvidia-smi was found")
