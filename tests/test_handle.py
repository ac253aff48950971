"""The handle of a GPU of this machine: masks, commands, and what it refuses."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import types

import attrs
import pytest

from cards import Cards, local_pool
from gpupool_sync import AcquireTimeout, ConfigError, GPUPoolError, LeaseLost, NoSuchGPU, RemoteGPUError, cuda, handle
from gpupool_sync.models import HostIdentity
from helpers import eventually, run_threads


@pytest.fixture(autouse=True)
def _no_mask(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "GPU_POOL_VISIBLE"):
        # Set and deleted, so that whatever a test leaves behind is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(handle, "_mask", handle._Mask())


@pytest.fixture
def pool(monkeypatch):
    with local_pool(monkeypatch, Cards(2)) as pool:
        yield pool


PRINT_MASK = [
    sys.executable,
    "-c",
    "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])",
]


def test_the_mask_names_the_card_by_uuid_and_order(pool):
    """Order and mask come together, so that no program counts another card."""
    with pool.gpu() as gpu:
        assert gpu.env() == {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": gpu.uuid,
            "NVIDIA_VISIBLE_DEVICES": gpu.uuid,
        }
        assert gpu.env("index")["CUDA_VISIBLE_DEVICES"] == str(gpu.local_gpu_id)
        with pytest.raises(ConfigError, match="uuid or index"):
            gpu.env("number")
    with pool.gpus(2) as gpus:
        assert gpus.env()["CUDA_VISIBLE_DEVICES"] == ",".join(gpu.uuid for gpu in gpus)


def test_the_form_of_the_mask_is_a_setting(pool, monkeypatch):
    """``GPU_POOL_VISIBLE=index`` serves programs that parse integers."""
    monkeypatch.setenv("GPU_POOL_VISIBLE", "index")
    with pool.gpu() as gpu:
        assert gpu.env()["CUDA_VISIBLE_DEVICES"] == str(gpu.local_gpu_id)


def test_a_mig_instance_has_no_number_that_cuda_knows(monkeypatch):
    """By number CUDA would see nothing: it is named by its UUID whatever the setting."""
    cards = Cards(1)
    cards.set(0, uuid="MIG-41b35e14-77e5-5b29-bd82-a3d2b0c5bd1f", local_gpu_id=1100)
    with local_pool(monkeypatch, cards) as pool, pool.gpu() as gpu:
        for visible in ("uuid", "index"):
            assert gpu.env(visible)["CUDA_VISIBLE_DEVICES"] == gpu.uuid


def test_activate_masks_this_process_and_release_unmasks_it(pool):
    """The card is cuda:0 while we have it; afterwards the environment is as before."""
    with pool.gpu() as gpu:
        assert gpu.activate() == "cuda:0"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu.uuid
        assert gpu.device == "cuda:0"
        assert gpu.activate() == "cuda:0"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert "CUDA_DEVICE_ORDER" not in os.environ


def test_a_second_activation_is_refused_while_the_first_lease_lives(pool):
    """One process has one mask: two threads with a card each are told so, and never compute on one."""
    with pool.gpu() as one, pool.gpu() as two:
        one.activate()
        with pytest.raises(GPUPoolError, match=f"masked to {one.global_gpu_id}"):
            two.activate()
        one.release()
        assert two.activate() == "cuda:0"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == two.uuid


def test_threads_that_activate_at_once_are_right_or_refused(monkeypatch):
    """Whose activation returned has the mask to itself until its release; the others are told who has it."""
    wrong, outcomes = [], []

    def use(_):
        for _ in range(20):
            with pool.gpu(timeout=20) as gpu:
                try:
                    assert gpu.activate() == "cuda:0"
                except GPUPoolError as exc:
                    outcomes.append("refused" if "masked to" in str(exc) else repr(exc))
                    continue
                outcomes.append("right")
                mask = os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"], gpu.device
                if mask != (gpu.uuid, "PCI_BUS_ID", "cuda:0"):
                    wrong.append((mask, gpu.uuid))

    with local_pool(monkeypatch, Cards(8)) as pool:
        run_threads(8, use)
    assert wrong == []
    assert set(outcomes) <= {"right", "refused"}
    assert "right" in outcomes
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_release_while_activate_is_under_way_leaves_no_mask(pool, monkeypatch):
    """The lease ends after the first look at it: nothing may be masked to a card that is somebody else's by now."""
    gpu = pool.acquire(timeout=20)
    cuda_initialised = cuda.initialised

    def release_meanwhile():
        monkeypatch.setattr(cuda, "initialised", cuda_initialised)
        gpu.release()
        return False

    monkeypatch.setattr(cuda, "initialised", release_meanwhile)
    with pytest.raises(LeaseLost, match="released before"):
        gpu.activate()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    with pool.gpu(timeout=20) as other:
        assert other.activate() == "cuda:0"


