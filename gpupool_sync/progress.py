"""What a caller sees who waits for long: a line on a terminal, a table in a notebook, otherwise nothing.

Nothing here is imported before somebody has waited for `SHOW_AFTER`, and everything happens on the waiting thread
itself, between two of its looks, with no lock held: no thread to stop, and Ctrl-C works as without it.

Not asked, a wait is shown only to who can have meant it: the line of code that waits must belong to the program itself
(``__main__``: a script, an interactive session, a cell), not to a module that it imports; a library does not know
whose screen it is on.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from gpupool_sync.display import waiting_html, waiting_line
from gpupool_sync.status import Explanation

logger = logging.getLogger(__name__)

#: Seconds between two drawings; a little less than between two looks of a waiter.
REFRESH = 0.9
#: Seconds between two lines where nothing can be drawn over.
RARELY = 60.0


class _Surface(Protocol):
    every: float  # seconds between two drawings

    def draw(self, explanation: Explanation, waited: float, place: int | None) -> None: ...
    def clear(self) -> None: ...


class _Terminal:
    """One line that is written over itself, without a newline, and erased at the end."""

    every = REFRESH

    def __init__(self) -> None:
        from rich.console import Console
        from rich.control import Control
        from rich.segment import ControlType
        from rich.text import Text

        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self._erase = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
        self._text = Text

    def draw(self, explanation: Explanation, waited: float, place: int | None) -> None:
        text = self._text(waiting_line(explanation, waited, place), no_wrap=True)
        # A line as wide as the window would go on in the next one, which nobody erases.
        text.truncate(max(1, self._console.width - 1), overflow="ellipsis")
        self._console.control(self._erase)
        self._console.print(text, end="", soft_wrap=True)

    def clear(self) -> None:
        self._console.control(self._erase)


class _Lines:
    """Asked for where nothing can be drawn over: a line now and then."""

    every = RARELY

    def draw(self, explanation: Explanation, waited: float, place: int | None) -> None:
        sys.stderr.write(f"{waiting_line(explanation, waited, place)}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        pass


class _Notebook:
    """One output of the cell that waits; empty at the end."""

    every = REFRESH

    def __init__(self) -> None:
        from IPython.display import display

        self._display: Callable[..., object] = display
        self._id = os.urandom(8).hex()
        self._begun = False

    def draw(self, explanation: Explanation, waited: float, place: int | None) -> None:
        self._publish(waiting_html(explanation, waited, place), waiting_line(explanation, waited, place))

    def clear(self) -> None:
        self._publish("", "")

    def _publish(self, page: str, line: str) -> None:
        # Before it is shown: an interrupt in between must not leave an output that nobody updates.
        begun, self._begun = self._begun, True
        self._display({"text/html": page, "text/plain": line}, raw=True, display_id=self._id, update=begun)


class Progress:
    """
    One wait as it is shown; the first `tell` decides where.

    Args:
        wanted: the setting `progress`.
        inherited: the pool came into this process by fork or in a pickle.
    """

    def __init__(self, wanted: bool | None, *, inherited: bool = False) -> None:
        self._next = 0.0  # time.monotonic() of the next drawing
        self._begun = False
        self._surface = None if wanted is None and inherited else _surface(wanted)

    def tell(self, waited: float, place: int | None, explain: Callable[[], Explanation]) -> None:
        """
        Show it, if it is time to; never raises but for an interrupt.

        Args:
            waited: seconds.
            place: in the queue, counted from 1; None: no arbiter has told.
            explain: called only if something is shown.
        """
        surface, now = self._surface, time.monotonic()
        if surface is None or now < self._next or not self._is_first():
            return
        self._next = now + surface.every
        try:
            explanation = explain()
            self._begun = True  # before it is drawn: an interrupt in the middle has it erased
            surface.draw(explanation, waited, place)
        except Exception:  # a closed terminal, say: not what the caller waits for
            logger.debug("a wait cannot be shown", exc_info=True)
            self._surface = None

    def close(self) -> None:
        """Remove what was shown."""
        global _drawing
        surface = self._surface
        if self._begun and surface is not None:
            try:
                surface.clear()
            except Exception:
                logger.debug("what was shown of a wait cannot be removed", exc_info=True)
        if _drawing() is self:
            _drawing = _nobody

    def _is_first(self) -> bool:
        """Whether this is the one of the process' waiters that is shown: several would write over one another."""
        global _drawing
        other = _drawing()
        if other is None:
            _drawing = weakref.ref(self)
        return other is None or other is self


def _nobody() -> None:
    return None


#: The wait that is shown now. Replaced without a lock: two that come at once draw over each other for a second.
_drawing: Callable[[], Progress | None] = _nobody


def _after_fork_in_child() -> None:
    global _drawing
    _drawing = _nobody  # the parent's thread that drew is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# -- where ---------------------------------------------------------------------------------------------------------


def _surface(wanted: bool | None) -> _Surface | None:
    if wanted is False or (wanted is None and not _asked_by_main()):
        return None
    if in_kernel():
        return _Notebook()
    if _on_terminal() and _in_foreground():
        return _Terminal()
    return _Lines() if wanted else None


def _asked_by_main() -> bool:
    """Whether the code that waits is the program itself, and this process is not one of its workers."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        return False  # its siblings have the same terminal
    frame: Any = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        # contextlib and threading call on behalf of others.
        if package != "gpupool_sync" and package not in sys.stdlib_module_names:
            return bool(package == "__main__")
        frame = frame.f_back
    return False


def in_kernel() -> bool:
    """Whether this is a Jupyter kernel; imports nothing."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    session = getattr(getattr(shell, "kernel", None), "session", None)
    # A forked child has the parent's shell, but nobody listens to it.
    return session is not None and getattr(session, "pid", None) == os.getpid()


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _in_foreground() -> bool:
    """Whether the terminal is ours now: a job in the background must not write over what is typed."""
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):  # not our controlling terminal, or no such thing here
        return True
