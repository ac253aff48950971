"""Reading cards: NVML, nvidia-smi, simulated ones, and what happens when a card or a driver is sick."""

from __future__ import annotations

import getpass
import os
import signal
import stat
import threading
import time
from types import SimpleNamespace

import attrs
import pytest

from gpupool_sync import GPUPool, NoSuchGPU, devices
from gpupool_sync.devices import host as host_module
from gpupool_sync.devices import nvml as nvml_module
from gpupool_sync.devices.nvidia_smi import NvidiaSmiReader
from gpupool_sync.devices.nvml import NvmlReader
from gpupool_sync.devices.simulated import SimulatedReader, memory_of, parse_cards
from gpupool_sync.devices.visible import Mask
from gpupool_sync.errors import ConfigError
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import GPUFault
from helpers import eventually

MIB = 1024 * 1024
ALL = Mask(None)


# --- a driver that a test invents ---------------------------------------------------------------------


class NVMLError(Exception):
    """Base class, as in pynvml."""


def _error(name: str, text: str) -> type[NVMLError]:
    return type(name, (NVMLError,), {"__str__": lambda self: text})


class FakeCard:
    """One card of a `FakeNvml`; what is an exception is raised when it is asked for."""

    def __init__(self, index: int) -> None:
        self.uuid = f"GPU-{index:08d}-aaaa"
        self.name = "NVIDIA H100 80GB HBM3"
        self.total = 80000 * MIB
        self.used = 20000 * MIB
        self.reserved = 600 * MIB
        self.utilization = 37
        self.temperature = 41
        self.power = 123456  # mW
        self.limit = 700000
        self.processes: list | NVMLError = []
        self.mig: list[FakeCard | None] | None = None
        self.gate = threading.Event()  # calls wait until it is set
        self.gate.set()
        self.calls = 0


class FakeNvml:
    """As much of `pynvml` as is used, over invented cards.  Handles are the cards themselves."""

    NVML_TEMPERATURE_GPU = 0
    nvmlMemory_v2 = 0x2000028
    NVMLError = NVMLError
    NVMLError_NotSupported = _error("NVMLError_NotSupported", "Not Supported")
    NVMLError_NotFound = _error("NVMLError_NotFound", "Not Found")
    NVMLError_FunctionNotFound = _error("NVMLError_FunctionNotFound", "Function Not Found")
    NVMLError_GpuIsLost = _error("NVMLError_GpuIsLost", "GPU is lost")
    NVMLError_Uninitialized = _error("NVMLError_Uninitialized", "Uninitialized")
    NVMLError_DriverNotLoaded = _error("NVMLError_DriverNotLoaded", "Driver Not Loaded")

    def __init__(self, count: int) -> None:
        self.cards = [FakeCard(index) for index in range(count)]
        self.init_error: NVMLError | None = None
        self.init_gate = threading.Event()
        self.init_gate.set()
        self.inits = self.shutdowns = 0
        self.loaded = False

    def release(self) -> None:
        """Let every call that hangs return."""
        for gate in (self.init_gate, *(card.gate for card in self.cards)):
            gate.set()

    def nvmlInit(self):
        self.init_gate.wait(30)
        self.inits += 1
        if self.init_error is not None:
            raise self.init_error
        self.loaded = True

    def nvmlShutdown(self):
        self.shutdowns += 1
        self.loaded = False

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def _check(self) -> None:
        if not self.loaded:
            raise self.NVMLError_Uninitialized

    def _get(self, card, field):
        self._check()
        value = getattr(card, field)
        if isinstance(value, NVMLError):
            raise value
        return value

    def nvmlDeviceGetHandleByIndex(self, index):
        self._check()
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card):
        return self._get(card, "uuid")

    def nvmlDeviceGetName(self, card):
        return self._get(card, "name")

    def nvmlDeviceGetMigMode(self, card):
        if card.mig is None:
            raise self.NVMLError_NotSupported
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card):
        return len(card.mig) if card.mig else 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card, number):
        if number >= len(card.mig) or card.mig[number] is None:
            raise self.NVMLError_NotFound
        return card.mig[number]

    def nvmlDeviceGetMemoryInfo(self, card, version=None):
        card.calls += 1
        card.gate.wait(30)
        total, used, reserved = self._get(card, "total"), self._get(card, "used"), card.reserved
        return SimpleNamespace(total=total, used=used if version else used + reserved, reserved=reserved)

    def nvmlDeviceGetUtilizationRates(self, card):
        return SimpleNamespace(gpu=self._get(card, "utilization"), memory=1)

    def nvmlDeviceGetTemperature(self, card, sensor):
        return self._get(card, "temperature")

    def nvmlDeviceGetPowerUsage(self, card):
        return self._get(card, "power")

    def nvmlDeviceGetPowerManagementLimit(self, card):
        return self._get(card, "limit")

    def nvmlDeviceGetComputeRunningProcesses(self, card):
        return self._get(card, "processes")


