"""Many statistics servers in one process: each port answers a prepared summary after a fixed delay, or fails.

One thread, non-blocking sockets and a queue of answers that are due: an answer costs it less than any contender needs
to ask (the sweep reports how much).  It ends when its standard input does, so it never outlives who started it.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from gpupool_sync import wire
from gpupool_sync.models import GPUReading, HostIdentity, Sample

GPUS = 8
#: How a server fails: nobody listens, it answers 500, or it takes the question and says nothing.
FAULTS = ("refusing", "error 500", "silent")


class _Connection:
    """One client; asks, waits for the answer, and asks again (nobody here pipelines)."""

    __slots__ = ("answer", "asked", "sock")

    def __init__(self, sock: socket.socket, answer: bytes) -> None:
        self.sock = sock
        self.answer = answer
        self.asked = b""


def answer_of(number: int) -> bytes:
    """What our own server would answer for a host with eight idle cards, headers included."""
    gpus = tuple(
        GPUReading(
            local_gpu_id=index,
            name="NVIDIA A100-SXM4-80GB",
            uuid=f"GPU-{number:08x}-0000-4000-8000-{index:012x}",
            memory_total_mb=81920.0,
            memory_used_mb=float(64 + index),
            memory_usage_percent=0.1,
            utilization_percent=float(index),
            temperature_c=30.0,
            power_draw_w=60.0,
            power_limit_w=400.0,
            processes=(),
        )
        for index in range(GPUS)
    )
    host = HostIdentity(f"simulated-{number}", f"host-{number}", simulated=True)
    # The body never changes, and a timestamp that stands still would make its readings old.
    body = wire.dump(wire.summary_document(Sample(gpus, 0.0, host=host), timestamp=None))
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{wire.AGE_HEADER}: 0.100\r\nConnection: keep-alive\r\n\r\n"
    )
    return head.encode() + body


def error_answer() -> bytes:
    """What a server with a bug answers."""
    body = b'{"error": {"code": "internal", "message": "a bug"}}'
    return b"HTTP/1.1 500 Oops\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def serve(ports: int, delay: float, bad: int = 0, fault: str = FAULTS[0]) -> None:
    """
    Listen on *ports* free loopback ports, tell them on standard output, answer until standard input ends.

    The first *bad* of them fail.
    """
    selector = selectors.DefaultSelector()
    listeners = []
    for number in range(ports):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listeners.append(listener)
        if number < bad and fault == "refusing":
            continue  # bound, so that nobody else gets the port
        listener.listen(16)
        listener.setblocking(False)
        answer = answer_of(number)
        if number < bad:
            answer = error_answer() if fault == "error 500" else b""
        selector.register(listener, selectors.EVENT_READ, answer)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    print(json.dumps([listener.getsockname()[1] for listener in listeners]), flush=True)

    due: deque[tuple[float, _Connection]] = deque()  # in order, as the delay is the same for all
    answered = 0
    begin = time.process_time()
    while True:
        pause = max(0.0, due[0][0] - time.monotonic()) if due else None
        for key, _ in selector.select(pause):
            data: Any = key.data
            if isinstance(data, _Connection):
                _read(selector, data, due, delay)
            elif data is not None:
                _accept(selector, key.fileobj, data)
            elif not sys.stdin.buffer.read1():
                print(json.dumps({"answered": answered, "cpu": time.process_time() - begin}), flush=True)
                return
        now = time.monotonic()
        while due and due[0][0] <= now:
            connection = due.popleft()[1]
            try:
                connection.sock.sendall(connection.answer)  # fits into the socket's buffer
                answered += 1
            except OSError:
                _forget(selector, connection)


def _accept(selector: selectors.BaseSelector, listener: Any, answer: bytes) -> None:
    try:
        sock, _ = listener.accept()
    except OSError:  # gone again
        return
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    selector.register(sock, selectors.EVENT_READ, _Connection(sock, answer))


def _read(
    selector: selectors.BaseSelector, connection: _Connection, due: deque[tuple[float, _Connection]], delay: float
) -> None:
    try:
        data = connection.sock.recv(65536)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    if not data:
        _forget(selector, connection)
        return
    connection.asked += data
    if connection.asked.endswith(b"\r\n\r\n") and connection.answer:
        connection.asked = b""
        due.append((time.monotonic() + delay, connection))


def _forget(selector: selectors.BaseSelector, connection: _Connection) -> None:
    if connection.sock.fileno() >= 0:
        selector.unregister(connection.sock)
        connection.sock.close()


class Servers:
    """The process that serves, as the benchmark sees it: ``with Servers(100, 0.02) as servers: servers.urls``."""

    def __init__(self, number: int, delay: float, bad: int = 0, fault: str = FAULTS[0]) -> None:
        more = [str(number), str(delay), "--bad", str(bad), "--fault", fault]
        self._command = [sys.executable, "-m", "benchmarks._server", *more]
        self._process: subprocess.Popen[str] | None = None
        self.urls: list[str] = []
        #: Processor seconds that the server spent on one answer; known when it has ended.
        self.cpu_per_answer: float | None = None

    def __enter__(self) -> Servers:
        root = Path(__file__).resolve().parent.parent
        process = self._process = subprocess.Popen(
            self._command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait(10)
            raise RuntimeError(f"the benchmark's server ended with {process.returncode}")
        self.urls = [f"http://127.0.0.1:{port}" for port in json.loads(line)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is None:
            return
        try:
            # Closes its standard input, which ends it.
            told, _ = process.communicate(timeout=10)
            numbers = json.loads(told)
            if numbers["answered"]:
                self.cpu_per_answer = numbers["cpu"] / numbers["answered"]
        except (subprocess.TimeoutExpired, ValueError):
            process.kill()
            process.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ports", type=int)
    parser.add_argument("delay", type=float, help="seconds before each answer")
    parser.add_argument("--bad", type=int, default=0, help="so many of them fail")
    parser.add_argument("--fault", choices=FAULTS, default=FAULTS[0])
    options = parser.parse_args()
    serve(options.ports, options.delay, options.bad, options.fault)


if __name__ == "__main__":
    main()
