"""Endpoints: life cycle, global ids, connections, polling, and what is counted at the servers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import Counter

import psutil
import pytest
from spec_answers import summary

from gpupool_sync import Endpoint, EndpointUnavailable, GPUPool, GPUWorkerPoolClient
from gpupool_sync.cli import main
from gpupool_sync.clock import Deadline
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from gpupool_sync.transport import Transport
from helpers import eventually, run_threads
from servers import Server, answer, head, reset_after_request


def state(pool, name):
    return next(each for each in pool.status().endpoints if each.endpoint_id == name)


# --- endpoint manager ---------------------------------------------------------------------------------------


def test_manages_the_lifecycle_of_multiple_endpoint_connections(pool, fleet):
    """Added, drained and removed at run time, without a restart."""
    assert [each.endpoint_id for each in pool.status().endpoints] == ["server1", "server2", "server3"]
    pool.drain_endpoint("server1")
    held = [pool.acquire(timeout=20) for _ in range(4)]
    assert {gpu.endpoint_id for gpu in held} == {"server2", "server3"}
    pool.remove_endpoint("server1")
    assert pool.status().total_endpoints == 2
    pool.add_endpoint(fleet[0].url, name="again")
    assert pool.acquire(timeout=20).endpoint_id == "again"


def test_tracks_endpoint_health_and_availability_status(pool, fleet):
    assert state(pool, "server1").is_healthy
    fleet[0].fail(500)
    eventually(lambda: not state(pool, "server1").is_healthy, 30)
    fleet[0].heal()
    eventually(lambda: state(pool, "server1").is_healthy, 30)
    assert 0 < state(pool, "server1").availability < 1
    with pool.gpu(timeout=20, endpoint="server1"):
        assert state(pool, "server1").available_gpus == 3


def test_implements_connection_pooling_and_cleanup():
    """100 polls use one TCP connection; after close() descriptors and threads are as before."""
    process = psutil.Process()
    before = (process.num_fds(), {each.name for each in threading.enumerate()})
    with Server(answer(summary())) as server:
        with GPUPool(server.url, lease_store=MemoryStore(), poll_interval=0.01) as pool:
            eventually(lambda: len(server.requests) >= 100, 40)
            assert pool.status().healthy_endpoints == 1
        assert server.connections == 1
    eventually(lambda: process.num_fds() <= before[0], message="descriptors are as before")
    assert {each.name for each in threading.enumerate() if each.name.startswith("gpupool")} <= before[1]


def test_provides_endpoint_discovery_from_a_file_that_is_read_again(make_pool, fleet, tmp_path):
    """Lines, or Prometheus' file_sd in JSON; re-read when it changes, without a restart."""
    listing = tmp_path / "servers.json"

    def write(*servers):
        new = tmp_path / "new"
        new.write_text(json.dumps([{"targets": [url.removeprefix("http://") for url in servers]}]), encoding="utf-8")
        new.replace(listing)

    write(fleet.urls[0])
    lines = tmp_path / "lines"
    lines.write_text(f"# ours\nlisted={fleet.urls[2]}\n", encoding="utf-8")
    pool = make_pool([f"file:{listing}", f"file:{lines}"])
    pool.open(wait=True)
    assert (pool.status().total_gpus, state(pool, "listed").total_gpus) == (6, 2)
    write(*fleet.urls[:2])
    eventually(lambda: pool.status().total_gpus == 8, 30)
    write(fleet.urls[1])
    eventually(lambda: pool.status().total_gpus == 4, 40)


@pytest.mark.allow_hosts(["127.0.0.1", "127.0.0.2"])
def test_provides_endpoint_discovery_from_a_dns_name_with_several_addresses(make_pool, monkeypatch):
    addresses = ["127.0.0.1", "127.0.0.2"]
    real = socket.getaddrinfo

    def lookup(host, port, *args, **kwargs):
        if host != "gpus.example":
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with Server(answer(summary()), host="0.0.0.0") as server:
        pool = make_pool(f"dns+http://gpus.example:{server.port}")
        pool.open()
        eventually(lambda: pool.status().healthy_endpoints == 2, 30)
        addresses.pop()
        eventually(lambda: pool.status().total_endpoints == 1, 40)


