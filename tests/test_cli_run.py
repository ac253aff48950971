"""``gpupool-sync run``: real commands on the GPUs of real servers, and of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import servers
from gpupool_sync import GPUPool, wire
from gpupool_sync.cli import main
from gpupool_sync.clock import boottime
from gpupool_sync.models import GPUReading, HostIdentity, Sample
from gpupool_sync.testing import FakeFleet
from helpers import eventually

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), *(path for path in sys.path if path.endswith("site-packages")), str(HERE.parent)])
OURS = [sys.executable, "-m", "gpupool_sync"]

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


@contextlib.contextmanager
def process(*command: str, **options) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the test."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    with subprocess.Popen(command, **options) as running:
        try:
            yield running
        finally:
            running.kill()


def run(*arguments: str, **options):
    """``gpupool-sync run`` as a process."""
    return process(*OURS, "run", *arguments, **options)


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", code]


#: Says that it is there, and then what signals come; ends with status 5 at SIGTERM.
LISTENER = """
import signal, sys
def told(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM:
        sys.exit(5)
for each in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2"):
    if signal.getsignal(getattr(signal, "SIG" + each)) is not signal.SIG_IGN:
        signal.signal(getattr(signal, "SIG" + each), told)
print("ready", flush=True)
while True:
    signal.pause()
"""


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_has_the_gpu_and_the_wrapper_its_status(fleet):
    """Masked, by UUID; arguments and stdin arrive as they are; no signal is blocked in it; its status is ours."""
    code = (
        "import os, signal, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:], sys.stdin.read(), "
        "list(signal.pthread_sigmask(signal.SIG_BLOCK, [])), os.read(int(sys.argv[1]), 9)); sys.exit(7)"
    )
    ours, theirs = os.pipe()
    os.write(theirs, b"passed on")
    os.close(theirs)
    arguments = [str(ours), "a b", "--", "-n", "{}"]
    with run("--note", "a note", *python(code), *arguments, stdin=subprocess.PIPE, pass_fds=[ours], text=True) as it:
        with GPUPool() as pool:
            (lease,) = eventually(lambda: pool.leases().leases, 30)
        out, err = it.communicate("input")
    os.close(ours)
    mask, rest = out.split(" ", 1)
    assert mask.startswith("GPU-")
    assert rest == f"{arguments} input [] b'passed on'\n"
    assert it.returncode == 7
    assert lease.note == "a note"
    assert err.splitlines() == [
        f"gpupool-sync: simulated: {lease.gpus[0]}; masked as a real GPU would be, but CUDA will find nothing there"
    ]


def test_several_gpus_by_number(fleet, capfd):
    """`-n 2 --visible index` masks to both, by number; nothing of that stays in this process."""
    assert (
        main(["run", "-n", "2", "--visible", "index", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES $GPU_POOL_VISIBLE"]) == 0
    )
    assert capfd.readouterr().out in ("0,1 index\n", "1,0 index\n")
    assert "GPU_POOL_VISIBLE" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--", "sh", "-c", "exit 3"], 3, ""),
        (["--", "sh", "-c", "kill -USR1 $$"], 128 + signal.SIGUSR1, ""),
        (["--", "no-such-command", "x"], 127, "Error: no-such-command: command not found\n"),
        (["--", "/etc/passwd"], 126, "Error: /etc/passwd: cannot be executed\n"),
        (["-n", "3", "--", "true"], 125, "Error: no GPU of this pool can ever satisfy 3 GPUs of one host"),
        (["--endpoint", "elsewhere", "--", "true"], 125, "this pool has no endpoint elsewhere; it has sim"),
        (["--memory-mb", "1", "--max-holders", "2", "true"], 125, "memory_mb"),
        (["--timeout", "-1", "true"], 2, "--timeout"),
        ([], 2, "Missing argument"),
    ],
)
def test_exit_statuses(fleet, capfd, arguments, status, words):
    """As of the shells and timeout(1); the reason is on stderr, and nothing on stdout."""
    assert main(["run", *arguments]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err


def test_a_file_that_is_no_program_is_126(fleet, capfd, tmp_path):
    """Found out only when it is started; the lease is given back."""
    (tmp_path / "nothing").write_bytes(b"\0")
    (tmp_path / "nothing").chmod(0o755)
    assert main(["run", str(tmp_path / "nothing")]) == 126
    assert "Exec format error" in capfd.readouterr().err


def test_when_no_gpu_comes_in_time(fleet, capfd):
    """124, and who has them."""
    with GPUPool() as pool, pool.gpus(2, note="theirs"):
        assert main(["run", "--timeout", "0", "true"]) == 124
    err = capfd.readouterr().err
    assert "none could be had within" in err
    assert f"pid {os.getpid()}" in err


def test_gpus_of_other_machines_are_not_waited_for(fleet, capfd, monkeypatch):
    """What could only be granted in vain is refused at once, with the way to do it."""
    with elsewhere("far") as url:
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"there={url}")
        assert main(["run", "true"]) == 125
        err = capfd.readouterr().err
        assert "are in other machines (far)" in err
        assert "--any-host" in err
        # With one that is usable beside it, that one is.
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"there={url},sim={fleet.urls[0]}")
        assert main(["run", "-n", "2", "true"]) == 0


# -- as long as the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arbiter", ["server", "host"])
def test_the_lease_outlives_a_wrapper_that_is_killed(fleet, arbiter, monkeypatch, tmp_path):
    """kill -9: nobody else gets the GPU before the command ends; then it comes back."""
    ours, ask = OURS, []
    if arbiter == "host":
        monkeypatch.delenv("GPU_SERVICE_ENDPOINTS")
        ours = [sys.executable, str(HERE / "cards_cli.py"), "2"]
        monkeypatch.setenv("GPU_POOL_LOCK_DIR", str(tmp_path))
    code = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    try_both = [*ours, "run", *ask, "-n", "2", "--timeout", "0", "true"]
    environ = {**os.environ, "GPU_POOL_TTL": "10"}
    with process(*ours, "run", *python(code), stdin=subprocess.PIPE, env=environ) as it:
        assert it.stdout.readline()
        it.kill()
        it.wait()
        threading.Event().wait(12.0 if arbiter == "server" else 0.0)  # longer than the lease would last by itself
        assert subprocess.run(try_both, capture_output=True).returncode == 124
        it.stdin.close()
        assert it.stdout.read() == b""  # the command has ended
        try_both[-2] = "60"
        assert subprocess.run(try_both, capture_output=True).returncode == 0


def test_a_lost_lease_ends_the_command(fleet, monkeypatch):
    """--on-lost kill: SIGTERM, then SIGKILL, status 125; --on-lost warn: a line, and its own status."""
    monkeypatch.setenv("GPU_POOL_TTL", "6")
    stubborn = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: print('TERM', flush=True))\nprint('on', flush=True)\n"
        "while True: signal.pause()"
    )
    with (
        run("--grace", "0.3", *python(stubborn)) as killed,
        run("--on-lost", "warn", *python("print('on', flush=True); input()"), stdin=subprocess.PIPE) as warned,
    ):
        assert killed.stdout.readline() == warned.stdout.readline() == b"on\n"
        with GPUPool() as pool:
            leases = pool.leases().leases
            for lease in leases:
                pool.revoke(lease.gpus[0], force=True)
        assert killed.wait(30) == 125
        assert killed.stdout.read() == b"TERM\n"
        (line,) = [each for each in killed.stderr.read().splitlines() if b" is lost" in each]
        assert line.startswith(b"Error: the lease on sim:")
        assert line.endswith(b"; the command is ended: SIGTERM, and SIGKILL in 0.3 s")
        said = b""
        while b"is lost (" not in said:
            said += (line := warned.stderr.readline())
            assert line, said
        assert said.count(b" is lost") == 1
        assert line.startswith(b"Warning: the lease on sim:")
        assert line.endswith(b"; the command goes on\n")
        warned.communicate(b"\n")
        assert warned.returncode == 0


# -- signals and the terminal ------------------------------------------------------------------------------------------


def test_signals_reach_the_command_once_each(fleet):
    """Those that were sent to the wrapper alone; the command's own way of ending is its status."""
    with run(*python(LISTENER)) as it:
        assert it.stdout.readline() == b"ready\n"
        for name in ("USR1", "INT", "HUP", "QUIT", "USR2", "TERM"):
            it.send_signal(getattr(signal, f"SIG{name}"))
            assert it.stdout.readline() == f"SIG{name}\n".encode()
        assert it.stdout.read() == b""
        assert it.wait(20) == 5


def test_an_ignored_signal_stays_ignored(fleet):
    """As under nohup: the command does not even learn of it."""
    with process("sh", "-c", 'trap "" HUP; exec "$@"', "sh", *OURS, "run", *python(LISTENER)) as it:
        assert it.stdout.readline() == b"ready\n"
        it.send_signal(signal.SIGHUP)
        it.send_signal(signal.SIGTERM)
        assert it.stdout.read() == b"SIGTERM\n"
        assert it.wait(20) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait(fleet, number):
    """At once, with the status of the shells, and without a place in the queue left behind."""
    with GPUPool() as pool, pool.gpus(2), run("true") as it:
        eventually(lambda: pool.leases().queue, 30, tick=0.05)
        it.send_signal(number)
        assert it.wait(20) == 128 + number
        eventually(lambda: not pool.leases().queue, tick=0.05)
        assert b"Traceback" not in it.stderr.read()


def test_what_it_waits_for_is_said_once(fleet):
    """No terminal: one line after two seconds, with who holds what, and one when there is a GPU."""
    with GPUPool() as pool, contextlib.ExitStack() as held:
        held.enter_context(pool.gpus(2, note="theirs"))
        with run("echo", "done", text=True) as it:
            line = it.stderr.readline()
            held.close()
            rest = it.stderr.read()
            assert it.stdout.read() == "done\n"
    # After two seconds; how soon after that depends on the machine.
    assert re.match(r"waiting (\d+ min )?\d+(\.\d)? s for one GPU, place 1: sim:0-1 held by ", line)
    assert f"pid {os.getpid()}" in line
    assert rest.splitlines()[0].startswith("gpupool-sync: got sim:")


def test_a_ctrl_z_while_the_command_is_started_is_kept():
    """It meets this process alone, as the command is not there yet: noted for the command instead of stopping us."""
    code = (
        "import os, signal\n"
        "from gpupool_sync.cli._running import Signals\n"
        "with Signals(signal.SIGINT) as signals:\n"
        "    with signals.as_before():\n"
        "        os.kill(os.getpid(), signal.SIGTSTP)\n"
        "    event = signals.wait(0)\n"
        "print(event.number == signal.SIGTSTP, event.by_kernel, signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL)"
    )
    with process(sys.executable, "-c", code, text=True) as it:
        _, status = os.waitpid(it.pid, os.WUNTRACED)
        assert os.WIFEXITED(status), "it was stopped"
        it.returncode = os.waitstatus_to_exitcode(status)
        assert it.stdout.read() == "True False True\n"


class Terminal:
    """A process that has a terminal, as in a window."""

    def __init__(self, *command: str) -> None:
        self.text = b""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            with contextlib.suppress(OSError):
                os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"})
            os._exit(99)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that nobody has the other end any more
            while piece := os.read(self._fd, 65536):
                self.text += piece

    def see(self, text: bytes, times: int = 1) -> None:
        eventually(lambda: self.text.count(text) >= times, 30, lambda: f"no {text!r} in {self.text!r}")

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait(self) -> int:
        """Its exit status."""
        self._reader.join(30)
        assert not self._reader.is_alive(), self.text
        _, code = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(code)

    def close(self) -> None:
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)  # the command, too, keeps the GPU
            os.waitpid(self.pid, 0)
        os.close(self._fd)
        self._reader.join(10)


