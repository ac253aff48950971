"""``gpupool-sync service``: what starts the server with the machine, to be put where it belongs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys

import click

#: What systems make at each boot, where it is on a file system in memory.
_AT_EACH_BOOT = ("/run/lock", "/var/lock", "/tmp", "/dev/shm")  # noqa: S108 - to compare with

#: A server is for other machines, unless it is told otherwise.
DEFAULT = ("--host", "0.0.0.0")  # noqa: S104


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--format",
    "form",
    type=click.Choice(["systemd", "cron", "compose"]),
    default="systemd",
    show_default=True,
    help="A user unit of systemd, a line for crontab, or a file for docker compose.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def service(form: str, options: tuple[str, ...]) -> None:
    """
    Print what starts `gpupool-sync serve OPTIONS` with this machine; nothing is installed.

    Where it goes is in its first lines.
    """
    made = {"systemd": _systemd, "cron": _cron, "compose": _compose}[form](options or DEFAULT)
    click.echo(made, nl=False)


def _program() -> list[str]:
    """The same installation as this one, by its full path: services have a PATH of their own."""
    return [sys.executable, "-m", "gpupool_sync", "serve"]


def _systemd_word(word: str) -> str:
    """Quoted, with its specifiers and escapes doubled."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", word) + '"'


def _cron_word(word: str) -> str:
    """
    Quoted for the shell, with a backslash before each percent sign, which cron takes away again.

    Of two backslashes some crons take one away as well: so none stands before another, or before a percent sign of the
    word, as between the two the quotes are closed and opened.
    """
    return re.sub(r"\\(?=[\\%])", r"\\''", shlex.quote(word)).replace("%", r"\%")


def _compose_word(word: str) -> str:
    """A scalar of YAML in double quotes, in which compose then reads ``$``."""
    text = json.dumps(word.replace("$", "$$"), ensure_ascii=False)
    # Of JSON's strings YAML takes all but these: it has no surrogates, and reads some of the others as line breaks.
    return "".join(mark if mark.isprintable() else f"\\U{ord(mark):08x}" for mark in text)


def _systemd(options: tuple[str, ...]) -> str:
    command = " ".join(map(_systemd_word, (*_program(), *options))).replace("$", "$$")  # no variables
    return f"""\
# ~/.config/systemd/user/gpupool-sync.service; then
#   systemctl --user daemon-reload && systemctl --user enable --now gpupool-sync
#   loginctl enable-linger    # else it ends with your last session
[Unit]
Description=GPU statistics and leases of this machine
After=network.target

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=2
# Locks are shared with all users of the machine: no private /tmp, no protected /run/lock.
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


def _cron(options: tuple[str, ...]) -> str:
    if any("\n" in word for word in options):
        raise click.UsageError("a line for cron can have no line break in it")
    command = " ".join(map(_cron_word, (*_program(), *options)))
    return f"""\
# One line for: crontab -e
@reboot {command} >> "$HOME/gpupool-sync.log" 2>&1
"""


def _compose(options: tuple[str, ...]) -> str:
    from gpupool_sync.leases.host import default_directory
    from gpupool_sync.server import setup

    locks = default_directory()
    place, propagation, about = _place_of(locks)
    source, secrets = _compose_word(place), _compose_word(str(setup.default_directory()))
    bind = f"{{propagation: {propagation}, create_host_path: false}}" if propagation else "{create_host_path: false}"
    return f"""\
# compose.yaml, beside the Dockerfile of the project; then: docker compose up -d    # of version 2
# The directory of the locks is the host's: processes outside the container and the server exclude one another by it.
{about}
# The secrets are those of: gpupool-sync serve --init; without them leave their mount out, and no leases are granted.
services:
  gpupool-sync:
    build: .
    command: [{", ".join(map(_compose_word, options))}]
    network_mode: host
    pid: host
    restart: unless-stopped
    user: "{os.getuid()}:{os.getgid()}"
    volumes:
      - type: bind
        source: {source}
        target: {source}
        bind: {bind}
      - type: bind
        source: {secrets}
        target: /config/gpupool-sync
        read_only: true
        bind: {{create_host_path: false}}
    environment:
      XDG_CONFIG_HOME: /config
      GPU_POOL_LOCK_DIR: {_compose_word(locks)}
    deploy:
      resources:
        reservations:
          devices: [{{driver: nvidia, count: all, capabilities: [utility]}}]
"""


def _place_of(locks: str) -> tuple[str, str | None, str]:
    """
    What to mount so that a container has the lock directory after each boot, too; how; and what to say of it.

    Most are on a tmpfs and gone then, and Docker makes what is missing for root alone. So it is the directory above
    where all may write: that one is there, and the server makes the other with the mode that all need.
    """
    from gpupool_sync.leases import mounts

    locks = os.path.normpath(locks)
    above = os.path.dirname(locks)
    with contextlib.suppress(OSError):
        fd = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mount = mounts.mount_of(fd)
            lasts = mount is None or not mount.is_in_memory or os.path.realpath(above) in (mount.point, *_AT_EACH_BOOT)
            is_for_all = lasts and os.fstat(fd).st_mode & 0o1002 == 0o1002
            propagation = mounts.bind_propagation(fd, above) if is_for_all else None
        finally:
            os.close(fd)
        if propagation is not None:
            about = "# Mounted is the one above it: that is there at each boot, and the server makes the other for all."
            if propagation == "rprivate":  # as Docker does it anyhow
                return above, None, about
            about += "\n# As a slave of the host's it is known from a tmpfs of the container's own."
            return above, propagation, about
    line = f"d {_systemd_word(locks)} 1777 root root -"
    return (
        locks,
        None,
        "# It must be there before the container starts, or that fails. What makes it, now and at each boot, as root:\n"
        f"#   printf '%s\\n' {shlex.quote(line)} > /etc/tmpfiles.d/gpupool-sync.conf && systemd-tmpfiles --create",
    )
