"""Pools as Prometheus sees them.

>>> from prometheus_client import REGISTRY
>>> from gpupool_sync.prometheus import PoolCollector
>>> REGISTRY.register(PoolCollector(pool))  # doctest: +SKIP

A scrape reads what the pool knows already: it opens nothing, asks no server, and waits for nobody.  Needs the optional
extra: ``pip install 'gpupool-sync[metrics]'``.  ``docs/statistics.md`` says what each metric means.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpupool_sync import reporting
from gpupool_sync.clock import boottime
from gpupool_sync.errors import ConfigError, MissingExtra

try:
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
        SummaryMetricFamily,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as exc:
    raise MissingExtra("prometheus_client is not installed: pip install 'gpupool-sync[metrics]'") from exc

if TYPE_CHECKING:
    from gpupool_sync.models import GPUReading
    from gpupool_sync.pool import GPUPool

__all__ = ["PoolCollector"]

#: Kind, name without the prefix, labels, help.
Spec = tuple[type[Metric], str, Sequence[str], str]

_BREAKER_STATES = ("closed", "open", "half-open")
_POOL = ("pool",)
_ENDPOINT = ("pool", "endpoint")
_GPU = ("pool", "endpoint", "gpu")


def card_specs(labels: Sequence[str]) -> list[Spec]:
    """The metrics of a card; see `Families.add_card`."""
    return [
        (GaugeMetricFamily, "gpu_info", (*labels, "uuid", "name"), "Always 1; the labels say which card it is"),
        (GaugeMetricFamily, "gpu_memory_bytes", labels, "Memory of the card"),
        (GaugeMetricFamily, "gpu_memory_used_bytes", labels, "Memory in use on the card"),
        (GaugeMetricFamily, "gpu_memory_used_ratio", labels, "Share of the card's memory that is in use"),
        (GaugeMetricFamily, "gpu_utilization_ratio", labels, "Share of the time in which the card computed"),
        (GaugeMetricFamily, "gpu_temperature_celsius", labels, "Temperature of the card"),
        (GaugeMetricFamily, "gpu_power_watts", labels, "Power that the card draws"),
    ]


# Those of the first groups are keys of `pool.stats()`, or of its endpoints.
_COUNTERS: list[Spec] = [
    (CounterMetricFamily, "requests", _POOL, "Calls that asked for a GPU"),
    (CounterMetricFamily, "grants", _POOL, "Leases obtained"),
    (CounterMetricFamily, "releases", _POOL, "Leases given back"),
    (CounterMetricFamily, "queued", _POOL, "Grants that had to wait"),
    (CounterMetricFamily, "timeouts", _POOL, "Calls that ended with AcquireTimeout"),
    (CounterMetricFamily, "claims", _POOL, "Requests to an arbiter that led to grants"),
    (CounterMetricFamily, "refused", _POOL, "Claims that somebody else had been faster for"),
    (CounterMetricFamily, "store_errors", _POOL, "Claims that an arbiter could not answer"),
    (CounterMetricFamily, "forgotten", _POOL, "Handles that were dropped without a release"),
]
_GAUGES: list[Spec] = [
    (GaugeMetricFamily, "waiting", _POOL, "Callers that wait for a GPU"),
    (GaugeMetricFamily, "waiting_most", _POOL, "The most callers that ever waited at the same time"),
    (GaugeMetricFamily, "held", _POOL, "Leases held by the pool in its process"),
    (GaugeMetricFamily, "threads", _POOL, "Threads of the pool that are alive"),
]
_ENDPOINT_COUNTERS: list[Spec] = [
    (CounterMetricFamily, "breaker_changes", _ENDPOINT, "Changes of the breaker's state"),
    (CounterMetricFamily, "healthy_seconds", _ENDPOINT, "Seconds in which the endpoint was healthy"),
    (CounterMetricFamily, "watched_seconds", _ENDPOINT, "Seconds since the first poll of the endpoint ended"),
]
_HISTOGRAMS: list[Spec] = [
    (HistogramMetricFamily, "wait", _POOL, "Seconds from the call to the grant"),
    (HistogramMetricFamily, "hold", _POOL, "Seconds from the grant to the release"),
    (HistogramMetricFamily, "poll", _POOL, "Seconds that polls took, failed ones included"),
]
_OTHERS: list[Spec] = [
    (GaugeMetricFamily, "oldest_sample_age_seconds", _POOL, "Age of the oldest sample that the pool has"),
    (
        GaugeMetricFamily,
        "effectiveness_ratio",
        _POOL,
        "1 - 0.5 * sum(|share achieved - ideal share|) over the endpoints, since the beginning",
    ),
    (GaugeMetricFamily, "endpoint_up", _ENDPOINT, "Whether the last poll succeeded"),
    (GaugeMetricFamily, "endpoint_breaker_state", (*_ENDPOINT, "state"), "1 for the state that the breaker is in"),
    (GaugeMetricFamily, "endpoint_sample_age_seconds", _ENDPOINT, "Age of the newest sample"),
    (CounterMetricFamily, "endpoint_polls", (*_ENDPOINT, "result"), "Polls of the endpoint"),
    (SummaryMetricFamily, "endpoint_response_seconds", _ENDPOINT, "Seconds that successful polls took"),
    (CounterMetricFamily, "endpoint_grants", _ENDPOINT, "Leases obtained at the endpoint"),
    (
        CounterMetricFamily,
        "endpoint_ideal_grants",
        _ENDPOINT,
        "Leases that the strategy would ideally have obtained at the endpoint; only their proportion counts",
    ),
    (GaugeMetricFamily, "gpu_held", _GPU, "Whether somebody has a lease on the card, as far as is known"),
]


def _specs() -> Iterator[Spec]:
    yield from (*_COUNTERS, *_GAUGES, *_OTHERS, *card_specs(_GPU))
    for kind, name, labels, text in _ENDPOINT_COUNTERS:
        yield kind, f"endpoint_{name}", labels, text
    for kind, name, labels, text in _HISTOGRAMS:
        yield kind, f"{name}_seconds", labels, text


class Families:
    """Metric families whose names begin with *prefix*; those without a sample are told all the same."""

    def __init__(self, prefix: str, specs: Iterable[Spec]) -> None:
        self._families: dict[str, Any] = {}
        self._labels: dict[str, Sequence[str]] = {}
        for kind, name, labels, text in specs:
            make: Any = kind
            self._families[name] = make(f"{prefix}_{name}", text, labels=labels)
            self._labels[name] = labels

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._families.values())

    def add(self, name: str, labels: Mapping[str, str], *values: Any) -> None:
        """Add a sample; one of None is left out: what is unknown is no number."""
        if None not in values:
            self._families[name].add_metric([labels[label] for label in self._labels[name]], *values)

    def add_quantile(self, name: str, labels: Mapping[str, str], quantile: str, value: float | None) -> None:
        """Add a quantile to a summary, for which the library has no method."""
        family = self._families[name]
        if value is not None:
            family.add_sample(family.name, {**labels, "quantile": quantile}, value)

    def add_card(self, labels: Mapping[str, str], reading: GPUReading) -> None:
        """The reading of a card, in Prometheus' units: bytes, and ratios from 0 to 1."""
        self.add("gpu_info", {**labels, "uuid": reading.uuid or "", "name": reading.name}, 1)
        self.add("gpu_memory_bytes", labels, _times(reading.memory_total_mb, 2.0**20))
        self.add("gpu_memory_used_bytes", labels, _times(reading.memory_used_mb, 2.0**20))
        self.add("gpu_memory_used_ratio", labels, _times(reading.memory_usage_percent, 0.01))
        self.add("gpu_utilization_ratio", labels, _times(reading.utilization_percent, 0.01))
        self.add("gpu_temperature_celsius", labels, reading.temperature_c)
        self.add("gpu_power_watts", labels, reading.power_draw_w)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