@pytest.fixture
def open_nvml():
    """Makes readers over a `FakeNvml`; in the end nothing hangs and all are closed."""
    made = []

    def make(nvml: FakeNvml, mask: Mask = ALL) -> NvmlReader:
        made.append((nvml, NvmlReader(nvml, mask)))
        return made[-1][1]

    yield make
    for nvml, reader in made:
        nvml.release()
        reader.close()


def ids(sample):
    return [gpu.local_gpu_id for gpu in sample.gpus]


# --- NVML ---------------------------------------------------------------------------------------------


def test_nvml_reads_every_field(open_nvml):
    """A card's readings come in the units of nvidia-smi, and memory that the driver reserves is not counted as used."""
    nvml = FakeNvml(2)
    nvml.cards[0].processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=500 * MIB)]
    sample = open_nvml(nvml).read(60.0)

    assert sample.faults == ()
    assert ids(sample) == [0, 1]
    gpu = sample.gpus[0]
    assert (gpu.name, gpu.uuid) == ("NVIDIA H100 80GB HBM3", "GPU-00000000-aaaa")
    assert (gpu.memory_total_mb, gpu.memory_used_mb, gpu.memory_usage_percent) == (80000.0, 20000.0, 25.0)
    assert (
        gpu.utilization_percent,
        gpu.temperature_c,
        gpu.power_draw_w,
        gpu.power_limit_w,
    ) == (37.0, 41.0, 123.46, 700.0)
    assert sample.host == devices.host_identity()


def test_nvml_tells_who_computes(open_nvml):
    """A compute process is told with its user and short name; its memory is None where the driver does not know it."""
    nvml = FakeNvml(1)
    nvml.cards[0].processes = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=500 * MIB),
        SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
    ]
    mine, gone = open_nvml(nvml).read(60.0).gpus[0].processes

    assert (os.getpid(), getpass.getuser(), 500.0) == (mine.pid, mine.user, mine.memory_mb)
    assert mine.name
    assert (gone.user, gone.memory_mb, gone.name) == (None, None, None)


def test_nvml_without_the_second_memory_call(open_nvml):
    """An old driver's memory reading is used where it has no better one."""
    nvml = FakeNvml(1)
    plain = nvml.nvmlDeviceGetMemoryInfo

    def only_plain(card, version=None):
        if version:
            raise nvml.NVMLError_FunctionNotFound
        return plain(card)

    nvml.nvmlDeviceGetMemoryInfo = only_plain
    assert open_nvml(nvml).read(60.0).gpus[0].memory_used_mb == 20600.0


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("utilization", "utilization_percent"),
        ("temperature", "temperature_c"),
        ("power", "power_draw_w"),
        ("limit", "power_limit_w"),
        ("processes", "processes"),
    ],
)
def test_nvml_a_reading_that_a_card_lacks_is_none(open_nvml, field, shown):
    """What a card does not support is unknown, not 0, and costs nothing else."""
    nvml = FakeNvml(1)
    setattr(nvml.cards[0], field, nvml.NVMLError_NotSupported())
    sample = open_nvml(nvml).read(60.0)

    assert sample.faults == ()
    assert getattr(sample.gpus[0], shown) is None
    assert sample.gpus[0].memory_usage_percent == 25.0