#: The driver's library, as far as it is asked: initialised by anybody's `cuInit`, two devices in an order of its own.
DRIVER = """
#include <string.h>
static int initialised;
int cuInit(unsigned flags) { initialised = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = 0; return initialised ? 0 : 3; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, device ? 0xaa : 0xbb, 16); return 0; }
"""

PROGRAM = """
import ctypes, os, sys
from cards import Cards
from gpupool_sync import GPUPool, cuda, devices
from gpupool_sync.leases.memory import MemoryStore
cards = Cards(2)
for number, byte in enumerate(("aa", "bb")):
    cards.set(number, uuid="GPU-" + "-".join(byte * length for length in (4, 2, 2, 2, 6)))
devices.open_reader = lambda: cards
devices.host_identity = lambda: __import__("cards").HERE
loaded = []
def says():
    return "libcuda" in open("/proc/self/maps").read(), cuda.initialised()
with GPUPool(lease_store=MemoryStore()) as pool:
    with pool.gpu() as gpu:
        print(gpu.activate(), os.environ.get("CUDA_VISIBLE_DEVICES") == gpu.uuid, *says())
    loaded = ctypes.CDLL("libcuda.so.1")  # some library is imported that uses CUDA
    with pool.gpu() as gpu:
        print(gpu.activate(), os.environ.get("CUDA_VISIBLE_DEVICES") == gpu.uuid, *says())
    loaded.cuInit(0)  # and uses it
    with pool.gpus(2) as gpus:
        for gpu in sorted(gpus, key=lambda gpu: gpu.local_gpu_id):
            print(gpu.activate(), "CUDA_VISIBLE_DEVICES" in os.environ, *says())
print(sorted(set(sys.modules) & {"torch", "cupy", "jax", "tensorflow", "numba"}))
"""


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs /proc and a C compiler")
def test_whoever_initialises_cuda_is_noticed(tmp_path):
    """A real library of that name in a real process: loaded is not initialised, and nothing is loaded for the look."""
    (tmp_path / "driver.c").write_text(DRIVER)
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "driver.c")], check=True)
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_ORDER"}
    environ |= {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        "cuda:0 True False False",
        "cuda:0 True True False",
        "cuda:1 False True True",
        "cuda:0 False True True",
        "[]",
    ]
    assert done.stderr.count("cannot be masked") == 1


def test_with_cuda_initialised_the_card_is_found_and_nothing_is_masked(pool, monkeypatch):
    """A mask would be ignored, so the card's number among the visible ones is returned."""
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pool.gpu(uuid="GPU-00000001") as gpu:
        with pytest.raises(GPUPoolError, match="order of its own"):
            gpu.activate()
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        assert gpu.activate() == "cuda:1"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000001,GPU-00000000")
        assert gpu.activate() == "cuda:0"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000000")
        with pytest.raises(GPUPoolError, match="does not show"):
            gpu.activate()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-00000000"