@pytest.fixture
def terminal():
    made: list[Terminal] = []

    def start(*command: str) -> Terminal:
        made.append(Terminal(*command))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_the_terminal_is_the_commands(fleet, terminal):
    """It reads keys, is in the foreground, and Ctrl-C reaches it exactly once; who waits draws over one line."""
    code = (
        "import os\n"
        "print('front', os.tcgetpgrp(0) == os.getpgrp(), all(map(os.isatty, (0, 1, 2))))\n"
        "print('read', input())\n" + LISTENER
    )
    with GPUPool() as pool, pool.gpus(2):
        it = terminal(*OURS, "run", *python(code))
        it.see(b"s for one GPU, place 1: sim:0-1 held by", 2)
        it.see(b"\r\x1b[2Kwaiting ", 2)
    it.see(b"front True True")
    it.type(b"some words\n")
    it.see(b"read some words")
    it.see(b"ready")
    it.type(b"\x03")
    it.see(b"SIGINT")
    it.type(b"\x1c")
    it.see(b"SIGQUIT")
    os.kill(it.pid, signal.SIGTERM)
    assert it.wait() == 5
    assert it.text.count(b"SIGINT") == it.text.count(b"SIGQUIT") == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with job control")
def test_ctrl_z_and_fg(fleet, terminal):
    """The shell sees that the job has stopped, keeps its GPU, and continues it."""
    line = f"{' '.join(OURS)} run -- cat; echo stopped=$?; fg; echo ended=$?"
    it = terminal("bash", "--norc", "-ic", line)
    it.see(b"gpupool-sync: simulated: ")
    it.type(b"first\n")
    it.see(b"first", 2)  # echoed by the terminal, and by the command: it runs
    it.type(b"\x1a")
    it.see(b"stopped=")
    it.see(b"run -- cat", 2)
    it.type(b"second\n")
    it.see(b"second", 2)
    it.type(b"\x04")
    it.see(b"ended=0")
    assert it.wait() == 0


