"""One server of a `gpupool_sync.testing.FakeFleet`, in a process of its own.

It obeys JSON lines on its standard input and answers each with one line on its standard output.  When that input ends,
or its parent is gone in any other way, it ends at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import attrs

from gpupool_sync.devices.simulated import SimulatedReader, parse_cards
from gpupool_sync.errors import GPUPoolError, MissingExtra
from gpupool_sync.server.faults import Fault, Faults
from gpupool_sync.server.run import listen, make_front, make_leases, make_server
from gpupool_sync.server.sampler import Sampler

#: Seconds between two looks at whether the parent lives.
_PARENT_CHECK = 1.0
#: Seconds that a port may stay in use after a predecessor's death.
_PORT_PATIENCE = 5.0
#: Seconds for a look at simulated cards.
_LOOK = 10.0


class _Lines:
    """JSON lines from and to the parent."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._in = sys.stdin.fileno()
        # What others print must not end up between the answers.
        self._out = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._buffer = b""
        #: Removed when the parent is gone without having done so.
        self.leftover: str | None = None

    def read(self) -> dict[str, Any]:
        """The next order; ends the process if there will be none."""
        while b"\n" not in self._buffer:
            # Processes forked by the parent hold the pipe open as well, so its end is not all there is to watch.
            ready, _, _ = select.select([self._in], [], [], _PARENT_CHECK)
            if os.getppid() != self._parent:
                self._orphaned()
            if ready:
                data = os.read(self._in, 65536)
                if not data:
                    self._orphaned()
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        order = json.loads(line)
        assert isinstance(order, dict)
        return order

    def _orphaned(self) -> NoReturn:
        if self.leftover is not None:
            shutil.rmtree(self.leftover, ignore_errors=True)
        _end(0)

    def write(self, document: dict[str, Any]) -> None:
        try:
            os.write(self._out, json.dumps(document).encode() + b"\n")
        except OSError:
            _end(0)


def _end(status: int) -> NoReturn:
    # Nothing here is worth an orderly end, and connections that hang would delay it.
    os._exit(status)


class _Member:
    """Does what the parent orders."""

    def __init__(self, reader: SimulatedReader, sampler: Sampler, faults: Faults) -> None:
        self._reader, self._sampler, self._faults = reader, sampler, faults
        self._orders: dict[str, Callable[..., Any]] = {
            "fault": self._fault,
            "busy": self._busy,
            "lose": self._lose,
            "empty": self._empty,
            "heal": self._heal,
            "counts": faults.counts,
        }

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        # The number comes back with the answer: an answer that nobody waited for is told from the next one.
        number, name = order.pop("number"), order.pop("order")
        try:
            return {"number": number, "ok": self._orders[name](**order)}
        except GPUPoolError as exc:
            return {"number": number, "error": str(exc)}

    def _fault(self, **fields: Any) -> None:
        self._faults.fault = attrs.evolve(self._faults.fault, **fields)

    def _busy(self, index: int, **load: Any) -> None:
        self._reader.override(index, **load)
        self._look()

    def _lose(self, index: int) -> None:
        self._reader.lose(index)
        self._look()

    def _empty(self) -> None:
        self._reader.empty()
        self._look()

    def _heal(self) -> None:
        self._faults.fault = Fault()
        self._reader.heal()
        self._look()

    def _look(self) -> None:
        # The order is acknowledged when requests see what it did.
        if not self._sampler.refresh(_LOOK):
            raise GPUPoolError("the simulated cards were not read in time")


def main() -> None:
    lines = _Lines()
    # A group of its own: a terminal's Ctrl-C is for the parent.  In the parent's session, so that the kernel ends it
    # if it is stopped when the parent dies.
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    settings = lines.read()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        reader = SimulatedReader(parse_cards(settings["cards"]), name=settings["name"])
        sampler = Sampler(reader, interval=settings["interval"])
        sockets = _listen(settings["port"])
        leases = None
        if settings["lock_dir"] is not None:
            lines.leftover = settings["lock_dir"]
            leases = make_leases(sampler, settings["lock_dir"], settings["port"])
        sampler.start()
        sampler.wait_for_first(_LOOK)
        if leases is not None:
            leases.start()
        faults = Faults(make_front(sampler, {}, leases))
        server = make_server(faults)
    except MissingExtra as exc:
        lines.write({"number": 0, "missing": str(exc)})
        _end(2)
    except GPUPoolError as exc:
        lines.write({"number": 0, "error": str(exc)})
        _end(1)
    server.config.load()
    server.config.http_protocol_class = faults.count_connections(server.config.http_protocol_class)
    member = _Member(reader, sampler, faults)

    def obey() -> None:
        try:
            while True:
                lines.write(member.obey(lines.read()))
        finally:
            _end(1)

    lines.write({"number": 0, "ok": None})
    threading.Thread(target=obey, name="gpupool-member", daemon=True).start()
    server.run(sockets=sockets)
    _end(0)


def _listen(port: int) -> list[Any]:
    end = time.monotonic() + _PORT_PATIENCE
    while True:
        try:
            return [*listen("127.0.0.1", port)]
        except GPUPoolError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.05)


if __name__ == "__main__":
    main()
