"""The command line, run as a function where its output matters and as a process where its exit status does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from rich.console import Console

import servers
from gpupool_sync import GPUPool, wire
from gpupool_sync.cli import COMMANDS, main
from gpupool_sync.cli._common import plain, seconds
from gpupool_sync.cli.status import render
from gpupool_sync.clock import boottime
from gpupool_sync.models import GPUFault, GPUReading, HostIdentity, Sample
from gpupool_sync.status import EndpointStatus, Status
from gpupool_sync.testing import FakeFleet
from helpers import eventually


def a_gpu(number: int, uuid: str | None = None, **more: Any) -> GPUReading:
    facts = {"memory_total_mb": 81920.0, "memory_used_mb": 1024.0, "utilization_percent": 3.0, "temperature_c": 41.0}
    return GPUReading(number, more.pop("name", "NVIDIA A100-SXM4-80GB"), uuid, **{**facts, **more})


def summary(*gpus: GPUReading, host: str | None = "sim-one", faults: tuple[GPUFault, ...] = ()) -> bytes:
    """What a server of ours says."""
    identity = HostIdentity(host, f"name-of-{host}", simulated=True) if host is not None else None
    sample = Sample(gpus=gpus, taken_at=boottime(), faults=faults, host=identity)
    return wire.dump(wire.summary_document(sample, timestamp="2026-11-23T12:00:00Z"))


def statistics_only(*gpus: GPUReading) -> bytes:
    """What the predecessor's server says: no UUIDs, no host."""
    document = json.loads(summary(*gpus, host=None))
    known = ("gpu_id", "name", "memory_usage_percent", "utilization_percent")
    document["gpus_summary"] = [{key: entry[key] for key in known} for entry in document["gpus_summary"]]
    for ours in ("protocol", "host", "leases", "gpus_unavailable"):
        del document[ours]
    return json.dumps(document).encode()


