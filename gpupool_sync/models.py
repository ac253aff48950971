"""Values: frozen, without locks, without I/O, so they cross threads as they are.

Units: memory is in MiB (as nvidia-smi prints it) and its names end in ``_mb``; durations are float seconds without
a suffix; every other quantity carries its unit in its name.  A reading that the driver does not give is None, never 0:
"idle" and "unknown" must stay different things.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import attrs

from gpupool_sync.errors import ConfigError


@attrs.frozen
class ComputeProcess:
    """One process that computes on a card, as the card's host sees it."""

    pid: int | None
    user: str | None = None
    memory_mb: float | None = None
    name: str | None = None

    def __str__(self) -> str:
        who = f"process {self.pid}" if self.pid is not None else "a process"
        if self.name:
            who += f" ({self.name})"
        return f"{who} of {self.user}" if self.user else who


@attrs.frozen
class GPUReading:
    """What one look at one card showed."""

    local_gpu_id: int  # PCI bus order, as nvidia-smi counts
    name: str
    uuid: str | None = None
    memory_total_mb: float | None = None
    memory_used_mb: float | None = None
    memory_usage_percent: float | None = None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    power_draw_w: float | None = None
    power_limit_w: float | None = None
    #: None: this server does not tell processes. Empty: it looked, and there are none.
    processes: tuple[ComputeProcess, ...] | None = None
    #: Whether somebody had a lease on it, as its server says that grants them. None: it does not tell.
    leased: bool | None = None

    @property
    def memory_free_mb(self) -> float | None:
        if self.memory_total_mb is None or self.memory_used_mb is None:
            return None
        return max(0.0, self.memory_total_mb - self.memory_used_mb)

    @property
    def load(self) -> float:
        """Memory % + utilization %, 0 to 200; what is unknown counts as 100, so that the known idle go first."""
        memory, busy = self.memory_usage_percent, self.utilization_percent
        return (100.0 if memory is None else memory) + (100.0 if busy is None else busy)


@attrs.frozen
class GPUFault:
    """A card that the host knows of but cannot read: lost, hung, or described by nonsense."""

    reason: str
    local_gpu_id: int | None = None
    uuid: str | None = None
    name: str | None = None


@attrs.frozen
class HostIdentity:
    """Which machine the cards are in; `id` is its boot id, or a made-up one for simulated hosts."""

    id: str
    name: str
    simulated: bool = False
    #: Its "cards" are places on the CPU, as `GPU_POOL_PASSTHROUGH` asked for.
    passthrough: bool = False


@attrs.frozen
class LeaseOffer:
    """What a server says about the leases it grants (absent: it is a statistics-only server)."""

    version: int
    lock_dir: str | None = None
    #: Which directory that is, whatever its path: in a container the same path mostly leads to another one.
    lock_dir_id: str | None = None


@attrs.frozen
class Sample:
    """
    What one look at one host's cards showed; the content of one ``/gpu/summary``.

    `taken_at` is on this machine's `clock.boottime`: for an answer from the network, the instant it arrived less
    the age that the server told; of an answer that is repeated, that of the first one.
    """

    gpus: tuple[GPUReading, ...]
    taken_at: float
    faults: tuple[GPUFault, ...] = ()
    host: HostIdentity | None = None
    leases: LeaseOffer | None = None
    #: The version of our protocol that the server speaks; None: a statistics server of somebody else.
    protocol: int | None = None
    #: The server's own timestamp, as it wrote it. Compared for equality only, never parsed: clocks differ.
    timestamp: str | None = None
    #: Oddities of the answer that cost no more than a field or a card, for logs and `doctor`.
    problems: tuple[str, ...] = ()


@attrs.frozen
class Card:
    """One physical GPU at one endpoint: its key names it to the arbiters, its global id to people."""

    key: str  # UUID where the server tells it, else canonical URL and local id
    endpoint_id: str
    reading: GPUReading

    @property
    def global_gpu_id(self) -> str:
        return f"{self.endpoint_id}:{self.reading.local_gpu_id}"


@attrs.frozen
class Snapshot:
    """What one poll of one endpoint saw."""

    endpoint_id: str
    url: str
    sample: Sample
    cards: tuple[Card, ...]
    received_at: float  # clock.boottime()
    #: The cards are in this very machine.
    is_local: bool = False
    #: The server has given this very sample at several polls in a row, so its age is that of the first of them.
    repeated: bool = False
    #: Of the `PolledEndpoint` that polled: ids and URLs are used again by endpoints that are added later.
    serial: int = 0

    def age(self, now: float) -> float:
        """Seconds since the server took the sample; *now* is a `clock.boottime`."""
        return max(0.0, now - self.sample.taken_at)


