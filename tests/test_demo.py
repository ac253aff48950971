"""The demonstration, and what it would say if something were wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import attrs
import pytest

from gpupool_sync import GPUPool, demo
from gpupool_sync.cli import main
from gpupool_sync.clock import Deadline
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.demo import HoldLog, Result
from gpupool_sync.devices.simulated import LEASED_UTILIZATION_PERCENT
from gpupool_sync.leases.base import Claim, Wanted
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.testing import FakeFleet
from helpers import eventually
from test_cli import on_terminal

#: `gpupool-sync` with more time than people have patience for, as tests run beside others on few processors: for a
#: demo as a whole, and for its workers to renew their leases.
UNHURRIED = """
import sys
from gpupool_sync import demo
demo.LIMIT, demo.MIN_TTL = 150.0, 6.0
from gpupool_sync.cli import main
sys.exit(main(sys.argv[1:]))
"""

KEYS = {
    "jobs_done",
    "jobs_failed",
    "jobs_run_again",
    "double_holds",
    "leaked",
    "killed_worker",
    "gpus_of_killed_worker",
    "gpus_back_after_s",
    "per_endpoint",
    "killed",
    "recovered",
    "jobs_on_killed_after_recovery",
    "wait_p50_s",
    "wait_p99_s",
}


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", UNHURRIED, *args]


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch):
    """Likewise those that run in this process."""
    monkeypatch.setattr(demo, "LIMIT", 150.0)
    monkeypatch.setattr(demo, "MIN_TTL", 6.0)


@pytest.mark.real
def test_the_demo_runs_every_job_and_gets_everything_back():
    """`demo --json` prints exactly one object, in which all is well, and exits with 0."""
    done = subprocess.run(
        command("demo", "--json", "--seed", "1", "--seconds-per-job", "0.4"),
        # Settings of whoever starts it change nothing.
        env={**os.environ, "GPU_POOL_LEASE_STORE": "memory:", "GPU_POOL_TTL": "300", "GPU_POOL_NAME": "me"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == KEYS
    assert result["jobs_done"] >= 60
    assert result["jobs_failed"] == result["double_holds"] == result["leaked"] == 0
    assert result["killed_worker"].startswith("worker ")
    assert 1 <= len(result["gpus_of_killed_worker"]) <= 4
    assert 1 <= result["jobs_run_again"] <= 4
    assert 0 < result["gpus_back_after_s"] < 60
    assert sum(result["per_endpoint"].values()) == result["jobs_done"]
    assert len(result["per_endpoint"]) == 3
    assert result["killed"] in result["per_endpoint"]
    assert result["recovered"] is True
    assert result["jobs_on_killed_after_recovery"] > 0
    assert 0 <= result["wait_p50_s"] <= result["wait_p99_s"]


@pytest.mark.real
def test_the_demo_is_drawn_on_a_terminal():
    """On a terminal the GPUs, the jobs and the accident are drawn in place, and a summary remains."""
    with on_terminal("demo", "--seconds-per-job", "0.4", command=command) as (process, pieces):
        assert process.wait(170) == 0, b"".join(pieces)
    shown = b"".join(pieces).decode()
    assert "\x1b[1A" in shown  # it went up to draw over the last picture
    accidents = ("✗ ", "(kill -9)", "others have them", "is killed;", "answers again")
    for words in ("six worker processes, three servers", *accidents, "0 double holds", "p99", "next: "):
        assert words in shown


@pytest.mark.real
def test_the_demo_tells_plain_lines_where_nothing_can_be_drawn():
    """Piped, the demo prints a line for each event, progress now and then, and the summary, without colours."""
    done = subprocess.run(command("demo", "--seconds-per-job", "0.3"), capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    worker = ["starting", "is killed (kill -9) amid its jobs", "it had server", "nobody renews its leases"]
    server = ["is killed;", "the pools notice", "is started again", "answers again"]
    places = [done.stdout.index(words) for words in (*worker, *server, "✓ 0 double holds", "and did its jobs")]
    assert places == sorted(places)
    assert "its GPUs were seen empty, and others have them" in done.stdout
    assert "of 60 jobs done" in done.stdout


@pytest.mark.real
def test_ctrl_c_ends_the_demo_and_its_servers():
    """Ctrl-C ends the demo with 130, and neither a server nor a worker stays behind."""
    psutil = pytest.importorskip("psutil")
    line = command("demo", "--seconds-per-job", "0.3")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "jobs done" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 8
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == ""
    eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


@pytest.mark.real
def test_a_demo_whose_gpus_do_not_come_back_is_ended(monkeypatch, capsys):
    """Leases of the dead that do not end in time: exit status 1, and a line that names the GPUs."""
    monkeypatch.setattr(demo, "MIN_TTL", 300.0)
    expect_back = demo.Demo._expect_back

    def in_vain(self, *args):
        expect_back(self, *args)
        self._deadline = Deadline.after(3.0)  # its time is over soon after the kill

    monkeypatch.setattr(demo.Demo, "_expect_back", in_vain)
    # Long jobs: of short ones all may have been given back in the instant before the kill, and nothing is missing.
    assert main(["demo", "--json", "--jobs", "100", "--seconds-per-job", "1.5"]) == 1
    out, _ = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["type"] == "DemoOverdue"
    assert "of 100 jobs" in error["message"]
    assert re.search(r"server\d:\d.* of the killed worker \d did not come back", error["message"])


@pytest.mark.real
def test_the_demo_would_notice_double_holds(monkeypatch, capsys):
    """With leases that exclude only within each worker, the demo finds the double holds and exits with 1."""
    monkeypatch.setattr("gpupool_sync.demo.LEASE_STORE", "memory:")
    monkeypatch.setattr("gpupool_sync.demo.OUTAGE", 0.2)
    assert main(["demo", "--json", "--seconds-per-job", "0.3"]) == 1
    result = json.loads(capsys.readouterr()[0])
    assert result["double_holds"] > 0
    assert result["jobs_failed"] == 0


@pytest.mark.real
def test_a_worker_that_cannot_start_is_told(monkeypatch, capsys):
    """Workers that end by themselves are failures, with their last words; nothing is waited for."""
    monkeypatch.setattr("gpupool_sync.demo.LEASE_STORE", "nonsense:")
    assert main(["demo", "--seconds-per-job", "0.3"]) == 1
    told = re.findall(r"worker \d ended by itself, with status 1: .*ConfigError", capsys.readouterr()[0])
    assert len(told) == demo.WORKERS  # each its own


@pytest.mark.real
def test_simulated_cards_show_their_leases():
    """A leased card is in use as far as readings tell; with its lease, also one that expires, the load goes."""
    with FakeFleet([2]) as fleet, GPUPool(fleet.urls, poll_interval=0.1) as pool:

        def loads():
            pool.refresh(10)
            return sorted(card.utilization_percent for card in pool.status().gpus)

        assert loads() == [0.0, 0.0]
        gpu = pool.acquire(timeout=20)
        assert eventually(lambda: loads() == [0.0, LEASED_UTILIZATION_PERCENT])
        gpu.release()
        assert eventually(lambda: loads() == [0.0, 0.0])
        store = HTTPStore(Endpoint(fleet.urls[0]), Settings(ttl=4.0, endpoint_timeout=60.0))
        uuid = gpu.uuid
        assert uuid is not None
        claim = Claim(id="a", holder=pool._state.holder, groups=((Wanted(uuid, None),),), ttl=4.0)
        store.claim(claim)
        assert eventually(lambda: loads() == [0.0, LEASED_UTILIZATION_PERCENT])
        assert eventually(lambda: loads() == [0.0, 0.0])
        assert list(store.leases()) == []
        store.close()


def test_the_demos_own_log_finds_double_holds():
    """Two jobs that used one GPU at the same time are found; one after the other is fine."""
    log = HoldLog()
    log.add("GPU-1", 1.0, 2.0)
    log.add("GPU-1", 2.0, 3.0)
    log.add("GPU-2", 1.5, 2.5)
    assert log.overlaps() == 0
    log.add("GPU-1", 2.9, 4.0)
    assert log.overlaps() == 1
    log.add("GPU-2", 0.0, 9.0)
    assert log.overlaps() == 2


def good_result(**changes: Any) -> Result:
    result = Result(
        jobs_done=60,
        jobs_failed=0,
        jobs_run_again=2,
        double_holds=0,
        leaked=0,
        killed_worker="worker 1",
        gpus_of_killed_worker=["a:0", "b:1"],
        gpus_back_after_s=3.0,
        per_endpoint={"a": 40, "b": 20},
        killed="b",
        recovered=True,
        jobs_on_killed_after_recovery=4,
        wait_p50_s=0.1,
        wait_p99_s=0.9,
        asked=60,
    )
    return attrs.evolve(result, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"jobs_done": 59},
        {"jobs_failed": 1},
        {"double_holds": 1},
        {"leaked": 1},
        {"gpus_of_killed_worker": []},
        {"gpus_back_after_s": None},
        {"killed": None},
        {"recovered": False},
        {"jobs_on_killed_after_recovery": 0},
    ],
)
def test_whatever_goes_wrong_makes_the_demo_fail(changes):
    """Each promise of the demo counts for its exit status."""
    assert good_result().ok
    assert not good_result(**changes).ok
