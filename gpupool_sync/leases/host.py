"""The arbiter of one host: kernel locks in one directory for all of its users.

One file per card.  ``flock(LOCK_EX)`` on it is the lease of the whole card; the kernel frees it when the last process
that has the descriptor ends, whatever ended it, in whatever pid namespace.  A share of a card is ``LOCK_SH`` on the
card's file and ``LOCK_EX`` on a file of the share's own.  So no pid, no clock and no ttl is judged, and whatever else
stands in the directory (records, tickets, sockets) may be lost, stale or wrong without two holders on one card.

A ticket is a small file whose name has its place in the queue and whose content names the cards and the datagram
socket of its process; it lives while that socket accepts.  Everybody reads the tickets before taking a card, so the
order of service needs no server and no lock that a stopped process could keep.

Not for network file systems, whose locks may be local or missing: they are refused by name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import select
import socket
import stat
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import attrs

from gpupool_sync.clock import boottime
from gpupool_sync.errors import ConfigError, LeaseLost, LeaseStoreError
from gpupool_sync.leases.base import (
    Claim,
    Granted,
    Hint,
    Holder,
    Lease,
    LeaseInfo,
    Outcome,
    Queued,
    Refused,
    Scope,
    Share,
    TicketInfo,
    Wanted,
)
from gpupool_sync.leases.documents import BadDocument, digest, holder_document, read_share
from gpupool_sync.leases.mounts import mount_of, why_private
from gpupool_sync.leases.shared import CLOSED, Gone, Subscribers, is_open, user_name
from gpupool_sync.leases.tickets import ANSWER_TIME, MAX_FORWARD, TicketQueue
from gpupool_sync.models import Reason
from gpupool_sync.wire import clean_text

try:
    import fcntl
except ImportError as exc:  # pragma: no cover - not POSIX
    raise ConfigError("lease_store='host:' needs the file locks of Linux or macOS; 'memory:' needs nothing") from exc

#: Where the locks are, unless the default is wanted. It must be the same for all users of the machine.
VARIABLE = "GPU_POOL_LOCK_DIR"
#: File systems whose locks may not hold between machines, or at all.
NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs2", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2"}
    | {"orangefs", "smb3", "smbfs", "virtiofs", "wekafs"}
    | {f"fuse.{name}" for name in ("ceph", "davfs2", "gcsfuse", "glusterfs", "juicefs", "rclone", "s3fs", "sshfs")}
)
#: Records are padded to this many bytes, so that a file system that fills up later still takes the next one.
RECORD_BYTES = 1024
#: So many bytes at the beginning of a record surely say whether it is one of a lease that is held.
PEEK_BYTES = 256
#: Bytes after the record where anybody can say that its lease is revoked: what the holder writes does not undo it.
MARK_BYTES = 512
#: Bytes that it takes to note for whom a card is, at most.
PROMISE_BYTES = 160
#: Seconds that what a record said is believed when only ranking depends on it.
RECORD_TIME = 0.25
#: Seconds to wait for the guard of a shared card; it is held for microseconds, but its holder may be stopped.
GUARD_TIME = 0.2
#: Seconds that a server's word for a remote holder is believed at most: the longest ttl, and the server's downtime.
MAX_REMOTE = 600.0
#: Bytes of a ticket that are read at first, and up to which what its body says is remembered.
SHORT_BODY = 4096
#: Bytes of a ticket's body that surely have the name of its socket, which comes first.
SOCKET_BYTES = 64
#: Bytes of a ticket that are read at most.
LONGEST_BODY = 1 << 22
#: Bytes of a hint: the ticket's name, the instant, and the card that it is about, if it fits.
LONGEST_MESSAGE = 1024
#: Explanations name at most so many cards.
MAX_REASONS = 64
#: Files of cards, and of tickets, that are kept open to be read again: a waiter mostly looks at the same few.
MOST_OPEN = 64
#: Tickets that are gone and were read before, whose files are still open, while others wait.
MOST_STALE = 8
#: Nanoseconds after the last change of the queue's directory from which on the next one surely bears another time: file
#: systems count in ticks of some milliseconds.
SETTLED = 100_000_000
#: Seconds after which a process looks again for what dead ones have left in the queue; as old is all that is removed.
TIDY_TIME = 60.0
#: So many names it looks at then.
TIDY_MOST = 64
#: Seconds for which tickets that were seen say that somebody waits.
CROWDED_TIME = 0.1

_QUEUE = "queue"
_PLACE_OFFSET = 1e9  # seconds
_HELD = b'"released_at":null'  # in the record of a lease that was not given back
_ENDED = re.compile(
    rb'\{"v":1,"boot":"([!#-\[\]-~]*)","token":(\d+),"released_at":(\d+(?:\.\d+)?),'
    rb'(?:"for":\["(ticket-[0-9a-f-]+)",[0-9.]+\],)?'
    rb'"share":null,"since":[0-9.]+,'
)
# In the record of one that was: the ticket that is next, and when it was told. Quotes inside of strings are escaped.
_PROMISED = re.compile(rb'"released_at":[0-9.e+-]+,"for":\["(ticket-[0-9a-f-]+)",(\d+\.\d+)\]')
# What comes of reading what anybody may have written.
_GARBLED = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError),
    BadDocument,
)
_STAMPS = 64  # bytes at the head of a ticket: hinted at, spoke at
_SOCKET = re.compile(rb"(sock-[0-9a-f]{16})\n")
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
# O_NONBLOCK: should somebody put a fifo there, opening it to read must not wait for a writer.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def default_directory(environ: Mapping[str, str] = os.environ) -> str:
    """
    The directory that all users of this machine share.

    `GPU_POOL_LOCK_DIR`, else ``gpupool_sync`` in the system's lock directory where everybody may write there, else in
    ``/tmp``: never `TMPDIR`, which differs between users.
    """
    given = environ.get(VARIABLE)
    if given:
        if not os.path.isabs(given):
            raise ConfigError(f"{VARIABLE}={given!r}: an absolute path is allowed")
        return given
    for parent in ("/run/lock", "/var/lock"):
        with contextlib.suppress(OSError):
            found = os.stat(parent)
            if stat.S_ISDIR(found.st_mode) and found.st_mode & 0o1002 == 0o1002:
                return f"{parent}/gpupool_sync"
    return "/tmp/gpupool_sync"  # noqa: S108 - shared on purpose; opened as `_Directory` says


def boot_id() -> str:
    """Of this boot: times of `clock.boottime` mean something only together with it."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return "unknown"


#: Makes an object that owns a descriptor and closes it when it is freed, in C. They are made for the descriptors of
#: event queues, but look at nothing but the number.
_own: Callable[[int], Any] = getattr(select, "epoll" if hasattr(select, "epoll") else "kqueue").fromfd


#: Let others that are ready run first; not everywhere is that possible.
_step_back: Callable[[], object] = getattr(os, "sched_yield", lambda: None)


class _Descriptor:
    """
    An open file that is closed when the last reference goes: an interrupt between two lines cannot leak it.

    No ``__del__``: that is Python code, in which an interrupt can fall and is swallowed, and the lock would stay.
    ``io.FileIO`` closes in C too, but warns.
    """

    __slots__ = ("_owner", "fd")

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        #: The number; -1 once it is closed.
        self.fd: int = owner.fileno()

    def close(self) -> None:
        self.fd = -1  # first: an interrupt after the other line would leave the number of another file
        self._owner.close()

    def unlock(self) -> None:
        """
        Let go of the lock, and close.

        Closing alone is not enough: a child that another thread forked meanwhile has the same lock through its copy,
        and keeps it for as long as it lives.
        """
        with contextlib.suppress(OSError, ValueError):  # closed before
            fcntl.flock(self._owner.fileno(), fcntl.LOCK_UN)
        self.close()


def _opened(name: str, flags: int, *, dir_fd: int | None) -> _Descriptor:
    """`os.open`, with nothing between the call and its owner: an interrupt there would lose the number."""
    opening = partial(os.open, mode=0o666, dir_fd=dir_fd)
    # Two maps are one step in C; `_own(os.open(…))` would be two, and Python looks for interrupts after each.
    return _Descriptor(next(map(_own, map(opening, (name,), (flags,)))))


class _Directory:
    """The lock directory, opened once; every name in it is looked up relative to the descriptor."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._owner = self._open(path, None)
        self.fd = self._owner.fd
        self._check()
        self._queue_owner = self._open(_QUEUE, self.fd)
        self.queue_fd = self._queue_owner.fd
        self._identity, self._queue_identity = _identity(os.fstat(self.fd)), _identity(os.fstat(self.queue_fd))
        self._has_proc = os.path.isdir(f"/proc/self/fd/{self.fd}")

    def _open(self, name: str, dir_fd: int | None) -> _Descriptor:
        left = 20
        while True:
            try:
                self._make(name, dir_fd)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                return _opened(name, flags, dir_fd=dir_fd)
            except OSError as exc:
                left -= 1
                if not isinstance(exc, PermissionError) or not left:
                    raise LeaseStoreError(_unusable(self.path, exc)) from exc
            time.sleep(0.001)  # made this instant by another user, whose fchmod is still to come

    @property
    def id(self) -> str:
        """Of the directory itself, the same by whatever path and in whatever container it is seen, until a reboot."""
        return "{}:{}".format(*self._identity)

    def is_there(self) -> bool:
        """Whether the path still leads to it: in a deleted directory, or one that was moved away, we are alone."""
        try:
            return self._is_at(self._identity, self.path, None)
        except OSError:
            return True  # not known; what is done with the descriptor says what is wrong

    def is_whole(self) -> bool:
        """Whether it is there, with its queue."""
        try:
            return self.is_there() and self._is_at(self._queue_identity, _QUEUE, self.fd)
        except OSError:
            return True

    @staticmethod
    def _is_at(identity: tuple[int, int], name: str, dir_fd: int | None) -> bool:
        try:
            found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            return found.st_ino == identity[1] and found.st_dev == identity[0]
        except (FileNotFoundError, NotADirectoryError):
            return False

    @staticmethod
    def _make(name: str, dir_fd: int | None) -> None:
        try:
            os.mkdir(name, 0o1777, dir_fd=dir_fd)
        except FileExistsError:
            return
        # The umask took bits away. chmod by name could follow a symlink that somebody put there since.
        made = _opened(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        os.fchmod(made.fd, 0o1777)
        made.close()

    def _check(self) -> None:
        found = os.fstat(self.fd)
        if found.st_mode & 0o0002 and not found.st_mode & stat.S_ISVTX:
            raise LeaseStoreError(
                f"the lock directory {self.path} is not safe: everybody may delete the locks of everybody; "
                f"chmod +t {self.path}"
            )
        kind = _file_system(self.fd)
        if kind in NETWORK_FILE_SYSTEMS:
            raise LeaseStoreError(
                f"the lock directory {self.path} is on a network file system ({kind}), whose locks may not hold; "
                f"set {VARIABLE} to a local directory"
            )

    def open_shared_file(self, name: str, dir_fd: int) -> tuple[_Descriptor, bool]:
        """A file that every user may lock and write, made if need be; and whether it was made now."""
        for _ in range(20):
            # Without O_CREAT where it exists: fs.protected_regular refuses O_CREAT on other users' files.
            try:
                file = _opened(name, _OPEN, dir_fd=dir_fd)
                if not stat.S_ISREG(os.fstat(file.fd).st_mode):
                    raise LeaseStoreError(f"{name} in the lock directory is not a regular file; somebody put it there")
                return file, False
            except FileNotFoundError:
                pass
            except PermissionError:
                time.sleep(0.001)  # made this instant by another user, whose fchmod is still to come
                continue
            with contextlib.suppress(FileExistsError):
                return self.make_shared_file(name, dir_fd), True
        raise LeaseStoreError(f"{self.path}/{name} cannot be opened by this user; the directory must be shared by all")

    @staticmethod
    def make_shared_file(name: str, dir_fd: int) -> _Descriptor:
        """A new file that every user may lock and write."""
        made = _opened(name, _OPEN | os.O_CREAT | os.O_EXCL, dir_fd=dir_fd)
        os.fchmod(made.fd, 0o666)
        return made

    def names(self, dir_fd: int) -> list[str]:
        """
        What is in the directory now.

        By a descriptor of its own: all who list one descriptor, threads and forked children, move one position, and
        each would miss the names that another has just read.
        """
        if self._has_proc:
            # Opened anew and closed in C. It may be gone all the same, as after a chroot.
            with contextlib.suppress(FileNotFoundError):
                return os.listdir(f"/proc/self/fd/{dir_fd}")
        own = _opened(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
        return os.listdir(own.fd)

    def socket_path(self, name: str) -> str:
        """Where a socket of the queue is: by descriptor, as long paths do not fit into a socket's address."""
        if self._has_proc:
            return f"/proc/self/fd/{self.queue_fd}/{name}"
        return os.path.join(self.path, _QUEUE, name)

    def is_current(self, file: _Descriptor, name: str, dir_fd: int) -> bool:
        """Whether the name still leads to the open file: the lock on a deleted file is nobody's lock."""
        return self._is_at(_identity(os.fstat(file.fd)), name, dir_fd)

    def is_whole_file(self, file: _Descriptor, name: str) -> bool | None:
        """`is_current` for a card's file, with whether there is a record in it; None: it is not current."""
        found = os.fstat(file.fd)
        return found.st_size >= RECORD_BYTES if self._is_at(_identity(found), name, self.fd) else None


