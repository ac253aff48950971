"""The filters, card by card."""

from __future__ import annotations

import os

import pytest

from cards import reading
from gpupool_sync.choosing import Limits, room_mb, screen, usable
from gpupool_sync.errors import ConfigError
from gpupool_sync.models import Card, ComputeProcess, GPURequest, Sample, Snapshot

LIMITS = Limits(memory_threshold=80.0, utilization_threshold=90.0)


def snapshot(*readings, local=False, taken_at=100.0):
    cards = tuple(Card(r.uuid or f"http://s:8000#{r.local_gpu_id}", "s", r) for r in readings)
    return Snapshot("s", "http://s:8000", Sample(tuple(readings), taken_at), cards, taken_at, local)


def verdicts(snap, **request):
    """Code of each card by id: '' if it would do."""
    screened = screen(snap, GPURequest.make(**request), LIMITS)
    found = {card.reading.local_gpu_id: "" for card in screened.eligible}
    for card, reason in (*screened.vetoed, *screened.unwanted):
        found[card.reading.local_gpu_id] = reason.code
    return found


def test_the_least_loaded_card_comes_first():
    """Within an endpoint, memory % + utilization % decides."""
    snap = snapshot(
        reading(0, memory_usage_percent=50.0, utilization_percent=10.0),
        reading(1, memory_usage_percent=0.0, utilization_percent=70.0),
        reading(2, memory_usage_percent=5.0, utilization_percent=5.0),
    )
    order = [card.reading.local_gpu_id for card in screen(snap, GPURequest(), LIMITS).eligible]

    assert order == [2, 0, 1]


def test_unknown_load_counts_as_full_but_does_not_veto():
    """A MIG instance without utilization can be had, after those that are known to be idle."""
    snap = snapshot(reading(0, utilization_percent=None), reading(1, utilization_percent=60.0))

    assert [c.reading.local_gpu_id for c in screen(snap, GPURequest(), LIMITS).eligible] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"memory_usage_percent": 79.9}, ""),
        ({"memory_usage_percent": 80.0}, "memory"),
        ({"utilization_percent": 89.9}, ""),
        ({"utilization_percent": 90.0}, "utilization"),
        ({"processes": (ComputeProcess(7, "eve"),)}, "foreign-process"),
        ({"processes": None}, ""),
        ({"memory_usage_percent": None}, ""),
    ],
)
def test_readings_at_or_above_a_threshold_veto(changes, code):
    """A threshold of 80 % means that 80 % is too much; what is unknown is not held against the card."""
    assert verdicts(snapshot(reading(0, **changes))) == {0: code}


def test_busy_ok_turns_off_the_veto_of_processes_only():
    """Who accepts company does not accept a full card."""
    other = (ComputeProcess(7, "eve"),)
    snap = snapshot(reading(0, processes=other), reading(1, processes=other, memory_usage_percent=95.0))

    assert verdicts(snap, busy_ok=True) == {0: "", 1: "memory"}


def test_our_own_process_is_no_stranger():
    """A notebook whose CUDA context is still on its card may have that card again."""
    mine = (ComputeProcess(os.getpid()),)

    assert verdicts(snapshot(reading(0, processes=mine), local=True)) == {0: ""}
    assert verdicts(snapshot(reading(0, processes=mine), local=False)) == {0: "foreign-process"}


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"model": "a100"}, ""),
        ({"model": "H100"}, "filter:model"),
        ({"uuid": "GPU-00000000"}, ""),
        ({"uuid": "GPU-00000"}, ""),
        ({"uuid": "GPU-"}, "filter:uuid"),
        ({"uuid": ["GPU-1", "GPU-00000000"]}, ""),
        ({"uuid": "GPU-00000001"}, "filter:uuid"),
        ({"endpoint": "s"}, ""),
        ({"endpoint": "http://s:8000"}, ""),
        ({"endpoint": ["t", "u"]}, "filter:endpoint"),
        ({"exclude": "s:0"}, "filter:exclude"),
        ({"exclude": ["s:1"]}, ""),
        ({"exclude": "GPU-00000000"}, "filter:exclude"),
        ({"exclude": "s"}, "filter:exclude"),
        ({"local": True}, "filter:local"),
        ({"local": False}, ""),
        ({"min_free_memory_mb": 81920}, ""),
        ({"min_free_memory_mb": 81921}, "filter:memory"),
        ({"memory_mb": 81921}, "filter:memory"),
        ({"max_utilization_percent": 0}, ""),
    ],
)
def test_requests_filter(request_, code):
    """Each part of a request drops the cards that can never satisfy it, and says which part it was."""
    assert verdicts(snapshot(reading(0)), **request_) == {0: code}


def test_free_memory_and_utilization_are_judged_by_the_reading():
    """A card that is too full now may do later: that is a veto, not a filter."""
    snap = snapshot(reading(0, memory_used_mb=50_000.0, utilization_percent=30.0))
    screened = screen(snap, GPURequest.make(min_free_memory_mb=40_000), LIMITS)

    assert (screened.possible, len(screened.eligible)) == (1, 0)
    assert verdicts(snap, max_utilization_percent=20) == {0: "utilization"}


