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
import yaml

from gpupool_sync.cli import main
from gpupool_sync.leases import mounts
from gpupool_sync.leases.host import default_directory
from gpupool_sync.server import setup

SERVE = [sys.executable, "-m", "gpupool_sync", "serve"]


def printed(capsys, *arguments) -> str:
    assert main(["service", *arguments]) == 0
    return capsys.readouterr().out


#: Values with what systemd, cron, the shell, YAML and compose would read as theirs.
ODD = [
    '50% of "it" \\d',
    "a 'b' \"c\" %h $HOME ${HOME} $$ %%",
    "a\\%b",
    "two\\\\",
    "\\",
    "# none: {of} [them], - ~",
    "Büro \U0001f600",
    "next\x85line \u2028 and \x7f",
    "tab\there",
    "",
]


def options_of(values) -> list[str]:
    return [word for value in values for word in ("--name", value)]


def systemd_words(unit: str) -> list[str]:
    """The command that systemd makes of it."""
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str
    parsed.read_string(unit)
    command = parsed["Service"]["ExecStart"]
    assert not re.search(r"(?<!%)%(%%)*(?!%)", command), "a specifier"
    quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', command)
    assert " ".join(f'"{word}"' for word in quoted) == command
    words = [re.sub(r'\\(x[0-9a-f]{2}|[n"\\])', _unescaped, word) for word in quoted]
    return [word.replace("%%", "%").replace("$$", "$") for word in words]


def _unescaped(match) -> str:
    return {"n": "\n"}.get(match[1]) or (chr(int(match[1][1:], 16)) if match[1][0] == "x" else match[1])