class _Readers:
    """
    Files of one directory that stay open to be read: most of a look is opening and closing the same few.

    Never locked through these descriptors.  A file that was deleted is opened anew by its name within `RECORD_TIME`.
    """

    def __init__(self) -> None:
        # By name: the file, and until when (`time.monotonic`) it is believed to be there. Single operations only, which
        # are atomic; whoever reads holds the descriptor, which is closed with its last reference.
        self._files: dict[str, tuple[_Descriptor, float]] = {}

    def read(self, name: str, size: int, dir_fd: int) -> bytes:
        """
        The first *size* bytes of the file.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        known = self._files.get(name)
        if known is not None:
            file, until = known
            now = time.monotonic()
            if now >= until and os.fstat(file.fd).st_nlink:
                self._files[name] = known = file, now + RECORD_TIME
            if now < known[1]:
                return os.pread(file.fd, size, 0)
            self.forget(name)
        file = _opened(name, _READ, dir_fd=dir_fd)
        data = os.pread(file.fd, size, 0)
        if len(self._files) < MOST_OPEN:
            self._files[name] = file, time.monotonic() + RECORD_TIME
        return data

    def peek(self, names: Iterable[str], size: int) -> list[bytes]:
        """`read`, of those files that are open and believed to be there; nothing of the others."""
        now, files, found = time.monotonic(), self._files, []
        for name in names:
            known = files.get(name)
            try:
                found.append(b"" if known is None or now >= known[1] else os.pread(known[0].fd, size, 0))
            except OSError:
                found.append(b"")
        return found

    def forget(self, name: str) -> None:
        """The file is not needed any more."""
        self._files.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all but these."""
        for name in [name for name in list(self._files) if name not in names]:
            self.forget(name)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _file_system(fd: int) -> str | None:
    """The name of the file system that the open file is on; None if that cannot be found out."""
    mount = mount_of(fd)
    return None if mount is None else mount.kind


def _unusable(path: str, exc: OSError) -> str:
    why = {
        errno.EROFS: "is on a read-only file system",
        errno.ENOSPC: "is on a file system that is full",
        errno.EDQUOT: "is over its quota",
        errno.ELOOP: "is a symbolic link, which is not followed",
        errno.ENOTDIR: "is not a directory",
        errno.ENOENT: "cannot be made, the directory above it is missing",
    }.get(exc.errno or 0, f"cannot be used: {exc.strerror}")
    return f"the lock directory {path} {why}; {VARIABLE} names another one (the same for all users)"


@lru_cache(maxsize=65536)
def _file_name(key: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}", key):
        return f"gpu-{key}"
    return f"gpu-by-url-{hashlib.sha256(key.encode()).hexdigest()[:40]}"


@lru_cache(maxsize=64)
def _wanted_files(groups: tuple[tuple[Wanted, ...], ...]) -> tuple[Sequence[Wanted], Sequence[str]]:
    """All cards of *groups*, and the names of their files; a process asks for the same ones again and again."""
    wanted = [wanted for group in groups for wanted in group]
    return wanted, [_file_name(each.key) for each in wanted]


