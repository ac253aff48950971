"""The server's own description of itself, tried out: requests that follow it and requests that do not.

schemathesis makes them up from ``/openapi.json`` and sends them to a real server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from attacked import Victim, victim
from gpupool_sync.server.asgi import METRICS_PATH
from gpupool_sync.server.leases import PATHS as LEASE_PATHS
from gpupool_sync.server.pages import PATHS

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = [pytest.mark.real, pytest.mark.checkout]

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
#: What a long poll may take here, in seconds.
PATIENCE = 0.01
#: An operation costs ten times what other properties cost.
EXAMPLES = max(10, settings().max_examples // 10)


OPERATIONS = [("GET", path) for path in (*PATHS, METRICS_PATH)]
OPERATIONS += [(method, path) for path, methods in LEASE_PATHS.items() for method in methods]


@pytest.fixture(scope="module")
def server() -> Iterator[Victim]:
    with victim() as made:
        yield made
        assert made.healthy()


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_tried(schema):
    """What the server describes is what is tried here."""
    described = {(found.ok().method.upper(), found.ok().path) for found in schema.get_all_operations()}
    assert described == set(OPERATIONS)


@pytest.mark.hypothesis  # for `make test-nightly`, as it is one only inside
@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [(*each, "positive") for each in OPERATIONS] + [(*each, "negative") for each in OPERATIONS if each[0] == "POST"],
)
def test_the_server_does_as_its_description_says(schema, method, path, kind):
    """No request, right or wrong, is answered by 500, an undocumented status, or in another shape than documented."""
    operation = schema[path][method]
    tried: set[int] = set()

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(kind)))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case) -> None:
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("timeout"), (int, float)):
            body["timeout"] = min(body["timeout"], PATIENCE)
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        tried.add(answer.status_code)
        if answer.status_code >= 400 and path != "/health":
            error = json.loads(answer.content)["error"]
            assert error["code"].isidentifier()
            assert error["message"].isprintable()

    check()
    if kind == "negative":
        assert tried & {400, 415, 422}
    else:
        assert tried & {200, 202, 409}
