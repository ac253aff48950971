"""The statistics server: what it answers, how fresh that is, and how it begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes.util
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from urllib.parse import urlsplit

import attrs
import pytest

from gpupool_sync import GPUPool, devices, wire
from gpupool_sync.clock import boottime
from gpupool_sync.devices.simulated import SimulatedReader, parse_cards
from gpupool_sync.errors import ConfigError, GPUPoolError, MissingExtra
from gpupool_sync.models import Sample
from gpupool_sync.server import require_extra
from gpupool_sync.server.app import create_app
from gpupool_sync.server.asgi import METRICS_PATH, Front
from gpupool_sync.server.pages import PATHS, Pages
from gpupool_sync.server.run import Options, listen, make_front, serve, url_of
from gpupool_sync.server.sampler import Sampler
from helpers import eventually, run_threads

READINGS = ("/gpu/summary", "/gpu/stats", "/gpu/count")


# --- without a network --------------------------------------------------------------------------------


class Driver:
    """A `devices.Reader` that answers, fails or hangs as the test wants."""

    description = "the driver of a test"

    def __init__(self) -> None:
        self.simulated = SimulatedReader(parse_cards("2xA100"), name="test")
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.reads = 0
        self.closed = False

    def read(self, timeout: float) -> Sample:
        self.reads += 1
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return self.simulated.read(timeout)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.gate.set()


@pytest.fixture
def sampler(driver):
    sampler = Sampler(driver, interval=0.02, read_timeout=0.05)
    yield sampler
    driver.gate.set()
    sampler.stop()


def get(pages: Pages, path: str, **headers: str):
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    answer = pages.answer(path, raw)
    assert answer is not None
    return answer.status, dict(answer.headers), json.loads(answer.body) if answer.body else None


def ask(app, method: str, path: str, headers=()):
    """One request to an ASGI application, without any server."""
    sent = []

    async def run() -> None:
        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": list(headers),
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await app(scope, receive, send)

    asyncio.run(run())
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def test_before_the_first_reading_old_clients_read_an_error(sampler):
    """A server that has not read its cards yet says so as the predecessor does: status 200 and an error."""
    pages = Pages(sampler)
    for path in READINGS:
        status, headers, document = get(pages, path)
        assert (status, document["gpu_count"], document["gpus"]) == (200, 0, [])
        assert document["error"]
        assert b"gpu-sample-age" not in headers
    status, _, health = get(pages, "/health")
    assert (status, health["status"], health["nvidia_smi_available"]) == (503, "unhealthy", False)


def test_a_driver_that_never_worked_is_named(sampler, driver):
    """If no reading succeeds, the error says why, in the driver's words."""
    driver.error = devices.DeviceError("NVML: Driver Not Loaded")
    sampler.start()
    assert sampler.wait_for_first(10.0)
    pages = Pages(sampler)
    assert get(pages, "/gpu/summary")[2]["error"] == "NVML: Driver Not Loaded"
    assert get(pages, "/health")[2]["error"] == "NVML: Driver Not Loaded"


def test_a_body_is_made_once_for_each_sample(sampler, driver):
    """Requests between two samples get the very same bytes and ETag."""
    sampler.interval = 3600.0
    sampler.start()
    sampler.wait_for_first(10.0)
    pages = Pages(sampler)
    first, second = pages.answer("/gpu/summary", []), pages.answer("/gpu/summary", [])
    assert first.body is second.body
    assert driver.reads == 1
    assert sampler.refresh(10.0)
    assert pages.answer("/gpu/summary", []).body != first.body


@pytest.mark.parametrize("path", [*READINGS, "/", "/config"])
def test_an_unchanged_body_is_not_sent_again(sampler, path):
    """If-None-Match with the current ETag gets 304, with the age and without a body."""
    sampler.interval = 3600.0
    sampler.start()
    sampler.wait_for_first(10.0)
    pages = Pages(sampler)
    _, headers, _ = get(pages, path)
    etag = headers[b"etag"].decode()
    for match in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        status, headers, body = get(pages, path, if_none_match=match)
        assert (status, body) == (304, None)
        assert headers[b"etag"] == etag.encode()
        assert (b"gpu-sample-age" in headers) == (path in READINGS)
        assert b"content-length" not in headers
    assert get(pages, path, if_none_match='"other"')[0] == 200


