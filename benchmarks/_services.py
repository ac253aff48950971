"""Servers of the benchmarks, each a process of its own on a free loopback port, ended with the block."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parent.parent
#: Seconds that a server gets to start or to end.
PATIENCE = 30.0
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@attrs.frozen
class Service:
    """One that runs."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu(self) -> float:
        """Processor seconds that it has used, in steps of the kernel's clock (10 ms)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory(self) -> float:
        """Bytes in use that it shares with nobody."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[Service]:
    """A program that tells, in one JSON line, by which ``port`` or ``url`` it can be reached."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            raise RuntimeError(f"{' '.join(command[1:])} does not start")
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command[1:])} ended with {process.wait(PATIENCE)}")
        told = json.loads(line)
        port = told["port"] if "port" in told else int(told["url"].rpartition(":")[2])
        yield Service(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)


@contextlib.contextmanager
def our_server(gpus: int) -> Iterator[Service]:
    """``gpupool-sync serve`` as everybody starts it, with cards that do not exist and leases on them."""
    command = [sys.executable, "-m", "gpupool_sync", "serve", "--simulate", str(gpus), "--port", "0", "--json"]
    with _running([*command, "--log-level", "warning"]) as service:
        yield service


@contextlib.contextmanager
def app(name: str, *arguments: str) -> Iterator[Service]:
    """One of `benchmarks._apps`."""
    with _running([sys.executable, "-m", "benchmarks._apps", name, *arguments]) as service:
        yield service


def has_redis() -> bool:
    """Whether there is a redis-server to start."""
    return shutil.which("redis-server") is not None


NO_REDIS = "redis-server is not installed, and what needs it was left out: apt-get install redis-server"


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a redis-server of our own that writes nothing to disk."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpupool-redis-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(
            ["redis-server", *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(process.wait, PATIENCE)
        stack.callback(process.kill)
        end = time.monotonic() + PATIENCE
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), 1.0) as connection,
            ):
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("redis-server does not start")
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0"
