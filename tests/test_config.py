"""Where settings come from, what is refused and how it is said, and that no secret is ever shown."""

from __future__ import annotations

import pathlib
import pickle
import re
import warnings

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpupool_sync import config
from gpupool_sync.config import SETTINGS, Endpoint, Settings, redact_url, resolve
from gpupool_sync.errors import ConfigError

#: Put together, as Hypothesis tries what stands in the sources, and no random text shall be it.
SECRET = "-".join(("s3cr3t", "4711"))
ROOT = pathlib.Path(__file__).resolve().parent.parent


def urls(settings):
    return [endpoint.url for endpoint in settings.endpoints]


def from_environ(**environ):
    return resolve(environ=environ)


def refused(call, *args, **kwargs):
    """The message of the ConfigError that the call raises; nothing secret may be in it, or chained to it."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert SECRET not in str(error)
    assert SECRET not in repr(error)
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__
    return str(caught.value)


# --- URLs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("http://server1:8000", "http://server1:8000"),
        ("  http://server1:8000\n", "http://server1:8000"),
        ("HTTP://Server1.Example.ORG:8000/", "http://server1.example.org:8000"),
        ("http://server1:80", "http://server1"),
        ("https://server1:443//", "https://server1"),
        ("https://server1:80", "https://server1:80"),
        ("http://server1:08000", "http://server1:8000"),
        ("http://gpu_box-1", "http://gpu_box-1"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://[2001:0DB8:0:0:0:0:0:1]", "http://[2001:db8::1]"),
        ("http://[::ffff:10.0.0.1]:8000", "http://10.0.0.1:8000"),
        ("http://server1/Gateway/a//", "http://server1/Gateway/a"),
        ("http://server1/%7euser/ü", "http://server1/%7Euser/%C3%BC"),
        ("http://BÜCHER.example:8000", "http://xn--bcher-kva.example:8000"),
        ("http://server1.:8000", "http://server1.:8000"),
    ],
)
def test_one_server_has_one_url(url, canonical):
    """However an address is written, the same server gets the same URL, which cards are known by."""
    assert Endpoint(url).url == canonical


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "missing"),
        ("server1:8000", "write 'http://server1:8000'"),
        ("//server1:8000", "write 'http://server1:8000'"),
        ("http:/server1", "write 'http://server1'"),
        ("http//server1", "write 'http://server1'"),
        ("localhost", "write 'http://localhost'"),
        ("ftp://server1", "only http:// and https://"),
        ("http://", "host is missing"),
        ("http://:8000", "host is missing"),
        ("http://server1:", "port"),
        ("http://server1:0", "port"),
        ("http://server1:65536", "port"),
        ("http://server1:-1", "port"),
        ("http://server1:80x", "port"),
        ("http://server1:８０", "port"),
        ("http://::1:8000", "brackets"),
        ("http://[::1", "[address]"),
        ("http://[::1]8000", "[address]"),
        ("http://[server1]", "not an IPv6 address"),
        ("http://[10.0.0.1]", "not an IPv6 address"),
        ("http://[fe80::1%25eth0]", "zone"),
        ("http://server 1", "spaces"),
        ("http://server1 http://server2", "separated by commas"),
        ("http://server1:8000;http://server2:8000", "separated by commas"),
        ('"http://server1"', "quotation marks"),
        ('["http://server1"]', "quotation marks and brackets"),
        ("http://server1/a\tb", "spaces"),
        ("http://server1\x00", "control"),
        ("http://server\u200b1", "control"),
        ("http://server1\\@server2", "backslash"),
        ("http://server1?x=1", "'?'"),
        ("http://server1/#top", "'#'"),
        ("http://server1/a@b", "'@'"),
        ("http://server1/%zz", "hexadecimal"),
        ("http://server1/../admin", "'..'"),
        ("http://server1,server2", "host"),
        ("http://-server1", "host"),
        ("http://server..1", "host"),
        ("http://a%41", "host"),
        ("http://" + "a" * 64, "host"),
        ("http://" + "a." * 130, "host"),
        ("http://ü_", "international"),
        ("http://127.1", "IPv4"),
        ("http://0x7f.1", "IPv4"),
        ("http://010.0.0.1", "IPv4"),
        ("http://256.0.0.1", "IPv4"),
        ("http://@server1", "user"),
        ("http://:pw@server1", "user"),
        ("http://u:%ff@server1", "UTF-8"),
        ("http://u:%0a@server1", "auth"),
        (None, "a URL is allowed"),
        (8000, "a URL is allowed"),
        (b"http://server1", "a URL is allowed"),
    ],
)
def test_what_is_no_url_is_refused(url, told):
    """A wrong URL is told at once, with what is wrong."""
    assert told in refused(Endpoint, url)


@pytest.mark.parametrize(
    ("url", "id"),
    [
        ("http://server1", "server1"),
        ("http://server1:80", "server1"),
        ("http://Server1:8000/", "server1-8000"),
        ("https://server1:8443/a/b", "server1-8443-a-b"),
        ("http://[::1]:8000", "--1-8000"),
        ("http://server1/a:b=c", "server1-a-b-c"),
    ],
)
def test_ids_say_where_a_server_is(url, id):
    """The id of an endpoint follows from its own URL, so GPUs keep their names when servers come and go."""
    assert Endpoint(url).id == id
    assert Endpoint(url, name="box").id == "box"


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "a b", "a,b", "a=b", "a\n", "a\x00", 5, "x" * 201])
def test_names_that_would_be_ambiguous_are_refused(name):
    """An endpoint's name never makes "name:0" or "name=URL" readable in two ways."""
    assert "name" in refused(Endpoint, "http://server1", name=name)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://localhost:8000", True),
        ("http://LOCALHOST.", True),
        ("http://gpu.localhost", True),
        ("http://127.0.0.1", True),
        ("http://127.8.9.1:1", True),
        ("http://[::1]", True),
        ("http://[::ffff:127.0.0.1]", True),
        ("http://0.0.0.0:8000", True),
        ("http://server1", False),
        ("http://localhost.example.org", False),
        ("http://10.0.0.1", False),
        ("http://[2001:db8::1]", False),
    ],
)
def test_loopback_is_recognised(url, loopback):
    """A URL that means another machine on every machine is known as such."""
    assert Endpoint(url).is_loopback is loopback


