"""What the parser believes, what it refuses, and that the server's words come back as they were said."""

from __future__ import annotations

import json
import sys

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpupool_sync import wire
from gpupool_sync.errors import BadAnswer
from gpupool_sync.models import (
    ComputeProcess,
    GPUFault,
    GPUReading,
    HostIdentity,
    LeaseOffer,
    Sample,
)


def predecessor(**changes):
    """An answer of the predecessor's server."""
    return {
        "gpu_count": 2,
        "total_memory_mb": 20480,
        "total_used_memory_mb": 4096,
        "average_utilization_percent": 17.5,
        "gpus_summary": [
            {"gpu_id": 0, "name": "RTX 3080", "memory_usage_percent": 20.0, "utilization_percent": 15},
            {"gpu_id": 5, "name": "RTX 3080", "memory_usage_percent": 20.0, "utilization_percent": 20},
        ],
        "total_memory_usage_percent": 20.0,
        "timestamp": "2025-07-23T10:30:00.123456",
        **changes,
    }


def gpu(**changes):
    """One entry of our own server's list."""
    return {
        "gpu_id": 0,
        "name": "A100",
        "memory_usage_percent": 25.0,
        "utilization_percent": 3,
        "uuid": "GPU-1",
        "memory_total_mb": 81920,
        "memory_used_mb": 20480,
        **changes,
    }


def without(entry, *keys):
    return {key: value for key, value in entry.items() if key not in keys}


def parse(document, taken_at=7.0):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return wire.parse_summary(body, endpoint_id="server1", taken_at=taken_at)


def parse_gpus(*entries, **rest):
    return parse({"gpu_count": len(entries), "gpus_summary": list(entries), "protocol": 1, **rest})


def refused(document):
    with pytest.raises(BadAnswer) as caught:
        parse(document)
    assert caught.value.endpoint_id == "server1"
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()
    return caught.value.message


def outcome(document):
    """The sample, or the error if its message can be shown to people."""
    try:
        return parse(document)
    except BadAnswer as exc:
        return exc if exc.message.isprintable() and len(exc.message) < 300 else exc.message


# --- the predecessor ----------------------------------------------------------------------------------


def test_the_predecessors_answer_is_read():
    """A server that users already run is understood, its gaps in the ids included."""
    sample = parse(predecessor())

    assert sample == Sample(
        gpus=(
            GPUReading(0, "RTX 3080", memory_usage_percent=20.0, utilization_percent=15.0),
            GPUReading(5, "RTX 3080", memory_usage_percent=20.0, utilization_percent=20.0),
        ),
        taken_at=7.0,
        timestamp="2025-07-23T10:30:00.123456",
    )
    assert sample.gpus[0].processes is None
    assert sample.leases is None


def test_an_empty_server_is_not_an_error():
    """A server whose GPUs are all masked has none, and says so without total_memory_usage_percent."""
    document = without(predecessor(gpu_count=0, gpus_summary=[], total_memory_mb=0), "total_memory_usage_percent")
    sample = parse(document)

    assert sample.gpus == ()
    assert sample.faults == ()
    assert sample.problems == ()


def test_an_error_is_an_error_whatever_the_status():
    """The predecessor's 200 with an error is a failure, not a server without GPUs."""
    message = refused({"error": "nvidia-smi not available", "gpu_count": 0, "gpus": []})

    assert "nvidia-smi not available" in message


@pytest.mark.parametrize(
    ("error", "shown"),
    [({"code": "gone", "message": "no such lease"}, "no such lease"), ("", "''"), ({"code": 1}, "an object")],
)
def test_errors_of_every_shape_are_errors(error, shown):
    """An error is one even next to good data, and its message is passed on."""
    assert shown in refused(predecessor(error=error))


def test_a_null_error_is_none():
    """A server that writes an empty error field into good answers is still good."""
    assert len(parse(predecessor(error=None)).gpus) == 2


