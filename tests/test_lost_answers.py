"""A claim is granted, but its answer is lost, and nobody can be asked again until the lease has ended."""

from __future__ import annotations

import pytest

from gpupool_sync import Endpoint, GPUPool
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases.base import Granted
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet

pytestmark = pytest.mark.real


class Deaf(MemoryStore):
    """Its first grants are never heard of; their leases end meanwhile."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.ids: list[str] = []

    def claim(self, claim):
        if claim.id not in self.ids:
            self.ids.append(claim.id)
        outcome = super().claim(claim)
        if isinstance(outcome, Granted) and self.times:
            self.times -= 1
            self.release([claim.id])
            raise LeaseStoreError("the connection was cut")
        return outcome


@pytest.fixture(scope="module")
def server():
    with FakeFleet([1], leases=False) as fleet:
        yield fleet[0]


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_it_is_asked_for_anew(server, timeout):
    """Under another id, as the first one is gone: who waits gets a card, and no word of a pool that is closed."""
    store = Deaf(times=2)
    with GPUPool([Endpoint(server.url)], lease_store=store) as pool:
        with pool.gpu(timeout=timeout, local=False) as gpu:
            assert not gpu.lost
            assert pool.stats()["held"] == 1
        assert pool.stats()["held"] == 0
        assert list(store.leases()) == []
        assert list(store.queue()) == []
        with pool.gpu(timeout=30.0, local=False):
            pass
    assert len(store.ids) == 4
