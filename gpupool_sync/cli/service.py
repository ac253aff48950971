"""``gpupool-sync service``: what starts the server with the machine, to be put where it belongs."""

from __future__ import annotations

import os
import shlex
import sys

import click

#: Marks of the environment that systemd, cron and compose would read as theirs.
_ESCAPED = str.maketrans({"%": "%%", "$": "$$"})

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


def _systemd(options: tuple[str, ...]) -> str:
    words = (word.translate(_ESCAPED) for word in (*_program(), *options))
    command = " ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words)
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
    # To cron a bare % is a new line.
    command = shlex.join([*_program(), *options]).replace("%", r"\%")
    return f"""\
# One line for: crontab -e
@reboot {command} >> "$HOME/gpupool-sync.log" 2>&1
"""


def _compose(options: tuple[str, ...]) -> str:
    from gpupool_sync.leases.host import default_directory

    words = ", ".join('"' + word.translate(_ESCAPED).replace('"', '\\"') + '"' for word in options)
    locks = default_directory().translate(_ESCAPED)
    return f"""\
# compose.yaml, beside the Dockerfile of the project; then: docker compose up -d
# The directory of the locks is the host's: processes outside the container and the server exclude one another by it.
# The secrets are those of: gpupool-sync serve --init
services:
  gpupool-sync:
    build: .
    command: [{words}]
    network_mode: host
    pid: host
    restart: unless-stopped
    user: "{os.getuid()}:{os.getgid()}"
    volumes:
      - {locks}:{locks}
      - ${{HOME}}/.config/gpupool-sync:/config/gpupool-sync:ro
    environment:
      XDG_CONFIG_HOME: /config
      GPU_POOL_LOCK_DIR: {locks}
    deploy:
      resources:
        reservations:
          devices: [{{driver: nvidia, count: all, capabilities: [utility]}}]
"""