def _take(file: _Descriptor, how: int) -> bool:
    try:
        fcntl.flock(file.fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Held:
    """A lease of this process with the descriptors that are its locks."""

    __slots__ = ("ended", "files", "guard", "lease", "names", "written")

    def __init__(
        self, lease: Lease, files: list[_Descriptor], names: list[str], ended: Sequence[float | None] = ()
    ) -> None:
        # Guards the descriptors of `files`: two threads that release one lease must not both use them. One of them
        # would unlock, or write into, whatever file got the same number in between. Held for a few short calls.
        self.guard = threading.Lock()
        self.lease = lease
        self.files = files
        self.names = names
        #: What stands in each file, if the lease's record as it was granted.
        self.written: list[bytes] = []
        #: Of each file: from when on readings show nothing of the holder before this one; None: there was none.
        self.ended = ended


class _Ticket:
    """A ticket of this process."""

    __slots__ = ("body", "claim", "file", "first_place", "name", "place")

    def __init__(self, claim: Claim, name: str, place: float, file: _Descriptor) -> None:
        self.claim = claim
        self.name = name
        self.first_place = self.place = place
        self.file = file
        self.body = b""


class _Glance:
    """What one operation has seen of cards, by their records."""

    __slots__ = ("_names", "free", "own", "promised")

    def __init__(self, names: Sequence[str] = (), own: str = "") -> None:
        self._names = names  # of the tickets, sorted
        #: The ticket of whoever looks.
        self.own = own
        #: Card key, and whether a share of it is asked for -> whether it would do.
        self.free: dict[tuple[str, bool], bool] = {}
        #: Card key -> the ticket of somebody else that it is promised to.
        self.promised: dict[str, str] = {}

    def has(self, ticket: str) -> bool:
        """Whether there is such a ticket."""
        at = bisect_left(self._names, ticket)
        return at < len(self._names) and self._names[at] == ticket


#: Descriptors that a forked child inherited: they stay open, so that a card stays taken while a child may compute.
_inherited: list[object] = []


class HostStore:
    """
    A `LeaseStore` for all processes and users of one host that use the same lock directory.

    Raises:
        LeaseStoreError: the directory cannot be used; the message says why and what to do.
    """

    scope: Scope
    needs_listener = True

    def __init__(self, directory: str | None = None, *, clock: Callable[[], float] = boottime) -> None:
        self._clock = clock
        self._path = directory or default_directory()
        self.description = f"host:{self._path}"
        self._directory = _Directory(self._path)
        #: Directories that were deleted under us. Some thread may still use their descriptors, whose numbers must not
        #: come to mean something else in the middle of that.
        self._former: deque[_Directory] = deque(maxlen=16)
        #: Why only a part of this machine sees the directory, such as a container; None: all of it does.
        self.private = why_private(self._directory.fd, self._path)
        self.scope = "host" if self.private is None else "container"
        self._boot = boot_id()
        self._boot_json = f'"boot":{json.dumps(self._boot)}'
        self._boot_mark = self._boot_json.encode()
        self._user = user_name()
        self._fresh_state()

    def _fresh_state(self) -> None:
        # Guards the dictionaries below: lookups and changes only. Files are opened, locked and written outside; what
        # two threads do to one lease id at the same time is settled when the result is entered here.
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}  # by lease id
        self._remote: dict[str, float] = {}  # lease id -> until when its holder, on another machine, is believed
        self._mine: dict[str, str] = {}  # card key -> a lease id of this process
        self._tickets: dict[str, _Ticket] = {}  # by claim id
        self._ticket_ids: dict[str, str] = {}  # ticket name -> claim id
        self._gone = Gone()
        self._listing: tuple[float, frozenset[str]] = (float("-inf"), frozenset())
        self._checked: dict[str, float] = {}  # card key -> when the kernel was asked whether its holder lives
        self._records: dict[str, tuple[float, dict[str, Any] | None, bytes]] = {}  # card key -> read at, record, raw
        self._card_files = _Readers()
        self._ticket_files = _Readers()
        self._told: dict[str, _Told] = {}  # ticket name -> what it says
        self._offers: dict[str, tuple[str, float]] = {}  # claim id -> card that it was told of, and when
        self._saw_waiting = float("-inf")  # when tickets were seen
        # When it was read (`time.time_ns`), the directory's last change at that time, and the names of tickets.
        self._queue_listing: tuple[int, int, list[str]] = (0, -1, [])
        self._tidied_at = time.monotonic()
        self._closed: dict[str, float] = {}  # card key -> since when, as last read
        self._hints = Subscribers()
        self._socket: socket.socket | None = None
        self._new_socket: socket.socket | None = None  # while it is made
        self._socket_name = ""
        self._sender: socket.socket | None = None  # of hints; whoever sends looks here each time
        # Released when there is a socket, for whoever listens before that. No `Event`: whoever leaves a ticket sets it,
        # and Ctrl-C there could leave the lock of its `Condition` taken.
        self._made_socket = threading.Lock()
        self._made_socket.acquire()

    # -- claiming ----------------------------------------------------------------------------------------------

    def claim(self, claim: Claim) -> Outcome:
        try:
            return self._claim(claim)
        except OSError as exc:
            raise LeaseStoreError(_unusable(self._path, exc)) from exc

    def _claim(self, claim: Claim) -> Outcome:
        self._renew_directory()
        with self._lock:
            held = self._held.get(claim.id)
            if held is not None:
                lease = held.lease
                if (lease.holder, len(lease.cards), lease.share) != (claim.holder, claim.count, claim.share):
                    raise LeaseStoreError(f"{self.description}: this lease id is in use with another request")
                if (by := _revoked_by(held)) is not None:
                    raise LeaseLost(f"this lease was revoked by {by}")
                if (why := self._missing(held)) is not None:
                    raise LeaseLost(f"this lease is gone: {why}")
                return Granted(lease)
            if claim.id in self._gone:
                raise LeaseLost("this lease was released or withdrawn before")
            ticket = self._tickets.get(claim.id)
            if ticket is not None and (ticket.claim.holder, ticket.claim.count, ticket.claim.share) != (
                claim.holder,
                claim.count,
                claim.share,
            ):
                raise LeaseStoreError(f"{self.description}: this ticket id is in use with another request")
        unqueued: tuple[Any, ...] | None = None  # not the error itself: it has this frame, see `errors.unpin`
        names: Sequence[str] = ()
        opened = self._reopen(claim.emptied)
        granted = self._take_offer(claim)
        if granted is None and not (claim.queue and (ticket is not None or self.crowded())):
            names = self._ticket_names()
            if not (names and claim.queue):
                granted = self._try(claim, names)
        if granted is None and claim.queue:
            # The ticket first, then the look: a card that is released between the two finds the ticket.
            try:
                self._leave_ticket(claim)
                names = self._ticket_names()
            except OSError as exc:  # such as a full file system
                self._drop_ticket(claim.id)
                unqueued = exc.args
                names = self._ticket_names()  # those who could leave theirs are served first
            granted = self._try(claim, names)
        if granted is None:
            if unqueued is not None:
                raise OSError(*unqueued)
            self._pass_on_opened(opened)
            return Queued(self._position(claim.id, names)) if claim.queue else Refused(self._reasons(claim))
        self._enter(claim, granted)
        ticket = self._tickets.get(claim.id)
        if ticket is not None:  # or it has stood in nobody's way
            self._drop_ticket(claim.id)
            # Also for a card that was kept for it: a second one may have been, at the same time, or somebody was held
            # back for it at another one.
            self._pass_on(taken_by=claim, its_ticket=ticket.name)
        self._pass_on_opened(opened)
        return Granted(granted.lease)

    def _renew_directory(self) -> None:
        """
        If the directory was deleted or replaced, go on in the one that is there now, which is made if need be.

        Leases that are held in the former are not taken over: others may have the cards by now. `why_gone` says so.
        """
        former = self._directory
        if former.is_whole():
            return
        fresh = _Directory(self._path)
        with self._lock:
            if self._directory is not former:
                return  # another thread was here
            self._former.append(former)
            self._directory = fresh
            sock, self._socket = self._socket, None
            # Whoever waits claims again within a second, and then leaves its ticket here. The files of the former ones
            # are not closed: a thread may be writing to one.
            self._tickets = {}
            self._ticket_ids = {}
            self._listing = (float("-inf"), frozenset())
            self._queue_listing = (0, -1, [])
            self._records.clear()
            self._checked.clear()
            self._card_files, self._ticket_files = _Readers(), _Readers()
            self._told = {}
            self._offers = {}
        if sock is not None:
            sock.close()

    def _enter(self, claim: Claim, granted: _Held) -> None:
        with self._lock:
            if claim.id in self._gone:  # released while we were at it
                late = True
            else:
                late = False
                self._held[claim.id] = granted
                for key in granted.lease.cards:
                    self._mine[key] = claim.id
                    self._records.pop(key, None)  # what was read before is over
                    self._closed.pop(key, None)
        if late:
            self._free(granted)
            raise LeaseLost("this lease was released while it was being granted")

    def _take_offer(self, claim: Claim) -> _Held | None:
        """
        Take the card that the ticket of *claim* was told of a moment ago.

        Whoever told it has looked at the queue for that; a second look by the one whose turn it is would find the same.
        """
        key, told_at = self._offers.pop(claim.id, ("", 0.0))
        if not key or claim.count != 1 or claim.share is not None:
            return None
        if not 0.0 <= self._clock() - told_at < ANSWER_TIME:
            return None  # by now it may be somebody else's turn
        offered = [wanted for group in claim.groups for wanted in group if wanted.key == key][:1]
        return self._lock_some(claim, offered, offered)

    def _try(self, claim: Claim, names: Sequence[str]) -> _Held | None:
        """Take the cards that the order of the queue, which are the tickets of *names*, allows."""
        if not names:
            for group in claim.groups:
                granted = self._lock_some(claim, group, group)
                if granted is not None:
                    return granted
            return None
        now = self._clock()
        own = self._tickets.get(claim.id)
        glance = _Glance(names, "" if own is None else own.name)
        fits = partial(self._fits_by_record, glance, claim.emptied)
        everything, _ = _wanted_files(claim.groups)
        perhaps: Sequence[Wanted] = everything
        if claim.share is None:
            perhaps = self._perhaps_free(claim, glance)
            if perhaps or claim.count > 1:
                glance.free = dict.fromkeys([(wanted.key, False) for wanted in everything], False)
                for wanted in perhaps:
                    glance.free.pop((wanted.key, False), None)
        while True:
            mine = {wanted.key for wanted in perhaps if fits(wanted, claim.share, ())}
            picked: Sequence[str] | None = None
            # The tickets are read when there is something to share out; where all cards are held, claims end before.
            if len(mine) >= claim.count:
                queue = self._load_queue(claim, names, glance, contested=mine if claim.share is None else None)
                picked, hinted = queue.choose(claim, now, fits)
                dead = self._tell(queue, hinted, now)
                if dead:
                    names = [name for name in names if name not in dead]
                    continue
            if picked is None:
                if claim.count > 1 and self._find_ended(claim, glance):
                    perhaps = everything
                    continue
                if claim.share is not None and self._find_ended_shares(claim, fits):
                    continue
                break
            cards = [wanted for group in claim.groups for wanted in group if wanted.key in picked]
            granted = self._lock_some(claim, cards, cards)
            if granted is not None:
                return granted
            # The records were behind. Each round rules one card out, so this ends.
            for wanted in cards:
                glance.free[wanted.key, False] = glance.free[wanted.key, True] = False
        return self._take_over(claim, names, glance, now)

    def _find_ended(self, claim: Claim, glance: _Glance) -> bool:
        """
        Set the records of dead holders right; whether there were any.

        For a claim of several cards: `_take_over` finds those of the dead only, and one beside free ones never.
        """
        found = False
        for key in {wanted.key for group in claim.groups for wanted in group}:
            looked = key, claim.share is not None
            record = None if glance.free.get(looked, True) or key in self._mine else self._record(key, fresh=True)
            if record is None or record.get("released_at") is not None:
                continue
            if self._ended_without_a_word(key, record):
                del glance.free[looked]  # looked at again
                found = True
        return found

    def _find_ended_shares(self, claim: Claim, fits: Callable[..., bool]) -> bool:
        """
        Remove the files of dead sharers, which would count for ever where nobody but sharers comes; whether there were.

        One that died before its record was written, on a full file system say, left no other trace than its file.
        """
        found = False
        for key in {wanted.key for group in claim.groups for wanted in group if not fits(wanted, claim.share, ())}:
            name = _file_name(key)
            checked = self._checked.get(f"{name}.share-")
            if (checked is not None and self._clock() - checked < RECORD_TIME) or not self._shares_by_record(key):
                continue
            self._checked[f"{name}.share-"] = self._clock()
            with contextlib.suppress(OSError, LeaseStoreError):
                guard, _ = self._directory.open_shared_file(f"{name}.guard", self._directory.fd)
                try:
                    # Whoever has the guard is counting them just now.
                    if _take(guard, fcntl.LOCK_EX):
                        before = len(self._shares_by_record(key))
                        found |= len(self._live_shares(name)) < before
                finally:
                    guard.unlock()
        return found

    def _take_over(self, claim: Claim, names: Sequence[str], glance: _Glance, now: float) -> _Held | None:
        """Cards whose record says held though the kernel says free: their holder died without a word."""
        shared = claim.share is not None
        # Who has a ticket looks again within a second, so each card is asked for only now and then; a claim without
        # one asks in any case, as it may be the only one.
        recent = now - RECORD_TIME if claim.queue else float("inf")
        for group in claim.groups:
            left: list[Wanted] = []
            for wanted in group:
                key = wanted.key
                if self._checked.get(key, float("-inf")) > recent:
                    continue
                if not (glance.free.get((key, shared), False) or key in glance.promised):
                    self._checked[key] = now
                    left.append(wanted)
            granted = self._lock_some(claim, left, group)
            if granted is None:
                continue
            ours = frozenset(granted.lease.cards)
            queue = self._load_queue(claim, names, glance)
            picked, hinted = queue.choose(claim, now, partial(_among, ours))
            if picked is not None:
                return granted
            # Found, but somebody has waited longer: give it back as free, and tell them.
            self._free(granted, unused=True)
            self._tell(queue, hinted, now)
        return None

    def _lock_some(self, claim: Claim, order: Sequence[Wanted], group: Sequence[Wanted]) -> _Held | None:
        """Lock `count` of the cards, all or nothing."""
        if len(order) < claim.count:
            return None
        files: list[_Descriptor] = []
        try:
            return self._lock_into(files, claim, order)
        except BaseException:
            # Or they stay locked for as long as somebody keeps the exception, whose traceback has our frames.
            for file in files:
                file.unlock()
            raise

    def _lock_into(self, files: list[_Descriptor], claim: Claim, order: Sequence[Wanted]) -> _Held | None:
        names: list[str] = []
        keys: list[str] = []
        records: list[dict[str, Any] | None] = []
        full: tuple[Any, ...] | None = None  # not the error itself: it has this frame, see `errors.unpin`
        for wanted in order:
            if len(keys) == claim.count:
                break
            if wanted.key in self._mine and self._is_ours(wanted.key, claim.share):
                continue
            try:
                locked = (
                    self._lock_card(wanted.key) if claim.share is None else self._lock_share(wanted, claim.share, claim)
                )
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                full = exc.args
                continue  # a card that was held before has its record already
            if locked is None:
                continue
            raw = os.pread(locked[0][0].fd, RECORD_BYTES, 0)
            record = _ended(raw) or _parse(raw)
            if claim.share is None and (
                self._spoken_for(record, locked[0][1], claim.id)
                or self._is_closed(wanted.key, record, claim.emptied)
                or self._left_in_use(wanted.key, record, claim.busy, locked[0][0])
            ):
                locked[0][0].unlock()
                continue
            for file, name in locked:
                files.append(file)
                names.append(name)
            keys.append(wanted.key)
            records.append(record)
        if len(keys) < claim.count:
            if full is not None:
                raise OSError(*full)
            for file in files:
                file.unlock()
            return None
        now = self._clock()
        before = max(map(_token_of, records), default=0)
        lease = Lease(
            id=claim.id,
            holder=claim.holder,
            cards=tuple(keys),
            token=max(before + 1, int(time.time() * 1000)),
            share=claim.share,
            note=claim.note,
            granted_at=now,
        )
        held = _Held(lease, files, names, [self._ended_at(record) for record in records])
        for file, name in zip(files, names, strict=True):
            held.written.append(self._write_held(file, lease, name))
        return held

    def _is_ours(self, key: str, share: Share | None) -> bool:
        """
        Whether a lease of this process keeps *share* (None: all) of the card from being granted.

        The kernel says so too, unless somebody has deleted the lock's file: here at least nobody gets a card twice.
        """
        with self._lock:
            held = self._held.get(self._mine.get(key, ""))
        if held is None:
            return False
        return share is None or held.lease.share is None or self._missing(held) is not None

    def _lock_card(self, key: str) -> list[tuple[_Descriptor, str]] | None:
        name = _file_name(key)
        for _ in range(10):
            file, _ = self._directory.open_shared_file(name, self._directory.fd)
            if not _take(file, fcntl.LOCK_EX):
                file.close()
                return None
            try:
                whole = self._directory.is_whole_file(file, name)
                if whole is not None:
                    if not whole:
                        os.pwrite(file.fd, b" " * RECORD_BYTES, 0)  # there is room for the record, or we know now
                    return [(file, name)]
            except BaseException:
                file.unlock()  # as in `_lock_some`
                raise
            file.unlock()
        return None

    def _lock_share(self, wanted: Wanted, share: Share, claim: Claim | Lease) -> list[tuple[_Descriptor, str]] | None:
        """``LOCK_SH`` on the card and ``LOCK_EX`` on a file of the share's own, counted under a short guard."""
        name = _file_name(wanted.key)
        guard, _ = self._directory.open_shared_file(f"{name}.guard", self._directory.fd)
        try:
            end = time.monotonic() + GUARD_TIME
            while not _take(guard, fcntl.LOCK_EX):
                if time.monotonic() >= end:
                    return None  # its holder may be stopped: no share now, but no hang either
                time.sleep(0.0005)
            card, _ = self._directory.open_shared_file(name, self._directory.fd)
            if not _take(card, fcntl.LOCK_SH) or not self._directory.is_current(card, name, self._directory.fd):
                card.unlock()
                return None
            own = f"{name}.share-{digest(claim.id)}"
            record = _read(card)
            whole = record is not None and record.get("share") is None
            emptied = claim.emptied if isinstance(claim, Claim) else {}
            busy = claim.busy if isinstance(claim, Claim) else {}
            live = self._live_shares(name, own)
            if (
                (whole and self._spoken_for(record, name, claim.id))
                or self._is_closed(wanted.key, record, emptied)
                or (not live and self._left_in_use(wanted.key, record, busy))
                or not _fits(live, share, wanted.room_mb)
            ):
                card.unlock()
                return None
            locked = [card]
            try:
                file, _ = self._directory.open_shared_file(own, self._directory.fd)
                locked.append(file)
                if not _take(file, fcntl.LOCK_EX):
                    card.unlock()
                    return None
                self._write(file, {"share": {"memory_mb": share.memory_mb, "places": share.places}})
            except BaseException:
                if len(locked) > 1:  # it has no record yet, and would count as a share of unknown size
                    with contextlib.suppress(OSError):
                        os.unlink(own, dir_fd=self._directory.fd)
                for each in locked:  # as in `_lock_some`
                    each.unlock()
                raise
            return [(card, name), (file, own)]
        finally:
            guard.unlock()

    def _live_shares(self, name: str, own: str | None = None) -> list[dict[str, Any]]:
        """The records of the card's shares that are held (but for *own*); files of dead ones are removed."""
        found: list[dict[str, Any]] = []
        for other in self._directory.names(self._directory.fd):
            if not other.startswith(f"{name}.share-"):
                continue
            with contextlib.suppress(OSError):
                file = _opened(other, _OPEN, dir_fd=self._directory.fd)
                record = _read(file) or {}
                if not _take(file, fcntl.LOCK_EX):
                    found.append(record.get("share") or {})
                    continue
                if other != own and self._unexpired(record):
                    found.append(record.get("share") or {})
                else:
                    os.unlink(other, dir_fd=self._directory.fd)
                file.unlock()
        return found

    def _unexpired(self, record: Mapping[str, Any]) -> bool:
        until = record.get("remote_until")
        return (
            isinstance(until, (int, float))
            and record.get("boot") == self._boot
            and record.get("released_at") is None
            and 0.0 < until - self._clock() <= MAX_REMOTE
        )

    def _spoken_for(self, record: Mapping[str, Any] | None, name: str, claim_id: str) -> bool:
        """Whether a server that is down holds the card for somebody elsewhere, although the kernel says free."""
        if record is None or record.get("released_at") is not None:
            return False
        if record.get("share") is None:
            return self._unexpired(record) and record.get("remote") != digest(claim_id)
        # The card's file has the record of one of its shares only.
        return bool(self._live_shares(name))

    def _is_closed(self, key: str, record: Mapping[str, Any] | None, emptied: Mapping[str, float]) -> bool:
        """Whether the last lease of the whole card ended without being given back, and its job may still run."""
        closed_at = self._closed_at(record)
        now = self._clock()
        # An instant to come is garbled, as no record of this boot is from the future.
        if closed_at is None or closed_at > now or is_open(closed_at, None, now):
            self._closed.pop(key, None)
            return False
        self._closed[key] = closed_at
        return not is_open(closed_at, emptied.get(key), now)

    def _left_in_use(
        self,
        key: str,
        record: Mapping[str, Any] | None,
        busy: Mapping[str, float],
        file: _Descriptor | None = None,
    ) -> bool:
        """
        Whether a reading from after the card's last lease speaks against it: what that left behind may compute there.

        A record that still says "held" is of a holder that died, as the lock is free; it is set right in its *file*, so
        that everybody's readings count again.
        """
        age, ended = busy.get(key), self._ended_at(record)
        if age is None or record is None or ended is None or self._clock() - age < ended:
            return False
        if file is not None and record.get("released_at") is None:
            self._write(file, {**record, "released_at": ended})
            self._records.pop(key, None)
        return True

    def _ended_at(self, record: Mapping[str, Any] | None) -> float | None:
        """Of the record of a card whose lock is free: from when on readings are none of its holder's job."""
        if record is None or record.get("boot") != self._boot:
            return None
        released = record.get("released_at")
        # Of one that died nobody knows when: then those since its grant count.
        ended = record.get("since") if released is None else released
        return float(ended) if isinstance(ended, (int, float)) else None

    def _reopen(self, emptied: Mapping[str, float]) -> list[str]:
        """
        Open the closed cards that were seen empty, for everybody; returns them.

        For everybody, not for this claim alone: an older ticket is counted as served by such a card, and whoever has
        it may not have seen the card since, or never will.
        """
        opened: list[str] = []
        for key, ago in emptied.items():
            if not self._opens(self._record(key, fresh=True), ago):
                continue
            with contextlib.suppress(OSError, LeaseStoreError):
                locked = self._lock_card(key)
                if locked is None:
                    continue  # somebody holds it, or looks at it: then the claim's own `emptied` has to do
                file = locked[0][0]
                try:
                    record = _read(file)
                    if record is not None and self._opens(record, ago):
                        released = record.get("released_at")
                        ended = {"released_at": record.get("since") if released is None else released}
                        self._write(file, {**record, **ended, "closed_at": None})
                        opened.append(key)
                finally:
                    file.unlock()
                self._closed.pop(key, None)
                self._records.pop(key, None)
        return opened

    def _opens(self, record: Mapping[str, Any] | None, emptied: float) -> bool:
        """Whether the card is closed, and opens by having been seen empty so many seconds ago."""
        closed_at = self._closed_at(record)
        now = self._clock()
        return closed_at is not None and closed_at <= now and is_open(closed_at, emptied, now)

    def _pass_on_opened(self, opened: Sequence[str]) -> None:
        """`_pass_on` of cards that a claim has opened, as far as it did not take them."""
        if opened:
            glance = _Glance(self._ticket_names())
            left = [key for key in opened if self._free_by_record(glance, key, {}, shared=False)]
            if left:
                self._pass_on(left)

    def _closed_at(self, record: Mapping[str, Any] | None) -> float | None:
        if record is None or record.get("share") is not None or record.get("boot") != self._boot:
            return None
        # A server that was down when a ttl ended could not write that it did.
        told = record.get("closed_at" if record.get("released_at") is not None else "remote_until")
        return float(told) if isinstance(told, (int, float)) else None

    def _reasons(self, claim: Claim) -> dict[str, Reason]:
        reasons: dict[str, Reason] = {}
        for wanted in (wanted for group in claim.groups for wanted in group):
            if len(reasons) >= MAX_REASONS:
                break
            if self._is_closed(wanted.key, self._record(wanted.key, fresh=True), claim.emptied):
                reasons[wanted.key] = CLOSED
                continue
            holders = self.holders_of(wanted.key)
            if holders and (claim.share is None or holders[0].share is None):
                reasons[wanted.key] = Reason("held", f"held by {holders[0].holder}")
            elif not holders and wanted.key in claim.busy:
                reasons[wanted.key] = Reason("in-use", "its last holder is gone, and a reading speaks against it")
            elif claim.share is not None:
                reasons[wanted.key] = Reason("no-room", "no room is left for the share")
            else:
                reasons[wanted.key] = Reason("queue", "kept for somebody who has waited longer")
        return reasons

    # -- records -----------------------------------------------------------------------------------------------

    def _record_of(self, lease: Lease, name: str, released_at: float | None) -> dict[str, Any]:
        share = lease.share
        # In this order, see `_ended`; `_write_held` writes the same.
        return {
            "v": 1,
            "boot": self._boot,
            "token": lease.token,
            "released_at": released_at,
            "share": None if share is None else {"memory_mb": share.memory_mb, "places": share.places},
            "since": lease.granted_at,
            "cards": len(lease.cards),
            "note": _text_or_none(lease.note),
            "key": next((key for key in lease.cards if _file_name(key) == name.partition(".share-")[0]), None),
            "holder": holder_document(lease.holder),
            **({} if lease.id not in self._remote else self._remote_of(lease.id)),
        }

    def _remote_of(self, lease_id: str) -> dict[str, Any]:
        return {"remote_until": self._remote[lease_id], "remote": digest(lease_id)}

    def _write(self, file: _Descriptor, record: Mapping[str, Any]) -> bytes:
        """Returns what it wrote."""
        data = _encode(record).encode()
        if len(data) >= RECORD_BYTES:  # a long URL as key, a long name: what informs most stays
            data = _encode({**record, "note": None, "key": None, "holder": {}}).encode()
        os.pwrite(file.fd, _padded(data), 0)
        return data

    def _write_held(self, file: _Descriptor, lease: Lease, name: str) -> bytes:
        """The record of a lease that begins; returns what it wrote."""
        if len(lease.cards) == 1 and lease.share is None and lease.note is None and lease.id not in self._remote:
            data = (
                f'{{"v":1,{self._boot_json},"token":{lease.token},"released_at":null,"share":null,'
                f'"since":{lease.granted_at!r},"cards":1,"note":null,'
                f'"key":{_key_json(lease.cards[0])},"holder":{_holder_json(lease.holder)}}}'
            ).encode()
            if len(data) < RECORD_BYTES:
                os.pwrite(file.fd, _padded(data), 0)
                return data
        return self._write(file, self._record_of(lease, name, released_at=None))

    def _record(self, key: str, *, fresh: bool, raw: bytes | None = None) -> dict[str, Any] | None:
        """What the card's file says, which is *raw* if it was read just now; None if nothing, or none of this boot."""
        now = self._clock()
        known = self._records.get(key)
        if known is not None and not fresh and now - known[0] < RECORD_TIME:
            return known[1]
        if not fresh and key not in self._mine and _file_name(key) not in self._files(now):
            return None  # nobody ever held it: true of most cards of a large fleet, and cheaper than to ask for each
        if raw is None:
            raw = self._raw_record(key)
        if known is not None and raw == known[2]:
            record = known[1]
        else:
            record = _ended(raw) or _parse(raw)
            if record is not None and record.get("boot") != self._boot:
                record = None
        self._records[key] = (now, record, raw)
        return record

    def _raw_record(self, key: str) -> bytes:
        try:
            return self._card_files.read(_file_name(key), RECORD_BYTES, self._directory.fd)
        except OSError:
            return b""

    def _says_held(self, raw: bytes) -> bool:
        """
        Whether the record plainly says that somebody holds the card; False leaves that to who reads all of it.

        Mostly it does, and at once: nothing else in a record looks like this, as quotes inside of strings are escaped.
        """
        return _HELD in raw and self._boot_mark in raw

    def _perhaps_free(self, claim: Claim, glance: _Glance) -> list[Wanted]:
        """
        The cards that *claim* wants, whole, less those of which a first look at their records tells the contrary.

        They say that the card is held, or kept for another ticket. Mostly all do, and then a turn costs little else.
        """
        mark, promised = self._boot_mark, self._is_promised
        wanted, names = _wanted_files(claim.groups)
        return [
            each
            for each, raw in zip(wanted, self._card_files.peek(names, PEEK_BYTES), strict=True)
            if not (mark in raw and (_HELD in raw or promised(glance, each.key, raw)))
        ]

    def _fits_by_record(
        self,
        glance: _Glance,
        emptied: Mapping[str, float],
        wanted: Wanted,
        share: Share | None,
        pending: Sequence[Share | None],
    ) -> bool:
        """Whether the card would do, as far as files say without a lock."""
        # A card with room for a share is not free for who wants all of it: one look asks for both.
        which = wanted.key, share is not None
        free = glance.free.get(which)
        if free is None:
            free = self._free_by_record(glance, wanted.key, emptied, shared=share is not None)
            glance.free[which] = free
        if not free or share is None:
            return free and not pending
        if None in pending:
            return False
        others = [{"memory_mb": each.memory_mb, "places": each.places} for each in pending if each is not None]
        return _fits([*self._shares_by_record(wanted.key), *others], share, wanted.room_mb)

    def _shares_by_record(self, key: str) -> list[dict[str, Any]]:
        prefix = f"{_file_name(key)}.share-"
        found: list[dict[str, Any]] = []
        for name in self._directory.names(self._directory.fd):
            if name.startswith(prefix):
                with contextlib.suppress(OSError):
                    file = _opened(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory.fd)
                    found.append((_read(file) or {}).get("share") or {})
        return found

    def _files(self, now: float) -> frozenset[str]:
        """The names in the directory, at most `RECORD_TIME` old."""
        read_at, names = self._listing
        if now - read_at >= RECORD_TIME:
            names = frozenset(self._names())
            self._listing = now, names
        return names

    def _free_by_record(self, glance: _Glance, key: str, emptied: Mapping[str, float], *, shared: bool) -> bool:
        raw = self._raw_record(key)
        if (not shared and self._says_held(raw)) or self._is_promised(glance, key, raw):
            return False
        record = self._record(key, fresh=True, raw=raw)
        if record is None or record.get("released_at") is not None:
            return key not in self._mine and not self._is_closed(key, record, emptied)
        return shared and record.get("share") is not None

    def _is_promised(self, glance: _Glance, key: str, raw: bytes) -> bool:
        """
        Whether the card's last holder has told somebody else's ticket of it, who is about to take it.

        Without a look at the queue, which would find the same.
        """
        found = _PROMISED.search(raw)
        if found is None or self._boot_mark not in raw:
            return False
        ticket = found[1].decode()
        if ticket == glance.own or not glance.has(ticket) or not 0.0 <= self._clock() - float(found[2]) < ANSWER_TIME:
            return False
        glance.promised[key] = ticket
        return True

    # -- giving back -------------------------------------------------------------------------------------------

    def release(self, ids: Iterable[str]) -> None:
        try:
            self._release(ids)
        except OSError as exc:
            raise LeaseStoreError(_unusable(self._path, exc)) from exc

    def expire(self, ids: Iterable[str]) -> None:
        """End leases of `claim_until` that were not renewed; their cards are closed for a while."""
        try:
            self._release(ids, given_back=False)
        except OSError as exc:
            raise LeaseStoreError(_unusable(self._path, exc)) from exc

    def _release(self, ids: Iterable[str], *, given_back: bool = True) -> None:
        freed: list[str] = []
        shared = waited = False
        for lease_id in ids:
            with self._lock:
                self._gone.add(lease_id)
                held = self._held.get(lease_id)
            if held is not None:
                # Freed first and forgotten afterwards: repeated after an interrupt, both happen again.
                now = self._clock()
                ticket = None
                # Whatever is wrong with the queue, it must not keep the card.
                with contextlib.suppress(OSError):
                    ticket = self._next_for(held, now) if given_back else None
                promised = self._free(held, given_back=given_back, promise=ticket)
                shared = shared or held.lease.share is not None
                with self._lock:
                    self._held.pop(lease_id, None)
                    self._remote.pop(lease_id, None)
                    for key in held.lease.cards:
                        if self._mine.get(key) == lease_id:
                            del self._mine[key]
                # Told last: another thread of ours may claim it at once, and must not find it ours.
                if ticket is None or not promised or not self._tell_one(ticket, held.lease.cards[0], now):
                    freed += held.lease.cards
                else:
                    # With more processes than processors, who has the card now should run before what we do next.
                    _step_back()
            if lease_id in self._tickets:
                self._drop_ticket(lease_id)
                waited = True
        if freed or waited:
            self._pass_on(freed, plainly=not (shared or waited))

    withdraw = release

    def _next_for(self, held: _Held, now: float) -> str | None:
        """
        The ticket whose turn it is for the card of *held*, a lease that is about to be given back.

        Before that, so that the record can say whom the card is for: whoever else looks at it need not read the queue.
        None where that is not plain, or nobody waits yet: then who comes in between is seen afterwards.
        """
        if held.lease.share is not None or len(held.lease.cards) > 1:
            return None
        for name in self._ticket_names():
            loaded = self._load_ticket(name)
            if loaded is None:
                continue
            what, hinted_at = loaded[0].what, loaded[1]
            if not what.is_plain or (hinted_at is not None and now - hinted_at >= ANSWER_TIME):
                return None
            if hinted_at is None and held.lease.cards[0] in what.keys:
                return name
        return None

    def _free(self, held: _Held, *, given_back: bool = True, unused: bool = False, promise: str | None = None) -> bool:
        """Let go of the cards; whether the record says that the card is for the ticket *promise*."""
        promised = False
        now = self._clock()
        # Who lets go because the lease was revoked, or is void, may have left something on the card.
        missing = self._missing(held) is not None
        given_back = given_back and not missing and _revoked_by(held) is None
        with held.guard:
            for index, (file, name) in enumerate(zip(held.files, held.names, strict=True)):
                if file.fd < 0:
                    continue
                # Nothing that goes wrong with a record may keep the card.
                with contextlib.suppress(OSError, MemoryError):
                    if unused and held.lease.share is None and held.ended[index] is not None:
                        self._write(file, self._record_of(held.lease, name, released_at=held.ended[index]))
                    elif given_back and held.written and held.lease.share is None:
                        # The same but for this; quotes inside of strings are escaped, so nothing else looks like it.
                        ended = f'"released_at":{now!r}'
                        if promise is not None and len(held.written[index]) < RECORD_BYTES - PROMISE_BYTES:
                            ended += f',"for":["{promise}",{now:.6f}]'
                            promised = True
                        os.pwrite(file.fd, _padded(held.written[index].replace(_HELD, ended.encode(), 1)), 0)
                    elif held.lease.share is None:
                        record = self._record_of(held.lease, name, released_at=now)
                        if not given_back:
                            # Readings since the grant go on counting against the card.
                            record |= {"released_at": held.lease.granted_at, "closed_at": now}
                        self._write(file, record)
                    elif ".share-" in name:
                        os.unlink(name, dir_fd=self._directory.fd)
                # For all: a forked child has the same lock through its copy of the descriptor.
                file.unlock()
        for key in held.lease.cards:
            if held.lease.share is not None:
                self._note_last_share(key, held.lease, now)
            elif missing:
                self._close_anew(key, held.lease, now)
            if not given_back and held.lease.share is None:
                self._closed[key] = now  # for `_pass_on` too
            self._records.pop(key, None)
        return promised

    def _close_anew(self, key: str, lease: Lease, now: float) -> None:
        """Close the card in a new file, as nobody reads the deleted one; unless somebody has held it meanwhile."""
        with contextlib.suppress(OSError, LeaseStoreError):
            self._renew_directory()
            locked = self._lock_card(key)
            if locked is not None:
                file, name = locked[0]
                try:
                    if _read(file) is None:
                        ended = {"released_at": lease.granted_at, "closed_at": now}
                        self._write(file, self._record_of(lease, name, released_at=now) | ended)
                finally:
                    file.unlock()

    def _note_last_share(self, key: str, lease: Lease, now: float) -> None:
        """Write the release of the last share: whoever gets the whole lock finds nobody on the card."""
        with contextlib.suppress(OSError, LeaseStoreError):
            locked = self._lock_card(key)
            if locked is not None:
                file, name = locked[0]
                try:
                    if not self._live_shares(name):
                        self._write(file, self._record_of(lease, name, released_at=now))
                finally:
                    file.unlock()

    # -- taking away -------------------------------------------------------------------------------------------

    def revoke(self, key: str, token: int, by: str) -> bool:
        """
        As the contract says, by a mark beside the record: the lock itself nobody can take from its process.

        Any user of the machine can write the mark, as any can write the record; nothing is granted on account of it.
        """
        try:
            return self._revoke(key, token, by)
        except OSError as exc:
            raise LeaseStoreError(_unusable(self._path, exc)) from exc

    def _revoke(self, key: str, token: int, by: str) -> bool:
        card = _file_name(key)
        mark = json.dumps({"token": token, "by": by[:100]}).encode()[: MARK_BYTES - 1]
        for name in [card, *(other for other in self._names() if other.startswith(f"{card}.share-"))]:
            with contextlib.suppress(FileNotFoundError):
                file = _opened(name, _OPEN, dir_fd=self._directory.fd)
                record = _read(file)
                if record is None or record.get("token") != token or record.get("boot") != self._boot:
                    continue
                # Of a shared card, each share's own file counts.
                if (record.get("share") is not None) == (name != card) and self._alive(file):
                    os.pwrite(file.fd, mark.ljust(MARK_BYTES - 1) + b"\n", RECORD_BYTES)
                    return True
        return False

    def why_gone(self, lease_id: str) -> str | None:
        held = self._held.get(lease_id)
        if held is None:
            return None
        if (by := _revoked_by(held)) is not None:
            return f"it was revoked by {by}"
        return self._missing(held)

    def _missing(self, held: _Held) -> str | None:
        """What the lease hangs on that is not there any more: who claims the card now, locks another file."""
        directory = self._directory
        if not directory.is_there():
            return f"the lock directory {self._path} was deleted or replaced"
        try:
            with held.guard:
                for file, name in zip(held.files, held.names, strict=True):
                    if file.fd >= 0 and not directory.is_current(file, name, directory.fd):
                        return f"its lock file {self._path}/{name} was deleted or replaced"
        except OSError:
            return None  # what cannot be looked at is not said to be gone
        return None

    def closed(self) -> Mapping[str, float]:
        if not self._closed:
            return {}
        now = self._clock()
        with self._lock:
            for key in [key for key, at in self._closed.items() if is_open(at, None, now)]:
                del self._closed[key]
            return dict(self._closed)

    # -- for holders on other machines ---------------------------------------------------------------------------

    def claim_until(self, claim: Claim, until: float) -> Outcome:
        """
        `claim`, by the host's server on behalf of somebody elsewhere.

        Should the server die, the card stays closed until *until* (on `clock`): its holder may still compute.
        """
        self._remote[claim.id] = until
        outcome: Outcome | None = None
        try:
            outcome = self.claim(claim)
        finally:
            if not isinstance(outcome, Granted):
                self._remote.pop(claim.id, None)
        return outcome

    def extend(self, lease_id: str, until: float) -> None:
        """Move the end of a lease of `claim_until`."""
        with self._lock:
            held = self._held.get(lease_id)
            if held is None:
                return
            self._remote[lease_id] = until
        with held.guard:
            held.written = []
            for file, name in zip(held.files, held.names, strict=True):
                # The record informs and covers the server's death; the lease itself is the kernel's lock.
                with contextlib.suppress(OSError):
                    if file.fd >= 0:
                        self._write(file, self._record_of(held.lease, name, released_at=None))

    @property
    def path(self) -> str:
        """Of the lock directory."""
        return self._path

    @property
    def directory_id(self) -> str:
        """Of the lock directory itself: two processes of one machine exclude each other if theirs are the same."""
        return self._directory.id

    def drop_ticket(self, claim_id: str) -> bool:
        """
        Leave the queue without ending the id: a later claim of it is served.

        Returns:
            Whether there was such a ticket.  Then `pass_on` tells those who stood behind it: once for all that are
            dropped, as it reads the queue.
        """
        there = claim_id in self._tickets
        self._drop_ticket(claim_id)
        return there

    def pass_on(self) -> None:
        """Tell whoever is next for what is free, after tickets were dropped."""
        self._pass_on()

    def retake(self, lease: Lease, rooms: Sequence[float | None], until: float) -> bool:
        """After the server's restart: lock the cards of *lease* again; False if it was released, or one is taken."""
        self._remote[lease.id] = until
        files: list[_Descriptor] = []
        names: list[str] = []
        for key, room in zip(lease.cards, rooms, strict=True):
            if lease.share is None:
                locked = self._lock_card(key)
                # The record is newer than what the server remembers.
                if locked and not self._is_of(_read(locked[0][0]), lease):
                    locked[0][0].unlock()
                    locked = None
            else:
                locked = None
                own = f"{_file_name(key)}.share-{digest(lease.id)}"
                with contextlib.suppress(FileNotFoundError):
                    os.stat(own, dir_fd=self._directory.fd)
                    locked = self._lock_share(Wanted(key, room), lease.share, lease)
            if locked is None:
                self._remote.pop(lease.id, None)
                for file in files:
                    file.unlock()
                return False
            for file, name in locked:
                files.append(file)
                names.append(name)
        for file, name in zip(files, names, strict=True):
            self._write(file, self._record_of(lease, name, released_at=None))
        with self._lock:
            self._held[lease.id] = _Held(lease, files, names)
            for key in lease.cards:
                self._mine[key] = lease.id
        return True

    @staticmethod
    def _is_of(record: Mapping[str, Any] | None, lease: Lease) -> bool:
        return (
            record is not None
            and record.get("released_at") is None
            and record.get("token") == lease.token
            and record.get("remote") == digest(lease.id)
        )

    def renew(self, ids: Sequence[str]) -> Mapping[str, bool]:
        # The kernel keeps these leases as long as their process lives: nothing to renew, only to look up.
        with self._lock:
            known = {lease_id: lease_id in self._held for lease_id in ids}
        return {lease_id: there and self.why_gone(lease_id) is None for lease_id, there in known.items()}

    # -- the queue ---------------------------------------------------------------------------------------------

    def _leave_ticket(self, claim: Claim) -> None:
        """Write or rewrite the ticket of *claim*."""
        self._need_socket()
        now = self._clock()
        ticket = self._tickets.get(claim.id)
        place = now - claim.waited
        if ticket is None:
            name = _ticket_name(place, f"{time.monotonic_ns():020d}-{os.urandom(6).hex()}")
            file = self._directory.make_shared_file(name, self._directory.queue_fd)
            ticket = _Ticket(claim, name, place, file)
            # The dictionaries first, so that whatever happens next `withdraw` removes the file.
            self._ticket_ids[name] = claim.id
            self._tickets[claim.id] = ticket
        else:
            place = max(ticket.first_place - MAX_FORWARD, min(ticket.place, place))
            if ticket.place - place > 0.001:
                ticket.place = place
                self._rename_ticket(ticket, _ticket_name(place, ticket.name.split("-", 2)[2]))
        ticket.claim = claim
        body = _body_of(claim, self._socket_name)
        # Speaking clears the hint.
        stamps = _stamps(None, now)
        if not ticket.body:
            ticket.body = body
            os.pwrite(ticket.file.fd, stamps + body, 0)
            return
        if body != ticket.body:
            os.pwrite(ticket.file.fd, body, _STAMPS)
            os.ftruncate(ticket.file.fd, _STAMPS + len(body))
            ticket.body = body
        os.pwrite(ticket.file.fd, stamps, 0)

    def _position(self, claim_id: str, names: Sequence[str]) -> int:
        """How many of the tickets stand before that of the claim."""
        ticket = self._tickets.get(claim_id)
        return 0 if ticket is None else bisect_left(names, ticket.name)

    def _rename_ticket(self, ticket: _Ticket, name: str) -> None:
        self._ticket_ids[name] = ticket.claim.id
        with contextlib.suppress(FileNotFoundError):
            os.rename(ticket.name, name, src_dir_fd=self._directory.queue_fd, dst_dir_fd=self._directory.queue_fd)
        self._ticket_ids.pop(ticket.name, None)
        ticket.name = name

    def _ticket_names(self) -> list[str]:
        changed_at = os.fstat(self._directory.queue_fd).st_mtime_ns
        known_at, known_change, names = self._queue_listing
        if changed_at != known_change or known_at - changed_at < SETTLED:
            # Timed before the listing, so that whatever comes after it bears another time.
            known_at = time.time_ns()
            found = self._directory.names(self._directory.queue_fd)
            found.sort()
            names = found[bisect_left(found, "ticket-") : bisect_left(found, "ticket.")]  # all that begin like this
            self._queue_listing = known_at, changed_at, names
            if time.monotonic() - self._tidied_at >= TIDY_TIME:
                self._tidied_at = time.monotonic()
                self._tidy(found)
        if names:
            self._saw_waiting = self._clock()
        if len(self._told) > len(names) + (MOST_STALE if names else 0):
            there = frozenset(names)
            self._ticket_files.keep_only(there)
            for name in [name for name in list(self._told) if name not in there]:
                self._told.pop(name, None)
        return names

    def _tidy(self, found: Sequence[str]) -> None:
        """
        Remove what killed processes have left in the queue, and nobody comes upon.

        Sockets that no ticket names, tickets that were never written, and those that another user's process has found
        dead but must not remove.
        """
        start = int.from_bytes(os.urandom(4), "big") % max(1, len(found))
        for name in [*found[start:], *found[:start]][:TIDY_MOST]:
            with contextlib.suppress(OSError):
                if name in self._ticket_ids or name == self._socket_name:
                    continue
                # By the wall clock, as the file's time is: set back, it only takes longer.
                there = os.stat(name, dir_fd=self._directory.queue_fd, follow_symlinks=False)
                if time.time() - there.st_mtime < TIDY_TIME:
                    continue
                if name.startswith("sock-"):
                    dead = stat.S_ISSOCK(there.st_mode) and not self._accepts(name)
                else:
                    dead = name.startswith("ticket-") and (not there.st_size or not self._has_owner(name))
                if dead:
                    os.unlink(name, dir_fd=self._directory.queue_fd)

    def _drop_ticket(self, claim_id: str) -> None:
        ticket = self._tickets.get(claim_id)
        if ticket is None:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(ticket.name, dir_fd=self._directory.queue_fd)
        ticket.file.close()
        self._offers.pop(claim_id, None)
        self._ticket_ids.pop(ticket.name, None)
        self._tickets.pop(claim_id, None)

    def _load_queue(
        self,
        claim: Claim | None,
        names: Sequence[str],
        glance: _Glance | None = None,
        contested: Collection[str] | None = None,
    ) -> TicketQueue:
        """
        The tickets of *names*, of whatever processes, as a queue; less those to which *glance* found a card promised.

        With *claim*, up to its own ticket, which has its id there: those behind it have no say in what it may take.
        With *contested*, the cards that are free of those that a claim for whole cards wants, only as far as there is
        something left of them: mostly the first ticket takes the only one.
        """
        queue = TicketQueue()
        served = () if glance is None else glance.promised.values()
        own = None if claim is None else self._tickets.get(claim.id)
        left = None if contested is None else len(contested)
        now = self._clock()
        for name in names:
            if left == 0 or (own is not None and name > own.name):
                break
            loaded = None if name in served else self._load_ticket(name)
            if loaded is None:
                continue
            told, hinted_at, spoke_at = loaded
            spoke_at = min(spoke_at, now)  # who says that it spoke in the future would hold cards back until then
            if claim is not None and self._ticket_ids.get(name) == claim.id:
                queue.load(claim, told.place, None, spoke_at)
            else:
                ticket = queue.load(told.claim, told.place, hinted_at, spoke_at)
                what = told.what
                if left and what.is_plain and ticket.ready(now) and what.keys.issuperset(contested or ()):
                    left -= 1
        if claim is not None and own is not None and claim.id not in queue:
            # Those before it were enough. Without its own place the claim would stand where its `waited` puts it.
            queue.load(claim, _place_of(own.name), None, now)
        return queue

    def _load_ticket(self, name: str) -> tuple[_Told, float | None, float] | None:
        """What the ticket says, when its owner was hinted at, if it has not answered, and when that spoke last."""
        try:
            data = self._ticket_files.read(name, SHORT_BODY, self._directory.queue_fd)
            if len(data) == SHORT_BODY:
                data = self._ticket_files.read(name, LONGEST_BODY, self._directory.queue_fd)
            body = data[_STAMPS:]
            told = self._told.get(name)
            if told is None or told.body != body:
                self._told[name] = told = _told_of(name, body)
            hinted, spoke = data[:_STAMPS].split()
            hinted_at = None if hinted == b"-" else float(hinted)
            # Who says that it will be told of a card would count as about to take it until then.
            if hinted_at is not None and not hinted_at < self._clock() + ANSWER_TIME:
                return None
            return told, hinted_at, float(spoke)
        except _GARBLED:
            return None  # gone, half written, or not ours: no reason to keep anybody from a card

    def _tell(self, queue: TicketQueue, names: Sequence[str], now: float) -> list[str]:
        """Hint to the owners of these tickets of the queue; returns the tickets whose owners are dead."""
        dead: list[str] = []
        for name in names:
            ticket = queue.get(name)
            if not self._tell_one(name, None if ticket is None else ticket.offered, now):
                dead.append(name)
        return dead

    def _tell_one(self, name: str, offered: str | None, now: float, *, noted: bool = True) -> bool:
        """
        Hint to the owner of a ticket that a card, *offered* if that is known, may be its; False: it is dead.

        *noted*: at the ticket, which is passed over if no answer comes.
        """
        body = b""
        # Before the message: what the owner answers clears the mark, never the other way round.
        try:
            file = _opened(name, _OPEN, dir_fd=self._directory.queue_fd)
            if noted:
                os.pwrite(file.fd, _hint_stamp(now), 0)
            body = os.pread(file.fd, SOCKET_BYTES, _STAMPS)
        except FileNotFoundError:
            return False  # it has left the queue meanwhile: now it is the next one's turn
        except OSError:  # says nothing about its owner, who looks again by itself
            pass
        mine = self._ticket_ids.get(name)
        if mine is not None:
            if offered is not None:
                self._offers[mine] = offered, now
            self._hints.tell([mine])
            return True
        if not body:
            return True
        sock = _socket_of(body)
        if sock is not None and self._send(sock, _message(name, offered, now)):
            return True
        for stale in (name, sock):
            with contextlib.suppress(OSError):
                if stale is not None:
                    os.unlink(stale, dir_fd=self._directory.queue_fd)
        return False

    def _has_owner(self, name: str) -> bool:
        """Whether somebody listens for the ticket's hints; true if that cannot be told."""
        try:
            file = _opened(name, _READ, dir_fd=self._directory.queue_fd)
            path = _socket_of(os.pread(file.fd, SOCKET_BYTES, _STAMPS))
        except OSError:
            return True  # it has left
        return path is None or self._accepts(path)

    def _accepts(self, path: str) -> bool:
        """Whether there is somebody behind the socket; true if that cannot be told."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            try:
                sender.connect(self._directory.socket_path(path))
            except (ConnectionRefusedError, FileNotFoundError):
                return False
            except OSError:
                return True
        return True

    def _send(self, sock: str, message: bytes) -> bool:
        """Whether there is still somebody behind the socket."""
        while True:
            sender = self._sender
            if sender is None:
                sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                sender.setblocking(False)
                self._keep_sender(sender)
            try:
                sender.sendto(message, self._directory.socket_path(sock))
            except (ConnectionRefusedError, FileNotFoundError):
                return False
            except OSError:
                if sender is not self._sender:
                    continue  # closed meanwhile
                return True  # full, because its process is stopped: it lives, and is passed over in a second
            return True

    def _keep_sender(self, sender: socket.socket | None) -> None:
        with self._lock:
            former, self._sender = self._sender, sender
        if former is not None:
            former.close()

    def _hand_on(
        self, cards: Collection[str], names: Sequence[str], *, fresh: bool, served: Collection[str] = ()
    ) -> bool:
        """
        `_pass_on`, for whole cards and a plain queue: to the first who want them and were not told of another one.

        *fresh*: nobody can have been told of *cards* yet; else who was told a moment ago is about to take one of them,
        unless its ticket is one of *served*.

        False: the queue is not that plain, and has to be read as a whole.
        """
        now = self._clock()
        left = list(cards)
        for name in names:
            if not left:
                break
            loaded = self._load_ticket(name)
            if loaded is None:
                continue
            what, hinted_at = loaded[0].what, loaded[1]
            if not what.is_plain:
                return False
            if hinted_at is not None and now - hinted_at >= ANSWER_TIME:
                return False  # what it was told of may still be free
            if hinted_at is not None and (fresh or name in served):
                continue  # it is about to take another one
            first = next((key for key in left if key in what.keys), None)
            # Which of them it is to be is not known if some are spoken for: it looks for itself.
            if first is not None and (hinted_at is not None or self._tell_one(name, first if fresh else None, now)):
                left.remove(first)
        return True

    def _ask_to_look(self, shut: Collection[str], names: Sequence[str]) -> None:
        """
        Tell whoever is next for cards that have just been closed, to look whether they are empty.

        That offers nothing, so it is not noted at the ticket: who was told of a card counts as about to take it, and
        another card that its ticket wants too would be offered to the next one.
        """
        now = self._clock()
        left = set(shut)
        for name in names:
            if not left:
                break
            loaded = self._load_ticket(name)
            if loaded is None or (loaded[1] is not None and now - loaded[1] >= ANSWER_TIME):
                continue
            wanted = loaded[0].what.keys
            if not left.isdisjoint(wanted) and self._tell_one(name, None, now, noted=False):
                left -= wanted

    def _pass_on(
        self,
        freed: Collection[str] = (),
        *,
        plainly: bool = False,
        taken_by: Claim | None = None,
        its_ticket: str = "",
    ) -> None:
        """
        Tell whoever is next for what is free now; after the grant to *taken_by* (a whole card), if any is left.

        *plainly*: nothing but *freed*, which are whole cards, can have become free.
        """
        # A ticket stands in nobody's way but at the cards that it wants. Mostly none of them is left, and a look at
        # these costs less than one at the queue.
        if taken_by is not None and taken_by.share is not None:
            taken_by = None
        if (
            taken_by is not None
            and self.crowded()
            and not self._left_of(taken_by, _Glance(self._queue_listing[2], its_ticket))
        ):
            return
        names = self._ticket_names()
        if not names:
            return
        shut = [key for key in freed if key in self._closed]
        if shut:
            self._ask_to_look(shut, names)
            freed = [key for key in freed if key not in shut]
        glance = _Glance(names)
        if taken_by is not None:
            left = self._left_of(taken_by, glance)
            if not left or self._hand_on(left, names, fresh=False, served=glance.promised.values()):
                return
        if plainly and self._hand_on(freed, names, fresh=True):
            return
        queue = self._load_queue(None, names)
        if not queue:
            return
        keys = set(freed)
        # Also what came free before and was not claimed yet: who was told of that card does not need this one.
        wanted = {key for ticket in queue for key in ticket.keys}
        files = set(self._directory.names(self._directory.fd)) if len(wanted) > 16 else None
        keys |= {
            key
            for key in wanted - keys
            if (files is None or _file_name(key) in files) and self._free_by_record(glance, key, {}, shared=False)
        }
        if not keys:
            return
        for name in glance.promised.values():
            queue.remove(name)  # about to take another one
        glance.free = {(key, shared): True for key in keys for shared in (False, True)}
        fits = partial(self._fits_by_record, glance, {})
        now = self._clock()
        while True:
            dead = self._tell(queue, queue.hints(keys, now, fits), now)
            if not dead:
                return
            for name in dead:
                queue.remove(name)

    def _left_of(self, claim: Claim, glance: _Glance) -> list[str]:
        perhaps = [wanted.key for wanted in self._perhaps_free(claim, glance)]
        return [key for key in perhaps if self._free_by_record(glance, key, {}, shared=False)]

    def _need_socket(self) -> None:
        if self.is_listening():
            return
        with self._lock:
            if self.is_listening():
                return
            name = f"sock-{os.urandom(8).hex()}"
            self._socket_name = name
            # Known before it accepts: a child forked in between must find it, or it would keep our tickets alive.
            self._new_socket = sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                sock.setblocking(False)
                sock.bind(self._directory.socket_path(name))
                os.chmod(name, 0o666, dir_fd=self._directory.queue_fd)  # noqa: S103 - other users must be able to hint
                self._socket = sock
            except BaseException:
                self._socket = None
                sock.close()
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory.queue_fd)
                raise
            self._new_socket = None
        with contextlib.suppress(RuntimeError):  # nobody has waited since the last one
            self._made_socket.release()

    # -- hints -------------------------------------------------------------------------------------------------

    def subscribe(self, hint: Hint) -> Callable[[], None]:
        return self._hints.add(hint, on_last=self.close)  # comes back by itself when somebody waits again

    def is_listening(self) -> bool:
        """Whether hints can come to `listen`: since somebody left a ticket."""
        return self._socket is not None

    def end_listening(self) -> None:
        """Make whoever is in `listen` look up: a message to ourselves."""
        # Without a descriptor left for a sender it looks up by itself within a second.
        with contextlib.suppress(OSError):
            if self.is_listening():
                self._send(self._socket_name, b" ")

    def listen(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        if self._socket is None:
            self._made_socket.acquire(timeout=timeout)
        sock = self._socket
        if sock is None:
            return
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            # Not `select`, which refuses numbers from 1024 on.
            poller = select.poll()
            poller.register(sock, select.POLLIN)
            if not poller.poll(max(0.0, end - time.monotonic()) * 1000.0):
                return
            for _ in range(256):
                name, told_at, key = _parse_message(sock.recv(LONGEST_MESSAGE))
                mine = self._ticket_ids.get(name)
                if mine is not None:
                    if key:
                        self._offers[mine] = key, told_at
                    self._hints.tell([mine])

    # -- looking -----------------------------------------------------------------------------------------------

    def crowded(self) -> bool:
        return self._clock() - self._saw_waiting < CROWDED_TIME

    def is_held(self, key: str) -> bool:
        if key in self._mine:
            return True
        record = self._record(key, fresh=False)
        if record is None or record.get("released_at") is None:
            return record is not None
        if record.get("closed_at") is not None:
            self._is_closed(key, record, {})  # for `closed`
        return False

    def holders_of(self, key: str) -> Sequence[LeaseInfo]:
        record = self._record(key, fresh=False)
        if record is None or record.get("released_at") is not None:
            return ()
        if key not in self._mine and self._ended_without_a_word(key, record):
            return ()
        info = self._info(key, record)
        return () if info is None else (info,)

    def _ended_without_a_word(self, key: str, record: Mapping[str, Any]) -> bool:
        """Whether the record's holder died; then the record is set right, so that it misleads nobody any more."""
        checked = self._checked.get(key)
        if checked is not None and self._clock() - checked < RECORD_TIME:
            return False
        self._checked[key] = self._clock()
        with contextlib.suppress(OSError, LeaseStoreError):
            locked = self._lock_card(key)
            if locked is None:
                return False
            file, name = locked[0]
            try:
                now_there = _read(file)
                if now_there is None or self._spoken_for(now_there, name, ""):
                    return False
                if now_there.get("released_at") is None:
                    # When it ended nobody knows. Readings since the grant count against the card, as they should: what
                    # is left of the dead holder may still compute on it.
                    ended = {"released_at": now_there.get("since"), "closed_at": self._closed_at(now_there)}
                    self._write(file, {**now_there, **ended})
            finally:
                file.unlock()
            self._records.pop(key, None)
            return True
        return False

    def released_at(self, key: str) -> float | None:
        record = self._record(key, fresh=False)
        released = None if record is None else record.get("released_at")
        return float(released) if isinstance(released, (int, float)) else None

    def _info(self, key: str, record: Mapping[str, Any]) -> LeaseInfo | None:
        try:
            share = record.get("share")
            return LeaseInfo(
                cards=(key,),
                holder=_holder_from(record["holder"]),
                token=int(record["token"]),
                share=read_share(share or None),
                note=_text_or_none(record.get("note")),
                since=max(0.0, self._clock() - float(record["since"])),
            )
        except _GARBLED:
            return None  # a record informs, it does not decide

    def descriptors(self, lease_id: str) -> Sequence[int]:
        with self._lock:
            held = self._held.get(lease_id)
        if held is None:
            return ()
        with held.guard:
            return tuple(file.fd for file in held.files if file.fd >= 0)

    def leases(self) -> Sequence[LeaseInfo]:
        self._renew_directory()
        found: list[LeaseInfo] = []
        for name in sorted(self._names()):
            if not name.startswith("gpu-") or ".guard" in name:
                continue
            with contextlib.suppress(OSError):
                # For reading, which does for a look at the lock too: who cannot write here may know as well.
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                file = _opened(name, flags, dir_fd=self._directory.fd)
                record = _read(file)
                if record is None or record.get("boot") != self._boot or record.get("released_at") is not None:
                    continue
                # Of a shared card, each share's own file speaks.
                if (record.get("share") is not None) != (".share-" in name):
                    continue
                key = record.get("key") or name
                info = self._info(str(key), record)
                if info is not None and self._alive(file):
                    found.append(info)
        return found

    @staticmethod
    def _alive(file: _Descriptor) -> bool:
        # LOCK_SH and at once undone: of all ways to look it disturbs least (a claim of this instant is refused and
        # comes again within a second). Called for displays only.
        if _take(file, fcntl.LOCK_SH):
            fcntl.flock(file.fd, fcntl.LOCK_UN)
            return False
        return True

    def queue(self) -> Sequence[TicketInfo]:
        try:
            self._renew_directory()
            names = self._ticket_names()
            # Whose owner is gone is otherwise found out only when it is its turn.
            dead = [name for name in names if name not in self._ticket_ids and not self._has_owner(name)]
            return self._load_queue(None, [name for name in names if name not in dead]).infos(self._clock())
        except OSError as exc:
            raise LeaseStoreError(_unusable(self._path, exc)) from exc

    def _names(self) -> list[str]:
        try:
            return self._directory.names(self._directory.fd)
        except OSError as exc:
            raise LeaseStoreError(_unusable(self._path, exc)) from exc

    # -- life --------------------------------------------------------------------------------------------------

    def forget_after_fork(self) -> None:
        """The parent's leases are not ours. Their descriptors stay open: we may compute on those cards."""
        _inherited.append(self._held)
        # Tickets count as alive while their socket accepts; ours would keep the parent's alive after its death.
        for ticket in self._tickets.values():
            ticket.file.close()
        for each in (self._socket, self._new_socket, self._sender):
            if each is not None:
                each.close()
        self._fresh_state()

    def close(self) -> None:
        """Remove what belongs to the queue; locks are let go by `release`, or with the process."""
        with self._lock:
            sock, name = self._socket, self._socket_name  # soon there may be the next
            self._socket = None
        self._keep_sender(None)
        for claim_id in list(self._tickets):
            self._drop_ticket(claim_id)
        self._card_files, self._ticket_files = _Readers(), _Readers()
        self._told = {}
        if sock is not None:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory.queue_fd)
            sock.close()


