"""The examples run."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpupool_sync import GPUPool, devices
from gpupool_sync.clock import boottime
from gpupool_sync.models import GPUReading, Sample
from gpupool_sync.testing import FakeFleet

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.checkout


@pytest.mark.parametrize(("used", "status"), [("400", 0), ("4000", 1)], ids=["agrees", "differs"])
def test_the_comparison_with_nvidia_smi_finds_differences(monkeypatch, tmp_path, capsys, used, status):
    """On a machine with GPUs the comparison says which field differs; N/A must be None."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho '0, GPU-1, NVIDIA H200, 143771, {used}, [N/A], 30, 75.10, 700.00'\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    reading = GPUReading(
        0,
        "NVIDIA H200",
        "GPU-1",
        memory_total_mb=143771.0,
        memory_used_mb=400.0,
        temperature_c=30.0,
        power_draw_w=75.1,
        power_limit_w=700.0,
    )

    class Reader:
        description = "one card"

        def read(self, timeout):
            return Sample((reading,), boottime())

        def close(self):
            pass

    monkeypatch.setattr(devices, "open_reader", Reader)
    example = runpy.run_path(str(EXAMPLES / "compare_with_nvidia_smi.py"))

    assert example["main"]([]) == status
    assert ("| memory_used_mb | 4000 | 400 | NO |" in capsys.readouterr().out) == bool(status)


# -- worker pools --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet():
    """What `gpupool-sync serve --simulate 4xA100` serves."""
    with FakeFleet(["4xA100"]) as fleet:
        yield fleet


def run_example(fleet, *arguments):
    """Its lines. As a new user runs it: without a module in its way, and with warnings shown."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:]],
        env={**os.environ, "GPU_SERVICE_ENDPOINTS": fleet.urls[0]},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.mark.real
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("arguments", "what", "number"),
    [
        (["executor_and_map.py"], r"(map|executor): 0\.\d+ on GPU-", 12),
        (["multiprocessing_pool.py"], r"job \d on 127.0.0.1-\d+:[0-3], CUDA_VISIBLE_DEVICES=GPU-", 8),
        (["multiprocessing_pool.py", "fork", "--tasks", "2"], r"job \d on 127.0.0.1-\d+:[0-3], ", 8),
        (["multiprocessing_pool.py", "spawn"], r"job \d on 127.0.0.1-\d+:[0-3], ", 8),
        (["multiprocessing_pool.py", "spawn", "--tasks", "2"], r"job \d on 127.0.0.1-\d+:[0-3], ", 8),
        (["process_pool_executor.py"], r"job \d on 127.0.0.1-\d+:[0-3]$", 8),
        pytest.param(["joblib_parallel.py"], r"job \d on 127.0.0.1-\d+:[0-3]$", 8, marks=needs("joblib")),
        pytest.param(["optuna_study.py"], r"trial \d on GPU-", 8, marks=needs("optuna")),
        (["legacy_before.py"], r"job \d on GPU [0-3]$", 8),
        (["legacy_after.py"], r"job \d on GPU [0-3]$", 8),
        pytest.param(["train_torch.py"], r"127.0.0.1-\d+:[0-3] as (cpu|cuda:0): loss 0\.0", 1, marks=needs("torch")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_recipes_on_simulated_gpus(fleet, arguments, what, number):
    """Each does all its jobs on GPUs of the pool, and gives all of them back."""
    lines = run_example(fleet, *arguments)
    assert len([line for line in lines if re.match(what, line)]) == number, lines
    with GPUPool(fleet.urls) as pool:
        pool.acquire(count=4, timeout=20).release()


TORCHRUN = """
import os, torch, torch.distributed
torch.distributed.init_process_group("gloo")
number, all_of_them = torch.ones(1), os.environ["CUDA_VISIBLE_DEVICES"].split(",")
torch.distributed.all_reduce(number)
with open(os.environ["SEEN"], "a") as seen:
    seen.write(f"{number.item():.0f} {len(set(all_of_them))} {all_of_them[int(os.environ['LOCAL_RANK'])]}\\n")
torch.distributed.destroy_process_group()
"""


@pytest.mark.real
@pytest.mark.timeout(180)
@needs("torch")
def test_torchrun_on_several_gpus(fleet, tmp_path):
    """`gpupool-sync run -n 4 -- torchrun --nproc-per-node=4 train.py`: each process has one of the four to itself."""
    (tmp_path / "train.py").write_text(TORCHRUN)
    ours, theirs = [sys.executable, "-m", "gpupool_sync"], [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run(
        [*ours, "run", "-n", "4", "--", *theirs, "--standalone", "--nproc-per-node=4", str(tmp_path / "train.py")],
        env={**os.environ, "GPU_SERVICE_ENDPOINTS": fleet.urls[0], "SEEN": str(tmp_path / "seen")},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["4", "4"]] * 4
    assert len({line[2] for line in lines}) == 4
    with GPUPool(fleet.urls) as pool:
        pool.acquire(count=4, timeout=20).release()


def test_the_old_script_is_changed_by_two_lines():
    """The import, and the queue: nothing else."""
    before, after = (code_of(EXAMPLES / f"legacy_{name}.py") for name in ("before", "after"))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert [line for line in changes if line.startswith("-")] == ["-     queue = multiprocessing.Manager().Queue()"]
    assert [line for line in changes if line.startswith("+")] == [
        "+ from gpupool_sync import GPUPool",
        "+     queue = GPUPool().as_queue(4)",
    ]


def code_of(path):
    """Its lines without the docstring, without empty ones."""
    text = path.read_text()
    docstring = ast.parse(text).body[0].end_lineno
    return [line for line in text.splitlines()[docstring:] if line]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_says_how_to_run_it(path):
    """In the first lines that somebody reads."""
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))
