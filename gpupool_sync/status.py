"""What a pool tells about itself: values for people, for JSON and for programs.

Times of day are aware UTC; durations are float seconds.  The classes check what they are made of: a value that cannot
be is a `ConfigError` (a `ValueError`) that names the field.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from gpupool_sync.errors import ConfigError

# What separates or could be misread is in no endpoint's name, see `config.Endpoint`.
_GLOBAL_ID = re.compile(r"([^\s:/,=@\\]+):(0|[1-9][0-9]{0,9})")


def make_global_gpu_id(endpoint_id: str, local_gpu_id: int) -> str:
    """
    ``endpoint_id:local_gpu_id``, such as ``server1:0``.

    Raises:
        ConfigError: an endpoint's id is a text without ``: / , = @``, backslashes and spaces, a local one a number.
    """
    made = f"{endpoint_id}:{local_gpu_id}"
    whole = isinstance(local_gpu_id, int) and not isinstance(local_gpu_id, bool)
    if not isinstance(endpoint_id, str) or not whole or not _GLOBAL_ID.fullmatch(made):
        raise ConfigError(
            f"endpoint_id={endpoint_id!r}, local_gpu_id={local_gpu_id!r}: an endpoint's id and a GPU's number on its "
            "host are allowed, such as 'server1' and 0"
        )
    return made


def parse_global_gpu_id(global_gpu_id: str) -> tuple[str, int]:
    """
    The endpoint's id and the local id in ``endpoint_id:local_gpu_id``: the inverse of `make_global_gpu_id`.

    Raises:
        ConfigError: it is no global id.
    """
    found = _GLOBAL_ID.fullmatch(global_gpu_id) if isinstance(global_gpu_id, str) else None
    if found is None:
        raise ConfigError(f"global_gpu_id={global_gpu_id!r}: endpoint_id:local_gpu_id is allowed, such as server1:0")
    return found.group(1), int(found.group(2))


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


# --- checks -------------------------------------------------------------------------------------------


def _refuse(field: Any, value: object, allowed: str) -> None:
    raise ConfigError(f"{field.name}={value!r}: {allowed} is allowed")


def _text(instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        _refuse(field, value, "a text that is not empty")


def _count(instance: Any, field: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _refuse(field, value, "a whole number of at least 0")


def _flag(instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, bool):
        _refuse(field, value, "True or False")


def _amount(instance: Any, field: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        _refuse(field, value, "a number of at least 0")


def _percent(instance: Any, field: Any, value: Any) -> None:
    # The numbers alone: True and False are none, though they compare like some.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        _refuse(field, value, "a number from 0 to 100")


_maybe_amount = attrs.validators.optional(_amount)
_maybe_percent = attrs.validators.optional(_percent)


def _utc(value: Any) -> Any:
    """A converter: the same instant in UTC; a time without a zone means another one on each machine."""
    if value is None:
        return None
    if not isinstance(value, datetime.datetime) or value.utcoffset() is None:
        raise ConfigError(f"{value!r}: a time with a zone is allowed, such as datetime.now(timezone.utc)")
    return value.astimezone(datetime.timezone.utc)


def _not_none(instance: Any, field: Any, value: Any) -> None:
    if value is None:
        _refuse(field, value, "a time with a zone")


def _at_most(other: str) -> Callable[[Any, Any, Any], None]:
    def check(instance: Any, field: Any, value: Any) -> None:
        _count(instance, field, value)
        if value > getattr(instance, other):
            _refuse(field, value, f"at most {other}={getattr(instance, other)}")

    return check


def _all_of(kind: type, values: Iterable[object], what: str) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise ConfigError(f"{what}: {value!r} is not one of {kind.__name__}")


def _belongs(instance: Any, field: Any, value: Any) -> None:
    """A global id is made of the two ids beside it."""
    expected = f"{instance.endpoint_id}:{instance.local_gpu_id}"
    if value != expected:
        _refuse(field, value, f"{expected!r}, as endpoint_id and local_gpu_id say,")


# --- the predecessor's models -------------------------------------------------------------------------


@attrs.frozen
class GPUInfo(_Jsonable):
    """One card, as a statistics server lists it; a reading that the driver does not give is None."""

    gpu_id: int = attrs.field(validator=_count)
    name: str = attrs.field(validator=_text)
    memory_usage_percent: float | None = attrs.field(validator=_maybe_percent)
    utilization_percent: float | None = attrs.field(validator=_maybe_percent)


@attrs.frozen
class GPUStats(_Jsonable):
    """The cards of one statistics server together, as its ``/gpu/summary`` tells them; memory is in MiB."""

    gpu_count: int = attrs.field(validator=_count)
    total_memory_mb: float = attrs.field(validator=_amount)
    total_used_memory_mb: float = attrs.field(validator=_amount)
    average_utilization_percent: float | None = attrs.field(validator=_maybe_percent)
    gpus_summary: Sequence[GPUInfo]
    total_memory_usage_percent: float | None = attrs.field(default=None, validator=_maybe_percent)
    #: As the server wrote it: its local time, of an unknown zone. Good for comparing, not for computing.
    timestamp: str | None = attrs.field(default=None, validator=attrs.validators.optional(_text))

    def __attrs_post_init__(self) -> None:
        _all_of(GPUInfo, self.gpus_summary, "gpus_summary")
        if len(self.gpus_summary) != self.gpu_count:
            raise ConfigError(
                f"gpu_count={self.gpu_count!r}: {len(self.gpus_summary)}, as gpus_summary has, is allowed"
            )
        if self.total_used_memory_mb > self.total_memory_mb:
            raise ConfigError(
                f"total_used_memory_mb={self.total_used_memory_mb!r}: at most total_memory_mb={self.total_memory_mb!r} "
                "is allowed"
            )


@attrs.frozen
class WorkerInfo(_Jsonable):
    """Who holds a card, for the assignments of a status."""

    worker_id: str = attrs.field(validator=_text)
    assigned_at: datetime.datetime = attrs.field(converter=_utc, validator=_not_none)
    note: str | None = None

    @property
    def id(self) -> str:
        """`worker_id`, as the predecessor calls it."""
        return self.worker_id


@attrs.frozen
class GPUAssignment(_Jsonable):
    """
    What `GPUWorkerPoolClient.request_gpu` returns: which worker has which GPU.

    `gpu_id` is the GPU's number on its own host.  With one endpoint that is all; with several the same card has a
    `global_gpu_id` too, ``endpoint_id:gpu_id``.
    """

    gpu_id: int = attrs.field(validator=_count)
    worker_id: str = attrs.field(validator=_text)
    assigned_at: datetime.datetime = attrs.field(converter=_utc, validator=_not_none)
    global_gpu_id: str | None = None
    endpoint_id: str | None = None

    def __attrs_post_init__(self) -> None:
        if (self.global_gpu_id is None) != (self.endpoint_id is None):
            raise ConfigError("global_gpu_id and endpoint_id: both of them are allowed, or neither")
        if self.endpoint_id is not None and self.global_gpu_id != make_global_gpu_id(self.endpoint_id, self.gpu_id):
            raise ConfigError(
                f"global_gpu_id={self.global_gpu_id!r}: {make_global_gpu_id(self.endpoint_id, self.gpu_id)}, as "
                "endpoint_id and gpu_id say, is allowed"
            )

    @property
    def is_multi_endpoint(self) -> bool:
        """Whether it has a global id."""
        return self.global_gpu_id is not None

    def get_display_id(self) -> str:
        """The global id if there is one, else the local one, as text."""
        return str(self.gpu_id) if self.global_gpu_id is None else self.global_gpu_id


@attrs.frozen
class PoolStatus(_Jsonable):
    """A pool of one endpoint; `gpu_assignments` is by local id."""

    total_gpus: int = attrs.field(validator=_count)
    available_gpus: int = attrs.field(validator=_at_most("total_gpus"))
    active_workers: int = attrs.field(validator=_count)
    blocked_workers: int = attrs.field(validator=_count)
    gpu_assignments: Mapping[int, Sequence[WorkerInfo]] = attrs.field(factory=dict)

    @gpu_assignments.validator
    def _check_assignments(self, field: Any, value: Mapping[int, Sequence[WorkerInfo]]) -> None:
        for gpu_id, workers in value.items():
            _count(self, field, gpu_id)
            _all_of(WorkerInfo, workers, f"gpu_assignments[{gpu_id}]")


@attrs.frozen
class EndpointInfo(_Jsonable):
    """
    One endpoint, as the specification of multi-endpoint support lists it.

    One that is down keeps the number of GPUs that it had, none of them available.
    """

    endpoint_id: str = attrs.field(validator=_text)
    url: str = attrs.field(validator=_text)
    is_healthy: bool = attrs.field(validator=_flag)
    last_seen: datetime.datetime | None = attrs.field(converter=_utc)  # None: not yet
    total_gpus: int = attrs.field(validator=_count)
    available_gpus: int = attrs.field(validator=_at_most("total_gpus"))
    response_time_ms: float | None = attrs.field(validator=_maybe_amount)


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
    origin: str = ""  # what named it: "argument", a variable, a configuration file, a source, "add_endpoint"
    availability: float | None = None  # seconds healthy / seconds watched, since the pool was opened
    breaker_changes: int = 0
    response_p50_ms: float | None = None
    response_p95_ms: float | None = None
    watched: bool = True  # polled at the interval; False: out of the subset that this process watches


@attrs.frozen
class SourceStatus(_Jsonable):
    """Where endpoints are found, and how many."""

    source: str
    endpoints: int
    problem: str | None  # why it cannot be read now, or lists nothing


@attrs.frozen
class MachineInfo(_Jsonable):
    """The machine behind an endpoint; `usable` says whether programs of this one can use its GPUs."""

    name: str
    usable: bool  # it is this machine, or one that is simulated


@attrs.frozen
class GlobalGPUInfo(_Jsonable):
    """One card, as the specification of multi-endpoint support lists it."""

    global_gpu_id: str = attrs.field(validator=_belongs)
    endpoint_id: str = attrs.field(validator=_text)
    local_gpu_id: int = attrs.field(validator=_count)
    name: str = attrs.field(validator=_text)
    memory_usage_percent: float | None = attrs.field(validator=_maybe_percent)
    utilization_percent: float | None = attrs.field(validator=_maybe_percent)
    is_available: bool = attrs.field(validator=_flag)


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

    total_endpoints: int = attrs.field(validator=_count)
    healthy_endpoints: int = attrs.field(validator=_at_most("total_endpoints"))
    total_gpus: int = attrs.field(validator=_count)
    available_gpus: int = attrs.field(validator=_at_most("total_gpus"))
    active_workers: int = attrs.field(validator=_count)
    blocked_workers: int = attrs.field(validator=_count)
    endpoints: Sequence[EndpointInfo] = attrs.field()
    gpu_assignments: Mapping[str, Sequence[WorkerInfo]] = attrs.field()

    @endpoints.validator
    def _check_endpoints(self, field: Any, value: Sequence[EndpointInfo]) -> None:
        _all_of(EndpointInfo, value, "endpoints")
        if len(value) != self.total_endpoints:
            raise ConfigError(f"total_endpoints={self.total_endpoints!r}: {len(value)}, as endpoints has, is allowed")

    @gpu_assignments.validator
    def _check_assignments(self, field: Any, value: Mapping[str, Sequence[WorkerInfo]]) -> None:
        for global_gpu_id, workers in value.items():
            parse_global_gpu_id(global_gpu_id)
            _all_of(WorkerInfo, workers, f"gpu_assignments[{global_gpu_id}]")


@attrs.frozen(repr=False)
class Status(MultiEndpointPoolStatus):
    """`GPUPool.status()`: the specification's fields, and what else is known."""

    name: str | None = None
    strategy: str = ""
    gpus: Sequence[CardStatus] = ()
    open: bool = True
    sources: Sequence[SourceStatus] = ()
    hint: str | None = None  # what is likely the matter with the pool as a whole

    def __str__(self) -> str:
        from gpupool_sync.display import plural

        return (
            f"{self.available_gpus} of {plural(self.total_gpus, 'GPU')} free, {self.healthy_endpoints} of "
            f"{plural(self.total_endpoints, 'endpoint')} healthy, {plural(self.active_workers, 'lease')}, "
            f"{self.blocked_workers} waiting"
        )

    def __repr__(self) -> str:
        return f"<Status: {self}>"

    def _repr_html_(self) -> str:
        from gpupool_sync.display import status_html

        return status_html(self)

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

    def _repr_html_(self) -> str:
        from gpupool_sync.display import leases_html

        return leases_html(self)


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
class CardGroup:
    """Cards of one endpoint and model with the same verdict; `gpus` is such as ``server1:0-3,5``."""

    gpus: str
    count: int
    name: str
    code: str
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

    def lines(self, limit: int | None = None, *, models: bool = True) -> list[str]:
        """
        One line for each silent endpoint and each group of cards of which the same is true.

        Beyond *limit* lines of cards the rest is counted.  *models*: with the names of the cards' models.
        """
        lines = [self.hint] if self.hint else []
        lines += [f"{endpoint_id}: {text}" for endpoint_id, text in self.endpoints.items()]
        groups = self.groups()
        told = [f"{group.gpus}{f' ({group.name}):' if models else ''} {group.text}" for group in groups]
        lines += told if limit is None else told[:limit]
        if limit is not None and len(told) > limit:
            lines.append(f"and {sum(group.count for group in groups[limit:])} more cards")
        return lines + self.remarks()

    def groups(self) -> list[CardGroup]:
        """The cards, those of one endpoint together of which the same is true."""
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for card in self.cards:
            endpoint_id, _, local_id = card.global_gpu_id.rpartition(":")
            groups.setdefault((endpoint_id, card.name, card.code, card.text), []).append(local_id)
        return [
            CardGroup(f"{endpoint_id}:{_ranges(ids)}", len(ids), name, code, text)
            for (endpoint_id, name, code, text), ids in groups.items()
        ]

    def remarks(self) -> list[str]:
        """What is to be said beside the cards."""
        lines = []
        if self.elsewhere:
            lines.append(
                f"{self.elsewhere} free on other machines: local=False asks for those too (for use over there)"
            )
        if self.waiting:
            lines.append(f"{self.waiting} of this pool wait")
        return lines

    def _repr_html_(self) -> str:
        from gpupool_sync.display import explanation_html

        return explanation_html(self)

    def __str__(self) -> str:
        head = f"{self.request}: {self.free} of {len(self.cards)} GPUs are free"
        return "\n".join([head, *("  " + line for line in self.lines())])