def _revoked_by(held: _Held) -> str | None:
    """Who has revoked the lease; None: nobody. At most a read of each of its files, and mostly of nothing."""
    with held.guard:
        for file in held.files:
            if file.fd < 0:
                continue
            try:
                raw = os.pread(file.fd, MARK_BYTES, RECORD_BYTES)
            except OSError:
                continue
            mark = _parse(raw) if raw else None
            # One of an earlier lease stays there until it is overwritten.
            if mark is not None and mark.get("token") == held.lease.token:
                return clean_text(str(mark.get("by")))[:100]
    return None


def _among(keys: frozenset[str], wanted: Wanted, share: Share | None, pending: Sequence[Share | None]) -> bool:
    return wanted.key in keys and (share is not None or not pending)


def _read(file: _Descriptor) -> dict[str, Any] | None:
    return _parse(os.pread(file.fd, RECORD_BYTES, 0))


#: As `json.dumps`, which makes an encoder for each call.
_encode = json.JSONEncoder(separators=(",", ":")).encode


def _padded(record: bytes) -> bytes:
    return record[: RECORD_BYTES - 1].ljust(RECORD_BYTES - 1) + b"\n"


def _parse(raw: bytes) -> dict[str, Any] | None:
    """A record; None if it is none, as everybody may write there what they like."""
    try:
        record = json.loads(raw)
    except _GARBLED:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("share"), (dict, type(None))):
        return None
    return record


