"""Load balancing: the three strategies, what happens around failures, and how well it works."""

from __future__ import annotations

from collections import Counter

import pytest

from gpupool_sync import acquiring
from gpupool_sync.clock import boottime
from gpupool_sync.models import EndpointView, GPURequest
from gpupool_sync.strategies import make_strategy
from helpers import eventually

REQUEST = GPURequest()


def views(**free_of_total):
    return [EndpointView(name, total_gpus=total, free_gpus=free) for name, (free, total) in free_of_total.items()]


def first_choices(strategy, endpoints, number):
    found = Counter()
    for _ in range(number):
        first = strategy.order(endpoints, REQUEST)[0].endpoint_id
        strategy.feedback(first, True)
        found[first] += 1
    return found


def grants(pool, number):
    found = Counter()
    for _ in range(number):
        with pool.gpu(timeout=30) as gpu:
            found[gpu.endpoint_id] += 1
    return found


# --- availability (default) ---------------------------------------------------------------------------------


def test_availability_based_prefers_endpoints_with_more_available_gpus(pool):
    """All of all are free; server1 has four cards and the others two each."""
    assert pool._state.settings.strategy == "availability"
    assert pool.acquire(timeout=20).endpoint_id == "server1"


def test_availability_prioritizes_endpoints_with_higher_percentage_of_available_gpus():
    """3 of 4 before 5 of 8; literally and always with ``spread=False``, also amid a crowd."""
    endpoints = views(large=(5, 8), small=(3, 4))
    assert first_choices(make_strategy("availability"), endpoints, 50) == {"small": 50}
    literal = make_strategy("availability", {"spread": False})
    for _ in range(20):
        literal.feedback("small", False)
    assert first_choices(literal, endpoints, 50) == {"small": 50}


def test_availability_considers_both_absolute_count_and_percentage():
    """Among (nearly) equal percentages the larger number is first."""
    assert first_choices(make_strategy("availability"), views(few=(2, 4), many=(4, 8)), 50) == {"many": 50}


def test_availability_automatically_adapts_to_changing_resource_availability(pool, fleet):
    for index in range(4):
        fleet[0].busy(index, 95.0)
    eventually(lambda: pool.status().endpoints[0].available_gpus == 0, 30)
    assert set(grants(pool, 10)) <= {"server2", "server3"}
    fleet[0].heal()
    eventually(lambda: pool.status().endpoints[0].available_gpus == 4, 30)
    held = [pool.acquire(timeout=20) for _ in range(4)]
    assert "server1" in {gpu.endpoint_id for gpu in held}


# --- round robin --------------------------------------------------------------------------------------------


def test_round_robin_distributes_evenly_when_availability_is_equal():
    found = first_choices(make_strategy("round_robin"), views(a=(2, 4), b=(2, 4), c=(2, 4)), 300)
    assert found == {"a": 100, "b": 100, "c": 100}


def test_round_robin_distributes_requests_evenly_across_all_healthy_endpoints(make_pool, names, fleet):
    """Also where their sizes differ: they are servers with four cards and two."""
    pool = make_pool(names, strategy="round_robin")
    pool.open()
    pool.refresh(30)
    assert grants(pool, 30) == {"server1": 10, "server2": 10, "server3": 10}
    fleet[0].kill()
    eventually(lambda: pool.status().endpoints[0].breaker == "open", 30)
    assert grants(pool, 20) == {"server2": 10, "server3": 10}


def test_round_robin_is_a_simple_and_predictable_distribution_pattern():
    """No endpoint has its second turn before each has had its first."""
    strategy = make_strategy("round_robin")
    endpoints = views(a=(1, 1), b=(1, 1), c=(1, 1))
    chosen = [strategy.order(endpoints, REQUEST)[0].endpoint_id for _ in range(9)]
    assert chosen[:3] == chosen[3:6] == chosen[6:]
    assert len(set(chosen[:3])) == 3


# --- weighted -----------------------------------------------------------------------------------------------


def test_weighted_considers_total_gpu_capacity_of_each_endpoint(make_pool, names):
    pool = make_pool(names, strategy="weighted")
    pool.open()
    pool.refresh(30)
    assert grants(pool, 40) == {"server1": 20, "server2": 10, "server3": 10}


def test_weighted_gives_endpoints_with_more_total_gpus_proportionally_more_requests():
    found = first_choices(make_strategy("weighted"), views(a=(1, 1), b=(3, 3), c=(6, 6)), 1000)
    assert found == {"a": 100, "b": 300, "c": 600}


# --- failures and recoveries --------------------------------------------------------------------------------


def test_adapts_to_endpoint_failures_and_recoveries(make_pool, names, fleet, monkeypatch):
    """Its load goes to the others when an endpoint fails, and is gradually given back when it recovers."""
    pool = make_pool(names, strategy="round_robin", health_check_interval=1000.0, max_stats_age=5000.0)
    pool.open()
    pool.refresh(30)
    fleet[0].fail(500)
    polled = pool._state.engine.endpoints["server1"]
    eventually(lambda: polled.open, 30)
    assert grants(pool, 20) == {"server2": 10, "server3": 10}
    fleet[0].heal()
    pool.refresh(30)
    assert not polled.open
    # Which decisions it takes part in is drawn; here every draw comes up equally often.
    draws = iter([(7 * n % 20 + 0.5) / 20 for n in range(100_000)])
    monkeypatch.setattr(acquiring, "_random", lambda: next(draws))
    shares = []
    for since in (0.0, 500.0, 1000.0):
        polled._recovered_at = boottime() - since
        shares.append(grants(pool, 60)["server1"])
    assert 1 <= shares[0] < shares[1] < shares[2]
    assert shares[2] == pytest.approx(20, abs=2)


# --- how well it works --------------------------------------------------------------------------------------


def test_provides_load_balancing_metrics_and_statistics(make_pool, names):
    """Decisions and the share of each endpoint."""
    pool = make_pool(names, strategy="weighted")
    pool.open()
    pool.refresh(30)
    grants(pool, 20)
    stats = pool.stats()
    assert stats["grants_by_endpoint"] == {"server1": 10, "server2": 5, "server3": 5}
    assert stats["shares"] == {"server1": 0.5, "server2": 0.25, "server3": 0.25}
    assert {name: each["decisions"] for name, each in stats["strategy"]["endpoints"].items()} == {
        "server1": 10,
        "server2": 5,
        "server3": 5,
    }


@pytest.mark.parametrize(
    ("strategy", "ideal"),
    [
        ("availability", {"server1": 0.5, "server2": 0.25, "server3": 0.25}),
        ("round_robin", {"server1": 1 / 3, "server2": 1 / 3, "server3": 1 / 3}),
        ("weighted", {"server1": 0.5, "server2": 0.25, "server3": 0.25}),
    ],
)
def test_effectiveness_is_one_minus_half_the_sum_of_the_differences_to_the_ideal_of_the_strategy(
    make_pool, names, strategy, ideal
):
    """The formula, computed here from the grants; all grants at one endpoint are far from any ideal."""
    pool = make_pool(names, strategy=strategy)
    pool.open()
    pool.refresh(30)
    found = grants(pool, 12)
    stats = pool.stats()
    assert stats["ideal_shares"] == pytest.approx(ideal, abs=0.1)
    share = {name: found[name] / 12 for name in ideal}
    told = stats["ideal_shares"]
    assert stats["effectiveness"] == pytest.approx(1 - 0.5 * sum(abs(share[name] - told[name]) for name in ideal))
    if strategy == "availability":
        assert stats["effectiveness"] < 0.75  # a lone user always gets the best one
    else:
        assert stats["effectiveness"] > 0.99