def test_memory_that_the_predecessor_could_not_read_is_unknown():
    """It writes 0 for what nvidia-smi does not tell; no machine has GPUs with no memory at all."""
    entries = [{"gpu_id": 0, "name": "GB10", "memory_usage_percent": 0, "utilization_percent": 4}]
    sample = parse(predecessor(gpu_count=1, gpus_summary=entries, total_memory_mb=0))

    assert sample.gpus[0].memory_usage_percent is None
    assert sample.gpus[0].utilization_percent == 4.0
    assert "memory" in sample.problems[0]


# --- documents that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "empty"),
        (b" \r\n\t", "empty"),
        (b"\xff\xfe{}", "not UTF-8 (byte 0 of 4)"),
        (b'\xef\xbb\xbf{"gpus_summary": []}', "byte order mark"),
        (b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>", "HTML"),
        (b"Internal Server Error", "not JSON"),
        (b'{"gpu_count": 2, "gpus_summ', "not JSON"),
        (b'{"gpus_summary": []} {}', "not JSON"),
        (b'{"gpus_summary": [], "x": NaN}', "NaN"),
        (b'{"gpus_summary": [], "x": -Infinity}', "-Infinity"),
        (b'{"gpus_summary": [], "x": 1e999}', "too large"),
        (b'{"gpus_summary": [], "x": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"gpus_summary": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"gpus_summary": [], "x": ' + b'{"a":' * 100_000, "nested"),
        (b'{"gpus_summary": [], "x": "' + b'\\"\\\\' * 50 + b'", "y": ' + b"[" * 70 + b"]" * 70 + b"}", "nested"),
        (b"[]", "a list instead of an object"),
        (b"null", "null instead of an object"),
        (b"true", "true instead of an object"),
        (b"1", "1 instead of an object"),
        (b'"gpus_summary"', "instead of an object"),
        (b"{}", "gpus_summary is missing"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"gpus_summary": null}', "null instead of a list"),
        (b'{"gpus_summary": {"0": {}}}', "an object instead of a list"),
    ],
)
def test_what_is_no_summary_is_refused(body, told):
    """A page, a fragment or nonsense is one clear error, never a stray exception and never an empty server."""
    assert told in refused(body)


def test_brackets_in_strings_are_no_nesting():
    """A GPU whose name is full of brackets and escapes is not mistaken for a nested document."""
    name = '[{"\\' * 40
    sample = parse_gpus(gpu(name=name))

    assert sample.gpus[0].name == name


def test_deep_nesting_is_refused_even_without_a_recursion_limit():
    """A program that has raised the recursion limit is not crashed by a hostile server."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        assert "nested" in refused(b"[" * 4_000_000)
    finally:
        sys.setrecursionlimit(limit)


def test_errors_quote_little_and_escape_it():
    """A server cannot fill a log, or move a terminal's cursor, with what it answers."""
    message = refused(b"\x1b[2J" + "\u202e".encode() * 1000)

    assert "\\x1b" in message
    assert "\\u202e" in message
    assert len(message) < 200


def test_a_refusal_does_not_keep_the_answer():
    """The last error of an endpoint is kept for long; the megabytes that caused it are not."""
    with pytest.raises(BadAnswer) as caught:
        parse(b"\xff" * 1000)

    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


