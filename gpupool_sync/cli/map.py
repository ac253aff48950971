"""``gpupool-sync map``: one command for each value, as many at once as GPUs come free."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import attrs
import click

from gpupool_sync.cli._common import (
    Count,
    Terms,
    complain,
    endpoints_option,
    lease_options,
    plain,
    plural,
    warn,
    write,
)
from gpupool_sync.cli._running import (
    BY_SIGNAL,
    ENDING,
    LOOK,
    Asking,
    Background,
    Event,
    Signals,
    on_our_terminal,
    our_failure,
    say,
    start_failed,
    stop_here,
    visible_as,
    wake,
    working_pool,
)
from gpupool_sync.display import waiting_line
from gpupool_sync.errors import GPUPoolError

if TYPE_CHECKING:
    from rich.progress import Progress

    from gpupool_sync.pool import GPUPool
    from gpupool_sync.status import Explanation

#: Exit status if more jobs failed than can be counted in it, as of GNU parallel.
MANY = 101
#: Seconds of waiting after which a line says what for, and between two such lines.
FIRST_WORD = 2.0
NEXT_WORD = 60.0
#: Failed jobs that are listed.
LISTED = 50

_FIELD = re.compile(r"\{(#|[1-9][0-9]*)?\}")


@attrs.define(eq=False)
class _Job:
    """One command; `failure` says how the last attempt ended, None: well, or not yet."""

    number: int
    values: tuple[str, ...]
    command: Sequence[str]
    attempts: int = 0
    failure: str | None = None
    process: subprocess.Popen[Any] | None = None
    asking: Asking | None = None
    gpu: Any = None
    lost: str | None = None
    told: bool = False  # that the lease is lost
    kill_at: float = float("inf")
    out: IO[bytes] | None = None
    err: IO[bytes] | None = None
    log: str | None = None

    @property
    def title(self) -> str:
        return f"job {self.number} ({' '.join(self.values)})"

    def signal(self, number: int) -> None:
        """To all processes of the job, which are a group of their own."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def end(self, grace: float) -> None:
        """SIGTERM now, SIGKILL later; repeated calls do not put it off."""
        if self.kill_at == float("inf"):
            self.kill_at = time.monotonic() + grace
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # one that is stopped would not hear it


@attrs.frozen
class _Plan:
    """The options."""

    terms: Terms
    limit: int | None
    retries: int
    halt: str


