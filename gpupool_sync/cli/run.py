"""``gpupool-sync run``: a command on a GPU, from when there is one until the command ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from typing import Any

import attrs
import click

from gpupool_sync.cli._common import Terms, complain, endpoints_option, lease_options, seconds, warn
from gpupool_sync.cli._connection import Connection
from gpupool_sync.cli._running import (
    BY_SIGNAL,
    CANNOT_RUN,
    ENDING,
    LOOK,
    MESSAGES,
    NOT_FOUND,
    OUR_FAILURE,
    Asking,
    Event,
    Interrupted,
    Signals,
    our_failure,
    passed_on,
    say,
    start_failed,
    stop_here,
    visible_as,
    wake,
    working_pool,
)
from gpupool_sync.errors import AcquireTimeout, GPUPoolError

#: Seconds of waiting after which its end is worth a line, too.
LONG = 2.0
#: With --any-host: seconds that a GPU which was seen free may take to be granted, before the next host is tried.
SHORT = 5.0


@attrs.frozen
class Order:
    """One command line."""

    command: tuple[str, ...]
    terms: Terms
    descriptors: tuple[int, ...] = ()


@click.command(context_settings={"allow_interspersed_args": False})
@endpoints_option
@lease_options
@click.option("--any-host", is_flag=True, help="Run it in the machine that has a free GPU, by ssh.  [default: here]")
@click.option(
    "--ssh",
    envvar="GPU_POOL_SSH",
    default="ssh",
    metavar="PROGRAM",
    help="What --any-host reaches other machines with, and its options.  [default: GPU_POOL_SSH, else ssh]",
)
@click.option(
    "--remote-program",
    envvar="GPU_POOL_REMOTE_PROGRAM",
    default="gpupool-sync",
    metavar="PROGRAM",
    help="This program's name or path over there.  [default: GPU_POOL_REMOTE_PROGRAM, else gpupool-sync]",
)
@click.option(
    "--remote-dir", metavar="DIRECTORY", help="Where it runs over there.  [default: the directory of the same name]"
)
@click.option("--none-free-status", type=click.IntRange(1, 255), hidden=True)
@click.option("--hang-up", is_flag=True, hidden=True)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
def run(
    endpoints: str | None,
    terms: Terms,
    any_host: bool,
    ssh: str,
    remote_program: str,
    remote_dir: str | None,
    none_free_status: int | None,
    hang_up: bool,
    command: tuple[str, ...],
) -> int:
    """
    Run a command on a GPU, as soon as there is one.

    The command sees that GPU and no other, and has it until it ends, even if this program is killed. Its input, output,
    terminal and signals are those of this program.

    Exit status: the command's, 128+N if signal N ended it; 124 no GPU came in time; 125 something else went wrong, the
    lost lease of --on-lost kill included; 126 the command cannot be run; 127 there is no such command.
    """
    order = Order(command, terms, passed_on())
    try:
        with Signals(*ENDING, *MESSAGES) as signals:
            if any_host:
                from gpupool_sync.cli._any_host import run_anywhere

                return run_anywhere(order, endpoints, ssh, remote_program, remote_dir, signals)
            connection = Connection()
            if hang_up:
                connection.watch()
            status = run_here(order, endpoints, signals, connection)
    except Interrupted as exc:
        return exc.status
    except AcquireTimeout as exc:
        status = our_failure(exc)
        return status if none_free_status is None else none_free_status
    except GPUPoolError as exc:
        return our_failure(exc)
    # Over there for --any-host: only "there was no GPU" may say so, or a job would be run twice.
    return 1 if status == none_free_status else status


def run_here(order: Order, endpoints: str | None, signals: Signals, connection: Connection | None = None) -> int:
    """
    Lease, run, give back; returns the exit status.

    Raises:
        Interrupted: by a signal, before the command ran.
        GPUPoolError: no GPU could be had, or the command could not get its lease.
    """
    program = order.command[0]
    # Before the wait of hours, not after it.
    if shutil.which(program) is None:
        found = os.path.exists(program) and os.sep in program
        complain(f"{program}: {'cannot be executed' if found else 'command not found'}")
        return CANNOT_RUN if found else NOT_FOUND
    with visible_as(order.terms.visible), working_pool(endpoints, progress=True) as pool:
        lost = Lost(order.terms)
        asking = Asking(pool, order.terms, lost.tell)
        try:
            gpu = asking.wait(signals)
        except BaseException:
            asking.give_up()
            raise
        if asking.waited >= LONG:
            say(f"got {gpu._names()} after {seconds(asking.waited)}")
        try:
            with signals.as_before():
                process = gpu.popen(order.command, pass_fds=order.descriptors)
        except OSError as exc:
            return start_failed(order.command, exc)
        status = supervise(process, signals, lost, connection)
        # From here on Ctrl-C may end even the wait for an arbiter that does not answer.
        signals.end()
        gpu.release()
        return status


class Lost:
    """Whether the command's lease was lost, and what is done about it."""

    def __init__(self, terms: Terms) -> None:
        self.kill = terms.on_lost == "kill"
        self.grace = terms.grace
        self._told: list[str] = []

    def tell(self, gpu: Any) -> None:
        """On a thread of the pool's."""
        self._told.append(f"the lease on {gpu._names()} is lost ({gpu._tie.grant.why_lost()})")
        wake()

    def news(self) -> str | None:
        """What has happened since the last call."""
        return self._told.pop() if self._told else None