# --- one bad GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (None, "null instead of an object"),
        ([], "a list"),
        ("gpu", "'gpu' instead of an object"),
        (without(gpu(), "gpu_id"), "gpu_id is missing"),
        (gpu(gpu_id=None), "gpu_id is missing"),
        (gpu(gpu_id=True), "gpu_id is true"),
        (gpu(gpu_id=1.0), "gpu_id is 1.0"),
        (gpu(gpu_id="0"), "gpu_id is '0'"),
        (gpu(gpu_id=-1), "gpu_id is -1"),
        (gpu(gpu_id=2**40), "gpu_id is"),
        (gpu(uuid=5), "uuid is 5"),
        (gpu(uuid=""), "uuid is ''"),
        (gpu(uuid="a b"), "not a UUID"),
        (gpu(uuid="../../etc/passwd"), "not a UUID"),
        (gpu(uuid="GPU-1\n"), "not a UUID"),
        (gpu(uuid="G" * 129), "not a UUID"),
        (gpu(memory_usage_percent="hot"), "memory_usage_percent is 'hot'"),
        (gpu(memory_usage_percent=True), "memory_usage_percent is true"),
        (gpu(memory_usage_percent=101), "memory_usage_percent is 101"),
        (gpu(memory_usage_percent=-1), "memory_usage_percent is -1"),
        (gpu(utilization_percent=[]), "utilization_percent is a list"),
        (gpu(utilization_percent=1e300), "utilization_percent is 1e+300"),
        (gpu(memory_total_mb=0), "memory_total_mb is 0"),
        (gpu(memory_total_mb=-5), "memory_total_mb is -5"),
        (gpu(memory_total_mb=85899345920), "memory_total_mb is 85899345920"),
        (gpu(memory_used_mb="1"), "memory_used_mb is '1'"),
        (gpu(memory_used_mb=90000), "memory_used_mb is 90000 of 81920"),
        (gpu(processes={}), "processes is an object"),
        (gpu(processes=[1]), "a process is 1"),
        (gpu(processes=[{"pid": "12"}]), "pid of a process is '12'"),
        (gpu(processes=[{"pid": True}]), "pid of a process is true"),
        (gpu(processes=[{"pid": 1, "memory_mb": -1}]), "memory_mb is -1"),
        ({"gpu_id": 0, "name": "A100"}, "lost"),
        ({"gpu_id": 0, "name": None, "memory_usage_percent": None, "utilization_percent": None}, "lost"),
        ({"gpu_id": 0, "memory_total_mb": 81920}, "lost"),
    ],
)
def test_a_bad_entry_loses_its_gpu_alone(entry, told):
    """One sick or garbled GPU is told as a fault, and its neighbours stay usable."""
    good = gpu(gpu_id=7, uuid="GPU-7")
    sample = parse_gpus(entry, good)

    assert [reading.local_gpu_id for reading in sample.gpus] == [7]
    assert len(sample.faults) == 1
    assert told in sample.faults[0].reason
    assert told in sample.problems[0]


def test_a_fault_names_its_card_as_well_as_it_can():
    """A fault carries the id, UUID and name that were good."""
    sample = parse_gpus(gpu(gpu_id=3, memory_used_mb="x"), gpu(gpu_id="?", uuid="GPU-2", name="H100"))

    assert [attrs.astuple(fault)[1:] for fault in sample.faults] == [(3, "GPU-1", "A100"), (None, "GPU-2", "H100")]


def test_of_equal_ids_none_is_granted():
    """Where two entries have one id, a lease could be for either card, so neither is used."""
    sample = parse_gpus(gpu(uuid="GPU-1"), gpu(uuid="GPU-2"), gpu(gpu_id=1, uuid="GPU-3"))

    assert [reading.uuid for reading in sample.gpus] == ["GPU-3"]
    assert [fault.uuid for fault in sample.faults] == ["GPU-1", "GPU-2"]
    assert "listed 2 times" in sample.faults[0].reason


def test_of_equal_uuids_none_is_granted():
    """Where two entries have one UUID, neither is used."""
    sample = parse_gpus(gpu(gpu_id=0), gpu(gpu_id=1), gpu(gpu_id=2, uuid="GPU-3"))

    assert [reading.local_gpu_id for reading in sample.gpus] == [2]
    assert [fault.local_gpu_id for fault in sample.faults] == [0, 1]


def test_a_bad_entry_makes_its_namesake_doubtful():
    """An id that is also on a garbled entry is ambiguous, too."""
    sample = parse_gpus(gpu(memory_used_mb="x", uuid="GPU-9"), gpu())

    assert sample.gpus == ()
    assert len(sample.faults) == 2


