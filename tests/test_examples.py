"""The examples run."""

from __future__ import annotations

import os
import runpy
import stat
from pathlib import Path

import pytest

from gpupool_sync import devices
from gpupool_sync.clock import boottime
from gpupool_sync.models import GPUReading, Sample

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