host_texts = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_\-]{0,6}[A-Za-z0-9_])?(\.[A-Za-z]{1,5}){0,2}", fullmatch=True)
hosts = st.one_of(host_texts, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda ip: f"[{ip.exploded}]"))
good_urls = st.builds(
    lambda scheme, host, port, path: f"{scheme}://{host}{'' if port is None else f':{port}'}{path}",
    st.sampled_from(["http", "HTTPS", "Http"]),
    hosts,
    st.none() | st.sampled_from([80, 443]) | st.integers(1, 65535),
    st.from_regex(r"(/[A-Za-z0-9:=~_%7e\-]{0,5}){0,3}", fullmatch=True),
)


@given(good_urls | st.text(max_size=30).map("http://".__add__))
def test_canonical_urls_are_canonical(url):
    """A canonical URL stays as it is, carries no credentials, and its id never has a colon."""
    try:
        endpoint = Endpoint(url)
    except ConfigError:
        return
    again = Endpoint(endpoint.url)
    assert again.url == endpoint.url
    assert again.id == endpoint.id
    assert "@" not in endpoint.url
    assert endpoint.url.isascii()
    assert re.fullmatch(r"[A-Za-z0-9._~-]+", endpoint.id)
    assert isinstance(endpoint.is_loopback, bool)


