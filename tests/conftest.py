"""Every test runs without the settings of whoever starts it, and leaves no thread behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

import hypothesis
import pytest

# Chosen by HYPOTHESIS_PROFILE.  Named here because CI=true would otherwise make hypothesis derandomise.
hypothesis.settings.register_profile("default", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.register_profile("nightly", deadline=None, derandomize=False, print_blob=True, max_examples=10_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "default")

#: Seconds that threads of a test have to end after it.
THREAD_GRACE = 20.0


def _is_setting(name: str) -> bool:
    # A proxy would be asked for loopback servers; a mask would hide cards.
    # The width of somebody's window would wrap what is printed.
    return name.startswith(("GPU_", "CUDA_")) or name.lower().endswith("_proxy") or name in ("COLUMNS", "LINES")


# For fixtures of a wider scope, which are made before the one below.
for _name in [name for name in os.environ if _is_setting(name)]:
    del os.environ[_name]


# Under nohup, or in the background of a script, these are ignored, and would be by the programs that tests start.
for _number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if _is_setting(name)]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _locks_of_our_own(_no_settings_from_outside, monkeypatch, tmp_path_factory) -> None:
    """The lock directory of the machine belongs to its users."""
    monkeypatch.setenv("GPU_POOL_LOCK_DIR", str(tmp_path_factory.getbasetemp() / "locks"))
    # In a container, as some run the tests in, it would be one of its own; test_mounts.py has the real answer.
    monkeypatch.setattr("gpupool_sync.leases.host.why_private", lambda fd, path: None)


@pytest.fixture(scope="module", autouse=True)
def _leaks_are_found_in_their_own_file() -> Iterator[None]:
    """What was left open warns when it is collected: here, and not in a test of another file."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _no_threads_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + THREAD_GRACE
    while left := [
        thread
        for thread in threading.enumerate()
        if thread not in before and (not thread.daemon or thread.name.startswith("gpupool"))
    ]:
        if time.monotonic() >= deadline:
            pytest.fail(f"threads left behind: {', '.join(thread.name for thread in left)}")
        try:
            left[0].join(0.05)
        except RuntimeError:  # it is just being started, and cannot be joined yet
            time.sleep(0.01)
