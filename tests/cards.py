"""This machine with cards that a test invents: the pool reads them as its own, without any server."""

from __future__ import annotations

import threading

import attrs

from gpupool_sync import GPUPool, devices
from gpupool_sync.clock import boottime
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import GPUFault, GPUReading, HostIdentity, Sample

HERE = HostIdentity("boot-id-of-this-test", "here")


def reading(index, **changes):
    values = {
        "local_gpu_id": index,
        "name": "NVIDIA A100",
        "uuid": f"GPU-{index:08d}",
        "memory_total_mb": 81920.0,
        "memory_used_mb": 0.0,
        "memory_usage_percent": 0.0,
        "utilization_percent": 0.0,
        "processes": (),
    }
    return GPUReading(**{**values, **changes})


class Cards:
    """A `devices.Reader` whose answer the test changes."""

    description = "cards of a test"

    def __init__(self, number: int) -> None:
        self._lock = threading.Lock()
        self.gpus = [reading(index) for index in range(number)]
        self.faults: tuple[GPUFault, ...] = ()
        self.error: Exception | None = None
        self.reads = 0
        self.age = 0.0

    def set(self, index, **changes) -> None:
        with self._lock:
            self.gpus[index] = attrs.evolve(self.gpus[index], **changes)

    def read(self, timeout: float) -> Sample:
        with self._lock:
            self.reads += 1
            if self.error is not None:
                raise self.error
            return Sample(tuple(self.gpus), boottime() - self.age, self.faults, HERE)

    def close(self) -> None:
        pass


def local_pool(monkeypatch, cards: Cards, **options) -> GPUPool:
    """A pool over *cards* with leases of its own; not opened yet."""
    monkeypatch.setattr(devices, "open_reader", lambda: cards)
    monkeypatch.setattr(devices, "host_identity", lambda: HERE)
    options.setdefault("lease_store", MemoryStore())
    options.setdefault("poll_interval", 0.05)
    return GPUPool(**options)
