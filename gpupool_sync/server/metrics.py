"""``/metrics``: the server as Prometheus sees it.

Counts only: no holder, no note and no id is told.  Made at each request, on a thread, as it looks into the queue's
directory; one at a time, so that scrapes cannot crowd out leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from gpupool_sync import wire
from gpupool_sync.clock import boottime
from gpupool_sync.errors import LeaseStoreError, MissingExtra
from gpupool_sync.server.pages import Answer, Header
from gpupool_sync.server.sampler import Sampler, make_page

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from gpupool_sync.server.leases import LeaseAPI

logger = logging.getLogger(__name__)

#: What ``/metrics`` is for.
SUMMARY = "The same numbers, for Prometheus"


class Metrics:
    """
    What ``/metrics`` tells.

    *requests*: how many had which path and status; whoever counts them goes on doing so.
    """

    def __init__(
        self, sampler: Sampler, leases: LeaseAPI | None = None, requests: Mapping[tuple[str, int], int] | None = None
    ) -> None:
        self._sampler = sampler
        self._leases = leases
        self._requests = {} if requests is None else requests
        # One scrape at a time.
        self._busy = asyncio.Lock()

    async def answer(self, headers: Iterable[Header]) -> Answer:
        """The answer to GET; *headers* have names in lower case."""
        accept = b",".join(value for name, value in headers if name == b"accept").decode("latin-1")
        async with self._busy:
            try:
                body, kind = await asyncio.to_thread(self.render, accept)
            except MissingExtra as exc:
                page = make_page(wire.error_document("not_installed", str(exc)))
                return Answer(501, [*page.headers], page.body)
        return Answer(
            200,
            [
                (b"content-type", kind.encode()),
                (b"content-length", b"%d" % len(body)),
                (b"cache-control", b"no-store"),
            ],
            body,
        )

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """
        The body and its content type, as the header *accept* asks.

        Raises:
            MissingExtra: prometheus_client is not installed.
        """
        import gpupool_sync.prometheus  # noqa: F401 - first, as its error has the pip line

        # isort: split
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import choose_encoder

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        encode, kind = choose_encoder(accept)
        return encode(registry), kind

    def collect(self) -> Iterable[Metric]:
        """What `prometheus_client` asks for."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        from gpupool_sync.prometheus import Families, Spec, card_specs

        card = ("gpu",)
        specs: list[Spec] = [
            *card_specs(card),
            (GaugeMetricFamily, "gpus", (), "Cards that can be read"),
            (GaugeMetricFamily, "gpus_unavailable", (), "Cards that cannot be read"),
            (GaugeMetricFamily, "sample_age_seconds", (), "Seconds since the readings were taken"),
            (CounterMetricFamily, "http_requests", ("path", "status"), "Requests that were answered"),
        ]
        if self._leases is not None:
            specs += [
                (GaugeMetricFamily, "gpu_leased", card, "Whether the card is leased, to anybody on any machine"),
                (GaugeMetricFamily, "leases", (), "Leases that this server keeps for holders elsewhere"),
                (GaugeMetricFamily, "tickets", (), "Claims that wait for a card of this host, of anybody"),
                (GaugeMetricFamily, "long_polls", (), "Requests that wait for their turn"),
                *(
                    (CounterMetricFamily, name, (), text)
                    for name, text in (
                        ("grants", "Leases granted to holders elsewhere"),
                        ("renewals", "Leases whose ttl was begun anew by their holder"),
                        ("releases", "Leases given back"),
                        ("expiries", "Leases that ended because they were not renewed"),
                        ("revocations", "Leases that somebody took away through this server"),
                    )
                ),
            ]
        families = Families("gpupool_server", specs)
        sample = self._sampler.published.sample
        families.add("gpus", {}, 0 if sample is None else len(sample.gpus))
        families.add("gpus_unavailable", {}, 0 if sample is None else len(sample.faults))
        for (path, status), number in dict(self._requests).items():
            families.add("http_requests", {"path": path, "status": str(status)}, number)
        if sample is not None:
            families.add("sample_age_seconds", {}, max(0.0, boottime() - sample.taken_at))
            for reading in sample.gpus:
                which = {"gpu": str(reading.local_gpu_id)}
                families.add_card(which, reading)
                if self._leases is not None and reading.uuid is not None:
                    families.add("gpu_leased", which, float(self._leases.granter.store.is_held(reading.uuid)))
        if self._leases is not None:
            for name, value in self._leases.numbers().items():
                families.add(name, {}, value)
            try:
                families.add("tickets", {}, len(self._leases.granter.store.queue()))
            except LeaseStoreError as exc:
                logger.warning("the queue cannot be counted: %s", exc)
        return families
