"""Values that a pool tells: checked when they are made, plain when they are written."""

from __future__ import annotations

import datetime
import json

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpupool_sync import (
    ConfigError,
    EndpointInfo,
    GlobalGPUInfo,
    GPUAssignment,
    GPUInfo,
    GPUStats,
    MultiEndpointPoolStatus,
    PoolStatus,
    WorkerInfo,
    make_global_gpu_id,
    parse_global_gpu_id,
)
from gpupool_sync.status import CardStatus, EndpointStatus, Status

NOW = datetime.datetime(2026, 5, 4, 3, 2, 1, tzinfo=datetime.timezone.utc)
ENDPOINT = {
    "endpoint_id": "server1",
    "url": "http://server1",
    "is_healthy": True,
    "last_seen": NOW,
    "total_gpus": 8,
    "available_gpus": 3,
    "response_time_ms": 1.5,
}
GPU = {
    "global_gpu_id": "server1:0",
    "endpoint_id": "server1",
    "local_gpu_id": 0,
    "name": "A100",
    "memory_usage_percent": 1.0,
    "utilization_percent": None,
    "is_available": True,
}
POOL = {
    "total_endpoints": 1,
    "healthy_endpoints": 1,
    "total_gpus": 8,
    "available_gpus": 3,
    "active_workers": 1,
    "blocked_workers": 0,
    "endpoints": [EndpointInfo(**ENDPOINT)],
    "gpu_assignments": {"server1:0": [WorkerInfo("w", NOW)]},
}
SINGLE = {
    "total_gpus": 8,
    "available_gpus": 3,
    "active_workers": 1,
    "blocked_workers": 0,
    "gpu_assignments": {0: [WorkerInfo("w", NOW)]},
}
ASSIGNMENT = {"gpu_id": 0, "worker_id": "w", "assigned_at": NOW, "global_gpu_id": "s:0", "endpoint_id": "s"}
INFO = {"gpu_id": 0, "name": "A100", "memory_usage_percent": 1.0, "utilization_percent": 2}
STATS = {
    "gpu_count": 1,
    "total_memory_mb": 40960,
    "total_used_memory_mb": 4,
    "average_utilization_percent": 2.0,
    "gpus_summary": [GPUInfo(**INFO)],
    "total_memory_usage_percent": 0.01,
    "timestamp": "2026-05-04T03:02:01.123456",
}
GOOD = {
    EndpointInfo: ENDPOINT,
    GlobalGPUInfo: GPU,
    MultiEndpointPoolStatus: POOL,
    PoolStatus: SINGLE,
    WorkerInfo: {"worker_id": "w", "assigned_at": NOW, "note": None},
    GPUAssignment: ASSIGNMENT,
    GPUInfo: INFO,
    GPUStats: STATS,
}


@pytest.mark.parametrize("cls", GOOD)
def test_the_fields_are_those_of_the_specification_and_json_able(cls):
    value = cls(**GOOD[cls])
    assert [field.name for field in attrs.fields(cls)] == list(GOOD[cls])
    document = value.to_dict()
    assert list(document) == list(GOOD[cls])
    assert json.loads(json.dumps(document)) == document


def test_what_else_is_known_comes_behind():
    """`pool.status()` is a subclass with more."""
    for more, plain in ((Status, MultiEndpointPoolStatus), (EndpointStatus, EndpointInfo), (CardStatus, GlobalGPUInfo)):
        names = [field.name for field in attrs.fields(more)]
        assert names[: len(attrs.fields(plain))] == [field.name for field in attrs.fields(plain)]
        assert issubclass(more, plain)