def _token_of(record: Mapping[str, Any] | None) -> int:
    """The fencing token in the record; 0: there is none, or it is garbled."""
    token = None if record is None else record.get("token")
    return token if isinstance(token, int) else 0


def _ended(raw: bytes) -> dict[str, Any] | None:
    """What matters of the record of a whole card that was given back, which most are; None: it has to be parsed."""
    found = _ENDED.match(raw)
    # Quotes inside of strings are escaped, so these are names of fields.
    if found is None or b'"closed_at":' in raw or b'"remote_until":' in raw:
        return None
    boot, token, released_at, kept_for = found.groups()
    return {
        "boot": boot.decode(),
        "token": int(token),
        "released_at": float(released_at),
        "for": None if kept_for is None else [kept_for.decode()],
    }


_holder_json = lru_cache(maxsize=64)(lambda holder: _encode(holder_document(holder)))
_key_json = lru_cache(maxsize=65536)(_encode)


@attrs.frozen
class _What:
    """What a ticket wants."""

    groups: tuple[tuple[Wanted, ...], ...]
    count: int
    share: Share | None
    reserve: bool
    #: All cards that it names.
    keys: frozenset[str]
    #: Whether it takes one whole card, and so holds back nothing while it waits.
    is_plain: bool


class _Told:
    """A ticket that was read."""

    __slots__ = ("_claim", "_holder", "_note", "body", "name", "place", "what")

    def __init__(self, name: str, body: bytes, holder: Holder, note: str | None, what: _What) -> None:
        self.name = name
        self.body = body
        self.place = _place_of(name)
        self.what = what
        self._holder = holder
        self._note = note
        self._claim: Claim | None = None

    @property
    def claim(self) -> Claim:
        """Its name stands for the id. Made when it is asked for: mostly what it wants says enough."""
        if self._claim is None:
            what = self.what
            self._claim = Claim(
                id=self.name,
                holder=self._holder,
                groups=what.groups,
                count=what.count,
                share=what.share,
                reserve=what.reserve,
                note=self._note,
            )
        return self._claim


