"""``gpupool-sync service``: what it prints starts the server, as it says."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpupool_sync.cli import main
from gpupool_sync.leases.host import default_directory

SERVE = [sys.executable, "-m", "gpupool_sync", "serve"]


def printed(capsys, *arguments) -> str:
    assert main(["service", *arguments]) == 0
    return capsys.readouterr().out


def test_a_unit_of_systemd(capsys):
    """The command has the options that were given, whatever is in them; by default other machines are let in."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(printed(capsys, "--port", "8001", "--name", 'a "b" %h $HOME'))
    command = unit["Service"]["ExecStart"]
    words = shlex.split(command.replace("%%", "%").replace("$$", "$"))
    assert words == [*SERVE, "--port", "8001", "--name", 'a "b" %h $HOME']
    assert "%%h" in command
    assert "$$HOME" in command
    assert unit["Install"]["WantedBy"] == "default.target"
    assert '"--host" "0.0.0.0"' in printed(capsys)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(capsys, tmp_path):
    """By its own judgement."""
    unit = tmp_path / "gpupool-sync.service"
    unit.write_text(printed(capsys))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert str(unit) not in done.stderr


def test_a_line_for_cron(capsys):
    """One line; a percent sign would end it."""
    line = printed(capsys, "--format", "cron", "--name", "50% of it").splitlines()[-1]
    assert line.startswith("@reboot ")
    command = line.removeprefix("@reboot ").partition(" >> ")[0]
    assert not re.search(r"(?<!\\)%", command)
    assert shlex.split(command.replace(r"\%", "%")) == [*SERVE, "--name", "50% of it"]


def test_a_file_for_compose(capsys):
    """The lock directory is the host's own, at the same place."""
    text = printed(capsys, "--format", "compose")
    locks = default_directory()
    assert f"      - {locks}:{locks}\n" in text
    assert f"GPU_POOL_LOCK_DIR: {locks}" in text
    assert 'command: ["--host", "0.0.0.0"]' in text


@pytest.mark.checkout
def test_the_dockerfile_copies_what_the_package_needs():
    """What it names is there, and what it starts takes the options that it gives."""
    root = Path(__file__).resolve().parent.parent
    text = (root / "Dockerfile").read_text()
    for line in text.splitlines():
        if line.startswith("COPY ") and not line.startswith("COPY --from"):
            assert all((root / word).exists() for word in line.split()[1:-1]), line
    assert 'CMD ["--host", "0.0.0.0"]' in text
