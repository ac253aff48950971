"""The migration guide runs, step by step."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gpupool_sync import GPUWorkerPoolClient
from gpupool_sync.cli import main
from gpupool_sync.testing import FakeFleet
from helpers import environment_after, resolve_to
from predecessor_server import PredecessorFleet

GUIDE = Path(__file__).parent.parent / "docs" / "migration.md"

pytestmark = [
    pytest.mark.real,
    pytest.mark.checkout,
    # The hosts have names here, so they are no loopback addresses; and the guide says that this warning comes.
    pytest.mark.filterwarnings("ignore::gpupool_sync.errors.ExclusivityWarning"),
]


def sections():
    """Title and blocks (language, text) of each part; empty where only the installed package is tested."""
    if not GUIDE.exists():
        return {}
    _, *parts = re.split(r"^## ", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        part.partition("\n")[0]: re.findall(r"^```(\w+)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL) for part in parts
    }


def test_the_guide_has_its_three_moves():
    assert list(sections()) == [
        "From the predecessor",
        "From one endpoint to many",
        "From statistics only to leases",
    ]


@pytest.mark.parametrize("title", sections())
def test_the_guide_runs(title, monkeypatch, capsys):
    ours = title == "From statistics only to leases"
    names: dict[str, object] = {}
    ran = 0
    with FakeFleet(["4xA100"]) if ours else PredecessorFleet([4, 2]) as fleet:
        resolve_to(monkeypatch, {f"gpu{number}": url for number, url in enumerate(fleet.urls, 1)})
        for language, text in sections()[title]:
            if language == "python":
                exec(compile(text, f"{GUIDE.name}: {title}", "exec"), names)
            elif language == "sh":
                for name, value in environment_after(text).items():
                    if "redis" in value:
                        with monkeypatch.context() as patch:  # there is none; it has to be understood all the same
                            patch.setenv(name, value)
                            assert GPUWorkerPoolClient("http://gpu1:8000").pool._state.settings.lease_store == value
                    else:
                        monkeypatch.setenv(name, value)
            elif language == "console":
                if ours:
                    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", "http://gpu1:8000")
                commands(text)
            else:
                assert language == "diff"
                continue
            ran += 1
    assert ran >= 3
    assert "gpu1-8000" in capsys.readouterr().out


def commands(text):
    for line in text.splitlines():
        program, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
        if program == "pip":
            assert arguments == ["install", "gpupool-sync[server]"]
            continue
        assert program == "gpupool-sync"
        if arguments[0] == "serve":
            arguments.append("--help")  # it would run for ever; this refuses options that it does not have
        # 1: it works, and has found something to complain about.
        assert main(arguments) in (0, 1), line


def test_the_diff_of_the_guide_is_only_async_and_await():
    """Line by line: what is deleted is the predecessor's name, the event loop, and the two words."""
    ((_, diff),) = [block for block in sections()["From the predecessor"] if block[0] == "diff"]
    before = [line[1:] for line in diff.splitlines() if line.startswith("-")]
    after = [line[1:] for line in diff.splitlines() if line.startswith("+")]

    def synchronous(line):
        line = re.sub(r"\b(async|await) ", "", line).replace("gpu_worker_pool import", "gpupool_sync import")
        return re.sub(r"asyncio\.run\((.*)\)$", r"\1", line)

    assert [synchronous(line) for line in before] == after
