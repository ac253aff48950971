"""What a caller holds: a GPU, or several of one host.

A handle keeps a `Tie` alive; the pool watches the tie through a weak reference made *before* the claim.  So a claim
whose caller was interrupted before it got the handle is noticed and undone, wherever the interrupt fell.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from gpupool_sync import cuda
from gpupool_sync.clock import boottime
from gpupool_sync.errors import ConfigError, GPUPoolError, LeaseLost, RemoteGPUError
from gpupool_sync.models import Card, GPUReading, Snapshot

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import subprocess

    from gpupool_sync.inherited import Bequest, Recipe
    from gpupool_sync.leases.base import Lease, LeaseStore
    from gpupool_sync.models import EndpointView


class Command:
    """One that runs on a lease; it is there before its process is, so that a release in between sees it."""

    __slots__ = ("_ended", "process")

    def __init__(self) -> None:
        self.process: subprocess.Popen[Any] | None = None
        self._ended = threading.Event()

    def ended(self) -> None:
        """There is no process, or no more."""
        self._ended.set()

    def running(self) -> bool:
        """Whether it runs, or is about to."""
        return self.process.poll() is None if self.process is not None else not self._ended.is_set()

    def wait(self) -> None:
        """Until it has ended."""
        while self.process is None:
            if self._ended.wait(1.0):
                return
        self.process.wait()


def _nothing() -> None: ...


class Grant:
    """What the pool knows of one claim: outlives the handles, never refers to them."""

    __slots__ = (
        "__weakref__",
        "asked",
        "asked_at",
        "begun_at",
        "bequests",
        "cancelled",
        "cards",
        "children",
        "choice",
        "delivered",
        "ending",
        "forgotten",
        "good_until",
        "id",
        "lease",
        "lost",
        "note",
        "on_lost",
        "owner",
        "pid",
        "place",
        "position",
        "problems",
        "released",
        "snapshot",
        "store",
        "tie_ref",
        "told",
    )

    def __init__(self, id: str, note: str | None) -> None:
        self.id = id
        self.note = note
        self.pid = os.getpid()
        self.lease: Lease | None = None
        self.store: LeaseStore | None = None
        self.asked: list[LeaseStore] = []  # arbiters that have heard the id
        self.problems: dict[int, str] = {}  # by id of the arbiter: why it could not be asked last time
        self.cards: tuple[Card, ...] = ()
        self.snapshot: Snapshot | None = None
        self.choice: Sequence[EndpointView] = ()  # the endpoints that the strategy could choose from
        self.delivered = False  # the caller has the handle
        #: Somebody has begun to give it back, or up, if not None: and since when the monitor's thread knows that, by
        #: time.monotonic(); 0 as long as it has not looked.
        self.ending: float | None = None
        self.forgotten = False  # the handle is gone, the lease is not
        self.released = False
        self.lost: str | None = None  # why the lease is gone though nobody released it
        self.cancelled = False  # nobody waits for it any more
        self.told = False  # on_lost was called, or is about to be
        self.place = ""  # file and line of the acquire, for warnings
        self.position: int | None = None  # in the shortest queue that it waits in, as last told; 0 is the head
        self.asked_at = 0.0  # time.monotonic()
        self.begun_at = 0.0  # time.monotonic() of the grant
        self.children: list[Command] = []
        self.bequests: list[Bequest] = []  # what the commands inherit; the first counts, once there is one
        self.on_lost: Callable[[Any], object] | None = None
        self.tie_ref: object = None
        #: ``clock.boottime`` at which a lease with a ttl is lost unless it is renewed before; None: it has no end.
        self.good_until: Callable[[], float | None] = _nothing
        self.owner: Callable[[], object] = _nothing  # weak reference to the pool

    @property
    def bequest(self) -> Bequest | None:
        """What its commands inherit."""
        return self.bequests[0] if self.bequests else None

    def why_lost(self) -> str | None:
        """Why the lease is gone though nobody released it, by what is known at this moment; None if it is not."""
        if self.lost is None and not self.released and self.store is not None:
            told = self.store.why_gone(self.id)
            end = self.good_until()
            if told is None and end is not None and boottime() >= end:
                told = "its arbiter took it back, or did not confirm it in time"
            self.lost = told
        return self.lost


class Tie:
    """Dies when nobody can use or release the lease through a handle any more."""

    __slots__ = ("__weakref__", "grant")

    def __init__(self, grant: Grant) -> None:
        self.grant = grant


def _of_its_process(self: object) -> None:
    raise TypeError("a GPU handle belongs to its process and cannot be pickled; pass the pool, or gpu.env()")


class Owner(Protocol):
    """The pool, as a handle sees it."""

    def release(self, gpu: Any) -> None: ...
    def _recipe(self, store: LeaseStore) -> Recipe: ...


class _Handle:
    """What a GPU and several GPUs have in common."""

    __slots__ = ("_pool", "_tie")
    __reduce__ = _of_its_process  # type: ignore[assignment]

    def __init__(self, pool: Owner, tie: Tie) -> None:
        self._pool = pool
        self._tie = tie

    @property
    def _lease(self) -> Lease:
        lease = self._tie.grant.lease
        assert lease is not None
        return lease

    @property
    def _snapshot(self) -> Snapshot:
        snapshot = self._tie.grant.snapshot
        assert snapshot is not None
        return snapshot

    @property
    def _all_cards(self) -> tuple[Card, ...]:
        return self._tie.grant.cards

    @property
    def endpoint_id(self) -> str:
        """The endpoint whose server told us of the GPU."""
        return self._snapshot.endpoint_id

    @property
    def url(self) -> str:
        """The endpoint's URL, without credentials; ``local:`` for this machine read directly."""
        return self._snapshot.url

    @property
    def host(self) -> str:
        """The name of the machine that the GPU is in."""
        if self._snapshot.sample.host is not None:
            return self._snapshot.sample.host.name
        from urllib.parse import urlsplit

        return urlsplit(self._snapshot.url).hostname or self.endpoint_id

    @property
    def is_local(self) -> bool:
        """Whether the GPU is in this very machine, so that this process can compute on it."""
        return self._snapshot.is_local

    @property
    def fencing_token(self) -> int:
        """Larger than that of any earlier lease on the GPU: hand it to whatever must refuse late writers."""
        return self._lease.token

    @property
    def scope(self) -> str:
        """Among whom the lease excludes: "process", "container", "host" or "everybody"."""
        store = self._tie.grant.store
        return store.scope if store is not None else "process"

    @property
    def released(self) -> bool:
        """Whether the lease was given back."""
        return self._tie.grant.released

    @property
    def held_for(self) -> float:
        """Seconds since the lease was granted."""
        return time.monotonic() - self._tie.grant.begun_at

    @property
    def lost(self) -> bool:
        """Whether the lease is gone though nobody released it. Final: a lost handle never becomes good again."""
        return self._tie.grant.why_lost() is not None

    def check(self) -> None:
        """
        Go on only while the GPU is still ours.

        Raises:
            LeaseLost: the lease was lost, or has been released.
        """
        grant = self._tie.grant
        if (why := grant.why_lost()) is not None:
            raise LeaseLost(f"the lease on {self._names()} is lost: {why}")
        if grant.released:
            raise LeaseLost(f"the lease on {self._names()} was released before")

    def release(self) -> None:
        """Give the GPU back; idempotent. While a child of `popen` still runs on it, it is given back at its end."""
        self._pool.release(self)

    def _names(self) -> str:
        return ", ".join(card.global_gpu_id for card in self._all_cards)

    # -- using it ----------------------------------------------------------------------------------------------

    def env(self, visible: str | None = None) -> dict[str, str]:
        """
        The environment variables that mask a process to exactly these GPUs (never a lease).

        `CUDA_DEVICE_ORDER` comes with `CUDA_VISIBLE_DEVICES` or not at all: NVML counts in PCI order, CUDA by
        default the fastest first, so an index alone can name another card.

        Args:
            visible: "uuid" (default) or "index", for programs that parse integers; also `GPU_POOL_VISIBLE`.  A MIG
                instance is named by its UUID all the same: CUDA counts none of them.

        Raises:
            RemoteGPUError: the GPU is in another machine, where other cards have these numbers.
            ConfigError: *visible* or the variable is neither.
        """
        self._require_local(_this_command())
        return self._mask(visible)

    @property
    def _is_cpu(self) -> bool:
        """Whether it is the CPU that stands in for a GPU (`GPU_POOL_PASSTHROUGH`)."""
        host = self._snapshot.sample.host
        return host is not None and host.passthrough

    def _mask(self, visible: str | None = None) -> dict[str, str]:
        visible = visible or os.environ.get("GPU_POOL_VISIBLE") or "uuid"
        if visible not in ("uuid", "index"):
            raise ConfigError(f"GPU_POOL_VISIBLE or visible={visible!r}: uuid or index is allowed")
        if self._is_cpu:
            return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
        mask = ",".join(_name_for_cuda(card.reading, visible) for card in self._all_cards)
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": mask,
            "NVIDIA_VISIBLE_DEVICES": mask,
        }

    def _require_local(self, command: Sequence[str]) -> None:
        if self.is_local:
            return
        sample = self._snapshot.sample
        if sample.host is not None and sample.host.simulated:
            # It is in no machine, so this one is as good as any: programs are tried out with it, before there is a GPU.
            _warn_of_simulation(self._names())
            return
        masked = " ".join(f"{name}={value}" for name, value in self._mask().items() if name.startswith("CUDA"))
        raise RemoteGPUError(
            f"{self._names()} is in {self.host}, not in this machine, so this process cannot compute on it. "
            f"There it would be: ssh {shlex.quote(self.host)} env {masked} {shlex.join(command)}"
        )

    def activate(self) -> str:
        """
        Make these the GPUs that CUDA sees in this process, and return the first one's name, such as ``"cuda:0"``.

        Where CUDA is not initialised yet the process is masked; where it is, a mask would be silently ignored, so
        nothing is changed and the name is found among the visible devices.

        Raises:
            RemoteGPUError: the GPU is in another machine; the message has the command to run there.
            LeaseLost: the lease is gone.
            GPUPoolError: this process is masked to another lease of its own, or CUDA was initialised without
                seeing this GPU.
        """
        self.check()
        self._require_local(_this_command())
        return "cpu" if self._is_cpu else _mask.activate(self)

    @property
    def device(self) -> str:
        """
        The first GPU's name for CUDA under this process's present mask, such as ``"cuda:0"``; changes nothing.

        Raises:
            RemoteGPUError: the GPU is in another machine.
            GPUPoolError: the present mask hides it; `activate` it first.
        """
        self._require_local(_this_command())
        if self._is_cpu:
            return "cpu"
        return cuda.position(self._all_cards[0].reading, self._names())

    def run(self, command: Sequence[str], **kwargs: Any) -> subprocess.CompletedProcess[Any]:
        """
        `subprocess.run` with the command masked to these GPUs; it has the lease, as with `popen`.

        Raises:
            RemoteGPUError: the GPU is in another machine.
            LeaseLost: the lease is gone.
            GPUPoolError: the lease has a ttl, and the process that renews it for the command did not start.
        """
        import subprocess

        with self._starting(command, kwargs):
            return subprocess.run(list(command), **kwargs)  # noqa: PLW1510 - the caller's to choose

    def popen(self, command: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """
        `subprocess.Popen` with the command masked to these GPUs, which stay leased until it ends.

        Also if this process is killed.  In the command, `GPUPool` offers these GPUs and no other, to one holder at a
        time, under this lease.

        Raises:
            RemoteGPUError: the GPU is in another machine.
            LeaseLost: the lease is gone.
            GPUPoolError: the lease has a ttl, and the process that renews it for the command did not start.
        """
        import subprocess

        with self._starting(command, kwargs) as running:
            running.process = subprocess.Popen(list(command), **kwargs)
            return running.process

    @contextlib.contextmanager
    def _starting(self, command: Sequence[str], kwargs: dict[str, Any]) -> Iterator[Command]:
        """Around the start of a command: what it inherits, and that it runs."""
        self._check_command(command)
        grant = self._tie.grant
        for each in list(grant.children):
            if not each.running():
                _remove(grant.children, each)
        running = Command()
        try:
            grant.children.append(running)
            kwargs["env"] = self._masked(kwargs)
            # A forked child has forgotten the lease; what it starts is masked, no more.
            if os.name != "posix" or grant.pid != os.getpid():
                yield running
                return
            from gpupool_sync.inherited import VARIABLE, starting

            bequest = self._bequest()
            assert grant.store is not None
            told = bequest.tell(self._snapshot, self._all_cards, self._lease, grant.store)
            if kwargs.get("user") is not None:
                bequest.give_to(kwargs["user"])
            kwargs["env"][VARIABLE] = told
            # The kernel keeps the lease while the command has these.
            descriptors = (*bequest.descriptors, *grant.store.descriptors(grant.id))
            kwargs["pass_fds"] = (*kwargs.get("pass_fds", ()), *descriptors)
            with starting():
                yield running
        finally:
            if running.process is None:
                running.ended()
                _remove(grant.children, running)

    def _bequest(self) -> Bequest:
        from gpupool_sync.inherited import Bequest

        grant, lease, store = self._tie.grant, self._lease, self._tie.grant.store
        bequest = grant.bequest
        if bequest is None:
            made = Bequest()
            grant.bequests.append(made)
            bequest = grant.bequests[0]
            if bequest is not made:  # another thread was faster
                made.end()
        if lease.ttl is not None and not bequest.kept:
            assert store is not None
            bequest.keep(self._pool._recipe(store), lease, grant.good_until() or 0.0)
        return bequest

    def _check_command(self, command: Sequence[str]) -> None:
        if isinstance(command, str) or not command:
            raise ConfigError(f"command={command!r}: a list is allowed, such as ['python', 'train.py']")
        self.check()
        self._require_local(command)

    def _masked(self, kwargs: dict[str, Any]) -> dict[str, str]:
        given: Mapping[str, str] | None = kwargs.pop("env", None)
        return {**(os.environ if given is None else given), **self.env()}


def _name_for_cuda(reading: GPUReading, visible: str) -> str:
    by_uuid = reading.uuid is not None and (visible == "uuid" or reading.uuid.startswith("MIG-"))
    return str(reading.uuid if by_uuid else reading.local_gpu_id)


def _remove(commands: list[Command], command: Command) -> None:
    with contextlib.suppress(ValueError):  # another thread was faster
        commands.remove(command)


@functools.lru_cache(64)  # once for each of them
def _warn_of_simulation(names: str) -> None:
    logger.warning("simulated: %s; masked as a real GPU would be, but CUDA will find nothing there", names)


def _this_command() -> list[str]:
    program = sys.argv[0] if sys.argv else ""
    if not program or program == "-c":
        return ["python", "your_script.py"]
    return [*(["python"] if program.endswith(".py") else []), program, *sys.argv[1:]]


class GPU(_Handle):
    """One GPU that is ours until `release`."""

    __slots__ = ("_card",)

    def __init__(self, pool: Owner, tie: Tie, card: Card) -> None:
        super().__init__(pool, tie)
        self._card = card

    @property
    def _all_cards(self) -> tuple[Card, ...]:
        return (self._card,)

    @property
    def global_gpu_id(self) -> str:
        """``endpoint_id:local_gpu_id``, such as ``server1:0``."""
        return self._card.global_gpu_id

    @property
    def local_gpu_id(self) -> int:
        """The GPU's number on its host, in PCI order as nvidia-smi counts."""
        return self._card.reading.local_gpu_id

    @property
    def uuid(self) -> str | None:
        """The GPU's UUID; None where its server tells none."""
        return self._card.reading.uuid

    @property
    def name(self) -> str:
        """The GPU's model."""
        return self._card.reading.name

    @property
    def memory_total_mb(self) -> float | None:
        """MiB of memory in all; None where its server does not tell."""
        return self._card.reading.memory_total_mb

    def __enter__(self) -> GPU:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "lost" if self.lost else "released" if self.released else "held"
        if self._tie.grant.pid != os.getpid():
            state += " by the parent process"
        return f"<GPU {self.global_gpu_id} ({self.name}), {state}>"

    def _repr_html_(self) -> str:
        from gpupool_sync.display import gpu_html

        return gpu_html(self)


class GPUs(_Handle, Sequence[GPU]):
    """Several GPUs of one host under one lease: granted together, released together."""

    __slots__ = ("_gpus",)

    def __init__(self, pool: Owner, tie: Tie) -> None:
        super().__init__(pool, tie)
        self._gpus = tuple(GPU(pool, tie, card) for card in tie.grant.cards)

    def __len__(self) -> int:
        return len(self._gpus)

    def __getitem__(self, index: Any) -> Any:
        return self._gpus[index]

    def __iter__(self) -> Iterator[GPU]:
        return iter(self._gpus)

    def __enter__(self) -> GPUs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<GPUs {self._names()}>"

    def _repr_html_(self) -> str:
        from gpupool_sync.display import gpus_html

        return gpus_html(self)


# -- masking this process --------------------------------------------------------------------------------------

_VARIABLES = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


class _Mask:
    """The one mask of this process: threads that activate different leases are refused, never confused."""

    def __init__(self) -> None:
        # Guards all of this, and the three variables of os.environ while they are changed together.
        self._lock = threading.Lock()
        self._grant: Grant | None = None
        self._before: dict[str, str | None] = {}
        self._said_unmasked = False
        self._masked_to: tuple[str, ...] = ()
        #: UUIDs that CUDA was initialised under, whose lease is over: it can see no others in this process.
        self.bound_to: tuple[str, ...] = ()

    def activate(self, handle: _Handle) -> str:
        grant = handle._tie.grant
        with self._lock:
            if cuda.initialised():
                found = cuda.position(handle._all_cards[0].reading, handle._names())
                if handle._all_cards[0].reading.uuid not in self._masked_to:
                    self._say_unmasked(found)
                return found
            mine = self._grant
            if mine is not None and mine is not grant and mine.pid == os.getpid():
                if not mine.released and mine.why_lost() is None:
                    held = ", ".join(card.global_gpu_id for card in mine.cards)
                    raise GPUPoolError(
                        f"this process is masked to {held}, whose lease it still holds; one process sees one mask. "
                        "Use gpu.run(), or a process for each GPU"
                    )
                self._restore_locked()
            if self._grant is None:
                self._before = {name: os.environ.get(name) for name in _VARIABLES}
            self._grant = grant
            self._masked_to = tuple(card.reading.uuid for card in grant.cards if card.reading.uuid is not None)
            os.environ.update(handle.env())
            try:
                handle.check()  # a release on another thread may have come before there was a mask to undo
            except LeaseLost:
                self._restore_locked()
                raise
        return "cuda:0"

    def _say_unmasked(self, found: str) -> None:
        if not self._said_unmasked:
            self._said_unmasked = True
            logger.warning(
                "CUDA was initialised before activate(), so this process cannot be masked to its GPU: it must name it, "
                "as %s; what names no device, or another, computes on a GPU that may be somebody else's",
                found,
            )

    def released(self, grant: Grant) -> None:
        """The lease is over: undo its mask, unless CUDA is bound to it already."""
        if self._grant is not grant:
            return
        with self._lock:
            if self._grant is not grant:
                return
            if cuda.initialised():
                self.bound_to = self._masked_to
            else:
                self._restore_locked()

    def _restore_locked(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._grant = None
        self._masked_to = self.bound_to = ()


_mask = _Mask()

if hasattr(os, "register_at_fork"):
    # A child inherits the mask with the environment, but not the lease behind it; and a lock that another thread held
    # at the fork would stay locked in the child for ever.
    os.register_at_fork(after_in_child=_mask.__init__)  # type: ignore[misc]


def forget_mask(grant: Grant) -> None:
    """Called by the pool when *grant* is released."""
    _mask.released(grant)


def bound_to() -> tuple[str, ...]:
    """UUIDs of the GPUs that CUDA is bound to in this process, though their lease is over; mostly none."""
    return _mask.bound_to
