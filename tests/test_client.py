"""The predecessor's client, over our own servers and over a stand-in for the predecessor's."""

from __future__ import annotations

import contextlib
import datetime
import gc
import inspect
import json
import logging
import threading

import pytest

from gpupool_sync import (
    AcquireTimeout,
    Endpoint,
    GPUAssignment,
    GPUContextManager,
    GPUPool,
    GPUPoolError,
    GPUWorkerPoolClient,
    LeaseLost,
    MultiEndpointPoolStatus,
    NoSuchGPU,
    PoolClosed,
    PoolStatus,
    ServiceUnavailableError,
    StaleAssignmentError,
    TooManyWaiting,
    WorkerTimeoutError,
    gpu_worker_pool_client,
    parse_global_gpu_id,
)
from gpupool_sync import client as client_module
from gpupool_sync.engine import tidy
from gpupool_sync.status import EndpointInfo
from gpupool_sync.testing import FakeFleet
from helpers import environment_after, eventually, resolve_to, run_threads
from predecessor_server import PredecessorFleet, PredecessorServer
from servers import refusing

pytestmark = pytest.mark.real

#: The snippets of the specification, verbatim.
SHELL_SNIPPET = """\
# Multiple endpoints (comma-separated)
export GPU_SERVICE_ENDPOINTS="http://gpu-server1:8000,http://gpu-server2:8000,http://gpu-server3:8000"

# Single endpoint (backward compatibility)
export GPU_SERVICE_ENDPOINT="http://gpu-server:8000"

# Load balancing strategy
export GPU_LOAD_BALANCING_STRATEGY="availability"  # availability, round_robin, weighted

# Endpoint health check interval
export GPU_ENDPOINT_HEALTH_CHECK_INTERVAL="30"

# Endpoint timeout settings
export GPU_ENDPOINT_TIMEOUT="10.0"
export GPU_ENDPOINT_MAX_RETRIES="3"
"""
CONSTRUCTOR_SNIPPET = """\
client = GPUWorkerPoolClient(
    service_endpoints=[
        "http://gpu-server1:8000",
        "http://gpu-server2:8000", 
        "http://gpu-server3:8000"
    ],
    load_balancing_strategy="availability",
    endpoint_timeout=10.0,
    endpoint_health_check_interval=30
)
"""  # noqa: W291 - verbatim

FAST = {"polling_interval": 0.05, "endpoint_health_check_interval": 0.2}


@pytest.fixture(scope="session")
def our_fleet():
    with FakeFleet([2, 1], interval=0.05) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def predecessors_fleet():
    with PredecessorFleet([2, 1]) as fleet:
        yield fleet


@pytest.fixture(params=["ours", "predecessor"])
def fleet(request):
    """Two servers, with two cards and one."""
    fleet = request.getfixturevalue("our_fleet" if request.param == "ours" else "predecessors_fleet")
    yield fleet
    for number in range(len(fleet)):
        fleet[number].heal()


@pytest.fixture
def client(fleet):
    with GPUWorkerPoolClient(service_endpoints=fleet.urls, **FAST) as client:
        assert client.pool.refresh(20)
        yield client


@pytest.fixture
def single(fleet):
    with GPUWorkerPoolClient(fleet.urls[0], **FAST) as client:
        yield client


def endpoint_ids(client):
    return [each["endpoint_id"] for each in client.get_endpoints_info()]


def all_down(client):
    """Until every breaker is open; before that an endpoint is still tried as a last resort."""
    eventually(lambda: all(each["breaker"] != "closed" for each in client.pool.stats()["endpoints"].values()), 30)
    assert client.get_pool_status().healthy_endpoints == 0


def available(client):
    """By a reading of now."""
    client.pool.refresh(20)
    return client.get_pool_status().available_gpus


# --- configuration (specification, line 1) -----------------------------------------------------------------


@pytest.fixture
def three_servers(monkeypatch):
    with PredecessorFleet([2, 2, 1]) as fleet:
        resolve_to(monkeypatch, {f"gpu-server{number}": url for number, url in enumerate(fleet.urls, 1)})
        yield fleet


@pytest.mark.filterwarnings("ignore::gpupool_sync.errors.ExclusivityWarning")  # names are no loopback addresses
@pytest.mark.parametrize("how", ["shell", "constructor"])
def test_the_snippets_of_the_specification_run_verbatim(how, three_servers, monkeypatch):
    if how == "shell":
        for name, value in environment_after(SHELL_SNIPPET).items():
            monkeypatch.setenv(name, value)
        with pytest.warns(UserWarning, match="GPU_SERVICE_ENDPOINTS is set, so GPU_SERVICE_ENDPOINT is ignored"):
            client = GPUWorkerPoolClient()
    else:
        names = {"GPUWorkerPoolClient": GPUWorkerPoolClient}
        exec(CONSTRUCTOR_SNIPPET, names)
        client = names["client"]
    settings = client.pool._state.settings
    assert (settings.strategy, settings.endpoint_timeout, settings.endpoint_max_retries) == ("availability", 10.0, 3)
    assert settings.health_check_interval == 30.0
    with client:
        client.pool.refresh(20)
        status = client.get_pool_status()
        assert (status.total_endpoints, status.healthy_endpoints, status.total_gpus) == (3, 3, 5)
        assert client.request_gpu(20).global_gpu_id in {f"gpu-server{n}-8000:{k}" for n in (1, 2, 3) for k in (0, 1)}