# A ticket's body is three lines: where its process listens, who it is, what it wants. Whoever wants a card reads all
# tickets before its own; most of them are new, but want the same cards as the one before, of a process that is known.


def _body_of(claim: Claim, sock: str) -> bytes:
    who = _who_line(claim.holder, claim.note)
    return f"{sock}\n{who}\n{_what_line(claim.groups, claim.count, claim.share, claim.reserve)}".encode()


@lru_cache(maxsize=64)
def _who_line(holder: Holder, note: str | None) -> str:
    return _encode({**holder_document(holder), "note": _text_or_none(note)})


@lru_cache(maxsize=64)
def _what_line(groups: tuple[tuple[Wanted, ...], ...], count: int, share: Share | None, reserve: bool) -> str:
    return _encode(
        {
            "count": count,
            "reserve": reserve,
            "share": None if share is None else [share.memory_mb, share.places],
            "groups": [[[wanted.key, wanted.room_mb] for wanted in group] for group in groups],
        }
    )


def _told_of(name: str, body: bytes) -> _Told:
    """
    What the ticket of this name says.

    Raises:
        One of `_GARBLED`: it is no proper ticket.
    """
    _, who, what = body.split(b"\n")
    holder, note = _parse_who(who)
    wants = _parse_what(what) if len(what) < SHORT_BODY else _parse_what.__wrapped__(what)
    return _Told(name, body, holder, note, wants)