def test_nvml_a_lost_card_is_reported_as_such(open_nvml):
    """A card that is lost becomes a fault in the driver's words, with the name it had; the others are read."""
    nvml = FakeNvml(3)
    reader = open_nvml(nvml)
    reader.read(60.0)
    nvml.cards[1].temperature = nvml.NVMLError_GpuIsLost()
    sample = reader.read(60.0)

    assert ids(sample) == [0, 2]
    assert (GPUFault("GPU is lost", 1, "GPU-00000001-aaaa", "NVIDIA H100 80GB HBM3"),) == sample.faults
    nvml.cards[1].temperature = 40
    assert ids(reader.read(60.0)) == [0, 1, 2]


def test_nvml_a_hung_card_harms_no_other(open_nvml, monkeypatch):
    """A card whose driver call never returns is a fault, is not asked again meanwhile, and comes back by itself."""
    monkeypatch.setattr(nvml_module, "PATIENCE", 1.0)
    nvml = FakeNvml(3)
    reader = open_nvml(nvml)
    assert ids(reader.read(60.0)) == [0, 1, 2]
    nvml.cards[1].gate.clear()
    calls = nvml.cards[1].calls

    begin = time.monotonic()
    sample = reader.read(60.0)
    assert time.monotonic() - begin < 30.0
    assert ids(sample) == [0, 2]
    assert sample.faults[0].reason.startswith("no answer from the driver for ")
    assert (sample.faults[0].local_gpu_id, sample.faults[0].uuid) == (1, "GPU-00000001-aaaa")

    for _ in range(5):
        assert ids(reader.read(60.0)) == [0, 2]
    assert calls + 1 == nvml.cards[1].calls

    nvml.cards[1].gate.set()
    eventually(lambda: ids(reader.read(60.0)) == [0, 1, 2])


def test_nvml_a_card_that_never_answered_gets_the_whole_timeout(open_nvml, monkeypatch):
    """The first reading may take as long as the driver needs to start a card, within the caller's timeout."""
    monkeypatch.setattr(nvml_module, "PATIENCE", 0.01)
    nvml = FakeNvml(1)
    nvml.cards[0].gate.clear()
    reader = open_nvml(nvml)
    assert "no answer" in reader.read(0.05).faults[0].reason
    timer = threading.Timer(0.2, nvml.cards[0].gate.set)
    timer.start()
    eventually(lambda: ids(reader.read(60.0)) == [0])
    timer.join()


def test_nvml_a_driver_that_hangs_at_the_start(open_nvml):
    """A driver that does not even initialise is an error within the timeout, and works once it comes to life."""
    nvml = FakeNvml(1)
    nvml.init_gate.clear()
    reader = open_nvml(nvml)
    for _ in range(2):
        with pytest.raises(devices.DeviceError, match="no answer from the driver"):
            reader.read(0.05)
    nvml.init_gate.set()
    assert ids(reader.read(60.0)) == [0]


def test_nvml_without_a_driver(open_nvml):
    """A library without its driver says so in the driver's words, and is tried again at the next read."""
    nvml = FakeNvml(1)
    nvml.init_error = nvml.NVMLError_DriverNotLoaded()
    reader = open_nvml(nvml)
    with pytest.raises(devices.DeviceError, match="Driver Not Loaded"):
        reader.read(60.0)
    nvml.init_error = None
    assert ids(reader.read(60.0)) == [0]


def test_nvml_after_the_driver_was_reloaded(open_nvml):
    """A reload of the driver costs no reading, and cards that came with it are seen."""
    nvml = FakeNvml(1)
    reader = open_nvml(nvml)
    reader.read(60.0)
    nvml.loaded = False
    nvml.cards.append(FakeCard(1))

    assert ids(reader.read(60.0)) == [0, 1]
    assert nvml.inits == 2


def test_nvml_offers_the_instances_of_a_partitioned_card(open_nvml):
    """Of a MIG card the instances are offered, each with an id and UUID of its own, and never the card as a whole."""
    nvml = FakeNvml(2)
    instances = [FakeCard(10), None, FakeCard(12)]
    for number, instance in enumerate(instances):
        if instance is not None:
            instance.uuid = f"MIG-{number}"
            instance.name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
            instance.total = 10000 * MIB
            instance.used = 1000 * MIB
            instance.temperature = instance.power = instance.limit = nvml.NVMLError_NotSupported()
    nvml.cards[1].mig = instances
    sample = open_nvml(nvml).read(60.0)

    assert ids(sample) == [0, 1100, 1102]
    assert [gpu.uuid for gpu in sample.gpus[1:]] == ["MIG-0", "MIG-2"]
    assert sample.gpus[1].memory_usage_percent == 10.0
    assert sample.gpus[1].utilization_percent is None
    assert ids(open_nvml(nvml, Mask("MIG-2")).read(60.0)) == [1102]
    assert ids(open_nvml(nvml, Mask("1")).read(60.0)) == [1100, 1102]