@given(st.text(max_size=40))
def test_any_text_is_an_endpoint_list_or_a_config_error(text):
    """Whatever stands in the environment, resolving gives settings or a ConfigError."""
    try:
        settings = from_environ(GPU_SERVICE_ENDPOINTS=text)
    except ConfigError as exc:
        assert "GPU_SERVICE_ENDPOINTS" in str(exc)  # noqa: PT017
        return
    assert all(":" not in endpoint.id for endpoint in settings.endpoints)


# --- secrets ------------------------------------------------------------------------------------------


def test_credentials_move_out_of_the_url():
    """A password in a URL is used, and seen nowhere."""
    endpoint = Endpoint(f"http://ann:{SECRET}%40%2F@server1:8000")

    assert endpoint.url == "http://server1:8000"
    assert endpoint.auth == ("ann", f"{SECRET}@/")
    assert SECRET not in repr(endpoint)
    assert SECRET not in endpoint.id
    assert Endpoint("http://ann@server1").auth == ("ann", "")


def test_no_repr_shows_a_secret():
    """Printing an endpoint, or settings with one, gives nothing away."""
    plain = Endpoint("http://a", auth=("u", SECRET), headers={"X-Key": SECRET}, cert=(SECRET, SECRET))
    settings = resolve([plain, Endpoint("http://b", token=SECRET)], lease_store=f"redis://:{SECRET}@server1/0")

    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    assert "redis://***@server1/0" in repr(settings)
    assert settings.lease_store == f"redis://:{SECRET}@server1/0"


@pytest.mark.parametrize(
    "url",
    [
        f"http://ann:{SECRET}@server1:99999",
        f"http://ann:{SECRET}/x@server1",
        f"http://ann:8000/{SECRET}@server1",
        f"http://ann:x?{SECRET}@server1",
        f"http://ann:x#{SECRET}@server1",
        f"http://ann:x@{SECRET}@server1:x",
        f"http://ann:x {SECRET}@server1",
        f"http://ann:\\{SECRET}@server1",
        f"ann:{SECRET}@server1",
        f"ftp://ann:{SECRET}@server1",
        f"http://server1?token={SECRET}",
        f"server1?token={SECRET}",
        f"http://ann:x,{SECRET}@server1",
        f"http://ann:{SECRET},x@server1",
        f"http://ann:x,{SECRET},y@server1",
        f"ann:x,{SECRET}@server1",
        f"http://ann:x={SECRET}@server1:x",
        f"a=ann:{SECRET}@server1",
        f"a=http://ann:{SECRET}@server1:x",
        f"a b=http://ann:{SECRET}@server1",
        f"server1?token={SECRET},http://server2",
        f"http://ann:{SECRET}@server1,http://bob:{SECRET}@server1",
        f"a=http://ann:{SECRET}@server1,b=http://ann:{SECRET}@server1",
        f"http://ann:{SECRET}@server1,https://ann:{SECRET}@server1",
    ],
)
def test_errors_show_no_password(url):
    """However a URL is mistyped, its password does not end up in a log."""
    refused(resolve, url, environ={})
    refused(resolve, [url], environ={})
    refused(from_environ, GPU_SERVICE_ENDPOINTS=url)


@pytest.mark.parametrize(
    "options",
    [
        {"token": f"{SECRET}\n"},
        {"token": ""},
        {"token": f"{SECRET} x"},
        {"token": SECRET.encode()},
        {"token": SECRET, "auth": ("u", SECRET)},
        {"token": SECRET, "headers": {"authorization": SECRET}},
        {"auth": SECRET},
        {"auth": ("u", SECRET, "x")},
        {"auth": ("u", f"{SECRET}\r\n")},
        {"auth": ("", SECRET)},
        {"auth": ("u:x", SECRET)},
        {"auth": ("u", None)},
        {"headers": {"X-Key": f"{SECRET}\nX-Admin: 1"}},
        {"headers": {"X-Key": f"{SECRET}\u2028"}},
        {"headers": {"X-Key": f" {SECRET}"}},
        {"headers": {"X-Key": f"{SECRET}…"}},
        {"headers": {"X-Key": SECRET.encode()}},
        {"headers": {f"Bearer {SECRET}": "X"}},
        {"headers": {"X-Key": SECRET, "x-key": SECRET}},
        {"headers": SECRET},
        {"headers": [SECRET]},
        {"headers": 5},
        {"verify": None},
        {"verify": ""},
        {"verify": 1},
        {"cert": 5},
        {"cert": ""},
        {"cert": (SECRET,)},
        {"cert": (SECRET, None)},
        {"local": 1},
        {"max_rate": 0},
        {"max_rate": -1.0},
        {"max_rate": True},
        {"max_rate": "1"},
        {"max_rate": float("nan")},
        {"max_rate": float("inf")},
        {"max_rate": 10**400},
    ],
)
def test_bad_options_of_an_endpoint_are_refused(options):
    """A wrong credential or option is told by its name, never by its value."""
    message = refused(Endpoint, "http://server1", **options)

    assert any(name in message for name in options)