@pytest.mark.parametrize(
    ("cls", "wrong", "words"),
    [
        (EndpointInfo, {"endpoint_id": " "}, "endpoint_id=' '"),
        (EndpointInfo, {"url": None}, "url=None"),
        (EndpointInfo, {"is_healthy": 1}, "is_healthy=1"),
        (EndpointInfo, {"last_seen": NOW.replace(tzinfo=None)}, "with a zone"),
        (EndpointInfo, {"last_seen": "today"}, "with a zone"),
        (EndpointInfo, {"total_gpus": -1, "available_gpus": 0}, "total_gpus=-1"),
        (EndpointInfo, {"total_gpus": True}, "total_gpus=True"),
        (EndpointInfo, {"available_gpus": 9}, "available_gpus=9: at most total_gpus=8"),
        (EndpointInfo, {"response_time_ms": -0.1}, "response_time_ms=-0.1"),
        (EndpointInfo, {"response_time_ms": float("nan")}, "response_time_ms=nan"),
        (GlobalGPUInfo, {"global_gpu_id": "server1:1"}, "global_gpu_id='server1:1': 'server1:0'"),
        (GlobalGPUInfo, {"local_gpu_id": -1}, "-1"),
        (GlobalGPUInfo, {"name": ""}, "name=''"),
        (GlobalGPUInfo, {"memory_usage_percent": 100.1}, "memory_usage_percent=100.1"),
        (GlobalGPUInfo, {"utilization_percent": False}, "utilization_percent=False"),
        (GlobalGPUInfo, {"is_available": None}, "is_available=None"),
        (MultiEndpointPoolStatus, {"healthy_endpoints": 2}, "at most total_endpoints=1"),
        (MultiEndpointPoolStatus, {"total_endpoints": 2}, "total_endpoints=2: 1"),
        (MultiEndpointPoolStatus, {"available_gpus": 9}, "at most total_gpus=8"),
        (MultiEndpointPoolStatus, {"active_workers": 1.5}, "active_workers=1.5"),
        (MultiEndpointPoolStatus, {"blocked_workers": None}, "blocked_workers=None"),
        (MultiEndpointPoolStatus, {"endpoints": ["server1"]}, "not one of EndpointInfo"),
        (MultiEndpointPoolStatus, {"gpu_assignments": {"0": []}}, "global_gpu_id='0'"),
        (MultiEndpointPoolStatus, {"gpu_assignments": {"a:0": ["w"]}}, "not one of WorkerInfo"),
        (PoolStatus, {"available_gpus": 9}, "at most total_gpus=8"),
        (PoolStatus, {"gpu_assignments": {"a:0": []}}, "gpu_assignments='a:0'"),
        (PoolStatus, {"gpu_assignments": {0: ["w"]}}, "not one of WorkerInfo"),
        (WorkerInfo, {"worker_id": ""}, "worker_id=''"),
        (WorkerInfo, {"assigned_at": None}, "assigned_at=None"),
        (GPUAssignment, {"gpu_id": "0"}, "gpu_id='0'"),
        (GPUAssignment, {"worker_id": 5}, "worker_id=5"),
        (GPUAssignment, {"endpoint_id": None}, "both of them are allowed, or neither"),
        (GPUAssignment, {"global_gpu_id": "s:1"}, "global_gpu_id='s:1': s:0"),
        (GPUAssignment, {"assigned_at": NOW.replace(tzinfo=None)}, "with a zone"),
        (GPUInfo, {"gpu_id": -1}, "gpu_id=-1"),
        (GPUStats, {"gpu_count": 2}, "gpu_count=2: 1"),
        (GPUStats, {"gpus_summary": [INFO]}, "not one of GPUInfo"),
        (GPUStats, {"total_used_memory_mb": 40961}, "at most total_memory_mb=40960"),
        (GPUStats, {"timestamp": ""}, "timestamp=''"),
    ],
)
def test_what_cannot_be_is_refused(cls, wrong, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        cls(**{**GOOD[cls], **wrong})


def test_unknown_readings_and_times_are_none():
    nothing = {"memory_usage_percent": None, "utilization_percent": None}
    assert GPUInfo(0, "A100", **nothing).to_dict()["utilization_percent"] is None
    unseen = EndpointInfo(**{**ENDPOINT, "last_seen": None, "response_time_ms": None, "is_healthy": False})
    assert unseen.to_dict()["last_seen"] is None
    # As a server without a visible card says.
    assert GPUStats(0, 0, 0, 0, []).total_memory_usage_percent is None


def test_times_are_utc_whatever_zone_they_came_in():
    there = NOW.astimezone(datetime.timezone(datetime.timedelta(hours=5)))
    assert WorkerInfo("w", there).assigned_at.tzinfo is datetime.timezone.utc
    assert WorkerInfo("w", there).to_dict()["assigned_at"] == "2026-05-04T03:02:01.000Z"


@given(
    st.text("abcXYZ019-_.~é", min_size=1, max_size=20),
    st.integers(0, 2**31),
)
def test_global_ids_come_back_as_they_went(endpoint_id, local_gpu_id):
    assert parse_global_gpu_id(make_global_gpu_id(endpoint_id, local_gpu_id)) == (endpoint_id, local_gpu_id)


@pytest.mark.parametrize(
    ("endpoint_id", "local_gpu_id"),
    [("", 0), ("a:b", 0), ("a b", 0), ("http://a", 0), ("a,b", 0), ("a", -1), ("a", True), ("a", "0"), (None, 0)],
)
def test_bad_parts_of_a_global_id_are_refused(endpoint_id, local_gpu_id):
    with pytest.raises(ValueError, match="endpoint_id="):
        make_global_gpu_id(endpoint_id, local_gpu_id)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a:", ":0", "a:b:0", "a:-1", "a:+1", "a:00", "a: 0", "a:0\n", "a:1.0", "a:٣", "a:" + "9" * 50, 0, None],
)
def test_bad_global_ids_are_refused(text):
    with pytest.raises(ValueError, match="global_gpu_id="):
        parse_global_gpu_id(text)
