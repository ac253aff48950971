"""Configuration: of one endpoint, of many, by the environment, by arguments, and by a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gpupool_sync
from gpupool_sync import ConfigError, Endpoint, GPUPool, GPUWorkerPoolClient, config
from helpers import environment_after, resolve_to
from predecessor_server import PredecessorFleet

SHELL = """\
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
CONSTRUCTOR = """\
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


@pytest.fixture
def gpu_servers(monkeypatch):
    """The hosts that the snippets name."""
    with PredecessorFleet([2, 1, 1]) as fleet:
        resolve_to(monkeypatch, {f"gpu-server{number}": url for number, url in enumerate(fleet.urls, 1)})
        yield fleet


def urls(pool):
    return [each.url for each in pool._state.settings.endpoints]


@pytest.mark.filterwarnings("ignore::gpupool_sync.errors.ExclusivityWarning")
def test_the_shell_snippet_runs_verbatim(gpu_servers, monkeypatch):
    for name, value in environment_after(SHELL).items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="GPU_SERVICE_ENDPOINT is ignored"):
        client = GPUWorkerPoolClient()
    with client:
        client.pool.refresh(30)
        assert client.get_pool_status().total_gpus == 4
        assert client.request_gpu(20).endpoint_id == "gpu-server1-8000"


@pytest.mark.filterwarnings("ignore::gpupool_sync.errors.ExclusivityWarning")
def test_the_constructor_snippet_runs_verbatim(gpu_servers):
    names = {"GPUWorkerPoolClient": GPUWorkerPoolClient}
    exec(CONSTRUCTOR, names)
    settings = names["client"].pool._state.settings
    assert (settings.endpoint_timeout, settings.health_check_interval, settings.strategy) == (
        10.0,
        30.0,
        "availability",
    )
    with names["client"] as client:
        client.pool.refresh(30)
        assert client.get_pool_status().healthy_endpoints == 3
        assert client.request_gpu(20).endpoint_id == "gpu-server1-8000"


def test_extends_configuration_to_handle_multiple_endpoints():
    assert urls(GPUPool(["http://a", "http://b:8000"])) == ["http://a", "http://b:8000"]
    assert urls(GPUPool("http://a, http://b:8000,")) == ["http://a", "http://b:8000"]
    assert urls(GPUPool([Endpoint("http://a", name="one"), "two=http://b"])) == ["http://a", "http://b"]


def test_supports_both_single_endpoint_and_multiple_endpoints(monkeypatch):
    assert urls(GPUWorkerPoolClient("http://a").pool) == ["http://a"]
    assert urls(GPUWorkerPoolClient(service_endpoints=["http://a", "http://b"]).pool) == ["http://a", "http://b"]
    monkeypatch.setenv("GPU_SERVICE_ENDPOINT", "http://c")
    assert urls(GPUPool()) == ["http://c"]


def test_parses_comma_separated_endpoint_urls_from_environment_variables(monkeypatch):
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", " http://a ,,name=http://b:8000/,")
    assert [(each.id, each.url) for each in GPUPool()._state.settings.endpoints] == [
        ("a", "http://a"),
        ("name", "http://b:8000"),
    ]


def test_validates_endpoint_urls_and_removes_duplicates():
    assert urls(GPUPool("http://a,HTTP://A/,http://a:80")) == ["http://a"]
    for wrong in ("a:8000", "ftp://a", "http://", "http://a:99999", "http://a/?x=1", "http://a/#x", "http://a b"):
        with pytest.raises(ConfigError, match="endpoints"):
            GPUPool([wrong])
    with pytest.raises(ConfigError, match="same"):
        GPUPool(["one=http://a", "one=http://b"])


@pytest.mark.parametrize(
    ("variable", "text", "setting", "value"),
    [
        ("GPU_SERVICE_ENDPOINTS", "http://a,http://b", "endpoints", ["http://a", "http://b"]),
        ("GPU_SERVICE_ENDPOINT", "http://a", "endpoints", ["http://a"]),
        ("GPU_STATS_SERVICE_ENDPOINTS", "http://a,http://b", "endpoints", ["http://a", "http://b"]),
        ("GPU_LOAD_BALANCING_STRATEGY", "round_robin", "strategy", "round_robin"),
        ("GPU_LOAD_BALANCING_STRATEGY", "weighted", "strategy", "weighted"),
        ("GPU_ENDPOINT_HEALTH_CHECK_INTERVAL", "45", "health_check_interval", 45.0),
        ("GPU_ENDPOINT_TIMEOUT", "2.5", "endpoint_timeout", 2.5),
        ("GPU_ENDPOINT_MAX_RETRIES", "7", "endpoint_max_retries", 7),
        ("GPU_MEMORY_THRESHOLD_PERCENT", "70", "memory_threshold", 70.0),
        ("GPU_UTILIZATION_THRESHOLD_PERCENT", "60", "utilization_threshold", 60.0),
        ("GPU_POLLING_INTERVAL", "3", "poll_interval", 3.0),
    ],
)
def test_every_environment_variable_sets_what_it_says(variable, text, setting, value, monkeypatch):
    monkeypatch.setenv(variable, text)
    settings = GPUPool()._state.settings
    found = [each.url for each in settings.endpoints] if setting == "endpoints" else getattr(settings, setting)
    assert found == value
    if setting != "endpoints" and setting != "strategy":
        monkeypatch.setenv(variable, "nonsense")
        with pytest.raises(ConfigError, match=variable):
            GPUPool()


def test_defaults_are_those_of_the_specification():
    settings = GPUPool()._state.settings
    assert settings.strategy == "availability"
    assert (settings.health_check_interval, settings.endpoint_timeout, settings.endpoint_max_retries) == (30.0, 10.0, 3)


@pytest.mark.checkout
def test_the_documentation_of_the_configuration_is_the_table_of_settings():
    """Each setting with its variables and its default stands in docs/configuration.md, and nothing else does."""
    text = (Path(gpupool_sync.__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (`GPU_[^|]*?) \| ([^|]*?) \|", text, re.MULTILINE)
    documented = {name: (re.findall(r"`(\w+)`", variables), default.strip("`")) for name, variables, default in rows}
    settings = {each.name: each for each in config.SETTINGS}
    assert set(documented) == set(settings)
    for name, (variables, default) in documented.items():
        assert variables == list(settings[name].variables)
        told = settings[name].default
        assert default == ("unset" if told in (None, ()) else f"{told:g}" if isinstance(told, float) else str(told)), (
            name
        )