class PoolCollector(Collector):
    """
    The statistics of pools as metrics ``gpupool_…``, for a `prometheus_client` registry.

    The label ``pool`` is the pool's name ("" without one).  Counters count since the pool was made, those of endpoints
    since it was opened; `pop_stats` leaves them alone.  Pools that nobody else refers to are not kept alive.

    Args:
        pools: one or more; a registry takes one collector of this kind, so give it all of them.

    Raises:
        ConfigError: two of them have the same name.
    """

    def __init__(self, *pools: GPUPool) -> None:
        names = [_name(pool) for pool in pools]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"{len(pools)} pools named {', '.join(map(repr, names))}: GPUPool(name=) tells them apart"
            )
        self._pools = [weakref.ref(pool) for pool in pools]

    def describe(self) -> Iterable[Metric]:
        """Which metrics there are, without samples."""
        return Families("gpupool", _specs())

    def collect(self) -> Iterable[Metric]:
        """What the pools know now; never waits for the network."""
        families = Families("gpupool", _specs())
        for reference in self._pools:
            pool = reference()
            if pool is not None:
                _add_pool(families, pool)
        return families


def _name(pool: GPUPool) -> str:
    return pool._state.settings.name or ""


def _add_pool(families: Families, pool: GPUPool) -> None:
    stats = reporting.stats(pool._state, all_time=True)
    labels = {"pool": _name(pool)}
    for _, name, _, _ in (*_COUNTERS, *_GAUGES):
        families.add(name, labels, stats[name])
    for _, name, _, _ in _HISTOGRAMS:
        histogram = stats[name]
        if "buckets" in histogram:  # a pool that is not open polls nobody
            families.add(f"{name}_seconds", labels, list(histogram["buckets"].items()), histogram["sum"])
    families.add("oldest_sample_age_seconds", labels, stats["oldest_age"])
    families.add("effectiveness_ratio", labels, stats["effectiveness"])
    for endpoint_id, numbers in stats["endpoints"].items():
        mine = {**labels, "endpoint": endpoint_id}
        _add_endpoint(families, mine, numbers)
        families.add("endpoint_grants", mine, stats["grants_by_endpoint"].get(endpoint_id, 0))
        families.add("endpoint_ideal_grants", mine, stats["ideal_grants"].get(endpoint_id, 0.0))
    _add_cards(families, labels, pool)


