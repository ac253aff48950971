"""Names that must exist, and the models."""

from __future__ import annotations

import datetime
import inspect
import json
import threading
from pathlib import Path

import attrs
import pytest

import gpupool_sync
from gpupool_sync import (
    EndpointInfo,
    GlobalGPUInfo,
    GPUAssignment,
    GPUContextManager,
    GPUInfo,
    GPUPoolError,
    GPUStats,
    GPUWorkerPoolClient,
    MultiEndpointPoolStatus,
    PoolStatus,
    ServiceUnavailableError,
    StaleAssignmentError,
    WorkerInfo,
    WorkerTimeoutError,
    gpu_worker_pool_client,
    make_global_gpu_id,
    parse_global_gpu_id,
)
from helpers import eventually
from predecessor_server import PredecessorServer
from servers import refusing

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
FAST = {"polling_interval": 0.05, "endpoint_health_check_interval": 0.2}
METHODS = {
    "start": [],
    "stop": [],
    "request_gpu": ["timeout"],
    "release_gpu": ["assignment"],
    "get_pool_status": [],
    "get_multi_endpoint_pool_status": [],
    "get_detailed_metrics": [],
    "get_endpoints_info": [],
    "get_error_recovery_status": [],
    "trigger_endpoint_recovery": ["endpoint_id"],
    "queue_request_for_retry": ["request_func"],
    "print_error_recovery_summary": [],
    "is_multi_endpoint_mode": [],
}


@pytest.fixture(scope="module")
def statistics():
    """The predecessor's server, with three cards."""
    server = PredecessorServer(3)
    yield server
    server.close()


@pytest.fixture
def client(statistics):
    with GPUWorkerPoolClient(service_endpoints=f"server1={statistics.url}", **FAST) as client:
        yield client


# --- the client ---------------------------------------------------------------------------------------------