@pytest.mark.parametrize("percent", [100.0, 100.4, 0, -0.0])
def test_rounding_does_not_cost_a_gpu(percent):
    """A hair more than 100 % is rounding, and counts as 100."""
    reading = parse_gpus(gpu(utilization_percent=percent)).gpus[0]

    assert reading.utilization_percent == min(100.0, percent)
    assert str(reading.utilization_percent) in ("100.0", "0.0")


@pytest.mark.parametrize("key", ["memory_usage_percent", "utilization_percent"])
@pytest.mark.parametrize("how", ["null", "missing"])
def test_a_missing_reading_is_unknown_not_zero(key, how):
    """A MIG instance that reports no utilization is not taken for an idle one."""
    entry = without(gpu(), "memory_used_mb", "memory_total_mb")
    entry = {**entry, key: None} if how == "null" else without(entry, key)
    reading = parse_gpus(entry).gpus[0]

    assert getattr(reading, key) is None


def test_the_percentage_is_computed_where_it_is_missing():
    """A server that tells used and total memory need not tell the ratio."""
    entry = without(gpu(memory_total_mb=30000, memory_used_mb=10000), "memory_usage_percent")

    assert parse_gpus(entry).gpus[0].memory_usage_percent == 33.33


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature_c": "hot"}, "temperature_c"),
        ({"temperature_c": -300}, "temperature_c"),
        ({"power_draw_w": True}, "power_draw_w"),
        ({"power_draw_w": -1}, "power_draw_w"),
        ({"power_limit_w": [1]}, "power_limit_w"),
    ],
)
def test_a_bad_decoration_loses_the_field_alone(changes, field):
    """A sensor that reports nonsense does not take its GPU out of the pool."""
    sample = parse_gpus(gpu(**changes))

    assert getattr(sample.gpus[0], field) is None
    assert field in sample.problems[0]
    assert sample.faults == ()


@pytest.mark.parametrize("name", [None, 5, "", "\x00\x1b"])
def test_a_gpu_without_a_name_is_still_a_gpu(name):
    """What a card is called decides nothing."""
    sample = parse_gpus(gpu(name=name))

    assert sample.gpus[0].name == "unknown GPU"
    assert "name is missing" in sample.problems[0]


def test_names_can_be_printed():
    """A name cannot carry escape sequences, line breaks, direction marks or lone surrogates to a terminal."""
    sample = parse_gpus(gpu(name=" A\x1b[31m\n1\u202e0\ud8000é\x00 "))

    assert sample.gpus[0].name == "A[31m 100é"


def test_long_names_are_capped():
    """A name of a megabyte does not end up in every table."""
    assert len(parse_gpus(gpu(name="x" * 1_000_000)).gpus[0].name) == wire.LONGEST_TEXT


# --- processes, host, leases, protocol ----------------------------------------------------------------


def test_processes_are_read():
    """Who computes on a card is told, and unknown parts are unknown."""
    listed = [{"pid": 12, "user": "ann", "memory_mb": 300, "name": "python"}, {"pid": None, "extra": 1}, {"user": ""}]
    sample = parse_gpus(gpu(processes=listed))

    assert sample.gpus[0].processes == (
        ComputeProcess(12, "ann", 300.0, "python"),
        ComputeProcess(None),
        ComputeProcess(None),
    )


def test_no_processes_and_not_told_are_different():
    """A server that looked and found nobody says more than one that does not look."""
    first, second, third = parse_gpus(
        gpu(processes=[]), gpu(gpu_id=1, uuid="GPU-2", processes=None), gpu(gpu_id=2, uuid="GPU-3")
    ).gpus

    assert first.processes == ()
    assert second.processes is third.processes is None


def test_a_bad_name_of_a_process_costs_no_gpu():
    """How a process is called decides nothing."""
    sample = parse_gpus(gpu(processes=[{"pid": 1, "user": 1000, "name": []}]))

    assert sample.gpus[0].processes == (ComputeProcess(1),)
    assert len(sample.problems) == 2


