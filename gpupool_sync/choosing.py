"""Which cards would do: the filter pipeline, in which every card that drops out leaves its reason.

Pure functions over snapshots: no clock, no lock, no store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import attrs

from gpupool_sync.models import Card, GPUReading, GPURequest, Reason, Snapshot

#: A card with so little memory in use is empty: MiB, and percent of its memory. Drivers keep some for themselves.
EMPTY_MB = 600.0
EMPTY_PERCENT = 2.0

#: What keeps a card from being granted that no reading speaks against: who has it, or that it is closed (see `usable`).
Obstacle = Literal["held", "no-room", "closed"]


@attrs.frozen
class Limits:
    """Percentages at or above which a reading speaks against its card."""

    memory_threshold: float
    utilization_threshold: float


@attrs.frozen
class Screened:
    """One snapshot seen through one request."""

    #: Cards that would do, the least loaded first.
    eligible: tuple[Card, ...]
    #: Cards that would do if their reading did not speak against them.
    vetoed: tuple[tuple[Card, Reason], ...]
    #: Cards that the request does not want, whatever their reading.
    unwanted: tuple[tuple[Card, Reason], ...]
    #: Of all eligible cards together, as `GPUReading.load` counts.
    load: float = attrs.field(init=False)

    @load.default
    def _sum(self) -> float:
        return sum(card.reading.load for card in self.eligible)

    @property
    def possible(self) -> int:
        """How many cards could satisfy the request some day."""
        return len(self.eligible) + len(self.vetoed)


def unwanted(card: Card, request: GPURequest, *, url: str, is_local: bool) -> Reason | None:
    """Why the request can never want this card; None if it can."""
    reading = card.reading
    if request.local and not is_local:
        return Reason("filter:local", "not in this machine, and local=True was asked for")
    if request.endpoint and card.endpoint_id not in request.endpoint and url not in request.endpoint:
        return Reason("filter:endpoint", f"not at {_listed(request.endpoint)}")
    if request.uuid and not _names_uuid(request.uuid, reading.uuid):
        return Reason("filter:uuid", "not the card that uuid= names")
    if request.exclude and (
        card.global_gpu_id in request.exclude
        or card.endpoint_id in request.exclude
        or _names_uuid(request.exclude, reading.uuid)
    ):
        return Reason("filter:exclude", "excluded by the request")
    if request.model is not None and request.model.casefold() not in reading.name.casefold():
        return Reason("filter:model", f"its model is not {request.model}")
    for asked, what in ((request.min_free_memory_mb, "min_free_memory_mb"), (request.memory_mb, "memory_mb")):
        if asked is None:
            continue
        if reading.memory_total_mb is None:
            return Reason("filter:memory", f"its server tells no memory in MiB, which {what} needs")
        if reading.memory_total_mb < asked:
            return Reason("filter:memory", f"has {reading.memory_total_mb:.0f} MiB in all, {what}={asked:.0f}")
    return None


def veto(card: Card, request: GPURequest, limits: Limits, *, is_local: bool) -> Reason | None:
    """Why the reading speaks against the card now; None if it does not. What is unknown does not veto."""
    reading = card.reading
    if request.max_utilization_percent is not None:
        busy = reading.utilization_percent
        if busy is None:
            return Reason("utilization", "its utilization is unknown, and max_utilization_percent was asked for")
        if busy > request.max_utilization_percent:
            return Reason("utilization", f"utilization {busy:.0f} % is over {request.max_utilization_percent:g} %")
    if request.min_free_memory_mb is not None:
        free = reading.memory_free_mb
        if free is None or free < request.min_free_memory_mb:
            told = "unknown" if free is None else f"{free:.0f} MiB"
            return Reason("memory", f"free memory is {told}, {request.min_free_memory_mb:.0f} MiB were asked for")
    if request.memory_mb is not None:
        return None  # shared by memory: not the reading counts but the sum, see `room_mb`
    foreign = _foreign_process(reading, is_local) if not request.busy_ok else None
    if foreign is not None:
        return Reason("foreign-process", f"used outside the pool: {foreign}")
    used, busy = reading.memory_usage_percent, reading.utilization_percent
    if used is not None and used >= limits.memory_threshold:
        return Reason("memory", f"memory usage {used:.0f} % is at or above {limits.memory_threshold:g} %")
    if busy is not None and busy >= limits.utilization_threshold:
        return Reason("utilization", f"utilization {busy:.0f} % is at or above {limits.utilization_threshold:g} %")
    return None


def _foreign_process(reading: GPUReading, is_local: bool) -> str | None:
    others = [
        process
        for process in reading.processes or ()
        # Our own CUDA context outlives a lease (a notebook that asks again): it is no stranger.
        if not (is_local and process.pid == os.getpid())
    ]
    if not others:
        return None
    return str(others[0]) + (f" and {len(others) - 1} more" if len(others) > 1 else "")


def is_empty(reading: GPUReading) -> bool:
    """Whether nobody's job is on the card, as far as the reading tells: no process, or next to no memory."""
    if reading.processes is not None:
        return not reading.processes
    if reading.memory_used_mb is not None:
        return reading.memory_used_mb <= max(EMPTY_MB, EMPTY_PERCENT / 100.0 * (reading.memory_total_mb or 0.0))
    return reading.memory_usage_percent is not None and reading.memory_usage_percent <= EMPTY_PERCENT