def test_a_hung_driver_delays_no_request(sampler, driver):
    """While the driver hangs, the last readings are served at once with their growing age, and /health says so."""
    sampler.start()
    sampler.wait_for_first(10.0)
    pages = Pages(sampler)
    eventually(lambda: get(pages, "/health")[2]["status"] == "healthy")
    driver.gate.clear()
    eventually(lambda: get(pages, "/health")[0] == 503)
    begin = time.monotonic()
    _, headers, document = get(pages, "/gpu/summary")
    assert time.monotonic() - begin < 10.0  # the driver hangs for longer
    assert document["gpu_count"] == 2
    age = float(headers[b"gpu-sample-age"])
    assert age >= 0.1
    eventually(lambda: float(get(pages, "/gpu/summary")[1][b"gpu-sample-age"]) > age)
    assert get(pages, "/health")[2]["status"] == "unhealthy"
    driver.gate.set()
    eventually(lambda: get(pages, "/health")[2]["status"] == "healthy")


def test_a_failing_driver_leaves_the_last_readings(sampler, driver):
    """After an error the last readings stay, older and older; /health has the error at once."""
    sampler.start()
    sampler.wait_for_first(10.0)
    pages = Pages(sampler)
    driver.error = RuntimeError("the driver broke")
    assert sampler.refresh(10.0)
    assert get(pages, "/gpu/summary")[2]["gpu_count"] == 2
    health = get(pages, "/health")[2]
    assert (health["status"] in ("degraded", "unhealthy"), health["error"]) == (True, "the driver broke")
    driver.error = None
    assert sampler.refresh(10.0)
    assert get(pages, "/health")[2]["error"] is None


def test_a_lost_card_degrades_the_server(sampler, driver, caplog):
    """One card that cannot be read is listed as such, logged once, and leaves the others in service."""
    sampler.interval = 3600.0  # so that no look is ever overdue
    sampler.start()
    driver.simulated.lose(1)
    for _ in range(3):
        assert sampler.refresh(10.0)
    pages = Pages(sampler)
    summary = get(pages, "/gpu/summary")[2]
    assert [gpu["gpu_id"] for gpu in summary["gpus_summary"]] == [0]
    assert [gpu["gpu_id"] for gpu in summary["gpus_unavailable"]] == [1]
    status, _, health = get(pages, "/health")
    assert (status, health["status"], health["gpus_unavailable"]) == (200, "degraded", 1)
    assert sum("cannot be read" in message for message in caplog.messages) == 1


def test_a_machine_without_a_driver_says_so():
    """Where cards cannot be read there are none, and /health tells that nobody could look."""
    sampler = Sampler(devices.NoReader("neither was found"), interval=3600.0)
    sampler.start()
    sampler.wait_for_first(10.0)
    pages = Pages(sampler)
    assert get(pages, "/gpu/summary")[2]["gpu_count"] == 0
    health = get(pages, "/health")[2]
    assert (health["nvidia_smi_available"], health["reader"]) == (False, "neither was found")
    sampler.stop()


def test_simulated_lag_shows_as_age(driver):
    """Readings that lag are sent with the age that they have."""
    sampler = Sampler(SimulatedReader(parse_cards("1"), name="a", lag=30.0), interval=3600.0)
    sampler.start()
    sampler.wait_for_first(10.0)
    assert 30.0 <= float(get(Pages(sampler), "/gpu/summary")[1][b"gpu-sample-age"]) < 60.0
    assert get(Pages(sampler), "/health")[2]["status"] == "healthy"
    sampler.stop()


def test_stopping_while_the_driver_hangs(driver):
    """A sampler whose driver hangs stops all the same, and gives nobody a false promise."""
    sampler = Sampler(driver, interval=0.02)
    driver.gate.clear()
    sampler.start()
    assert not sampler.wait_for_first(0.05)
    assert not sampler.refresh(0.05)
    begin = time.monotonic()
    sampler.stop()
    assert time.monotonic() - begin < 10.0
    assert driver.closed
    driver.gate.set()


