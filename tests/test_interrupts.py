"""Ctrl-C at any instant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("mode", ["block", "acquire", "wait", "host"])
def test_ctrl_c_at_any_instant_leaks_nothing(mode, tmp_path):
    """Thousands of interrupts, wherever they fall, leave no lease, no ticket and no locked pool behind."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "interrupted.py"), mode, "2000"],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(HERE), "GPU_POOL_LOCK_DIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    assert result["interrupts"] > 100, "the interrupts hit something"
    assert (result["leaked"], result["usable"], result["forgotten"], result["watched"]) == (0, True, 0, 0)
    assert result["descriptors"] == []
