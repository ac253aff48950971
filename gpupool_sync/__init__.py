"""A blocking, threaded pool of the GPUs of many machines.

>>> from gpupool_sync import GPUPool
>>> with GPUPool() as pool, pool.gpu() as gpu:  # doctest: +SKIP
...     train(device=gpu.activate())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpupool_sync.client import GPUContextManager as GPUContextManager
    from gpupool_sync.client import GPUWorkerPoolClient as GPUWorkerPoolClient
    from gpupool_sync.client import gpu_worker_pool_client as gpu_worker_pool_client
    from gpupool_sync.config import Endpoint as Endpoint
    from gpupool_sync.config import EndpointSource as EndpointSource
    from gpupool_sync.errors import AcquireTimeout as AcquireTimeout
    from gpupool_sync.errors import BadAnswer as BadAnswer
    from gpupool_sync.errors import ConfigError as ConfigError
    from gpupool_sync.errors import EndpointUnavailable as EndpointUnavailable
    from gpupool_sync.errors import ExclusivityWarning as ExclusivityWarning
    from gpupool_sync.errors import GPUPoolError as GPUPoolError
    from gpupool_sync.errors import LeaseLost as LeaseLost
    from gpupool_sync.errors import LeaseStoreError as LeaseStoreError
    from gpupool_sync.errors import MissingExtra as MissingExtra
    from gpupool_sync.errors import NoSuchGPU as NoSuchGPU
    from gpupool_sync.errors import PoolClosed as PoolClosed
    from gpupool_sync.errors import RemoteGPUError as RemoteGPUError
    from gpupool_sync.errors import ServiceUnavailableError as ServiceUnavailableError
    from gpupool_sync.errors import StaleAssignmentError as StaleAssignmentError
    from gpupool_sync.errors import TooManyWaiting as TooManyWaiting
    from gpupool_sync.errors import WorkerTimeoutError as WorkerTimeoutError
    from gpupool_sync.handle import GPU as GPU
    from gpupool_sync.handle import GPUs as GPUs
    from gpupool_sync.pool import GPUPool as GPUPool
    from gpupool_sync.status import EndpointInfo as EndpointInfo
    from gpupool_sync.status import GlobalGPUInfo as GlobalGPUInfo
    from gpupool_sync.status import GPUAssignment as GPUAssignment
    from gpupool_sync.status import GPUInfo as GPUInfo
    from gpupool_sync.status import GPUStats as GPUStats
    from gpupool_sync.status import MultiEndpointPoolStatus as MultiEndpointPoolStatus
    from gpupool_sync.status import PoolStatus as PoolStatus
    from gpupool_sync.status import WorkerInfo as WorkerInfo
    from gpupool_sync.status import make_global_gpu_id as make_global_gpu_id
    from gpupool_sync.status import parse_global_gpu_id as parse_global_gpu_id
    from gpupool_sync.strategies import Availability as Availability
    from gpupool_sync.strategies import RoundRobin as RoundRobin
    from gpupool_sync.strategies import Strategy as Strategy
    from gpupool_sync.strategies import Weighted as Weighted

# Where each public name lives. Nothing is imported before it is asked for, so that `from gpupool_sync import GPUPool`
# stays cheaper than `import requests`.
_HOMES = {
    "AcquireTimeout": "errors",
    "Availability": "strategies",
    "BadAnswer": "errors",
    "ConfigError": "errors",
    "Endpoint": "config",
    "EndpointInfo": "status",
    "EndpointSource": "config",
    "EndpointUnavailable": "errors",
    "ExclusivityWarning": "errors",
    "GPU": "handle",
    "GPUAssignment": "status",
    "GPUContextManager": "client",
    "GPUInfo": "status",
    "GPUPool": "pool",
    "GPUPoolError": "errors",
    "GPUStats": "status",
    "GPUWorkerPoolClient": "client",
    "GPUs": "handle",
    "GlobalGPUInfo": "status",
    "LeaseLost": "errors",
    "LeaseStoreError": "errors",
    "MissingExtra": "errors",
    "MultiEndpointPoolStatus": "status",
    "NoSuchGPU": "errors",
    "PoolClosed": "errors",
    "PoolStatus": "status",
    "RemoteGPUError": "errors",
    "RoundRobin": "strategies",
    "ServiceUnavailableError": "errors",
    "StaleAssignmentError": "errors",
    "Strategy": "strategies",
    "TooManyWaiting": "errors",
    "Weighted": "strategies",
    "WorkerInfo": "status",
    "WorkerTimeoutError": "errors",
    "gpu_worker_pool_client": "client",
    "make_global_gpu_id": "status",
    "parse_global_gpu_id": "status",
}

__all__ = [
    "GPU",
    "AcquireTimeout",
    "Availability",
    "BadAnswer",
    "ConfigError",
    "Endpoint",
    "EndpointInfo",
    "EndpointSource",
    "EndpointUnavailable",
    "ExclusivityWarning",
    "GPUAssignment",
    "GPUContextManager",
    "GPUInfo",
    "GPUPool",
    "GPUPoolError",
    "GPUStats",
    "GPUWorkerPoolClient",
    "GPUs",
    "GlobalGPUInfo",
    "LeaseLost",
    "LeaseStoreError",
    "MissingExtra",
    "MultiEndpointPoolStatus",
    "NoSuchGPU",
    "PoolClosed",
    "PoolStatus",
    "RemoteGPUError",
    "RoundRobin",
    "ServiceUnavailableError",
    "StaleAssignmentError",
    "Strategy",
    "TooManyWaiting",
    "Weighted",
    "WorkerInfo",
    "WorkerTimeoutError",
    "gpu_worker_pool_client",
    "make_global_gpu_id",
    "parse_global_gpu_id",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("gpupool-sync")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
