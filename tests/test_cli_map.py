"""``gpupool-sync map``: real jobs on the GPUs of real servers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpupool_sync import GPUPool
from gpupool_sync.cli import main
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually
from test_cli_run import OURS, PATH, Terminal, process, terminal  # noqa: F401 - a fixture

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="sigtimedwait, /proc")]


@pytest.fixture(scope="module")
def _fleet() -> Iterator[FakeFleet]:
    with FakeFleet(["2xA100"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(_fleet, monkeypatch) -> Iterator[FakeFleet]:
    """One server with two GPUs, which are free again in the end."""
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"sim={_fleet.urls[0]}")
    monkeypatch.setenv("PYTHONPATH", PATH)
    yield _fleet
    with GPUPool() as pool:
        eventually(lambda: not (pool.leases().leases or pool.leases().queue), 20, lambda: pool.leases(), tick=0.05)


def planned(capfd, *arguments: str) -> list[str]:
    """The commands of ``--dry-run``."""
    assert main(["map", "--dry-run", *arguments]) == 0
    return capfd.readouterr().out.splitlines()


# -- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        (["echo {}", ":::", "a", "b c"], ["echo a", "echo 'b c'"]),
        (["echo", ":::", "a", "b c"], ["echo a", "echo 'b c'"]),
        (["echo x {} y", ":::", "$HOME", "it's"], ["echo x '$HOME' y", "echo x 'it'\"'\"'s' y"]),
        (["echo", "-n", "{}", ":::", "b c"], ["echo -n 'b c'"]),
        (["echo", "lr={}.log", ":::", "0.1"], ["echo lr=0.1.log"]),
        (
            ["echo {2}-{1} {#}", ":::", "a", "b", ":::", "1", "2"],
            ["echo 1-a 1", "echo 2-a 2", "echo 1-b 3", "echo 2-b 4"],
        ),
        (["echo", ":::", "a", ":::", "1", "2"], ["echo a 1", "echo a 2"]),
        (["t", "-x", ":::", "a", ":::", "1", "2"], ["t -x a 1", "t -x a 2"]),
        (["echo {}", ":::", "a", ":::", "1 2"], ["echo a '1 2'"]),
        (["echo {}", ":::"], []),
    ],
)
def test_commands(capfd, arguments, commands):
    """One for each value, or combination; quoted where the shell reads it; nothing is asked of anybody."""
    assert planned(capfd, *arguments) == commands


def test_no_values_are_nothing_to_run(capfd):
    """Said, as most likely a pattern has matched no file."""
    assert main(["map", "echo", ":::"]) == 0
    assert capfd.readouterr().err == "gpupool-sync: no values, so there is nothing to run\n"


def test_values_from_files_and_stdin(capfd, tmp_path, monkeypatch):
    """One a line; empty ones are none; they combine with those after `:::`."""
    (tmp_path / "values").write_text("a\n\nb c\n")
    assert planned(capfd, "-a", str(tmp_path / "values"), "echo {}") == ["echo a", "echo 'b c'"]
    combined = planned(capfd, "-a", str(tmp_path / "values"), "echo {1} {2}", ":::", "1")
    assert combined == ["echo a 1", "echo 'b c' 1"]
    with open(tmp_path / "values") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert planned(capfd, "echo") == ["echo a", "echo 'b c'"]


@pytest.mark.parametrize("arguments", [[], [":::", "a"], ["echo {3}", ":::", "a"], ["-j", "0", "echo", ":::", "a"]])
def test_a_wrong_command_line(capfd, arguments):
    """2, before anything is done."""
    assert main(["map", *arguments]) == 2
    assert "Error: " in capfd.readouterr().err


# -- how ---------------------------------------------------------------------------------------------------------------


def test_one_job_for_each_value_on_its_own_gpu(fleet, capfd, tmp_path):
    """As many at once as there are GPUs, no two on one; what each says comes whole."""
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[3]); from helpers import HoldLog\n"
        "with HoldLog(sys.argv[2]).holding(os.environ['CUDA_VISIBLE_DEVICES']):\n"
        "    print('begin', sys.argv[1], flush=True)\n"
        "    end = time.monotonic() + 20\n"
        "    while len(HoldLog(sys.argv[2]).holds()) < 2 and time.monotonic() < end: time.sleep(0.01)\n"
        "    print('end', sys.argv[1], sys.stdin.read())\n"
    )
    log = str(tmp_path / "log")
    job = [sys.executable, "-c", code, "{}", log, str(Path(__file__).parent)]
    values = [f"value {number}" for number in range(4)]
    assert main(["map", *job, ":::", *values]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert sorted(lines[::2]) == [f"begin {value}" for value in values]
    assert [line.replace("begin", "end") + " " for line in lines[::2]] == lines[1::2]
    holds = HoldLog(log)
    assert len(holds.holds()) == 4
    assert len({hold.key for hold in holds.holds()}) == 2
    assert holds.overlaps() == []
    begun = sorted(holds.holds(), key=lambda hold: hold.begin)
    assert begun[1].begin < begun[0].end, "two run at the same time"
    assert "failed" not in err


def test_failures_are_listed_and_counted(fleet, capfd, tmp_path):
    """With their values and how they ended; the number is the exit status; logs are named."""
    job = "echo out {}; echo err {} >&2; case {} in bad) exit 3;; worse) kill -9 $$;; esac"
    logs = tmp_path / "logs"
    assert main(["map", "--logs", str(logs), job, ":::", "good", "bad", "worse", "a/b"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(path.name for path in logs.iterdir()) == ["1-good.log", "2-bad.log", "3-worse.log", "4-a_b.log"]
    assert (logs / "4-a_b.log").read_text() == "out a/b\nerr a/b\n"
    summary = err[err.index("Error: 2 of 4 jobs failed:") :].splitlines()[1:]
    assert sorted(summary) == [
        f"  job 2 (bad): exit status 3, see {logs}/2-bad.log",
        f"  job 3 (worse): ended by SIGKILL, see {logs}/3-worse.log",
    ]
    # A command that is none, without a shell.
    assert main(["map", "no-such-command", "{}", ":::", "x"]) == 1
    err = capfd.readouterr().err
    assert "job 1 (x): exit status 127" in err
    assert "Error: no-such-command: No such file or directory" in err.splitlines()


def test_retries(fleet, capfd, tmp_path):
    """What fails is run again, so often and not more; what succeeds then has not failed."""
    job = f"cd {tmp_path}; echo >> {{}}; test $(wc -l < {{}}) -ge 3"
    (tmp_path / "second").write_text("\n")
    assert main(["map", "--retries", "1", job, ":::", "first", "second"]) == 1
    assert (tmp_path / "first").read_text() == "\n\n"
    assert (tmp_path / "second").read_text() == "\n\n\n"
    assert "job 1 (first): exit status 1" in capfd.readouterr().err


@pytest.mark.parametrize("halt", ["soon", "now"])
def test_halt(fleet, capfd, tmp_path, halt):
    """After the first failure nothing is started; what runs ends by itself, or is ended."""
    wait = f"while ! test -e {tmp_path}/running; do sleep 0.02; done; exit 1"
    job = (
        f"case {{}} in long) touch {tmp_path}/running; sleep {60 if halt == 'now' else 5}; echo long;; *) {wait};; esac"
    )
    status = main(["map", "--halt", halt, job, ":::", "long", "fails", "never"])
    out, err = capfd.readouterr()
    assert "1 job did not begin, because a job has failed" in err
    if halt == "soon":
        assert (status, out) == (1, "long\n")
    else:
        assert (status, out) == (2, "")
        assert "job 1 (long): ended by SIGTERM" in err


def test_limits(fleet, capfd, tmp_path):
    """`-j 1` runs one at a time, `-n 2` gives each two GPUs."""
    job = f"mkdir {tmp_path}/only && sleep 0.1 && rmdir {tmp_path}/only; # {{}}"
    assert main(["map", "-j", "1", job, ":::", "1", "2", "3"]) == 0
    assert main(["map", "-n", "2", "--visible", "index", "echo $CUDA_VISIBLE_DEVICES", ":::", "a", "b"]) == 0
    out = capfd.readouterr().out.replace("1,0", "0,1")
    assert out == "0,1 a\n0,1 b\n"


def test_no_gpu_in_time(fleet, capfd):
    """124, who has them, and how many jobs did not begin; what runs is let be."""
    with GPUPool() as pool:
        with pool.gpus(2):
            assert main(["map", "--timeout", "0", "echo", ":::", "a", "b"]) == 124
        err = capfd.readouterr().err
        assert "2 jobs did not begin, because no GPU can be had" in err
        assert "held by" in err
        with pool.gpu():
            assert main(["map", "--timeout", "3", "sleep 6; echo", ":::", "a", "b"]) == 124
    assert capfd.readouterr().out == "a\n"
    assert main(["map", "-n", "3", "echo", ":::", "a"]) == 125


@pytest.mark.parametrize("on_lost", ["kill", "warn"])
def test_a_lost_lease(fleet, monkeypatch, tmp_path, on_lost):
    """`kill`: its job is ended and has failed, the others go on; `warn`: a line, and it ends as it likes. Told once."""
    monkeypatch.setenv("GPU_POOL_TTL", "6")
    job = f"cat {tmp_path}/{{}}; echo {{}}"
    for name in "ab":
        os.mkfifo(tmp_path / name)
    with process(*OURS, "map", "--on-lost", on_lost, "--note", "ours", job, ":::", "a", "b", text=True) as it:
        writers = [os.open(tmp_path / name, os.O_WRONLY) for name in "ab"]
        with GPUPool() as pool:
            taken = sorted(pool.leases().leases, key=lambda lease: lease.token)[0]  # of the first job
            pool.revoke(taken.gpus[0], force=True)
        seen = ""
        while "job 1 (a): the lease on" not in seen:
            seen += (line := it.stderr.readline())
            assert line, seen
        for writer in writers:
            os.close(writer)
        out, err = it.communicate(timeout=30)
    lines = [line for line in (seen + err).splitlines() if "is lost" in line]
    assert f"job 1 (a): the lease on {taken.gpus[0]} is lost (it was revoked by " in lines[0]
    if on_lost == "kill":
        assert (it.returncode, out) == (1, "b\n")
        assert lines[0].startswith("Error: ")
        assert lines[0].endswith("; it is ended")
        assert lines[1].startswith("  job 1 (a): the lease on ")
        assert len(lines) == 2
    else:
        assert (it.returncode, sorted(out.split())) == (0, ["a", "b"])
        assert lines[0].startswith("Warning: ")
        assert lines[0].endswith("; it goes on")
        assert len(lines) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(fleet, number, tmp_path):
    """Jobs are ended with all that they started, the stubborn ones by SIGKILL; the rest does not begin."""
    job = f"trap 'echo told' TERM; (sleep 60 & echo $! > {tmp_path}/{{}}; wait); while :; do sleep 0.1; done"
    command = [*OURS, "map", "--grace", "3", job, ":::", "a", "b", "c"]
    with process(*command, text=True) as it:
        eventually(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"), 30)
        it.send_signal(number)
        out, err = it.communicate(timeout=30)
    assert it.returncode == 128 + number
    assert out.split() == ["told", "told"]
    assert f"1 job did not begin, because {number.name} came" in err
    for name in "ab":
        pid = int((tmp_path / name).read_text())
        eventually(lambda: not running(pid), message=f"{pid} is gone")  # noqa: B023
    assert "Traceback" not in err


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_jobs_outlive_a_map_that_is_killed(fleet, tmp_path):
    """kill -9: their GPUs are theirs until they end."""
    job = f"cat {tmp_path}/fifo"
    os.mkfifo(tmp_path / "fifo")
    with process(*OURS, "map", "-n", "2", job, ":::", "a", env={**os.environ, "GPU_POOL_TTL": "10"}) as it:
        with GPUPool() as pool:
            eventually(lambda: pool.leases().leases, 30, tick=0.05)
        writer = os.open(tmp_path / "fifo", os.O_WRONLY)
        it.kill()
        it.wait()
    threading.Event().wait(12.0)  # longer than the lease would last by itself
    ask = [*OURS, "run", "-n", "2", "--timeout", "0", "true"]
    assert subprocess.run(ask, capture_output=True).returncode == 124
    os.close(writer)


def test_the_bar(fleet, terminal):  # noqa: F811
    """On a terminal there is one, on stderr; it makes room for what the jobs say, and Ctrl-C ends all."""
    it: Terminal = terminal(*OURS, "map", "echo said {}; test {} = 1 || sleep 60", ":::", "1", "2", "3", "4")
    it.see(b"said 1")
    it.see(b"1/4")
    it.see(b"2 running")
    # Each line of ours begins where the bar was erased, or after it has made room.
    assert re.findall(rb"(\x1b\[2K|\n)gpupool-sync: simulated: ", it.text), it.text
    it.type(b"\x03")
    assert it.wait() == 130
    assert b"1 job did not begin, because SIGINT came" in it.text
    assert b"Traceback" not in it.text
    assert it.text.count(b"\x1b[?25l") == it.text.count(b"\x1b[?25h"), "the cursor is shown again"