# -- other machines ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def elsewhere(name: str, *uuids: str) -> Iterator[str]:
    """The statistics of a machine that is not this one; its URL."""
    gpus = tuple(GPUReading(n, "NVIDIA A100", uuid, 81920.0, 0.0) for n, uuid in enumerate(uuids or ["GPU-far-0"]))
    sample = Sample(gpus=gpus, taken_at=boottime(), host=HostIdentity(f"boot-of-{name}", name))
    document = wire.dump(wire.summary_document(sample, timestamp="2026-11-23T12:00:00Z"))
    with servers.Server(servers.answer(document)) as server:
        yield server.url


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An ssh that runs everything here; each host has the GPUs of the server in the file of its name."""
    program = tmp_path / "ssh"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"here = {str(tmp_path)!r}\n"
        "with open(here + '/log', 'a') as log: log.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "host, dashes, line = sys.argv[-3:]\n"
        "assert dashes == '--'\n"
        "os.environ['GPU_SERVICE_ENDPOINTS'] = open(here + '/' + host).read()\n"
        "os.execv('/bin/sh', ['sh', '-c', line])\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("GPU_POOL_SSH", str(program))
    monkeypatch.setenv("GPU_POOL_REMOTE_PROGRAM", " ".join(OURS))
    return tmp_path


def told(ssh: Path) -> list[list[str]]:
    path = ssh / "log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_any_host_runs_over_there(fleet, ssh, monkeypatch, capfd):
    """By ssh, as `gpupool-sync run` there, with what was asked for, in the directory of the same name."""
    (ssh / "far").write_text(f"own={fleet.urls[0]}")
    with elsewhere("far", "GPU-far-0", "GPU-far-1") as url:
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"there={url}")
        more = ["--endpoint", "there", "--exclude", "there:1", "--model", "A 100", "--model", "a100", "--note", "it's"]
        code = "import os, sys; print(os.getcwd(), os.environ['CUDA_VISIBLE_DEVICES'][:4], sys.argv[1:]); sys.exit(9)"
        assert main(["run", "--any-host", *more, *python(code), "a 'b' $HOME", "{}"]) == 9
    out, err = capfd.readouterr()
    assert out == f"{os.getcwd()} GPU- {['a ' + chr(39) + 'b' + chr(39) + ' $HOME', '{}']}\n"
    assert "own:" in err  # that it is simulated
    ((host, _, line),) = told(ssh)
    assert host == "far"
    assert " --model a100 " in line
    assert " --exclude GPU-far-1 " in line
    assert "--endpoint" not in line


def test_any_host_tries_the_next(fleet, ssh, monkeypatch, capfd):
    """Where a GPU was seen free it may be gone: then the command runs elsewhere, and once only."""
    (ssh / "far").write_text(f"own={fleet.urls[0]}")
    with (
        FakeFleet([1]) as other,
        elsewhere("far", "GPU-far-0", "GPU-far-1") as one,
        elsewhere("near", "GPU-n-0") as two,
    ):
        (ssh / "near").write_text(f"own={other.urls[0]}")
        with GPUPool() as pool, pool.gpus(2):
            monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"one={one},two={two}")
            monkeypatch.setattr("gpupool_sync.cli.run.SHORT", 0.1)
            monkeypatch.setattr("gpupool_sync.cli._any_host.SHORT", 0.1)
            # The status by which the one over there says that none was free is no other's.
            assert main(["run", "--any-host", "--", "sh", "-c", "echo once; exit 121"]) == 1
            assert main(["run", "--any-host", "--timeout", "0", "--endpoint", "one", "echo"]) == 124
    assert capfd.readouterr().out == "once\n"
    assert [host for host, *_ in told(ssh)] == ["far", "near", "far"]


def test_any_host_means_this_one_too(fleet, ssh, capfd):
    """No ssh where it is not needed."""
    assert main(["run", "--any-host", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 4"]) == 4
    assert capfd.readouterr().out.startswith("GPU-")
    assert told(ssh) == []


def test_a_host_name_is_no_option_of_ssh(fleet, ssh, monkeypatch, capfd):
    """What a server calls itself goes on a command line."""
    with elsewhere("-oProxyCommand=touch x") as url:
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"there={url}")
        assert main(["run", "--any-host", "true"]) == 125
    assert "which ssh cannot be told" in capfd.readouterr().err
    assert told(ssh) == []