@pytest.fixture
def server() -> Iterator[servers.Server]:
    """A server of ours with two GPUs."""
    with servers.Server(servers.answer(summary(a_gpu(0, "GPU-aaaaaa-0"), a_gpu(1, "GPU-aaaaaa-1")))) as running:
        yield running


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line, run in this process."""
    status = main(list(args))
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any]:
    status, out, _ = run(capsys, *args, "--json")
    return status, json.loads(out)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "gpupool_sync", *args]


# -- the command line as such ------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_none_of_them():
    """`--help` is cheap: it loads neither HTTP, nor tables, nor what an extra would have to bring."""
    code = (
        "import sys; from gpupool_sync.cli import main; status = main(['--help']); "
        "heavy = {'requests', 'rich', 'pybreaker', 'fastapi', 'uvicorn', 'gpupool_sync.pool'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["status", "why", "doctor", "demo"])
def test_every_command_explains_its_options(name, capsys):
    """Each option of each command says what it means; those with a value say the default."""
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert "--json" in out
    assert "[default:" in out


def test_the_version_is_printed(capsys):
    """`--version` names the program and its version."""
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert re.fullmatch(r"gpupool-sync, version \d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-command"],
        ["status", "--no-such-option"],
        ["status", "--timeout", "-1"],
        ["status", "--count", "3"],
        ["why", "--count", "0"],
        ["demo", "--jobs", "1000", "--seconds-per-job", "10"],
    ],
)
def test_a_wrong_command_line_exits_2(args, capsys):
    """What click or a command refuses to understand ends with 2 and a line on stderr."""
    status, out, err = run(capsys, *args)
    assert status == 2
    assert out == ""
    assert "Error: " in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["staus"], "Did you mean 'status'?"),
        (["status", "--tiemout", "3"], "--timeout"),  # click has said it in several ways
        (["run", "--timeout", "5s", "--", "true"], "'5s' is not a valid number of seconds"),
        (["why", "--min-free-memory-mb", "8GB"], "'8GB' is not a valid number."),
        (["map", "-j", "many", "true", ":::", "1"], "'many' is not a valid whole number"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistyped_command_line_is_told_in_plain_words(args, words, capsys):
    """What was meant, or what is wrong, without words of the library that reads it."""
    assert words in run(capsys, *args)[2]


@pytest.mark.parametrize("args", [["status", "--watch"], ["why", "--count", "0"], ["doctor", "--no-such-option"]])
def test_a_wrong_command_line_with_json_is_an_object_too(args, capsys):
    """Who reads JSON reads it also when the options were wrong: one object, exit status 1."""
    status, answer = run_json(capsys, *args)
    assert status == 1
    assert answer["error"]["type"] == "UsageError"
    assert answer["error"]["message"]


def test_status_fails_when_no_server_answers(server, capsys):
    """A script can ask `status` whether there is anything to be had: 1 if nobody answers, 0 if somebody does."""
    with servers.refusing() as dead:
        assert run(capsys, "status", "--endpoints", f"dead={dead}")[0] == 1
        assert run(capsys, "status", "--endpoints", f"dead={dead},one={server.url}")[0] == 0


def test_credentials_are_refused_on_the_command_line(capsys):
    """Everybody can read the arguments of a process, so a password there is refused, and not repeated."""
    status, out, err = run(capsys, "status", "--endpoints", "http://ann:hunter2@127.0.0.1:1")
    assert status == 2
    assert "GPU_SERVICE_ENDPOINTS" in err
    assert "hunter2" not in out + err


def test_an_error_of_ours_is_one_line_and_exits_1(capsys):
    """A wrong endpoint is one clear line on stderr, without a traceback."""
    status, out, err = run(capsys, "status", "--endpoints", "ftp://server1")
    assert status == 1
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert "http" in err


def test_an_error_is_an_object_with_json(capsys):
    """With --json an error is the one value on stdout, with its type and its message."""
    status, answer = run_json(capsys, "why", "--memory-mb", "100", "--max-holders", "2")
    assert status == 1
    assert answer["error"]["type"] == "ConfigError"
    assert "memory_mb" in answer["error"]["message"]


def test_settings_that_are_ignored_are_told(server, monkeypatch, capsys):
    """Of two variables that contradict each other one is ignored, and a line on stderr says which."""
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", server.url)
    monkeypatch.setenv("GPU_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    status, out, err = run(capsys, "status")
    assert status == 0
    assert "1 of 1 server healthy" in out
    assert err == "Warning: GPU_SERVICE_ENDPOINTS is set, so GPU_SERVICE_ENDPOINT is ignored\n"


@pytest.mark.real
def test_ctrl_c_ends_quietly_with_130():
    """Ctrl-C while a server hangs ends the command at once, without a traceback."""
    with servers.Server(servers.hang()) as hanging:
        process = subprocess.Popen(
            command("status", "--endpoints", hanging.url, "--timeout", "50"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually(lambda: hanging.connections, 30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert out == ""
    assert err.strip() == ""


@pytest.mark.real
def test_a_reader_that_went_away_causes_no_noise(server):
    """`gpupool-sync status | head -0` complains about nothing."""
    with subprocess.Popen(
        command("status", "--endpoints", server.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_status_tells_of_servers_that_flap_or_are_slow_now_and_then():
    """Seen with --watch; of a server that does well the table says no more than before."""
    well = EndpointStatus("a", "http://a", True, None, 1, 1, 5.0, availability=1.0, response_p95_ms=8.0)
    badly = attrs.evolve(well, breaker_changes=4, availability=0.9876, response_p95_ms=120.0)
    state = Status(2, 2, 2, 2, 0, 0, [well, badly], {})
    console = Console(width=200, file=io.StringIO())
    console.print(render(state))
    one, other = (line for line in console.file.getvalue().splitlines() if "http://a" in line)

    assert ("closed, up" in one, "p95" in one) == (False, False)
    assert "closed, up 98 %" in other
    assert "5.0 ms, p95 120 ms" in other


def test_text_of_servers_cannot_drive_the_terminal():
    """Escape sequences and line breaks in anybody's text are shown, not obeyed."""
    assert plain("a\x1b[2Jb\nc\x07") == "a\\x1b[2Jb c\\x07"
    assert plain("\u202eevil") == "\\u202eevil"
    assert plain("größe 日本") == "größe 日本"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (7200, "2 h 00 min"), (86400 * 3, "3 d 0 h"), (None, "?")],
)
def test_durations_are_readable(value, text):
    """A duration is shown in the unit that fits it."""
    assert seconds(value) == text