def test_credentials_in_two_places_are_refused():
    """It is never a matter of luck which credentials are sent."""
    refused(Endpoint, f"http://u:{SECRET}@server1", auth=("u", SECRET))
    refused(Endpoint, f"http://u:{SECRET}@server1", token=SECRET)


def test_good_options_are_kept():
    """Everything that is given is normalised to what can cross threads and processes."""
    endpoint = Endpoint(
        "https://server1",
        token="abc",
        headers={"X-B": "2", "x-a": ""},
        verify=pathlib.Path("/etc/ca.pem"),
        cert=("/c.pem", pathlib.Path("/k.pem")),
        local=True,
        max_rate=2,
    )

    assert endpoint.headers == (("x-a", ""), ("X-B", "2"))
    assert endpoint.verify == "/etc/ca.pem"
    assert endpoint.cert == ("/c.pem", "/k.pem")
    assert endpoint.max_rate == 2.0
    assert hash(endpoint) == hash(attrs.evolve(endpoint))
    assert endpoint == attrs.evolve(endpoint)
    assert attrs.evolve(endpoint, name="x").id == "x"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        endpoint.url = "http://other"


def test_pickles_contain_the_credentials():
    """A spawned process gets settings that it can work with."""
    settings = resolve(
        [Endpoint("http://a", token=SECRET), f"http://u:{SECRET}@b"], lease_store="redis://x", environ={}
    )

    copy = pickle.loads(pickle.dumps(settings))
    assert copy == settings
    assert copy.endpoints[0].token == SECRET
    assert copy.endpoints[1].auth == ("u", SECRET)
    assert copy.endpoints[1].id == "b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://server1:6379/0", "redis://server1:6379/0"),
        ("redis://u:p@server1", "redis://***@server1"),
        ("redis://:p@x@server1", "redis://***@server1"),
        ("redis://server1/0?password=p", "redis://server1/0?***"),
        ("u:p@server1", "***@server1"),
        ("http://a,http://u:p@b", "http://***@b"),
        ("memory:", "memory:"),
        ("http://a?", "http://a?"),
        ("", ""),
    ],
)
def test_redaction(text, shown):
    """What can be secret in a URL is replaced, the rest stays readable."""
    assert redact_url(text) == shown


@given(st.text(max_size=20), st.text(max_size=20))
def test_nothing_before_the_last_at_sign_survives(front, back):
    """No text that stands before an '@' is shown, wherever it is."""
    assert SECRET not in redact_url(f"{front}{SECRET}@{back}")
    assert SECRET not in redact_url(f"http://u:{SECRET}{front}@{back}")


# --- endpoints from the argument and the environment --------------------------------------------------


def test_without_configuration_the_pool_is_this_machine():
    """With nothing set, defaults hold and no server is asked."""
    settings = resolve(environ={})

    assert settings == Settings()
    assert settings.endpoints == ()
    for setting in SETTINGS:
        if setting.name != "max_stats_age":
            assert getattr(settings, setting.name) == setting.default
    assert settings.max_stats_age == 3 * 5.0 + 10.0


