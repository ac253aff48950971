"""``%load_ext gpupool_sync.notebook``: a GPU for the notebook.

``%gpu`` acquires one for this kernel and activates it, ``%gpu release`` gives it back, ``%gpu status`` shows all of
them.  A kernel that ends gives its GPUs back by itself.
"""

from __future__ import annotations

import difflib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpupool_sync import cuda
from gpupool_sync.display import seconds
from gpupool_sync.errors import MissingExtra
from gpupool_sync.pool import GPUPool
from gpupool_sync.state import held_here

try:
    from IPython.core.error import UsageError
    from IPython.core.magic_arguments import MagicArgumentParser
except ModuleNotFoundError as exc:
    raise MissingExtra("gpupool_sync.notebook needs IPython: pip install 'gpupool-sync[notebook]'") from exc

if TYPE_CHECKING:
    from gpupool_sync.handle import GPU, GPUs, Grant
    from gpupool_sync.status import Status

_ACTIONS = ("acquire", "release", "status")


def _parser() -> Any:
    parser: Any = MagicArgumentParser(  # type: ignore[no-untyped-call]
        prog="gpu",  # the formatter writes the % before it
        add_help=True,
        description="Acquire a GPU for this notebook and activate it; `%gpu release` gives it back, `%gpu status` "
        "shows all of them. The servers are those of GPU_SERVICE_ENDPOINTS, else this machine's own GPUs.",
    )
    add = parser.add_argument
    add("action", nargs="?", choices=_ACTIONS, default="acquire")
    add("-n", "--count", type=int, metavar="N", help="so many GPUs of one host (default: 1)")
    add("--timeout", type=float, metavar="SECONDS", help="wait so long at most (default: for ever)")
    add("--model", metavar="TEXT", help="only GPUs whose name contains this, in any case")
    add("--uuid", action="append", metavar="UUID", help="only this GPU; a beginning is enough; repeatable")
    add("--endpoint", action="append", metavar="ID", help="only at this endpoint; repeatable")
    add("--exclude", action="append", metavar="ID", help="not this GPU (server1:0 or UUID) or endpoint; repeatable")
    add("--min-free-memory-mb", type=float, metavar="MIB", help="MiB that must be free")
    add("--max-utilization-percent", type=float, metavar="PERCENT", help="percent of load that must not be exceeded")
    add("--memory-mb", type=float, metavar="MIB", help="share a GPU: so many MiB of it")
    add("--max-holders", type=int, metavar="N", help="share a GPU: one of N places")
    add("--busy-ok", action="store_const", const=True, help="also a GPU that others compute on")
    add("--note", metavar="TEXT", help="shown to others beside the lease")
    return parser


