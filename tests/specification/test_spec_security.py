"""Security: URLs, credentials for each endpoint, certificates, rate limits."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click
import pytest
from spec_answers import summary

from gpupool_sync import AcquireTimeout, ConfigError, Endpoint, GPUPool
from gpupool_sync.cli import main
from gpupool_sync.leases.memory import MemoryStore
from helpers import eventually
from servers import Authority, Server, answer, head

SECRET = "s3cr3t"
CREDENTIALS = {
    "bearer": ({"token": SECRET}, f'token = "{SECRET}"', "authorization", f"Bearer {SECRET}"),
    "basic": ({"auth": ("ann", SECRET)}, f'auth = ["ann", "{SECRET}"]', "authorization", "Basic YW5uOnMzY3IzdA=="),
    "header": ({"headers": {"X-Key": SECRET}}, f'headers = {{ X-Key = "{SECRET}" }}', "x-key", SECRET),
}


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def guarded(header, value):
    """A server that answers whoever has the header, and 401 to others."""

    def script(connection):
        while True:
            request = connection.request()
            body = summary()
            status = 200 if request.headers.get(header) == value else 401
            connection.send(head(status, {}, length=len(body)) + body)

    return script


def gpu_of(endpoints=None):
    with GPUPool(endpoints, lease_store=MemoryStore(), poll_interval=0.05, endpoint_timeout=10.0) as pool:
        return pool.acquire(timeout=0).global_gpu_id


def test_endpoint_urls_are_validated_and_sanitized():
    assert Endpoint("HTTP://Server1:80/").url == "http://server1"
    assert Endpoint("http://ann:pass%40word@server1").url == "http://server1"  # the credentials are apart
    bad = ["http://a\r\nHost: b", "http://:8000", "file:///etc/passwd", "http://127.1", "http://a:0x50", "http://a\x00"]
    for url in bad:
        with pytest.raises(ConfigError):
            Endpoint(url)
    with pytest.raises(ConfigError) as caught:
        Endpoint(f"http://ann:{SECRET}@server1:99999")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_authentication_is_specific_to_an_endpoint(kind, authority, tmp_path, monkeypatch):
    """From `Endpoint`, and from the file that `GPU_POOL_CONFIG` names; sent to nobody else, and shown nowhere."""
    options, line, header, value = CREDENTIALS[kind]
    with Server(guarded(header, value), tls=authority.context()) as server, Server(answer(summary())) as other:
        endpoint = Endpoint(server.url, name="box", verify=authority.ca_path, **options)
        assert gpu_of([endpoint, other.url]) in ("box:0", "box:1", f"127.0.0.1-{other.port}:0")
        assert gpu_of([endpoint]) == "box:0"
        assert all(value not in request.headers.values() for request in other.requests)
        assert SECRET not in repr(endpoint)
        file = tmp_path / "gpu-pool.toml"
        file.write_text(f'[[endpoints]]\nurl = "{server.url}"\nname = "box"\nverify = "ca.pem"\n{line}\n')
        file.chmod(0o600)
        monkeypatch.setenv("GPU_POOL_CONFIG", str(file))
        assert gpu_of() == "box:0"
        with pytest.raises(AcquireTimeout, match="status 401"):
            gpu_of([Endpoint(server.url, verify=authority.ca_path)])


def test_a_client_certificate_is_sent(authority):
    chain, key = authority.client_files()
    with Server(answer(summary()), tls=authority.context(client_certificate=True)) as server:
        assert gpu_of([Endpoint(server.url, name="box", verify=authority.ca_path, cert=(chain, key))]) == "box:0"
        with pytest.raises(AcquireTimeout, match="box: "):
            gpu_of([Endpoint(server.url, name="box", verify=authority.ca_path)])


def test_no_credential_is_taken_from_a_command_line():
    """No command has an option for one: command lines are seen by everybody on the machine."""

    def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
        yield path, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from commands(command.get_command(context, name), f"{path} {name}")

    import gpupool_sync.cli as cli

    (group,) = [each for each in vars(cli).values() if isinstance(each, click.Group)]
    found = list(commands(group, "gpupool-sync"))
    assert len(found) > 5
    for path, command in found:
        for parameter in command.params:
            if getattr(parameter, "metavar", None) == "FILE":
                continue  # says where the credential is, which is the safe way
            for word in ("password", "token", "secret", "auth", "cert", "header"):
                assert word not in " ".join(parameter.opts), f"{path} {parameter.opts}"
    assert main(["status", "--token", "x"]) == 2
    assert main(["status", "--endpoints", f"http://ann:{SECRET}@server1"]) == 2


@pytest.mark.parametrize(
    ("names", "trusted", "told"),
    [
        ((), False, "certificate of the server was not accepted.*own CA"),
        (("other.example",), True, "certificate of the server was not accepted.*mismatch"),
    ],
)
def test_https_endpoints_are_verified_by_default_with_a_clear_error(authority, names, trusted, told):
    with Server(answer(summary()), tls=authority.context(*names)) as server:
        endpoint = Endpoint(server.url, name="box", verify=authority.ca_path if trusted else True)
        with pytest.raises(AcquireTimeout, match=told):
            gpu_of([endpoint])
        assert server.requests == ()


def test_rate_limits_of_the_server_are_respected(make_pool, fleet, named):
    """429 with Retry-After: no request until then, and the breaker stays closed."""
    pool = make_pool([named(1)], lease_store=None, max_stats_age=900.0)
    pool.open()
    assert pool.refresh(30)
    fleet[0].fail(429, retry_after=100)
    eventually(lambda: pool.status().endpoints[0].consecutive_failures, 30)
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0)  # its connection for leases hears of it here
    before = fleet[0].request_count(None)
    for _ in range(5):
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=0)
    assert fleet[0].request_count(None) == before
    assert pool._state.engine.monitor._entries["server1"].due > time.monotonic() + 50
    assert pool.status().endpoints[0].breaker == "closed"


def test_an_own_cap_holds_for_all_requests_to_an_endpoint(fleet, named):
    """
    Readings, claims and waits, counted at the server; renewals and releases are sent at once, and count.

    Twenty grants, one after the other, would ask far more often than 40 times per second.
    """
    server = fleet[0]
    with GPUPool([named(1, max_rate=40)], poll_interval=0.02, health_check_interval=0.1) as pool:
        pool.open(wait=True)
        before, begin = server.request_count(None), time.monotonic()
        for _ in range(20):
            with pool.gpu(timeout=30, local=False):
                pass
        asked, took = server.request_count(None) - before, time.monotonic() - begin
        assert 40 <= asked <= 40 * took + 4