def supervise(
    process: subprocess.Popen[Any],
    signals: Signals,
    lost: Lost | None = None,
    connection: Connection | None = None,
) -> int:
    """Pass signals on until the command ends; returns its exit status as shells do."""
    begun_to_kill = hung_up = False
    kill_at = float("inf")
    state = _State(process)
    while not state.ended():
        event = signals.wait(min(LOOK, kill_at - time.monotonic()))
        if connection is not None and connection.ended and not hung_up:
            # As when a terminal is gone: all that was started there is told. Who does not mind SIGHUP, minds SIGKILL.
            hung_up, kill_at = True, time.monotonic() + (10.0 if lost is None else lost.grace)
            _hang_up(process)
        elif event is not None:
            state.pass_on(event)
        if lost is not None and (news := lost.news()) is not None:
            if not lost.kill:
                warn(f"{news}; the command goes on")
            else:
                complain(f"{news}; the command is ended: SIGTERM, and SIGKILL in {lost.grace:g} s")
                begun_to_kill, kill_at = True, time.monotonic() + lost.grace
                process.terminate()
                process.send_signal(signal.SIGCONT)  # one that is stopped would not hear it
        if time.monotonic() >= kill_at:
            kill_at = float("inf")
            process.kill()
    code = process.wait()
    if begun_to_kill:
        return OUR_FAILURE
    return code if code >= 0 else BY_SIGNAL - code


def _hang_up(process: subprocess.Popen[Any]) -> None:
    """SIGHUP to the command, and to all of its group where nobody else is in that."""
    if os.getpgrp() != os.getpid():
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGCONT)
        return
    for number in (signal.SIGHUP, signal.SIGCONT):  # we are in it, too, but have it blocked
        os.killpg(0, number)


class _State:
    """Of a command in our own process group: the terminal's keys reach it without us."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self._process = process
        self._stopped = False

    def ended(self) -> bool:
        """Whether it has; if it has stopped for job control, we stop as well, so that the shell sees it."""
        pid = self._process.pid
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            if os.waitid(os.P_PID, pid, os.WCONTINUED | os.WNOHANG) is not None:
                self._stopped = False
            found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
            if found is not None:
                self._stopped = True
                # SIGSTOP is somebody's who wants to stop this process and no more.
                if found.si_status in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
                    stop_here()
            return False
        return self._process.poll() is not None

    def pass_on(self, event: Event) -> None:
        """A signal that came to us; not one that came to the command as well."""
        # The kernel sends those of the terminal to everybody in the foreground; and what the command itself sends to
        # its group is no news for it.
        if event.by_kernel or event.pid == self._process.pid:
            return
        if event.number == signal.SIGCONT:
            # `fg` has continued us both already.
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self._process.pid, os.WCONTINUED | os.WNOHANG) is not None:
                    self._stopped = False
            if not self._stopped:
                return
            self._stopped = False
        self._process.send_signal(event.number)
