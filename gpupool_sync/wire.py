"""JSON ⇄ models: what a statistics server says, shared by client and server.

Pure: no I/O, no clock.  The parser believes nothing.  A document that is not what it should be raises `BadAnswer`; one
bad GPU in a good document loses that GPU alone; a doubtful decoration loses that field alone.  What decides
whether a card may be granted (identity, load, processes) is never guessed.

Units are those of `models`: MiB, percent, °C, W.  A missing or null reading is None, never 0.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NoReturn, TypeGuard

import attrs

from gpupool_sync.errors import BadAnswer
from gpupool_sync.models import ComputeProcess, GPUFault, GPUReading, HostIdentity, LeaseOffer, Sample

#: Written into every summary. A higher number means additions, so it is read all the same.
PROTOCOL_VERSION = 1
#: Response header: float seconds between taking the sample and sending the answer.
AGE_HEADER = "GPU-Sample-Age"

#: Most characters of a server's text that an error or a problem quotes.
QUOTED = 80
#: Most characters of a name or reason that are kept.
LONGEST_TEXT = 256
#: Most lines in `Sample.problems`.
MOST_PROBLEMS = 50
#: Arrays and objects inside one another; our documents have 5.
DEEPEST = 64

#: What rounding may add to 100 %.
_PERCENT_SLOP = 0.5
#: 100 TiB: larger means that somebody wrote bytes.
_MOST_MEMORY_MB = 100 * 1024.0**2
_LARGEST_ID = 2**31 - 1

# UUIDs name cards to arbiters, in file names too: nothing that could mean something else there.
_UUID = re.compile(r"[A-Za-z0-9]+(?:[-_./][A-Za-z0-9]+)*")
_BRACKETS = bytes(code for code in range(256) if code not in b"[]{}")
_NUMBERS = frozenset((int, float))
_NO_READING = "the driver gives no readings"


class _Unusable(Exception):
    """The whole document cannot be used; str() is the message."""


class _Bad(Exception):
    """One entry or field cannot be used; str() is the reason."""


def parse_summary(body: bytes, *, endpoint_id: str, taken_at: float) -> Sample:
    """
    Read the body of ``/gpu/summary``, ours or the predecessor's.

    *taken_at* (`clock.boottime`) is passed on.  The HTTP status is not asked for: the body alone decides.

    Raises:
        BadAnswer: it is not a summary, or it is the report of an error.
    """
    try:
        return _read_summary(_load(body), taken_at)
    except _Unusable as exc:
        message = str(exc)
    # Outside the handler: as its context, the JSON or Unicode error would keep the whole body alive.
    raise BadAnswer(endpoint_id, message)


# --- JSON ---------------------------------------------------------------------------------------------


def _load(body: bytes) -> dict[str, Any]:
    """Parse strictly: UTF-8 without a byte order mark, finite numbers, bounded depth, an object on top."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise _Unusable(f"not UTF-8 (byte {exc.start} of {len(body)})") from None
    start = text.lstrip(" \t\r\n")
    if not start:
        raise _Unusable("an empty answer")
    if start[0] == "\ufeff":
        # RFC 8259 forbids writing one; only a file served by something else has it.
        raise _Unusable("starts with a byte order mark, not with JSON")
    if start[0] == "<":
        raise _Unusable(f"an HTML or XML page, not JSON: {_quote(start)}")
    _check_depth(body)
    try:
        # Mostly numbers are short, and reading them need not call us back.
        decoder = _DECODER if _LONG_RUN in body.translate(_DIGITS_ALONE) else _SHORT_DECODER
        document = decoder.decode(text)
    except json.JSONDecodeError as exc:
        where = f"{exc.msg} at character {exc.pos} of {len(text)}"
        raise _Unusable(f"not JSON ({where}): {_quote(start)}") from None
    except RecursionError:  # the caller's stack is nearly used up
        raise _Unusable("nested too deeply") from None
    if not isinstance(document, dict):
        raise _Unusable(f"{_quote(document)} instead of an object")
    return document