def test_the_signature_is_the_one_that_was_promised():
    parameters = inspect.signature(GPUWorkerPoolClient).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "service_endpoint": None,
        "service_endpoints": None,
        "memory_threshold": None,
        "utilization_threshold": None,
        "polling_interval": None,
        "worker_timeout": 300.0,
        "request_timeout": 30.0,
        "load_balancing_strategy": None,
        "endpoint_timeout": None,
        "endpoint_max_retries": None,
        "endpoint_health_check_interval": None,
        "max_workers_per_gpu": 1,
    }
    keyword_only = {name for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keyword_only == {
        "endpoint_timeout",
        "endpoint_max_retries",
        "endpoint_health_check_interval",
        "max_workers_per_gpu",
    }


@pytest.mark.parametrize(
    ("arguments", "environment", "multi", "urls"),
    [
        ({"service_endpoint": "http://a"}, {}, False, ["http://a"]),
        ({"service_endpoints": "http://a"}, {}, True, ["http://a"]),
        ({"service_endpoints": ["http://a"]}, {}, True, ["http://a"]),
        ({"service_endpoints": "http://a, http://b,"}, {}, True, ["http://a", "http://b"]),
        ({"service_endpoints": [Endpoint("http://a", token="t")]}, {}, True, ["http://a"]),
        ({"service_endpoint": "http://a", "service_endpoints": "http://b"}, {}, True, ["http://b"]),
        ({"service_endpoint": "http://a", "service_endpoints": " , "}, {}, False, ["http://a"]),
        ({"service_endpoint": "http://a", "service_endpoints": []}, {}, False, ["http://a"]),
        ({}, {"GPU_SERVICE_ENDPOINT": "http://a"}, False, ["http://a"]),
        ({}, {"GPU_SERVICE_ENDPOINTS": "http://a"}, False, ["http://a"]),
        ({}, {"GPU_SERVICE_ENDPOINTS": "http://a,http://b"}, True, ["http://a", "http://b"]),
        ({}, {"GPU_STATS_SERVICE_ENDPOINTS": "http://a,http://b"}, True, ["http://a", "http://b"]),
        ({"service_endpoint": "http://c"}, {"GPU_SERVICE_ENDPOINTS": "http://a,http://b"}, False, ["http://c"]),
        ({}, {}, False, []),
    ],
)
def test_one_endpoint_or_several(arguments, environment, multi, urls, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = GPUWorkerPoolClient(**arguments)
    assert client.is_multi_endpoint_mode() is multi
    assert [each.url for each in client.pool._state.settings.endpoints] == urls


@pytest.mark.parametrize(
    ("arguments", "environment", "timeout"),
    [
        ({}, {}, 30.0),
        ({"request_timeout": 7}, {}, 7.0),
        ({"request_timeout": 7, "endpoint_timeout": 3.0}, {}, 3.0),
        ({"request_timeout": 7}, {"GPU_ENDPOINT_TIMEOUT": "4"}, 4.0),
        ({"endpoint_timeout": 3.0}, {"GPU_ENDPOINT_TIMEOUT": "4"}, 3.0),
    ],
)
def test_request_timeout_is_the_default_of_endpoint_timeout(arguments, environment, timeout, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert GPUWorkerPoolClient("http://a", **arguments).pool._state.settings.endpoint_timeout == timeout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"service_endpoint": "gpu1:8000"}, "service_endpoint: .*http:// or https:// is missing"),
        ({"service_endpoint": "http://a,http://b"}, "service_endpoint: one URL is allowed, not 2"),
        ({"service_endpoints": 5}, "service_endpoints=5: "),
        ({"service_endpoints": "http://a:8000,ftp://b"}, "service_endpoints: .*only http"),
        ({"memory_threshold": 101}, "memory_threshold=101: "),
        ({"utilization_threshold": "90"}, "utilization_threshold='90': "),
        ({"polling_interval": 0}, "polling_interval=0: "),
        ({"load_balancing_strategy": "fastest"}, "load_balancing_strategy='fastest': "),
        ({"endpoint_max_retries": -1}, "endpoint_max_retries=-1: "),
        ({"endpoint_health_check_interval": 0}, "endpoint_health_check_interval=0: "),
        ({"request_timeout": 0}, "request_timeout=0: "),
        ({"worker_timeout": -1}, "worker_timeout=-1: "),
        ({"worker_timeout": "5"}, "worker_timeout='5': "),
        ({"max_workers_per_gpu": 0}, "max_workers_per_gpu=0: .*None"),
        ({"max_workers_per_gpu": True}, "max_workers_per_gpu=True: "),
    ],
)
def test_wrong_arguments_are_named_as_the_caller_wrote_them(arguments, words):
    with pytest.raises(ValueError, match=words):
        GPUWorkerPoolClient(**{"service_endpoint": "http://a", **arguments})