def test_nvml_a_partitioned_card_without_instances_is_a_fault(open_nvml):
    """A MIG card without instances is of no use to CUDA, so it is not offered, and says why."""
    nvml = FakeNvml(1)
    nvml.cards[0].mig = []
    sample = open_nvml(nvml).read(60.0)

    assert sample.gpus == ()
    assert "MIG is enabled" in sample.faults[0].reason


def test_nvml_obeys_the_mask(open_nvml):
    """Only cards in CUDA_VISIBLE_DEVICES are shown, under the numbers of the system."""
    nvml = FakeNvml(4)
    assert ids(open_nvml(nvml, Mask("3,1")).read(60.0)) == [1, 3]
    assert ids(open_nvml(nvml, Mask("GPU-00000002")).read(60.0)) == [2]
    nothing = FakeNvml(4)
    nothing.init_gate.clear()
    assert open_nvml(nothing, Mask("")).read(60.0).gpus == ()


def test_nvml_a_card_that_never_answered_hides_no_masked_one(open_nvml, monkeypatch):
    """The UUIDs that a mask names after a hung card's are still found."""
    nvml = FakeNvml(2)

    def hang(index):
        if index == 0:
            nvml.cards[0].gate.wait(30)
        return nvml.cards[index]

    nvml.nvmlDeviceGetHandleByIndex = hang
    nvml.cards[0].gate.clear()
    assert ids(open_nvml(nvml, Mask("GPU-00000000,GPU-00000001")).read(2.0)) == [1]


def test_nvml_closes_at_once_while_a_card_hangs():
    """Closing does not wait for a driver call that never returns, and leaves the library alone."""
    nvml = FakeNvml(2)
    reader = NvmlReader(nvml, ALL)
    nvml.cards[0].gate.clear()
    reader.read(0.05)
    begin = time.monotonic()
    reader.close()
    reader.close()
    assert time.monotonic() - begin < 20.0
    assert nvml.shutdowns == 0
    nvml.release()
    with pytest.raises(devices.DeviceError, match="closed"):
        reader.read(1.0)


def test_nvml_shuts_the_library_down(open_nvml):
    """Closing gives the driver back and ends all threads."""
    nvml = FakeNvml(2)
    reader = open_nvml(nvml)
    reader.read(60.0)
    reader.close()
    assert nvml.shutdowns == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpupool-nvml")]


# --- the mask -----------------------------------------------------------------------------------------

CARDS = [(0, "GPU-aa11"), (1, "GPU-aa22"), (2, "GPU-bb33"), (3, "GPU-cc44")]


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        (None, {0, 1, 2, 3}),
        ("", set()),
        ("  ", set()),
        ("-1", set()),
        ("none", set()),
        ("2", {2}),
        ("3,0", {0, 3}),
        (" 3 , 0 ", {0, 3}),
        ("0,-1,2", {0}),
        ("0,9,2", {0}),
        ("0,,2", {0}),
        ("0,2,", {0, 2}),
        ("1,1", set()),
        ("+1", {1}),
        ("1x", {1}),
        ("GPU-aa11", {0}),
        ("GPU-bb", {2}),
        ("GPU-aa", set()),  # ambiguous
        ("GPU-cc44,GPU-aa2", {1, 3}),
        ("GPU-cc44,GPU-zz,GPU-bb", {3}),
        ("GPU-cc44,0", {3}),
        ("0,GPU-cc44", {0}),
        ("GPU-bb,GPU-bb33", set()),
        ("MIG-1", set()),
    ],
)
def test_the_mask_means_what_it_means_to_cuda(text, visible):
    """CUDA_VISIBLE_DEVICES hides and shows the cards that it would hide from and show to a CUDA program."""
    assert visible == Mask(text).choose(CARDS)
    if Mask(text).hides_all:
        assert not visible