def test_a_unit_of_systemd(capsys):
    """The command has the options that were given, whatever is in them; by default other machines are let in."""
    text = printed(capsys, "--port", "8001", *options_of([*ODD, "two\nlines"]))
    assert systemd_words(text) == [*SERVE, "--port", "8001", *options_of([*ODD, "two\nlines"])]
    assert "WantedBy=default.target" in text.splitlines()
    assert systemd_words(printed(capsys)) == [*SERVE, "--host", "0.0.0.0"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(capsys, tmp_path):
    """By its own judgement."""
    unit = tmp_path / "gpupool-sync.service"
    unit.write_text(printed(capsys, *options_of([*ODD, "two\nlines"])))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert unit.name not in done.stderr


def cron_command(line: str, also: str) -> str:
    """What a cron gives to the shell that takes the backslash away before a % and before *also*."""
    command, escaped = "", False
    for mark in line:
        if escaped and mark in ("%", also):
            command = command[:-1] + mark
        else:
            assert escaped or mark != "%", "the end of the command"
            command += mark
        escaped = mark == "\\" and not escaped
    return command


@pytest.mark.parametrize("also", ["\\", ""], ids=["vixie", "cronie"])
def test_a_line_for_cron(capsys, also):
    """One line; a percent sign would end it. Crons differ in what they make of two backslashes."""
    line = printed(capsys, "--format", "cron", *options_of(ODD)).split("\n")[-2]
    assert line.startswith("@reboot ")
    command = cron_command(line.removeprefix("@reboot "), also).partition(" >> ")[0]
    assert shlex.split(command) == [*SERVE, *options_of(ODD)]
    words = subprocess.run(f"printf '%s\\0' {command}", shell=True, capture_output=True, check=True, timeout=60).stdout
    assert words.decode().split("\0")[:-1] == [*SERVE, *options_of(ODD)]


def test_a_line_for_cron_is_one_line(capsys):
    """There is no way to have a line break in it."""
    assert main(["service", "--format", "cron", "--name", "two\nlines"]) == 2
    assert "line break" in capsys.readouterr().err


def composed(node):
    """What compose makes of what stands in its file: in every string $ is an escape."""
    if isinstance(node, dict):
        return {key: composed(value) for key, value in node.items()}
    if isinstance(node, list):
        return list(map(composed, node))
    if not isinstance(node, str):
        return node
    assert "$" not in node.replace("$$", ""), "a variable"
    return node.replace("$$", "$")


def compose_service(capsys, *arguments) -> dict:
    """What a library of YAML reads."""
    return yaml.safe_load(printed(capsys, "--format", "compose", *arguments))["services"]["gpupool-sync"]


def test_a_file_for_compose(capsys):
    """What it says without a library to read it with."""
    text = printed(capsys, "--format", "compose")
    assert f'GPU_POOL_LOCK_DIR: "{default_directory()}"' in text
    assert 'command: ["--host", "0.0.0.0"]' in text
    text = printed(capsys, "--format", "compose", "--name", '50% of "it" \\d $HOME')
    assert r'command: ["--name", "50% of \"it\" \\d $$HOME"]' in text


def test_compose_mounts_what_is_there_at_each_boot(capsys, monkeypatch, tmp_path):
    """The place of the lock directory, in which the server makes it for all; Docker would make it for root alone."""
    monkeypatch.setattr(mounts.Mount, "is_in_memory", False)
    place = tmp_path / "a $place"
    place.mkdir()
    place.chmod(0o1777)
    monkeypatch.setenv("GPU_POOL_LOCK_DIR", f"{place}/locks")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = composed(compose_service(capsys))
    locks, secrets = found["volumes"]
    assert locks["type"] == secrets["type"] == "bind"
    assert locks["source"] == locks["target"] == str(place)
    assert locks["bind"]["create_host_path"] is secrets["bind"]["create_host_path"] is False
    assert not locks.get("read_only")
    assert found["environment"]["GPU_POOL_LOCK_DIR"] == f"{place}/locks"
    assert secrets["source"] == str(setup.default_directory())
    assert secrets["target"] == f"{found['environment']['XDG_CONFIG_HOME']}/gpupool-sync"
    assert secrets["read_only"] is True


def test_compose_mounts_the_directory_itself_where_its_place_is_not_for_all(capsys, monkeypatch, tmp_path):
    """The server could not make it there: what does it at each boot is said."""
    monkeypatch.setenv("GPU_POOL_LOCK_DIR", f"{tmp_path}/my locks")
    assert f'd "{tmp_path}/my locks" 1777 root root -' in printed(capsys, "--format", "compose")
    locks, _ = composed(compose_service(capsys))["volumes"]
    assert locks["source"] == locks["target"] == f"{tmp_path}/my locks"
    assert locks["bind"] == {"create_host_path": False}


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_compose_mounts_no_place_that_is_gone_after_a_boot(capsys, monkeypatch, tmp_path, is_in_memory):
    """A directory in memory that somebody made. The lock directory itself is none, if its name ends in a slash."""
    place = tmp_path / "place"
    for directory in (place, place / "locks"):
        directory.mkdir()
        directory.chmod(0o1777)
    monkeypatch.setattr(mounts.Mount, "is_in_memory", is_in_memory)
    monkeypatch.setenv("GPU_POOL_LOCK_DIR", f"{place}/locks/")
    text = printed(capsys, "--format", "compose")
    assert (f'd "{place}/locks" 1777' in text) is is_in_memory
    locks, _ = composed(compose_service(capsys))["volumes"]
    assert locks["source"] == locks["target"] == (f"{place}/locks" if is_in_memory else str(place))


@pytest.mark.parametrize(("how", "parent"), [("rprivate", True), ("rslave", True), (None, False)])
def test_compose_mounts_as_a_server_knows_it_again(capsys, monkeypatch, tmp_path, how, parent):
    """A tmpfs that is mounted whole must be a slave of the machine's, to be known from one of the container's own."""
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(mounts.Mount, "is_in_memory", False)
    monkeypatch.setenv("GPU_POOL_LOCK_DIR", f"{tmp_path}/locks")
    monkeypatch.setattr(mounts, "bind_propagation", lambda fd, path: how)
    locks, _ = composed(compose_service(capsys))["volumes"]
    assert locks["source"] == (str(tmp_path) if parent else f"{tmp_path}/locks")
    assert locks["bind"].get("propagation", "rprivate") == (how or "rprivate")


def test_the_command_for_compose(capsys):
    """The options that were given, whatever is in them."""
    options = options_of([*ODD, "two\nlines"])
    assert composed(compose_service(capsys, *options)["command"]) == options


@pytest.mark.checkout
def test_the_dockerfile_copies_what_the_package_needs():
    """What it names is there, and what it starts takes the options that it gives."""
    root = Path(__file__).resolve().parent.parent
    text = (root / "Dockerfile").read_text()
    for line in text.splitlines():
        if line.startswith("COPY ") and not line.startswith("COPY --from"):
            assert all((root / word).exists() for word in line.split()[1:-1]), line
    assert 'CMD ["--host", "0.0.0.0"]' in text