def test_errors_are_ours():
    assert issubclass(WorkerTimeoutError, AcquireTimeout)
    assert issubclass(WorkerTimeoutError, TimeoutError)
    assert issubclass(StaleAssignmentError, LeaseLost)
    assert issubclass(ServiceUnavailableError, GPUPoolError)


# --- life ---------------------------------------------------------------------------------------------------


def test_nothing_works_before_the_start_or_after_the_end(fleet):
    client = GPUWorkerPoolClient(service_endpoints=fleet.urls)
    assignment = GPUAssignment(0, "somebody", datetime.datetime.now(datetime.timezone.utc))
    calls = [
        client.request_gpu,
        lambda: client.release_gpu(assignment),
        client.get_pool_status,
        client.get_multi_endpoint_pool_status,
        client.get_detailed_metrics,
        client.get_endpoints_info,
        client.get_error_recovery_status,
        lambda: client.trigger_endpoint_recovery("gpu1"),
        lambda: client.queue_request_for_retry(print),
        client.print_error_recovery_summary,
        client.print_status_summary,
        client.get_health_summary,
        client.get_formatted_metrics,
        GPUContextManager(client).__enter__,
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="not started"):
            call()
    client.stop()  # harmless
    client.start()
    with pytest.raises(RuntimeError, match="started already"):
        client.start()
    client.stop()
    client.stop()
    for call in calls:
        with pytest.raises(RuntimeError, match="not started"):
            call()


def test_a_stopped_client_has_released_everything_and_starts_again(single):
    first = single.request_gpu(20)
    second = single.request_gpu(20)
    assert {first.gpu_id, second.gpu_id} == {0, 1}
    single.stop()
    single.start()
    assert {single.request_gpu(20).gpu_id, single.request_gpu(20).gpu_id} == {0, 1}
    single.release_gpu(first)  # of before: not one of those that are held now
    assert single.get_pool_status().active_workers == 2


def test_the_facade_has_no_threads_of_its_own(client):
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("gpupool")}
    client.release_gpu(client.request_gpu(20))
    pooled = ("-monitor", "-poll_", "-probe_", "keeper", "listener")
    assert all(any(part in name for part in pooled) for name in names), names


def test_the_client_causes_no_requests_but_the_polls(predecessors_fleet):
    """No second poller: what one asks, however often, is answered from what the pool knows."""
    server = predecessors_fleet[0]
    with GPUWorkerPoolClient(server.url, polling_interval=600, endpoint_health_check_interval=600) as client:
        client.get_pool_status()
        before = dict(server.requested)
        for _ in range(50):
            client.get_pool_status()
            client.get_detailed_metrics()
        assert server.requested == before
        client.pool.refresh(20)
        assert server.requested["/gpu/summary"] == before["/gpu/summary"] + 1


# --- requesting and releasing -------------------------------------------------------------------------------


def test_gpus_are_granted_exclusively_and_released(client):
    """The one deviation: the predecessor gives GPU 0 to six workers in a row."""
    held = [client.request_gpu(20) for _ in range(3)]
    assert len({each.global_gpu_id for each in held}) == 3
    assert len({each.worker_id for each in held}) == 3
    with pytest.raises(WorkerTimeoutError, match="held by"):
        client.request_gpu(timeout=0.2)
    client.release_gpu(held[1])
    assert client.request_gpu(timeout=20).global_gpu_id == held[1].global_gpu_id


def test_a_request_waits_for_a_release(single):
    held = [single.request_gpu(20), single.request_gpu(20)]
    results = []
    waiting = threading.Thread(target=lambda: results.append(single.request_gpu(30)), daemon=True)
    waiting.start()
    eventually(lambda: single.get_pool_status().blocked_workers == 1)
    single.release_gpu(held[0])
    waiting.join(30)
    assert results[0].gpu_id == held[0].gpu_id


def test_worker_timeout_is_the_default_timeout(fleet):
    with GPUWorkerPoolClient(fleet.urls[1], worker_timeout=0.1) as client:
        client.request_gpu(20)
        with pytest.raises(WorkerTimeoutError) as caught:
            client.request_gpu()
        assert caught.value.explanation.cards
        assert not isinstance(caught.value, ServiceUnavailableError)
        with pytest.raises(ValueError, match="timeout=-1"):
            client.request_gpu(-1)


def test_ids_are_local_with_one_endpoint(single):
    assignment = single.request_gpu(20)
    assert assignment.gpu_id in (0, 1)
    assert (assignment.global_gpu_id, assignment.endpoint_id) == (None, None)
    assert assignment.assigned_at.utcoffset() == datetime.timedelta(0)
    assert assignment.get_display_id() == str(assignment.gpu_id)
    with GPUContextManager(single, timeout=20) as gpu_id:
        assert gpu_id == str(1 - assignment.gpu_id)
    status = single.get_pool_status()
    assert isinstance(status, PoolStatus)
    assert (status.total_gpus, status.available_gpus, status.active_workers) == (2, 1, 1)
    assert [worker.id for worker in status.gpu_assignments[assignment.gpu_id]] == [assignment.worker_id]
    json.dumps(status.to_dict())
    for nothing in (
        single.get_multi_endpoint_pool_status(),
        single.get_endpoints_info(),
        single.get_error_recovery_status(),
        single.get_health_summary(),
    ):
        assert nothing is None
    for refused in (lambda: single.trigger_endpoint_recovery("x"), lambda: single.queue_request_for_retry(print)):
        with pytest.raises(RuntimeError, match="multi-endpoint mode"):
            refused()


