"""What each path answers, as bytes; knows no web framework.

The readings are the sampler's prepared bytes; what depends on the moment (``/health``) is made at the request.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from gpupool_sync import wire
from gpupool_sync.clock import boottime
from gpupool_sync.server.sampler import Page, Sampler, local_time, make_page

_AGE = wire.AGE_HEADER.lower().encode()

#: Every path that is answered from here, and what it is for.
PATHS: Mapping[str, str] = {
    "/": "What this server is and which paths it has",
    "/gpu/summary": "Load of every GPU, in brief; what a pool polls",
    "/gpu/stats": "Memory, load, temperature and power of every GPU",
    "/gpu/count": "How many GPUs can be used",
    "/health": "Whether the readings are fresh",
    "/config": "The settings that the server runs with",
}

Header = tuple[bytes, bytes]


@attrs.frozen
class Answer:
    """One response."""

    status: int
    headers: list[Header]
    body: bytes


class Pages:
    """
    The answers of one server.

    *config* is what ``/config`` shows: no secrets.  *more_paths* are answered by others and listed here.
    """

    def __init__(
        self,
        sampler: Sampler,
        config: Mapping[str, Any] | None = None,
        more_paths: Mapping[str, str] | None = None,
    ) -> None:
        self._sampler = sampler
        self._begin = boottime()
        self._config = dict(config or {})
        self._more_paths = dict(more_paths or {})
        self._fixed: dict[str, Page] = {}  # filled at the first request; racing fillers fill in the same

    def answer(self, path: str, headers: Iterable[Header]) -> Answer | None:
        """The answer to GET *path* (names of headers in lower case); None if the path is none of ours."""
        if path.startswith("/gpu/"):
            # Taken once: the age and the body must be of the same sample.
            published = self._sampler.published
            page = published.pages.get(path)
            if page is None:
                return None
            age = None if published.sample is None else max(0.0, boottime() - published.sample.taken_at)
            return _respond(page, headers, age)
        if path == "/health":
            status, document = self.health()
            page = make_page(document)
            return Answer(status, [*page.headers], page.body)
        if path in PATHS:
            page = self._fixed.get(path) or self._fixed.setdefault(path, make_page(self._fixed_document(path)))
            return _respond(page, headers, None)
        return None

    def health(self) -> tuple[int, dict[str, Any]]:
        """
        Status and document of ``/health``.

        "degraded" is a server some of whose cards cannot be read; "unhealthy", with status 503, one that has no
        recent readings at all.
        """
        published = self._sampler.published
        overdue = self._sampler.overdue
        sample = published.sample
        faults = () if sample is None else sample.faults
        state = "unhealthy" if overdue else "degraded" if faults or published.error else "healthy"
        return (503 if overdue else 200), {
            "status": state,
            # The predecessor's name for: the cards can be read, whichever way.
            "nvidia_smi_available": self._sampler.can_read and not overdue,
            "timestamp": local_time(boottime()),
            "error": published.error,
            "reader": self._sampler.reader.description,
            "gpu_count": None if sample is None else len(sample.gpus),
            "gpus_unavailable": len(faults),
            "sample_age": None if sample is None else round(max(0.0, boottime() - sample.taken_at), 3),
            "uptime": round(boottime() - self._begin, 3),
        }

    def _fixed_document(self, path: str) -> dict[str, Any]:
        if path == "/config":
            return {
                "refresh_interval": self._sampler.interval,
                **self._config,
                "reader": self._sampler.reader.description,
                "protocol": wire.PROTOCOL_VERSION,
            }
        return {
            "service": "gpupool-sync",
            "message": "GPU statistics of one host",
            "version": _version(),
            "protocol": wire.PROTOCOL_VERSION,
            "endpoints": {
                **PATHS,
                **self._more_paths,
                "/docs": "This, to read in a browser",
                "/openapi.json": "This, for programs",
            },
            "started": local_time(self._begin),
            "time_zone": time.strftime("%z"),
        }


def _respond(page: Page, headers: Iterable[Header], age: float | None) -> Answer:
    extra = [] if age is None else [(_AGE, b"%.3f" % age)]
    for name, value in headers:
        if name == b"if-none-match" and _matches(value, page.etag):
            # Neither length nor type: there is no body.
            return Answer(304, [*page.headers[2:], *extra], b"")
    return Answer(200, [*page.headers, *extra], page.body)


def _matches(header: bytes, etag: bytes) -> bool:
    """RFC 9110, 13.1.2: weak comparison against a list."""
    return any(item.strip().removeprefix(b"W/") in (etag, b"*") for item in header.split(b","))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gpupool-sync")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
