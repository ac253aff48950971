"""Secrets are where they are needed and nowhere else: planted at every entry, looked for at every way out.

The ways out are text, repr and formatted traceback of what is raised, warnings, the log at its finest, and what the
commands and the server print.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator

import pytest
import requests

import servers
from gpupool_sync import AcquireTimeout, Endpoint, GPUPool
from gpupool_sync.cli import main
from gpupool_sync.clock import Deadline
from gpupool_sync.config import EndpointSource, redact_url, resolve
from gpupool_sync.errors import ConfigError, EndpointUnavailable, GPUPoolError, LeaseStoreError
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.server.access import VARIABLE as TOKENS
from gpupool_sync.transport import Transport

SECRET = "hush-0b5c7e"
OTHER = "mum-4d1f9a"  # of another kind, where one place has two


def told_by(error: BaseException | None) -> str:
    """All that can be made visible of an exception, and of what it is chained to."""
    text = ""
    while error is not None:
        # Without the source lines: those are the test's own.
        lines = traceback.TracebackException.from_exception(error)
        text += "".join(lines.format_exception_only()) + f"\n{error!s}\n{error!r}\n{error.args!r}\n"
        error = error.__cause__ or error.__context__
    return text


def assert_nothing_in(*texts: object) -> None:
    for text in texts:
        assert SECRET not in str(text)
        assert OTHER not in str(text)


@pytest.fixture
def log(caplog) -> Iterator:
    """Of everybody, at its finest; looked through at the end."""
    caplog.set_level(logging.DEBUG)
    for name in ("urllib3", "gpupool_sync", "redis", "requests"):
        caplog.set_level(logging.DEBUG, name)
    yield caplog
    for record in caplog.records:
        assert_nothing_in(record.getMessage(), record.exc_text or "", record.args)


# -- what is mistyped ------------------------------------------------------------------------------------------

MISTYPED = [
    f"http://{SECRET}@{OTHER}@:80",
    f"http://ann@x:{SECRET}@{OTHER}@server1:99999",
    f"http://ann:{SECRET}",  # without its host
    f"http://ann:{SECRET}/x",
    f"http://ann:{SECRET},http://{OTHER}@server1:x",
    f"http://ann:1/{SECRET}@server1",
    f"http://ann:1?{SECRET}@server1",
    f"http://ann:1#{SECRET}@server1",
    f"http://server1?token={SECRET}@{OTHER}",
    f"http://server1/?a=@&token={SECRET}",
    f"http://server1#token={SECRET}",
    f"http://server1#{SECRET}@{OTHER}",
    f"server1=http://ann:{SECRET}",
    f"dns+http://ann:{SECRET}@server1:x",
    f"dns+http://ann:{SECRET}",
    f"ann:{SECRET}",  # without its scheme as well
    f"ann:{SECRET}@server1",
]


@pytest.mark.parametrize("url", MISTYPED)
@pytest.mark.parametrize("entry", ["Endpoint", "source", "pool", "variable", "file", "command"])
def test_a_mistyped_url_is_not_quoted_with_its_secret(url, entry, log, tmp_path, monkeypatch, capsys):
    """Wherever it is given: each of these is refused, with a reason."""
    entries = {
        "Endpoint": lambda: Endpoint(url),
        "source": lambda: EndpointSource(url),
        "pool": lambda: GPUPool(url),
        "variable": lambda: resolve(environ={"GPU_SERVICE_ENDPOINTS": url}),
        "file": lambda: resolve(environ={"GPU_POOL_CONFIG": str(tmp_path / "pool.toml")}),
    }
    (tmp_path / "pool.toml").write_text(f"[[endpoints]]\nurl = '{url}'\n")
    if entry == "command":
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", url)
        for command in (["doctor"], ["doctor", "--json"], ["status"], ["leases", "--json"]):
            assert main(command) != 0
        out, err = capsys.readouterr()
        assert out
        assert err
        assert_nothing_in(out, err)
    else:
        with pytest.raises(ConfigError) as caught:
            entries[entry]()
        assert_nothing_in(told_by(caught.value))
    if "://" in url:  # only who knows that it should be a URL can tell what a colon means without that
        assert_nothing_in(redact_url(url))


@pytest.mark.parametrize("url", [url for url in MISTYPED if "," not in url])
def test_a_mistyped_line_of_a_list_is_not_quoted_with_its_secret(url, log, tmp_path):
    """The list is told to be wrong, by the log and by whoever asks."""
    path = tmp_path / "servers"
    path.write_text(f"http://127.0.0.1:9\n{url}\n")
    path.chmod(0o600)
    with GPUPool(f"file:{path}", lease_store=MemoryStore(), endpoint_timeout=1.0) as pool:
        with pytest.raises(AcquireTimeout) as caught:
            pool.acquire(timeout=0)
        assert_nothing_in(told_by(caught.value), pool.explain(), pool.status())
    assert "line 2" in log.text


def test_the_last_at_sign_is_the_one():
    """
    Of several, as for browsers and for requests: an address may be a user's name, and a password may have one.

    What stands before it is in neither id nor URL.
    """
    endpoint = Endpoint(f"http://ann@example.org:{SECRET}@server1:8000")
    assert (endpoint.url, endpoint.id) == ("http://server1:8000", "server1-8000")
    assert endpoint.auth == ("ann@example.org", SECRET)
    assert Endpoint("http://a@b@c").auth == ("a@b", "")
    assert (Endpoint("http://a@b@c").url, Endpoint("http://a@b@c").id) == ("http://c", "c")
    assert_nothing_in(endpoint, repr(endpoint))


@pytest.mark.parametrize(
    "line",
    [
        f"token = {SECRET}",
        f'token = "{SECRET}',
        f'token = "{SECRET}"\npoll_interval = = 3',
        f'token = "{SECRET}"\nheaders = {{ X-Key = "{OTHER}", X-Key = "{OTHER}" }}',
        f'token = "{SECRET}"\nauth = ["ann", "{OTHER}"]',
        f'token = ["{SECRET}"]',
        f'token = "{SECRET} {OTHER}"',
        f'headers = {{ X-Key = "{SECRET}\\n" }}',
        f'headers = "{SECRET}"',
        f'auth = "ann:{SECRET}"',
        f'auth = ["ann", "{SECRET}", "{OTHER}"]',
        f'token = "{SECRET}"\nverify = 3',
        f'token = "{SECRET}"\nmax_rate = "many"',
        f'token = "{SECRET}"\nlocal = "{OTHER}"',
        f'cert = ["{SECRET}"]',
        f'"{SECRET}" = 1',
    ],
)
def test_a_value_beside_a_secret_may_be_wrong(line, log, tmp_path, monkeypatch, capsys):
    """The message names the file and the place; `doctor` says the same."""
    path = tmp_path / "pool.toml"
    path.write_text(f"[[endpoints]]\nurl = 'http://server1'\n{line}\n")
    path.chmod(0o600)
    monkeypatch.setenv("GPU_POOL_CONFIG", str(path))
    with pytest.raises(ConfigError, match=r"pool\.toml") as caught:
        resolve()
    assert main(["doctor"]) == 1
    assert_nothing_in(told_by(caught.value), *capsys.readouterr())


# -- what goes wrong at a server -------------------------------------------------------------------------------

CREDENTIALS = {
    "user in the URL": lambda url: Endpoint(url.replace("://", f"://ann@{OTHER}:{SECRET}@x@")),
    "token": lambda url: Endpoint(url, token=SECRET),
    "auth": lambda url: Endpoint(url, auth=("ann", SECRET)),
    "headers": lambda url: Endpoint(url, headers={"X-Api-Key": SECRET, "Authorization": f"Bearer {OTHER}"}),
    "client certificate": lambda url: Endpoint(url, cert=f"/nowhere/{SECRET}.pem") if "https" in url else Endpoint(url),
}


def status_of(status: int) -> servers.Script:
    return servers.answer(json.dumps({"error": {"code": "x", "message": "no"}}).encode(), status)


@contextlib.contextmanager
def faulty(fault: str, tmp_path) -> Iterator[str]:
    """The URL of a server that has it."""
    if fault == "refused":
        with servers.refusing() as url:
            yield url
        return
    if fault == "no such name":
        yield "http://no-such-host.invalid:8000"
        return
    scripts = {
        "401": status_of(401),
        "403": status_of(403),
        "not JSON": servers.answer(b"<html>"),
        "no HTTP": servers.raw(b"nonsense\r\n\r\n"),
        "closed": servers.close_after_request(),
        "redirect": servers.redirect("http://elsewhere.invalid/"),
        "TLS": servers.answer(),
    }
    tls: ssl.SSLContext | None = servers.Authority(tmp_path).context() if fault == "TLS" else None
    with servers.Server(scripts[fault], tls=tls) as server:
        yield server.url


@pytest.mark.parametrize("kind", CREDENTIALS)
@pytest.mark.parametrize(
    "fault", ["401", "403", "not JSON", "no HTTP", "closed", "redirect", "refused", "no such name", "TLS"]
)
def test_no_fault_of_a_server_brings_a_secret_to_light(fault, kind, log, tmp_path):
    """In errors, in status and explanations, in the log."""
    with faulty(fault, tmp_path) as url:
        endpoint = CREDENTIALS[kind](url)
        options = {"lease_store": MemoryStore(), "endpoint_timeout": 5.0, "endpoint_max_retries": 1}
        with GPUPool([endpoint], **options) as pool:
            with pytest.raises((AcquireTimeout, GPUPoolError)) as caught:
                pool.acquire(timeout=0)
            said = (pool.status(), repr(pool.status()), pool.explain(), repr(pool), pool.stats(), endpoint)
        assert_nothing_in(told_by(caught.value), *said)
        assert any(word in str(caught.value) for word in ("server", "answer", "status", "certificate", "name"))


@pytest.mark.parametrize("fault", ["401", "refused", "TLS"])
def test_commands_tell_no_secret_of_a_server_with_a_fault(fault, log, tmp_path, monkeypatch, capsys):
    """`doctor`, `status`, `leases` and `why`, for people and for programs."""
    with faulty(fault, tmp_path) as url:
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"box={url.replace('://', f'://ann@{OTHER}:{SECRET}@')}")
        for command in ("doctor", "status", "leases", "why"):
            for more in ([], ["--json"]):
                main([command, "--timeout", "5", *more])
    out, err = capsys.readouterr()
    assert "box" in out
    assert_nothing_in(out, err)


@pytest.mark.parametrize(
    "proxy",
    [
        f"http://ann:{SECRET}@127.0.0.1:1",
        f"http://ann@{OTHER}:{SECRET}@127.0.0.1:1",
        f"http://ann:{SECRET}/{OTHER}@127.0.0.1:1",
        f"http://ann:1/{SECRET}@127.0.0.1:1",
        f"http://ann:1#{SECRET}@127.0.0.1:1",
        f"http://ann:1?{SECRET}@127.0.0.1:1",
        f"ann:{SECRET}@127.0.0.1:1",
        f"socks5://ann:{SECRET}@127.0.0.1:1",
        f"http://ann:{SECRET}@[::1:1",
    ],
)
@pytest.mark.parametrize("url", ["http://server1", "https://server1"])
def test_a_proxys_password_is_not_told(proxy, url, log, monkeypatch):
    """Whether the variable can be read or not."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy)
    with GPUPool([url], lease_store=MemoryStore(), endpoint_timeout=5.0, endpoint_max_retries=0) as pool:
        with pytest.raises(AcquireTimeout, match="proxy") as caught:
            pool.acquire(timeout=0)
        said = (pool.explain(), pool.status())
    transport = Transport(Endpoint(url), max_retries=0)
    with contextlib.closing(transport), pytest.raises(EndpointUnavailable) as asked:
        transport.get("/gpu/summary", Deadline.after(5.0))
    assert_nothing_in(told_by(caught.value), told_by(asked.value), *said)


