"""Metrics: of pools in a registry, and of a server at /metrics; read by the library's own parser."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gpupool_sync import AcquireTimeout, ConfigError, Endpoint, GPUPool
from gpupool_sync.devices.simulated import SimulatedReader, parse_cards
from gpupool_sync.prometheus import PoolCollector
from gpupool_sync.server.metrics import Metrics
from gpupool_sync.server.sampler import Sampler
from gpupool_sync.testing import FakeFleet
from helpers import eventually
from lease_server import api_now, server_of_leases
from test_counting import rows
from test_leases_contract import Clock, claim, granted
from test_server import ask, running

ROOT = Path(__file__).resolve().parent.parent


def parse(text):
    """Samples by name: pairs of labels and value; what Prometheus would refuse fails the test."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram", "summary")
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found, name, /, **labels):
    """The one sample of the name that has (at least) the labels."""
    (only,) = [number for mine, number in found[name] if labels.items() <= mine.items()]
    return only


def scrape(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return parse(generate_latest(registry).decode())


def get(url, path="/metrics", method="GET", **headers):
    request = urllib.request.Request(url + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.headers, exc.read().decode()


@pytest.fixture(scope="module")
def running_fleet():
    with FakeFleet([2, 1], names=["alpha", "beta"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(running_fleet):
    for server in running_fleet:
        server.heal()
    return running_fleet


@pytest.fixture
def pool(fleet):
    with make_pool(fleet) as pool:
        pool.open(wait=True)
        yield pool


def make_pool(fleet, **options):
    defaults = {
        "poll_interval": 0.05,
        "health_check_interval": 0.2,
        "endpoint_timeout": 5.0,
        "breaker_failures": 2,
        "name": "mine",
    }
    return GPUPool([Endpoint(each.url, name=each.name) for each in fleet], **{**defaults, **options})


@pytest.fixture
def sampler():
    sampler = Sampler(SimulatedReader(parse_cards("1xA100"), name="metrics"), interval=3600.0)
    sampler.start()
    assert sampler.wait_for_first(10.0)
    yield sampler
    sampler.stop()


@pytest.fixture
def clock():
    return Clock()


# -- a pool ----------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_pool_in_a_registry(pool):
    """Counters, histograms, endpoints and cards of a pool, as Prometheus reads them."""
    held = pool.acquire(timeout=20, endpoint="alpha")
    pool.acquire(timeout=20, endpoint="beta").release()
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0, count=2)
    # The server shows the load of its leases at its next look.
    eventually(lambda: value(scrape(PoolCollector(pool)), "gpupool_gpu_utilization_ratio", gpu=held.global_gpu_id) > 0)
    found = scrape(PoolCollector(pool))

    assert value(found, "gpupool_requests_total", pool="mine") == 3
    assert value(found, "gpupool_grants_total") == 2
    assert value(found, "gpupool_releases_total") == 1
    assert value(found, "gpupool_timeouts_total") == 1
    assert value(found, "gpupool_held") == 1
    assert value(found, "gpupool_wait_seconds_count") == value(found, "gpupool_wait_seconds_bucket", le="+Inf") == 2
    assert value(found, "gpupool_hold_seconds_count") == 1
    assert value(found, "gpupool_poll_seconds_sum") > 0
    assert value(found, "gpupool_effectiveness_ratio") == 1.0  # each request named its endpoint
    for name in ("alpha", "beta"):
        assert value(found, "gpupool_endpoint_up", endpoint=name) == 1
        assert value(found, "gpupool_endpoint_breaker_state", endpoint=name, state="closed") == 1
        assert value(found, "gpupool_endpoint_breaker_state", endpoint=name, state="open") == 0
        assert value(found, "gpupool_endpoint_grants_total", endpoint=name) == 1
        assert value(found, "gpupool_endpoint_ideal_grants_total", endpoint=name) == 1
        assert value(found, "gpupool_endpoint_polls_total", endpoint=name, result="success") >= 1
        assert 0 < value(found, "gpupool_endpoint_response_seconds", endpoint=name, quantile="0.95") < 20
        assert value(found, "gpupool_endpoint_response_seconds_count", endpoint=name) >= 1
        assert 0 <= value(found, "gpupool_endpoint_sample_age_seconds", endpoint=name) < 20
    assert len(found["gpupool_gpu_info"]) == 3
    assert value(found, "gpupool_gpu_info", gpu=held.global_gpu_id, uuid=held.uuid, name=held.name) == 1
    assert value(found, "gpupool_gpu_held", gpu=held.global_gpu_id, endpoint="alpha") == 1
    assert value(found, "gpupool_gpu_memory_bytes", gpu=held.global_gpu_id) == 24 * 2**30
    assert sum(number for _, number in found["gpupool_gpu_held"]) == 1
    assert 0 < value(found, "gpupool_gpu_utilization_ratio", gpu=held.global_gpu_id) <= 1


@pytest.mark.real
def test_popping_does_not_disturb_a_scrape(pool):
    """Counters only grow, whoever else looks at the pool's statistics."""
    collector = PoolCollector(pool)
    before = scrape(collector)
    for _ in range(3):
        pool.acquire(timeout=20).release()
        pool.pop_stats()
    after = scrape(collector)
    assert value(after, "gpupool_grants_total") == value(after, "gpupool_wait_seconds_count") == 3
    for name, samples in before.items():
        if name.endswith(("_total", "_sum", "_count", "_bucket")):
            for labels, number in samples:
                assert value(after, name, **labels) >= number


@pytest.mark.real
def test_a_scrape_waits_for_nobody(pool, fleet):
    """While every server hangs, a scrape is answered, without a request to any of them, and their cards leave."""
    collector = PoolCollector(pool)
    for server in fleet:
        server.freeze()
    # The readings are there; nothing more comes.
    assert len(scrape(collector)["gpupool_gpu_info"]) == 3
    eventually(lambda: value(scrape(collector), "gpupool_endpoint_up", endpoint="beta") == 0, timeout=30)
    eventually(lambda: "gpupool_gpu_info" not in scrape(collector), timeout=30)
    assert value(scrape(collector), "gpupool_endpoint_polls_total", endpoint="beta", result="failure") >= 1


@pytest.mark.real
def test_an_outage_shows(pool, fleet):
    """Down: breaker open, not up, no cards; its watched seconds grow and its healthy ones do not."""
    collector = PoolCollector(pool)
    fleet[1].kill()
    eventually(
        lambda: value(scrape(collector), "gpupool_endpoint_breaker_state", endpoint="beta", state="closed") == 0,
        timeout=30,
    )
    found = scrape(collector)
    assert value(found, "gpupool_endpoint_up", endpoint="beta") == 0
    assert value(found, "gpupool_endpoint_up", endpoint="alpha") == 1
    assert value(found, "gpupool_endpoint_breaker_changes_total", endpoint="beta") >= 1
    assert {labels["endpoint"] for labels, _ in found["gpupool_gpu_info"]} == {"alpha"}
    healthy, watched = (
        value(found, f"gpupool_endpoint_{name}_seconds_total", endpoint="beta") for name in ("healthy", "watched")
    )
    eventually(
        lambda: value(scrape(collector), "gpupool_endpoint_watched_seconds_total", endpoint="beta") > watched + 0.01
    )
    assert value(scrape(collector), "gpupool_endpoint_healthy_seconds_total", endpoint="beta") == healthy


def test_a_pool_that_is_not_open():
    """Registering and scraping open nothing and start no thread; what there is nothing of is left out."""
    threads = threading.active_count()
    pool = GPUPool("http://127.0.0.1:9")
    found = scrape(PoolCollector(pool))
    assert value(found, "gpupool_requests_total", pool="") == 0
    assert not any(name.startswith(("gpupool_endpoint", "gpupool_gpu", "gpupool_poll")) for name in found)
    assert pool._state.engine is None
    assert threading.active_count() == threads


def test_several_pools_have_names():
    """Each is told apart by its name, so two must not have the same."""
    one, two = GPUPool("http://127.0.0.1:9", name="one"), GPUPool("http://127.0.0.1:9", name="two")
    found = scrape(PoolCollector(one, two))
    assert [labels["pool"] for labels, _ in found["gpupool_requests_total"]] == ["one", "two"]
    with pytest.raises(ConfigError, match="name="):
        PoolCollector(one, two, one)
    # A registry says so itself when a second collector has the same metrics.
    registry = CollectorRegistry()
    registry.register(PoolCollector(one))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(PoolCollector(two))


def test_a_registry_keeps_no_pool_alive():
    """One that is forgotten, as in a notebook, ends, and its series with it."""
    pool = GPUPool("http://127.0.0.1:9")
    collector = PoolCollector(pool)
    del pool
    gc.collect()
    assert scrape(collector) == {}


def test_without_the_extra_there_is_a_pip_line():
    """The error says what to install; it is an ImportError, as every missing module."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from gpupool_sync.errors import MissingExtra\n"
        "try:\n    import gpupool_sync.prometheus\n"
        "except MissingExtra as exc:\n    print(isinstance(exc, ImportError), exc)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip() == "True prometheus_client is not installed: pip install 'gpupool-sync[metrics]'"


# -- a server --------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_metrics_of_a_real_server():
    """Cards, leases, tickets and requests of ``gpupool-sync serve``; no holder is named."""
    with (
        running("--simulate", "2xA100", "--interval", "0.1") as (_, url, _line),
        GPUPool(url, name="Zaphod", poll_interval=0.1) as pool,
    ):
        held = pool.acquire(timeout=20, note="secret plans")
        other = pool.acquire(timeout=20)
        third = threading.Thread(target=lambda: pool.acquire(timeout=60), daemon=True)
        third.start()
        eventually(lambda: value(parse(get(url)[2]), "gpupool_server_tickets") == 1)
        status, headers, text = get(url)
        found = parse(text)
        other.release()
        third.join(20)
        eventually(lambda: value(parse(get(url)[2]), "gpupool_server_tickets") == 0)
        assert value(parse(get(url)[2]), "gpupool_server_grants_total") == 3
        assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert value(found, "gpupool_server_leases") == 2
        assert value(found, "gpupool_server_grants_total") == 2
        assert value(found, "gpupool_server_gpus") == 2
        assert [number for _, number in found["gpupool_server_gpu_leased"]] == [1, 1]
        assert value(found, "gpupool_server_gpu_memory_bytes", gpu="0") == 81920 * 2**20
        assert value(found, "gpupool_server_gpu_info", gpu=str(held.local_gpu_id), uuid=held.uuid) == 1
        assert value(found, "gpupool_server_http_requests_total", path="/gpu/summary", status="200") >= 1
        assert value(found, "gpupool_server_http_requests_total", path="/v1/leases", status="200") >= 2
        assert 0 <= value(found, "gpupool_server_sample_age_seconds") < 30
        assert value(found, "process_open_fds") > 3
        for secret in ("Zaphod", "secret", pool._state.holder.user + "@", pool._state.holder.id, held._tie.grant.id):
            assert secret not in text
        # What Prometheus asks for since 2.5.
        status, headers, text = get(url, Accept="application/openmetrics-text; version=1.0.0")
        assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert "gpupool_server_leases" in {family.name for family in parse_openmetrics(text)}
        assert get(url, method="HEAD")[2] == ""
        status, headers, text = get(url, method="POST")
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert "/metrics" in json.loads(get(url, "/")[2])["endpoints"]
        assert get(url, "/nobody/knows/this")[0] == get(url, "/nor/this")[0] == 404
        found = parse(get(url)[2])
        assert value(found, "gpupool_server_http_requests_total", path="other", status="404") == 2
        assert value(found, "gpupool_server_http_requests_total", path="/metrics", status="405") == 1


@pytest.mark.real
def test_metrics_of_a_server_without_leases():
    """They have no leases to tell of, rather than none."""
    with running("--simulate", "1", "--no-leases") as (_, url, _line):
        found = parse(get(url)[2])
    assert value(found, "gpupool_server_gpus") == 1
    assert not any("lease" in name or "tickets" in name or "grants" in name for name in found)


def test_what_becomes_of_leases_is_counted(tmp_path, clock, sampler):
    """Grants, renewals, releases, expiries and revocations, each once."""
    uuid = sampler.published.sample.gpus[0].uuid
    with server_of_leases(tmp_path / "locks", clock=clock):
        granter = api_now().granter
        metrics = Metrics(sampler, api_now())

        def now(name, **labels):
            return value(parse(metrics.render()[0].decode()), f"gpupool_server_{name}", **labels)

        assert now("gpu_leased", gpu="0") == 0
        for how in ("release", "expire", "revoke"):
            wish = claim(uuid, ttl=60.0)
            outcome, _ = granter.claim(wish)
            assert granted(outcome)
            assert (now("leases"), now("gpu_leased", gpu="0")) == (1, 1)
            if how == "release":
                granter.claim(wish)  # repeated: no second grant
                granter.renew([wish.id, "0" * 32])
                granter.release([wish.id, "0" * 32])
            elif how == "expire":
                clock.advance(61)
                granter.expire()
                assert now("leases") == 0
                clock.advance(61)  # the card was closed for a minute
            else:
                assert granter.revoke(uuid, outcome.lease.token, "me")
                assert not granter.revoke(uuid, outcome.lease.token + 1, "me")
        counted = [now(f"{name}_total") for name in ("grants", "renewals", "releases", "expiries", "revocations")]
        assert counted == [3, 1, 1, 1, 1]
        assert now("leases") == 1  # revoked, and not yet let go of


def test_without_the_library_the_server_says_what_is_missing(sampler, monkeypatch):
    """Readings and leases go on; only this path has a pip line to tell."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "gpupool_sync.prometheus")
    for name in [name for name in sys.modules if name.startswith("prometheus_client.")]:
        monkeypatch.delitem(sys.modules, name)
    from gpupool_sync.server.run import make_front

    status, _, body = ask(make_front(sampler, {}), "GET", "/metrics")
    assert status == 501
    assert "pip install 'gpupool-sync[metrics]'" in json.loads(body)["error"]["message"]


# -- the documentation -----------------------------------------------------------------------------------------


def names(families):
    return sorted(family.name + ("_total" if family.type == "counter" else "") for family in families)


@pytest.mark.checkout
def test_the_documentation_names_every_metric(tmp_path, clock, sampler):
    """docs/statistics.md has a row for each metric of a pool and of a server, and no other."""
    pools, servers = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8").split("## Metrics of a server")

    assert sorted(rows(pools, "metric")) == names(PoolCollector().describe())
    with server_of_leases(tmp_path / "locks", clock=clock):
        assert sorted(rows(servers, "metric")) == names(Metrics(sampler, api_now()).collect())