@pytest.mark.parametrize(
    "endpoints",
    [
        "http://a:1,http://b",
        " http://a:1 , ,http://b/,, ",
        ["http://a:1", "http://b"],
        ("http://a:1,http://b",),
        [Endpoint("http://a:1"), "", "http://b,"],
        ["http://a:1", "HTTP://A:1/", "http://b", Endpoint("http://b:80")],
    ],
)
def test_endpoints_in_every_form(endpoints):
    """Lists, strings and Endpoint objects may be mixed; empty items and repetitions are ignored."""
    assert urls(resolve(endpoints, environ={})) == ["http://a:1", "http://b"]


def test_one_endpoint_object():
    """A single Endpoint need not be wrapped in a list."""
    endpoint = Endpoint("http://a", token="t")

    assert resolve(endpoint, environ={}).endpoints == (endpoint,)


def test_named_endpoints_in_strings():
    """name=URL gives an endpoint its public name; a '=' inside a URL does not."""
    settings = resolve("left=http://a:1, right = http://b, http://u:p=q@c", environ={})

    assert [endpoint.id for endpoint in settings.endpoints] == ["left", "right", "c"]
    assert settings.endpoints[2].auth == ("u", "p=q")


@pytest.mark.parametrize("variable", ["GPU_SERVICE_ENDPOINTS", "GPU_STATS_SERVICE_ENDPOINTS", "GPU_SERVICE_ENDPOINT"])
def test_endpoints_from_the_environment(variable):
    """Each of the predecessor's variables works alone."""
    assert urls(from_environ(**{variable: "box=http://a:1,"})) == ["http://a:1"]


def test_the_real_environment_is_used(monkeypatch):
    """Without a mapping, the process's environment counts."""
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", "http://from-environment")

    assert urls(resolve()) == ["http://from-environment"]


@pytest.mark.parametrize("nothing", [None, "", " , ,", [], (), ["", ","]])
def test_no_endpoints_in_the_argument_means_the_environment(nothing):
    """An argument that names no endpoint counts as not given."""
    assert urls(resolve(nothing, environ={"GPU_SERVICE_ENDPOINT": "http://a"})) == ["http://a"]


def test_arguments_win_over_the_environment():
    """What the program says beats what the environment says, without a word."""
    environ = {"GPU_SERVICE_ENDPOINTS": "nonsense", "GPU_POLLING_INTERVAL": "nonsense"}
    settings = resolve("http://a", environ=environ, poll_interval=2)

    assert urls(settings) == ["http://a"]
    assert settings.poll_interval == 2.0


def test_the_plural_wins_with_one_warning():
    """If several variables name endpoints, one is used and the user is told which."""
    environ = {
        "GPU_SERVICE_ENDPOINTS": "http://a",
        "GPU_STATS_SERVICE_ENDPOINTS": "http://b",
        "GPU_SERVICE_ENDPOINT": "http://c",
    }
    with pytest.warns(UserWarning, match="is ignored") as caught:
        settings = resolve(environ=environ)

    assert urls(settings) == ["http://a"]
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in environ)
    assert caught[0].filename == __file__

    with pytest.warns(UserWarning, match="GPU_STATS_SERVICE_ENDPOINTS is set, so GPU_SERVICE_ENDPOINT is"):
        assert urls(resolve(environ={**environ, "GPU_SERVICE_ENDPOINTS": " ,, "})) == ["http://b"]


def test_empty_variables_are_unset():
    """A variable that a script left empty neither counts nor warns."""
    environ = {name: " " for setting in SETTINGS for name in setting.variables}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(environ=environ) == Settings()


def test_the_singular_names_one():
    """Several servers in the variable for one are an error that says where they belong."""
    message = refused(from_environ, GPU_SERVICE_ENDPOINT="http://a,http://b")

    assert "GPU_SERVICE_ENDPOINT:" in message
    assert "GPU_SERVICE_ENDPOINTS takes several" in message


