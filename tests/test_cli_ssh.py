"""``run --any-host`` by the real ssh, to a real sshd on loopback with keys and settings of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gpupool_sync import GPUPool
from helpers import eventually
from test_cli_run import OURS, PATH, _fleet, elsewhere, fleet, process, python, terminal  # noqa: F401 - fixtures

#: sshd starts itself anew for each connection, so it insists on its full path.
SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
#: Seconds after which the server ends by itself, whatever becomes of these tests.
LONGEST = "300"

pytestmark = [
    pytest.mark.real,
    pytest.mark.external_service,
    pytest.mark.skipif(sys.platform != "linux", reason="sigtimedwait, /proc"),
    pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="openssh-server is not installed"),
]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory) -> Iterator[Path]:
    """A server; the configuration by which ssh knows it as the host ``far``."""
    here = tmp_path_factory.mktemp("ssh")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / key], check=True, timeout=30)
    (here / "authorized").write_bytes((here / "user.pub").read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (here / "known").write_text(f"[127.0.0.1]:{port} {(here / 'host.pub').read_text()}")
    server, client = here / "sshd_config", here / "ssh_config"
    server.write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {here}/host\nAuthorizedKeysFile {here}/authorized\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    client.write_text(
        f"Host far\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {here}/user\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {here}/known\n  BatchMode yes\n  ConnectTimeout 20\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where Debian's sshd shuts its children in
    with (
        open(here / "log", "wb") as log,
        subprocess.Popen(["timeout", "--kill-after=5", LONGEST, SSHD, "-D", "-e", "-f", server], stderr=log) as running,
    ):
        try:

            def listens() -> bool:
                assert running.poll() is None, (here / "log").read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
                    return True
                return False

            eventually(listens, 30, lambda: (here / "log").read_text())
            yield client
        finally:
            running.terminate()


@pytest.fixture
def far(sshd, fleet, monkeypatch):  # noqa: F811
    """All the pool knows is a machine that ssh knows, too; over there the GPUs are those of the fleet."""
    program = ["env", f"GPU_SERVICE_ENDPOINTS=sim={fleet.urls[0]}", f"PYTHONPATH={PATH}", *OURS]
    monkeypatch.setenv("GPU_POOL_REMOTE_PROGRAM", " ".join(program))
    monkeypatch.setenv("GPU_POOL_SSH", f"ssh -F {sshd}")
    with elsewhere("far", "GPU-far-0", "GPU-far-1") as url:
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"there={url}")
        yield fleet
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"sim={fleet.urls[0]}")


def any_host(*arguments: str, **options):
    return process(*OURS, "run", "--any-host", *arguments, **options)


def test_input_output_and_status_come_through(far):
    """Byte by byte, the end of the input included; and what the shells on the way could have taken for theirs."""
    code = (
        "import os, sys; data = sys.stdin.buffer.read(); sys.stdout.buffer.write(data[::-1])\n"
        "sys.stderr.write(os.environ['CUDA_VISIBLE_DEVICES'][:4] + sys.argv[1]); sys.exit(7)"
    )
    data = bytes(range(256)) * 1000
    with any_host(*python(code), "a 'b' $HOME", stdin=subprocess.PIPE) as it:
        out, err = it.communicate(data, timeout=50)
    assert (it.returncode, out) == (7, data[::-1]), err
    assert b"GPU-a 'b' $HOME" in err


@pytest.mark.parametrize("input_ends", [False, True], ids=["input", "no input"])
def test_the_command_ends_with_its_connection(far, input_ends):
    """ssh is killed, and says nothing to anybody: the command over there gets SIGHUP, and its GPU comes back."""
    code = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "signal.signal(signal.SIGHUP, lambda *_: os._exit(3))\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "signal.pause()"
    )
    with any_host(*python(code), stdin=subprocess.DEVNULL if input_ends else subprocess.PIPE) as it:
        pids = [int(word) for word in it.stdout.readline().split()]
        assert len(pids) == 2, it.stderr.read()
        (ssh,) = psutil.Process(it.pid).children()
        ssh.kill()
        assert it.wait(30) == 128 + signal.SIGKILL
        eventually(lambda: not any(map(psutil.pid_exists, pids)), 30, lambda: pids)


def test_who_does_not_mind_hanging_up_is_killed(far):
    """After `--grace` seconds: nobody is there any more who could end it."""
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); print(os.getpid(), flush=True)\n"
        "while True: signal.pause()"
    )
    with any_host("--grace", "0.2", *python(code)) as it:
        pid = int(it.stdout.readline())
        psutil.Process(it.pid).children()[0].kill()
        eventually(lambda: not psutil.pid_exists(pid), 30)


def test_an_output_that_nobody_reads_is_no_end(far):
    """As `… | head -1`: the command goes on until it writes; its errors and its input are still somebody's."""
    code = "import sys; print('one', flush=True); sys.stdin.readline(); sys.stderr.write('went on'); sys.exit(4)"
    with any_host(*python(code), stdin=subprocess.PIPE) as it:
        assert it.stdout.readline() == b"one\n"
        it.stdout.close()
        it.stdin.write(b"go\n")
        it.stdin.close()
        assert b"went on" in it.stderr.read()
        assert it.wait(30) == 4


def test_who_waits_over_there_leaves_the_queue_with_the_connection(far, monkeypatch):
    """The connection ends before there is a GPU: nothing is left that waits."""
    with GPUPool(far.urls) as pool, pool.gpus(2), any_host("true") as it:
        eventually(lambda: pool.leases().queue, 40, lambda: pool.leases(), tick=0.05)
        psutil.Process(it.pid).children()[0].kill()
        eventually(lambda: not pool.leases().queue, 40, lambda: pool.leases(), tick=0.05)


def test_a_terminal_comes_through(far, terminal):  # noqa: F811
    """With one ssh makes one over there: the command reads keys, and Ctrl-C is its own."""
    code = (
        "import os, sys; print(all(map(os.isatty, (0, 1, 2))), flush=True); print('read', input(), flush=True); input()"
    )
    it = terminal(*OURS, "run", "--any-host", *python(code))
    it.see(b"True")
    it.type(b"words\n")
    it.see(b"read words")
    it.type(b"\x03")
    it.see(b"KeyboardInterrupt")
    assert it.wait() == 130