# -- status ------------------------------------------------------------------------------------------------------


def test_status_shows_servers_and_cards(server, capsys):
    """One look shows each server with its health and each GPU with its readings and whether it is free."""
    with servers.refusing() as dead:
        status, out, err = run(capsys, "status", "--endpoints", f"one={server.url},dead={dead}", "--timeout", "5")
    assert (status, err) == (0, "")
    assert re.search(rf"one +{server.url} +healthy +closed +2/2 +[\d.]+ ms +[\d.]+ s +host:\S+ \(host\)", out)
    assert re.search(r"dead +\S+ +no answer", out)
    assert re.search(r"one:1 +NVIDIA A100-SXM4-80GB +1\.0 / 80\.0 GiB +3 % +41 °C +free", out)
    assert "2 of 2 GPUs free, 1 of 2 servers healthy" in out
    assert "dead: " in out
    assert "all processes and users of this machine" in out  # how far the leases reach
    assert "\x1b" not in out


def test_status_names_the_holder(server, capsys):
    """A GPU that a pool of this machine holds is shown with its holder and note."""
    with (
        GPUPool(f"one={server.url}", name="night run") as pool,
        pool.gpu(timeout=10, note="epoch [bold]7[/bold]") as gpu,
    ):
        status, out, _ = run(capsys, "status", "--endpoints", f"one={server.url}")
        _, answer = run_json(capsys, "status", "--endpoints", f"one={server.url}")
    assert status == 0
    assert "1 of 2 GPUs free" in out
    line = next(line for line in out.splitlines() if line.strip().startswith(gpu.global_gpu_id))
    assert "night run" in line
    assert line.rstrip().endswith("epoch [bold]7[/bold]")
    held = next(card for card in answer["gpus"] if card["global_gpu_id"] == gpu.global_gpu_id)
    assert held["note"] == "epoch [bold]7[/bold]"
    assert held["is_available"] is False


def test_status_as_json_is_one_value(server, capsys):
    """--json prints one object with durations in float seconds and times in ISO 8601 UTC."""
    status, out, err = run(capsys, "status", "--endpoints", f"one={server.url}", "--json")
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["total_gpus"] == 2
    (endpoint,) = answer["endpoints"]
    assert isinstance(endpoint["age"], float)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", endpoint["last_seen"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", answer["taken_at"])


def test_status_takes_its_servers_from_the_environment(server, monkeypatch, capsys):
    """Without --endpoints the command sees what GPUPool() would see."""
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"from-env={server.url},")
    _, answer = run_json(capsys, "status")
    assert [each["endpoint_id"] for each in answer["endpoints"]] == ["from-env"]


def test_names_of_servers_are_no_markup(capsys):
    """A GPU's name in square brackets is shown as it is."""
    body = summary(a_gpu(0, "GPU-aaaaaa-0", name="[red]A100[/red] :smile: [link=x]"))
    with servers.Server(servers.answer(body)) as server:
        _, out, _ = run(capsys, "status", "--endpoints", f"one={server.url}")
        _, verdict, _ = run(capsys, "why", "--endpoints", f"one={server.url}")
    assert "[red]A100[/red] :smile: [link=x]" in out
    assert "[red]A100[/red] :smile: [link=x]" in verdict


