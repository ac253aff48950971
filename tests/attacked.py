"""A server process that tests do bad things to."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil

_START = """
import resource, sys
from gpupool_sync.server import connections
if {limit}:
    resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
for name, value in {patches!r}.items():
    setattr(connections, name, value)
from gpupool_sync.cli import main
sys.exit(main(["serve", "--simulate", "{cards}", "--port", "0", "--json", "--log-level", "warning"]))
"""


class Victim:
    """A server process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = psutil.Process(process.pid)
        self.url = url
        place = urlsplit(url)
        self.address = (place.hostname, place.port)

    def get(self, path: str, timeout: float = 30.0) -> tuple[int, bytes]:
        """An honest client's request, on a connection of its own."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, path: str, document: object) -> tuple[int, dict]:
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            connection.request("POST", path, json.dumps(document), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def healthy(self) -> bool:
        status, body = self.get("/health")
        return status == 200 and json.loads(body)["status"] == "healthy"

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def sockets(self) -> int:
        """Connections that it has accepted and holds."""
        return sum(each.status == psutil.CONN_ESTABLISHED for each in self.process.net_connections("tcp"))

    def holds(self) -> tuple[int, int]:
        """Descriptors and threads."""
        return self.process.num_fds(), self.process.num_threads()


@contextlib.contextmanager
def victim(*, cards: int = 2, limit: int | None = None, **patches: float) -> Iterator[Victim]:
    """A server with *cards* simulated GPUs and *limit* descriptors; *patches* are limits of `server.connections`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _START.format(patches=patches, limit=limit, cards=cards)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    reader.start()
    try:
        said = ""
        while not said.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, "".join(errors)
            said += line
        server = Victim(process, json.loads(said)["url"])
        assert server.healthy()
        yield server
        assert process.poll() is None, "".join(errors)
    finally:
        process.kill()
        process.wait(30)
        reader.join(10)
        process.stdout.close()
        process.stderr.close()
    # Whatever came, no request and no connection broke anything inside.
    assert "Traceback" not in "".join(errors), "".join(errors)