@pytest.mark.parametrize(
    ("mask", "order", "device"),
    [
        ("1,0", "PCI_BUS_ID", "cuda:0"),
        ("1,0", None, None),  # numbers mean nothing in CUDA's own order
        ("-1,1", "PCI_BUS_ID", None),  # CUDA sees nothing from the first invalid item on
        ("0,1", "PCI_BUS_ID", "cuda:1"),
        ("GPU-0000000", None, None),
        ("GPU-00000001", None, "cuda:0"),
        ("", "PCI_BUS_ID", None),
    ],
)
def test_the_device_is_counted_as_cuda_counts(pool, monkeypatch, mask, order, device):
    """The number is right or there is none: never another card's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    with pool.gpu(uuid="GPU-00000001") as gpu:
        if mask == "GPU-0000000":  # a beginning that fits both cards names the first
            assert gpu.device == "cuda:0"
        elif device is None:
            with pytest.raises(GPUPoolError):
                _ = gpu.device
        else:
            assert gpu.device == device


def test_libraries_that_are_only_imported_do_not_count_as_cuda(pool, monkeypatch):
    """An imported TensorFlow has not initialised CUDA: the process is masked, or it would take every card."""
    for name in ("tensorflow", "cupy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pool.gpu() as gpu:
        gpu.activate()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu.uuid


def test_commands_run_masked(pool):
    """``gpu.run`` and ``gpu.popen`` start a command that sees this card only."""
    with pool.gpu() as gpu:
        done = gpu.run(PRINT_MASK, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [gpu.uuid, "PCI_BUS_ID"]
        with gpu.popen(PRINT_MASK, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.read().split() == [gpu.uuid, "PCI_BUS_ID"]
        with pytest.raises(ConfigError, match=r"a list is allowed"):
            gpu.run("python train.py")
    with pytest.raises(LeaseLost):
        gpu.run(PRINT_MASK)


@pytest.mark.parametrize("end", ["release", "close"])
def test_a_card_stays_leased_while_a_command_runs_on_it(pool, end):
    """Freeing a card in use is worse than keeping it: the lease ends with the command, also across close()."""
    gpu = pool.acquire()
    store = pool._state.engine.arbiter
    process = gpu.popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        gpu.release() if end == "release" else pool.close()
        assert store.is_held(gpu.uuid)
    finally:
        process.communicate(b"\n", timeout=20)
    eventually(lambda: not store.is_held(gpu.uuid), message="the lease ends with the command")


def test_a_card_stays_leased_while_run_has_not_returned(pool, tmp_path):
    """A release on another thread does not free a card that a command of `run` is computing on."""
    gpu = pool.acquire()
    store = pool._state.engine.arbiter
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    runner = threading.Thread(target=gpu.run, args=(["sh", "-c", f"echo >{fifo}; read line <{fifo}"],))
    runner.start()
    try:
        fifo.read_text()  # it runs
        gpu.release()
        assert store.is_held(gpu.uuid)
        assert not gpu.released
    finally:
        fifo.write_text("\n")
        runner.join(20)
    eventually(lambda: not store.is_held(gpu.uuid), message="the lease ends with the command")


def test_the_card_of_another_machine_is_refused_with_the_way_there(pool):
    """The error has the command that would run over there."""
    with pool.gpu() as gpu:
        grant = gpu._tie.grant
        sample = attrs.evolve(grant.snapshot.sample, host=HostIdentity("other", "bighost"))
        grant.snapshot = attrs.evolve(grant.snapshot, sample=sample, is_local=False)
        with pytest.raises(RemoteGPUError, match=rf"ssh bighost env .*CUDA_VISIBLE_DEVICES={gpu.uuid}.* nvcc -V"):
            gpu.run(["nvcc", "-V"])
        with pytest.raises(RemoteGPUError):
            gpu.env("index")


def test_a_handle_cannot_be_pickled(pool):
    """A handle belongs to its process; the error says what to pass instead."""
    with pool.gpu() as gpu, pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(gpu)


def test_a_forgotten_with_is_explained(pool):
    """``pool.gpu()`` without ``with`` is no GPU; what is asked of it says how to get one."""
    context = pool.gpu()
    assert "with pool.gpu() as gpu" in repr(context)
    with pytest.raises(AttributeError, match=r"use `with pool\.gpu"):
        _ = context.uuid


class Driver:
    """The CUDA driver's library, initialised, with devices in an order of its own."""

    def __init__(self, *uuids):
        self.uuids = uuids
        self.initialised = True

    def cuCtxGetCurrent(self, context):
        return 0 if self.initialised else 3

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.uuids)
        return 0

    def cuDeviceGet(self, device, number):
        device._obj.value = number + 100  # a handle, not the number
        return 0

    def cuDeviceGetUuid_v2(self, uuid, device):
        uuid._obj[:] = bytes.fromhex(self.uuids[device.value - 100].split("-", 1)[1].replace("-", ""))
        return 0