class NotebookGPU:
    """What ``%gpu`` does, and the lease that this notebook has; `say` prints a line for people."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._parser = _parser()
        self._pool: GPUPool | None = None
        self._handle: GPU | GPUs | None = None
        self._request: dict[str, Any] = {}

    def magic(self, line: str = "") -> GPU | GPUs | Status | None:
        """
        ``%gpu [acquire | release | status] [options]``; ``%gpu --help`` has the options.

        Raises:
            UsageError: an option is not known, or this notebook holds something else.
            GPUPoolError: what `GPUPool.acquire` and `GPU.activate` raise.
        """
        try:
            words = shlex.split(line)
            self._check(words)
            given: dict[str, Any] = dict(vars(self._parser.parse_args(words)))
        except ValueError as exc:  # a quotation mark without its pair
            raise UsageError(f"%gpu {line}: {exc}") from None
        except SystemExit:  # --help: it has been printed
            return None
        action, timeout = given.pop("action"), given.pop("timeout")
        request = {name: value for name, value in given.items() if value is not None}
        if action == "acquire":
            return self.acquire(request, timeout)
        if request or timeout is not None:
            raise UsageError(f"%gpu {action} takes no options")
        if action == "status":
            return self.status()
        self.release()
        return None

    def _check(self, words: Sequence[str]) -> None:
        """Name what is mistyped: argparse would complain of the value behind it, as an action that it does not know."""
        options = self._parser._option_string_actions
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in options):
                meant = difflib.get_close_matches(name, options, 1)
                raise UsageError(f"%gpu has no option {name}" + (f"; {meant[0]} may be meant" if meant else ""))
        values = 0  # of the option before
        for word in words:
            if word.startswith("-"):
                takes_none = "=" in word or getattr(options.get(word), "nargs", None) == 0
                values = 0 if takes_none else 1
            elif values:
                values -= 1
            elif word not in _ACTIONS:
                raise UsageError(
                    f"%gpu: {word!r} is none of {', '.join(_ACTIONS)}; a value with spaces needs quotation marks, "
                    'such as --model "RTX 4090"'
                )

    def acquire(self, request: dict[str, Any], timeout: float | None) -> GPU | GPUs:
        """The GPU that this notebook has, or a new one, activated."""
        held = self._held()
        if held is not None:
            if request and request != self._request:
                raise UsageError(f"this notebook still holds {self._names()}; `%gpu release` gives it back first")
            self._say(f"still holding {self._names()}, for {seconds(held.held_for)}; `%gpu release` gives it back")
            held.activate()
            return held
        # Made anew for each: the environment may name other servers by now. Its waits are shown although it is this
        # module that waits.
        pool = self._pool = GPUPool(progress=None if os.environ.get("GPU_POOL_PROGRESS") else True)
        try:
            handle: GPU | GPUs = pool.acquire(timeout, **request)
            device = handle.activate()
        except BaseException:  # a GPU that cannot be used here is for others
            self._pool = None
            pool.close()
            raise
        self._handle, self._request = handle, request
        self._say(f"{self._names()} is this notebook's, as {device}, until `%gpu release` or the end of the kernel")
        return handle

    def release(self) -> None:
        """Give back what `acquire` got."""
        held, pool = self._held(), self._pool
        names = self._names()
        self._handle = self._pool = None
        if pool is not None:
            pool.close()
        if held is None:
            self._say("this notebook holds no GPU by `%gpu`")
            return
        self._say(f"released {names}")
        if cuda.initialised():
            # Whoever gets the GPU next finds it half full.
            self._say("CUDA is initialised in this kernel: what it has of the GPU's memory comes free at its restart")

    def status(self) -> Status:
        """Says what this process holds, and returns the status of the pool."""
        held = held_here()
        self._say(f"this kernel holds {', '.join(map(_told, held))}" if held else "this kernel holds no GPU")
        if self._pool is not None:
            return self._pool.status()
        with GPUPool() as pool:
            return pool.status()

    def _held(self) -> GPU | GPUs | None:
        """What this notebook has; a lease that was lost or given back otherwise is let go of."""
        handle = self._handle
        if handle is not None and handle.lost:
            self._say(f"the lease on {self._names()} was lost")
            self._let_go()
        elif handle is not None and handle.released:
            self._let_go()
        return self._handle

    def _let_go(self) -> None:
        pool = self._pool
        self._handle = self._pool = None
        if pool is not None:
            pool.close()

    def _names(self) -> str:
        return self._handle._names() if self._handle is not None else ""


class Reminder:
    """
    Says after a cell what an earlier run of the same cell still holds.

    A cell that is run again acquires again, and the handle of the first run may be gone while its lease is not.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._before: frozenset[str] = frozenset()
        self._acquired: dict[str, frozenset[str]] = {}  # by cell: the leases that its runs left behind

    def before_cell(self, *_: object) -> None:
        """For the event ``pre_run_cell``."""
        self._before = frozenset(grant.id for grant in held_here())

    def after_cell(self, result: Any) -> None:
        """For the event ``post_run_cell``."""
        info = getattr(result, "info", None)
        # The front end's name for the cell survives an edit.
        cell = str(getattr(info, "cell_id", None) or getattr(info, "raw_cell", ""))
        held = held_here()
        new = frozenset(grant.id for grant in held) - self._before
        earlier = [grant for grant in held if grant.id in self._acquired.get(cell, ())]
        if new and earlier:
            self._say(
                "this cell has acquired again; still held from an earlier run of it: "
                f"{', '.join(map(_told, earlier))}; "
                "pool.release_all() gives all of them back, `with pool.gpu()` does at the end of its block"
            )
        if new or earlier:
            self._acquired[cell] = new | {grant.id for grant in earlier}
        else:
            self._acquired.pop(cell, None)


def _told(grant: Grant) -> str:
    names = ", ".join(card.global_gpu_id for card in grant.cards)
    return f"{names} (for {seconds(time.monotonic() - grant.begun_at)})"


def _print(line: str) -> None:
    print(line)  # noqa: T201 - the output of a magic


def load_ipython_extension(shell: Any) -> None:
    """Called by ``%load_ext gpupool_sync.notebook``; again, as by ``%reload_ext``, it changes nothing."""
    if hasattr(shell, "_gpupool_sync"):
        return  # what the notebook holds hangs on what was registered first
    shell._gpupool_sync = True
    reminder = Reminder(_print)
    shell.register_magic_function(NotebookGPU(_print).magic, "line", "gpu")
    shell.events.register("pre_run_cell", reminder.before_cell)
    shell.events.register("post_run_cell", reminder.after_cell)