def test_ids_are_global_with_several_and_overlapping_local_ids_stay_distinct(client):
    """Specification, line 3: an assignment carries endpoint and local id; a release goes to the right endpoint."""
    held = [client.request_gpu(20) for _ in range(3)]
    zeros = [each for each in held if each.gpu_id == 0]
    assert len({each.endpoint_id for each in zeros}) == 2
    for each in held:
        assert parse_global_gpu_id(each.global_gpu_id) == (each.endpoint_id, each.gpu_id)
        assert each.is_multi_endpoint
    client.release_gpu(zeros[1])
    info = {each["endpoint_id"]: each["available_gpus"] for each in client.get_endpoints_info()}
    assert info == {zeros[1].endpoint_id: 1, zeros[0].endpoint_id: 0}
    assert client.request_gpu(20).global_gpu_id == zeros[1].global_gpu_id
    assert {each.id for each in client.get_pool_status().gpu_assignments[zeros[0].global_gpu_id]} == {
        zeros[0].worker_id
    }


def test_the_same_code_with_a_second_url(fleet):
    """Specification, line 11: ids become global, local ids stay."""

    def old_code(**where):
        with gpu_worker_pool_client(**where, **FAST) as client:
            assignment = client.request_gpu(timeout=20)
            try:
                status = client.get_pool_status()
                return assignment, status.total_gpus, status.active_workers
            finally:
                client.release_gpu(assignment)

    one, total, active = old_code(service_endpoint=fleet.urls[1])
    assert (one.gpu_id, one.global_gpu_id, total, active) == (0, None, 1, 1)
    both, total, active = old_code(service_endpoints=",".join(fleet.urls[::-1]))
    assert active == 1
    assert both.global_gpu_id == f"{both.endpoint_id}:{both.gpu_id}"
    assert total <= 3


def test_a_second_release_and_a_strange_assignment(single, caplog):
    assignment = single.request_gpu(20)
    other = single.request_gpu(20)
    for wrong in (None, "0", 0):
        with pytest.raises(ValueError, match="assignment: "):
            single.release_gpu(wrong)
    with pytest.raises(ValueError, match=f"has GPU {assignment.gpu_id}, not {other.gpu_id}"):
        single.release_gpu(GPUAssignment(other.gpu_id, assignment.worker_id, assignment.assigned_at))
    single.release_gpu(assignment)
    single.release_gpu(assignment)
    assert "holds no GPU" in caplog.text
    assert single.get_pool_status().active_workers == 1
    # An equal one, such as a copy from a queue, is as good as the one that was returned.
    single.release_gpu(GPUAssignment(other.gpu_id, other.worker_id, other.assigned_at))
    assert single.get_pool_status().active_workers == 0


def test_an_assignment_that_nobody_keeps_stays_held(single):
    """Freeing a card in use is worse than a leak; the predecessor keeps it as well."""
    gpu_id = single.request_gpu(20).gpu_id
    gc.collect()
    tidy(single.pool._state)
    assert gpu_id in single.get_pool_status().gpu_assignments