@lru_cache(maxsize=1024)
def _parse_who(line: bytes) -> tuple[Holder, str | None]:
    told = json.loads(line)
    return _holder_from(told), _text_or_none(told["note"])


@lru_cache(maxsize=256)
def _parse_what(line: bytes) -> _What:
    told = json.loads(line)
    share = told["share"]
    groups = tuple(tuple(_wanted_from(key, room) for key, room in group) for group in told["groups"])
    count = told["count"]
    if not isinstance(count, int) or count < 1:
        raise ValueError("count")
    return _What(
        groups,
        count,
        read_share(None if share is None else dict(zip(("memory_mb", "places"), share, strict=True))),
        bool(told["reserve"]),
        keys=frozenset(wanted.key for group in groups for wanted in group),
        is_plain=count == 1 and share is None,
    )


def _wanted_from(key: Any, room: Any) -> Wanted:
    key.encode()  # or no file can have its name
    return Wanted(key, None if room is None else _amount(room))


def _amount(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError("no number")
    return float(value)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)[:200]


def _socket_of(body: bytes) -> str | None:
    """The name of the socket in a ticket's body; None if it has no proper one."""
    found = _SOCKET.match(body)
    return None if found is None else found.group(1).decode()


def _ticket_name(place: float, ending: str) -> str:
    # Sorted by name is sorted by place. The offset keeps places before boot (a long wait elsewhere) sortable.
    return f"ticket-{int((place + _PLACE_OFFSET) * 1e6):020d}-{ending}"


