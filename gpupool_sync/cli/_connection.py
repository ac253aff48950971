"""The other end of ``run --any-host``: whether the connection that a command came by is still there.

Without a terminal sshd tells a command nothing when its client is gone: it only closes its ends of the command's
input and output.  All of them at once is what no pipeline does, so that is the sign.  Nothing is read: the input is
the command's.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import threading


class Connection:
    """Watches standard input, output and error from `watch` on; when all are closed, SIGHUP comes to this process."""

    def __init__(self) -> None:
        # Set once, by the thread; before the signal that makes others look.
        self.ended = False

    def watch(self) -> None:
        """Start the thread, if this process' input and output are those of a connection, and SIGHUP is not ignored."""
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and all(map(_can_end, (0, 1, 2))):
            threading.Thread(target=self._run, name="gpupool-connection", daemon=True).start()

    def _run(self) -> None:
        # One at a time: each stays closed once it is, and an input that has ended would wake us for ever.
        for descriptor in (1, 2, 0):
            poll = select.poll()
            poll.register(descriptor, 0)
            while not any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll()):
                pass
        self.ended = True
        os.kill(os.getpid(), signal.SIGHUP)


def _can_end(descriptor: int) -> bool:
    """Whether somebody has the other end, and can close it."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