def test_watch_prints_plain_lines_where_nothing_can_be_drawn(server, capsys):
    """Piped, --watch prints one line for each reading, and ends after --count of them."""
    status, out, _ = run(capsys, "status", "--endpoints", f"one={server.url}", "--watch", "0.1", "--count", "3")
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"\d{4}-\S+Z 2 of 2 GPUs free, 1 of 1 server healthy", line)


def test_watch_reads_the_servers_again(server, capsys):
    """Each line of --watch comes from a new reading."""
    run(capsys, "status", "--endpoints", f"one={server.url}", "--watch", "0.1", "--count", "4")
    assert len(server.requests) >= 4


@pytest.mark.parametrize("columns", [100, 80, 60, 40])
def test_tables_fit_into_the_window(columns, server, monkeypatch, capsys):
    """What is less needed is left out, and told to be; a table that wraps in the middle of words is of no use."""
    monkeypatch.setenv("COLUMNS", str(columns))
    ids = [f"a-rather-long-name:{number}" for number in range(2)]
    where = f"a-rather-long-name={server.url}"
    with GPUPool(where, name="somebody") as pool, pool.gpu(timeout=10, uuid="GPU-aaaaaa-0"):
        for name in ("status", "why", "leases"):
            _, out, _ = run(capsys, name, "--endpoints", where)
            assert max(map(len, out.splitlines())) <= columns, out
            heads = [line.split() for line in out.splitlines()]
            assert any(words and words[0] == ids[0] for words in heads), out
            assert name == "leases" or any(words and words[0] == ids[1] for words in heads), out
            assert "somebody" in out
            assert ("too narrow for: " in out) == (columns < 80 or name in ("status", "leases")), out


@pytest.mark.real
def test_a_silent_server_is_named_while_it_is_waited_for():
    """One that hangs costs its whole timeout; whoever looks at the screen knows by then whose fault it is."""
    with (
        servers.Server(servers.hang()) as hanging,
        on_terminal("status", "--endpoints", f"hung={hanging.url}", "--timeout", "20") as (process, pieces),
    ):
        eventually(lambda: b"no answer yet from hung; waiting for up to 20 s" in b"".join(pieces), 30)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(30)


