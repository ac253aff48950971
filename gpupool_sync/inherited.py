"""A lease that the commands of its process share: `gpu.run` and `gpu.popen`.

While a lease has commands there is a private directory for it, and whoever has the lease (our process, a command, and
what inherits their descriptors) has a descriptor whose ``flock`` keeps that directory locked.  So "does the lease still
live" is one question to the kernel, the same for every arbiter, and no pid is judged::

    gpupool-lease-…/            mode 0700, locked (LOCK_EX) as long as anybody has the lease
        cards-0.json            what a command is told: its cards, the fencing token, the scope
        locks/                  a `HostStore` of its own: who among the command's processes has which card
        good_until              with a ttl: `clock.boottime` at which the lease ends unless it is renewed before
        lost                    exists once the lease is lost; why

The environment of a command names ``cards-….json`` (`VARIABLE`), and nothing in there is a secret: the lease's id stays
with our process and the one that renews (`gpupool_sync._keep`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs

from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.errors import GPUPoolError, LeaseLost, LeaseStoreError
from gpupool_sync.leases.base import Claim, Granted, Lease, LeaseStore, Outcome, Scope
from gpupool_sync.leases.host import NETWORK_FILE_SYSTEMS, HostStore, _Descriptor, _file_system, _opened, _take
from gpupool_sync.models import Card, GPUReading, HostIdentity, Sample, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names what a command was told of its lease. `gpu.env()` never has it.
VARIABLE = "GPU_POOL_INHERITED"
#: Seconds that the process that renews may take to start.
START_TIME = 60.0

_PREFIX = "gpupool-lease-"
_LOCKS = "locks"
LOST = "lost"
GOOD_UNTIL = "good_until"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: What another process makes the same arbiter of: a function and its arguments, to be pickled.
Recipe = tuple[Callable[..., LeaseStore], tuple[Any, ...]]


# -- in the process that acquired ----------------------------------------------------------------------------------


@attrs.frozen
class ToKeep:
    """What the process that renews is told, by its standard input; the id and the recipe are secrets."""

    directory: str
    working_directory: str
    recipe: Recipe = attrs.field(repr=False)
    lease_id: str = attrs.field(repr=False)
    ttl: float
    good_until: float  # clock.boottime()


class Bequest:
    """One lease of this process, for the commands that it starts on it."""

    def __init__(self) -> None:
        parent = _local_directory()
        _sweep(parent)
        while True:
            self.directory = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            # Somebody who tidies up, as another thread here that starts a command, may have found it unlocked a moment
            # ago: it is gone before we open it, or before we lock it.
            with contextlib.suppress(FileNotFoundError):
                self._lock = _opened(self.directory, _OPEN_DIRECTORY, dir_fd=None)
                if _take(self._lock, fcntl.LOCK_EX) and os.path.isdir(self.directory):
                    break
        self.kept = False  # a process renews it as long as a command lives
        _bequests.add(self)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a command inherits, beside the locks of the arbiter."""
        return () if self._lock.fd < 0 else (self._lock.fd,)

    def tell(self, snapshot: Snapshot, cards: Sequence[Card], lease: Lease, store: LeaseStore) -> str:
        """Write down what a command on *cards* is told, once; returns the value of `VARIABLE`."""
        numbers = "-".join(str(card.reading.local_gpu_id) for card in cards)
        path = os.path.join(self.directory, f"cards-{numbers}.json")
        host = snapshot.sample.host
        share = None if lease.share is None else lease.share.memory_mb
        descriptors = [*self.descriptors, *store.descriptors(lease.id)]
        told = {
            "v": 1,
            "pid": os.getpid(),
            "endpoint_id": snapshot.endpoint_id,
            "url": snapshot.url,
            "host": None if host is None else attrs.asdict(host),
            "token": lease.token,
            "scope": store.scope,
            "arbiter": store.description,
            "descriptors": [[fd, *_identity(fd)] for fd in descriptors],
            # A command of a command: if the lease above is lost, so is this.
            "outer": store.inherited.path if isinstance(store, _InheritedStore) else None,
            "cards": [
                {
                    "local_gpu_id": card.reading.local_gpu_id,
                    "name": card.reading.name,
                    "uuid": card.reading.uuid,
                    # Of a share, no more than the share is the command's to give away.
                    "memory_total_mb": card.reading.memory_total_mb if share is None else share,
                }
                for card in cards
            ],
        }
        put(self.directory, os.path.basename(path), json.dumps(told))
        return path

    def give_to(self, user: str | int) -> None:
        """Let another user's process in: ``popen(…, user=…)``."""
        for path in (self.directory, *(entry.path for entry in os.scandir(self.directory))):
            shutil.chown(path, user)

    def keep(self, recipe: Recipe, lease: Lease, good_until: float) -> None:
        """
        Start the process that renews the lease until nobody has it any more, whatever becomes of ours.

        Raises:
            GPUPoolError: it did not start.
        """
        assert lease.ttl is not None
        put(self.directory, GOOD_UNTIL, repr(good_until))
        here = "/"
        with contextlib.suppress(OSError):  # removed, while we are in it
            here = os.getcwd()
        to_keep = ToKeep(self.directory, here, recipe, lease.id, lease.ttl, good_until)
        try:
            told = pickle.dumps(to_keep)
        except Exception as exc:
            raise GPUPoolError(
                "the lease of this command must be renewed by a process of its own, which cannot be told how to reach "
                f"the arbiter ({type(exc).__name__}); give lease_store= as a URL"
            ) from None
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
        # In a session of its own, and away from the directory we are in: neither Ctrl-C nor a module that lies there
        # may meet it. What is secret goes by the pipe.
        process = subprocess.Popen(
            [sys.executable, "-m", "gpupool_sync._keep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            env={**environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        with process:
            try:
                # It leaves a child behind that does the work, and ends, when it is ready: nobody need wait for that
                # child later.
                _, errors = process.communicate(told, timeout=START_TIME)
            except subprocess.TimeoutExpired:
                process.kill()
                errors = b"it took too long"
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no reason was given"]
            raise GPUPoolError(f"the process that renews the lease of this command did not start: {last[0][:300]}")
        self.kept = True

    def lose(self, why: str) -> None:
        """The lease is lost: the commands' processes find out when they look."""
        with contextlib.suppress(OSError):
            put(self.directory, LOST, why)

    def let_go(self) -> None:
        """Our process has the lease no more; commands that run still do."""
        self._lock.close()

    def end(self) -> None:
        """The lease is over, for everybody. Idempotent."""
        fd = self._lock.fd
        if fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may have a copy of the descriptor
            shutil.rmtree(self.directory, ignore_errors=True)
            self._lock.close()


def _local_directory() -> str:
    """Where temporary files are, unless other machines see them too: locks may not hold there."""
    path = tempfile.gettempdir()
    looked_at = _opened(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=None)
    return "/tmp" if _file_system(looked_at.fd) in NETWORK_FILE_SYSTEMS else path  # noqa: S108 - mkdtemp


def _sweep(parent: str) -> None:
    """Remove what processes left behind that were killed while they had a command."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(parent)):
            if not entry.name.startswith(_PREFIX):
                continue
            with contextlib.suppress(OSError):
                lock = _opened(entry.path, _OPEN_DIRECTORY, dir_fd=None)
                if os.fstat(lock.fd).st_uid == os.geteuid() and _take(lock, fcntl.LOCK_EX):
                    shutil.rmtree(entry.path, ignore_errors=True)
                lock.close()


def put(directory: str, name: str, text: str) -> None:
    """Write a small file at once: who reads it sees the old text or the new one."""
    path = os.path.join(directory, name)
    # Readable for the user to whom `give_to` opens the directory; nobody else gets that far.
    new = f"{path}.{os.getpid()}-{threading.get_ident()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    os.replace(new, path)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


#: Of this process.
_bequests: weakref.WeakSet[Bequest] = weakref.WeakSet()
#: Set on a thread that starts a command just now.
_starting = threading.local()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Around the start of a command: what it is to inherit must not be closed in the fork that becomes it."""
    _starting.now = True
    try:
        yield
    finally:
        _starting.now = False


# -- in a command --------------------------------------------------------------------------------------------------


class Inherited:
    """
    The lease that this process was started on.

    Raises:
        LeaseLost: it is gone, or what was told of it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.directory = os.path.dirname(path)
        self._lock: _Descriptor | None = None
        try:
            self._lock = _opened(self.directory, _OPEN_DIRECTORY, dir_fd=None)
            with open(path) as file:
                told = json.load(file)
            self._read(told)
        except FileNotFoundError:
            raise LeaseLost(f"{_whose()} is over; {_ADVICE}") from None
        except (OSError, ValueError, TypeError, KeyError) as exc:
            raise LeaseLost(f"{_whose()} cannot be found out ({VARIABLE}={path}: {exc}); {_ADVICE}") from exc

    def _read(self, told: Mapping[str, Any]) -> None:
        host = told["host"]
        self.endpoint_id = str(told["endpoint_id"])
        self.url = str(told["url"])
        self.host = None if host is None else HostIdentity(**host)
        self.token = int(told["token"])
        self.scope = cast(Scope, str(told["scope"]))
        self.pid = int(told["pid"])
        self.arbiter = str(told["arbiter"])
        # Readings are left out: nothing that they could say speaks against a card that is ours already.
        self.readings = tuple(GPUReading(**card) for card in told["cards"])
        self._descriptors = [(int(fd), (int(device), int(inode))) for fd, device, inode in told["descriptors"]]
        self._outer = Inherited(told["outer"]) if told["outer"] else None

    @property
    def names(self) -> str:
        """The cards, for people."""
        return ", ".join(f"{self.endpoint_id}:{reading.local_gpu_id}" for reading in self.readings)

    def descriptors(self) -> tuple[int, ...]:
        """Those that really came with the command; a process further down may have closed them, or use the numbers."""
        found = []
        for fd, identity in self._descriptors:
            with contextlib.suppress(OSError):
                if _identity(fd) == identity:
                    found.append(fd)
        outer = () if self._outer is None else self._outer.descriptors()
        return tuple(dict.fromkeys([*found, *outer]))

    def why_gone(self) -> str | None:
        """Why the lease does not hold any more; None: it does, as far as is known. Looks at local files only."""
        lost = self._look(LOST)
        if lost is not None:
            return lost
        end = self._look(GOOD_UNTIL)
        if end is not None and boottime() >= float(end):
            return "its arbiter did not confirm it in time"
        if not self._locked():
            return "the command that was started on it has ended, and the process that started it has let it go"
        return None if self._outer is None else self._outer.why_gone()

    def _locked(self) -> bool:
        """Whether anybody has the lease: a lock of our own, for an instant, is refused then."""
        assert self._lock is not None
        if not _take(self._lock, fcntl.LOCK_SH):
            return True
        fcntl.flock(self._lock.fd, fcntl.LOCK_UN)
        return False

    def _look(self, name: str) -> str | None:
        assert self._lock is not None
        with contextlib.suppress(OSError):  # not there; or no descriptor to be had, which says nothing of the lease
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._lock.fd)
            with os.fdopen(fd) as file:
                return file.read()
        return None

    def check(self) -> None:
        """
        Go on only while the lease holds.

        Raises:
            LeaseLost: it does not.
        """
        why = self.why_gone()
        if why is not None:
            raise LeaseLost(f"{_whose(self)} is gone: {why}; {_ADVICE}")

    def advice(self) -> str:
        """Why there is nothing else here, for who asks for it."""
        return (
            f"this process runs on the lease of process {self.pid} (gpu.run or gpu.popen), so there is only "
            f"{self.names} here; ask for more in that process, or unset {VARIABLE} where this one starts"
        )

    def store(self) -> HostStore:
        """Who arbitrates the cards among the processes of the command; one for this process."""
        known = _stores.get(self.path)
        return known or _stores.setdefault(self.path, _InheritedStore(self))

    # An endpoint's `Source`:

    def await_turn(self, deadline: Deadline) -> None:
        """Nobody is asked."""

    def fetch(self, deadline: Deadline) -> Sample:
        """What the process above knew of the cards; always as of now, since it does not change."""
        return Sample(self.readings, boottime(), host=self.host)

    def abort(self) -> None:
        """Nothing is under way for longer than a moment."""

    def close(self) -> None:
        """Others of this process use it too."""

    def forget_after_fork(self) -> None:
        """A forked child is as much on the lease as we are."""

    @property
    def description(self) -> str:
        """For people."""
        return f"inherited from process {self.pid}"


class _InheritedStore(HostStore):
    """The cards of an inherited lease, one holder at a time, among the processes that inherited it."""

    def __init__(self, inherited: Inherited) -> None:
        super().__init__(os.path.join(inherited.directory, _LOCKS))
        self.inherited = inherited
        self.scope: Scope = inherited.scope
        self.description = f"{inherited.arbiter}, {inherited.description}"

    def claim(self, claim: Claim) -> Outcome:
        if self.inherited.why_gone() is not None:
            raise LeaseStoreError(f"{self.description}: the inherited lease is gone")
        outcome = super().claim(claim)
        if not isinstance(outcome, Granted):
            return outcome
        # To the world it is one lease: our own tokens would be larger than those of whoever has the card afterwards.
        return Granted(attrs.evolve(outcome.lease, token=self.inherited.token))

    def why_gone(self, lease_id: str) -> str | None:
        return self.inherited.why_gone() or super().why_gone(lease_id)

    def descriptors(self, lease_id: str) -> Sequence[int]:
        # For a command of a command: it is on the lease above, too.
        return (*super().descriptors(lease_id), *self.inherited.descriptors())


_ADVICE = f"acquire a GPU again in the process above, or unset {VARIABLE} to ask for one here"


def _whose(lease: Inherited | None = None) -> str:
    if lease is None:
        return "this process was started on the lease of another one (gpu.run or gpu.popen), and that lease"
    return f"the lease on {lease.names}, which this process has from process {lease.pid} (gpu.run or gpu.popen),"


# By the value of `VARIABLE`. Single dict operations only, which are atomic.
_known: dict[str, Inherited] = {}
_stores: dict[str, HostStore] = {}


def inherited(environ: Mapping[str, str] = os.environ) -> Inherited | None:
    """
    The lease that this process was started on; None: it was not.

    Raises:
        LeaseLost: it was, and the lease is gone.
    """
    path = environ.get(VARIABLE)
    if not path:
        return None
    lease = _known.get(path) or _known.setdefault(path, Inherited(path))
    lease.check()
    return lease


def _after_fork_in_child() -> None:
    for store in _stores.values():
        store.forget_after_fork()
    if not getattr(_starting, "now", False):
        # Or the lease would seem to be in use as long as we live, though we have forgotten it.
        for bequest in list(_bequests):
            bequest.let_go()


os.register_at_fork(after_in_child=_after_fork_in_child)