FIRST = "GPU-01234567-89ab-cdef-0123-456789abcdef"
SECOND = "GPU-fedcba98-7654-3210-fedc-ba9876543210"


@pytest.fixture
def driver(monkeypatch):
    made = Driver(SECOND, FIRST)
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    return made


@pytest.fixture
def two_cards(monkeypatch):
    cards = Cards(2)
    for index, uuid in enumerate((FIRST, SECOND)):
        cards.set(index, uuid=uuid)
    with local_pool(monkeypatch, cards) as pool:
        yield pool


def test_initialised_cuda_says_itself_which_device_it_is(two_cards, driver, monkeypatch, caplog):
    """By UUID, whatever the variables say now; once it is said that nothing is masked."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", FIRST)  # too late: CUDA has been initialised before
    with two_cards.gpu(uuid=FIRST) as one, two_cards.gpu(uuid=SECOND) as two:
        assert (one.activate(), two.activate(), one.device, two.device) == ("cuda:1", "cuda:0", "cuda:1", "cuda:0")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == FIRST
        driver.uuids = (SECOND,)
        with pytest.raises(GPUPoolError, match=r"initialised in this process without .* among its 1 devices"):
            one.activate()
    assert [record.levelname for record in caplog.records if "cannot be masked" in record.getMessage()] == ["WARNING"]


def test_a_process_that_cuda_has_bound_asks_for_its_gpu_again(two_cards, driver, caplog):
    """Another one would be of no use to it; if it cannot have it, the error says what to do."""
    driver.initialised = False
    with two_cards.gpu(uuid=SECOND) as gpu:
        assert gpu.activate() == "cuda:0"
        driver.initialised, driver.uuids = True, (SECOND,)
    for _ in range(5):
        with two_cards.gpu(timeout=10) as again:
            assert again.uuid == SECOND
            assert again.activate() == "cuda:0"
    assert not [record for record in caplog.records if "cannot be masked" in record.getMessage()]
    with two_cards.gpu(uuid=SECOND), pytest.raises(AcquireTimeout, match="maxtasksperchild=1"):
        two_cards.acquire(timeout=0)
    with two_cards.gpu(uuid=FIRST, timeout=10) as other:
        assert other.uuid == FIRST, "what is asked for by name is the caller's business"
    with pytest.raises(NoSuchGPU, match="bound to the GPU"):
        two_cards.acquire(count=2, timeout=10)


def test_a_driver_that_does_not_tell_uuids_leaves_the_variables(two_cards, monkeypatch):
    """An old one: then the mask of the environment counts."""
    old = types.SimpleNamespace(cuCtxGetCurrent=lambda context: 0)
    monkeypatch.setattr(cuda, "_driver", lambda: old)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{SECOND},{FIRST}")
    with two_cards.gpu(uuid=FIRST) as gpu:
        assert gpu.activate() == "cuda:1"
