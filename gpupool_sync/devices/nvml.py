"""Cards by NVML, the driver's own library.

One sick card must harm no other, and some calls into the driver of a sick card never return: each card is asked on
a daemon thread of its own.  A thread that does not come back is reported as a fault of its card and left alone; the
card is asked again when the call has returned.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs

from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.devices.base import DeviceError
from gpupool_sync.devices.host import host_identity
from gpupool_sync.devices.processes import describe
from gpupool_sync.devices.visible import Mask
from gpupool_sync.models import ComputeProcess, GPUFault, GPUReading, Sample
from gpupool_sync.starting import start

logger = logging.getLogger(__name__)

#: Seconds that a card which has answered before may take. The first answer may take longer: without persistence mode
#: the driver starts the card for it.
PATIENCE = 3.0
#: Seconds that closing waits for the driver.
LAST_PATIENCE = 1.0

#: ``local_gpu_id`` of MIG instance i of card p is MIG_BASE + MIG_PER_CARD × p + i, with i as in ``nvidia-smi -L``.
#: Instances keep their id as long as the card is not partitioned anew, and never have the id of a whole card.
MIG_BASE = 1000
MIG_PER_CARD = 100

_MIB = 1024 * 1024

# Errors that concern one field: it is None, the card is fine.
_FIELD_ERRORS = (
    "NVMLError_NotSupported",
    "NVMLError_FunctionNotFound",
    "NVMLError_ArgumentVersionMismatch",
    "NVMLError_InvalidArgument",
    "NVMLError_NoPermission",
    "NVMLError_NotFound",
    "NVMLError_NoData",
    "NVMLError_NotReady",
    "NVMLError_InvalidState",
    "NVMLError_InsufficientSize",
    "NVMLError_Deprecated",
)
# Errors that say that the library must be initialised again: the driver was reloaded or updated.
_STALE_ERRORS = ("NVMLError_Uninitialized", "NVMLError_DriverNotLoaded", "NVMLError_LibRmVersionMismatch")

Result = tuple["GPUReading | GPUFault", ...]


class _Worker:
    """
    A daemon thread that runs one job at a time and may never come back from it.

    The thread starts with the first job.
    """

    def __init__(self, name: str, done: threading.Condition) -> None:
        self._name = name
        # Shared by all workers of a reader.  Guards what is below; never held during a job.
        self._changed = done
        self._job: Callable[[], Any] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self.since = 0.0  # boottime at which the present job was handed over
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None

    def is_idle(self) -> bool:
        return self._job is None

    def hand_over_locked(self, job: Callable[[], Any]) -> None:
        self._job = job
        self.result = self.error = None
        self.since = boottime()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            start(self._thread)
        self._changed.notify_all()

    def close_locked(self) -> None:
        self._closed = True
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._job is None and not self._closed:
                    self._changed.wait()
                job = self._job
            if job is None:
                return
            result, error = None, None
            try:
                result = job()
            except BaseException as exc:  # a worker that died would look like a hung card for ever
                error = exc
            with self._changed:
                self.result, self.error = result, error
                self._job = None
                self._changed.notify_all()
            del job, result, error

    def join(self, timeout: float) -> None:
        if self._thread is not None and not self.busy:
            self._thread.join(timeout)


@attrs.define
class _Card:
    """What is remembered of one card between reads; touched by its worker and by the reading thread in turns."""

    index: int
    worker: _Worker
    handle: Any = None
    uuid: str | None = None
    name: str | None = None
    answered: bool = False


class NvmlReader:
    """
    Reads the cards of this machine by NVML.

    The library is initialised at the first read, and again when the driver was reloaded.
    """

    def __init__(self, nvml: Any = None, mask: Mask | None = None) -> None:
        self.description = "NVML"
        self._nvml = nvml
        self._mask = Mask.from_environ() if mask is None else mask
        self._changed = threading.Condition()
        self._driver = _Worker("gpupool-nvml", self._changed)
        self._cards: list[_Card] | None = None  # None: to be initialised
        self._stale = False
        self._closed = False

    # -- the whole -----------------------------------------------------------------------------------------

    def read(self, timeout: float) -> Sample:
        deadline = Deadline.after(timeout)
        taken_at = boottime()
        if self._mask.hides_all:
            return Sample(gpus=(), taken_at=taken_at, host=host_identity())
        if self._stale or self._cards is None:
            self._initialise(deadline)
        answers = self._ask(self._cards or [], deadline)
        if self._stale:  # the driver was reloaded since the last read
            self._initialise(deadline)
            answers = self._ask(self._cards or [], deadline)
        gpus: list[GPUReading] = []
        faults: list[GPUFault] = []
        for entry in self._visible(self._cards or [], answers):
            if isinstance(entry, GPUReading):
                gpus.append(entry)
            else:
                faults.append(entry)
        return Sample(tuple(gpus), taken_at, tuple(faults), host_identity())

    def _initialise(self, deadline: Deadline) -> None:
        with self._changed:
            self._check_open_locked()
            if not self._driver.busy:
                self._driver.hand_over_locked(self._start_library)
            self._changed.wait_for(self._driver.is_idle, deadline.remaining())
            if self._driver.busy:
                raise DeviceError(f"NVML: no answer from the driver for {boottime() - self._driver.since:.1f} s")
            count, error = self._driver.result, self._driver.error
        if error is not None:
            raise DeviceError(f"NVML: {error}") from error
        # Threads that hang on the old cards are left to themselves; the new cards get new ones.
        for card in self._cards or []:
            with self._changed:
                card.worker.close_locked()
        self._cards = [_Card(index, _Worker(f"gpupool-nvml-{index}", self._changed)) for index in range(count)]
        self._stale = False

    def _check_open_locked(self) -> None:
        # After close() no thread may be started any more.
        if self._closed:
            raise DeviceError("NVML: the reader is closed")

    def _start_library(self) -> int:
        if self._nvml is None:
            import pynvml

            self._nvml = pynvml
        if self._stale:
            # What was initialised before is of a driver that is gone.
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as exc:
                logger.debug("nvmlShutdown: %s", exc)
        self._nvml.nvmlInit()
        return int(self._nvml.nvmlDeviceGetCount())

    def _ask(self, cards: list[_Card], deadline: Deadline) -> dict[int, Result]:
        """The answers of all cards that answer in time, faults of the others."""
        asked = []
        with self._changed:
            self._check_open_locked()
            for card in cards:
                if not card.worker.busy:
                    card.worker.hand_over_locked(partial(self._read_card, card))
                    asked.append(card)
            for card in asked:
                # A new card may take all the time there is.
                patience = max(0.0, card.worker.since + PATIENCE - boottime()) if card.answered else math.inf
                self._changed.wait_for(card.worker.is_idle, deadline.within(patience))
            answers: dict[int, Result] = {}
            for card in cards:
                worker = card.worker
                if worker.busy:
                    reason = f"no answer from the driver for {boottime() - worker.since:.1f} s"
                    answers[card.index] = (GPUFault(reason, card.index, card.uuid, card.name),)
                elif worker.error is not None:
                    answers[card.index] = (self._fault(card, worker.error),)
                else:
                    card.answered = True
                    answers[card.index] = worker.result
        return answers

    def _fault(self, card: _Card, error: BaseException) -> GPUFault:
        if isinstance(error, self._errors(_STALE_ERRORS)):
            self._stale = True
        if isinstance(error, self._nvml.NVMLError):
            reason = str(error)
        else:
            reason = f"reading it broke: {type(error).__name__}: {error}"
        # The handle may be of before the loss; the next read asks for a new one.
        card.handle = None
        return GPUFault(reason, card.index, card.uuid, card.name)

    def _visible(self, cards: list[_Card], answers: dict[int, Result]) -> list[GPUReading | GPUFault]:
        everything = [(card, entry) for card in cards for entry in answers[card.index]]
        if self._mask.by_instance:
            # Numbered here, since a fault may have no number of its own.
            complete = all(isinstance(entry, GPUReading) for _, entry in everything)
            uuids = [(number, entry.uuid) for number, (_, entry) in enumerate(everything)]
            chosen = self._mask.choose(uuids, complete=complete)
            return [entry for number, (_, entry) in enumerate(everything) if number in chosen]
        complete = all(card.uuid is not None for card in cards)
        visible = self._mask.choose(((card.index, card.uuid) for card in cards), complete=complete)
        return [entry for card, entry in everything if card.index in visible]

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            workers = [card.worker for card in self._cards or []]
            hung = self._driver.busy or any(worker.busy for worker in workers)
            # With a call under way, a shutdown would wait for it, or pull the library away under it.
            if self._cards is not None and not hung:
                self._driver.hand_over_locked(self._nvml.nvmlShutdown)
                self._changed.wait_for(self._driver.is_idle, LAST_PATIENCE)
            for worker in (*workers, self._driver):
                worker.close_locked()
        for worker in (*workers, self._driver):
            worker.join(LAST_PATIENCE)

    # -- one card, on its own thread -----------------------------------------------------------------------

    def _errors(self, names: tuple[str, ...]) -> tuple[type[BaseException], ...]:
        # By name: older and newer pynvml lack some of them.
        return tuple(getattr(self._nvml, name) for name in names if hasattr(self._nvml, name))

    def _read_card(self, card: _Card) -> Result:
        nvml = self._nvml
        if card.handle is None:
            card.handle = nvml.nvmlDeviceGetHandleByIndex(card.index)
            card.uuid = _text(nvml.nvmlDeviceGetUUID(card.handle))
            card.name = _text(nvml.nvmlDeviceGetName(card.handle))
        instances = self._instances(card.handle)
        if instances is None:
            return (self._read_device(card.handle, card.index, card.uuid, card.name or "unknown GPU"),)
        if not instances:
            # CUDA cannot use such a card as a whole either.
            return (GPUFault("MIG is enabled, but the card has no instances", card.index, card.uuid, card.name),)
        return tuple(self._read_instance(card, number, handle) for number, handle in instances)

    def _instances(self, handle: Any) -> list[tuple[int, Any]] | None:
        """The MIG instances with their numbers; None if the card is not partitioned."""
        nvml = self._nvml
        mode = self._field(lambda: nvml.nvmlDeviceGetMigMode(handle))
        if not mode or not mode[0]:
            return None
        instances = []
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            instance = self._field(partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number))
            if instance is not None:
                instances.append((number, instance))
        return instances

    def _read_instance(self, card: _Card, number: int, handle: Any) -> GPUReading:
        uuid = _text(self._nvml.nvmlDeviceGetUUID(handle))
        name = self._field(lambda: _text(self._nvml.nvmlDeviceGetName(handle))) or f"{card.name} MIG"
        return self._read_device(handle, MIG_BASE + MIG_PER_CARD * card.index + number, uuid, name, instance=True)

    def _read_device(
        self, handle: Any, local_gpu_id: int, uuid: str | None, name: str, *, instance: bool = False
    ) -> GPUReading:
        nvml = self._nvml
        memory = self._field(lambda: self._memory(handle))
        total, used = (memory.total, memory.used) if memory is not None else (None, None)
        percent = min(100.0, 100.0 * used / total) if total and used is not None else None
        # The driver tells no utilization of an instance, only of the card that it is a part of.
        busy = None if instance else self._field(lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        return GPUReading(
            local_gpu_id=local_gpu_id,
            name=name,
            uuid=uuid,
            # Whole MiB, cut off, as nvidia-smi prints them.
            memory_total_mb=float(total // _MIB) if total else None,
            memory_used_mb=float(used // _MIB) if total and used is not None else None,
            memory_usage_percent=percent,
            utilization_percent=busy,
            temperature_c=self._field(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            power_draw_w=self._field(lambda: round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0, 2)),
            power_limit_w=self._field(lambda: round(nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000.0, 2)),
            processes=self._field(lambda: self._processes(handle)),
        )

    def _field(self, read: Callable[[], Any]) -> Any:
        """What *read* returns; None if the card, the driver or pynvml does not have this reading."""
        missing: tuple[type[BaseException], ...] = (AttributeError, *self._errors(_FIELD_ERRORS))
        try:
            return read()
        except missing:
            return None

    def _memory(self, handle: Any) -> Any:
        # Version 2 counts what the driver reserves for itself apart from `used`, as nvidia-smi does.
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        if version is not None:
            memory = self._field(lambda: self._nvml.nvmlDeviceGetMemoryInfo(handle, version=version))
            if memory is not None:
                return memory
        return self._nvml.nvmlDeviceGetMemoryInfo(handle)

    def _processes(self, handle: Any) -> tuple[ComputeProcess, ...]:
        return tuple(
            describe(process.pid, None if process.usedGpuMemory is None else float(process.usedGpuMemory // _MIB))
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        )


def _text(value: str | bytes) -> str:
    # Old versions of pynvml return bytes.
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
