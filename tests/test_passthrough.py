"""``GPU_POOL_PASSTHROUGH``: the CPU in the place of a GPU, only where asked for and only where there is none."""

from __future__ import annotations

import pytest

from cards import Cards, local_pool
from gpupool_sync import ConfigError, GPUPool, NoSuchGPU, devices
from gpupool_sync.devices.base import DeviceError, NoReader
from gpupool_sync.leases.memory import MemoryStore


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU."""
    monkeypatch.setattr(devices, "open_reader", lambda: NoReader("no GPUs can be read here"))


def test_a_laptop_gets_its_cpu(no_gpu, monkeypatch, caplog):
    """Whatever is asked for; one warning says so."""
    monkeypatch.setenv("GPU_POOL_PASSTHROUGH", "1")
    with GPUPool(lease_store=MemoryStore()) as pool:
        with pool.gpu(model="H100", memory_mb=20000, timeout=20) as gpu, pool.gpus(3, timeout=20) as three:
            assert (gpu.device, gpu.activate(), gpu.env()["CUDA_VISIBLE_DEVICES"]) == ("cpu", "cpu", "")
            assert len({gpu.global_gpu_id, *(each.global_gpu_id for each in three)}) == 4
            assert gpu.run(["true"]).returncode == 0
        pool.refresh(timeout=20)
    said = [record for record in caplog.records if "GPU_POOL_PASSTHROUGH" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("value", [None, "0", ""])
def test_it_is_never_a_silent_fallback(no_gpu, monkeypatch, value):
    """Without the variable a machine without GPUs has none."""
    monkeypatch.delenv("GPU_POOL_PASSTHROUGH", raising=False)
    if value is not None:
        monkeypatch.setenv("GPU_POOL_PASSTHROUGH", value)
    with GPUPool(lease_store=MemoryStore()) as pool, pytest.raises(NoSuchGPU):
        pool.acquire(timeout=20)


def test_a_bad_value_is_said_at_once(no_gpu, monkeypatch):
    """By the name of the variable."""
    monkeypatch.setenv("GPU_POOL_PASSTHROUGH", "perhaps")
    with pytest.raises(ConfigError, match="GPU_POOL_PASSTHROUGH='perhaps': 1 or 0"):
        GPUPool().open()


def test_a_gpu_that_is_there_is_used(monkeypatch):
    """The variable changes nothing on a machine with GPUs, nor where they cannot be read at the moment."""
    monkeypatch.setenv("GPU_POOL_PASSTHROUGH", "1")
    cards = Cards(1)
    with local_pool(monkeypatch, cards) as pool:
        with pool.gpu(timeout=20) as gpu:
            assert gpu.uuid == "GPU-00000000"
        cards.error = DeviceError("the driver does not answer")
        pool.refresh(timeout=20)
        assert "does not answer" in str(pool.status().endpoints[0].last_error)
        assert {each.name for each in pool.status().gpus} == {"NVIDIA A100"}


def test_servers_that_are_down_are_not_replaced(no_gpu, monkeypatch):
    """With endpoints configured this machine does not count."""
    monkeypatch.setenv("GPU_POOL_PASSTHROUGH", "1")
    with GPUPool("http://127.0.0.1:9", lease_store=MemoryStore(), endpoint_timeout=1) as pool:
        pool.open(wait=True, timeout=20)
        assert pool.status().gpus == []