@pytest.mark.parametrize("endpoints", [5, b"http://a", {"a": "http://a"}, {"http://a"}, [5], [None], [["http://a"]]])
def test_other_types_of_endpoints_are_refused(endpoints):
    """What cannot be a list of endpoints is told as such."""
    assert "endpoints" in refused(resolve, endpoints, environ={})


def test_one_url_configured_in_two_ways_is_refused():
    """It is never a matter of luck which name or credentials a server gets."""
    message = refused(resolve, "left=http://a,right=http://a/", environ={})
    assert "'left'" in message
    assert "'right'" in message
    assert "differ in name" in message

    message = refused(resolve, ["http://a", Endpoint("http://a", token=SECRET)], environ={})
    assert "differ in token" in message


@pytest.mark.parametrize("pair", ["http://a,https://a", "http://a:8000,http://a-8000", "x=http://a,x=http://b"])
def test_two_servers_with_one_id_are_refused(pair):
    """GPUs of two servers never get the same name; the error says how to tell them apart."""
    message = refused(resolve, pair, environ={})

    assert "same id" in message
    assert "name=" in message


def test_errors_name_the_variable():
    """A wrong URL in the environment is traced to its variable."""
    assert refused(from_environ, GPU_STATS_SERVICE_ENDPOINTS="http://a,b:1").startswith(
        "GPU_STATS_SERVICE_ENDPOINTS: endpoint 'b:1': "
    )
    assert refused(resolve, ["b:1"], environ={}).startswith("endpoints: endpoint 'b:1': ")


# --- the other settings -------------------------------------------------------------------------------

NUMBERS = [
    ("memory_threshold", "GPU_MEMORY_THRESHOLD_PERCENT"),
    ("utilization_threshold", "GPU_UTILIZATION_THRESHOLD_PERCENT"),
    ("poll_interval", "GPU_POLLING_INTERVAL"),
    ("poll_interval", "GPU_POLLING_INTERVAL_SECONDS"),
    ("endpoint_timeout", "GPU_ENDPOINT_TIMEOUT"),
    ("ttl", "GPU_POOL_TTL"),
]
WHOLE = [
    ("endpoint_max_retries", "GPU_ENDPOINT_MAX_RETRIES"),
    ("max_waiting", "GPU_POOL_MAX_WAITING"),
    ("watch", "GPU_POOL_WATCH"),
    ("breaker_failures", "GPU_POOL_BREAKER_FAILURES"),
]
LONG = [("health_check_interval", "GPU_ENDPOINT_HEALTH_CHECK_INTERVAL"), ("max_stats_age", "GPU_POOL_MAX_STATS_AGE")]


@pytest.mark.parametrize(("name", "variable"), NUMBERS + LONG)
def test_numbers_from_the_environment(name, variable):
    """Each number can be set in the environment, in the usual ways to write one."""
    for text, number in (("7", 7.0), (" 7.5 ", 7.5), ("+7", 7.0), ("75e-1", 7.5), ("7.", 7.0)):
        assert getattr(from_environ(**{variable: text}), name) == number


@pytest.mark.parametrize(("name", "variable"), WHOLE)
def test_whole_numbers_from_the_environment(name, variable):
    """Each count can be set in the environment."""
    assert getattr(from_environ(**{variable: " 7 "}), name) == 7


@pytest.mark.parametrize(("name", "variable"), NUMBERS + LONG + WHOLE)
@pytest.mark.parametrize(
    "text", ["x", "nan", "inf", "-inf", "1e999", "-1", "true", "1_0", "٧", "0x7", "7s", "7,5", "9" * 5000, "--1"]
)
def test_wrong_numbers_in_the_environment(name, variable, text):
    """A wrong number is an error with the variable, the value and what is allowed; no default steps in."""
    message = refused(from_environ, **{variable: text})

    assert message.startswith(f"{variable}={text[:50]!r}"[:60])
    assert "allowed" in message
    assert len(message) < 300