def test_the_mask_is_read_from_the_environment(monkeypatch):
    """An unset variable shows all cards, an empty one none."""
    assert not Mask.from_environ().hides_all
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Mask.from_environ().hides_all


# --- nvidia-smi ---------------------------------------------------------------------------------------

GPUS = """\
0, GPU-aa11, NVIDIA A100-SXM4-80GB, 81920, 4096, 12, 33, 61.50, 400.00, Disabled
1, GPU-bb22, Tesla T4, 15360, 0, [N/A], 40, [Not Supported], ERR!, [N/A]
"""
APPS = "GPU-aa11, {pid}, /usr/bin/python3, 4000\nGPU-aa11, 4194400, /opt/x/train, [N/A]\n"


class Smi:
    """A program on the PATH that answers as nvidia-smi was told to."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.program = folder / "nvidia-smi"
        self.say(GPUS, APPS.format(pid=os.getpid()))

    def say(self, gpus: str, apps: str = "", status: int = 0, apps_status: int = 0) -> None:
        (self.folder / "gpus").write_text(gpus)
        (self.folder / "apps").write_text(apps)
        self.run(
            f'case "$1" in *compute-apps*) cat {self.folder}/apps; exit {apps_status};; esac\n'
            f"cat {self.folder}/gpus; exit {status}\n"
        )

    def run(self, script: str) -> None:
        # Replaced, not rewritten: a running program cannot be written to.
        fresh = self.folder / "fresh"
        fresh.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/calls\n{script}')
        fresh.chmod(fresh.stat().st_mode | stat.S_IXUSR)
        fresh.replace(self.program)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def reader(self, mask: Mask = ALL) -> NvidiaSmiReader:
        return NvidiaSmiReader(str(self.program), mask)


@pytest.fixture
def smi(tmp_path):
    return Smi(tmp_path)


@pytest.mark.parametrize(("mask", "numbers"), [(None, [0, 1]), ("1", [1]), ("GPU-aa", [0]), ("", [])])
def test_a_pool_offers_what_slurm_or_a_container_left_us(smi, monkeypatch, mask, numbers):
    """A `CUDA_VISIBLE_DEVICES` that is set already limits this machine's own cards, which keep their numbers."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    monkeypatch.setattr(devices, "open_reader", lambda: NvidiaSmiReader(str(smi.program)))
    with GPUPool(lease_store=MemoryStore()) as pool:
        assert [gpu.local_gpu_id for gpu in pool.status().gpus] == numbers
        if not numbers:
            with pytest.raises(NoSuchGPU):
                pool.acquire(timeout=20)
        else:
            with pool.gpus(len(numbers), timeout=20, busy_ok=True) as gpus:
                assert sorted(gpus.env("index")["CUDA_VISIBLE_DEVICES"].split(",")) == [str(each) for each in numbers]
            with pytest.raises(NoSuchGPU):
                pool.acquire(count=len(numbers) + 1, timeout=20)


def test_smi_reads_every_field(smi):
    """What nvidia-smi prints arrives field by field, and what it does not know is None."""
    sample = smi.reader().read(60.0)

    first, second = sample.gpus
    assert (first.local_gpu_id, first.uuid, first.name) == (0, "GPU-aa11", "NVIDIA A100-SXM4-80GB")
    assert (first.memory_total_mb, first.memory_used_mb, first.memory_usage_percent) == (81920.0, 4096.0, 5.0)
    assert (
        first.utilization_percent,
        first.temperature_c,
        first.power_draw_w,
        first.power_limit_w,
    ) == (12.0, 33.0, 61.5, 400.0)
    assert (
        second.memory_usage_percent,
        second.utilization_percent,
        second.temperature_c,
        second.power_draw_w,
        second.power_limit_w,
    ) == (0.0, None, 40.0, None, None)
    assert sample.host == devices.host_identity()


def test_smi_tells_who_computes(smi):
    """Compute processes are told with their card; a card without any has an empty list."""
    first, second = smi.reader().read(60.0).gpus

    mine, other = first.processes
    assert (os.getpid(), getpass.getuser(), 4000.0) == (mine.pid, mine.user, mine.memory_mb)
    assert (other.pid, other.user, other.memory_mb, other.name) == (4194400, None, None, "train")
    assert second.processes == ()


