"""The demonstration, and what it would say if something were wrong."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import attrs
import pytest

from gpupool_sync.cli import main
from gpupool_sync.demo import HoldLog, Result
from gpupool_sync.leases.base import Claim, Granted, Outcome
from gpupool_sync.leases.memory import MemoryStore
from helpers import eventually
from test_cli import command, on_terminal

KEYS = {
    "jobs_done",
    "jobs_failed",
    "double_holds",
    "leaked",
    "per_endpoint",
    "killed",
    "recovered",
    "jobs_on_killed_after_recovery",
    "wait_p50_s",
    "wait_p99_s",
}


@pytest.mark.real
def test_the_demo_runs_every_job_and_gets_its_server_back():
    """`demo --json` prints exactly one object, in which all is well, and exits with 0."""
    done = subprocess.run(command("demo", "--json", "--seed", "1"), capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == KEYS
    assert result["jobs_done"] >= 60
    assert result["jobs_failed"] == result["double_holds"] == result["leaked"] == 0
    assert sum(result["per_endpoint"].values()) == result["jobs_done"]
    assert len(result["per_endpoint"]) == 3
    assert result["killed"] in result["per_endpoint"]
    assert result["recovered"] is True
    assert result["jobs_on_killed_after_recovery"] > 0
    assert 0 <= result["wait_p50_s"] <= result["wait_p99_s"]


@pytest.mark.real
def test_the_demo_is_drawn_on_a_terminal():
    """On a terminal the GPUs, the jobs and the accident are drawn in place, and a summary remains."""
    with on_terminal("demo", "--seconds-per-job", "0.4") as (process, pieces):
        assert process.wait(55) == 0, b"".join(pieces)
    shown = b"".join(pieces).decode()
    assert "\x1b[1A" in shown  # it went up to draw over the last picture
    for words in ("one pool, three servers", "is killed", "answers again", "0 double holds", "p99", "next: "):
        assert words in shown


@pytest.mark.real
def test_the_demo_tells_plain_lines_where_nothing_can_be_drawn():
    """Piped, the demo prints a line for each event, progress now and then, and the summary, without colours."""
    done = subprocess.run(command("demo", "--seconds-per-job", "0.3"), capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    order = ["starting", "is killed", "the pool noticed", "is started again", "answers again", "✓ 0 double holds"]
    places = [done.stdout.index(words) for words in order]
    assert places == sorted(places)
    assert "of 60 jobs done" in done.stdout


@pytest.mark.real
def test_ctrl_c_ends_the_demo_and_its_servers():
    """Ctrl-C ends the demo with 130, and no server process stays behind."""
    psutil = pytest.importorskip("psutil")
    process = subprocess.Popen(command("demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "jobs done" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == ""
    eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


@pytest.mark.real
def test_a_demo_that_takes_too_long_is_ended(monkeypatch, capsys):
    """What would exceed its time is ended with exit status 1 and a line that says how far it came."""
    monkeypatch.setattr("gpupool_sync.demo.LIMIT", 7.0)
    monkeypatch.setattr("gpupool_sync.demo.RESERVE", 2.0)
    assert main(["demo", "--json", "--jobs", "100", "--seconds-per-job", "3"]) == 1
    out, _ = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["type"] == "DemoOverdue"
    assert "of 100 jobs" in error["message"]


class Generous(MemoryStore):
    """A store that gives a card that is held to whoever would have to wait for it."""

    def claim(self, claim: Claim) -> Outcome:
        outcome = super().claim(claim)
        return outcome if isinstance(outcome, Granted) else MemoryStore().claim(claim)


@pytest.mark.real
def test_the_demo_would_notice_double_holds(monkeypatch, capsys):
    """With an arbiter that grants a GPU to several jobs at once, the demo says so and exits with 1."""
    monkeypatch.setattr("gpupool_sync.demo.MemoryStore", Generous)
    assert main(["demo", "--json", "--seconds-per-job", "0.3"]) == 1
    result = json.loads(capsys.readouterr()[0])
    assert result["double_holds"] > 0
    assert result["jobs_failed"] == 0


def test_the_demos_own_log_finds_double_holds():
    """Two jobs that used one GPU at the same time are found; one after the other is fine."""
    log = HoldLog()
    with log.holding("GPU-1"):
        pass
    with log.holding("GPU-1"), log.holding("GPU-2"):
        pass
    assert log.overlaps() == 0
    with log.holding("GPU-1"), log.holding("GPU-1"):
        pass
    assert log.overlaps() == 1


def good_result(**changes: Any) -> Result:
    result = Result(60, 0, 0, 0, {"a": 40, "b": 20}, "b", True, 4, 0.1, 0.9, asked=60)
    return attrs.evolve(result, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"jobs_done": 59},
        {"jobs_failed": 1},
        {"double_holds": 1},
        {"leaked": 1},
        {"killed": None},
        {"recovered": False},
        {"jobs_on_killed_after_recovery": 0},
    ],
)
def test_whatever_goes_wrong_makes_the_demo_fail(changes):
    """Each promise of the demo counts for its exit status."""
    assert good_result().ok
    assert not good_result(**changes).ok