def test_the_host_is_read():
    """A server tells which machine it is on."""
    assert parse_gpus(host={"id": "b-1", "name": "server1", "simulated": True}).host == HostIdentity(
        "b-1", "server1", True
    )
    assert parse_gpus(host={"id": "b-1"}).host == HostIdentity("b-1", "b-1", False)
    assert parse_gpus(host=None).host is None


@pytest.mark.parametrize(
    "host",
    ["server1", [], {}, {"id": ""}, {"id": 5}, {"id": " b"}, {"id": "b\n"}, {"id": "b", "simulated": "no"}],
)
def test_a_doubtful_host_is_no_host(host):
    """Cards are never taken for this machine's own on the word of a garbled identity."""
    sample = parse_gpus(gpu(), host=host)

    assert sample.host is None
    assert len(sample.gpus) == 1
    assert "host" in sample.problems[0]


def test_the_lease_offer_is_read():
    """A server that grants leases says so, with the directory of its locks."""
    assert parse_gpus(leases={"version": 2, "lock_dir": "/var/lock/x", "new": 1}).leases == LeaseOffer(2, "/var/lock/x")
    assert parse_gpus(leases={"version": 1}).leases == LeaseOffer(1, None)
    assert parse_gpus(leases={"version": 1, "lock_dir": "/x", "lock_dir_id": "1:2"}).leases == LeaseOffer(
        1, "/x", "1:2"
    )
    assert parse_gpus(leases=None).leases is None


@pytest.mark.parametrize(
    "leases",
    [
        True,
        [],
        {},
        {"version": 0},
        {"version": True},
        {"version": "1"},
        {"version": 1, "lock_dir": 5},
        {"version": 1, "lock_dir": "here"},
        {"version": 1, "lock_dir": "/a\nb"},
        {"version": 1, "lock_dir_id": 5},
        {"version": 1, "lock_dir_id": ""},
        {"version": 1, "lock_dir_id": "a" * 101},
    ],
)
def test_a_doubtful_lease_offer_is_refused(leases):
    """Taken for a statistics-only server, its cards would get a second arbiter and so two holders."""
    assert "leases" in refused({"gpus_summary": [gpu()], "leases": leases})


def test_a_newer_server_is_read_and_noted():
    """A server may be newer than its clients."""
    sample = parse_gpus(gpu(), protocol=9, invented={"deep": [1]})

    assert len(sample.gpus) == 1
    assert "protocol 9" in sample.problems[0]


@pytest.mark.parametrize("protocol", [0, -1, True, "1", 1.5])
def test_a_bad_protocol_number_is_noted(protocol):
    """A number that cannot be right is a problem for `doctor`, not a reason to lose the server."""
    sample = parse_gpus(gpu(), protocol=protocol)

    assert len(sample.gpus) == 1
    assert "protocol" in sample.problems[0]


@pytest.mark.parametrize("count", [0, 2, "1", True, 1.0])
def test_a_wrong_count_is_noted(count):
    """The list is what counts; a disagreeing gpu_count is told."""
    sample = parse_gpus(gpu(), gpu_count=count)

    assert len(sample.gpus) == 1
    assert "gpu_count" in sample.problems[0]


@pytest.mark.parametrize("timestamp", [None, 5, [], True])
def test_a_timestamp_that_is_no_text_is_dropped(timestamp):
    """The timestamp decides nothing, so it may be anything."""
    assert parse_gpus(gpu(), timestamp=timestamp).timestamp is None