def test_smi_without_a_list_of_processes(smi):
    """If nvidia-smi cannot list the processes they are unknown, not absent; the readings stay."""
    smi.say(GPUS, "Failed\n", apps_status=9)
    assert [gpu.processes for gpu in smi.reader().read(60.0).gpus] == [None, None]


def test_smi_of_an_old_version(smi):
    """A version that does not know MIG is asked without it from then on."""
    old = "".join(line.rsplit(",", 1)[0] + "\n" for line in GPUS.splitlines())
    (smi.folder / "old").write_text(old)
    smi.run(
        'case "$1" in *mig.mode*) echo \'Field "mig.mode.current" is not a valid field to query.\'; exit 2;;'
        f" *compute-apps*) exit 0;; esac\ncat {smi.folder}/old\n"
    )
    reader = smi.reader()
    assert ids(reader.read(60.0)) == [0, 1]
    assert ids(reader.read(60.0)) == [0, 1]
    assert sum("mig.mode" in call for call in smi.calls()) == 1


def test_smi_a_lost_card(smi):
    """A card that nvidia-smi calls lost, in its row or in a line of its own, is a fault and harms no other."""
    lost = "[GPU is lost]"
    smi.say(
        GPUS.splitlines()[0]
        + f"\n1, GPU-bb22, Tesla T4, {lost}, {lost}, {lost}, {lost}, {lost}, {lost}, {lost}\n"
        + "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system\n",
        status=15,
    )
    sample = smi.reader().read(60.0)

    assert ids(sample) == [0]
    assert GPUFault("GPU is lost", 1, "GPU-bb22", "Tesla T4") == sample.faults[0]
    assert "GPU0000:3B:00.0" in sample.faults[1].reason


def test_smi_a_card_without_readings_or_partitioned(smi):
    """A card that gives no readings, or is partitioned, is not offered."""
    nothing = "[Unknown Error]"
    smi.say(
        f"0, GPU-aa11, X, {nothing}, {nothing}, {nothing}, {nothing}, {nothing}, {nothing}, Disabled\n"
        "1, GPU-bb22, Y, 40960, 10, [N/A], 33, 61.50, 400.00, Enabled\n"
    )
    sample = smi.reader().read(60.0)
    assert sample.gpus == ()
    assert "no readings" in sample.faults[0].reason
    assert "MIG" in sample.faults[1].reason


def test_smi_without_cards_or_driver(smi):
    """No devices is an empty sample; no driver is an error in nvidia-smi's words."""
    smi.say("No devices were found\n", status=6)
    assert smi.reader().read(60.0).gpus == ()
    smi.say("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", status=9)
    with pytest.raises(devices.DeviceError, match=r"status 9.*couldn't communicate"):
        smi.reader().read(60.0)
    smi.program.unlink()
    with pytest.raises(devices.DeviceError, match="cannot be started"):
        smi.reader().read(60.0)