def _place_of(name: str) -> float:
    return int(name.split("-")[1]) / 1e6 - _PLACE_OFFSET


def _stamps(hinted: float | None, spoke: float) -> bytes:
    return f"{'-' if hinted is None else f'{hinted:.6f}':<31} {spoke:.6f}".encode().ljust(_STAMPS)


def _hint_stamp(now: float) -> bytes:
    return f"{now:<31.6f}".encode()


def _message(ticket: str, offered: str | None, now: float) -> bytes:
    told = f"{ticket} {now:.6f} {offered or ''}".encode()
    return told if len(told) <= LONGEST_MESSAGE else f"{ticket} {now:.6f} ".encode()


def _parse_message(message: bytes) -> tuple[str, float, str]:
    """The ticket's name, when it was told, and the card; empty where nothing is to be made of it."""
    name, _, rest = message.decode("utf-8", "replace").partition(" ")
    told_at, _, key = rest.partition(" ")
    try:
        return name, float(told_at), key
    except ValueError:  # anybody can send us anything
        return name, 0.0, ""


def _fits(others: Sequence[Mapping[str, Any]], share: Share, room_mb: float | None) -> bool:
    if share.places is not None:
        limits = [share.places]
        for other in others:
            places = other.get("places")
            if not isinstance(places, int):
                return False  # another mode
            limits.append(places)
        return len(others) < min(limits)
    asked = share.memory_mb or 0.0
    for other in others:
        used = other.get("memory_mb")
        if not isinstance(used, (int, float)):
            return False
        asked += used
    return asked <= (room_mb or 0.0)


def _holder_from(data: Mapping[str, Any]) -> Holder:
    name = data.get("name")
    return Holder(
        id=str(data.get("id", "")),
        name=None if name is None else str(name)[:100],
        user=str(data.get("user", "?"))[:100],
        host=str(data.get("host", "?"))[:255],
        pid=int(data.get("pid", 0)),
    )


_stores: dict[str, HostStore] = {}
# Guards _stores: two pools of one process must share one store, or each would take the other for a stranger.
_stores_lock = threading.Lock()


def host_store(directory: str | None = None) -> HostStore:
    """The store of this process for a lock directory (default: `default_directory`)."""
    path = directory or default_directory()
    with _stores_lock:
        if path not in _stores:
            _stores[path] = HostStore(path)
        return _stores[path]


def _after_fork_in_child() -> None:
    global _stores_lock
    _stores_lock = threading.Lock()
    for store in _stores.values():
        store.forget_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