def test_unavailable_gpus_are_faults():
    """A card that its own server cannot read is known, and why."""
    listed = [
        {"gpu_id": 4, "name": "A100", "uuid": "GPU-4", "reason": "hung\n"},
        {},
        5,
        {"gpu_id": "x", "uuid": "GPU-6"},
    ]
    sample = parse_gpus(gpu(), gpus_unavailable=listed)

    assert sample.faults == (
        GPUFault("hung", 4, "GPU-4", "A100"),
        GPUFault("unavailable, says the server"),
        GPUFault("unavailable, says the server"),
        GPUFault("unavailable, says the server", uuid="GPU-6"),
    )
    assert len(sample.problems) == 2
    assert len(sample.gpus) == 1


@pytest.mark.parametrize("lost", [{"gpu_id": 0}, {"uuid": "GPU-1"}])
def test_a_gpu_that_is_also_unavailable_is_not_granted(lost):
    """Where the server contradicts itself, the card is left alone."""
    sample = parse_gpus(gpu(), gpus_unavailable=[{**lost, "reason": "fell off the bus"}])

    assert sample.gpus == ()
    assert [fault.reason for fault in sample.faults] == ["fell off the bus"]


def test_a_bad_list_of_unavailable_gpus_is_noted():
    """It could only have said what is wrong with other cards."""
    sample = parse_gpus(gpu(), gpus_unavailable="none")

    assert len(sample.gpus) == 1
    assert "gpus_unavailable" in sample.problems[0]


def test_many_gpus_and_many_problems():
    """Ten thousand GPUs are read, and ten thousand problems are summed up."""
    good = [gpu(gpu_id=number, uuid=f"GPU-{number}") for number in range(10_000)]
    assert len(parse_gpus(*good).gpus) == 10_000

    sample = parse_gpus(*[None] * 10_000)
    assert len(sample.faults) == 10_000
    assert len(sample.problems) == wire.MOST_PROBLEMS
    assert sample.problems[-1] == f"and {10_000 - wire.MOST_PROBLEMS + 1} more problems"


# --- writing ------------------------------------------------------------------------------------------

SAMPLE = Sample(
    gpus=(
        GPUReading(
            0,
            "A100",
            "GPU-0",
            memory_total_mb=81920.0,
            memory_used_mb=20480.0,
            memory_usage_percent=25.0,
            utilization_percent=10.004,
            temperature_c=41.0,
            power_draw_w=60.5,
            power_limit_w=400.0,
            processes=(ComputeProcess(12, "ann", 300.0, "python"),),
        ),
        GPUReading(2, "MIG", "MIG-2", memory_total_mb=10240.0, memory_used_mb=0.0, processes=()),
        GPUReading(3, "T4", memory_usage_percent=50.0, utilization_percent=21.0),
        GPUReading(4, "silent", "GPU-4", memory_total_mb=81920.0),
    ),
    taken_at=1.0,
    faults=(GPUFault("hung", 1, "GPU-1", "A100"),),
    host=HostIdentity("boot", "server1"),
    leases=LeaseOffer(1, "/var/lock/gpupool_sync"),
)


def test_the_summary_has_the_predecessors_fields_first():
    """Old clients find every field they know, with sums over what is known, and no card without readings."""
    document = wire.summary_document(SAMPLE, timestamp="now")

    assert list(document)[:7] == [
        "gpu_count",
        "total_memory_mb",
        "total_used_memory_mb",
        "total_memory_usage_percent",
        "average_utilization_percent",
        "gpus_summary",
        "timestamp",
    ]
    assert document["gpu_count"] == 3
    assert document["total_memory_mb"] == 92160
    assert document["total_used_memory_mb"] == 20480
    assert document["total_memory_usage_percent"] == 22.22
    assert document["average_utilization_percent"] == 15.5
    assert document["timestamp"] == "now"
    assert document["protocol"] == wire.PROTOCOL_VERSION
    assert document["host"] == {"id": "boot", "name": "server1", "simulated": False}
    assert document["leases"] == {"version": 1, "lock_dir": "/var/lock/gpupool_sync", "lock_dir_id": None}
    assert document["gpus_summary"][0] == {
        "gpu_id": 0,
        "name": "A100",
        "memory_usage_percent": 25.0,
        "utilization_percent": 10,
        "uuid": "GPU-0",
        "memory_total_mb": 81920,
        "memory_used_mb": 20480,
        "temperature_c": 41,
        "power_draw_w": 60.5,
        "power_limit_w": 400,
        "processes": [{"pid": 12, "user": "ann", "memory_mb": 300, "name": "python"}],
        "leased": None,
    }
    assert document["gpus_summary"][1]["memory_usage_percent"] == 0.0
    assert document["gpus_summary"][1]["utilization_percent"] is None
    assert document["gpus_unavailable"] == [
        {"gpu_id": 1, "name": "A100", "uuid": "GPU-1", "reason": "hung"},
        {"gpu_id": 4, "name": "silent", "uuid": "GPU-4", "reason": "the driver gives no readings"},
    ]


