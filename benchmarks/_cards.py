"""Pools over cards that are only thought of: no server, no driver, no network; everything else is real."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks._harness import patched
from gpupool_sync import GPUPool, devices
from gpupool_sync import endpoint as endpoints
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.leases.base import Claim, Granted, Holder, LeaseStore, Wanted
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

    def await_turn(self, deadline: Deadline) -> None: ...

    def fetch(self, deadline: Deadline) -> Sample:
        return Sample(self._gpus, boottime())

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def forget_after_fork(self) -> None: ...


@contextlib.contextmanager
def local_pool(number: int, *, store: object = None, **options: Any) -> Iterator[GPUPool]:
    """An open pool of this machine's cards, of which there are *number*; without a *store* with leases of its own."""
    cards = StillCards(0, number)
    leases: Any = MemoryStore() if store is None else store
    with (
        patched(devices, "open_reader", lambda *args, **kwargs: cards),
        patched(devices, "host_identity", lambda: HERE),
        GPUPool(lease_store=leases, name=f"local-{number}", **options) as pool,
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
        GPUPool(
            urls, lease_store=MemoryStore(), poll_interval=3600.0, watch=hosts, name=f"large-{hosts}", **options
        ) as pool,
    ):
        pool.refresh(60.0)
        yield pool


def keys_of(number: int) -> tuple[str, ...]:
    """The keys by which arbiters know the cards of `local_pool`."""
    return tuple(str(reading.uuid) for reading in _readings(0, number))


def claims_of(keys: Sequence[str], *, ttl: float | None = None) -> Callable[[], Claim]:
    """Makes claims as a pool makes them: for one whole card of *keys*, each with an id of its own."""
    who = Holder(id="benchmark", name="benchmark", user="user", host="here", pid=os.getpid())
    groups = (tuple(Wanted(key) for key in keys),)
    return lambda: Claim(id=os.urandom(16).hex(), holder=who, groups=groups, ttl=ttl)


def lease_pairs(store: LeaseStore, keys: Sequence[str], *, ttl: float | None = None) -> Callable[[int], None]:
    """Claims and releases *n* times at a store, without a pool."""
    claim = claims_of(keys, ttl=ttl)

    def pairs(times: int) -> None:
        for _ in range(times):
            outcome = store.claim(claim())
            if not isinstance(outcome, Granted):
                raise RuntimeError(f"the figures are worth nothing: {outcome}")
            store.release([outcome.lease.id])

    return pairs


def pool_pairs(pool: GPUPool) -> Callable[[int], None]:
    """``with pool.gpu()``, *n* times."""

    def pairs(times: int) -> None:
        for _ in range(times):
            with pool.gpu():
                pass

    return pairs