def room_mb(reading: GPUReading, leased_mb: float) -> float | None:
    """
    MiB that all shares of a card may sum up to: its memory less what foreign processes use.

    What is used beyond the shares that are leased is foreign.  None where the memory is unknown.
    """
    if reading.memory_total_mb is None or reading.memory_used_mb is None:
        return reading.memory_total_mb
    return reading.memory_total_mb - max(0.0, reading.memory_used_mb - leased_mb)


def screen(snapshot: Snapshot, request: GPURequest, limits: Limits) -> Screened:
    """Put each card of the snapshot through the filters."""
    eligible: list[Card] = []
    vetoed: list[tuple[Card, Reason]] = []
    dropped: list[tuple[Card, Reason]] = []
    for card in snapshot.cards:
        reason = unwanted(card, request, url=snapshot.url, is_local=snapshot.is_local)
        if reason is not None:
            dropped.append((card, reason))
            continue
        reason = veto(card, request, limits, is_local=snapshot.is_local)
        if reason is not None:
            vetoed.append((card, reason))
        else:
            eligible.append(card)
    eligible.sort(key=_load)
    return Screened(tuple(eligible), tuple(vetoed), tuple(dropped))


def usable(
    screened: Screened,
    snapshot: Snapshot,
    *,
    is_held: Callable[[str], bool],
    released_at: Callable[[str], float | None],
    closed: Callable[[], Mapping[str, float]],
    fits: Callable[[Card], bool] | None,
) -> Iterator[tuple[Card, Reason | None, Obstacle | None]]:
    """
    Each possible card with the veto that stands against it now; if none does, with what keeps it from being granted.

    A veto falls when the card was released after the sample: the reading shows the last holder's job.  Of a held
    card the reading shows its holder; so it does not count there either, but the lease does.

    Args:
        closed: the cards that their arbiter grants only when a reading shows them empty, and since when
            (`LeaseStore.closed`). Asked after `is_held`, by which an arbiter may first learn that a card is closed.
        fits: whether a share may still fit beside those that are leased; None: a whole card is asked for.
    """
    taken_at = snapshot.sample.taken_at
    for card in screened.eligible:
        held = is_held(card.key) or was_leased(card, taken_at, released_at)
        shut = closed()
        simply = fits is None and not shut  # mostly
        yield card, None, ("held" if held else None) if simply else _obstacle(card, held, taken_at, shut, fits)
    for card, reason in screened.vetoed:
        held = is_held(card.key) or was_leased(card, taken_at, released_at)
        if held:
            falls = fits is None or reason.code == "foreign-process"
        else:
            released = released_at(card.key)
            falls = released is not None and released > taken_at
        yield (card, None, _obstacle(card, held, taken_at, closed(), fits)) if falls else (card, reason, None)


def was_leased(card: Card, taken_at: float, released_at: Callable[[str], float | None]) -> bool:
    """Whether its server said with the reading that somebody has a lease on the card, and we gave none back since."""
    if not card.reading.leased:
        return False
    released = released_at(card.key)
    return released is None or released <= taken_at


def _obstacle(
    card: Card, held: bool, taken_at: float, closed: Mapping[str, float], fits: Callable[[Card], bool] | None
) -> Obstacle | None:
    if held if fits is None else not fits(card):
        return "held" if held else "no-room"
    # A reading from before that end shows nothing of what was left on the card.
    if closed and card.key in closed and not (is_empty(card.reading) and taken_at > closed[card.key]):
        return "closed"
    return None


def _load(card: Card) -> float:
    return card.reading.load


def _names_uuid(names: tuple[str, ...], uuid: str | None) -> bool:
    if uuid is None:
        return False
    # As CUDA does: a beginning is enough, if it is more than the prefix that every UUID has.
    return any(
        uuid == name or (len(name) > 6 and name.startswith(("GPU-", "MIG-")) and uuid.startswith(name))
        for name in names
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