def test_provides_health_monitoring(pool, fleet):
    """A dead endpoint is found out, and so is its return, by the polls alone: nobody asks for anything."""
    fleet[1].kill()
    eventually(lambda: state(pool, "server2").breaker == "open", 30)
    assert "refused" in state(pool, "server2").last_error
    fleet[1].restart()
    eventually(lambda: state(pool, "server2").is_healthy, 30)


# --- global GPU ids -----------------------------------------------------------------------------------------


def test_creates_unique_identifiers_for_gpus_across_all_endpoints(pool):
    """Overlapping local ids stay distinct."""
    held = [pool.acquire(timeout=20) for _ in range(8)]
    assert len({gpu.global_gpu_id for gpu in held}) == 8
    assert Counter(gpu.local_gpu_id for gpu in held) == {0: 3, 1: 3, 2: 1, 3: 1}


def test_format_is_endpoint_id_and_local_gpu_id(pool):
    gpu = pool.acquire(timeout=20, endpoint="server2")
    assert gpu.global_gpu_id in ("server2:0", "server2:1")
    assert gpu.global_gpu_id == f"{gpu.endpoint_id}:{gpu.local_gpu_id}"


def test_maintains_the_mapping_between_global_ids_and_endpoint_and_local_id(names):
    with GPUWorkerPoolClient(service_endpoints=names, polling_interval=0.05) as client:
        assignment = client.request_gpu(20)
        told = (assignment.global_gpu_id, assignment.endpoint_id, assignment.gpu_id)
        assert told == (f"{told[1]}:{told[2]}", told[1], told[2])
        assert {gpu.global_gpu_id for gpu in client.pool.status().gpus} >= {"server1:3", "server3:1"}


def test_handles_gpu_assignment_routing_to_correct_endpoints(names, fleet):
    """A release goes to the endpoint that granted, counted at the servers."""
    with GPUWorkerPoolClient(service_endpoints=names, polling_interval=0.05) as client:
        for _ in range(4):
            before = [each.request_count("/v1/leases/release") for each in fleet]
            assignment = client.request_gpu(20)
            client.release_gpu(assignment)
            released = [each.request_count("/v1/leases/release") - was for each, was in zip(fleet, before, strict=True)]
            assert released == [int(assignment.endpoint_id == f"server{number}") for number in (1, 2, 3)]


def test_displays_show_the_source_endpoint(pool, names, monkeypatch, capsys):
    gpu = pool.acquire(timeout=20, endpoint="server3")
    assert "server3:" in repr(gpu)
    assert "server3:" in str(pool.explain(local=False))
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", ",".join(names))
    assert main(["status"]) == 0
    assert "server2" in capsys.readouterr().out


# --- HTTP client pool ---------------------------------------------------------------------------------------


def test_manages_multiple_http_clients(make_pool):
    """One, with its own connection, for each endpoint."""
    with Server(answer(summary())) as one, Server(answer(summary(1))) as other:
        pool = make_pool([one.url, other.url])
        pool.open(wait=True)
        eventually(lambda: min(len(one.requests), len(other.requests)) >= 10, 30)
        assert (one.connections, other.connections) == (1, 1)


def test_implements_per_endpoint_circuit_breakers(pool, fleet):
    fleet[0].fail(500)
    eventually(lambda: state(pool, "server1").breaker == "open", 30)
    assert [state(pool, name).breaker for name in ("server2", "server3")] == ["closed", "closed"]


@pytest.mark.parametrize("retries", [2, 1])
def test_implements_per_endpoint_retry_logic(retries):
    """What failed before an answer began is repeated within the same exchange, as often as allowed."""
    with Server(reset_after_request(), reset_after_request(), answer(b"{}")) as server:
        transport = Transport(Endpoint(server.url), max_retries=retries)
        with contextlib.closing(transport):
            if retries == 2:
                assert transport.get("/", Deadline.after(20)).status == 200
            else:
                with pytest.raises(EndpointUnavailable):
                    transport.get("/", Deadline.after(20))
        assert server.connections == retries + 1


def test_aggregates_responses_from_multiple_endpoints(pool):
    status = pool.status()
    assert (status.total_gpus, status.available_gpus) == (8, 8)
    assert status.total_gpus == sum(each.total_gpus for each in status.endpoints) == len(status.gpus)


