"""Cards by the program nvidia-smi, where NVML is missing.

A run that does not end is killed with all it started; one that cannot even be killed (it hangs in the driver) is left
behind, and no other is started until it is gone.
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
from typing import NoReturn

from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.devices.base import DeviceError
from gpupool_sync.devices.host import host_identity
from gpupool_sync.devices.processes import describe
from gpupool_sync.devices.visible import Mask
from gpupool_sync.models import ComputeProcess, GPUFault, GPUReading, Sample

#: Seconds that a killed run has to end.
DEATH = 0.5

_FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.used",
    "utilization.gpu",
    "temperature.gpu",
    "power.draw",
    "power.limit",
)
# Old versions do not know this one, and then refuse the whole query.
_MIG_FIELD = "mig.mode.current"
_FORMAT = "--format=csv,noheader,nounits"

# Runs that could not be killed, by pid: kept until they end, so that none becomes a zombie nor a ResourceWarning.
_abandoned: dict[int, subprocess.Popen[str]] = {}


class _LostCard(Exception):
    """str() is what nvidia-smi says in place of readings."""


class NvidiaSmiReader:
    """Runs nvidia-smi for every read: some tens of milliseconds to seconds, much of it the driver's."""

    def __init__(self, program: str = "nvidia-smi", mask: Mask | None = None) -> None:
        self.description = f"nvidia-smi ({program})"
        self._program = program
        self._mask = Mask.from_environ() if mask is None else mask
        self._mig_field = True
        self._hung: subprocess.Popen[str] | None = None
        self._hung_since = 0.0

    def read(self, timeout: float) -> Sample:
        deadline = Deadline.after(timeout)
        taken_at = boottime()
        if self._mask.hides_all:
            return Sample(gpus=(), taken_at=taken_at, host=host_identity())
        rows, faults = self._cards(deadline)
        processes = self._processes(deadline) if rows else {}
        entries: list[GPUReading | GPUFault] = [self._entry(row, processes) for row in rows]
        known = [(entry.local_gpu_id, entry.uuid) for entry in entries if entry.local_gpu_id is not None]
        visible = self._mask.choose(known, complete=not faults)
        entries = [entry for entry in entries if entry.local_gpu_id in visible]
        return Sample(
            gpus=tuple(entry for entry in entries if isinstance(entry, GPUReading)),
            taken_at=taken_at,
            # Of a card that nvidia-smi cannot open it tells neither number nor UUID, so the mask cannot judge it.
            faults=(*(entry for entry in entries if isinstance(entry, GPUFault)), *faults),
            host=host_identity(),
        )

    def close(self) -> None:
        """Nothing to let go of: every run ends with its read."""

    # -- running -------------------------------------------------------------------------------------------

    def _run(self, query: str, deadline: Deadline) -> tuple[int, str]:
        """Exit status and output; raises DeviceError if there is none in time."""
        self._check_hung()
        environ = {**os.environ, "LC_ALL": "C"}
        try:
            process = subprocess.Popen(
                [self._program, query, _FORMAT],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environ,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # a group of its own, to be killed as a whole
            )
        except OSError as exc:
            raise DeviceError(f"nvidia-smi cannot be started: {exc}") from exc
        started = boottime()
        try:
            output, _ = process.communicate(timeout=deadline.remaining())
        except BaseException as exc:
            self._kill(process, started)
            if not isinstance(exc, subprocess.TimeoutExpired):
                raise
            raise DeviceError(f"nvidia-smi: no answer for {boottime() - started:.1f} s") from None
        return process.returncode, output

    def _kill(self, process: subprocess.Popen[str], started: float) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(DEATH)
        except subprocess.TimeoutExpired:
            self._hung, self._hung_since = process, started
            _abandoned[process.pid] = process
        if process.stdout is not None:
            process.stdout.close()

    def _check_hung(self) -> None:
        if self._hung is None:
            return
        if self._hung.poll() is None:
            raise DeviceError(
                f"nvidia-smi: no answer for {boottime() - self._hung_since:.1f} s, and it cannot be killed"
            )
        _abandoned.pop(self._hung.pid, None)
        self._hung = None

    # -- reading -------------------------------------------------------------------------------------------

    def _cards(self, deadline: Deadline) -> tuple[list[list[str]], list[GPUFault]]:
        """The rows of the cards, and faults for those that nvidia-smi cannot open."""
        fields = [*_FIELDS, _MIG_FIELD] if self._mig_field else list(_FIELDS)
        status, output = self._run(f"--query-gpu={','.join(fields)}", deadline)
        if status != 0 and self._mig_field and _MIG_FIELD in output:
            self._mig_field = False
            return self._cards(deadline)
        rows, others = _parse(output, len(fields), numbered=True)
        faults = [GPUFault(line) for line in others if "lost" in line.lower() or "unable to determine" in line.lower()]
        if not rows and not faults:
            if "no devices were found" in output.lower():
                return [], []
            _refuse(status, output)
        return rows, faults

    def _processes(self, deadline: Deadline) -> dict[str, list[ComputeProcess]] | None:
        """The compute processes by the UUID of their card; None if they are not told."""
        try:
            status, output = self._run("--query-compute-apps=gpu_uuid,pid,process_name,used_gpu_memory", deadline)
        except DeviceError:
            return None
        if status != 0:
            return None
        found: dict[str, list[ComputeProcess]] = {}
        for row in _parse(output, 4, numbered=False)[0]:
            uuid, pid, name, memory = row
            if not pid.isdecimal():
                return None  # somebody computes there, but nobody can say who
            found.setdefault(uuid, []).append(describe(int(pid), _plain_number(memory), name))
        return found

    def _entry(self, row: list[str], processes: dict[str, list[ComputeProcess]] | None) -> GPUReading | GPUFault:
        index, uuid, name = int(row[0]), _known(row[1]), _known(row[2])
        try:
            total, used, busy, heat, draw, limit = (_number(text) for text in row[3:9])
        except _LostCard as exc:
            return GPUFault(str(exc), index, uuid, name)
        if total is None and used is None and busy is None:
            return GPUFault("nvidia-smi gives no readings", index, uuid, name)
        if len(row) > len(_FIELDS) and row[-1].lower() == "enabled":
            return GPUFault("MIG is enabled, and its instances can only be read by NVML", index, uuid, name)
        mine = None
        if processes is not None and uuid is not None:
            mine = tuple(processes.get(uuid, ()))
        return GPUReading(
            local_gpu_id=index,
            name=name or "unknown GPU",
            uuid=uuid,
            memory_total_mb=total or None,
            memory_used_mb=used,
            memory_usage_percent=min(100.0, 100.0 * used / total) if total and used is not None else None,
            utilization_percent=busy,
            temperature_c=heat,
            power_draw_w=draw,
            power_limit_w=limit,
            processes=mine,
        )


def _parse(output: str, columns: int, *, numbered: bool) -> tuple[list[list[str]], list[str]]:
    """Rows of so many columns (*numbered*: with a number in the first), and all other lines."""
    rows, others = [], []
    for line in output.splitlines():
        row = [item.strip() for item in next(csv.reader([line], skipinitialspace=True), [])]
        if len(row) == columns and (row[0].isdecimal() or not numbered):
            rows.append(row)
        elif line.strip():
            others.append(line.strip())
    return rows, others


def _refuse(status: int, output: str) -> NoReturn:
    said = " ".join(output.split())[:200] or "nothing"
    raise DeviceError(f"nvidia-smi ended with status {status} and said: {said}")


def _known(text: str) -> str | None:
    return None if not text or text.startswith("[") or text == "N/A" else text


def _plain_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _number(text: str) -> float | None:
    """A reading; None for "[N/A]", "[Not Supported]", "ERR!" and the like."""
    value = _plain_number(text)
    if value is None and ("lost" in text.lower() or "reset" in text.lower()):
        raise _LostCard(text.strip("[]"))
    return value
