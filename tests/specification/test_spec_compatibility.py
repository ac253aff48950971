"""Backward compatibility: what was written for one endpoint, or for the predecessor, goes on working."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import gpupool_sync
from gpupool_sync import GPUContextManager, GPUPool, GPUWorkerPoolClient, WorkerTimeoutError
from helpers import eventually
from predecessor_server import PredecessorFleet

ROOT = Path(gpupool_sync.__file__).parent.parent
FAST = {"polling_interval": 0.05, "endpoint_health_check_interval": 0.2}


@pytest.fixture(scope="module")
def predecessors():
    with PredecessorFleet([4, 2, 2]) as fleet:
        yield fleet


@pytest.fixture(params=["ours", "the predecessor's"])
def servers(request):
    fleet = request.getfixturevalue("fleet" if request.param == "ours" else "predecessors")
    yield fleet
    for number in range(3):
        fleet[number].heal()


def old_code(client):
    """What a user of the predecessor has, without its ``async`` and ``await``."""
    assignment = client.request_gpu(timeout=20)
    told = (assignment.gpu_id, assignment.worker_id, client.get_pool_status().active_workers)
    client.release_gpu(assignment)
    with GPUContextManager(client, timeout=20) as gpu_id:
        return told, gpu_id


def test_environment_variable_gpu_service_endpoint_continues_to_work(predecessors, monkeypatch):
    monkeypatch.setenv("GPU_SERVICE_ENDPOINT", predecessors.urls[1])
    with GPUWorkerPoolClient(**FAST) as client, GPUPool(poll_interval=0.05) as pool:
        assert client.get_pool_status().total_gpus == 2
        assert pool.acquire(timeout=20).url == predecessors.urls[1]


def test_constructor_parameter_service_endpoint_remains_functional(predecessors):
    with GPUWorkerPoolClient(service_endpoint=predecessors.urls[1]) as client:
        assert not client.is_multi_endpoint_mode()
        assert client.request_gpu(20).gpu_id == 0


@pytest.mark.real
def test_api_methods_work_without_modification_over_both_kinds_of_servers(servers):
    """The same with our own server and with a stand-in for the predecessor's, its quirks included."""
    with GPUWorkerPoolClient(servers.urls[1], **FAST) as client:
        (gpu_id, worker_id, active), entered = old_code(client)
        assert gpu_id in (0, 1)
        assert worker_id
        assert active == 1
        assert entered in ("0", "1")
        servers[1].error_body()
        eventually(lambda: client.get_detailed_metrics()["single_endpoint"]["is_healthy"] is False, 30)
        servers[1].heal()
        eventually(lambda: client.get_detailed_metrics()["single_endpoint"]["is_healthy"] is True, 30)
        assert old_code(client)[0][2] == 1


def test_single_endpoint_behavior_is_that_of_the_predecessor_but_for_exclusive_grants(predecessors):
    """With ``max_workers_per_gpu=None`` it is that, too: GPU 0 to six workers in a row."""
    with GPUWorkerPoolClient(predecessors.urls[0], max_workers_per_gpu=None, **FAST) as client:
        assert [client.request_gpu(20).gpu_id for _ in range(6)] == [0] * 6
    with GPUWorkerPoolClient(predecessors.urls[1], **FAST) as client:
        assert {client.request_gpu(20).gpu_id for _ in range(2)} == {0, 1}
        with pytest.raises(WorkerTimeoutError):
            client.request_gpu(0.1)


@pytest.mark.real
def test_from_single_to_multiple_endpoints_with_the_same_code(servers, monkeypatch):
    """A second URL is added: ids become global, local ids stay."""
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", servers.urls[1])
    with GPUWorkerPoolClient(**FAST) as client:
        (before, _, _), entered = old_code(client)
        assert entered in ("0", "1")
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"one={servers.urls[1]},two={servers.urls[2]}")
    with GPUWorkerPoolClient(**FAST) as client:
        client.pool.refresh(30)
        (after, _, _), entered = old_code(client)
        assert {before, after} <= {0, 1}
        assert entered in ("one:0", "one:1", "two:0", "two:1")
        assignment = client.request_gpu(20)
        assert assignment.global_gpu_id == f"{assignment.endpoint_id}:{assignment.gpu_id}"


@pytest.mark.checkout
def test_a_snapshot_of_names_signatures_and_wire_json_is_checked_in():
    """Each public name of it is there; tests/test_public_api.py compares all of it, and CI runs that."""
    snapshot = json.loads((ROOT / "tests" / "snapshots" / "public_api.json").read_text(encoding="utf-8"))
    names = {re.split(r"[.( ]", name)[0] for name in snapshot["names"]} - {"testing"}
    for name in names:
        assert hasattr(gpupool_sync, name), name
    assert names >= set(gpupool_sync.__all__)
    assert {"GET /gpu/summary", "POST /v1/leases"} <= set(snapshot["wire"])
    assert snapshot["json"]
    assert importlib.util.find_spec("test_public_api") is not None


@pytest.mark.checkout
def test_the_migration_guide_has_its_three_ways_and_every_step_has_code():
    """tests/test_migration.py runs each of them."""
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    ways = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [way.splitlines()[0] for way in ways] == [
        "From the predecessor",
        "From one endpoint to many",
        "From statistics only to leases",
    ]
    for way in ways:
        assert way.count("```python") >= 2


@pytest.mark.checkout
def test_performance_of_many_endpoints_against_one_is_measured():
    """1, 10 and 100 of them; refusing, answering 500, and slow."""
    text = (ROOT / "benchmarks" / "endpoints.py").read_text(encoding="utf-8")
    assert "(1, 10, 100)" in text
    server = (ROOT / "benchmarks" / "_server.py").read_text(encoding="utf-8")
    faults = re.search(r"^FAULTS = \((.*)\)", server, re.MULTILINE)
    assert faults is not None
    assert len(faults.group(1).split(",")) >= 3