def test_what_never_reached_the_caller_is_given_back(single, monkeypatch):
    """An interrupt after the grant leaks nothing."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client_module, "GPUAssignment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            single.request_gpu(20)
    gc.collect()
    eventually(lambda: (tidy(single.pool._state), single.get_pool_status().active_workers == 0)[1])


@pytest.fixture
def _opened_again(client):
    """A card whose lease was revoked is closed until a claim says that it was seen empty: not left to other tests."""
    yield
    client.pool.release_all()
    with client.pool.gpu(60, local=False), client.pool.gpu(60, local=False), client.pool.gpu(60, local=False):
        pass


@pytest.mark.usefixtures("_opened_again")
@pytest.mark.parametrize("way", ["release", "block", "raising block"])
def test_a_lost_lease_is_a_stale_assignment(way, client, caplog):
    manager = GPUContextManager(client, timeout=20)
    assignment = client.request_gpu(20) if way == "release" else None
    gpu_id = assignment.global_gpu_id if assignment is not None else manager.__enter__()
    assert client.pool.revoke(gpu_id, force=True)
    # Its pool hears of that within a second, or with the next renewal, and lets go of it.
    client.pool.release_all()
    if assignment is not None:
        with pytest.raises(StaleAssignmentError, match=gpu_id):
            client.release_gpu(assignment)
        client.release_gpu(assignment)  # now it is only a second release
    elif way == "block":
        with pytest.raises(StaleAssignmentError, match=gpu_id):
            manager.__exit__(None, None, None)
    else:
        manager.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert f"the lease on {gpu_id}" in caplog.text


def test_the_context_managers(client):
    with GPUContextManager(client, timeout=20) as gpu_id:
        assert parse_global_gpu_id(gpu_id)[0] in endpoint_ids(client)
        assert client.get_pool_status().active_workers == 1
    assert client.get_pool_status().active_workers == 0
    manager = GPUContextManager(client, timeout=20)
    with manager, pytest.raises(RuntimeError, match="in use already"):
        manager.__enter__()
    with manager as again:  # one after the other is fine
        assert ":" in again
    assert client.get_pool_status().active_workers == 0


def test_many_threads_share_a_client(client):
    seen = set()

    def work(number):
        for _ in range(5):
            assignment = client.request_gpu(30)
            assert assignment.global_gpu_id not in seen
            seen.add(assignment.global_gpu_id)
            seen.discard(assignment.global_gpu_id)
            client.release_gpu(assignment)

    run_threads(8, work)
    assert client.get_pool_status().active_workers == 0


# --- several workers on one GPU -----------------------------------------------------------------------------


def test_none_gives_one_gpu_to_six_workers_as_the_predecessor_does(fleet):
    # One reading for all six: a later one may show the load of the first, and the other GPU as the better one.
    slow = {"polling_interval": 3600, "endpoint_health_check_interval": 3600}
    with GPUWorkerPoolClient(fleet.urls[0], max_workers_per_gpu=None, **slow) as client:
        held = [client.request_gpu(20) for _ in range(6)]
        gpu_id = held[0].gpu_id
        assert [each.gpu_id for each in held] == [gpu_id] * 6
        status = client.get_pool_status()
        assert (status.available_gpus, status.active_workers) == (2, 6)
        assert {each.id for each in status.gpu_assignments[gpu_id]} == {each.worker_id for each in held}
        # While below the thresholds: from then on the other one, though this one is held.
        fleet[0].busy(gpu_id, 95.0, process=False)
        eventually(lambda: available(client) == 1)
        assert client.request_gpu(20).gpu_id == 1 - gpu_id


@pytest.mark.parametrize("fleet", ["ours"], indirect=True)
def test_none_takes_no_notice_of_processes(fleet):
    """The predecessor's server does not tell them."""
    for card in (0, 1):
        fleet[0].busy(card, 40.0, process=True)
    for limit, free in ((1, 0), (None, 2)):
        with GPUWorkerPoolClient(fleet.urls[0], max_workers_per_gpu=limit, **FAST) as client:
            eventually(lambda client=client, free=free: available(client) == free)


def test_two_workers_per_gpu(fleet):
    with GPUWorkerPoolClient(service_endpoints=fleet.urls[1], max_workers_per_gpu=2, **FAST) as client:
        first, second = client.request_gpu(20), client.request_gpu(20)
        assert first.global_gpu_id == second.global_gpu_id
        assert client.get_pool_status().available_gpus == 0
        with pytest.raises(WorkerTimeoutError):
            client.request_gpu(0.1)
        client.release_gpu(first)
        assert client.get_pool_status().available_gpus == 1
        assert client.get_endpoints_info()[0]["available_gpus"] == 1
        client.release_gpu(client.request_gpu(20))


