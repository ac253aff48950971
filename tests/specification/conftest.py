"""What the tests of the specification share: one fleet of real servers, and statistics servers that count."""

from __future__ import annotations

import pytest

from gpupool_sync import Endpoint, GPUPool
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet


def pytest_collection_modifyitems(items):
    """The marker of what starts server processes, for all that has the fleet."""
    for item in items:
        if "_running_fleet" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def _running_fleet():
    with FakeFleet([4, 2, 2], interval=0.05) as fleet:
        yield fleet


@pytest.fixture
def fleet(_running_fleet):
    """Three servers that grant leases, with four cards and twice two."""
    for server in _running_fleet:
        server.heal()
    return _running_fleet


@pytest.fixture
def names(fleet):
    """The fleet as three endpoints: server1, server2, server3."""
    return [f"server{number}={server.url}" for number, server in enumerate(fleet, 1)]


@pytest.fixture
def make_pool(request):
    """Pools that poll fast and arbitrate by themselves; closed at the end."""
    made = []

    def make(endpoints, **options):
        defaults = {
            "lease_store": MemoryStore(),
            "poll_interval": 0.05,
            "health_check_interval": 0.2,
            "breaker_failures": 2,
            "endpoint_timeout": 10.0,
        }
        pool = GPUPool(endpoints, **{**defaults, **options})
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.close()


@pytest.fixture
def pool(make_pool, names):
    pool = make_pool(names)
    pool.open()
    assert pool.refresh(30)
    return pool


@pytest.fixture
def named(fleet):
    """As `names`, as objects with further options."""

    def make(number, **options):
        return Endpoint(fleet[number - 1].url, name=f"server{number}", **options)

    return make