def test_many_refreshes_at_once(sampler, driver):
    """Threads that want a fresh look share it where they can, and all get one."""
    sampler.interval = 3600.0
    sampler.start()
    assert run_threads(8, lambda number: sampler.refresh(20.0)) == [True] * 8
    assert driver.reads <= 10


def test_the_framework_gives_the_same_answers(sampler, monkeypatch):
    """The application made by FastAPI answers every path as the fast front does, GET and HEAD."""
    sampler.interval = 3600.0
    sampler.start()
    sampler.wait_for_first(10.0)
    pages = Pages(sampler)
    # /health tells the time, which may change from one request to the next.
    now = boottime()
    monkeypatch.setattr("gpupool_sync.server.pages.boottime", lambda: now)
    monkeypatch.setattr("gpupool_sync.server.pages.local_time", lambda instant: f"at {instant}")
    app = create_app(sampler, pages)
    front = Front(pages, lambda: app)
    for path in PATHS:
        slow, fast = ask(app, "GET", path), ask(front, "GET", path)
        assert slow[0] == fast[0] == 200
        assert slow[2] == fast[2]
        assert set(slow[1]) == set(fast[1])
        for asked in (app, front):
            status, headers, body = ask(asked, "HEAD", path)
            assert (status, body) == (200, b"")
            assert int(headers[b"content-length"]) == len(fast[2])
        etag = fast[1][b"etag"]
        if path != "/health":  # made at the request
            assert ask(app, "GET", path, [(b"if-none-match", etag)])[0] == 304


def test_what_is_not_there(sampler):
    """Unknown paths and methods get an error as JSON, and nothing is redirected."""
    front = make_front(sampler, {})
    for path in ("/nope", "/gpu", "/gpu/", "/gpu/summary/", "/gpu/nope", "/redoc", "//gpu/summary"):
        status, headers, body = ask(front, "GET", path)
        assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
        assert headers[b"content-type"] == b"application/json"
    status, headers, body = ask(front, "POST", "/gpu/summary")
    assert (status, headers[b"allow"]) == (405, b"GET, HEAD")
    assert json.loads(body)["error"]["code"] == "method_not_allowed"


