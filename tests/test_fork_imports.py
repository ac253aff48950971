"""What the threads of a pool import, a fork at the wrong instant makes impossible to import for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpupool_sync.testing import FakeFleet

#: Names each module that a thread of a pool imports; what this package imports there it guards against forks itself.
_PROGRAM = """
import sys, threading, time

class Watch:
    def find_spec(self, name, path=None, target=None):
        thread = threading.current_thread().name
        if thread.startswith("gpupool-") and not name.startswith("gpupool_sync."):
            print(thread, name, flush=True)

sys.meta_path.insert(0, Watch())
from gpupool_sync import GPUPool

with GPUPool(sys.argv[1], ttl=1.0, poll_interval=0.1) as pool:
    for _ in range(2):
        with pool.gpu(timeout=20.0, local=False) as gpu:
            time.sleep(0.5)  # it is polled, and renewed
            assert not gpu.lost
    pool.stats()
"""


@pytest.mark.real
def test_threads_of_a_pool_import_nothing():
    """
    Not even what requests imports in the middle of an exchange.

    A module that is being imported at a fork stays half imported in the child, and whoever needs it there hangs.
    """
    with FakeFleet([1]) as fleet:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, fleet[0].url], capture_output=True, text=True, timeout=150.0, check=False
        )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
