"""Cards that do not exist, for demos, for tests and for trying things out without a GPU.

Their UUIDs and their host's identity depend on the host's name alone, so a restarted server has the same cards.
Everything random depends on the seed alone.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence

import attrs

from gpupool_sync.clock import boottime
from gpupool_sync.errors import ConfigError
from gpupool_sync.models import ComputeProcess, GPUFault, GPUReading, HostIdentity, Sample

#: Most simulated cards of one host.
MOST_CARDS = 10_000
#: Memory that an idle card uses, in MiB.
IDLE_MEMORY_MB = 3.0
#: What a leased card shows at least, in percent.
LEASED_MEMORY_PERCENT = 60.0
LEASED_UTILIZATION_PERCENT = 80.0
#: Seconds that a foreign job runs, or a card stays without one.
JOB_TIME = 60.0

_UNKNOWN_MEMORY_MB = 24576.0
# The first part of a name that fits decides, so the longer ones come first.
_MEMORY_MB = (
    ("RTX 4090", 24564.0),
    ("RTX 3090", 24576.0),
    ("A100 40GB", 40960.0),
    ("A100", 81920.0),
    ("H100", 81559.0),
    ("H200", 143771.0),
    ("V100", 32768.0),
    ("L40S", 46068.0),
    ("A40", 46068.0),
    ("A10", 23028.0),
    ("L4", 23034.0),
    ("T4", 15360.0),
)
_NAMESPACE = uuid.UUID("6a6b2e6c-6d5f-4f0e-9a51-8f6f0c1f4a0b")
_ITEM = re.compile(r"(?P<number>[0-9]{1,9})(?:\s*[x×]\s*(?P<model>\S(?:.*\S)?))?")


def parse_cards(text: str) -> tuple[str, ...]:
    """
    The names of the cards that ``N[xMODEL]`` items stand for: "8", "4xA100", "4xA100,2xH100".

    Raises:
        ConfigError: it is not of this form, or asks for more than 10,000 cards.
    """
    names: list[str] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None or not (match["model"] or "x").isprintable():
            raise ConfigError(f"simulated cards {text!r}: N or NxMODEL is allowed, as in 8, 4xA100 or 4xA100,2xH100")
        number = int(match["number"])
        if len(names) + number > MOST_CARDS:
            raise ConfigError(f"simulated cards {text!r}: at most {MOST_CARDS} cards are allowed")
        names += [f"Simulated {match['model'] or 'GPU'}"] * number
    return tuple(names)


def memory_of(name: str) -> float:
    """MiB of memory of a card of this name; 24 GiB if the model is not known."""
    words = re.sub(r"[-_\s]+", " ", name.upper())
    for model, memory in _MEMORY_MB:
        if re.search(rf"\b{model}\b", words):
            return memory
    return _UNKNOWN_MEMORY_MB


@attrs.frozen
class _Load:
    """What was said about one card; None: as it would be by itself."""

    memory_percent: float | None = None
    utilization_percent: float | None = None
    process: bool = True


@attrs.frozen
class _State:
    """What was said about the cards up to a moment."""

    loads: dict[int, _Load] = attrs.field(factory=dict)
    lost: frozenset[int] = frozenset()
    empty: bool = False
    leased: frozenset[str] = frozenset()


class SimulatedReader:
    """
    Cards by the names in *cards*, idle unless told otherwise.

    Args:
        name: of the host; UUIDs and identity follow from it.
        foreign: chance from 0 to 1 that a card is occupied by a job from outside; changes every minute or so.
        noise: percent points that readings of memory and utilization wander up or down at random.
        lag: seconds by which all readings are older than the truth.
        seed: of everything random.
    """

    def __init__(
        self,
        cards: Sequence[str],
        *,
        name: str,
        foreign: float = 0.0,
        noise: float = 0.0,
        lag: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = boottime,
    ) -> None:
        for value, what, high in ((foreign, "foreign", 1.0), (noise, "noise", 100.0), (lag, "lag", 86400.0)):
            if not 0.0 <= value <= high:
                raise ConfigError(f"simulated {what}={value!r}: a number from 0 to {high:g} is allowed")
        self._names = tuple(cards)
        self._foreign, self._noise, self._lag, self._seed = foreign, noise, lag, seed
        self._clock = clock
        self._begin = clock()
        self._random = random.Random(seed)  # noqa: S311 - a simulation
        self._memory = [memory_of(card) for card in self._names]
        self._uuids = [f"GPU-{uuid.uuid5(_NAMESPACE, f'{name}/{index}')}" for index in range(len(self._names))]
        self.host = HostIdentity(f"sim-{hashlib.sha256(name.encode()).hexdigest()[:24]}", name, simulated=True)
        self.description = f"{len(self._names)} simulated card{'' if len(self._names) == 1 else 's'}"
        # Guards _history: what was said about the cards, and when. The last entry that is older than the lag counts.
        self._lock = threading.Lock()
        self._history: list[tuple[float, _State]] = [(float("-inf"), _State())]

    def read(self, timeout: float) -> Sample:
        then = self._clock() - self._lag
        with self._lock:
            while len(self._history) > 1 and self._history[1][0] <= then:
                del self._history[0]
            state = self._history[0][1]
        gpus, faults = [], []
        for index in () if state.empty else range(len(self._names)):
            if index in state.lost:
                faults.append(GPUFault("GPU is lost (simulated)", index, self._uuids[index], self._names[index]))
            else:
                gpus.append(self._read_card(index, state.loads.get(index, _Load()), then, state.leased))
        return Sample(tuple(gpus), then, tuple(faults), self.host)

    def _read_card(self, index: int, load: _Load, then: float, leased: frozenset[str]) -> GPUReading:
        total = self._memory[index]
        memory, busy = self._foreign_load(index, then)
        occupied = memory > 0.0
        if load.memory_percent is not None:
            memory, busy = load.memory_percent, load.memory_percent
            occupied = load.process and memory > 0.0
        elif self._uuids[index] in leased:
            # Without a process: a lease explains it.
            memory, busy = max(memory, LEASED_MEMORY_PERCENT), max(busy, LEASED_UTILIZATION_PERCENT)
        if load.utilization_percent is not None:
            busy = load.utilization_percent
        used = max(IDLE_MEMORY_MB, round(total * memory / 100.0))
        processes = (ComputeProcess(1_000_000 + index, "somebody", used, "train.py"),) if occupied else ()
        if self._noise:
            used = min(total, max(0.0, round(used + total * self._random.uniform(-self._noise, self._noise) / 100.0)))
            busy = min(100.0, max(0.0, round(busy + self._random.uniform(-self._noise, self._noise))))
        return GPUReading(
            local_gpu_id=index,
            name=self._names[index],
            uuid=self._uuids[index],
            memory_total_mb=total,
            memory_used_mb=float(used),
            memory_usage_percent=100.0 * used / total,
            utilization_percent=float(busy),
            temperature_c=float(round(30.0 + 0.5 * busy)),
            power_draw_w=round(30.0 + 2.5 * busy, 2),
            power_limit_w=300.0,
            processes=processes,
        )

    def _foreign_load(self, index: int, then: float) -> tuple[float, float]:
        """Memory % and utilization % of the job from outside; 0, 0 if there is none."""
        if not self._foreign:
            return 0.0, 0.0
        # Each card changes at a moment of its own.
        phase = random.Random(f"{self._seed}/{index}").random()  # noqa: S311 - a simulation
        period = math.floor((then - self._begin) / JOB_TIME + phase)
        dice = random.Random(f"{self._seed}/{index}/{period}")  # noqa: S311 - a simulation
        if dice.random() >= self._foreign:
            return 0.0, 0.0
        return float(dice.randint(20, 95)), float(dice.randint(50, 100))

    def close(self) -> None:
        """Nothing to let go of."""

    # -- what happens to the cards -------------------------------------------------------------------------

    def override(
        self,
        index: int,
        *,
        memory_percent: float | None = None,
        utilization_percent: float | None = None,
        process: bool = True,
    ) -> None:
        """
        From now on (seen after the lag) the card shows this load; None: as by itself.

        Without *utilization_percent* it is as high as the memory.  With *process*, the memory belongs to a process of
        somebody outside.
        """
        for value, what in ((memory_percent, "memory_percent"), (utilization_percent, "utilization_percent")):
            if value is not None and not 0.0 <= value <= 100.0:
                raise ConfigError(f"{what}={value!r}: a number from 0 to 100 is allowed")
        load = _Load(memory_percent, utilization_percent, process)
        self._check(index)
        self._change(lambda state: attrs.evolve(state, loads={**state.loads, index: load}))

    def lose(self, index: int) -> None:
        """The card fell off the bus."""
        self._check(index)
        self._change(lambda state: attrs.evolve(state, lost=state.lost | {index}))

    def empty(self) -> None:
        """The host shows no cards any more."""
        self._change(lambda state: attrs.evolve(state, empty=True))

    def set_leased(self, uuids: Iterable[str]) -> None:
        """From now on (seen after the lag) these cards, and no others, show the load of a lease."""
        leased = frozenset(uuids)
        self._change(lambda state: attrs.evolve(state, leased=leased))

    def heal(self) -> None:
        """All cards are as they were, but for their leases."""
        self._change(lambda state: _State(leased=state.leased))

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self._names):
            raise ConfigError(f"simulated card {index}: there are {len(self._names)}, counted from 0")

    def _change(self, change: Callable[[_State], _State]) -> None:
        with self._lock:
            self._history.append((self._clock(), change(self._history[-1][1])))
