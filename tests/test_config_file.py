"""GPU_POOL_CONFIG: what a file may say, who overrules whom, and how servers are asked that it has secrets for."""

from __future__ import annotations

import json
import pickle
import warnings

import attrs
import pytest

from gpupool_sync import AcquireTimeout, ConfigError, Endpoint, EndpointSource, GPUPool, config
from gpupool_sync.config import SETTINGS, STRATEGY_OPTIONS, resolve
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.strategies import STRATEGIES
from servers import Authority, Server, answer

SECRET = "s3cr3t"
SUMMARY = json.dumps(
    {
        "gpu_count": 1,
        "gpus_summary": [{"gpu_id": 0, "name": "A100", "memory_usage_percent": 1.0, "utilization_percent": 0.0}],
        "timestamp": "2026-01-01T00:00:00",
    }
).encode()


@pytest.fixture
def write(tmp_path):
    """Write the file that only its owner may read; returns the environment that names it."""

    def make(text, mode=0o600):
        path = tmp_path / "gpu-pool.toml"
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return {"GPU_POOL_CONFIG": str(path)}

    return make


def refused(environ, **options):
    """What the ConfigError says; nothing secret is in it, or chained to it."""
    with pytest.raises(ConfigError) as caught:
        resolve(environ=environ, **options)
    error = caught.value
    while error is not None:
        assert SECRET not in str(error) + repr(error) + repr(vars(error))
        error = error.__cause__ or error.__context__
    return str(caught.value)


ALL = """
endpoints = "http://a:1,file:/etc/gpus"
strategy = "weighted"
strategy_options = { seed = 3 }
lease_store = "memory:"
memory_threshold = 70
utilization_threshold = 60.5
poll_interval = 2
health_check_interval = 20
max_stats_age = 40
endpoint_timeout = 3
endpoint_max_retries = 1
ttl = 30
max_waiting = 7
name = "nightly"
breaker_failures = 2
progress = true
watch = 50
"""


def test_the_file_has_every_setting(write):
    """Whatever an argument can say, the file can."""
    environ = write(ALL)
    settings = resolve(environ=environ)
    for setting in SETTINGS:
        assert f"\n{setting.name} = " in ALL, "a setting was added: put it into ALL"
        if setting.name != "endpoints":
            assert getattr(settings, setting.name) != setting.default, setting.name
    assert [each.url for each in settings.endpoints] == ["http://a:1"]
    assert [each.spec for each in settings.sources] == ["file:/etc/gpus"]
    assert settings.endpoints_from == environ["GPU_POOL_CONFIG"]
    assert settings.strategy_options == {"seed": 3}
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_argument_before_variable_before_file_before_default(write):
    """Each beats the next, setting by setting."""
    environ = write('poll_interval = 2\nttl = 2\nname = "file"\nendpoints = ["http://file"]\n')
    environ |= {"GPU_POLLING_INTERVAL": "3", "GPU_POOL_TTL": "3", "GPU_SERVICE_ENDPOINTS": "http://variable"}
    settings = resolve(environ=environ, poll_interval=4)
    assert (settings.poll_interval, settings.ttl, settings.name, settings.max_waiting) == (4.0, 3.0, "file", None)
    assert [each.url for each in settings.endpoints] == ["http://variable"]
    assert settings.endpoints_from == "GPU_SERVICE_ENDPOINTS"
    assert [each.url for each in resolve("http://argument", environ=environ).endpoints] == ["http://argument"]
    environ["GPU_SERVICE_ENDPOINTS"] = " ,"
    assert [each.url for each in resolve(environ=environ).endpoints] == ["http://file"]
    assert resolve(environ={"GPU_POOL_CONFIG": " "}) == resolve(environ={})


