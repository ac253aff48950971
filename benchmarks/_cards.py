"""Pools over cards that are only thought of: no server, no driver, no network; everything else is real."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from benchmarks._harness import patched
from gpupool_sync import GPUPool, devices
from gpupool_sync import endpoint as endpoints
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import GPUReading, HostIdentity, Sample

HERE = HostIdentity("boot-id-of-the-benchmark", "here")


def _readings(host: int, number: int) -> tuple[GPUReading, ...]:
    return tuple(
        GPUReading(
            local_gpu_id=index,
            name="NVIDIA A100-SXM4-80GB",
            uuid=f"GPU-{host:08x}-0000-4000-8000-{index:012x}",
            memory_total_mb=81920.0,
            memory_used_mb=0.0,
            memory_usage_percent=0.0,
            utilization_percent=0.0,
            processes=(),
        )
        for index in range(number)
    )


class StillCards:
    """A `devices.Reader` and an endpoint's `Source` in one: idle cards that answer at once."""

    description = "cards of the benchmark"

    def __init__(self, host: int, number: int) -> None:
        self._gpus = _readings(host, number)

    def read(self, timeout: float) -> Sample:
        return Sample(self._gpus, boottime(), host=HERE)

    def fetch(self, deadline: Deadline) -> Sample:
        return Sample(self._gpus, boottime())

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def forget_after_fork(self) -> None: ...


@contextlib.contextmanager
def local_pool(number: int, **options: Any) -> Iterator[GPUPool]:
    """An open pool of this machine's cards, of which there are *number*, with leases of its own."""
    cards = StillCards(0, number)
    with (
        patched(devices, "open_reader", lambda *args, **kwargs: cards),
        patched(devices, "host_identity", lambda: HERE),
        GPUPool(lease_store=MemoryStore(), name=f"local-{number}", **options) as pool,
    ):
        pool.refresh(10.0)
        yield pool


@contextlib.contextmanager
def large_pool(hosts: int, number: int, **options: Any) -> Iterator[GPUPool]:
    """An open pool of *hosts* endpoints with *number* cards each; the monitor reads them from memory."""

    def make(endpoint: Endpoint, settings: Settings) -> endpoints.PolledEndpoint:
        host = int(endpoint.url.rpartition(":")[2])
        return endpoints.PolledEndpoint(endpoint.id, endpoint.url, StillCards(host, number), settings, local=False)

    urls = [f"http://127.0.0.1:{10_000 + host}" for host in range(hosts)]
    with (
        patched(endpoints, "make_endpoint", make),
        GPUPool(urls, lease_store=MemoryStore(), poll_interval=3600.0, name=f"large-{hosts}", **options) as pool,
    ):
        pool.refresh(60.0)
        yield pool