def test_handles_partial_failures_gracefully(pool, fleet):
    """Some endpoints fail while others succeed: the totals are theirs, and so are the grants."""
    fleet[0].hang()
    fleet[1].error_body()
    eventually(lambda: pool.status().healthy_endpoints == 1, 40)
    assert pool.status().total_gpus == 2
    assert [pool.acquire(timeout=20).endpoint_id for _ in range(2)] == ["server3"] * 2


# --- monitor and performance --------------------------------------------------------------------------------


def test_polls_multiple_endpoints_concurrently(make_pool):
    """Three servers that answer only when all of them have been asked: one after the other would never end."""
    together = threading.Barrier(3)

    def script(connection):
        connection.request()
        together.wait(30)
        connection.send(head(length=len(summary())) + summary())
        while True:
            connection.request()
            connection.send(head(length=len(summary())) + summary())

    with Server(script) as one, Server(script) as two, Server(script) as three:
        pool = make_pool([one.url, two.url, three.url], endpoint_timeout=40.0)
        pool.open(wait=True)
        assert pool.refresh(40)
        assert pool.status().healthy_endpoints == 3


def test_unavailable_endpoints_leave_the_totals_but_stay_in_the_health_list(pool, fleet):
    fleet[0].kill()
    eventually(lambda: pool.status().healthy_endpoints == 2, 30)
    status = pool.status()
    assert (status.total_endpoints, status.total_gpus) == (3, 4)
    assert [(each.endpoint_id, each.is_healthy, each.total_gpus) for each in status.endpoints] == [
        ("server1", False, 4),
        ("server2", True, 2),
        ("server3", True, 2),
    ]


def test_maintains_per_endpoint_health_status_and_connectivity(names, fleet):
    with GPUWorkerPoolClient(service_endpoints=names, polling_interval=0.05) as client:
        client.pool.refresh(30)
        fleet[2].kill()
        eventually(lambda: client.get_pool_status().healthy_endpoints == 2, 30)
        details = client.get_detailed_metrics()["endpoints"]["details"]
        assert [details[name]["connectivity_status"] == "healthy" for name in sorted(details)] == [True, True, False]


def test_1000_acquires_cause_no_extra_health_request(make_pool):
    """Whether an endpoint is well is known from the polls."""
    with Server(answer(summary())) as server:
        pool = make_pool(server.url, poll_interval=600.0, health_check_interval=600.0)
        pool.open(wait=True)
        for _ in range(1000):
            pool.acquire(timeout=0, max_holders=1000)
        assert [each.path for each in server.requests] == ["/gpu/summary"]


def test_100_concurrent_refreshes_cause_at_most_two_polls(make_pool):
    asked, go_on = [], threading.Event()

    def script(connection):
        while True:
            asked.append(connection.request().path)
            if len(asked) > 1:
                while not go_on.is_set():
                    connection.pause(0.01)
            connection.send(head(length=len(summary())) + summary())

    with Server(script) as server:
        pool = make_pool(server.url, poll_interval=600.0, health_check_interval=600.0, endpoint_timeout=50.0)
        pool.open(wait=True)
        (entry,) = pool._state.engine.monitor._entries.values()

        def refresh(number):
            if number == 0:
                eventually(lambda: len(entry.round) + len(entry.next_round) == 99, 40)
                go_on.set()
                return True
            return pool.refresh(50)

        assert run_threads(100, refresh, timeout=50) == [True] * 100
        assert len(asked) - 1 <= 2


@pytest.mark.real
def test_50_leases_renew_in_one_request():
    with FakeFleet([50]) as fleet:
        (server,) = fleet
        with GPUPool(server.url, poll_interval=60.0, health_check_interval=60.0, ttl=9.0) as pool:
            held = [pool.acquire(timeout=30) for _ in range(50)]
            first = server.request_count("/v1/leases/renew")
            until = [gpu._tie.grant.good_until() for gpu in held]
            eventually(lambda: all(gpu._tie.grant.good_until() > was for gpu, was in zip(held, until, strict=True)), 40)
            # One; another one may have begun meanwhile.
            assert 1 <= server.request_count("/v1/leases/renew") - first <= 2