def test_tables_of_endpoints(write, tmp_path):
    """With every way to be let in; paths are relative to the file."""
    environ = write(
        f"""
        [[endpoints]]
        url = "https://a"
        name = "big"
        token = "{SECRET}"
        verify = "our-ca.pem"
        [[endpoints]]
        url = "https://b"
        auth = ["ann", "{SECRET}"]
        cert = ["client.pem", "/etc/client.key"]
        max_rate = 2
        [[endpoints]]
        url = "https://c"
        headers = {{ X-Api-Key = "{SECRET}" }}
        verify = false
        local = true
        cert = "both.pem"
        server_name = "c.example"
        [[endpoints]]
        url = "dns+https://gpus.example:8443"
        token = "{SECRET}"
        """
    )
    settings = resolve(environ=environ)
    assert settings.endpoints == (
        Endpoint("https://a", name="big", token=SECRET, verify=str(tmp_path / "our-ca.pem")),
        Endpoint("https://b", auth=("ann", SECRET), cert=(str(tmp_path / "client.pem"), "/etc/client.key"), max_rate=2),
        Endpoint(
            "https://c",
            headers={"X-Api-Key": SECRET},
            verify=False,
            local=True,
            cert=str(tmp_path / "both.pem"),
            server_name="c.example",
        ),
    )
    assert settings.sources == (EndpointSource("dns+https://gpus.example:8443", token=SECRET),)
    assert SECRET not in repr(settings)


def test_lists_of_endpoints_may_be_mixed(write):
    """URLs and tables in one list."""
    environ = write('endpoints = ["http://a", "box=http://b", { url = "http://c", name = "c" }]')
    assert [each.id for each in resolve(environ=environ).endpoints] == ["a", "box", "c"]


TWO = "[[endpoints]]\nurl = 'http://a'\n[[endpoints]]\nurl = 'http://b'\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pol_interval = 5", "pol_interval: there is no such setting; did you mean poll_interval?"),
        ('poll_interval = "5"', "poll_interval='5': a number of seconds"),
        ("max_waiting = 1.5", "max_waiting=1.5: a whole number"),
        ("breaker_failures = true", "breaker_failures=True"),
        ('strategy = "best"', "strategy='best': availability, round_robin, weighted"),
        ("[strategy_options]\nsprea = 1", "strategy_options: availability has no option 'sprea'; it has spread, seed"),
        ("[strategy_options]\nspread = 1", "strategy_options: spread=1: True or False"),
        ("poll_interval = 9\nmax_stats_age = 8", "max_stats_age=8: at least "),
        ("endpoints = 5", "endpoints=5: "),
        ("endpoints = [5]", "endpoints: item 5"),
        ('endpoints = ["a:1"]', "endpoints: endpoint 'a:1'"),
        ("[[endpoints]]\nname = 'x'", "endpoints[1].url: the URL of a server is needed"),
        (TWO + f"tokn = '{SECRET}'", "endpoints[2].tokn: an endpoint has no such option; did you mean token?"),
        (f"[[endpoints]]\nurl = 'http://a'\ntoken = '{SECRET} '", "endpoints[1]: endpoint 'http://a': token:"),
        (f"[[endpoints]]\nurl = 'http://u:{SECRET}@a'\ntoken = 'x'", "[1]: endpoint 'http://***@a': only one of"),
        ("[[endpoints]]\nurl = 'http://a'\nauth = 'ann'", "auth: a pair"),
        ("[[endpoints]]\nurl = 'file:gpus'", "endpoints[1]: endpoint source 'file:gpus': the path"),
        (f"[[endpoints]]\nurl = 'http://a'\ntoken = '{SECRET}\n", "not TOML: "),
        (f'token = "{SECRET}\\q"', "line 1"),
        (f'"{SECRET} x" = 5', "…: there is no such setting"),
        ("a = 1\na = 2", "not TOML: "),
    ],
)  # fmt: skip
def test_errors_name_file_and_key(write, text, told):
    """And what is allowed, and never a secret."""
    environ = write(text)
    message = refused(environ)
    assert environ["GPU_POOL_CONFIG"] in message
    assert told in message