def test_the_summary_of_no_gpus_is_the_predecessors():
    """With no visible GPU the predecessor leaves the total percentage out, and so do we."""
    document = wire.summary_document(Sample(gpus=(), taken_at=0.0), timestamp="now")

    assert "total_memory_usage_percent" not in document
    assert document["gpu_count"] == document["total_memory_mb"] == document["average_utilization_percent"] == 0
    assert document["gpus_summary"] == []


def test_unknown_totals_are_null():
    """Of cards that tell neither memory nor load, no average is made up."""
    document = wire.summary_document(
        Sample(gpus=(GPUReading(0, "x", memory_used_mb=5.0),), taken_at=0.0), timestamp="now"
    )

    assert document["total_memory_usage_percent"] is None
    assert document["average_utilization_percent"] is None


def test_the_stats_have_the_predecessors_shape():
    """Tools that read /gpu/stats find what they know."""
    document = wire.stats_document(SAMPLE, timestamp="now")

    assert list(document) == ["gpu_count", "gpus", "timestamp"]
    assert document["gpu_count"] == 3
    assert document["gpus"][0] == {
        "gpu_id": 0,
        "name": "A100",
        "memory": {"total_mb": 81920, "used_mb": 20480, "free_mb": 61440, "usage_percent": 25.0},
        "utilization_percent": 10,
        "temperature_c": 41,
        "power": {"draw_w": 60.5, "limit_w": 400},
        "uuid": "GPU-0",
        "processes": [{"pid": 12, "user": "ann", "memory_mb": 300, "name": "python"}],
    }
    assert document["gpus"][2]["memory"] == {
        "total_mb": None,
        "used_mb": None,
        "free_mb": None,
        "usage_percent": 50.0,
    }


def test_the_small_documents():
    """Counts, errors and failures have the forms that clients know."""
    assert wire.count_document(SAMPLE, timestamp="now") == {"gpu_count": 3, "timestamp": "now"}
    assert wire.error_document("gone", "too late") == {"error": {"code": "gone", "message": "too late"}}
    failure = wire.failure_document("no driver", "now")
    assert failure == {"error": "no driver", "gpu_count": 0, "gpus": [], "timestamp": "now"}
    assert "no driver" in refused(failure)


def test_dump_is_compact_ascii_and_strict():
    """What goes over the wire is read by every JSON parser."""
    assert wire.dump({"a": ["é", 1.5, None]}) == b'{"a":["\\u00e9",1.5,null]}'
    with pytest.raises(ValueError, match="JSON"):
        wire.dump({"a": float("nan")})


# --- properties ---------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entry_keys = st.sampled_from([*gpu(), "temperature_c", "power_draw_w", "power_limit_w", "processes"])
entries = st.builds(
    lambda changes, gone: without(gpu(**changes), *gone),
    st.dictionaries(entry_keys, json_values | st.integers(0, 3) | st.floats(0, 100), max_size=4),
    st.sets(entry_keys, max_size=2),
)
documents = st.dictionaries(
    st.sampled_from(["gpu_count", "timestamp", "protocol", "host", "leases", "gpus_unavailable", "total_memory_mb"])
    | st.text(max_size=6),
    json_values,
    max_size=4,
)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(body):
    """Whatever a server sends, the answer is a sample or a BadAnswer."""
    assert isinstance(outcome(body), (Sample, BadAnswer))


