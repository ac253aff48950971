"""Monitoring and observability: what is told, where, and what a growing number means."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from pathlib import Path

import pytest

import gpupool_sync
from gpupool_sync import GPUWorkerPoolClient
from helpers import eventually


@pytest.fixture
def used(pool):
    """A pool of three endpoints that has granted four GPUs in a row, and holds none."""
    for _ in range(4):
        with pool.gpu(timeout=20):
            pass
    return pool


def test_per_endpoint_metrics_are_success_rates_response_times_and_availability(used, fleet):
    fleet[1].fail(500)
    eventually(lambda: used.stats()["endpoints"]["server2"]["failures"] >= 2, 30)
    told = used.stats()["endpoints"]
    well, failing = told["server1"], told["server2"]
    assert (well["success_rate"], well["availability"]) == (1.0, 1.0)
    assert failing["success_rate"] == failing["successes"] / (failing["successes"] + failing["failures"])
    assert 0 < failing["availability"] == failing["healthy_seconds"] / failing["watched_seconds"] < 1
    assert 0 < well["response_p50_ms"] <= well["response_p95_ms"]
    assert well["response_time_ms"] > 0
    eventually(lambda: used.stats()["endpoints"]["server2"]["breaker"] != "closed", 30)
    assert used.stats()["endpoints"]["server2"]["breaker_changes"] >= 1


def test_load_balancing_metrics_monitor_distribution_effectiveness(used):
    stats = used.stats()
    assert sum(stats["grants_by_endpoint"].values()) == 4
    assert sum(each["decisions"] for each in stats["strategy"]["endpoints"].values()) == 4
    assert 0 <= stats["effectiveness"] <= 1


def test_health_status_provides_detailed_endpoint_health_information(used, fleet):
    fleet[0].error_body("no driver")
    eventually(lambda: not used.status().endpoints[0].is_healthy, 30)
    told = used.status().endpoints[0]
    assert "no driver" in told.last_error
    assert told.consecutive_failures >= 1
    assert told.last_seen is not None


def test_performance_metrics_track_overall_system_performance(used):
    """Waits and holds, acquisitions per second, oldest snapshot's age, poll durations, threads alive."""
    stats = used.stats()
    for each in ("wait", "hold"):
        assert set(stats[each]) >= {"count", "p50", "p95", "max"}
        assert stats[each]["count"] == 4
    assert stats["grants_per_second"] == pytest.approx(4 / stats["seconds"])
    assert stats["oldest_age"] >= 0
    assert stats["poll"]["count"] >= 3
    assert stats["poll"]["p95"] >= stats["poll"]["p50"] > 0
    alive = {each.name for each in threading.enumerate() if each.name.startswith("gpupool-")}
    assert 1 <= stats["threads"] <= len(alive)


def test_pop_stats_begins_anew(used):
    assert used.pop_stats()["grants"] == 4
    assert used.stats()["grants"] == 0
    assert used.stats()["endpoints"]["server1"]["successes"] <= 5


def test_all_of_it_is_in_get_detailed_metrics(names):
    with GPUWorkerPoolClient(service_endpoints=names, polling_interval=0.05) as client:
        client.release_gpu(client.request_gpu(20))
        metrics = client.get_detailed_metrics()
        assert set(metrics["stats"]) == set(client.pool.stats())
        assert metrics["stats"]["grants"] == 1
        json.dumps(metrics)


def test_all_of_it_is_in_the_prometheus_collector(used):
    from prometheus_client import CollectorRegistry, generate_latest

    from gpupool_sync.prometheus import PoolCollector

    registry = CollectorRegistry()
    registry.register(PoolCollector(used))
    text = generate_latest(registry).decode()
    found = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    wanted = """grants_total wait_seconds_bucket hold_seconds_bucket poll_seconds_bucket threads effectiveness_ratio
        oldest_sample_age_seconds endpoint_up endpoint_polls_total endpoint_healthy_seconds_total
        endpoint_watched_seconds_total endpoint_response_seconds endpoint_breaker_state
        endpoint_breaker_changes_total endpoint_grants_total"""
    assert {f"gpupool_{name}" for name in wanted.split()} <= found
    assert re.search(r'gpupool_endpoint_grants_total\{endpoint="server1",pool="[^"]*"\} 4\.0', text)


def test_the_server_has_metrics_too(fleet):
    with urllib.request.urlopen(f"{fleet.urls[0]}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    assert "gpupool_server_gpus 4.0" in text
    assert "gpupool_server_grants_total" in text


@pytest.mark.checkout
def test_a_table_in_the_documentation_says_what_a_growing_number_means(used):
    text = (Path(gpupool_sync.__file__).parent.parent / "docs" / "statistics.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    stats = used.stats()
    assert set(stats) <= rows
    assert set(stats["endpoints"]["server1"]) <= rows
    assert "when it grows" in text