@click.command(context_settings={"allow_interspersed_args": False})
@endpoints_option
@lease_options
@click.option(
    "-a",
    "--arg-file",
    "files",
    multiple=True,
    type=click.File("r"),
    metavar="FILE",
    help="Values, one a line; - is stdin; repeatable.  [default: those after :::, else stdin]",
)
@click.option("-j", "--jobs", "limit", type=Count(min=1), metavar="N", help="So many at once.  [default: any number]")
@click.option(
    "--retries",
    type=Count(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Run a job that failed up to N more times.",
)
@click.option(
    "--halt",
    type=click.Choice(["never", "soon", "now"]),
    default="never",
    show_default=True,
    help="When a job has failed: start no more (soon), and end those that run (now).",
)
@click.option(
    "--logs",
    metavar="DIRECTORY",
    type=click.Path(file_okay=False),
    help="Write what each job says to a file there.  [default: to stdout and stderr, whole at its end]",
)
@click.option("--dry-run", is_flag=True, help="Print the commands and run nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND... [::: VALUE...]...")
def map(
    endpoints: str | None,
    terms: Terms,
    files: Sequence[IO[str]],
    limit: int | None,
    retries: int,
    halt: str,
    logs: str | None,
    dry_run: bool,
    command: tuple[str, ...],
) -> int:
    """
    Run a command once for each value, each on a GPU of its own, as many at once as GPUs come free.

    \b
    gpupool-sync map 'python train.py --lr {}' ::: 0.1 0.01 0.001
    gpupool-sync map python train.py --lr {1} --seed {2} ::: 0.1 0.01 ::: 1 2 3

    {} is the value, {1} and {2} that of the first and second list, {#} the number of the job; without any of them the
    value comes last. Several lists: every combination. A command that is one word is run by the shell, with the values
    quoted; otherwise no shell sees it.

    Exit status: how many jobs failed, 101 for more than 100; 124 no GPU came in time; 125 something else went wrong;
    128+N ended by signal N.
    """
    jobs = _jobs(command, files)
    if dry_run:
        for job in jobs:
            click.echo(job.command[2] if _by_shell(job.command) else shlex.join(job.command))
        return 0
    if not jobs:
        say("no values, so there is nothing to run")
        return 0
    plan = _Plan(terms, limit, retries, halt)
    if logs is not None:
        _name_logs(jobs, logs)
    try:
        with Signals(*ENDING) as signals, visible_as(terms.visible), working_pool(endpoints, progress=False) as pool:
            with _Screen(len(jobs)) as screen:
                queue = _Queue(pool, jobs, plan, signals, screen)
                try:
                    queue.run()
                finally:
                    queue.end_all()
            status = queue.report()
            signals.end()
            return status
    except GPUPoolError as exc:
        return our_failure(exc)


# -- jobs --------------------------------------------------------------------------------------------------------


def _by_shell(command: Sequence[str]) -> bool:
    return len(command) == 3 and tuple(command[:2]) == _SHELL


_SHELL = ("/bin/sh", "-c")


def _jobs(words: Sequence[str], files: Sequence[IO[str]]) -> list[_Job]:
    lists: list[list[str]] = [[line.rstrip("\r\n") for line in file if line.strip()] for file in files]
    command: list[str] = []
    into = command
    for word in words:
        if word == ":::":
            into = []
            lists.append(into)
        else:
            into.append(word)
    if not command:
        raise click.UsageError("there is no command before :::")
    if not lists:
        if sys.stdin.isatty():
            raise click.UsageError("no values: give them after :::, with -a FILE, or on stdin")
        lists = [[line.rstrip("\r\n") for line in sys.stdin if line.strip()]]
    template = command
    if not any(_FIELD.search(word) for word in command):
        fields = [f"{{{number}}}" for number in range(1, len(lists) + 1)]
        template = [" ".join([*command, *fields])] if len(command) == 1 else [*command, *fields]
    return [
        _Job(number, values, _filled(template, number, values))
        for number, values in enumerate(itertools.product(*lists), 1)
    ]


def _filled(template: Sequence[str], number: int, values: tuple[str, ...]) -> list[str]:
    quote = shlex.quote if len(template) == 1 else str

    def value(field: re.Match[str]) -> str:
        name = field.group(1)
        if name == "#":
            return str(number)
        if name is None:
            return " ".join(quote(each) for each in values)
        if int(name) > len(values):
            raise click.UsageError(f"{field.group()}: there is no such list of values, only {len(values)}")
        return quote(values[int(name) - 1])

    filled = [_FIELD.sub(value, word) for word in template]
    return [*_SHELL, *filled] if len(template) == 1 else filled


def _name_logs(jobs: Sequence[_Job], directory: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as exc:
        raise click.UsageError(f"--logs {directory}: {exc.strerror}") from None
    width = len(str(len(jobs)))
    for job in jobs:
        slug = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(job.values))[:60]
        job.log = os.path.join(directory, f"{job.number:0{width}d}-{slug}.log")


# -- the queue -----------------------------------------------------------------------------------------------------


class _Queue:
    """All on the main thread, but for the wait for a GPU: one at a time, so that others have their turn as well."""

    def __init__(self, pool: GPUPool, jobs: Sequence[_Job], plan: _Plan, signals: Signals, screen: _Screen) -> None:
        self._pool = pool
        self._plan = plan
        self._signals = signals
        self._screen = screen
        self._jobs = jobs
        self._todo = deque(jobs)
        self._running: list[_Job] = []
        self._failed: list[_Job] = []
        self._done = 0
        self._asking: Asking | None = None
        self._explaining: Background[Explanation] | None = None
        self._explain_at = FIRST_WORD  # seconds of waiting
        self._stopping: str | None = None  # why no more are started
        self._signal: int | None = None  # that ended all
        self._error: GPUPoolError | None = None  # why no GPU can be had
        self._releasing: list[threading.Thread] = []

    def run(self) -> None:
        """Until all have ended, or are not to begin any more."""
        while self._running or (self._todo and self._stopping is None):
            self._ask()
            if self._asking is not None and self._asking.done:
                self._begin()
            for job in list(self._running):
                self._look_at(job)
            self._tell()
            self._screen.show(self._done, len(self._running), len(self._failed), self._asking is not None)
            if self._running or self._asking is not None:
                event = self._signals.wait(LOOK)
                if event is not None:
                    self._serve(event)

    def _ask(self) -> None:
        full = self._plan.limit is not None and len(self._running) >= self._plan.limit
        if self._stopping is not None or not self._todo or self._asking is not None or full:
            return

        def on_lost(gpu: Any) -> None:
            for job in list(self._running):
                if job.gpu is not None and job.gpu._tie.grant is gpu._tie.grant:
                    job.lost = f"the lease on {gpu._names()} is lost ({gpu._tie.grant.why_lost()})"
            wake()

        self._asking = Asking(self._pool, self._plan.terms, on_lost)
        self._explain_at = FIRST_WORD

    def _tell(self) -> None:
        """With nothing running it is worth a line now and then what it waits for."""
        asking = self._asking
        if asking is None or self._running:
            return
        if self._explaining is None and asking.waited >= self._explain_at:
            self._explaining = Background(lambda: self._pool.explain(**self._plan.terms.request))
        if self._explaining is not None and self._explaining.done:
            explaining, self._explaining = self._explaining, None
            self._explain_at = asking.waited + NEXT_WORD
            with contextlib.suppress(GPUPoolError):
                # We are the one of this pool that waits.
                explanation = attrs.evolve(explaining.result(), waiting=0)
                say(waiting_line(explanation, asking.waited, asking.place))

    def _stop_asking(self) -> None:
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.give_up()

    def _stop(self, why: str) -> None:
        self._stopping = self._stopping or why
        self._stop_asking()

    def _begin(self) -> None:
        assert self._asking is not None
        asking, self._asking = self._asking, None
        try:
            gpu = asking.result()
        except GPUPoolError as exc:
            # Those that run have their GPUs.
            self._error = exc
            self._stop("no GPU can be had")
            return
        job = self._todo.popleft()
        # The lease lasts as long as what it came by.
        job.asking, job.gpu = asking, gpu
        job.attempts, job.failure, job.kill_at = job.attempts + 1, None, float("inf")
        job.lost, job.told = None, False
        try:
            if job.log is not None:
                job.out = open(job.log, "ab" if job.attempts > 1 else "wb")  # noqa: SIM115 - closed at its end
            else:
                job.out, job.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
            with self._signals.as_before():
                job.process = gpu.popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=job.out,
                    stderr=subprocess.STDOUT if job.err is None else job.err,
                    start_new_session=True,  # Ctrl-C is ours, and a job can be ended with all that it started
                )
        except OSError as exc:
            job.failure = f"exit status {start_failed(job.command, exc)}"
            self._over(job)
        except GPUPoolError as exc:
            job.failure = str(exc)
            self._over(job)
        else:
            self._running.append(job)

    def _look_at(self, job: _Job) -> None:
        assert job.process is not None
        code = job.process.poll()
        if code is None:
            if job.lost is not None and not job.told:
                job.told = True
                if self._plan.terms.on_lost == "kill":
                    complain(f"{job.title}: {job.lost}; it is ended")
                    job.end(self._plan.terms.grace)
                else:
                    warn(f"{job.title}: {job.lost}; it goes on")
            if time.monotonic() >= job.kill_at:
                job.signal(signal.SIGKILL)
            return
        self._running.remove(job)
        if job.lost is not None and self._plan.terms.on_lost == "kill":
            job.failure = job.lost
        elif code != 0:
            job.failure = f"exit status {code}" if code > 0 else f"ended by {_signal_name(-code)}"
        self._over(job)

    def _over(self, job: _Job) -> None:
        """It has ended, or did not start."""
        if job.gpu is not None:
            # An arbiter that does not answer must not hold up the others.
            thread = threading.Thread(target=job.gpu.release, name="gpupool-release", daemon=True)
            thread.start()
            self._releasing = [*(each for each in self._releasing if each.is_alive()), thread]
        job.process = job.gpu = job.asking = None
        self._screen.write(job)
        if job.failure is None:
            self._done += 1
        elif self._signal is None and self._stopping is None and job.attempts <= self._plan.retries:
            say(f"{job.title}: {job.failure}; once more")
            self._todo.append(job)
        else:
            self._done += 1
            self._failed.append(job)
            if self._plan.halt != "never":
                self._stop("a job has failed")
            if self._plan.halt == "now":
                for other in self._running:
                    other.end(self._plan.terms.grace)

    def _serve(self, event: Event) -> None:
        if event.number == signal.SIGTSTP:
            # They are in groups of their own, which the terminal's keys do not reach.
            for job in self._running:
                job.signal(signal.SIGSTOP)
            stop_here()
            for job in self._running:
                job.signal(signal.SIGCONT)
        elif event.number != signal.SIGCONT:
            # Whoever asks twice does not want to wait.
            grace = self._plan.terms.grace if self._signal is None else 0.0
            self._signal = event.number
            self._stop(f"{_signal_name(event.number)} came")
            for job in self._running:
                if grace == 0.0:
                    job.kill_at = 0.0
                job.end(grace)

    def end_all(self) -> None:
        """In whatever way `run` ended: nothing is left that waits or runs."""
        self._stop("this program ends")
        for job in self._running:
            job.end(self._plan.terms.grace)
        for job in self._running:
            assert job.process is not None
            try:
                job.process.wait(max(0.0, job.kill_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.signal(signal.SIGKILL)
                job.process.wait()
        for thread in self._releasing:
            thread.join(1.0)

    def report(self) -> int:
        """Say what failed; returns the exit status."""
        if self._failed:
            complain(f"{len(self._failed)} of {plural(len(self._jobs), 'job')} failed:")
            for job in self._failed[:LISTED]:
                log = "" if job.log is None else f", see {job.log}"
                write(f"  {plain(job.title)}: {plain(job.failure)}{plain(log)}")
            if len(self._failed) > LISTED:
                write(f"  and {len(self._failed) - LISTED} more")
        if self._todo:
            say(f"{plural(len(self._todo), 'job')} did not begin, because {self._stopping}")
        if self._signal is not None:
            return BY_SIGNAL + self._signal
        if self._error is not None:
            return our_failure(self._error)
        return min(len(self._failed), MANY)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


# -- the screen ----------------------------------------------------------------------------------------------------


class _Screen:
    """A bar on stderr, where that is a terminal; and what the jobs said, whole, to stdout and stderr."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> _Screen:
        if on_our_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True, markup=False, highlight=False, emoji=False),
                # What goes to stdout may be piped to a program: it is never this class's to draw.
                redirect_stdout=False,
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._number)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, running: int, failed: int, asking: bool) -> None:
        """How far it is."""
        if self._bar is not None:
            text = f"{running} running" + (f", {failed} failed" if failed else "")
            text += ", waiting for a GPU" if asking else ""
            self._bar.update(self._task, completed=done, description=text)

    def write(self, job: _Job) -> None:
        """What the job said."""
        out, job.out = job.out, None
        err, job.err = job.err, None
        with contextlib.ExitStack() as closing:
            for file in (out, err):
                if file is not None:
                    closing.enter_context(file)
            if out is None or err is None:
                return
            with self._away():
                for file, stream in ((out, sys.stdout), (err, sys.stderr)):
                    file.seek(0)
                    stream.flush()
                    shutil.copyfileobj(file, stream.buffer)
                    stream.flush()

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        """Without the bar: both are on one screen."""
        if self._bar is None:
            yield
            return
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()