@given(json_values)
def test_no_json_raises_anything_else(document):
    """Whatever JSON a server sends, the answer is a sample or a BadAnswer."""
    assert isinstance(outcome(document), (Sample, BadAnswer))


@given(documents, st.lists(entries | json_values, max_size=5))
def test_every_entry_is_accounted_for(document, listed):
    """An entry becomes a GPU or a fault; what becomes a GPU has an identity of its own and sane readings."""
    sample = outcome({**document, "gpus_summary": listed})
    if isinstance(sample, BadAnswer):
        return
    assert len(sample.gpus) + len(sample.faults) >= len(listed)
    ids = [reading.local_gpu_id for reading in sample.gpus]
    uuids = [reading.uuid for reading in sample.gpus if reading.uuid is not None]
    assert len(set(ids)) == len(ids)
    assert len(set(uuids)) == len(uuids)
    assert all(line.isprintable() for line in sample.problems)
    for reading in sample.gpus:
        assert reading.name.isprintable()
        for percent in (reading.memory_usage_percent, reading.utilization_percent):
            assert percent is None or 0 <= percent <= 100
        # Whatever was accepted can be served again.
        wire.dump(wire.summary_document(sample, timestamp="now"))


names = st.text(max_size=40).map(wire._clean).filter(bool)
percents = st.integers(0, 10_000).map(lambda hundredths: hundredths / 100)
amounts = st.floats(0, 1e6)
processes = st.builds(
    ComputeProcess,
    st.none() | st.integers(0, 2**31 - 1),
    st.none() | names,
    st.none() | amounts,
    st.none() | names,
)


@st.composite
def samples(draw):
    """Samples as a device reader gives them: percent with 2 decimals, and given wherever they can be computed."""
    count = draw(st.integers(0, 4))
    gpus = []
    for number in range(count):
        total = draw(st.none() | st.floats(1.0, 1e6))
        used = draw(st.none() | st.floats(0, 1)) if total is None else draw(st.floats(0, total))
        computable = total is not None and used is not None
        percent = draw(percents if computable else st.none() | percents)
        busy = draw(percents if percent is None and used is None else st.none() | percents)
        gpus.append(
            GPUReading(
                number * 3,
                draw(names),
                draw(st.sampled_from([None, f"GPU-{number}-abc", f"MIG-GPU-{number}/1/0"])),
                total,
                used,
                percent,
                busy,
                draw(st.none() | st.floats(-40, 120)),
                draw(st.none() | amounts),
                draw(st.none() | amounts),
                draw(st.none() | st.lists(processes, max_size=3).map(tuple)),
            )
        )
    faults = st.builds(
        GPUFault, names, st.none() | st.integers(100, 110), st.sampled_from([None, "GPU-x"]), st.none() | names
    )
    return Sample(
        gpus=tuple(gpus),
        taken_at=draw(st.floats(0, 1e6)),
        faults=tuple(draw(st.lists(faults, max_size=2))),
        host=draw(st.none() | st.builds(HostIdentity, names, names, st.booleans())),
        leases=draw(
            st.none() | st.builds(LeaseOffer, st.integers(1, 9), st.none() | names.map(lambda name: f"/{name}"))
        ),
        timestamp=draw(names),
    )


@given(samples())
def test_what_a_server_says_is_what_a_client_hears(sample):
    """A sample that crosses the wire arrives unchanged."""
    assert sample.timestamp is not None
    body = wire.dump(wire.summary_document(sample, timestamp=sample.timestamp))

    assert wire.parse_summary(body, endpoint_id="e", taken_at=sample.taken_at) == attrs.evolve(
        sample, protocol=wire.PROTOCOL_VERSION
    )
