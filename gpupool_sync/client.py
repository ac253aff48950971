"""`GPUWorkerPoolClient`: the names of the asynchronous predecessor, ``gpu_worker_pool``, made of a `GPUPool`.

Code that was written for the predecessor runs when its ``async`` and ``await`` are deleted.  Polling, choosing, waiting
and leasing are the pool's; here are only names, bookkeeping of who has what, and the requests that wait for a recovery.
`docs/migration.md` has the one difference in behaviour: a GPU is granted to one worker at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import attrs

from gpupool_sync import client_metrics, config
from gpupool_sync.errors import (
    AcquireTimeout,
    ConfigError,
    LeaseLost,
    PoolClosed,
    ServiceUnavailableError,
    StaleAssignmentError,
    TooManyWaiting,
    WorkerTimeoutError,
)
from gpupool_sync.pool import GPUPool, _Acquiring, _timeout
from gpupool_sync.starting import start
from gpupool_sync.status import (
    EndpointInfo,
    EndpointStatus,
    GPUAssignment,
    MultiEndpointPoolStatus,
    PoolStatus,
    Status,
    WorkerInfo,
    to_jsonable,
)

if TYPE_CHECKING:
    from gpupool_sync.handle import GPU

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Requests that may wait for a recovery at a time.
MOST_RETRIES = 1000
#: Recoveries at which a request that fails is tried, before its error is passed on.
RETRY_ATTEMPTS = 3
#: What any number of workers is to an arbiter: more than a card can hold.
ANY_NUMBER = 1_000_000
#: Leases of a client carry their worker's id as a note, so that a status can name it.
_NOTE = "worker "


class _Default(int):
    """A default that an argument of the same value is not taken for: that one would win over the environment."""


_ONE_WORKER = _Default(1)


class GPUWorkerPoolClient:
    """
    The predecessor's client, synchronous: a façade over a `GPUPool`, which `pool` is.

    With *service_endpoints*, or more than one endpoint in the environment, GPUs have global ids (multi-endpoint mode);
    otherwise they have the local ids of the one endpoint.

    Args:
        service_endpoint: URL of one statistics server.
        service_endpoints: list, or comma-separated string, of URLs; wins over *service_endpoint*.  Neither: the
            environment (``GPU_SERVICE_ENDPOINTS``, ``GPU_SERVICE_ENDPOINT``), else this machine's own GPUs.
        memory_threshold: percent; at or above it a GPU is not granted (default 80).
        utilization_threshold: percent; likewise (default 90).
        polling_interval: seconds between two readings of an endpoint (default 5).
        worker_timeout: seconds that `request_gpu` waits unless it is told otherwise; None: for ever.
        request_timeout: seconds; the default of *endpoint_timeout*.
        load_balancing_strategy: ``"availability"`` (default), ``"round_robin"``, ``"weighted"`` or an object.
        endpoint_timeout: seconds for one exchange with an endpoint, retries included.
        endpoint_max_retries: retries of an exchange that failed before an answer began (default 3).
        endpoint_health_check_interval: longest seconds between probes of an endpoint that is down (default 30).
        max_workers_per_gpu: workers that may have one GPU at the same time; None: any number while its readings are
            below the thresholds, as with the predecessor (also ``GPU_MAX_WORKERS_PER_GPU``).

    Raises:
        ConfigError: a value cannot be used; it is a `ValueError`.
    """

    def __init__(
        self,
        service_endpoint: str | None = None,
        service_endpoints: str | Sequence[str | config.Endpoint] | None = None,
        memory_threshold: float | None = None,
        utilization_threshold: float | None = None,
        polling_interval: float | None = None,
        worker_timeout: float | None = 300.0,
        request_timeout: float = 30.0,
        load_balancing_strategy: Any = None,
        *,
        endpoint_timeout: float | None = None,
        endpoint_max_retries: int | None = None,
        endpoint_health_check_interval: float | None = None,
        max_workers_per_gpu: int | None = _ONE_WORKER,
    ) -> None:
        self._worker_timeout = _timeout(worker_timeout, "worker_timeout")
        self._workers = _max_workers(max_workers_per_gpu)
        several = _endpoints("service_endpoints", service_endpoints)
        one = _endpoints("service_endpoint", service_endpoint)
        if len(one) > 1:
            raise ConfigError(f"service_endpoint: one URL is allowed, not {len(one)}; service_endpoints takes several")
        # Checked under the names that the caller knows them by.
        given = {
            "memory_threshold": ("memory_threshold", memory_threshold),
            "utilization_threshold": ("utilization_threshold", utilization_threshold),
            "poll_interval": ("polling_interval", polling_interval),
            "strategy": ("load_balancing_strategy", load_balancing_strategy),
            "endpoint_timeout": ("endpoint_timeout", endpoint_timeout),
            "endpoint_max_retries": ("endpoint_max_retries", endpoint_max_retries),
            "health_check_interval": ("endpoint_health_check_interval", endpoint_health_check_interval),
        }
        options = {
            name: config.checked(name, value, origin) for name, (origin, value) in given.items() if value is not None
        }
        slow = config.checked("endpoint_timeout", request_timeout, "request_timeout")
        if "endpoint_timeout" not in options and config.from_environment("endpoint_timeout") is None:
            options["endpoint_timeout"] = slow
        self._pool = GPUPool(several or one or None, **options)
        settings = self._pool._state.settings
        self._multi = bool(several) or len(settings.endpoints) > 1 or bool(settings.sources)
        # By worker id: what was granted and is not released yet. Single dict operations only, which are atomic.
        self._held: dict[str, tuple[GPUAssignment, _Acquiring[GPU], GPU]] = {}
        # By worker id: since when requests of this client are under way. Single dict operations only, likewise.
        self._asked: dict[str, datetime.datetime] = {}
        self._retries = _Retries()
        self._pool._state.watchers = (self._retries.heard,)
        # Not guarded: two threads that start at the same instant both may, and the pool opens once.
        self._started = False

    def __repr__(self) -> str:
        mode = "multi" if self._multi else "single"
        state = "started" if self._started else "not started"
        return f"<GPUWorkerPoolClient, {mode}-endpoint mode, {state}, {len(self._held)} GPUs held>"

    @property
    def pool(self) -> GPUPool:
        """The pool that does the work, for what the predecessor did not have."""
        return self._pool

    def is_multi_endpoint_mode(self) -> bool:
        """Whether ids are global."""
        return self._multi

    # -- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """
        Start reading the endpoints; returns at once.

        Raises:
            RuntimeError: it is started already.
        """
        if self._started:
            raise RuntimeError("this client is started already; stop() it first")
        self._pool.open()
        self._started = True

    def stop(self) -> None:
        """Release every GPU, send waiting requests away with `PoolClosed`, and stop the threads. Idempotent."""
        self._started = False
        self._retries.close()
        self._pool.close()
        self._held.clear()

    def __enter__(self) -> GPUWorkerPoolClient:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _require_started(self, what: str) -> None:
        if not self._started:
            raise RuntimeError(f"this client is not started: call start(), or use it in a with block, before {what}")

    def _require_multi(self, what: str) -> None:
        self._require_started(what)
        if not self._multi:
            raise RuntimeError(f"{what} is only possible in multi-endpoint mode: give service_endpoints")

    # -- GPUs --------------------------------------------------------------------------------------------------

    def request_gpu(self, timeout: float | None = None) -> GPUAssignment:
        """
        Wait for a GPU; `release_gpu` gives it back.

        While no endpoint answers, requests wait until one does.

        Args:
            timeout: seconds; None: *worker_timeout* of the client, 0: try once.

        Raises:
            RuntimeError: the client is not started.
            WorkerTimeoutError: none became free in time; the message says why, card by card.
            ServiceUnavailableError: the same, and no endpoint answered; it is a `WorkerTimeoutError` too.
            NoSuchGPU: every endpoint has answered, and there is no GPU.
            PoolClosed: the client was stopped meanwhile.
            ConfigError: *timeout* is no number of seconds; it is a `ValueError`.
        """
        self._require_started("requesting a GPU")
        worker_id = str(uuid.uuid4())
        acquiring = self._asking(timeout, worker_id)
        gpu = self._wait(acquiring, worker_id)
        assignment = GPUAssignment(
            gpu_id=gpu.local_gpu_id,
            worker_id=worker_id,
            assigned_at=_now(),
            global_gpu_id=gpu.global_gpu_id if self._multi else None,
            endpoint_id=gpu.endpoint_id if self._multi else None,
        )
        # Until here an interrupt drops `acquiring`, and so releases the GPU; from here on it is the caller's to
        # release, whether he keeps the assignment or not.
        self._held[worker_id] = assignment, acquiring, gpu
        return assignment

    def release_gpu(self, assignment: GPUAssignment) -> None:
        """
        Give back what `request_gpu` returned. A second time does nothing but a line in the log.

        Raises:
            RuntimeError: the client is not started.
            StaleAssignmentError: the lease had been lost before, so somebody else may have used the GPU.
            ConfigError: not an assignment of this client; it is a `ValueError`.
        """
        self._require_started("releasing a GPU")
        if not isinstance(assignment, GPUAssignment):
            raise ConfigError(f"assignment: what request_gpu() returned is allowed, not {type(assignment).__name__}")
        held = self._held.get(assignment.worker_id)
        if held is None:
            logger.warning("worker %s holds no GPU of this client (any more)", assignment.worker_id)
            return
        if (assignment.gpu_id, assignment.global_gpu_id) != (held[0].gpu_id, held[0].global_gpu_id):
            raise ConfigError(
                f"assignment: worker {assignment.worker_id} has GPU {held[0].get_display_id()}, "
                f"not {assignment.get_display_id()}"
            )
        stale = _let_go(held[1], held[2])
        self._held.pop(assignment.worker_id, None)
        if stale is not None:
            raise StaleAssignmentError(stale)

    def _asking(self, timeout: float | None, worker_id: str) -> _Acquiring[GPU]:
        """
        The request, not made yet.

        It is held on to for as long as the GPU is: when it is collected, nobody can release the GPU any more, and the
        pool takes it back.
        """
        seconds = self._worker_timeout if timeout is None else timeout
        # Without a limit the predecessor's rule holds: nothing but the thresholds counts, processes do not.
        return self._pool.gpu(seconds, note=_NOTE + worker_id, busy_ok=self._workers is None, **self._request())

    def _request(self) -> dict[str, Any]:
        """What to ask the pool for."""
        places = ANY_NUMBER if self._workers is None else self._workers
        return {"local": False, "max_holders": None if places == 1 else places}

    def _wait(self, acquiring: _Acquiring[GPU], worker_id: str) -> GPU:
        try:
            self._asked[worker_id] = _now()
            return acquiring.__enter__()
        except AcquireTimeout as exc:
            endpoints = self._pool.stats()["endpoints"].values()
            kind = WorkerTimeoutError if any(each["healthy"] for each in endpoints) else ServiceUnavailableError
            error = kind(*exc.args)
            error.explanation = exc.explanation
            try:
                raise error from exc
            finally:
                del error  # it has this frame
        finally:
            self._asked.pop(worker_id, None)

    # -- looking at it -----------------------------------------------------------------------------------------

    def get_pool_status(self) -> PoolStatus | MultiEndpointPoolStatus:
        """
        The pool at this moment: a `PoolStatus` with one endpoint, a `MultiEndpointPoolStatus` with several.

        Waits for the first reading.

        Raises:
            RuntimeError: the client is not started.
        """
        self._require_started("looking at its status")
        status = self._status()
        if self._multi:
            return _only(MultiEndpointPoolStatus, status)
        numbers = {gpu.global_gpu_id: gpu.local_gpu_id for gpu in status.gpus}
        return PoolStatus(
            total_gpus=status.total_gpus,
            available_gpus=status.available_gpus,
            active_workers=status.active_workers,
            blocked_workers=status.blocked_workers,
            gpu_assignments={numbers[gpu]: workers for gpu, workers in status.gpu_assignments.items()},
        )

    def get_multi_endpoint_pool_status(self) -> MultiEndpointPoolStatus | None:
        """
        The pool with each of its endpoints; None in single-endpoint mode.

        Raises:
            RuntimeError: the client is not started.
        """
        self._require_started("looking at its status")
        return _only(MultiEndpointPoolStatus, self._status()) if self._multi else None

    def get_endpoints_info(self) -> list[dict[str, Any]] | None:
        """
        Each endpoint with the fields of `EndpointInfo`, as JSON has them; None in single-endpoint mode.

        Raises:
            RuntimeError: the client is not started.
        """
        status = self.get_multi_endpoint_pool_status()
        return None if status is None else [each.to_dict() for each in status.endpoints]

    def _status(self) -> Status:
        """The pool's, with workers by their ids, and what is available for a request of this client."""
        status = self._pool.status()
        assignments = {gpu: [_worker(info) for info in infos] for gpu, infos in status.gpu_assignments.items()}
        status = attrs.evolve(status, gpu_assignments=assignments)
        if self._workers == 1:
            return status
        # The status is that of whole GPUs; here those count that have a place left.
        explained = self._pool.explain(busy_ok=self._workers is None, **self._request())
        free = {
            card.global_gpu_id
            for card in explained.cards
            if card.code == "free"
            and (self._workers is None or len(assignments.get(card.global_gpu_id, ())) < self._workers)
        }
        gpus = [attrs.evolve(gpu, is_available=gpu.global_gpu_id in free) for gpu in status.gpus]
        endpoints = [
            attrs.evolve(
                each,
                available_gpus=sum(gpu.is_available for gpu in gpus if gpu.endpoint_id == each.endpoint_id)
                if each.is_healthy
                else 0,
            )
            for each in status.endpoints
        ]
        available = min(status.total_gpus, sum(each.available_gpus for each in endpoints))
        return attrs.evolve(status, gpus=gpus, endpoints=endpoints, available_gpus=available)

    def get_detailed_metrics(self) -> dict[str, Any]:
        """
        Everything that is known, JSON-able: the predecessor's keys, and under ``stats`` all of `GPUPool.stats`.

        Raises:
            RuntimeError: the client is not started.
        """
        self._require_started("looking at its metrics")
        status, stats, settings = self._status(), self._pool.stats(), self._pool._state.settings
        now = _now()
        metrics = {
            "timestamp": now,
            "mode": "multi-endpoint" if self._multi else "single-endpoint",
            "is_running": self._started,
            "total_gpus": status.total_gpus,
            "available_gpus": status.available_gpus,
            "active_workers": status.active_workers,
            "blocked_workers": status.blocked_workers,
            "gpu_metrics": [
                client_metrics.gpu(
                    each,
                    each.global_gpu_id if self._multi else each.local_gpu_id,
                    [worker.id for worker in status.gpu_assignments.get(each.global_gpu_id, ())],
                )
                for each in status.gpus
            ],
            "assignment_metrics": [
                {
                    "worker_id": each.worker_id,
                    "gpu_id": each.get_display_id() if self._multi else each.gpu_id,
                    "assigned_at": each.assigned_at,
                    "duration_seconds": (now - each.assigned_at).total_seconds(),
                }
                for each, _, _ in list(self._held.values())
            ],
            "queue_metrics": [
                {
                    "worker_id": worker_id,
                    "enqueued_at": since,
                    "wait_time_seconds": (now - since).total_seconds(),
                }
                for worker_id, since in list(self._asked.items())
            ],
            "thresholds": {
                "memory_threshold_percent": settings.memory_threshold,
                "utilization_threshold_percent": settings.utilization_threshold,
            },
            "stats": stats,
        }
        if self._multi:
            metrics.update(client_metrics.several_endpoints(status, stats, now, settings.poll_interval))
        else:
            first = status.endpoints[0] if status.endpoints else None
            metrics["single_endpoint"] = {
                "endpoint_url": first.url if first is not None else "unknown",
                "is_healthy": first is not None and first.is_healthy,
            }
        return cast("dict[str, Any]", to_jsonable(metrics))

    def get_formatted_metrics(self, format_type: str = "console") -> str:
        """
        `get_detailed_metrics` as text: ``"console"`` for people, ``"json"`` for programs.

        Raises:
            RuntimeError: the client is not started.
            ConfigError: another format; it is a `ValueError`.
        """
        if format_type not in ("console", "json"):
            raise ConfigError(f"format_type={format_type!r}: console or json is allowed")
        metrics = self.get_detailed_metrics()
        if format_type == "json":
            return json.dumps(metrics, indent=2)
        lines = ["=== GPU Worker Pool Metrics ===", f"Mode: {metrics['mode']}", f"Timestamp: {metrics['timestamp']}"]
        if self._multi:
            summary = metrics["endpoints"]["summary"]
            lines.append(f"Endpoints: {summary['healthy_endpoints']}/{summary['total_endpoints']} healthy")
            balance = metrics["load_balancing_effectiveness"]
            lines.append(f"Balancing: {balance['balancing_quality']} ({balance['distribution_score']:.1f}/100)")
        else:
            single = metrics["single_endpoint"]
            lines.append(f"Endpoint: {single['endpoint_url']} ({'healthy' if single['is_healthy'] else 'unhealthy'})")
        lines += [
            f"GPUs: {metrics['available_gpus']}/{metrics['total_gpus']} available",
            f"Active Workers: {metrics['active_workers']}",
            f"Blocked Workers: {metrics['blocked_workers']}",
        ]
        return "\n".join(lines)

    def get_health_summary(self) -> str | None:
        """
        The health of each endpoint, as text; None in single-endpoint mode.

        Raises:
            RuntimeError: the client is not started.
        """
        self._require_started("looking at its health")
        if not self._multi:
            return None
        lines = ["=== Endpoint Health Status ==="]
        for endpoint_id, each in self.get_detailed_metrics()["endpoints"]["details"].items():
            took = each["response_time_ms"]
            lines += [
                f"\nEndpoint: {endpoint_id}",
                f"  Status: {each['connectivity_status']}",
                f"  Health Score: {each['health_score']:.1f}/100",
                f"  Response Time: {'unknown' if took is None else f'{took:.1f}ms'}",
                f"  Last Seen: {each['last_seen'] or 'never'}",
            ]
        return "\n".join(lines)

    def print_status_summary(self) -> None:
        """
        Print the totals of `get_pool_status`.

        Raises:
            RuntimeError: the client is not started.
        """
        status = self.get_pool_status()
        lines = ["=== GPU Worker Pool Status ===", f"Mode: {'Multi' if self._multi else 'Single'}-endpoint"]
        if isinstance(status, MultiEndpointPoolStatus):
            lines.append(f"Endpoints: {status.healthy_endpoints}/{status.total_endpoints} healthy")
        lines += [
            f"Total GPUs: {status.total_gpus}",
            f"Available GPUs: {status.available_gpus}",
            f"Active Workers: {status.active_workers}",
            f"Blocked Workers: {status.blocked_workers}",
        ]
        _print(lines)

    # -- recovery ----------------------------------------------------------------------------------------------

    def get_error_recovery_status(self) -> dict[str, Any] | None:
        """
        Breakers, endpoints that are down, and requests that wait for them, JSON-able; None in single-endpoint mode.

        Raises:
            RuntimeError: the client is not started.
        """
        self._require_started("looking at its recovery")
        if not self._multi:
            return None
        endpoints = cast("Sequence[EndpointStatus]", self._pool.status().endpoints)
        counted = self._pool.stats()["endpoints"]
        healthy = [each.endpoint_id for each in endpoints if each.is_healthy]
        degraded = [each.endpoint_id for each in endpoints if not each.is_healthy]
        probed = [each.endpoint_id for each in endpoints if each.breaker == "half-open"]
        queued = len(self._retries)
        breakers = {}
        for each in endpoints:
            numbers = counted.get(each.endpoint_id, {})
            successes, failures = numbers.get("successes", 0), numbers.get("failures", 0)
            polls = successes + failures
            breakers[each.endpoint_id] = {
                "endpoint_id": each.endpoint_id,
                "state": each.breaker.replace("-", "_"),
                "total_requests": polls,
                "total_failures": failures,
                "total_successes": successes,
                "failure_rate": 100.0 * failures / polls if polls else 0.0,
                "current_failure_count": each.consecutive_failures,
                "last_error": each.last_error,
            }
        seen = [each.last_seen for each in endpoints if each.last_seen is not None]
        return {
            "degradation_manager": {
                "is_fully_degraded": not healthy,
                # Since then nobody has answered.
                "degradation_start_time": to_jsonable(max(seen)) if seen and not healthy else None,
                "total_endpoints": len(endpoints),
                "healthy_endpoints_count": len(healthy),
                "degraded_endpoints_count": len(degraded),
                "healthy_endpoints": healthy,
                "degraded_endpoints": degraded,
                "queued_requests": queued,
                "circuit_breaker_stats": breakers,
            },
            "recovery_orchestrator": {
                "is_running": self._started,
                "active_recovery_tasks": {
                    each: {"is_running": True, "is_cancelled": False, "is_done": False} for each in probed
                },
                "total_recovery_tasks": len(probed),
            },
            "endpoint_health_summary": {
                "total_endpoints": len(endpoints),
                "healthy_count": len(healthy),
                "degraded_count": len(degraded),
                "queued_requests": queued,
            },
        }

    def trigger_endpoint_recovery(self, endpoint_id: str) -> bool:
        """
        Read the endpoint now, whatever its breaker says; whether it is healthy.

        Takes up to two *endpoint_timeout*, as a reading that is under way may be older than this call.

        Raises:
            RuntimeError: the client is not started, or in single-endpoint mode.
            ConfigError: there is no such endpoint; it is a `ValueError`.
        """
        self._require_multi("endpoint recovery")
        self._pool.refresh(2 * self._pool._state.settings.endpoint_timeout + 1.0, endpoint=endpoint_id)
        return bool(self._pool.stats()["endpoints"].get(endpoint_id, {}).get("healthy", False))

    def queue_request_for_retry(self, request_func: Callable[[], _T]) -> Future[_T]:
        """
        Call the function when an endpoint that is down answers again; at once if none is down.

        Functions are called one after the other on a thread of their own.  One that raises is called again at the next
        recovery, `RETRY_ATTEMPTS` times in all; then, or if no endpoint is down any more, its error is passed on.

        Returns:
            Its result or error in a `concurrent.futures.Future`; `PoolClosed` if the client is stopped before.

        Raises:
            RuntimeError: the client is not started, or in single-endpoint mode.
            TooManyWaiting: `MOST_RETRIES` wait already.
            ConfigError: not a function; it is a `ValueError`.
        """
        self._require_multi("queueing requests")
        if not callable(request_func):
            raise ConfigError("request_func: a function without arguments is allowed")
        return self._retries.put(request_func)

    def print_error_recovery_summary(self) -> None:
        """
        Print what `get_error_recovery_status` tells, in short.

        Raises:
            RuntimeError: the client is not started.
        """
        recovery = self.get_error_recovery_status()
        lines = ["=== Error Recovery Status ==="]
        if recovery is None:
            _print([*lines, "Mode: Single-endpoint (error recovery not applicable)"])
            return
        degradation, health = recovery["degradation_manager"], recovery["endpoint_health_summary"]
        _print(
            [
                *lines,
                f"System Status: {'DEGRADED' if degradation['is_fully_degraded'] else 'OPERATIONAL'}",
                f"Total Endpoints: {health['total_endpoints']}",
                f"Healthy Endpoints: {health['healthy_count']}",
                f"Degraded Endpoints: {health['degraded_count']}",
                f"Queued Requests: {health['queued_requests']}",
                f"Recovery Operations Active: {recovery['recovery_orchestrator']['total_recovery_tasks']}",
                "",
                "--- Circuit Breaker Status ---",
                *(
                    f"{name}: {breaker['state'].upper()} (Failure Rate: {breaker['failure_rate']:.1f}%)"
                    for name, breaker in degradation["circuit_breaker_stats"].items()
                ),
            ]
        )


