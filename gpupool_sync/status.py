"""What a pool tells about itself: values for people, for JSON and for programs.

Times of day are aware UTC; durations are float seconds.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import attrs


def to_jsonable(value: Any) -> Any:
    """*value* as JSON can carry it: attrs values as objects, times as ISO 8601 UTC."""
    if attrs.has(type(value)):
        return {
            field.name: to_jsonable(getattr(value, field.name))
            for field in attrs.fields(type(value))
            if not field.name.startswith("_")
        }
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None  # JSON has neither; an infinite age is an unknown one
    return value


class _Jsonable:
    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able types."""
        result = to_jsonable(self)
        assert isinstance(result, dict)
        return result


@attrs.frozen
class WorkerInfo(_Jsonable):
    """Who holds a card, for the assignments of a status."""

    worker_id: str
    assigned_at: datetime.datetime
    note: str | None = None


@attrs.frozen
class EndpointInfo(_Jsonable):
    """One endpoint, as the specification of multi-endpoint support lists it."""

    endpoint_id: str
    url: str
    is_healthy: bool
    last_seen: datetime.datetime | None
    total_gpus: int
    available_gpus: int
    response_time_ms: float | None


@attrs.frozen
class EndpointStatus(EndpointInfo):
    """What else is known of an endpoint."""

    breaker: str = "closed"
    consecutive_failures: int = 0
    last_error: str | None = None
    age: float | None = None  # seconds since its server took the newest sample; None before the first
    stale: bool = False
    success_rate: float | None = None
    is_local: bool = False
    draining: bool = False
    arbiter: str = ""
    scope: str = ""
    problems: Sequence[str] = ()


@attrs.frozen
class GlobalGPUInfo(_Jsonable):
    """One card, as the specification of multi-endpoint support lists it."""

    global_gpu_id: str
    endpoint_id: str
    local_gpu_id: int
    name: str
    memory_usage_percent: float | None
    utilization_percent: float | None
    is_available: bool


@attrs.frozen
class CardStatus(GlobalGPUInfo):
    """What else is known of a card."""

    uuid: str | None = None
    memory_total_mb: float | None = None
    memory_used_mb: float | None = None
    temperature_c: float | None = None
    power_draw_w: float | None = None
    holders: Sequence[str] = ()
    held_for: float | None = None  # seconds
    note: str | None = None
    why_not: str | None = None  # why it is not available; None if it is


@attrs.frozen
class MultiEndpointPoolStatus(_Jsonable):
    """A pool, as the specification of multi-endpoint support lists it. Endpoints that are down leave the totals."""

    total_endpoints: int
    healthy_endpoints: int
    total_gpus: int
    available_gpus: int
    active_workers: int
    blocked_workers: int
    endpoints: Sequence[EndpointInfo]
    gpu_assignments: Mapping[str, Sequence[WorkerInfo]]


@attrs.frozen(repr=False)
class Status(MultiEndpointPoolStatus):
    """`GPUPool.status()`: the specification's fields, and what else is known."""

    name: str | None = None
    strategy: str = ""
    gpus: Sequence[CardStatus] = ()
    open: bool = True

    def __str__(self) -> str:
        return (
            f"{self.available_gpus} of {self.total_gpus} GPUs free, {self.healthy_endpoints} of {self.total_endpoints} "
            f"endpoints healthy, {self.active_workers} leases, {self.blocked_workers} waiting"
        )

    def __repr__(self) -> str:
        return f"<Status: {self}>"

    taken_at: datetime.datetime = attrs.field(
        factory=lambda: datetime.datetime.now(datetime.timezone.utc), kw_only=True
    )


@attrs.frozen
class LeaseStatus(_Jsonable):
    """One lease, as its arbiter tells it."""

    gpus: Sequence[str]  # global ids where the pool knows the card, else keys
    holder: str
    since: float  # seconds it has been held
    expires_in: float | None  # seconds; None: it lives as long as its process
    share: str | None
    token: int
    note: str | None
    arbiter: str
    own: bool = False  # of this user on this machine


@attrs.frozen
class TicketStatus(_Jsonable):
    """One waiting claim, as its arbiter tells it."""

    position: int
    holder: str
    waited: float  # seconds
    wants: str
    note: str | None
    arbiter: str


@attrs.frozen
class LeasesStatus(_Jsonable):
    """`GPUPool.leases()`: who holds what, and who waits, at every arbiter of the pool."""

    leases: Sequence[LeaseStatus]
    queue: Sequence[TicketStatus]
    scopes: Sequence[str]
    problems: Sequence[str] = ()  # arbiters that could not be asked


def _ranges(ids: Sequence[str]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    numbers = sorted(int(each) for each in ids if each.isdecimal())
    parts: list[str] = [each for each in ids if not each.isdecimal()]
    begin = 0
    for index, number in enumerate(numbers):
        if index + 1 == len(numbers) or numbers[index + 1] != number + 1:
            first = numbers[begin]
            parts.append(str(number) if first == number else f"{first}-{number}")
            begin = index + 1
    return ",".join(parts)


@attrs.frozen
class CardVerdict(_Jsonable):
    """One card seen through one request."""

    global_gpu_id: str
    name: str
    uuid: str | None
    code: str  # "free" or why not: held, foreign-process, memory, utilization, filter:…, stale, endpoint-down, …
    text: str


@attrs.frozen
class Explanation(_Jsonable):
    """
    Why a request is, or is not, granted: each card with its reason, and each endpoint that shows no cards.

    `elsewhere` counts the free cards that only ``local=False`` would reach.
    """

    request: str
    cards: Sequence[CardVerdict]
    endpoints: Mapping[str, str]
    free: int
    elsewhere: int = 0
    waiting: int = 0
    hint: str | None = None  # what the request as a whole lacks

    def lines(self, limit: int | None = None) -> list[str]:
        """
        One line for each silent endpoint and each group of cards of which the same is true.

        Beyond *limit* lines of cards the rest is counted.
        """
        lines = [self.hint] if self.hint else []
        lines += [f"{endpoint_id}: {text}" for endpoint_id, text in self.endpoints.items()]
        groups: dict[tuple[str, str, str], list[str]] = {}
        for card in self.cards:
            endpoint_id, _, local_id = card.global_gpu_id.rpartition(":")
            groups.setdefault((endpoint_id, card.name, card.text), []).append(local_id)
        told = [f"{endpoint_id}:{_ranges(ids)} ({name}): {text}" for (endpoint_id, name, text), ids in groups.items()]
        lines += told if limit is None else told[:limit]
        if limit is not None and len(told) > limit:
            rest = sum(len(ids) for ids in list(groups.values())[limit:])
            lines.append(f"and {rest} more cards")
        if self.elsewhere:
            lines.append(
                f"{self.elsewhere} free on other machines: local=False asks for those too (for use over there)"
            )
        if self.waiting:
            lines.append(f"{self.waiting} of this pool wait")
        return lines

    def __str__(self) -> str:
        head = f"{self.request}: {self.free} of {len(self.cards)} GPUs are free"
        return "\n".join([head, *("  " + line for line in self.lines())])