@pytest.mark.parametrize(
    ("variable", "arguments", "workers"),
    [
        (None, {}, 1),
        ("3", {}, 3),
        ("none", {}, None),
        ("3", {"max_workers_per_gpu": 1}, 1),
        ("3", {"max_workers_per_gpu": None}, None),
        (None, {"max_workers_per_gpu": 2}, 2),
    ],
)
def test_the_variable_for_workers_per_gpu(variable, arguments, workers, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("GPU_MAX_WORKERS_PER_GPU", variable)
    assert GPUWorkerPoolClient("http://a", **arguments)._workers == workers


def test_a_wrong_variable_for_workers_per_gpu(monkeypatch):
    monkeypatch.setenv("GPU_MAX_WORKERS_PER_GPU", "many")
    with pytest.raises(ValueError, match="GPU_MAX_WORKERS_PER_GPU='many'"):
        GPUWorkerPoolClient("http://a")


# --- looking at it ------------------------------------------------------------------------------------------


def test_the_status_has_exactly_the_fields_of_the_specification(client):
    client.request_gpu(20)
    status = client.get_multi_endpoint_pool_status()
    assert type(status) is MultiEndpointPoolStatus
    assert {type(each) for each in status.endpoints} == {EndpointInfo}
    assert list(status.to_dict()) == [
        "total_endpoints",
        "healthy_endpoints",
        "total_gpus",
        "available_gpus",
        "active_workers",
        "blocked_workers",
        "endpoints",
        "gpu_assignments",
    ]
    assert isinstance(client.pool.status(), MultiEndpointPoolStatus)
    assert (status.total_endpoints, status.healthy_endpoints) == (2, 2)
    assert (status.total_gpus, status.available_gpus, status.active_workers) == (3, 2, 1)
    assert all(each.last_seen.utcoffset() == datetime.timedelta(0) for each in status.endpoints)
    json.dumps(status.to_dict())


def test_an_endpoint_that_is_down_keeps_its_gpus_in_its_own_entry(client, fleet):
    client.get_pool_status()
    fleet[0].kill()
    eventually(lambda: (client.pool.refresh(20), client.get_pool_status().healthy_endpoints == 1)[1])
    for _ in range(2):
        status = client.get_pool_status()
        down, up = status.endpoints
        assert (down.is_healthy, down.total_gpus, down.available_gpus) == (False, 2, 0)
        assert (up.is_healthy, up.total_gpus, up.available_gpus) == (True, 1, 1)
        assert (status.total_endpoints, status.total_gpus, status.available_gpus) == (2, 1, 1)
        # And again, once its breaker is open.
        eventually(lambda: client.pool.status().endpoints[0].breaker != "closed", 30)
    fleet[0].restart()
    eventually(lambda: client.get_pool_status().total_gpus == 3, 30)


def test_last_seen_is_none_before_the_first_contact():
    with refusing() as url, GPUWorkerPoolClient(service_endpoints=url, **FAST) as client:
        (info,) = client.get_endpoints_info()
        assert info == {
            "endpoint_id": url.removeprefix("http://").replace(":", "-"),
            "url": url,
            "is_healthy": False,
            "last_seen": None,
            "total_gpus": 0,
            "available_gpus": 0,
            "response_time_ms": None,
        }


def test_metrics_have_everything_that_stats_has(client, single):
    for each in (client, single):
        each.request_gpu(20)
        metrics = each.get_detailed_metrics()
        json.dumps(metrics)
        assert set(metrics["stats"]) == set(each.pool.stats())
        assert metrics["thresholds"] == {"memory_threshold_percent": 80.0, "utilization_threshold_percent": 90.0}
        (assignment,) = metrics["assignment_metrics"]
        held = [gpu for gpu in metrics["gpu_metrics"] if assignment["worker_id"] in gpu["worker_ids"]]
        assert [gpu["gpu_id"] for gpu in held] == [assignment["gpu_id"]]
        assert json.loads(each.get_formatted_metrics("json"))["mode"] == metrics["mode"]
        assert f"Active Workers: {metrics['active_workers']}" in each.get_formatted_metrics()
        with pytest.raises(ValueError, match="xml"):
            each.get_formatted_metrics("xml")
    metrics = client.get_detailed_metrics()
    assert metrics["endpoints"]["summary"]["healthy_endpoints"] == 2
    assert metrics["load_balancer"]["name"] == "availability"
    assert single.get_detailed_metrics()["single_endpoint"]["is_healthy"] is True


def test_metrics_tell_who_waits(single):
    held = [single.request_gpu(20), single.request_gpu(20)]
    assert single.get_detailed_metrics()["queue_metrics"] == []
    results = []
    waiting = threading.Thread(target=lambda: results.append(single.request_gpu(30)), daemon=True)
    waiting.start()
    eventually(lambda: single.get_pool_status().blocked_workers == 1)
    (queued,) = single.get_detailed_metrics()["queue_metrics"]
    assert queued["wait_time_seconds"] > 0
    assert datetime.datetime.fromisoformat(queued["enqueued_at"].replace("Z", "+00:00")) < client_module._now()
    single.release_gpu(held[0])
    waiting.join(30)
    assert results[0].worker_id == queued["worker_id"]
    with pytest.raises(WorkerTimeoutError), GPUContextManager(single, timeout=0):
        pass
    assert single.get_detailed_metrics()["queue_metrics"] == []


def test_metrics_of_several_endpoints_have_the_predecessors_keys(client, fleet):
    """Of an endpoint that is well and one that is down: what the predecessor's dashboards read, by its names."""
    client.release_gpu(client.request_gpu(20))
    first, second = endpoint_ids(client)
    fleet[0].kill()
    eventually(lambda: client.pool.stats()["endpoints"][first]["breaker"] == "open", 30)
    metrics = client.get_detailed_metrics()
    json.dumps(metrics)
    totals = metrics["aggregated_stats"]
    assert (totals["total_gpus"], totals["endpoints_contributing"]) == (1, 1)
    assert totals["utilized_gpus"] == totals["total_gpus"] - totals["available_gpus"]
    assert totals["average_response_time_ms"] > 0
    (well,) = metrics["endpoints"]["healthy_endpoints"]
    (down,) = metrics["endpoints"]["unhealthy_endpoints"]
    assert metrics["endpoints"]["details"] == {first: down, second: well}
    assert (well["connectivity_status"], down["connectivity_status"]) == ("healthy", "failing")
    assert (well["health_score"], well["consecutive_failures"]) == (100.0, 0)
    assert 0 < down["health_score"] == pytest.approx(50 * down["success_rate"])
    assert down["time_since_last_success"] != "never"
    assert down["consecutive_failures"] >= 5
    health = metrics["endpoint_health_summary"]
    assert health["status_distribution"] == {"healthy": 1, "failing": 1}
    assert health["health_scores"]["maximum"] == 100.0
    assert health["health_scores"]["minimum"] == down["health_score"]
    assert health["healthy_percentage"] == 50.0
    balancer = metrics["load_balancer"]
    assert (balancer["strategy"], balancer["total_requests"], balancer["success_rate"]) == ("availability", 1, 100.0)
    balance = metrics["load_balancing_effectiveness"]
    assert balance["effectiveness"] == metrics["stats"]["effectiveness"]
    assert balance["distribution_score"] == pytest.approx(100 * balance["effectiveness"])
    monitor = metrics["monitor_status"]
    assert (monitor["has_current_stats"], monitor["consecutive_failures"]) == (True, 0)
    assert {gpu["resource_score"] for gpu in metrics["gpu_metrics"]} <= {
        gpu["memory_usage_percent"] + gpu["utilization_percent"] for gpu in metrics["gpu_metrics"]
    }


def test_metrics_before_anybody_has_answered():
    with refusing() as url, GPUWorkerPoolClient(service_endpoints=url, **FAST) as client:
        metrics = client.get_detailed_metrics()
    (down,) = metrics["endpoints"]["unhealthy_endpoints"]
    assert (down["connectivity_status"], down["health_score"]) == ("unreachable", 0.0)
    assert (down["last_seen_seconds_ago"], down["time_since_last_success"]) == (None, "never")
    assert metrics["load_balancing_effectiveness"]["balancing_quality"] == "no_endpoints"
    assert metrics["aggregated_stats"]["average_response_time_ms"] == 0.0
    assert metrics["monitor_status"]["last_success_time"] is None


def test_what_is_printed(client, single, fleet, capsys):
    client.print_status_summary()
    client.print_error_recovery_summary()
    text = capsys.readouterr().out
    assert "Endpoints: 2/2 healthy" in text
    assert "System Status: OPERATIONAL" in text
    for endpoint_id in endpoint_ids(client):
        assert f"{endpoint_id}: CLOSED" in text
        assert f"Endpoint: {endpoint_id}" in client.get_health_summary()
    single.print_status_summary()
    single.print_error_recovery_summary()
    text = capsys.readouterr().out
    assert "Mode: Single-endpoint (error recovery not applicable)" in text
    assert "Total GPUs: 2" in text


# --- failures and recovery (specification, line 7) ----------------------------------------------------------


def test_requests_queue_while_all_endpoints_are_down(client, fleet):
    for number in range(2):
        fleet[number].kill()
    all_down(client)
    with pytest.raises(ServiceUnavailableError) as caught:
        client.request_gpu(0.1)
    assert isinstance(caught.value, WorkerTimeoutError)
    results = []
    waiting = threading.Thread(target=lambda: results.append(client.request_gpu(60)), daemon=True)
    waiting.start()
    eventually(lambda: client.get_pool_status().blocked_workers == 1)
    assert client.get_error_recovery_status()["degradation_manager"]["is_fully_degraded"]
    fleet[1].restart()
    waiting.join(60)
    assert results[0].endpoint_id == endpoint_ids(client)[1]


def test_an_error_in_the_body_is_a_failure(client, fleet):
    """The predecessor's server answers 200 when nvidia-smi fails."""
    client.get_pool_status()
    fleet[0].error_body()
    eventually(lambda: (client.pool.refresh(20), client.get_pool_status().healthy_endpoints == 1)[1])
    assert client.request_gpu(20).endpoint_id == endpoint_ids(client)[1]
    status = client.get_error_recovery_status()
    broken = status["degradation_manager"]["circuit_breaker_stats"][endpoint_ids(client)[0]]
    assert broken["total_failures"] > 0
    assert broken["last_error"]
    assert status["endpoint_health_summary"]["degraded_count"] == 1
    json.dumps(status)


def test_a_recovery_is_found_at_once_on_demand(fleet):
    """The breaker is open and its next probe far away; `trigger_endpoint_recovery` probes now."""
    slow = {"polling_interval": 0.05, "endpoint_health_check_interval": 3600}
    with GPUWorkerPoolClient(service_endpoints=fleet.urls, **slow) as client:
        client.get_pool_status()
        first = endpoint_ids(client)[0]
        assert client.trigger_endpoint_recovery(first) is True
        fleet[0].kill()
        for _ in range(6):
            assert client.trigger_endpoint_recovery(first) is False
        assert client.pool.stats()["endpoints"][first]["breaker"] == "open"
        fleet[0].restart()
        assert client.trigger_endpoint_recovery(first) is True
        assert client.pool.stats()["endpoints"][first]["breaker"] == "closed"
        with pytest.raises(ValueError, match="nowhere"):
            client.trigger_endpoint_recovery("nowhere")


def test_a_queued_request_runs_when_an_endpoint_recovers(client, fleet):
    assert client.queue_request_for_retry(lambda: "at once").result(20) == "at once"
    fleet[0].kill()
    eventually(lambda: client.get_pool_status().healthy_endpoints == 1, 30)
    threads = []

    def request():
        threads.append(threading.current_thread().name)
        return client.request_gpu(20)

    future = client.queue_request_for_retry(request)
    cancelled = client.queue_request_for_retry(lambda: threads.append("never"))
    assert cancelled.cancel()
    assert client.get_error_recovery_status()["endpoint_health_summary"]["queued_requests"] == 2
    assert not future.done()
    fleet[0].restart()
    client.release_gpu(future.result(60))
    assert threads == ["gpupool-retry"]
    assert client.get_error_recovery_status()["endpoint_health_summary"]["queued_requests"] == 0
    with pytest.raises(ValueError, match="request_func"):
        client.queue_request_for_retry("not a function")


class TestRetries:
    """Without servers: polls are told by hand."""

    @pytest.fixture
    def retries(self):
        retries = client_module._Retries()
        yield retries
        retries.close()

    def test_one_that_fails_is_tried_at_the_next_recoveries(self, retries):
        calls = []

        def fail():
            calls.append(None)
            raise ZeroDivisionError

        retries.heard("a", False)
        retries.heard("b", False)
        future = retries.put(fail)
        for number in range(1, 3):
            retries.heard("a", True)
            eventually(lambda number=number: len(calls) == number)
            eventually(lambda: retries._thread is None)
            assert not future.done()
            retries.heard("a", False)
        retries.heard("a", True)
        assert isinstance(future.exception(20), ZeroDivisionError)
        assert len(calls) == client_module.RETRY_ATTEMPTS

    def test_its_error_is_passed_on_when_nothing_is_down_any_more(self, retries):
        retries.heard("a", False)
        future = retries.put(lambda: 1 / 0)
        retries.heard("a", True)
        assert isinstance(future.exception(20), ZeroDivisionError)

    def test_a_system_exit_does_not_end_the_thread_for_the_others(self, retries):
        retries.heard("a", False)
        first, second = retries.put(lambda: exit()), retries.put(lambda: 2)
        retries.heard("a", True)
        assert second.result(20) == 2
        assert isinstance(first.exception(20), SystemExit)

    def test_it_is_bounded(self, retries, monkeypatch):
        monkeypatch.setattr(client_module, "MOST_RETRIES", 2)
        retries.heard("a", False)
        futures = [retries.put(print), retries.put(print)]
        with pytest.raises(TooManyWaiting):
            retries.put(print)
        retries.close()
        assert all(isinstance(future.exception(5), PoolClosed) for future in futures)

    def test_a_forked_child_has_requests_of_its_own(self, retries):
        retries.heard("a", False)
        retries.put(print)
        retries._lock.acquire()  # by a thread that does not exist in the child
        retries._pid = -1
        assert retries.put(lambda: 3).result(20) == 3

    def test_a_removed_endpoint_is_waited_for_no_longer(self, client, fleet):
        fleet[0].kill()
        eventually(lambda: client.get_pool_status().healthy_endpoints == 1, 30)
        future = client.queue_request_for_retry(lambda: 4)
        assert not future.done()
        client.pool.remove_endpoint(endpoint_ids(client)[0])
        assert future.result(20) == 4


def test_stopping_ends_those_who_wait(client, fleet):
    for number in range(2):
        fleet[number].kill()
    all_down(client)
    errors = []

    def request():
        try:
            client.request_gpu(60)
        except PoolClosed as exc:
            errors.append(exc)

    waiting = threading.Thread(target=request, daemon=True)
    waiting.start()
    future = client.queue_request_for_retry(lambda: None)
    eventually(lambda: client.get_pool_status().blocked_workers == 1)
    client.stop()
    waiting.join(20)
    assert len(errors) == 1
    assert isinstance(future.exception(5), PoolClosed)


# --- the quirks of the predecessor's server -----------------------------------------------------------------


def test_ids_keep_the_systems_numbers():
    with contextlib.closing(PredecessorServer(4, visible=(1, 3))) as server, GPUWorkerPoolClient(server.url) as client:
        assert [client.request_gpu(20).gpu_id for _ in range(2)] == [1, 3]


def test_a_server_without_a_visible_gpu():
    """All have answered, and there is none: that is said at once."""
    with contextlib.closing(PredecessorServer(2, visible=())) as server, GPUWorkerPoolClient(server.url) as client:
        assert client.get_pool_status().total_gpus == 0
        with pytest.raises(NoSuchGPU):
            client.request_gpu(60)


def test_thresholds_are_those_of_the_client(fleet):
    fleet[1].busy(0, 50.0, process=False)
    for threshold, free in ((60.0, 1), (40.0, 0)):
        with GPUWorkerPoolClient(fleet.urls[1], memory_threshold=threshold, **FAST) as client:
            eventually(lambda client=client, free=free: available(client) == free)


def test_a_statistics_only_server_is_exclusive_among_this_machines_clients(predecessors_fleet):
    url = predecessors_fleet.urls[1]
    with GPUWorkerPoolClient(url, **FAST) as one, GPUPool(url, poll_interval=0.05) as other:
        assignment = one.request_gpu(20)
        with pytest.raises(AcquireTimeout, match=assignment.worker_id):
            other.acquire(timeout=0.1)
        one.release_gpu(assignment)
        other.acquire(timeout=20).release()


def test_the_log_names_no_secret(caplog):
    caplog.set_level(logging.DEBUG)
    with refusing() as url:
        client = GPUWorkerPoolClient(url.replace("//", "//ann:hush@"))
        with client, contextlib.suppress(WorkerTimeoutError):
            client.request_gpu(0.1)
            client.print_status_summary()
    assert "hush" not in caplog.text + repr(client)