def test_every_path_is_documented(sampler):
    """The OpenAPI document has every path with its schema, and the examples are what the parser takes."""
    document = json.loads(ask(make_front(sampler, {}), "GET", "/openapi.json")[2])
    assert set(document["paths"]) == {*PATHS, METRICS_PATH}
    for path, item in document["paths"].items():
        assert set(item) == {"get"}
        if path == METRICS_PATH:
            assert set(item["get"]["responses"]["200"]["content"]) == {"text/plain", "application/openmetrics-text"}
            continue
        content = item["get"]["responses"]["200"]["content"]["application/json"]
        assert content["schema"]
        if path in READINGS:
            assert "GPU-Sample-Age" in item["get"]["responses"]["200"]["headers"]
    example = document["paths"]["/gpu/summary"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    sample = wire.parse_summary(json.dumps(example).encode(), endpoint_id="x", taken_at=0.0)
    assert (len(sample.gpus), sample.problems) == (2, ())
    operations = [item["get"]["operationId"] for item in document["paths"].values()]
    assert len(set(operations)) == len(operations)


def test_the_documentation_can_be_read(sampler):
    """/docs is a page, made at its first request."""
    status, headers, body = ask(make_front(sampler, {}), "GET", "/docs")
    assert (status, headers[b"content-type"]) == (200, b"text/html; charset=utf-8")
    assert b"swagger" in body


# --- settings -----------------------------------------------------------------------------------------


def test_settings_come_from_the_command_line_then_the_environment():
    """An option wins over the predecessor's variable, which wins over the default; empty means unset."""
    environ = {"HOST": "127.0.0.2", "PORT": "9000", "REFRESH_INTERVAL": "2.5", "LOG_LEVEL": "WARNING"}
    assert Options.resolve(environ={}) == Options("127.0.0.1", 8000, 1.0, "info")
    assert Options.resolve(environ=dict.fromkeys(environ, " ")) == Options()
    assert Options.resolve(environ=environ) == Options("127.0.0.2", 9000, 2.5, "warning")
    given = Options.resolve(host="::1", port="0", interval=0.5, log_level="debug", environ=environ)
    assert given == Options("::1", 0, 0.5, "debug")


def test_the_name_that_csh_exports_is_no_address():
    """HOST with this machine's own name does not open the server to the network."""
    assert Options.resolve(environ={"HOST": socket.gethostname()}).host == "127.0.0.1"
    assert Options.resolve(host=socket.gethostname(), environ={}).host == socket.gethostname()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("REFRESH_INTERVAL", "0"),
        ("REFRESH_INTERVAL", "nan"),
        ("REFRESH_INTERVAL", "soon"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_wrong_settings_are_refused(variable, value):
    """A value that cannot be used is an error with its variable, the value and what is allowed."""
    with pytest.raises(ConfigError, match=re.escape(f"{variable}={value!r}") + ".*allowed"):
        Options.resolve(environ={variable: value})


def test_urls():
    """The URL that is announced can be typed into a client."""
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert url_of("::1", 80) == "http://[::1]:80"
    assert url_of("0.0.0.0", 80) == url_of("::", 80) == f"http://{socket.gethostname()}:80"


def test_a_port_in_use_is_one_clear_error():
    """Whoever wants a port that is taken is told so, and what to do."""
    (sock,) = listen("127.0.0.1", 0)
    with sock, pytest.raises(GPUPoolError, match="Address already in use; another port"):
        listen("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(GPUPoolError, match="cannot listen on"):
        listen("192.0.2.1", 0)
    with pytest.raises(GPUPoolError, match="cannot listen on"):
        listen("no such host", 0)


def test_all_addresses_of_a_name_get_one_port():
    """A name for several addresses is served on all that this machine has, with one port."""
    sockets = listen("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


def test_a_missing_extra_has_its_pip_line(monkeypatch):
    """What is not installed is named with the line that installs it."""
    require_extra("server", "fastapi", "uvicorn")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'gpupool-sync[server]'")):
        require_extra("server", "fastapi", "uvicorn")


# --- real servers -------------------------------------------------------------------------------------


def start(*options: str, environ=None) -> subprocess.Popen[str]:
    """``gpupool-sync serve``, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpupool_sync", "serve", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environ or {})},
    )


@contextlib.contextmanager
def running(*options: str, environ=None):
    """A server, and the URL and line that it announced."""
    process = start("--port", "0", *options, environ=environ)
    try:
        line = process.stdout.readline()
        if not line:
            pytest.fail(f"the server did not start: {process.stderr.read()}")
        yield process, re.search(r"GPU_SERVICE_ENDPOINTS=(\S+)", line)[1], line
    finally:
        process.kill()
        process.communicate(timeout=60)


@contextlib.contextmanager
def connected(url: str):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        yield connection
    finally:
        connection.close()


def fetch(connection, path: str, method: str = "GET", **headers: str):
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, response.headers, response.read()


@pytest.fixture(scope="module")
def server():
    with running("--simulate", "2xA100,1xT4", "--name", "the host", "--interval", "0.1") as (_, url, _line):
        yield url


@pytest.mark.real
def test_a_real_server_speaks_the_predecessors_language(server):
    """The predecessor's fields are there with its names and types, timestamps in local time without a zone."""
    with connected(server) as connection:
        summary = json.loads(fetch(connection, "/gpu/summary")[2])
        stats = json.loads(fetch(connection, "/gpu/stats")[2])
        count = json.loads(fetch(connection, "/gpu/count")[2])
        health = json.loads(fetch(connection, "/health")[2])
        config = json.loads(fetch(connection, "/config")[2])
        about = json.loads(fetch(connection, "/")[2])
    assert (summary["gpu_count"], summary["total_memory_mb"]) == (3, 2 * 81920 + 15360)
    assert (summary["total_used_memory_mb"], summary["average_utilization_percent"]) == (9, 0)
    assert 0.0 < summary["total_memory_usage_percent"] < 0.1
    gpu = summary["gpus_summary"][0]
    assert (gpu["gpu_id"], gpu["name"], gpu["memory_usage_percent"], gpu["utilization_percent"]) == (
        0,
        "Simulated A100",
        0.0,
        0,
    )
    gpu = stats["gpus"][2]
    assert gpu["memory"] == {"total_mb": 15360, "used_mb": 3, "free_mb": 15357, "usage_percent": 0.02}
    assert (gpu["gpu_id"], gpu["temperature_c"], gpu["power"]) == (2, 30, {"draw_w": 30, "limit_w": 300})
    assert count["gpu_count"] == stats["gpu_count"] == 3
    assert (health["status"], health["nvidia_smi_available"]) == ("healthy", True)
    assert (config["refresh_interval"], config["port"]) == (0.1, urlsplit(server).port)
    assert "/gpu/summary" in about["endpoints"]
    for document in (summary, stats, count, health):
        instant = datetime.fromisoformat(document["timestamp"])
        assert instant.tzinfo is None
        assert abs((datetime.now() - instant).total_seconds()) < 60


@pytest.mark.real
def test_a_real_server_is_understood_by_the_pool(server):
    """What it sends is read without any oddity, with UUIDs, host identity and age."""
    with connected(server) as connection:
        _, headers, body = fetch(connection, "/gpu/summary")
    sample = wire.parse_summary(body, endpoint_id="x", taken_at=boottime())
    simulated = SimulatedReader(parse_cards("2xA100,1xT4"), name="the host")
    assert sample.problems == sample.faults == ()
    assert sample.host == simulated.host
    expected = simulated.read(1.0).gpus
    assert [gpu.leased for gpu in sample.gpus] == [False, False, False]
    assert [attrs.evolve(gpu, memory_usage_percent=None, leased=None) for gpu in sample.gpus] == [
        attrs.evolve(gpu, memory_usage_percent=None) for gpu in expected
    ]
    assert 0.0 <= float(headers[wire.AGE_HEADER]) < 30.0


@pytest.mark.real
def test_a_real_server_keeps_connections(server):
    """Many requests of every kind go over one connection, which is not closed between two polls."""
    with connected(server) as connection:
        connection.connect()
        port = connection.sock.getsockname()[1]
        for path in (*PATHS, "/docs", "/nope", *READINGS):
            for method in ("GET", "HEAD"):
                status, _, body = fetch(connection, path, method)
                assert status in (200, 404, 405)
                assert (method == "GET") == bool(body)
        assert fetch(connection, "/gpu/summary", "POST")[0] == 405
        assert connection.sock.getsockname()[1] == port


@pytest.mark.real
def test_a_real_server_saves_bodies(server):
    """A client that has the current body gets 304 and its age."""
    with connected(server) as connection:

        def unchanged():
            etag = fetch(connection, "/gpu/summary")[1]["ETag"]
            status, headers, body = fetch(connection, "/gpu/summary", if_none_match=etag)
            return status == 304 and body == b"" and wire.AGE_HEADER in headers

        eventually(unchanged)  # a new sample may come in between


@pytest.mark.real
def test_a_real_server_takes_new_samples(server):
    """The readings are taken anew all the time, not at the request."""
    with connected(server) as connection:
        seen = set()

        def changed():
            seen.add(json.loads(fetch(connection, "/gpu/summary")[2])["timestamp"])
            return len(seen) >= 3

        eventually(changed)


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_server_ends_when_told(number):
    """SIGINT and SIGTERM end it soon with status 0 and without a word, also while clients are connected."""
    with running("--simulate", "1") as (process, url, line), connected(url) as connection:
        assert line.startswith(f"serving {url} (1 GPU, 1 simulated card); for clients: export GPU_SERVICE_ENDPOINTS=")
        assert fetch(connection, "/health")[0] == 200
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 0
        assert time.monotonic() - begin < 5.0
        assert process.stderr.read() == ""
        assert process.stdout.read() == ""


@pytest.mark.real
def test_a_real_server_obeys_the_environment():
    """The predecessor's variables set what no option does."""
    environ = {"HOST": "localhost", "REFRESH_INTERVAL": "0.5", "LOG_LEVEL": "error"}
    with running("--simulate", "1", environ=environ) as (_, url, _line), connected(url) as connection:
        assert url.startswith("http://localhost:")
        config = json.loads(fetch(connection, "/config")[2])
        assert (config["refresh_interval"], config["log_level"], config["host"]) == (0.5, "error", "localhost")


@pytest.mark.real
def test_a_real_server_without_gpus(tmp_path):
    """On a machine without GPUs the server runs, has none, and tells why."""
    environ = {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    with running(environ=environ) as (_, url, line), connected(url) as connection:
        assert "0 GPUs" in line
        assert json.loads(fetch(connection, "/gpu/summary")[2])["gpu_count"] == 0


@pytest.mark.real
@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--port", "http"], 1, "--port='http'"),
        (["--interval", "0", "--simulate", "1"], 1, "--interval='0'"),
        (["--simulate", "many"], 1, "N or NxMODEL"),
        (["--simulate-foreign", "0.5"], 2, "only possible together with --simulate"),
        (["--simulate", "1", "--simulate-foreign", "2"], 2, "0<=x<=1"),
    ],
)
def test_a_wrong_command_line(options, status, words):
    """What cannot be served is refused with a reason and no traceback."""
    process = start(*options)
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (status, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.real
def test_a_port_in_use_ends_the_command(server):
    """A second server on the port of the first ends at once with one line and status 1."""
    process = start("--simulate", "1", "--port", str(urlsplit(server).port))
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (1, "")
    assert "Address already in use" in err
    assert len(err.splitlines()) == 1


@pytest.mark.real
def test_leases_on_simulated_gpus_outlive_a_killed_server(tmp_path):
    """Who tries what a crash does sees what real GPUs would do: the next server knows who holds what."""
    (sock,) = listen("127.0.0.1", 0)
    port = str(sock.getsockname()[1])
    sock.close()
    options, environ = ("--simulate", "2", "--port", port), {"TMPDIR": str(tmp_path)}
    with contextlib.ExitStack() as ending:
        with running(*options, environ=environ) as (process, url, _):
            pool = ending.enter_context(GPUPool(url, name="before", endpoint_timeout=20.0))
            gpu = pool.acquire(timeout=20)
            process.kill()
        with running(*options, environ=environ) as (_, again, _line):
            assert again == url
            with GPUPool(url) as other:
                assert [(lease.gpus, lease.holder) for lease in other.leases().leases] == [
                    ([gpu.global_gpu_id], str(pool._state.holder))
                ]
                assert other.acquire(timeout=20).uuid != gpu.uuid
            gpu.check()


@pytest.mark.real
def test_two_simulated_servers_are_two_machines():
    """On two ports there are twice as many GPUs, also without `--name`."""
    with contextlib.ExitStack() as ending:
        urls = []
        for _ in range(2):
            (sock,) = listen("127.0.0.1", 0)
            port = str(sock.getsockname()[1])
            sock.close()
            urls.append(ending.enter_context(running("--simulate", "2", "--port", port))[1])
        with GPUPool(urls) as pool:
            pool.open(wait=True)
            assert pool.status().total_gpus == 4


@pytest.mark.real
@pytest.mark.skipif(ctypes.util.find_library("nvidia-ml") is not None, reason="this machine can read GPUs")
def test_a_server_without_any_gpu_says_so(tmp_path):
    """It serves, as a driver may come later, but nobody should have to find out elsewhere."""
    environ = {"PATH": str(tmp_path), "GPU_POOL_LOCK_DIR": str(tmp_path / "locks")}
    with running(environ=environ) as (process, _, line):
        assert "(0 GPUs, " in line
        assert "no GPU is served: " in process.stderr.readline()


@pytest.mark.real
def test_the_command_without_its_extra():
    """Without FastAPI the command prints the pip line and ends with status 2."""
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from gpupool_sync.cli import main\n"
        "sys.exit(main(['serve', '--simulate', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'gpupool-sync[server]'" in done.stderr


@pytest.mark.real
def test_a_server_in_a_thread(driver):
    """`serve` also runs where no signals can be caught, and closes its reader when it cannot listen."""
    (sock,) = listen("127.0.0.1", 0)
    with sock, pytest.raises(GPUPoolError, match="in use"):
        serve(driver, Options(port=sock.getsockname()[1]), announce=lambda line: None)
    assert driver.closed