def _check_depth(body: bytes) -> None:
    """
    Refuse deep nesting before the parser recurses into it.

    Its own guard is the interpreter's recursion limit, which programs raise until the C stack overflows.
    """
    if body.count(b"[") + body.count(b"{") <= DEEPEST:
        return
    # Outside of strings only: without escapes, every other piece between quotes is outside.
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(None, delete=_BRACKETS)
    if max(accumulate(1 if ch in b"[{" else -1 for ch in brackets), default=0) > DEEPEST:
        raise _Unusable("nested too deeply")


def _parse_constant(name: str) -> NoReturn:
    raise _Unusable(f"{name} is not JSON")


def _parse_int(digits: str) -> int:
    # Python's own limit of 4300 digits is a plain ValueError, may be off, and came with 3.10.7.
    if len(digits) > 20:
        raise _Unusable(f"a number of {len(digits)} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _Unusable(f"the number {_quote(digits)} is too large")
    return number


_DECODER = json.JSONDecoder(parse_constant=_parse_constant, parse_int=_parse_int, parse_float=_parse_float)
#: Where no number has as many digits as `_parse_int` refuses.
_SHORT_DECODER = json.JSONDecoder(parse_constant=_parse_constant, parse_float=_parse_float)
_LONG_RUN = b"0" * 20
_DIGITS_ALONE = bytes(ord("0") if chr(byte) in "0123456789" else ord(" ") for byte in range(256))


def _quote(value: object) -> str:
    """A server's value for people: short, escaped, on one line."""
    if isinstance(value, str):
        text = ascii(value[:QUOTED])
        return text if len(text) <= QUOTED + 2 and len(value) <= QUOTED else text[: QUOTED + 1] + "…"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    return str(value).lower()  # true, false, numbers


def _clean(text: str) -> str:
    """A name or reason that can be printed anywhere: one line, no control characters, capped."""
    if not text.isprintable():
        # Also drops what turns the writing direction around, and lone surrogates, which cannot be printed.
        text = "".join(ch if ch.isprintable() else " " if ch.isspace() else "" for ch in text)
    text = text.strip()
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


# --- reading ------------------------------------------------------------------------------------------


class _Problems:
    """Collects lines for `Sample.problems`, and only counts when there are too many."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = 0

    def add(self, line: str) -> None:
        if len(self._lines) < MOST_PROBLEMS - 1:
            self._lines.append(line)
        else:
            self._more += 1

    def lines(self) -> tuple[str, ...]:
        return (*self._lines, f"and {self._more} more problems") if self._more else tuple(self._lines)


def _read_summary(document: dict[str, Any], taken_at: float) -> Sample:
    error = document.get("error")
    if error is not None:
        # The predecessor says so with status 200 and "gpu_count": 0, which is not the same as having no GPUs.
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            error = error["message"]
        raise _Unusable(f"the server reports an error: {_quote(error)}")
    entries = document.get("gpus_summary")
    if not isinstance(entries, list):
        if "gpus_summary" in document:
            raise _Unusable(f"gpus_summary is {_quote(entries)} instead of a list")
        detail = document.get("detail")
        says = f"; it says {_quote(detail)}" if isinstance(detail, str) else ""
        raise _Unusable(f"not a GPU summary: gpus_summary is missing{says}")

    problems = _Problems()
    leases = _read_leases(document.get("leases"))
    protocol = document.get("protocol")
    if protocol is not None:
        if not _is_int(protocol) or protocol < 1:
            problems.add(f"protocol is {_quote(protocol)} instead of a whole number of at least 1")
            protocol = None
        elif protocol > PROTOCOL_VERSION:
            problems.add(f"the server speaks protocol {protocol}, this program {PROTOCOL_VERSION}")
    count = document.get("gpu_count")
    if count is not None and (not _is_int(count) or count != len(entries)):
        problems.add(f"gpu_count is {_quote(count)}, but {len(entries)} GPUs are listed")
    timestamp = document.get("timestamp")
    unavailable = _read_unavailable(document.get("gpus_unavailable"), problems)
    # The predecessor writes 0 for what nvidia-smi does not tell, so no memory at all means that none is known.
    blind = "protocol" not in document and document.get("total_memory_mb") == 0 and bool(entries)
    if blind:
        problems.add("total_memory_mb is 0: the memory of these GPUs is not known")
    gpus, faults = _read_gpus(entries, unavailable, blind, problems)
    return Sample(
        gpus=gpus,
        taken_at=taken_at,
        faults=faults + unavailable,
        host=_read_host(document.get("host"), problems),
        leases=leases,
        protocol=protocol,
        timestamp=_clean(timestamp) if isinstance(timestamp, str) else None,
        problems=problems.lines(),
    )


@attrs.define
class _Entry:
    """What is known of one entry of ``gpus_summary``."""

    number: int
    local_gpu_id: int | None = None
    uuid: str | None = None
    name: str | None = None
    reading: GPUReading | None = None
    fault: str | None = None  # the reason


def _read_gpus(
    entries: list[Any], unavailable: tuple[GPUFault, ...], blind: bool, problems: _Problems
) -> tuple[tuple[GPUReading, ...], tuple[GPUFault, ...]]:
    read = [_read_entry(number, entry, blind, problems) for number, entry in enumerate(entries)]
    ids = Counter(entry.local_gpu_id for entry in read if entry.local_gpu_id is not None)
    uuids = Counter(entry.uuid for entry in read if entry.uuid is not None)
    lost_ids = {fault.local_gpu_id for fault in unavailable if fault.local_gpu_id is not None}
    lost_uuids = {fault.uuid for fault in unavailable if fault.uuid is not None}
    gpus, faults = [], []
    for entry in read:
        what = f"GPU entry {entry.number}"
        if entry.local_gpu_id in lost_ids or entry.uuid in lost_uuids:
            # Its fault is there already, with the server's reason.
            problems.add(f"{what} is listed as unavailable as well")
            continue
        # Of two cards by one name, nobody knows which one a lease would be for: neither is granted.
        if entry.local_gpu_id is not None and ids[entry.local_gpu_id] > 1:
            entry.fault = f"gpu_id {entry.local_gpu_id} is listed {ids[entry.local_gpu_id]} times"
        elif entry.uuid is not None and uuids[entry.uuid] > 1:
            entry.fault = f"uuid {entry.uuid} is listed {uuids[entry.uuid]} times"
        if entry.fault is None and entry.reading is not None:
            gpus.append(entry.reading)
        else:
            reason = entry.fault or "unreadable"
            problems.add(f"{what}: {reason}")
            faults.append(GPUFault(reason, entry.local_gpu_id, entry.uuid, entry.name))
    return tuple(gpus), tuple(faults)


def _read_entry(number: int, raw: object, blind: bool, problems: _Problems) -> _Entry:
    entry = _Entry(number)
    if not isinstance(raw, dict):
        entry.fault = f"{_quote(raw)} instead of an object"
        return entry
    name = raw.get("name")
    if isinstance(name, str):
        entry.name = _clean(name)
    # Both are read even if one is bad: a fault should name its card as well as it can.
    try:
        entry.local_gpu_id = _read_id(raw)
    except _Bad as exc:
        entry.fault = str(exc)
    try:
        entry.uuid = _read_uuid(raw)
    except _Bad as exc:
        entry.fault = entry.fault or str(exc)
    if entry.fault is not None or entry.local_gpu_id is None:
        return entry
    notes: list[str] = []
    try:
        entry.reading = _read_reading(raw, entry.local_gpu_id, entry, blind, notes)
    except _Bad as exc:
        entry.fault = str(exc)
    for note in notes:
        problems.add(f"GPU entry {number}: {note}")
    return entry


def _read_id(raw: dict[str, Any]) -> int:
    value = raw.get("gpu_id")
    if value is None:
        raise _Bad("gpu_id is missing")
    if not _is_int(value) or not 0 <= value <= _LARGEST_ID:
        raise _Bad(f"gpu_id is {_quote(value)} instead of a whole number of at least 0")
    return value


def _read_uuid(raw: dict[str, Any]) -> str | None:
    value = raw.get("uuid")
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > 128 or not _UUID.fullmatch(value):
        raise _Bad(f"uuid is {_quote(value)}, which is not a UUID")
    return value


def _read_reading(raw: dict[str, Any], local_gpu_id: int, entry: _Entry, blind: bool, notes: list[str]) -> GPUReading:
    """The reading, with what cost a field in *notes*; raises _Bad if the card must not be granted."""
    numbers = _all_numbers(raw)
    if numbers is None:  # one of them is bad
        numbers = [_number(raw, *ruled) for ruled in _RULED] + [_decoration(raw, *each, notes) for each in _DECORATIONS]
    total, used, percent, busy, temperature, draw, limit = numbers
    if percent is not None and percent > 100.0:
        percent = 100.0
    if busy is not None and busy > 100.0:
        busy = 100.0
    if total == 0.0:
        raise _Bad("memory_total_mb is 0")
    if total is not None and used is not None:
        if used > total * 1.005 + 1.0:
            raise _Bad(f"memory_used_mb is {used:g} of {total:g}")
        if percent is None:
            percent = min(100.0, round(100.0 * used / total, 2))
    elif blind and not percent:
        percent = None
    if percent is None and used is None and busy is None:
        raise _Bad(f"lost: {_NO_READING}")
    if not entry.name:
        notes.append("name is missing")
    return GPUReading(
        local_gpu_id=local_gpu_id,
        name=entry.name or "unknown GPU",
        uuid=entry.uuid,
        memory_total_mb=total,
        memory_used_mb=used,
        memory_usage_percent=percent,
        utilization_percent=busy,
        temperature_c=temperature,
        power_draw_w=draw,
        power_limit_w=limit,
        processes=_read_processes(raw.get("processes"), notes),
        leased=_read_leased(raw.get("leased"), notes),
    )


def _read_leased(raw: object, notes: list[str]) -> bool | None:
    """Only where to ask first depends on it, so a bad one is dropped."""
    if raw is None or isinstance(raw, bool):
        return raw
    notes.append(f"leased is {_quote(raw)} instead of true, false or null")
    return None


def _read_processes(raw: object, notes: list[str]) -> tuple[ComputeProcess, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, list):
        raise _Bad(f"processes is {_quote(raw)} instead of a list")
    return tuple(_read_process(item, notes) for item in raw)


def _read_process(raw: object, notes: list[str]) -> ComputeProcess:
    if not isinstance(raw, dict):
        raise _Bad(f"a process is {_quote(raw)} instead of an object")
    pid = raw.get("pid")
    if pid is not None and (not _is_int(pid) or not 0 <= pid <= _LARGEST_ID):
        raise _Bad(f"the pid of a process is {_quote(pid)} instead of a whole number")
    texts: dict[str, str | None] = {}
    for key in ("user", "name"):
        value = raw.get(key)
        texts[key] = (_clean(value) or None) if isinstance(value, str) else None
        if value is not None and not isinstance(value, str):
            notes.append(f"the {key} of a process is {_quote(value)} instead of a text")
    memory = _number(raw, "memory_mb", 0.0, _MOST_MEMORY_MB)
    return ComputeProcess(pid=pid, user=texts["user"], memory_mb=memory, name=texts["name"])


def _read_unavailable(raw: object, problems: _Problems) -> tuple[GPUFault, ...]:
    """Cards that the server itself cannot read; whatever is known of one is enough to say so."""
    if raw is None:
        return ()
    if not isinstance(raw, list):
        problems.add(f"gpus_unavailable is {_quote(raw)} instead of a list")
        return ()
    faults = []
    for number, item in enumerate(raw):
        known = item if isinstance(item, dict) else {}
        local_gpu_id = uuid = None
        if known is not item:
            problems.add(f"unavailable GPU {number}: {_quote(item)} instead of an object")
        try:
            local_gpu_id = _read_id(known) if known.get("gpu_id") is not None else None
        except _Bad as exc:
            problems.add(f"unavailable GPU {number}: {exc}")
        try:
            uuid = _read_uuid(known)
        except _Bad as exc:
            problems.add(f"unavailable GPU {number}: {exc}")
        name, reason = known.get("name"), known.get("reason")
        faults.append(
            GPUFault(
                (_clean(reason) if isinstance(reason, str) else "") or "unavailable, says the server",
                local_gpu_id,
                uuid,
                (_clean(name) or None) if isinstance(name, str) else None,
            )
        )
    return tuple(faults)


def _read_host(raw: object, problems: _Problems) -> HostIdentity | None:
    """The machine's identity; None if it is not told or doubtful, so that no card is taken for a local one."""
    if raw is None:
        return None
    try:
        if not isinstance(raw, dict):
            raise _Bad(_quote(raw))
        host_id, name, simulated = raw.get("id"), raw.get("name"), raw.get("simulated", False)
        if (
            not isinstance(host_id, str)
            or not 1 <= len(host_id) <= LONGEST_TEXT
            or not host_id.isprintable()
            or host_id != host_id.strip()
        ):
            raise _Bad(f"its id is {_quote(host_id)}")
        if not isinstance(simulated, bool):
            raise _Bad(f"simulated is {_quote(simulated)}")
        return HostIdentity(host_id, (_clean(name) if isinstance(name, str) else "") or host_id, simulated)
    except _Bad as exc:
        problems.add(f"host is not usable: {exc}")
        return None


def _read_leases(raw: object) -> LeaseOffer | None:
    """
    Whether and how the server grants leases.

    A doubtful offer condemns the whole answer: taken for none, its cards would get a second arbiter.
    """
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise _Unusable(f"leases is {_quote(raw)} instead of an object or null")
    version, lock_dir = raw.get("version"), raw.get("lock_dir")
    if not _is_int(version) or version < 1:
        raise _Unusable(f"the version of leases is {_quote(version)} instead of a whole number of at least 1")
    if lock_dir is not None and (
        not isinstance(lock_dir, str)
        or not lock_dir.startswith("/")
        or len(lock_dir) > 4096
        or not lock_dir.isprintable()
    ):
        raise _Unusable(f"the lock_dir of leases is {_quote(lock_dir)} instead of an absolute path")
    directory = raw.get("lock_dir_id")
    if directory is not None and (
        not isinstance(directory, str) or not 0 < len(directory) <= 100 or not directory.isprintable()
    ):
        raise _Unusable(f"the lock_dir_id of leases is {_quote(directory)} instead of a short text")
    return LeaseOffer(version, lock_dir, directory)


def _is_int(value: object) -> TypeGuard[int]:
    # In Python, true is 1.
    return isinstance(value, int) and not isinstance(value, bool)


def _number(raw: dict[str, Any], key: str, low: float, high: float) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    # Of exactly these types is what comes out of JSON; true would be 1 to isinstance.
    if type(value) in _NUMBERS and low <= value <= high:
        return float(value + 0.0)  # no -0.0
    raise _Bad(f"{key} is {_quote(value)}")


def _all_numbers(raw: dict[str, Any]) -> list[float | None] | None:
    """What `_number` says to each of the fields of a reading; None: one of them is bad."""
    found: list[float | None] = []
    for key, low, high in _FIELDS:
        value = raw.get(key)
        if value is not None:
            if type(value) not in _NUMBERS or not low <= value <= high:
                return None
            value += 0.0
        found.append(value)
    return found


def _decoration(raw: dict[str, Any], key: str, low: float, high: float, notes: list[str]) -> float | None:
    """A number that nothing is decided by, so a bad one is only dropped."""
    try:
        return _number(raw, key, low, high)
    except _Bad as exc:
        notes.append(str(exc))
        return None


#: The numbers of a reading, and between what they lie.
_RULED = (
    ("memory_total_mb", 0.0, _MOST_MEMORY_MB),
    ("memory_used_mb", 0.0, _MOST_MEMORY_MB),
    ("memory_usage_percent", 0.0, 100.0 + _PERCENT_SLOP),
    ("utilization_percent", 0.0, 100.0 + _PERCENT_SLOP),
)
_DECORATIONS = (("temperature_c", -273.15, 1e6), ("power_draw_w", 0.0, 1e6), ("power_limit_w", 0.0, 1e6))
_FIELDS = _RULED + _DECORATIONS


# --- writing ------------------------------------------------------------------------------------------


def summary_document(sample: Sample, *, timestamp: str | None) -> dict[str, Any]:
    """
    The content of ``/gpu/summary``: the predecessor's fields exactly, then ours.

    Cards without any reading go to ``gpus_unavailable``: in ``gpus_summary`` they would break old clients.  Percent
    are rounded to 2 decimals; what is unknown is null.
    """
    gpus = [gpu for gpu in sample.gpus if _has_reading(gpu)]
    silent = [
        GPUFault(_NO_READING, gpu.local_gpu_id, gpu.uuid, gpu.name) for gpu in sample.gpus if not _has_reading(gpu)
    ]
    total = sum(gpu.memory_total_mb or 0.0 for gpu in gpus)
    used = sum(gpu.memory_used_mb or 0.0 for gpu in gpus)
    busy = [gpu.utilization_percent for gpu in gpus if gpu.utilization_percent is not None]
    document: dict[str, Any] = {
        "gpu_count": len(gpus),
        "total_memory_mb": _plain(round(total, 2)),
        "total_used_memory_mb": _plain(round(used, 2)),
    }
    if gpus:
        # Over the cards of which both are known, or a card of unknown use would count as empty.
        both = [
            (gpu.memory_used_mb, gpu.memory_total_mb)
            for gpu in gpus
            if gpu.memory_used_mb is not None and gpu.memory_total_mb
        ]
        whole = sum(pair[1] for pair in both)
        share = min(100.0, round(100.0 * sum(pair[0] for pair in both) / whole, 2)) if both else None
        document["total_memory_usage_percent"] = share
    average = _plain(round(sum(busy) / len(busy), 2)) if busy else None
    document["average_utilization_percent"] = average if gpus else 0
    document["gpus_summary"] = [
        {
            "gpu_id": gpu.local_gpu_id,
            "name": gpu.name,
            "memory_usage_percent": _rounded(_memory_percent(gpu)),
            "utilization_percent": _plain(_rounded(gpu.utilization_percent)),
            "uuid": gpu.uuid,
            "memory_total_mb": _plain(gpu.memory_total_mb),
            "memory_used_mb": _plain(gpu.memory_used_mb),
            "temperature_c": _plain(gpu.temperature_c),
            "power_draw_w": _plain(gpu.power_draw_w),
            "power_limit_w": _plain(gpu.power_limit_w),
            "processes": _processes(gpu),
            "leased": gpu.leased,
        }
        for gpu in gpus
    ]
    document["timestamp"] = timestamp
    document["protocol"] = PROTOCOL_VERSION
    document["host"] = None
    if sample.host is not None:
        document["host"] = {"id": sample.host.id, "name": sample.host.name, "simulated": sample.host.simulated}
    document["leases"] = attrs.asdict(sample.leases) if sample.leases is not None else None
    document["gpus_unavailable"] = [_fault(fault) for fault in (*sample.faults, *silent)]
    return document


def stats_document(sample: Sample, *, timestamp: str | None) -> dict[str, Any]:
    """The content of ``/gpu/stats``: the predecessor's fields exactly, then ours; what is unknown is null."""
    gpus = [gpu for gpu in sample.gpus if _has_reading(gpu)]
    return {
        "gpu_count": len(gpus),
        "gpus": [
            {
                "gpu_id": gpu.local_gpu_id,
                "name": gpu.name,
                "memory": {
                    "total_mb": _plain(gpu.memory_total_mb),
                    "used_mb": _plain(gpu.memory_used_mb),
                    "free_mb": _plain(gpu.memory_free_mb),
                    "usage_percent": _rounded(_memory_percent(gpu)),
                },
                "utilization_percent": _plain(_rounded(gpu.utilization_percent)),
                "temperature_c": _plain(gpu.temperature_c),
                "power": {"draw_w": _plain(gpu.power_draw_w), "limit_w": _plain(gpu.power_limit_w)},
                "uuid": gpu.uuid,
                "processes": _processes(gpu),
            }
            for gpu in gpus
        ],
        "timestamp": timestamp,
    }


def count_document(sample: Sample, *, timestamp: str | None) -> dict[str, Any]:
    """The content of ``/gpu/count``; it counts the cards that ``/gpu/summary`` lists."""
    return {"gpu_count": sum(map(_has_reading, sample.gpus)), "timestamp": timestamp}


def error_document(code: str, message: str) -> dict[str, Any]:
    """An error of the lease API: *code* for programs, *message* for people."""
    return {"error": {"code": code, "message": message}}


def load_document(body: bytes) -> dict[str, Any]:
    """
    Parse the body of a request or an answer of the lease API, as strictly as a summary.

    Raises:
        BadAnswer: it is not JSON, or not an object.
    """
    try:
        return _load(body)
    except _Unusable as exc:
        message = str(exc)
    raise BadAnswer("", message)


def error_message(document: Mapping[str, Any]) -> str | None:
    """What an error document says, fit for a screen; None if it is none."""
    error = document.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    return _clean(error) if isinstance(error, str) else None


def clean_text(text: str) -> str:
    """Somebody else's text on one line, without control characters, capped."""
    return _clean(text)


def failure_document(message: str, timestamp: str | None) -> dict[str, Any]:
    """What stands in for a summary when the cards cannot be read at all; the predecessor sends it with status 200."""
    return {"error": message, "gpu_count": 0, "gpus": [], "timestamp": timestamp}


def dump(document: object) -> bytes:
    """
    *document* as compact JSON in ASCII, which any JSON parser reads.

    Raises:
        ValueError: it has a NaN or an infinity, which JSON cannot say.
    """
    return _ENCODER.encode(document).encode("ascii")


#: Made once: `json.dumps` makes one for each call that wants it compact.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _has_reading(gpu: GPUReading) -> bool:
    readings = (gpu.memory_usage_percent, gpu.memory_used_mb, gpu.utilization_percent)
    return any(value is not None for value in readings)


def _memory_percent(gpu: GPUReading) -> float | None:
    if gpu.memory_usage_percent is not None:
        return gpu.memory_usage_percent
    if gpu.memory_used_mb is None or not gpu.memory_total_mb:
        return None
    return min(100.0, 100.0 * gpu.memory_used_mb / gpu.memory_total_mb)


def _rounded(percent: float | None) -> float | None:
    return None if percent is None else round(percent, 2)


def _plain(number: float | None) -> float | int | None:
    """Whole numbers without ``.0``, as the predecessor writes them."""
    if number is None or not float(number).is_integer():
        return number
    return int(number)


def _processes(gpu: GPUReading) -> list[dict[str, Any]] | None:
    if gpu.processes is None:
        return None
    return [
        {"pid": item.pid, "user": item.user, "memory_mb": _plain(item.memory_mb), "name": item.name}
        for item in gpu.processes
    ]


def _fault(fault: GPUFault) -> dict[str, Any]:
    return {
        "gpu_id": fault.local_gpu_id,
        "name": fault.name,
        "uuid": fault.uuid,
        "reason": fault.reason,
    }