def test_a_file_that_cannot_be_read(write, tmp_path):
    """The error names variable and file."""
    assert "GPU_POOL_CONFIG='/nowhere/x.toml': cannot be read: No such file" in refused(
        {"GPU_POOL_CONFIG": "/nowhere/x.toml"}
    )
    assert "not a regular file" in refused({"GPU_POOL_CONFIG": str(tmp_path)})
    (tmp_path / "x.toml").write_bytes(b'name = "\xff"')
    assert "not UTF-8" in refused({"GPU_POOL_CONFIG": str(tmp_path / "x.toml")})


WITH_SECRETS = [
    f"[[endpoints]]\nurl = 'http://a'\ntoken = '{SECRET}'",
    f"[[endpoints]]\nurl = 'http://a'\nheaders = {{ X-Key = '{SECRET}' }}",
    f"endpoints = 'http://u:{SECRET}@a'",
    f"endpoints = ['dns+http://u:{SECRET}@gpus.example']",
    f"lease_store = 'redis://:{SECRET}@locks'",
]


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_a_file_with_secrets_that_all_may_read_warns(write, text):
    """Also when an argument overrules it; the warning shows no secret."""
    environ = write(text, mode=0o644)
    for options in ({}, {"endpoints": "http://b", "lease_store": "memory:"}):
        with pytest.warns(UserWarning, match="every user of this machine may read it: chmod 600") as caught:
            resolve(environ=environ, **options)
        assert SECRET not in str(caught[0].message)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("text", "mode"), [*((text, 0o640) for text in WITH_SECRETS), ("endpoints = 'http://a'", 0o644)]
)
def test_no_warning_without_reason(write, text, mode):
    """A group may share a file; without secrets anybody may read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(environ=write(text, mode=mode))


# -- the strategy and its options ------------------------------------------------------------------------------


def test_the_literal_strategy(monkeypatch):
    """The highest percentage first, in every form in which it can be asked for."""
    monkeypatch.setenv("GPU_LOAD_BALANCING_STRATEGY_OPTIONS", "Spread=FALSE".lower())
    for pool in (GPUPool(strategy_options={"spread": False, "seed": 1}), GPUPool(strategy="availability")):
        assert pool._state.strategy._spread is False
    assert GPUPool(strategy="weighted", strategy_options={"seed": 5})._state.strategy._seed == 5
    assert GPUPool(strategy_options={})._state.strategy._spread is True


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strategy_options": {"sprad": False}}, "strategy_options: availability has no option 'sprad'"),
        ({"strategy_options": {"spread": "no"}}, "spread='no': True or False"),
        ({"strategy_options": {"seed": True}}, "seed=True: a whole number"),
        ({"strategy_options": "spread=false"}, "strategy_options="),
        ({"strategy_options": {5: 6}}, "strategy_options="),
        (
            {"strategy": "weighted", "strategy_options": {"spread": False}},
            "weighted has no option 'spread'; it has seed",
        ),
        ({"strategy": sorted, "strategy_options": {"spread": False}}, "a strategy of your own"),
    ],
)
def test_wrong_options_of_a_strategy(options, told):
    """Checked when the pool is made, and named."""
    with pytest.raises(ConfigError) as caught:
        GPUPool(**options)
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["spread", "=false", "spread=false,spread=true", "spread=maybe"])
def test_wrong_options_in_the_environment(text):
    """The variable is named."""
    assert "GPU_LOAD_BALANCING_STRATEGY_OPTIONS" in refused({"GPU_LOAD_BALANCING_STRATEGY_OPTIONS": text})


def test_a_wrong_strategy_in_the_environment_names_the_variable(monkeypatch):
    """So that nobody looks for it in the program."""
    monkeypatch.setenv("GPU_LOAD_BALANCING_STRATEGY", "fastest")
    with pytest.raises(ConfigError, match="GPU_LOAD_BALANCING_STRATEGY='fastest': availability, round_robin, weighted"):
        GPUPool()


def test_settings_know_the_options_of_the_strategies():
    """The table of options is what the strategies take."""
    assert set(STRATEGIES) == set(STRATEGY_OPTIONS)
    for name, options in STRATEGY_OPTIONS.items():
        values = {option: kind(1) for option, kind in options.items()}
        assert STRATEGIES[name](**values)._settings() == tuple(values.values())


# -- being let in ----------------------------------------------------------------------------------------------


def guarded(allowed):
    """A server that answers only who says the right words."""

    def script(connection):
        while True:
            request = connection.request()
            status = 200 if allowed(request.headers) else 401
            answer_now = SUMMARY if status == 200 else b"{}"
            connection.send(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(answer_now), answer_now))

    return script


def gpu_by(environ, monkeypatch):
    """The GPU that a pool gets that was configured by the file alone."""
    monkeypatch.setenv("GPU_POOL_CONFIG", environ["GPU_POOL_CONFIG"])
    with GPUPool(lease_store=MemoryStore(), poll_interval=0.05, endpoint_timeout=5.0) as pool:
        return pool.acquire(timeout=0).global_gpu_id


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.mark.parametrize(
    ("table", "header", "value"),
    [
        (f'token = "{SECRET}"', "authorization", f"Bearer {SECRET}"),
        (f'auth = ["ann", "{SECRET}"]', "authorization", "Basic YW5uOnMzY3IzdA=="),
        (f'headers = {{ X-Api-Key = "{SECRET}" }}', "x-api-key", SECRET),
    ],
    ids=["token", "basic", "header"],
)
def test_credentials_of_the_file_open_the_server(write, authority, monkeypatch, table, header, value):
    """Over TLS with an own CA; without them the server refuses, and the error says so and shows nothing."""
    server = Server(guarded(lambda headers: headers.get(header) == value), tls=authority.context())
    with server:
        head = f'[[endpoints]]\nurl = "{server.url}"\nname = "box"\nverify = "ca.pem"\n'
        assert gpu_by(write(head + table), monkeypatch) == "box:0"
        with pytest.raises(AcquireTimeout, match="status 401") as caught:
            gpu_by(write(head), monkeypatch)
        assert SECRET not in str(caught.value)


def test_a_client_certificate_of_the_file_opens_the_server(write, authority, monkeypatch):
    """Without it the error says what is missing."""
    authority.client_files("client")
    with Server(answer(SUMMARY), tls=authority.context(client_certificate=True)) as server:
        head = f'[[endpoints]]\nurl = "{server.url}"\nname = "box"\nverify = "ca.pem"\n'
        assert gpu_by(write(head + 'cert = ["client.pem", "client.key"]'), monkeypatch) == "box:0"
        with pytest.raises(AcquireTimeout, match=r"box: .*"):
            gpu_by(write(head), monkeypatch)


@pytest.mark.parametrize(
    ("verify", "names", "told"),
    [
        ("", (), "certificate of the server was not accepted.*own CA"),
        ('verify = "ca.pem"', ("other.example",), "certificate of the server was not accepted.*mismatch"),
        ('verify = "nowhere.pem"', (), "nowhere.pem: No such file"),
    ],
    ids=["unknown CA", "another name", "no CA file"],
)
def test_tls_is_verified(write, authority, monkeypatch, verify, names, told):
    """By default, too; the error says what is wrong with the certificate."""
    with Server(answer(SUMMARY), tls=authority.context(*names)) as server:
        environ = write(f'[[endpoints]]\nurl = "{server.url}"\n{verify}\n')
        with pytest.raises(AcquireTimeout, match=told):
            gpu_by(environ, monkeypatch)
        assert server.requests == ()


def test_the_documentation_knows_the_file():
    """Every option of an endpoint can stand in a table: `Endpoint` is asked for them."""
    assert {field.name for field in attrs.fields(config.Endpoint) if field.init} == {
        "url", "name", "token", "auth", "headers", "verify", "cert", "local", "max_rate", "server_name",
    }  # fmt: skip