def card_key(url: str, reading: GPUReading) -> str:
    """
    The name that arbiters know a card by.

    Without a UUID the canonical URL stands in, so everybody must then use the same URL.
    """
    return reading.uuid or f"{url}#{reading.local_gpu_id}"


def _as_names(value: object, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{what}={value!r}: a name or a list of names is allowed, none of them empty")
    return names


def _number(value: object, what: str, *, low: float, high: float | None = None) -> float | None:
    if value is None:
        return None
    # bool is an int in Python: memory_mb=True would ask for one MiB.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= sys.float_info.max:
        raise ConfigError(f"{what}={value!r}: a number of at least {low:g} is allowed")
    if high is not None and value > high:
        raise ConfigError(f"{what}={value!r}: a number from {low:g} to {high:g} is allowed")
    return float(value)


@attrs.frozen(cache_hash=True)
class GPURequest:
    """
    What a caller asks for; hashable, so that answers to equal requests can be remembered.

    The fields are those of `GPUPool.acquire`, normalised.
    """

    count: int = 1
    local: bool | None = None
    endpoint: tuple[str, ...] = ()
    model: str | None = None
    uuid: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_free_memory_mb: float | None = None
    max_utilization_percent: float | None = None
    memory_mb: float | None = None
    max_holders: int | None = None
    busy_ok: bool = False

    @property
    def shared(self) -> bool:
        """Whether a part of a card is enough."""
        return self.memory_mb is not None or self.max_holders is not None

    @classmethod
    def make(
        cls,
        *,
        count: int | None = None,
        local: bool | None = None,
        endpoint: object = None,
        model: str | None = None,
        uuid: object = None,
        exclude: object = None,
        min_free_memory_mb: float | None = None,
        max_utilization_percent: float | None = None,
        memory_mb: float | None = None,
        max_holders: int | None = None,
        busy_ok: bool = False,
    ) -> GPURequest:
        """
        Validate what a caller wrote.

        Raises:
            ConfigError: a value is of the wrong type or out of range, or two of them contradict each other.
        """
        for value, what in ((count, "count"), (max_holders, "max_holders")):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{what}={value!r}: a whole number of at least 1 is allowed")
        if model is not None and (not isinstance(model, str) or not model.strip()):
            raise ConfigError(f"model={model!r}: a part of a GPU's name is allowed, such as 'A100'")
        for flag, what in ((local, "local"), (busy_ok, "busy_ok")):
            if flag is not None and not isinstance(flag, bool):
                raise ConfigError(f"{what}={flag!r}: True or False is allowed")
        if memory_mb is not None and max_holders is not None:
            raise ConfigError("memory_mb and max_holders: a card is shared either by memory or by places, not both")
        if (memory_mb is not None or max_holders is not None) and (count or 1) != 1:
            raise ConfigError(f"count={count!r}: a share is a part of one card; ask for several shares one by one")
        return cls(
            count=count or 1,
            local=local,
            endpoint=_as_names(endpoint, "endpoint"),
            model=model.strip() if model is not None else None,
            uuid=_as_names(uuid, "uuid"),
            exclude=_as_names(exclude, "exclude"),
            min_free_memory_mb=_number(min_free_memory_mb, "min_free_memory_mb", low=0.0),
            max_utilization_percent=_number(max_utilization_percent, "max_utilization_percent", low=0.0, high=100.0),
            memory_mb=_number(memory_mb, "memory_mb", low=1.0),
            max_holders=max_holders,
            busy_ok=bool(busy_ok),
        )


#: A whole GPU, any: what most callers ask for.
DEFAULT_REQUEST = GPURequest()


@attrs.frozen
class Reason:
    """Why a card was not granted: a stable code for programs, a sentence for people."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


@attrs.frozen
class EndpointView:
    """What a strategy sees of one endpoint: only numbers, already filtered for the request."""

    endpoint_id: str
    #: Cards that the endpoint has, whatever their state.
    total_gpus: int
    #: Cards that pass the request's filters and are, as far as is known, not leased.
    free_gpus: int
    #: Mean of memory % + utilization % over the free cards, 0 to 200.
    mean_load: float = 0.0
    #: Mean response time over the last successes; None before the first.
    response_time_ms: float | None = None
    is_local: bool = False
    #: Seconds since the server looked at its cards.
    age: float = 0.0
    #: Cards per second that others take lately, of all the endpoints that the pool watches.
    rivals_per_second: float = 0.0