def _add_endpoint(families: Families, labels: Mapping[str, str], numbers: Mapping[str, Any]) -> None:
    families.add("endpoint_up", labels, float(numbers["healthy"]))
    for state in _BREAKER_STATES:
        families.add("endpoint_breaker_state", {**labels, "state": state}, float(numbers["breaker"] == state))
    for _, name, _, _ in _ENDPOINT_COUNTERS:
        families.add(f"endpoint_{name}", labels, numbers[name])
    families.add("endpoint_polls", {**labels, "result": "success"}, numbers["successes"])
    families.add("endpoint_polls", {**labels, "result": "failure"}, numbers["failures"])
    name = "endpoint_response_seconds"
    families.add_quantile(name, labels, "0.5", _times(numbers["response_p50_ms"], 0.001))
    families.add_quantile(name, labels, "0.95", _times(numbers["response_p95_ms"], 0.001))
    families.add(name, labels, numbers["successes"], numbers["response_seconds"])


def _add_cards(families: Families, labels: Mapping[str, str], pool: GPUPool) -> None:
    engine = pool._state.engine
    if engine is None:
        return
    snapshots, _ = pool._state.table.view()
    now = boottime()
    for endpoint in engine.endpoints.values():
        snapshot = snapshots.get(endpoint.id)
        if snapshot is None:
            continue
        mine = {**labels, "endpoint": endpoint.id}
        age = snapshot.age(now)
        families.add("endpoint_sample_age_seconds", mine, age)
        if endpoint.open or age > pool._state.settings.max_stats_age:
            continue  # nobody would grant from it, and a graph must not show it as of now
        store = engine.store_of(endpoint.id)
        for card in snapshot.cards:
            which = {**mine, "gpu": card.global_gpu_id}
            families.add_card(which, card.reading)
            families.add("gpu_held", which, float(store.is_held(card.key)))
