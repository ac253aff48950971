"""One endpoint: what counts as a failure, when the breaker opens and closes, how long the pauses are."""

from __future__ import annotations

import datetime
import json
import math

import pytest
import requests
import responses

from gpupool_sync import config, endpoint, wire
from gpupool_sync.clock import boottime
from gpupool_sync.endpoint import FIRST_SHARE, KEPT_RESPONSES, TooManyRequests, make_endpoint
from gpupool_sync.errors import BadAnswer, EndpointUnavailable
from helpers import eventually

URL = "http://server1:8000"
SUMMARY = f"{URL}/gpu/summary"
BODY = {
    "gpu_count": 2,
    "total_memory_mb": 163840,
    "total_used_memory_mb": 0,
    "total_memory_usage_percent": 0.0,
    "average_utilization_percent": 0.0,
    "gpus_summary": [
        {"gpu_id": 0, "name": "A100", "memory_usage_percent": 1.0, "utilization_percent": 2.0},
        {"gpu_id": 3, "name": "A100", "memory_usage_percent": 3.0, "utilization_percent": 4.0},
    ],
    "timestamp": "2026-01-01T00:00:00",
}


@pytest.fixture
def server():
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture
def polled():
    made = []

    def make(url=URL, options=None, **settings):
        one = config.Endpoint(url, **(options or {}))
        made.append(make_endpoint(one, config.resolve([one], endpoint_max_retries=0, **settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def fail(endpoint_, times, error=EndpointUnavailable):
    for _ in range(times):
        with pytest.raises(error):
            endpoint_.poll()


def test_a_poll_becomes_a_snapshot(server, polled):
    """What the server says, with ids of ours; a card without UUID is known by its URL."""
    server.get(SUMMARY, json=BODY)
    snapshot = polled().poll()

    assert [card.global_gpu_id for card in snapshot.cards] == ["server1-8000:0", "server1-8000:3"]
    assert [card.key for card in snapshot.cards] == [f"{URL}#0", f"{URL}#3"]
    assert snapshot.age(boottime()) < 60
    assert not snapshot.is_local


def test_the_age_of_the_sample_travels_in_a_header(server, polled):
    """A server that answers at once with an old sample gives an old reading."""
    server.get(SUMMARY, json=BODY, headers={wire.AGE_HEADER: "42.5"})

    assert 42.5 <= polled().poll().age(boottime()) < 100


@pytest.mark.parametrize("age", ["-1", "nan", "inf", "soon", ""])
def test_a_garbled_age_is_too_old_for_everything(server, polled, age):
    """A server that cannot say how old its sample is does not get the benefit of the doubt."""
    server.get(SUMMARY, json=BODY, headers={wire.AGE_HEADER: age})
    snapshot = polled().poll()

    assert snapshot.age(boottime()) == math.inf
    assert any(wire.AGE_HEADER in problem for problem in snapshot.sample.problems)


def readings(server, polled, timestamps, monkeypatch, headers=None, **settings):
    """The snapshots of polls that are 10 s apart, one for each timestamp, and the instant of each."""
    now = boottime()
    one = polled(**settings)
    seen = []
    for number, timestamp in enumerate(timestamps):
        at = now + 10.0 * number
        monkeypatch.setattr(endpoint, "boottime", lambda at=at: at)
        server.replace("GET", SUMMARY, json={**BODY, "timestamp": timestamp}, headers=(headers or {}))
        seen.append((one.poll(), at))
    return seen


def ages(seen):
    return [pytest.approx(snapshot.age(at), abs=5.0) for snapshot, at in seen]


@pytest.mark.parametrize("headers", [{}, {wire.AGE_HEADER: "0.1"}], ids=["no age", "an age that stands still, too"])
def test_a_timestamp_that_stands_still_makes_readings_old(server, polled, monkeypatch, headers):
    """From the third poll with one timestamp on, the reading is as old as the first of them; a new one is fresh."""
    server.get(SUMMARY, json=BODY)
    seen = readings(server, polled, ["t", "t", "t", "t", "u", "u"], monkeypatch, headers, max_stats_age=25.0)

    assert ages(seen) == [0, 0, 20, 30, 0, 0]
    assert [snapshot.repeated for snapshot, _ in seen] == [False, False, True, True, False, False]
    # Only where it costs anything.
    told = [[text for text in snapshot.sample.problems if "has not changed" in text] for snapshot, _ in seen]
    assert [len(each) for each in told] == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("timestamps", [["t", "t", "u", "u", "t"], [None] * 5, [7] * 5], ids=str)
def test_what_is_not_the_same_timestamp_three_times_is_no_repetition(server, polled, monkeypatch, timestamps):
    """A server that reads its GPUs at every second poll only, or tells no time, is believed."""
    server.get(SUMMARY, json=BODY)
    seen = readings(server, polled, timestamps, monkeypatch)

    assert ages(seen) == [0] * 5
    assert not any(snapshot.repeated for snapshot, _ in seen)


@pytest.mark.parametrize("status", [202, 301, 400, 401, 404, 500, 502, 503])
def test_every_other_status_is_a_failure(server, polled, status):
    """Only 200 is an answer."""
    server.get(SUMMARY, json=BODY, status=status)
    with pytest.raises(EndpointUnavailable, match=str(status)):
        polled().poll()


def test_an_error_in_a_good_answer_is_a_failure(server, polled):
    """200 with an error body is what the predecessor's server says when nvidia-smi fails."""
    server.get(SUMMARY, json={"error": "nvidia-smi failed", "gpu_count": 0, "gpus": []})
    one = polled()
    fail(one, 1, BadAnswer)

    assert "nvidia-smi failed" in one.numbers().last_error


def test_who_sees_the_breaker_closed_sees_the_endpoint_well(server, polled, monkeypatch):
    """Nobody is told, even for a moment, that an endpoint is back and does not answer."""
    one = polled(breaker_failures=1)
    bad = server.get(SUMMARY, status=500)
    fail(one, 1)
    seen = []
    changed = one._breaker_changed
    monkeypatch.setattr(one, "_breaker_changed", lambda name: (seen.append((name, one.sick)), changed(name)))
    server.remove(bad)
    server.get(SUMMARY, json=BODY)
    one.poll()

    assert seen == [("half-open", True), ("closed", False)]


def test_five_failures_open_the_breaker_and_one_probe_closes_it(server, polled):
    """The breaker opens at the fifth failure in a row, and the first good probe closes it."""
    one = polled()
    bad = server.get(SUMMARY, status=500)
    fail(one, 4)
    assert not one.open
    fail(one, 1)
    assert one.open
    assert (one.numbers().breaker, one.numbers().failures) == ("open", 5)
    fail(one, 1)
    assert one.numbers().breaker == "open"
    server.remove(bad)
    server.get(SUMMARY, json=BODY)
    one.poll()

    assert not one.open
    numbers = one.numbers()
    assert (numbers.breaker, numbers.healthy, numbers.successes, numbers.consecutive_failures) == ("closed", True, 1, 0)


def test_the_number_of_failures_is_a_setting(server, polled):
    """``breaker_failures=2``: the second one opens."""
    server.get(SUMMARY, status=500)
    one = polled(breaker_failures=2)
    fail(one, 2)
    assert one.open


def test_a_good_answer_starts_the_count_again(server, polled):
    """Failures that are not in a row do not open the breaker."""
    one = polled(breaker_failures=2)
    for status in (500, 200, 500, 200, 500):
        server.get(SUMMARY, status=status, json=BODY)
    for status in (500, 200, 500, 200, 500):
        if status == 200:
            one.poll()
        else:
            fail(one, 1)
    assert not one.open


def test_too_many_requests_is_no_sickness(server, polled):
    """429 moves the next poll away as asked and does not open the breaker."""
    server.get(SUMMARY, status=429, headers={"Retry-After": "7"})
    one = polled(breaker_failures=1)
    with pytest.raises(TooManyRequests) as info:
        one.poll()

    assert not one.open
    assert info.value.retry_after == 7.0
    assert one.pause(info.value.retry_after) == 7.0
    assert not one.numbers().healthy


def test_pauses_grow_to_the_health_check_interval(server, polled):
    """A closed breaker's endpoint is polled at the interval; a dead one's probes become rarer, with jitter."""
    good = server.get(SUMMARY, json=BODY)
    one = polled(poll_interval=1.0, health_check_interval=8.0, breaker_failures=1)
    one.poll()
    assert one.pause() == 1.0
    server.remove(good)
    server.get(SUMMARY, status=500)
    longest = []
    for _ in range(6):
        fail(one, 1)
        pauses = [one.pause() for _ in range(200)]
        assert max(pauses) > min(pauses)
        longest.append(max(pauses))

    for expected, seen in zip([1, 2, 4, 8, 8, 8], longest, strict=True):
        assert expected * 0.9 < seen <= expected


def test_an_endpoint_that_has_never_answered_is_asked_again_soon(server, polled):
    """A server that is just starting is found within moments, not after a whole poll interval."""
    server.get(SUMMARY, status=500)
    one = polled(poll_interval=1.0, breaker_failures=50)
    pauses = []
    for _ in range(6):
        fail(one, 1)
        pauses.append(one.pause())

    assert pauses == [0.25, 0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_recovered_endpoint_is_reintroduced_gradually(server, polled, monkeypatch):
    """It gets a tenth of its decisions at first and all of them after the health check interval."""
    one = polled(health_check_interval=10.0, breaker_failures=1, poll_interval=1.0)
    assert one.reintroduced() == 1.0
    bad = server.get(SUMMARY, status=500)
    fail(one, 1)
    server.remove(bad)
    server.get(SUMMARY, json=BODY)
    one.poll()
    recovered = one._recovered_at
    for later, share in ((0.0, FIRST_SHARE), (5.0, (1 + FIRST_SHARE) / 2), (10.0, 1.0), (99.0, 1.0)):
        monkeypatch.setattr(endpoint, "boottime", lambda later=later: recovered + later)
        assert one.reintroduced() == pytest.approx(share)


def test_response_times_are_the_mean_of_the_last_hundred(server, polled):
    """Old response times do not count for ever; failures do not count at all."""
    server.get(SUMMARY, json=BODY)
    one = polled()
    for _ in range(3):
        one.poll()
    one._responses.extend([9.0] * (KEPT_RESPONSES - 2))
    one._responses.extend([0.5, 1.5] * (KEPT_RESPONSES // 2))

    assert one.numbers().response_time_ms == pytest.approx(1000.0)
    assert one.numbers().success_rate == 1.0


def test_last_seen_is_aware_and_none_before_the_first_contact(server, polled):
    """A time of day without a zone would be nobody's."""
    server.get(SUMMARY, json=BODY)
    one = polled()
    assert one.numbers().last_seen is None
    one.poll()
    assert one.numbers().last_seen.tzinfo is datetime.timezone.utc


@pytest.mark.parametrize(
    ("host", "options", "local"),
    [
        ({"id": "HERE", "name": "x", "simulated": False}, {}, True),
        ({"id": "HERE", "name": "x", "simulated": True}, {}, False),
        ({"id": "there", "name": "x", "simulated": False}, {}, False),
        (None, {}, False),
        (None, {"local": True}, True),
        ({"id": "HERE", "name": "x", "simulated": False}, {"local": False}, False),
    ],
    ids=["same", "simulated", "other", "untold", "said", "denied"],
)
def test_this_machine_is_told_by_its_identity(server, polled, host, options, local):
    """Whether an endpoint is this machine is told by host identity, never by name, unless the user says it."""
    if host is not None and host["id"] == "HERE":
        host = {**host, "id": endpoint.devices.host_identity().id}
    server.get(SUMMARY, json={**BODY, "protocol": 1, **({"host": host} if host else {})})

    assert polled(options=options).poll().is_local is local


def test_an_unexpected_error_is_the_endpoints_failure_not_ours(server, polled):
    """Whatever breaks during a poll, one of our errors comes out."""
    server.get(SUMMARY, body=ZeroDivisionError("what"))
    with pytest.raises(EndpointUnavailable):
        polled().poll()


def test_secrets_stay_out_of_errors(server, polled):
    """A token appears in the request and nowhere else."""
    server.get(SUMMARY, body=requests.ConnectionError("boom"))
    one = polled(options={"token": "s3cret"})
    with pytest.raises(EndpointUnavailable) as info:
        one.poll()

    assert server.calls[0].request.headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in f"{info.value!r} {info.value} {one.numbers()!r} {json.dumps(str(one))}"


def test_a_poll_can_be_aborted(polled):
    """After an abort nothing is asked any more."""
    one = polled()
    one.abort()
    fail(one, 1)
    eventually(lambda: one.numbers().failures == 1)