def test_smi_that_hangs_is_killed_with_its_children(smi):
    """A run that does not end costs its timeout, not more, and leaves no process behind."""
    smi.run(f"sleep 300 & echo $! > {smi.folder}/child; wait\n")
    begin = time.monotonic()
    with pytest.raises(devices.DeviceError, match="no answer for"):
        smi.reader().read(4.0)
    assert time.monotonic() - begin < 60.0

    def gone() -> bool:
        child = int((smi.folder / "child").read_text())
        try:
            # Its new parent may be late in reaping it.
            with open(f"/proc/{child}/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    eventually(gone)


def test_smi_that_cannot_be_killed_is_left_alone(smi, monkeypatch):
    """While a run hangs in the driver, no other is started; once it is gone, cards are read again."""
    smi.run("exec sleep 300\n")
    reader = smi.reader()
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    with pytest.raises(devices.DeviceError, match="no answer for"):
        reader.read(0.2)
    with pytest.raises(devices.DeviceError, match="cannot be killed"):
        reader.read(60.0)
    assert len(smi.calls()) <= 1

    smi.say(GPUS)
    kill(reader._hung.pid, signal.SIGKILL)

    def readable():
        try:
            return reader.read(60.0)
        except devices.DeviceError:
            return None

    assert ids(eventually(readable)) == [0, 1]


def test_smi_obeys_the_mask(smi):
    """The mask holds here as for NVML; with nothing visible the program is not even run."""
    assert ids(smi.reader(Mask("GPU-bb")).read(60.0)) == [1]
    assert ids(smi.reader(Mask("0")).read(60.0)) == [0]
    before = len(smi.calls())
    assert smi.reader(Mask("")).read(60.0).gpus == ()
    assert before == len(smi.calls())


# --- which way, and which machine ---------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)


def test_without_any_way_to_read(no_library, monkeypatch, tmp_path):
    """On a machine without GPUs there is a reader all the same: it has no cards and says why."""
    monkeypatch.setenv("PATH", str(tmp_path))
    reader = devices.open_reader()
    sample = reader.read(1.0)

    assert sample.gpus == ()
    assert "nvidia-smi" in reader.description
    assert "NVML" in reader.description
    reader.close()


def test_nvidia_smi_stands_in_for_the_library(no_library, monkeypatch, smi):
    """Without NVML the program on the PATH is used."""
    monkeypatch.setenv("PATH", f"{smi.folder}:{os.environ['PATH']}")
    assert ids(devices.open_reader().read(60.0)) == [0, 1]


def test_the_library_is_preferred(monkeypatch, smi):
    """Where NVML can be loaded it is used, and opening does not touch the driver."""
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    monkeypatch.setenv("PATH", str(smi.folder))
    reader = devices.open_reader()
    assert reader.description == "NVML"
    reader.close()


def test_the_identity_of_this_machine(monkeypatch, tmp_path):
    """A machine is known by its boot id, and by something that stays the same where there is none."""
    devices.host_identity.cache_clear()
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            assert file.read().strip() == devices.host_identity().id
        assert not devices.host_identity().simulated
        devices.host_identity.cache_clear()
        monkeypatch.setattr(host_module, "_BOOT_ID", tmp_path / "none")
        assert devices.host_identity().id.startswith("node-")
    finally:
        devices.host_identity.cache_clear()


# --- simulated ----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0", []),
        ("2", ["Simulated GPU"] * 2),
        ("1xA100", ["Simulated A100"]),
        (" 1 x RTX 4090 , 1 ", ["Simulated RTX 4090", "Simulated GPU"]),
        ("1xA100,2xH100", ["Simulated A100", "Simulated H100", "Simulated H100"]),
    ],
)
def test_simulated_cards_are_named(text, names):
    """N[xMODEL] items, separated by commas, name the cards."""
    assert names == list(parse_cards(text))


@pytest.mark.parametrize("text", ["", "x", "A100", "4x", "-1", "1.5", "4xA100,", "10001", "9999,2", "1xA\x1b[0m"])
def test_simulated_cards_that_make_no_sense(text):
    """Anything else is an error that says what is allowed."""
    with pytest.raises(ConfigError, match="allowed"):
        parse_cards(text)


@pytest.mark.parametrize(
    ("model", "memory"),
    [
        ("A100", 81920.0),
        ("A100-40GB", 40960.0),
        ("H100", 81559.0),
        ("h200", 143771.0),
        ("V100", 32768.0),
        ("T4", 15360.0),
        ("L4", 23034.0),
        ("L40S", 46068.0),
        ("A10", 23028.0),
        ("RTX 4090", 24564.0),
        ("RTX-4090", 24564.0),
        ("Voodoo", 24576.0),
    ],
)
def test_simulated_cards_have_the_memory_of_their_model(model, memory):
    """Known models have realistic memory, unknown ones 24 GiB."""
    assert memory == memory_of(f"Simulated {model}")


def test_simulated_cards_depend_on_the_name_alone():
    """A restarted host has the same cards; a host of another name has none of them."""

    def identity(name, **options):
        sample = SimulatedReader(parse_cards("3"), name=name, **options).read(1.0)
        return sample.host, [gpu.uuid for gpu in sample.gpus]

    assert identity("a") == identity("a", seed=7, foreign=0.5, noise=3.0)
    assert identity("a")[0].simulated
    assert identity("a")[0].id != identity("b")[0].id
    assert not set(identity("a")[1]) & set(identity("b")[1])
    assert len(set(identity("a")[1])) == 3