def test_memory_requests_need_a_server_that_tells_memory():
    """A server that tells percentages only cannot promise MiB."""
    snap = snapshot(reading(0, memory_total_mb=None, memory_used_mb=None))

    assert verdicts(snap, min_free_memory_mb=1) == {0: "filter:memory"}
    assert verdicts(snap) == {0: ""}


def test_a_card_shared_by_memory_is_not_judged_by_its_reading():
    """Of a shared card the sum counts, not that its holders use it."""
    snap = snapshot(reading(0, memory_usage_percent=95.0, utilization_percent=100.0, processes=(ComputeProcess(1),)))

    assert verdicts(snap, memory_mb=1000) == {0: ""}


@pytest.mark.parametrize(("used", "leased", "room"), [(0, 0, 81920), (30_000, 0, 51_920), (30_000, 40_000, 81_920)])
def test_the_room_is_what_foreign_processes_leave(used, leased, room):
    """leased + asked ≤ total − what foreign processes use."""
    assert room_mb(reading(0, memory_used_mb=float(used)), leased) == room


def test_a_reading_from_before_the_release_does_not_veto():
    """The next job gets a card at once, although the last reading still shows the job before."""
    snap = snapshot(reading(0, memory_usage_percent=99.0, memory_used_mb=9000.0, processes=None), taken_at=100.0)
    screened = screen(snap, GPURequest(), LIMITS)

    def reasons(released, held=False, closed=None, fits=None):
        is_held, released_at, shut = (lambda _: held), (lambda _: released), (lambda: closed or {})
        seen = usable(screened, snap, is_held=is_held, released_at=released_at, closed=shut, fits=fits)
        return [(veto.code if veto else None, obstacle) for _, veto, obstacle in seen]

    assert reasons(None) == [("memory", None)]
    assert reasons(99.0) == [("memory", None)]
    assert reasons(100.5) == [(None, None)]
    assert reasons(None, held=True) == [(None, "held")]
    assert reasons(100.5, closed={card.key: 99.0 for card in snap.cards}) == [(None, "closed")]
    assert reasons(100.5, fits=lambda _: False) == [(None, "no-room")]
    assert reasons(None, held=True, fits=lambda _: True) == [("memory", None)]


@pytest.mark.parametrize(
    ("leased", "released", "expected"),
    [
        (True, None, (None, "held")),
        (True, 99.0, (None, "held")),
        (True, 100.5, (None, None)),
        (False, None, ("memory", None)),
        (None, None, ("memory", None)),
    ],
)
def test_what_its_server_says_is_leased_is_held(leased, released, expected):
    """Also by those of whom nobody here has heard; but for what we have given back since the reading."""
    snap = snapshot(reading(0, memory_usage_percent=99.0, leased=leased), taken_at=100.0)
    ((_, veto, obstacle),) = usable(
        screen(snap, GPURequest(), LIMITS), snap, is_held=lambda _: False, released_at=lambda _: released,
        closed=dict, fits=None,
    )  # fmt: skip
    assert (veto and veto.code, obstacle) == expected


@pytest.mark.parametrize(("closed_at", "obstacle"), [(99.9, None), (100.0, "closed"), (100.1, "closed")])
def test_a_closed_card_is_open_only_by_a_later_reading(closed_at, obstacle):
    """One from before the last lease ended, empty as it was, tells nothing of what that left on the card."""
    snap = snapshot(reading(0), taken_at=100.0)
    closed: dict[str, float] = {}

    def is_held(key):
        closed[key] = closed_at  # some arbiters learn of it only when they are asked
        return False

    seen = usable(
        screen(snap, GPURequest(), LIMITS), snap, is_held=is_held, released_at=lambda _: None, closed=lambda: closed,
        fits=None,
    )  # fmt: skip
    assert [(veto, found) for _, veto, found in seen] == [(None, obstacle)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"count": True},
        {"count": 1.5},
        {"model": ""},
        {"model": 7},
        {"uuid": ""},
        {"uuid": [1]},
        {"exclude": 5},
        {"min_free_memory_mb": -1},
        {"min_free_memory_mb": float("nan")},
        {"min_free_memory_mb": "10"},
        {"max_utilization_percent": 101},
        {"memory_mb": 0},
        {"memory_mb": True},
        {"memory_mb": float("inf")},
        {"max_holders": 0},
        {"memory_mb": 10, "max_holders": 2},
        {"count": 2, "memory_mb": 10},
        {"local": "yes"},
        {"busy_ok": 1},
    ],
    ids=str,
)
def test_a_wrong_request_is_refused_by_name(wrong):
    """A mistake in a request is an error that names the argument, not a wait without end."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GPURequest.make(**wrong)