def test_constructor_has_the_arguments_of_the_predecessor_and_those_of_the_specification():
    parameters = inspect.signature(GPUWorkerPoolClient).parameters.values()
    positional = [(each.name, each.default) for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert positional == [
        ("service_endpoint", None),
        ("service_endpoints", None),
        ("memory_threshold", None),
        ("utilization_threshold", None),
        ("polling_interval", None),
        ("worker_timeout", 300.0),
        ("request_timeout", 30.0),
        ("load_balancing_strategy", None),
    ]
    assert {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY} == {
        "endpoint_timeout": None,
        "endpoint_max_retries": None,
        "endpoint_health_check_interval": None,
        "max_workers_per_gpu": 1,
    }


@pytest.mark.parametrize("several", [["http://a", "http://b"], "http://a,http://b", ["http://a"]])
def test_service_endpoints_takes_a_list_or_a_string_and_wins_over_service_endpoint(several, monkeypatch):
    monkeypatch.setenv("GPU_SERVICE_ENDPOINT", "http://e")
    client = GPUWorkerPoolClient("http://c", several)
    urls = [each.url for each in client.pool._state.settings.endpoints]
    assert urls == (several.split(",") if isinstance(several, str) else several)
    assert [each.url for each in GPUWorkerPoolClient("http://c").pool._state.settings.endpoints] == ["http://c"]
    assert [each.url for each in GPUWorkerPoolClient().pool._state.settings.endpoints] == ["http://e"]


@pytest.mark.parametrize(
    ("arguments", "variable", "multi"),
    [
        ({"service_endpoints": "http://a"}, None, True),
        ({}, "http://a,http://b", True),
        ({}, "http://a", False),
        ({"service_endpoint": "http://a"}, None, False),
    ],
)
def test_multi_endpoint_mode_and_single_endpoint_mode(arguments, variable, multi, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", variable)
    assert GPUWorkerPoolClient(**arguments).is_multi_endpoint_mode() is multi


def test_local_ids_and_pool_status_in_single_endpoint_mode_and_global_ones_in_the_other(statistics, client):
    assert client.request_gpu(20).global_gpu_id == "server1:0"
    assert isinstance(client.get_pool_status(), MultiEndpointPoolStatus)
    with GPUWorkerPoolClient(statistics.url, **FAST) as single:
        assignment = single.request_gpu(20)
        assert (assignment.gpu_id, assignment.global_gpu_id) == (1, None)
        assert isinstance(single.get_pool_status(), PoolStatus)


def test_worker_timeout_and_request_timeout_are_defaults(statistics):
    client = GPUWorkerPoolClient(statistics.url, worker_timeout=0.05, request_timeout=7.0, **FAST)
    assert client.pool._state.settings.endpoint_timeout == 7.0
    assert GPUWorkerPoolClient("http://a", endpoint_timeout=3.0).pool._state.settings.endpoint_timeout == 3.0
    with client:
        for _ in range(3):
            client.request_gpu(20)
        with pytest.raises(WorkerTimeoutError, match=r"within 0\.\d s"):
            client.request_gpu()


def test_every_method_is_there_and_synchronous():
    for name, parameters in METHODS.items():
        method = getattr(GPUWorkerPoolClient, name)
        assert not inspect.iscoroutinefunction(method)
        assert list(inspect.signature(method).parameters)[1:] == parameters
    assert list(inspect.signature(GPUContextManager).parameters) == ["client", "timeout"]
    assert {"GPUWorkerPoolClient", "GPUContextManager", "gpu_worker_pool_client"} <= set(gpupool_sync.__all__)


def test_a_second_start_is_an_error_and_stop_is_idempotent(statistics):
    with gpu_worker_pool_client(service_endpoint=statistics.url) as client:
        with pytest.raises(RuntimeError, match="started already"):
            client.start()
        with GPUContextManager(client, timeout=20) as gpu_id:
            assert gpu_id == "0"
    client.stop()
    client.stop()
    with pytest.raises(RuntimeError, match="not started"):
        client.request_gpu()


def test_every_method_answers(client, capsys):
    assignment = client.request_gpu(timeout=20)
    assert client.get_endpoints_info()[0]["endpoint_id"] == "server1"
    assert client.get_error_recovery_status()["endpoint_health_summary"]["healthy_count"] == 1
    assert client.trigger_endpoint_recovery("server1") is True
    assert client.queue_request_for_retry(lambda: 5).result(20) == 5
    client.print_error_recovery_summary()
    assert "server1: CLOSED" in capsys.readouterr().out
    assert client.get_detailed_metrics()["active_workers"] == 1
    assert client.get_multi_endpoint_pool_status().available_gpus == 2
    client.release_gpu(assignment)
    assert client.get_pool_status().available_gpus == 3


def test_errors_are_subclasses_of_ours_or_the_named_builtin(client):
    for each in (WorkerTimeoutError, StaleAssignmentError, ServiceUnavailableError):
        assert issubclass(each, GPUPoolError)
    with pytest.raises(RuntimeError):
        GPUWorkerPoolClient("http://a").get_pool_status()
    for wrong in (lambda: client.request_gpu(-1), lambda: client.release_gpu(0), lambda: GPUWorkerPoolClient("x")):
        with pytest.raises(ValueError, match=r"allowed|missing"):
            wrong()


def test_a_thin_facade_over_gpu_pool_always_with_local_false(client, monkeypatch):
    """No second poller, table or queue: its threads are the pool's, and so is every request."""
    asked = []
    gpu = type(client.pool).gpu
    monkeypatch.setattr(type(client.pool), "gpu", lambda *args, **kw: asked.append(kw) or gpu(*args, **kw))
    client.request_gpu(20)
    with GPUContextManager(client, 20):
        pass
    assert [each["local"] for each in asked] == [False, False]
    names = {each.name for each in threading.enumerate() if each.name.startswith("gpupool")}
    assert all("-monitor" in name or "-poll_" in name or "-probe_" in name for name in names)


@pytest.mark.parametrize(("limit", "gpus"), [(1, 3), (2, 2), (None, 1)])
def test_a_grant_is_exclusive_unless_max_workers_per_gpu_allows_more(statistics, limit, gpus):
    with GPUWorkerPoolClient(statistics.url, max_workers_per_gpu=limit, **FAST) as client:
        assert len({client.request_gpu(20).gpu_id for _ in range(3)}) == gpus


@pytest.mark.checkout
def test_the_migration_guide_says_first_that_a_grant_is_exclusive():
    guide = (Path(gpupool_sync.__file__).parent.parent / "docs" / "migration.md").read_text(encoding="utf-8")
    first = guide.split("\n### ")[1]
    assert "exclusive" in first
    assert "max_workers_per_gpu=None" in first
    assert "max_workers_per_gpu" not in guide.split("\n### ")[0]


# --- models -------------------------------------------------------------------------------------------------

ENDPOINT = EndpointInfo("server1", "http://s1:8000", True, NOW, 2, 1, 3.5)
MODELS = {
    "EndpointInfo": (
        ENDPOINT,
        ["endpoint_id", "url", "is_healthy", "last_seen", "total_gpus", "available_gpus", "response_time_ms"],
        [("endpoint_id", ""), ("is_healthy", 1), ("total_gpus", -1), ("available_gpus", 3), ("response_time_ms", -1.0)],
    ),
    "GlobalGPUInfo": (
        GlobalGPUInfo("server1:0", "server1", 0, "A100", 1.0, 2.0, True),
        [
            "global_gpu_id",
            "endpoint_id",
            "local_gpu_id",
            "name",
            "memory_usage_percent",
            "utilization_percent",
            "is_available",
        ],
        [("global_gpu_id", "server1:1"), ("endpoint_id", "server2"), ("local_gpu_id", -1), ("is_available", None)],
    ),
    "MultiEndpointPoolStatus": (
        MultiEndpointPoolStatus(1, 1, 2, 1, 1, 0, [ENDPOINT], {"server1:0": [WorkerInfo("w", NOW)]}),
        [
            "total_endpoints",
            "healthy_endpoints",
            "total_gpus",
            "available_gpus",
            "active_workers",
            "blocked_workers",
            "endpoints",
            "gpu_assignments",
        ],
        [("total_endpoints", -1), ("healthy_endpoints", 2), ("available_gpus", 3), ("active_workers", True)],
    ),
    "PoolStatus": (
        PoolStatus(2, 1, 1, 0, {0: [WorkerInfo("w", NOW)]}),
        ["total_gpus", "available_gpus", "active_workers", "blocked_workers", "gpu_assignments"],
        [("total_gpus", -1), ("available_gpus", 3), ("blocked_workers", None)],
    ),
    "GPUAssignment": (
        GPUAssignment(0, "w", NOW, "server1:0", "server1"),
        ["gpu_id", "worker_id", "assigned_at", "global_gpu_id", "endpoint_id"],
        [("gpu_id", -1), ("worker_id", ""), ("assigned_at", NOW.replace(tzinfo=None))],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_exactly_the_fields_are_validated_and_jsonable(name):
    value, fields, wrong = MODELS[name]
    assert attrs.has(type(value))
    assert [field.name for field in attrs.fields(type(value))] == fields
    document = json.loads(json.dumps(value.to_dict()))
    assert list(document) == fields
    for field, bad in wrong:
        with pytest.raises(ValueError, match=r"allowed"):
            attrs.evolve(value, **{field: bad})


def test_gpu_info_and_gpu_stats_are_models_too():
    for cls in (GPUInfo, GPUStats, WorkerInfo):
        assert attrs.has(cls)
        assert callable(cls.to_dict)


def test_helpers_make_and_parse_global_ids_with_errors_for_bad_ones():
    assert parse_global_gpu_id(make_global_gpu_id("server1", 3)) == ("server1", 3)
    for bad in ("server1", "server1:", ":0", "a:b:0", "server1:-1", "server1:01", "server1:x", None):
        with pytest.raises(ValueError, match="global_gpu_id"):
            parse_global_gpu_id(bad)
    for endpoint_id, number in (("a:b", 0), ("", 0), ("a", -1), ("a", True), ("a", "0")):
        with pytest.raises(ValueError, match="endpoint_id"):
            make_global_gpu_id(endpoint_id, number)


def test_pool_status_is_a_subclass_with_what_else_is_known(client):
    told = client.pool.status()
    assert isinstance(told, MultiEndpointPoolStatus)
    assert type(told) is not MultiEndpointPoolStatus
    (endpoint,) = told.endpoints
    assert endpoint.age is not None
    assert (endpoint.breaker, endpoint.scope) == ("closed", "host")
    assert endpoint.arbiter
    client.request_gpu(20)
    assert client.pool.status().gpu_assignments
    plain = client.get_multi_endpoint_pool_status()
    assert type(plain) is MultiEndpointPoolStatus
    assert [type(each) for each in plain.endpoints] == [EndpointInfo]


def test_times_are_aware_utc_and_last_seen_is_none_before_the_first_contact(client):
    (seen,) = client.get_multi_endpoint_pool_status().endpoints
    assert seen.last_seen.utcoffset() == datetime.timedelta(0)
    assert client.request_gpu(20).assigned_at.utcoffset() == datetime.timedelta(0)
    with refusing() as url, GPUWorkerPoolClient(service_endpoints=url, **FAST) as other:
        (never,) = other.get_multi_endpoint_pool_status().endpoints
        assert (never.last_seen, never.is_healthy) == (None, False)


def test_an_endpoint_that_is_down_keeps_its_total_and_leaves_the_pools(client, statistics):
    client.get_pool_status()
    statistics.kill()
    eventually(lambda: client.get_pool_status().healthy_endpoints == 0, 30)
    status = client.get_multi_endpoint_pool_status()
    (down,) = status.endpoints
    assert (down.total_gpus, down.available_gpus) == (3, 0)
    assert (status.total_endpoints, status.total_gpus, status.available_gpus) == (1, 0, 0)
    statistics.restart()
