"""Components in isolation: answers are mocked, nothing is listened to."""

from __future__ import annotations

import pytest
import responses
from spec_answers import summary

from gpupool_sync import Endpoint
from gpupool_sync.config import Settings
from gpupool_sync.endpoint import make_endpoint
from gpupool_sync.errors import BadAnswer, EndpointUnavailable
from gpupool_sync.models import Sample
from gpupool_sync.table import Table
from gpupool_sync.wire import parse_summary

URL = "http://server1:8000/gpu/summary"


@pytest.fixture
def mock():
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture
def endpoint():
    endpoint = make_endpoint(Endpoint("http://server1:8000"), Settings(breaker_failures=2))
    yield endpoint
    endpoint.close()


def test_each_component_in_isolation(mock, endpoint):
    """One endpoint with its breaker, one table: no pool, no thread."""
    mock.get(URL, body=summary(3))
    snapshot = endpoint.poll()
    table = Table()
    table.update(snapshot)
    (known,) = table.view()[0].values()
    assert [card.global_gpu_id for card in known.cards] == [f"server1-8000:{n}" for n in range(3)]
    assert endpoint.numbers().healthy


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        ({"status": 404}, EndpointUnavailable, "status 404"),
        ({"status": 500}, EndpointUnavailable, "status 500"),
        ({"status": 200, "json": {"error": "nvidia-smi failed", "gpu_count": 0, "gpus": []}}, BadAnswer, "nvidia-smi"),
        ({"status": 200, "body": b"<html>"}, BadAnswer, "JSON"),
        ({"status": 200, "json": {"other": 1}}, BadAnswer, "gpus"),
    ],
)
def test_mocked_endpoint_responses_and_their_errors(mock, endpoint, answer, error, told):
    """Whatever it answers: one of our errors, and after two of them the breaker opens; one good answer closes it."""
    mock.get(URL, **answer)
    for _ in range(2):
        with pytest.raises(error, match=told):
            endpoint.poll()
    assert endpoint.open
    mock.reset()
    mock.get(URL, body=summary())
    endpoint.poll()
    assert not endpoint.open


def test_edge_cases_of_an_answer():
    """No card; a card that cannot be read costs itself alone; what is missing is unknown, and not 0."""
    empty = parse_summary(b'{"gpu_count": 0, "gpus_summary": []}', endpoint_id="a", taken_at=0.0)
    assert isinstance(empty, Sample)
    assert empty.gpus == ()
    bad = b'{"gpu_count": 2, "gpus_summary": [{"gpu_id": "x"}, {"gpu_id": 1, "name": "A", "memory_usage_percent": 2}]}'
    half = parse_summary(bad, endpoint_id="a", taken_at=0.0)
    (left,) = half.gpus
    assert (left.local_gpu_id, left.utilization_percent) == (1, None)
    assert half.problems