@pytest.mark.parametrize(("name", "variable"), NUMBERS + LONG + WHOLE)
@pytest.mark.parametrize("value", [True, False, "7", float("nan"), float("inf"), -1, -0.5, 10**400, [7], 7j, object()])
def test_wrong_numbers_in_arguments(name, variable, value):
    """Arguments must be numbers, and what is none is told by the argument's name."""
    message = refused(resolve, environ={}, **{name: value})

    assert message.startswith(f"{name}=")
    assert "allowed" in message


@pytest.mark.parametrize(("name", "variable"), WHOLE)
def test_counts_are_whole(name, variable):
    """A count with a fraction is an error, not rounded."""
    refused(resolve, environ={}, **{name: 1.5})
    refused(from_environ, **{variable: "1.5"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_threshold", 0),
        ("memory_threshold", 100.1),
        ("utilization_threshold", 0.0),
        ("poll_interval", 0),
        ("poll_interval", 1e9),
        ("endpoint_timeout", 0),
        ("ttl", 0),
        ("ttl", 300.1),
        ("endpoint_max_retries", 101),
        ("breaker_failures", 0),
    ],
)
def test_numbers_out_of_range(name, value):
    """A value that would make the pool useless is refused."""
    assert refused(resolve, environ={}, **{name: value}).startswith(f"{name}={value}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory_threshold", 100), ("ttl", 300), ("endpoint_max_retries", 0), ("max_waiting", 0), ("poll_interval", 0.01)],
)
def test_numbers_at_the_edge(name, value):
    """The ends of each range are allowed."""
    assert getattr(resolve(environ={}, **{name: value}), name) == value


def test_both_polling_variables():
    """The second name of the polling interval is ignored with a warning if the first is set."""
    with pytest.warns(UserWarning, match="GPU_POLLING_INTERVAL is set, so GPU_POLLING_INTERVAL_SECONDS is ignored"):
        settings = from_environ(GPU_POLLING_INTERVAL="2", GPU_POLLING_INTERVAL_SECONDS="3")

    assert settings.poll_interval == 2.0


def test_unknown_options_are_named():
    """A misspelt option is an error, as for any function."""
    with pytest.raises(TypeError, match="'pol_interval'"):
        resolve(environ={}, pol_interval=3)


class Ranks:
    def order(self, endpoints, request):
        return endpoints


class Store:
    def claim(self, claim):
        raise AssertionError


@pytest.mark.parametrize("text", ["round_robin", "ROUND-ROBIN", " Round_Robin "])
def test_strategies_by_name(text):
    """A strategy's name may be written with a dash and in any case."""
    assert resolve(environ={}, strategy=text).strategy == "round_robin"
    assert from_environ(GPU_LOAD_BALANCING_STRATEGY=text).strategy == "round_robin"


def test_strategies_of_ones_own():
    """An object with `order`, or a plain function, is a strategy."""
    for strategy in (Ranks(), sorted):
        assert resolve(environ={}, strategy=strategy).strategy is strategy


@pytest.mark.parametrize("strategy", ["random", "", 5, object(), ["weighted"]])
def test_what_is_no_strategy(strategy):
    """A wrong strategy is an error that lists the names."""
    message = refused(resolve, environ={}, strategy=strategy)

    assert all(name in message for name in config.STRATEGIES)


