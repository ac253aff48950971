"""What CUDA has made of this process: whether it is initialised, and which device has which number.

No library is imported or initialised for that.  The calls are those of the CUDA driver API,
https://docs.nvidia.com/cuda/cuda-driver-api/.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from gpupool_sync.errors import GPUPoolError
from gpupool_sync.models import GPUReading

#: ``CUDA_ERROR_NOT_INITIALIZED``: nobody called ``cuInit`` in this process.
_NOT_INITIALISED = 3


def _driver() -> Any:
    """The driver's library, if some library of this process has loaded it; else None."""
    try:
        with open("/proc/self/maps") as maps:
            if not any("libcuda.so" in line for line in maps):
                return None
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def initialised() -> bool:
    """
    Whether CUDA is initialised in this process, so that a mask would be ignored.

    Asks the driver's library, if some library (PyTorch, CuPy, JAX, TensorFlow, Numba …) has loaded it:
    ``cuCtxGetCurrent`` answers ``CUDA_ERROR_NOT_INITIALIZED`` until ``cuInit``.  PyTorch is asked too, for platforms
    that do not tell what is loaded.
    """
    torch = sys.modules.get("torch")
    asked = getattr(getattr(torch, "cuda", None), "is_initialized", None)
    if callable(asked) and asked():
        return True
    driver = _driver()
    if driver is None:
        return False
    try:
        return bool(driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) != _NOT_INITIALISED)
    except AttributeError:
        return False


def _visible_uuids() -> list[str] | None:
    """
    The UUIDs of CUDA's devices, as 32 hexadecimal digits in CUDA's order; None where it does not tell.

    What CUDA says is what counts once it is initialised: the variables may have been changed since.
    """
    driver = _driver()
    if driver is None:
        return None
    count = ctypes.c_int()
    uuids = []
    try:
        # The second version tells the instance's UUID for a MIG instance, the first one that of its card.
        ask = driver.cuDeviceGetUuid_v2
        if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return None
        for number in range(count.value):
            device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
            if driver.cuDeviceGet(ctypes.byref(device), number) != 0 or ask(ctypes.byref(uuid), device) != 0:
                return None
            uuids.append(bytes(uuid).hex())
    except AttributeError:
        return None
    return uuids


def position(reading: GPUReading, names: str) -> str:
    """
    The card's name for CUDA in this process, such as ``"cuda:1"``; changes nothing.

    Args:
        reading: the card, which is of this machine.
        names: what to call it in the error.

    Raises:
        GPUPoolError: CUDA does not see it here, or nobody can tell which number it has.
    """
    known = _visible_uuids() if initialised() else None
    if known is not None and reading.uuid is not None:
        digits = reading.uuid.removeprefix("GPU-").removeprefix("MIG-").replace("-", "").lower()
        if digits in known:
            return f"cuda:{known.index(digits)}"
        raise GPUPoolError(
            f"CUDA was initialised in this process without {names} among its {len(known)} devices, and cannot be told "
            "of others any more; call activate() before CUDA is used, or compute in a process of its own: gpu.run()"
        )
    return _by_mask(reading, names)


def _by_mask(reading: GPUReading, names: str) -> str:
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Only in this order does a number mean the card that NVML calls so; by default CUDA counts the fastest first.
    numbers_hold = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if mask is None:
        if numbers_hold:
            return f"cuda:{reading.local_gpu_id}"
        raise GPUPoolError(
            f"CUDA counts devices in an order of its own here, so the number of {names} is unknown; call activate() "
            "before CUDA is initialised, or set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    for number, item in enumerate(part.strip() for part in mask.split(",")):
        if item.startswith(("GPU-", "MIG-")):
            if reading.uuid is not None and len(item) > 4 and reading.uuid.startswith(item):
                return f"cuda:{number}"
        elif not item.isascii() or not item.isdigit():
            break  # CUDA sees nothing from the first invalid item on
        elif numbers_hold and int(item) == reading.local_gpu_id:
            return f"cuda:{number}"
    raise GPUPoolError(
        f"CUDA_VISIBLE_DEVICES={mask} does not show {names} to this process; call activate() before CUDA is initialised"
    )
