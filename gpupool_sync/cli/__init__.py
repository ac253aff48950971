"""The command line: ``gpupool-sync``, also ``python -m gpupool_sync``.

Exit status: 0 all is well; 1 an error of ours, or a check that found something; 2 a wrong command line, or an optional
dependency that is missing; 130 Ctrl-C; ``run`` and ``map`` have more.  With ``--json`` exactly one JSON value
is printed, errors included.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import click

from gpupool_sync.cli._common import Call, complain, print_json
from gpupool_sync.errors import GPUPoolError, MissingExtra

#: Command -> the module that has it, under the command's own name, and one line for ``--help``. Imported when used: a
#: command whose extra is missing must not break the others, nor what heavy imports it needs slow them down.
COMMANDS = {
    "status": ("status", "Show the servers, their GPUs, and who holds them."),
    "leases": ("leases", "Show who holds which GPU, since when, and who waits."),
    "release": ("release", "Take GPUs back from whoever holds them."),
    "run": ("run", "Run a command on a GPU, as soon as there is one."),
    "map": ("map", "Run a command once for each value, each on a GPU of its own."),
    "why": ("why", "Explain, GPU by GPU, why a request is or is not granted now."),
    "doctor": ("doctor", "Check configuration, servers and this machine; say what to do."),
    "demo": ("demo", "Share out 14 simulated GPUs, lose a server, take it back."),
    "serve": ("serve", "Serve the statistics of this machine's GPUs, or of simulated ones."),
    "service": ("service", "Print what starts the server with this machine: systemd, cron or compose."),
}


class _LazyGroup(click.Group):
    """Knows its commands by a table and imports each at its first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            meant = difflib.get_close_matches(args[0], COMMANDS, 1) if args else []
            if meant and "Did you mean" not in exc.message:
                raise click.UsageError(f"{exc.message} Did you mean {meant[0]!r}?", ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command for its first line of help.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings come from the environment, such as GPU_SERVICE_ENDPOINTS=http://server1:8000,http://server2:8000; "
    "docs/configuration.md lists them all.",
)
@click.version_option(package_name="gpupool-sync", prog_name="gpupool-sync")
def cli() -> None:
    """One GPU that nobody else has: a blocking pool of the GPUs of many machines."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command line and return its exit status.

    Args:
        argv: the arguments after the program's name; default those of this process.
    """
    call = Call()
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must cost a question mark, not the answer.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        status = _run(argv, call)
        # Here and not at the interpreter's exit, where a closed pipe could only be complained about.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _mute(sys.stdout)
        return 1


def _run(argv: Sequence[str] | None, call: Call) -> int:
    args = None if argv is None else list(argv)
    try:
        status = cli.main(args=args, prog_name="gpupool-sync", obj=call, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as exc:
        if "--json" in (sys.argv[1:] if args is None else args):
            # Whoever reads JSON reads it also when the options were wrong.
            print_json({"error": {"type": "UsageError", "message": exc.format_message()}})
            return 1
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SystemExit as exc:
        # click and rich end so when whoever read our output has gone.
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except GPUPoolError as exc:
        if call.as_json:
            print_json({"error": {"type": type(exc).__name__, "message": str(exc)}})
        else:
            complain(exc)
        return 2 if isinstance(exc, MissingExtra) else 1


def _mute(stream: object) -> None:
    """Point *stream* at nothing, so that flushing what is left in it does not fail once more."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())  # type: ignore[attr-defined]
        os.close(nothing)
