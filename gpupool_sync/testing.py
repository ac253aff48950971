"""Real servers with simulated GPUs, and faults on demand, for tests.

>>> from gpupool_sync import GPUPool
>>> from gpupool_sync.testing import FakeFleet
>>> with FakeFleet([8, 4, "2xA100"]) as fleet, GPUPool(fleet.urls) as pool:  # doctest: +SKIP
...     fleet[0].kill()
...     with pool.gpu(timeout=5) as gpu:
...         assert gpu.url in fleet.urls[1:]

Each server is a process of its own on 127.0.0.1.  It needs the optional extra: ``pip install 'gpupool-sync[server]'``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, overload

from gpupool_sync.clock import Deadline
from gpupool_sync.errors import ConfigError, GPUPoolError, MissingExtra

__all__ = ["FakeFleet", "FakeServer", "FleetError"]

#: Seconds in which a living server obeys.
_PATIENCE = 60.0
#: Seconds in which a killed process is gone.
_DEATH = 60.0
#: Most characters of a server's own words in an error.
_QUOTED = 4000

_MODULE = "gpupool_sync.server.member"
# As `python -m`, but it also finds the package where only this process' sys.path has it; last, so that nothing else
# is found there first.
_START = "import runpy, sys; sys.path.append(sys.argv.pop()); runpy.run_module(sys.argv.pop(), run_name='__main__')"


class FleetError(GPUPoolError):
    """A server of a `FakeFleet` did not start, does not obey, or is not in a state to."""


class FakeServer:
    """
    One server of a `FakeFleet`.

    Every method returns when what it does is done: the next request meets it.  Faults last until `heal` or
    `restart`; those of the connection (`slow`, `fail`, `error_body`, `hang`) add up.
    """

    def __init__(self, cards: str, name: str, interval: float, leases: bool = True) -> None:
        self.name = name
        self._cards = cards
        self._interval = interval
        # Held for one order or change of the process at a time; bounded by _PATIENCE.
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: BinaryIO | None = None
        self._buffer = b""
        self._number = 0  # of the last order
        self._frozen = False
        #: Where its locks are; None: it grants no leases. Nobody else's: the cards do not exist.
        self.lock_dir = tempfile.mkdtemp(prefix="gpupool-fake-") if leases else None
        # Bound, but not listening: the port stays this server's while it is dead, and connections are refused.
        self._place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._place.bind(("127.0.0.1", 0))
            self.port = int(self._place.getsockname()[1])
        except BaseException:
            self._place.close()
            self._remove_locks()
            raise

    def _remove_locks(self) -> None:
        if self.lock_dir is not None:
            shutil.rmtree(self.lock_dir, ignore_errors=True)

    def __repr__(self) -> str:
        state = "frozen" if self._frozen else "alive" if self.alive else "dead"
        return f"<FakeServer {self.name} {self._cards} {self.url} {state}>"

    @property
    def url(self) -> str:
        """The same for ever, also after `restart`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the process, as long as it lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def alive(self) -> bool:
        """Whether the process lives; it may be frozen, or hang."""
        return self.pid is not None

    # -- life ----------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process as ``kill -9`` does; connections to it are refused from now on."""
        with self._lock:
            self._end_process()

    def restart(self, timeout: float = 90.0) -> None:
        """Kill the server if it lives, and start it anew: same port, same cards, no faults, counters at 0."""
        with self._lock:
            self._end_process()
            self._begin_process()
            self._await_start(Deadline.after(timeout))

    def freeze(self) -> None:
        """Stop the process as it is (SIGSTOP): the kernel still accepts connections, nobody answers; `heal` ends it."""
        with self._lock:
            process = self._alive_process()
            process.send_signal(signal.SIGSTOP)
            self._frozen = True
            # The signal is only the order to stop.
            deadline = Deadline.after(_PATIENCE)
            options = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
            while os.waitid(os.P_PID, process.pid, options) is None:
                if deadline.passed():
                    raise FleetError(f"server {self.name} does not stop")
                time.sleep(0.001)

    def heal(self, timeout: float = 90.0) -> None:
        """Undo every fault; start the server again if it is dead."""
        with self._lock:
            if not self.alive:
                self.restart(timeout)
                return
            if self._frozen:
                self._alive_process().send_signal(signal.SIGCONT)
                self._frozen = False
            self._order("heal")

    # -- faults of the connection --------------------------------------------------------------------------

    def slow(self, seconds: float) -> None:
        """Every answer comes so many seconds late."""
        if not 0.0 <= seconds < float("inf"):
            raise ConfigError(f"seconds={seconds!r}: a number of at least 0 is allowed")
        self._order("fault", delay=float(seconds))

    def fail(self, status: int = 500, retry_after: float | None = None) -> None:
        """Every answer has this status, and asks to be left alone for *retry_after* seconds, if given."""
        if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 599:
            raise ConfigError(f"status={status!r}: an HTTP status from 200 to 599 is allowed")
        self._order("fault", status=status, retry_after=retry_after)

    def error_body(self, message: str = "nvidia-smi failed, as ordered") -> None:
        """Every answer has status 200 and a body that reports an error, as the predecessor's servers do."""
        self._order("fault", error=message)

    def hang(self) -> None:
        """Requests are accepted and never answered; those that hang do so until the client gives up."""
        self._order("fault", hang=True)

    # -- faults of the cards -------------------------------------------------------------------------------

    def lose_gpu(self, index: int) -> None:
        """The card fell off the bus: the server lists it as unavailable."""
        self._order("lose", index=index)

    def busy(
        self,
        index: int,
        memory_percent: float = 95.0,
        utilization_percent: float | None = None,
        *,
        process: bool = True,
    ) -> None:
        """
        The card is used by somebody outside the pool.

        Args:
            utilization_percent: None: the same as *memory_percent*.
            process: whether the server tells the process that uses it.
        """
        self._order(
            "busy",
            index=index,
            memory_percent=memory_percent,
            utilization_percent=utilization_percent,
            process=process,
        )

    def empty(self) -> None:
        """The server answers, and has no cards."""
        self._order("empty")

    # -- what the server saw -------------------------------------------------------------------------------

    def request_count(self, path: str | None = "/gpu/summary") -> int:
        """Requests for *path* (None: for any) since the server started."""
        requests: dict[str, int] = self._order("counts")["requests"]
        return sum(requests.values()) if path is None else requests.get(path, 0)

    def connection_count(self) -> int:
        """Connections that the server has accepted since it started, also those that are over."""
        return int(self._order("counts")["connections"])

    # -- the process ---------------------------------------------------------------------------------------

    def _begin_process(self) -> None:
        """Start the process and tell it what to be; it is not waited for."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, _MODULE, str(Path(__file__).resolve().parent.parent)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        except OSError as exc:
            errors.close()
            raise FleetError(f"server {self.name} cannot be started: {exc}") from exc
        except BaseException:
            errors.close()
            raise
        self._errors, self._buffer, self._number, self._frozen = errors, b"", 0, False
        settings = {
            "cards": self._cards,
            "name": self.name,
            "interval": self._interval,
            "port": self.port,
            "lock_dir": self.lock_dir,
        }
        self._send(settings)

    def _await_start(self, deadline: Deadline) -> None:
        try:
            answer = self._receive(0, deadline, "did not start")
            if "missing" in answer:
                raise MissingExtra(str(answer["missing"]))
            if "error" in answer:
                raise FleetError(f"server {self.name} did not start: {answer['error']}")
        except BaseException:
            self._end_process()
            raise

    def _end_process(self) -> None:
        process, errors = self._process, self._errors
        self._process = self._errors = None
        self._frozen = False
        try:
            if process is not None:
                process.kill()  # a stopped process dies of it as well
                process.wait(_DEATH)
        except subprocess.TimeoutExpired as exc:
            raise FleetError(
                f"server {self.name} (pid {exc.cmd and process and process.pid}) cannot be killed"
            ) from exc
        finally:
            for file in (errors, *((process.stdin, process.stdout) if process is not None else ())):
                if file is not None:
                    with contextlib.suppress(OSError):
                        file.close()

    def _close(self) -> None:
        with self._lock:
            try:
                self._end_process()
            finally:
                self._place.close()
                self._remove_locks()

    def _alive_process(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            raise FleetError(f"server {self.name} is not running; restart() or heal() starts it")
        return process

    def _order(self, order: str, **arguments: Any) -> Any:
        with self._lock:
            self._alive_process()
            if self._frozen:
                raise FleetError(f"server {self.name} is frozen and cannot obey; heal() thaws it")
            self._number += 1
            self._send({"number": self._number, "order": order, **arguments})
            answer = self._receive(self._number, Deadline.after(_PATIENCE), "does not obey")
            if "error" in answer:
                raise FleetError(f"server {self.name}: {answer['error']}")
            return answer["ok"]

    def _send(self, document: dict[str, Any]) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        # A process that has ended says why in its own words; that is found out when its answer is missing.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(document).encode() + b"\n")

    def _receive(self, number: int, deadline: Deadline, what: str) -> dict[str, Any]:
        """The answer to the order of this number; answers to earlier ones, whose callers gave up, are dropped."""
        while True:
            line = self._read_line(deadline, what)
            answer = json.loads(line)
            assert isinstance(answer, dict)
            if answer["number"] == number:
                return answer

    def _read_line(self, deadline: Deadline, what: str) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        poll = select.poll()  # select() cannot take descriptors above 1023
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(1000.0 * deadline.within(60.0)):
                if deadline.passed():
                    raise FleetError(f"server {self.name} {what} in time{self._words()}")
                continue
            data = process.stdout.read(65536)
            if not data:
                raise FleetError(f"server {self.name} {what}: its process has ended{self._words()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _words(self) -> str:
        """What the process wrote to its standard error."""
        if self._errors is None:
            return ""
        # By position: the offset of the file is the child's too.
        said = os.pread(self._errors.fileno(), 1_000_000, 0).decode("utf-8", "replace").strip()
        return f"; it said:\n{said[-_QUOTED:]}" if said else ", and it said nothing"


class FakeFleet(Sequence[FakeServer]):
    """
    Simulated servers, one for each of *hosts*: a number of cards, or ``N[xMODEL]`` items such as "4xA100,2xH100".

    They start in parallel when the fleet is made or entered, whichever is first, and end with the ``with`` block,
    `close`, or this process, even if it is killed.

    Args:
        names: of the hosts; their cards' UUIDs follow from them.  By default no two fleets have a name in common, so
            that tests that run at the same time never meet at one card.
        interval: seconds between two samples.
        start_timeout: seconds in which all of them must be up.
        leases: whether the servers grant leases, as ours do; False: statistics only.

    Raises:
        MissingExtra: FastAPI or uvicorn is not installed.
        FleetError: a server does not start.
    """

    def __init__(
        self,
        hosts: Sequence[int | str],
        *,
        names: Sequence[str] | None = None,
        interval: float = 0.1,
        start_timeout: float = 90.0,
        leases: bool = True,
    ) -> None:
        missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtra(f"FakeFleet needs {' and '.join(missing)}: pip install 'gpupool-sync[server]'")
        if isinstance(hosts, (str, int)):
            raise ConfigError(f"FakeFleet({hosts!r}): a list is allowed, such as [8, 4, '2xA100']")
        if names is None:
            token = secrets.token_hex(3)
            names = [f"fake{number}-{token}" for number in range(1, len(hosts) + 1)]
        if isinstance(names, str) or len(names) != len(hosts) or len(set(names)) != len(names):
            raise ConfigError(f"names={names!r}: {len(hosts)} different names are needed, one for each host")
        if not 0.01 <= interval <= 3600.0:
            raise ConfigError(f"interval={interval!r}: a number of seconds from 0.01 to 3600 is allowed")
        self._owner = os.getpid()
        self._servers: tuple[FakeServer, ...] = ()
        try:
            for cards, name in zip(hosts, names, strict=True):
                self._servers += (FakeServer(_cards(cards), name, interval, leases),)
            deadline = Deadline.after(start_timeout)
            for server in self._servers:
                server._begin_process()
            for server in self._servers:
                server._await_start(deadline)
        except BaseException:
            self.close()
            raise

    @property
    def urls(self) -> list[str]:
        """Of all servers, dead ones too; what a `GPUPool` takes."""
        return [server.url for server in self._servers]

    def __len__(self) -> int:
        return len(self._servers)

    @overload
    def __getitem__(self, index: int) -> FakeServer: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[FakeServer, ...]: ...

    def __getitem__(self, index: int | slice) -> FakeServer | tuple[FakeServer, ...]:
        return self._servers[index]

    def __iter__(self) -> Iterator[FakeServer]:
        return iter(self._servers)

    def __repr__(self) -> str:
        return f"<FakeFleet of {len(self)}: {', '.join(map(repr, self))}>"

    def close(self) -> None:
        """End every server; idempotent.  In a forked child this does nothing: they are the parent's."""
        if os.getpid() != self._owner:
            return
        problem: FleetError | None = None
        for server in self._servers:
            try:
                server._close()
            except FleetError as exc:
                problem = problem or exc
        if problem is not None:
            raise problem

    def __enter__(self) -> FakeFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cards(cards: int | str) -> str:
    if isinstance(cards, bool) or not isinstance(cards, (int, str)) or (isinstance(cards, int) and cards < 0):
        raise ConfigError(f"cards {cards!r}: a number, or N[xMODEL] items such as '4xA100,2xH100', are allowed")
    return str(cards)