class GPUContextManager:
    """
    ``with GPUContextManager(client) as gpu_id``: a GPU for the block.

    The id is text, as with the predecessor: ``"0"`` in single-endpoint mode, ``"server1-8000:0"`` with several.

    Raises:
        StaleAssignmentError: at the end of a block that raised nothing: the lease was lost in it.
    """

    def __init__(self, client: GPUWorkerPoolClient, timeout: float | None = None) -> None:
        self.client = client
        self.timeout = timeout
        self._acquiring: _Acquiring[GPU] | None = None
        self._gpu: GPU | None = None

    def __enter__(self) -> str:
        self.client._require_started("requesting a GPU")
        if self._acquiring is not None:
            raise RuntimeError("this GPUContextManager is in use already; make one for each with block")
        worker_id = str(uuid.uuid4())
        acquiring = self.client._asking(self.timeout, worker_id)
        self._gpu = gpu = self.client._wait(acquiring, worker_id)
        self._acquiring = acquiring
        return gpu.global_gpu_id if self.client._multi else str(gpu.local_gpu_id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        acquiring, gpu = self._acquiring, self._gpu
        if acquiring is None or gpu is None:
            return
        stale = _let_go(acquiring, gpu)
        self._acquiring = self._gpu = None
        if stale is None:
            return
        if error is not None:
            logger.warning("%s", stale)  # what the block raised matters more
            return
        raise StaleAssignmentError(stale)


def gpu_worker_pool_client(**kwargs: Any) -> GPUWorkerPoolClient:
    """``with gpu_worker_pool_client(...) as client``: a started client, stopped at the end; arguments are its own."""
    return GPUWorkerPoolClient(**kwargs)


# --- the requests that wait for a recovery --------------------------------------------------------------


@attrs.define(eq=False)
class _Retry:
    call: Callable[[], Any]
    future: Future[Any] = attrs.field(factory=Future)
    attempts: int = 0


class _Retries:
    """Functions that wait for an endpoint to answer again, and the thread that calls them while there are any."""

    def __init__(self) -> None:
        self._fresh()

    def _fresh(self) -> None:
        # Guards everything below: dictionary work, and the start of the thread. No function is called under it.
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._down: set[str] = set()
        self._waiting: deque[_Retry] = deque()
        self._due: deque[_Retry] = deque()
        self._thread: threading.Thread | None = None

    def _here(self) -> None:
        if self._pid != os.getpid():
            self._fresh()  # a forked child: the requests of its parent, and its lock, are not its own

    def __len__(self) -> int:
        return len(self._waiting) + len(self._due)

    def heard(self, endpoint_id: str, answered: bool) -> None:
        """What each poll calls, on its thread."""
        self._here()
        if answered != (endpoint_id in self._down):
            return  # nothing new; polls of one endpoint never overlap
        with self._lock:
            if not answered:
                self._down.add(endpoint_id)
                return
            self._down.discard(endpoint_id)
            self._go_locked()

    def put(self, call: Callable[[], Any]) -> Future[Any]:
        self._here()
        retry = _Retry(call)
        with self._lock:
            if len(self) >= MOST_RETRIES:
                raise TooManyWaiting(f"{MOST_RETRIES} requests wait for an endpoint already")
            self._waiting.append(retry)
            if not self._down:
                self._go_locked()
        return retry.future

    def _go_locked(self) -> None:
        self._due.extend(self._waiting)
        self._waiting.clear()
        if self._due and self._thread is None:
            thread = threading.Thread(target=self._run, name="gpupool-retry", daemon=True)
            start(thread)
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                # Decided under the lock: what comes in after that finds no thread and starts another one.
                if not self._due:
                    self._thread = None
                    return
                retry = self._due.popleft()
            if not retry.attempts and not retry.future.set_running_or_notify_cancel():
                continue
            retry.attempts += 1
            try:
                result = retry.call()
            except BaseException as exc:  # on this thread nobody else would hear of it
                if not isinstance(exc, Exception) or not self._once_more(retry):
                    _settle(retry, error=exc)
            else:
                _settle(retry, result)

    def _once_more(self, retry: _Retry) -> bool:
        with self._lock:
            if retry.attempts >= RETRY_ATTEMPTS or not self._down:
                return False
            self._waiting.append(retry)
            return True

    def close(self, timeout: float = 5.0) -> None:
        """Tell those that wait that nothing will come any more; one that is being called goes on."""
        self._here()
        with self._lock:
            left = [*self._waiting, *self._due]
            self._waiting.clear()
            self._due.clear()
            self._down.clear()
            thread = self._thread
        for retry in left:
            _settle(retry, error=PoolClosed("the client was stopped before an endpoint answered again"))
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)


