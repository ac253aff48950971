"""A real ``redis-server`` on a free loopback port, with a directory of its own, ended with the test."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

PROGRAM = shutil.which("redis-server")

#: For whole modules: the mark and the reason why it may be skipped.
needs_redis = [
    pytest.mark.external_service,
    pytest.mark.skipif(PROGRAM is None, reason="redis-server is not installed"),
]


class RedisServer:
    """
    One `redis-server`; it keeps nothing unless `appendonly`, or `snapshot()` was called before the end.

    With *appendonly* as docs/leases.md asks for: "everysec" puts off writing by up to two seconds while a disk is busy,
    and a kill then loses what was answered.
    """

    def __init__(self, directory: Path, *, appendonly: bool = False, options: tuple[str, ...] = ()) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._options = (
            *("--bind", "127.0.0.1", "--dir", str(directory), "--daemonize", "no"),
            *("--save", "", "--appendonly", "yes" if appendonly else "no", "--appendfsync", "always"),
            *options,
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, password: str = "") -> RedisServer:
        """Start it, again after `kill`, and wait until it has loaded its data."""
        assert PROGRAM is not None
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [PROGRAM, "--port", str(self.port), *self._options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + 20.0
        while self.command(*(["AUTH", password] if password else ["PING"])) not in ("+PONG", "+OK"):
            assert self._process.poll() is None, (self._directory / "log").read_text()
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.01)
        return self

    def command(self, *words: str) -> str:
        """The first line of what the server answers, without a client library; empty if it does not."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5.0) as connection:
            connection.sendall(b"".join([f"*{len(words)}\r\n".encode(), *map(_bulk, words)]))
            with connection.makefile("rb") as file:
                return file.readline().decode().strip()
        return ""

    def snapshot(self) -> None:
        """Write what there is now to disk, as a server with save points does now and then."""
        assert self.command("SAVE") == "+OK"

    def kill(self) -> None:
        """As a crash does it; idempotent."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait(10.0)
            self._process = None

    def pause(self) -> None:
        """It stays connected and says nothing any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Crash and come back with what is on disk."""
        self.kill()
        self.start()


def _bulk(word: str) -> bytes:
    data = word.encode()
    return f"${len(data)}\r\n".encode() + data + b"\r\n"