# -- Redis -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def repeating() -> Iterator[int]:
    """The port of a server that knows no command and says what it was sent, as old ones and proxies do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def answer() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        while sent := connection.recv(65536):
                            shown = sent.replace(b"\r\n", b" ")
                            connection.sendall(b"-ERR unknown command, with args beginning with: " + shown + b"\r\n")

        thread = threading.Thread(target=answer, name="repeating", daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", listener.getsockname()[1]), 1.0).close()
            thread.join(10.0)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@127.0.0.1:PORT/0",
        f"redis://ann@x:{SECRET}@{OTHER}@127.0.0.1:PORT/0",
        f"redis://127.0.0.1:PORT/0?password={SECRET}",
        f"redis://127.0.0.1:PORT/0?password={SECRET}%40{OTHER}",
        f"redis://ann:{SECRET.replace('-', '%2D')}@127.0.0.1:PORT/0",
    ],
)
def test_a_redis_that_repeats_what_it_was_sent(url, log, monkeypatch, capsys):
    """Its error is told, without the password, and nothing that has it is chained."""
    from gpupool_sync.leases.redis import RedisStore

    with repeating() as port:
        url = url.replace("PORT", str(port))
        store = RedisStore(url)
        try:
            for ask in (store.leases, lambda: store.listen(0.0)):
                with pytest.raises(LeaseStoreError, match="unknown command") as caught:
                    ask()
                assert_nothing_in(told_by(caught.value))
        finally:
            store.close()
        assert_nothing_in(store, store.description, redact_url(url))
        monkeypatch.setenv("GPU_POOL_LEASE_STORE", url)
        monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", "http://127.0.0.1:9")
        main(["doctor", "--timeout", "5"])
        main(["leases", "--timeout", "5", "--json"])
        assert_nothing_in(*capsys.readouterr(), repr(resolve()))


@pytest.mark.parametrize(
    "url",
    [
        f"redis://ann:{SECRET}/x@host",
        f"redis://ann:{SECRET}",
        f"redis://:1/{SECRET}@host",
        f"redis://:1#{SECRET}@host",
        f"redis://:1?{SECRET}@host",
        f"redis://[{SECRET}@host",
        f"unix://:1/{SECRET}@/run/redis.sock",
        f"redis://host/0?socket_timeout={SECRET}",
        f"redis://host/0?db={SECRET}",
        f"redis:/:{SECRET}@host",
    ],
)
def test_the_mistyped_url_of_a_redis(url, log):
    """It is refused by its kind, and not by its content."""
    with pytest.raises((ConfigError, LeaseStoreError)) as caught:
        GPUPool(["http://127.0.0.1:9"], lease_store=url).acquire(timeout=0)
    assert_nothing_in(told_by(caught.value))


def test_a_plus_in_the_query_of_a_redis_is_sent_as_a_space():
    """What is kept secret is what is sent."""
    from gpupool_sync.leases.redis import RedisStore

    store = RedisStore("redis://127.0.0.1:9/0?password=one+two%2Bthree")
    assert store._client.connection_pool.connection_kwargs["password"] == "one two+three"
    assert store._redacted("unknown command 'AUTH', 'one two+three'") == "unknown command 'AUTH', '…'"


# -- a server of ours ------------------------------------------------------------------------------------------


def test_a_server_tells_no_token(tmp_path):
    """Neither its log at its finest, nor the audit, nor any page; also not those that are sent to it by mistake."""
    right = f"{SECRET}-of-ann-is-long"
    (tmp_path / "tokens").write_text(f"bob {SECRET}-of-bob-is-long\n")
    (tmp_path / "tokens").chmod(0o600)
    command = [sys.executable, "-m", "gpupool_sync", "serve", "--simulate", "2", "--port", "0", "--json"]
    command += ["--host", "127.0.0.1", "--log-level", "debug", "--tokens", str(tmp_path / "tokens")]
    with open(tmp_path / "log", "wb") as file:
        environ = {**os.environ, TOKENS: f"ann:{right}"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=environ)
    try:
        assert process.stdout is not None
        announced = process.stdout.readline().decode()
        url = json.loads(announced)["url"]
        with open(f"/proc/{process.pid}/cmdline", "rb") as line:
            assert_nothing_in(line.read())
        bodies = []
        for token in (right, f"{OTHER}-of-nobody"):
            for path in (
                "/",
                "/docs",
                "/openapi.json",
                "/config",
                "/metrics",
                "/gpu/summary",
                "/v1/leases",
                "/nowhere",
            ):
                answer = requests.get(
                    f"{url}{path}?token={OTHER}", headers={"Authorization": f"Bearer {token}"}, timeout=30.0
                )
                bodies.append(answer.text + str(answer.headers))
        (tmp_path / "tokens").write_text(f"bob {SECRET}-of-bob-is-long boss\n")  # noticed with the next request
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60.0)[0].decode()
    logged = (tmp_path / "log").read_text()
    assert '"event":"denied"' in logged
    assert "GET /gpu/summary" in logged
    assert_nothing_in(announced, rest, logged, *bodies)