@contextlib.contextmanager
def on_terminal(
    *args: str, command: Callable[..., list[str]] = command
) -> Iterator[tuple[subprocess.Popen[bytes], list[bytes]]]:
    """A command with a terminal for its output, which is collected while it runs."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "50"}
    process = subprocess.Popen(command(*args), stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    pieces: list[bytes] = []

    def collect() -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end was closed
            while piece := os.read(ours, 65536):
                pieces.append(piece)

    thread = threading.Thread(target=collect, name="terminal", daemon=True)
    thread.start()
    try:
        yield process, pieces
        thread.join(10)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        thread.join(10)
        os.close(ours)


@pytest.mark.real
def test_watch_draws_on_a_terminal_until_ctrl_c(server):
    """On a terminal --watch draws over itself, and Ctrl-C is the regular way to end it."""
    with on_terminal("status", "--endpoints", f"one={server.url}", "--watch", "0.2") as (process, pieces):
        eventually(lambda: b"".join(pieces).count(b"healthy") >= 6, 30, lambda: b"".join(pieces))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    shown = b"".join(pieces).decode()
    assert "\x1b[1A" in shown  # it went up to draw over the last picture
    assert "Traceback" not in shown


# -- why ---------------------------------------------------------------------------------------------------------


def test_why_says_what_speaks_against_each_card(server, capsys):
    """Each GPU has a verdict; that nothing is free is an answer, not a failure."""
    with (
        GPUPool(f"one={server.url}", name="somebody") as pool,
        pool.gpu(timeout=10, uuid="GPU-aaaaaa-0"),
    ):
        status, out, _ = run(capsys, "why", "--endpoints", f"one={server.url}")
    assert status == 0
    assert "1 of 2 GPUs free for one GPU" in out
    assert re.search(r"one:0 .*held by somebody", out)
    assert re.search(r"one:1 .*free", out)


@pytest.mark.parametrize(
    ("options", "free"),
    [
        (["--model", "h100"], 0),
        (["--model", "a100"], 2),
        (["--uuid", "GPU-aaaaaa-1"], 1),
        (["--endpoint", "two"], 0),
        (["--exclude", "one:0", "--exclude", "one:1"], 0),
        (["--min-free-memory-mb", "100000"], 0),
        (["--max-utilization-percent", "1"], 0),
        (["--memory-mb", "2000"], 2),
        (["--max-holders", "2"], 2),
        (["-n", "2"], 2),
        (["--local"], 0),
        (["--any"], 2),
        (["--busy-ok"], 2),
    ],
)
def test_why_takes_the_arguments_of_acquire(options, free, server, capsys):
    """Every argument of a request has an option, and the verdict is that of the pool."""
    status, answer = run_json(capsys, "why", "--endpoints", f"one={server.url}", *options)
    assert status == 0
    assert answer["free"] == free
    assert len(answer["cards"]) == 2


def test_why_names_servers_that_are_silent(capsys):
    """A server that does not answer is named with its error."""
    with servers.refusing() as dead:
        status, out, _ = run(capsys, "why", "--endpoints", f"dead={dead}")
    assert status == 0
    assert "0 of 0 GPUs free" in out
    assert re.search(r"^dead: .*refused", out, re.MULTILINE)


# -- doctor ------------------------------------------------------------------------------------------------------


def findings(answer: Any, level: str) -> list[dict[str, str]]:
    return [finding for finding in answer["findings"] if finding["level"] == level]


def test_doctor_finds_nothing_wrong_with_a_healthy_server(server, capsys):
    """A healthy server is described, and the exit status is 0."""
    status, out, err = run(capsys, "doctor", "--endpoints", f"one={server.url}")
    assert (status, err) == (0, "")
    assert "nothing is wrong" in out
    status, answer = run_json(capsys, "doctor", "--endpoints", f"one={server.url}")
    assert status == 0
    assert answer["ok"] is True
    (report,) = answer["endpoints"]
    assert report["reachable"] is True
    assert report["protocol"] == f"gpupool_sync v{wire.PROTOCOL_VERSION}"
    assert report["gpus"] == report["with_uuid"] == 2
    assert report["host_name"] == "name-of-sim-one"
    assert report["is_this_machine"] is False
    assert report["arbiter"] == f"host:{os.environ['GPU_POOL_LOCK_DIR']}"
    assert report["scope"] == "host"
    assert report["round_trip_ms"] > 0
    assert isinstance(report["age"], float)


def test_doctor_says_what_to_do_about_a_dead_server(server, capsys):
    """A server that refuses connections is a problem with advice, and the others are still described."""
    with servers.refusing() as dead:
        where = f"one={server.url},dead={dead}"
        status, out, _ = run(capsys, "doctor", "--endpoints", where, "--timeout", "5")
        _, answer = run_json(capsys, "doctor", "--endpoints", where, "--timeout", "5")
    assert status == 1
    assert "1 problem found" in out
    (problem,) = findings(answer, "problem")
    assert problem["where"] == "dead"
    assert "refused" in problem["what"]
    assert problem["do"]
    assert [report["reachable"] for report in answer["endpoints"]] == [True, False]


@pytest.mark.parametrize(
    ("body", "http_status", "words"),
    [
        (b"<html>hello</html>", 200, "not with GPU statistics"),
        (b'{"error": "nvidia-smi failed", "gpu_count": 0, "gpus": []}', 200, "nvidia-smi failed"),
        (b"{}", 401, "status 401"),
        (summary(host="sim-empty"), 200, "has no GPU"),
        (summary(a_gpu(0, "GPU-aaaaaa-0"), faults=(GPUFault("fell off the bus", 1),)), 200, "GPU 1 cannot be used"),
    ],
)
def test_doctor_names_what_is_wrong_with_an_answer(body, http_status, words, capsys):
    """A server that answers nonsense, errors, no GPU or a broken one is a problem with its reason."""
    with servers.Server(servers.answer(body, http_status)) as server:
        status, answer = run_json(capsys, "doctor", "--endpoints", f"one={server.url}")
    assert status == 1
    (problem,) = findings(answer, "problem")
    assert words in problem["what"]
    assert problem["do"]


def test_doctor_finds_old_samples(capsys):
    """A server whose readings are too old to be granted from is a problem."""
    script = servers.answer(summary(a_gpu(0, "GPU-aaaaaa-0")), headers={wire.AGE_HEADER: "1000"})
    with servers.Server(script) as server:
        status, answer = run_json(capsys, "doctor", "--endpoints", f"one={server.url}")
    assert status == 1
    assert "16 min 40 s old" in findings(answer, "problem")[0]["what"]


def test_doctor_warns_of_gpus_without_uuids(capsys):
    """Of a statistics-only server it says that everybody must use the same URL, and that this one is loopback."""
    with servers.Server(servers.answer(statistics_only(a_gpu(0), a_gpu(1)))) as server:
        status, answer = run_json(capsys, "doctor", "--endpoints", f"old={server.url}")
    assert status == 0
    assert answer["endpoints"][0]["protocol"] == "statistics only"
    warned = " ".join(finding["what"] + finding["do"] for finding in findings(answer, "warning"))
    assert f"everybody must write exactly {server.url}" in warned
    assert "this very machine on every machine" in warned


def test_doctor_recognises_several_urls_of_one_host(capsys):
    """Two URLs that show the same GPUs are named together."""
    body = summary(a_gpu(0, "GPU-aaaaaa-0"), a_gpu(1, "GPU-aaaaaa-1"))
    with servers.Server(servers.answer(body)) as one, servers.Server(servers.answer(body)) as two:
        status, answer = run_json(capsys, "doctor", "--endpoints", f"one={one.url},two={two.url}")
    assert status == 0
    (warning,) = findings(answer, "warning")
    assert warning["where"] == "one and two"
    assert "several URLs of one machine" in warning["what"]


def test_doctor_recognises_impostors(capsys):
    """Two hosts that say to be different and show the same GPUs are a problem."""
    gpu = a_gpu(0, "GPU-aaaaaa-0")
    with (
        servers.Server(servers.answer(summary(gpu, host="sim-one"))) as one,
        servers.Server(servers.answer(summary(gpu, host="sim-two"))) as two,
    ):
        status, answer = run_json(capsys, "doctor", "--endpoints", f"one={one.url},two={two.url}")
    assert status == 1
    assert "the same GPUs (GPU-aaaaaa-0)" in findings(answer, "problem")[0]["what"]


def test_doctor_finds_wrong_and_contradicting_settings(server, monkeypatch, capsys):
    """A wrong value and a variable that another one hides are problems that name the variable."""
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", server.url)
    monkeypatch.setenv("GPU_SERVICE_ENDPOINT", server.url)
    status, answer = run_json(capsys, "doctor")
    assert status == 1
    assert "GPU_SERVICE_ENDPOINT is ignored" in findings(answer, "problem")[0]["what"]
    monkeypatch.delenv("GPU_SERVICE_ENDPOINT")
    monkeypatch.setenv("GPU_POLLING_INTERVAL", "often")
    monkeypatch.setenv("GPU_POOL_TLL", "60")
    status, answer = run_json(capsys, "doctor")
    assert status == 1
    assert "GPU_POLLING_INTERVAL='often'" in findings(answer, "problem")[0]["what"]
    assert "GPU_POOL_TLL" in findings(answer, "warning")[0]["what"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GPU_SERVICE_ENDPONTS", "GPU_SERVICE_ENDPOINTS"),
        ("GPU_POLING_INTERVAL", "GPU_POLLING_INTERVAL"),
        ("gpu_service_endpoints", "GPU_SERVICE_ENDPOINTS"),
        ("GPUS_POOL_TTL", "GPU_POOL_TTL"),
        ("GPU_POOL_CONFG", "GPU_POOL_CONFIG"),
        ("GPU_POOL_COLOUR", None),
    ],
)
def test_doctor_names_what_a_mistyped_variable_may_mean(name, meant, server, monkeypatch, capsys):
    """A variable that is nearly one of ours, or begins like them, is most likely a mistake."""
    monkeypatch.setenv(name, "x")
    status, out, _ = run(capsys, "doctor", "--endpoints", server.url)
    assert status == 0
    assert f"the variable {name} is none of ours" in out
    assert (f"{meant} may be meant" in out) is (meant is not None)


@pytest.mark.parametrize("name", ["GPU_DEVICE_ORDINAL", "GPU_MAX_HW_QUEUES", "GPU_POOL_VISIBLE", "GPU_POOL_LOCK_DIR"])
def test_doctor_leaves_the_variables_of_others_alone(name, server, monkeypatch, tmp_path, capsys):
    """Drivers and other programs have variables that begin with GPU_, too."""
    monkeypatch.setenv(name, str(tmp_path) if name.endswith("DIR") else "index")
    assert "none of ours" not in run(capsys, "doctor", "--endpoints", server.url)[1]


def test_doctor_tells_of_a_configuration_file_that_all_may_read(server, monkeypatch, tmp_path, capsys):
    """And of one that is wrong; neither with its secrets."""
    path = tmp_path / "pool.toml"
    path.write_text(f"[[endpoints]]\nurl = '{server.url}'\ntoken = 's3cr3t'\n")
    path.chmod(0o644)
    monkeypatch.setenv("GPU_POOL_CONFIG", str(path))
    _, out, _ = run(capsys, "doctor")
    out = " ".join(out.split())  # the path may be long enough for a line of its own
    assert f"chmod 600 {path}" in out
    assert f"from {path}" in out
    path.write_text("tokn = 's3cr3t'\n")
    status, broken, _ = run(capsys, "doctor")
    assert status == 1
    assert f"{path}: tokn: there is no such setting" in broken
    assert "s3cr3t" not in out + broken


def test_doctor_shows_no_secrets(server, monkeypatch, capsys):
    """Passwords of the endpoints appear nowhere, reachable or not."""
    good = server.url.replace("http://", "http://ann:hunter2@")
    with servers.refusing() as dead:
        bad = dead.replace("http://", "http://bob:hunter3@")
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"{good},dead={bad}")
        _, out, err = run(capsys, "doctor", "--timeout", "5")
        _, as_json, _ = run(capsys, "doctor", "--timeout", "5", "--json")
        _, state, _ = run(capsys, "status", "--timeout", "5")
    assert "hunter" not in out + err + as_json + state


def test_doctor_without_endpoints_looks_at_this_machine(monkeypatch, tmp_path, capsys):
    """With nothing configured this machine is the endpoint; without a GPU it says how to name other machines."""
    monkeypatch.setattr("gpupool_sync.devices.open_reader", _nothing_here)
    status, answer = run_json(capsys, "doctor")
    assert status == 1
    (problem,) = findings(answer, "problem")
    assert "GPU_SERVICE_ENDPOINTS" in problem["do"]
    assert answer["this_machine"]["gpus"] == 0
    assert answer["endpoints"][0]["is_this_machine"] is True


def _nothing_here() -> Any:
    from gpupool_sync.devices import NoReader

    return NoReader("no driver here")


# -- with the real thing -----------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_commands_agree_with_real_servers(capsys):
    """Against `gpupool-sync serve` all commands see the same GPUs, and notice when one server dies."""
    with FakeFleet([2, "1xH100"]) as fleet:
        where = ",".join(f"host{number}={url}" for number, url in enumerate(fleet.urls))
        status, answer = run_json(capsys, "status", "--endpoints", where)
        assert (status, answer["total_gpus"], answer["available_gpus"]) == (0, 3, 3)
        status, answer = run_json(capsys, "why", "--endpoints", where, "--model", "h100")
        assert (status, answer["free"]) == (0, 1)
        with GPUPool(where, name="somebody else") as pool, pool.gpu(timeout=30, model="h100", note="epoch 7") as gpu:
            _, answer = run_json(capsys, "status", "--endpoints", where)
            held = {card["global_gpu_id"]: card for card in answer["gpus"] if not card["is_available"]}
            assert list(held) == [gpu.global_gpu_id]
            assert held[gpu.global_gpu_id]["note"] == "epoch 7"
            assert answer["available_gpus"] == 2
            _, answer = run_json(capsys, "why", "--endpoints", where, "--model", "h100")
            assert (answer["free"], answer["cards"][-1]["code"]) == (0, "held")
            assert "somebody else" in answer["cards"][-1]["text"]
        status, answer = run_json(capsys, "doctor", "--endpoints", where)
        assert (status, answer["ok"]) == (0, True)
        assert [report["gpus"] for report in answer["endpoints"]] == [2, 1]
        assert all(report["simulated"] and not report["is_this_machine"] for report in answer["endpoints"])
        assert findings(answer, "warning") == []
        fleet[0].kill()
        status, answer = run_json(capsys, "doctor", "--endpoints", where, "--timeout", "5")
        assert (status, answer["ok"]) == (1, False)
        assert [finding["where"] for finding in findings(answer, "problem")] == ["host0"]


@pytest.mark.parametrize("name", ["serve", "demo"])
def test_a_missing_extra_is_a_line_for_pip(name):
    """A command whose packages are missing says what to install, and exits with 2; the others do without them."""
    code = (
        "import sys; sys.modules['fastapi'] = sys.modules['uvicorn'] = None; "
        "from gpupool_sync.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip install 'gpupool-sync[server]'" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-c", code, "why"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr


# -- leases ------------------------------------------------------------------------------------------------------


def test_leases_shows_who_holds_and_who_waits(server, capsys):
    """Everybody can see who has a GPU, since when, why, and who waits for one."""
    with GPUPool(f"one={server.url}", name="night run") as pool:
        held = pool.acquire(timeout=10, count=2, note="epoch 7")
        waiter = threading.Thread(target=lambda: pool.acquire(timeout=30, note="patient").release())
        waiter.start()
        eventually(lambda: pool.leases().queue, message="its ticket is at the server")
        status, out, _ = run(capsys, "leases", "--endpoints", f"one={server.url}")
        _, answer = run_json(capsys, "leases", "--endpoints", f"one={server.url}")
        held.release()
        waiter.join(30)
    assert status == 0
    assert "2 leases, 1 waiting" in out or "1 leases, 1 waiting" in out
    assert "epoch 7" in out
    assert "patient" in out
    assert {gpu for lease in answer["leases"] for gpu in lease["gpus"]} == {"one:0", "one:1"}
    assert all("night run" in lease["holder"] for lease in answer["leases"])
    assert all(lease["expires_in"] is None for lease in answer["leases"])
    assert answer["queue"][0]["note"] == "patient"
    status, out, _ = run(capsys, "leases", "--endpoints", f"one={server.url}")
    assert "0 leases, 0 waiting" in out


@pytest.mark.real
def test_serve_says_as_json_where_it_is(tmp_path):
    """A program that starts a server learns its address from one JSON object."""
    server = subprocess.Popen(command("serve", "--simulate", "2", "--port", "0", "--json"), stdout=subprocess.PIPE)
    try:
        answer = json.loads(server.stdout.readline())
        assert answer["gpus"] == 2
        assert answer["leases"] is True
        with GPUPool(f"one={answer['url']}") as pool, pool.gpu(timeout=20) as gpu:
            assert gpu.endpoint_id == "one"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        server.stdout.close()


@pytest.mark.real
def test_serve_tells_its_errors_as_json(capsys):
    """A port that is none is an object too, with exit status 1."""
    status, answer = run_json(capsys, "serve", "--simulate", "1", "--port", "no-port")
    assert status == 1
    assert answer["error"]["type"] == "ConfigError"