def test_simulated_cards_are_idle():
    """Unless told otherwise nothing runs on them."""
    for gpu in SimulatedReader(parse_cards("2xA100"), name="a").read(1.0).gpus:
        assert (gpu.memory_used_mb, gpu.utilization_percent, gpu.processes) == (3.0, 0.0, ())
        assert gpu.memory_usage_percent < 0.1


def test_simulated_loads_and_losses():
    """A card can be made busy, with or without a process to show for it, lost, and healed."""
    reader = SimulatedReader(parse_cards("3"), name="a")
    reader.override(0, memory_percent=90.0)
    reader.override(1, memory_percent=50.0, utilization_percent=10.0, process=False)
    reader.lose(2)
    sample = reader.read(1.0)

    assert (round(sample.gpus[0].memory_usage_percent), sample.gpus[0].utilization_percent) == (90.0, 90.0)
    assert sample.gpus[0].processes[0].user == "somebody"
    assert (
        round(sample.gpus[1].memory_usage_percent),
        sample.gpus[1].utilization_percent,
        sample.gpus[1].processes,
    ) == (50.0, 10.0, ())
    assert "lost" in sample.faults[0].reason
    assert sample.faults[0].local_gpu_id == 2

    reader.empty()
    assert (reader.read(1.0).gpus, reader.read(1.0).faults) == ((), ())
    reader.heal()
    assert [gpu.utilization_percent for gpu in reader.read(1.0).gpus] == [0.0] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda reader: reader.override(2, memory_percent=1.0),
        lambda reader: reader.override(0, memory_percent=101.0),
        lambda reader: reader.lose(-1),
        lambda reader: SimulatedReader(["x"], name="a", foreign=1.5),
        lambda reader: SimulatedReader(["x"], name="a", lag=float("nan")),
    ],
)
def test_simulated_nonsense_is_refused(wrong):
    """Numbers out of range are errors."""
    with pytest.raises(ConfigError):
        wrong(SimulatedReader(parse_cards("2"), name="a"))


def test_simulated_lag():
    """Readings that lag show what was so many seconds ago, and say that they are so old."""
    clock = Clock()
    reader = SimulatedReader(parse_cards("1"), name="a", lag=10.0, clock=clock)
    reader.override(0, memory_percent=50.0)
    clock.now += 9.0
    assert reader.read(1.0).gpus[0].utilization_percent == 0.0
    assert clock.now - 10.0 == reader.read(1.0).taken_at
    reader.override(0, memory_percent=70.0)
    clock.now += 2.0
    assert reader.read(1.0).gpus[0].utilization_percent == 50.0
    clock.now += 20.0
    assert reader.read(1.0).gpus[0].utilization_percent == 70.0


def test_simulated_foreign_jobs():
    """About the wanted share of cards is occupied; who that is changes with time, and repeats with the seed."""
    clock = Clock()

    def occupied(reader):
        return [gpu.local_gpu_id for gpu in reader.read(1.0).gpus if gpu.processes]

    def reader(seed):
        return SimulatedReader(parse_cards("400"), name="a", foreign=0.25, seed=seed, clock=clock)

    one, same, other = reader(1), reader(1), reader(2)
    first = occupied(one)
    assert first == occupied(one) == occupied(same)
    assert first != occupied(other)
    assert 60 <= len(first) <= 140
    clock.now += 300.0
    later = occupied(one)
    assert later != first
    assert later == occupied(same)


def test_simulated_noise():
    """Noise moves readings within its bounds and never out of 0 to 100."""
    reader = SimulatedReader(parse_cards("50"), name="a", noise=5.0)
    seen = [gpu.utilization_percent for _ in range(5) for gpu in reader.read(1.0).gpus]
    assert len(set(seen)) > 3
    assert 0.0 <= min(seen) <= max(seen) <= 5.0
    assert all(gpu.memory_usage_percent <= 5.1 for gpu in reader.read(1.0).gpus)


def test_samples_are_values():
    """Nothing in a sample can be changed, so it can cross threads."""
    sample = SimulatedReader(parse_cards("1"), name="a").read(1.0)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        sample.gpus[0].name = "other"