def _settle(retry: _Retry, result: Any = None, *, error: BaseException | None = None) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled by its owner, or settled by close()
        if error is not None:
            retry.future.set_exception(error)
        else:
            retry.future.set_result(result)


# --- small things ---------------------------------------------------------------------------------------


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _max_workers(given: int | None) -> int | None:
    setting = config.MAX_WORKERS_PER_GPU
    if given is not _ONE_WORKER:
        return cast("int | None", config.checked(setting, given, setting.name))
    found = config.from_environment(setting)
    return 1 if found is None else cast("int | None", found[0])


def _endpoints(name: str, value: object) -> tuple[config.Endpoint, ...]:
    return () if value is None else cast("tuple[config.Endpoint, ...]", config.checked("endpoints", value, name))


def _let_go(acquiring: _Acquiring[GPU], gpu: GPU) -> str | None:
    """Release; why the lease was lost before, if it was."""
    stale = None
    try:
        gpu.check()
    except LeaseLost as exc:
        stale = str(exc)
    acquiring.__exit__(None, None, None)
    return stale


def _only(cls: type[MultiEndpointPoolStatus], status: Status) -> MultiEndpointPoolStatus:
    """*status* with the fields of the specification alone, its endpoints likewise."""
    endpoints = [
        EndpointInfo(**{field.name: getattr(each, field.name) for field in attrs.fields(EndpointInfo)})
        for each in status.endpoints
    ]
    fields: Mapping[str, Any] = {field.name: getattr(status, field.name) for field in attrs.fields(cls)}
    return cls(**{**fields, "endpoints": endpoints})


def _worker(info: WorkerInfo) -> WorkerInfo:
    """A worker of a client by its id, wherever that client runs; its holder is the note then."""
    if info.note is None or not info.note.startswith(_NOTE):
        return info
    return WorkerInfo(info.note.removeprefix(_NOTE), info.assigned_at, info.worker_id)


def _print(lines: Sequence[str]) -> None:
    print("\n".join(["", *lines, ""]))  # noqa: T201 - what these methods are for