def test_a_class_is_no_strategy():
    """Forgetting the parentheses is told as such."""
    assert "Ranks()" in refused(resolve, environ={}, strategy=Ranks)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("memory", "memory:"),
        ("memory:", "memory:"),
        ("host", "host:"),
        ("HOST:", "host:"),
        ("host:/var/lock/my gpus", "host:/var/lock/my gpus"),
        ("redis://server1:6379/0", "redis://server1:6379/0"),
        ("REDISS://server1", "rediss://server1"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_lease_stores_by_url(text, kept):
    """The kinds of lease stores are told by the beginning."""
    assert resolve(environ={}, lease_store=text).lease_store == kept
    assert from_environ(GPU_POOL_LEASE_STORE=text).lease_store == kept


def test_a_lease_store_of_ones_own():
    """An object that can be asked for a claim is a lease store."""
    store = Store()

    assert resolve(environ={}, lease_store=store).lease_store is store


@pytest.mark.parametrize(
    "store",
    [
        "",
        "file:/tmp",
        "http://server1",
        "memory:x",
        "host:relative",
        "host:/a\nb",
        f"redis:{SECRET}@server1",
        f"redis//:{SECRET}@server1",
        f"redis://:{SECRET} x@server1",
        "redis",
        5,
        object(),
        Store,
    ],
)
def test_what_is_no_lease_store(store):
    """A wrong lease store is an error that lists the kinds, or says what is wrong with this one."""
    message = refused(resolve, environ={}, lease_store=store)

    assert message.startswith("lease_store")
    assert "redis://" in message or "absolute" in message


def test_pools_have_names():
    """The pool's name can be set, and must be something people can read."""
    assert from_environ(GPU_POOL_NAME=" nightly run ").name == "nightly run"
    for name in ("", " ", "a\nb", 5, "x" * 201):
        assert "name" in refused(resolve, environ={}, name=name)


def test_slow_polls_raise_the_default_health_interval():
    """Whoever polls every two minutes need not set the health interval as well."""
    settings = from_environ(GPU_POLLING_INTERVAL="120")

    assert settings.health_check_interval == 120.0
    assert settings.max_stats_age == 370.0


def test_settings_that_contradict_each_other():
    """Two settings that make no sense together are an error that names both."""
    message = refused(from_environ, GPU_POLLING_INTERVAL="20", GPU_ENDPOINT_HEALTH_CHECK_INTERVAL="10")
    assert "GPU_POLLING_INTERVAL=20" in message
    assert "GPU_ENDPOINT_HEALTH_CHECK_INTERVAL=10" in message

    message = refused(resolve, environ={"GPU_POLLING_INTERVAL": "20"}, max_stats_age=10)
    assert "GPU_POLLING_INTERVAL=20" in message
    assert "max_stats_age=10" in message

    assert "the default poll_interval=5" in refused(resolve, environ={}, health_check_interval=1)


def test_an_explicit_age_is_kept():
    """max_stats_age is computed only if it is not given."""
    assert resolve(environ={}, max_stats_age=60).max_stats_age == 60.0


# --- the table and its documentation ------------------------------------------------------------------


def table():
    """The rows that docs/configuration.md must have."""

    def shown(default):
        if default is None or default == ():
            return "unset"
        return f"`{default:g}`" if isinstance(default, (int, float)) else f"`{default}`"

    return [
        f"| `{setting.name}` | {', '.join(f'`{name}`' for name in setting.variables)} | {shown(setting.default)} "
        f"| {setting.allowed} | {setting.help} |"
        for setting in SETTINGS
    ]


@pytest.mark.checkout
def test_the_documentation_has_the_table():
    """What docs/configuration.md says of each setting is what the code does."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| `[a-z_]+` \| `GPU_", line)]

    assert rows == table(), "the rows should be:\n" + "\n".join(table())


@pytest.mark.checkout
def test_the_documentation_has_every_option_of_an_endpoint():
    """Each argument of Endpoint is explained."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    for field in attrs.fields(Endpoint):
        assert f"| `{field.name}` |" in text


def test_settings_and_table_agree():
    """Every row of the table is a field of the settings, and the other way round."""
    fields = {field.name for field in attrs.fields(Settings)}
    assert {setting.name for setting in SETTINGS} == fields - {"sources", "endpoints_from"}  # both from endpoints


def test_every_default_is_allowed():
    """Writing a default into the environment changes nothing."""
    environ = {setting.variables[0]: str(setting.default) for setting in SETTINGS if setting.default not in (None, ())}

    assert resolve(environ=environ) == Settings()
