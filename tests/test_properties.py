"""Whatever comes in from outside is taken, or refused with one error of ours: parsers, ids, URLs, settings, files.

Some hundred cases each; `make test-nightly` tries ten thousand.  More of them stand beside what they are about, in
test_wire.py, test_config.py, test_strategies.py and test_status.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings

import attrs
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cards import reading
from gpupool_sync import wire
from gpupool_sync.config import CONFIG_VARIABLE, SETTINGS, Endpoint, EndpointSource, Settings, redact_url, resolve
from gpupool_sync.discovery import Watch, endpoints_of_file_sd, endpoints_of_lines
from gpupool_sync.endpoint import _sample_age
from gpupool_sync.errors import BadAnswer, ConfigError, LeaseLost, LeaseStoreError
from gpupool_sync.leases import documents
from gpupool_sync.leases.base import (
    Claim,
    Granted,
    Holder,
    Lease,
    LeaseInfo,
    Queued,
    Refused,
    Share,
    TicketInfo,
    Wanted,
)
from gpupool_sync.leases.documents import BadDocument
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.models import Card, GPURequest
from gpupool_sync.server.run import Options
from gpupool_sync.transport import MAX_RETRY_AFTER, Answer, retry_after

#: Computed, and nobody else's: Hypothesis tries the constants of all sources that are loaded.
SECRET = "s-" + hashlib.sha256(b"the password of these tests").hexdigest()[:12]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def shown_safely(error: Exception) -> None:
    """What is said of it can go to any screen, and is no novel."""
    text = str(error)
    assert text.isprintable()
    assert 0 < len(text) < 1500


# --- the lease API's documents ----------------------------------------------------------------------------------

printable = st.text(max_size=30).map(wire.clean_text)
names = printable.filter(bool)
ids = st.from_regex(r"[A-Za-z0-9._:-]{1,40}", fullmatch=True)
keys = st.text(min_size=1, max_size=30)
seconds = st.floats(0.0, 1e9)
holders = st.builds(Holder, ids, st.none() | names, names, names, st.integers(0, 2**31 - 1))
shares = st.none() | st.builds(Share, memory_mb=st.floats(0.0, 1e12)) | st.builds(Share, places=st.integers(1, 10**6))
notes = st.none() | printable


@st.composite
def claims(draw):
    cards = draw(st.lists(keys, min_size=1, max_size=6, unique=True))
    rooms = st.none() | st.floats(-1e12, 1e12)
    cut = draw(st.integers(1, len(cards)))
    groups = [group for group in (cards[:cut], cards[cut:]) if group]
    return Claim(
        id=draw(ids),
        holder=draw(holders),
        groups=tuple(tuple(Wanted(key, draw(rooms)) for key in group) for group in groups),
        count=draw(st.integers(1, 10_000)),
        share=draw(shares),
        ttl=draw(st.floats(0.1, documents.MAX_TTL)),
        waited=draw(seconds),
        queue=draw(st.booleans()),
        reserve=draw(st.booleans()),
        note=draw(notes),
        emptied=draw(st.dictionaries(keys, seconds, max_size=2)),
        busy=draw(st.dictionaries(keys, seconds, max_size=2)),
    )


tokens = st.integers(1, 2**63 - 1)
lease_infos = st.builds(
    LeaseInfo,
    st.lists(keys, min_size=1, max_size=3).map(tuple),
    holders,
    tokens,
    shares,
    notes,
    seconds,
    st.none() | seconds,
)
ticket_infos = st.builds(
    TicketInfo,
    st.integers(0, 10**6),
    holders,
    st.lists(keys, min_size=1, max_size=3).map(tuple),
    st.integers(1, 10_000),
    shares,
    seconds,
    notes,
)


def across(document):
    """*document* as it arrives at the other side."""
    return wire.load_document(wire.dump(document))


@given(claims())
def test_a_claim_arrives_as_it_was_sent(claim):
    """What a client wishes is what the server reads."""
    assert documents.read_claim(across(documents.claim_document(claim, claim.ttl))) == claim


@given(st.lists(lease_infos, max_size=4), st.lists(ticket_infos, max_size=4))
def test_what_a_server_tells_of_others_arrives(infos, tickets):
    """Who holds and who waits is the same at both sides."""
    told = across(
        {
            "leases": [documents.lease_info_document(info) for info in infos],
            "queue": [documents.ticket_info_document(info) for info in tickets],
        }
    )
    assert documents.read_lease_infos(told["leases"]) == infos
    assert documents.read_ticket_infos(told["queue"]) == tickets


@given(claims(), tokens, st.floats(0, 1e9), st.data())
def test_a_lease_is_remembered_as_it_was(claim, token, granted_at, data):
    """What a server writes down before a restart is what it reads after it."""
    cards = tuple(wanted.key for wanted in claim.groups[0])
    lease = Lease(claim.id, claim.holder, cards, token, claim.share, claim.note, granted_at, claim.ttl)
    rooms = tuple(data.draw(st.none() | st.floats(-1e12, 1e12)) for _ in cards)

    assert documents.read_kept_lease(across(documents.kept_lease_document(lease, rooms))) == (lease, rooms)


READERS = (
    documents.read_claim,
    documents.read_ids,
    documents.read_wait,
    documents.read_revocation,
    documents.read_grant,
    documents.read_position,
    documents.read_reasons,
    lambda fields: documents.read_alive(fields, 1),
    lambda fields: documents.read_why(fields, 1),
    documents.read_found,
    documents.read_closed,
    documents.read_hints,
    documents.read_kept_lease,
    lambda fields: documents.read_lease_infos(fields.get("leases")),
    lambda fields: documents.read_ticket_infos(fields.get("queue")),
)
FIELDS = st.sampled_from(
    [
        "id",
        "holder",
        "count",
        "cards",
        "share",
        "ttl",
        "waited",
        "queue",
        "reserve",
        "note",
        "emptied",
        "busy",
        "ids",
        "timeout",
        "key",
        "token",
        "by",
        "since",
        "position",
        "reasons",
        "alive",
        "why",
        "found",
        "closed",
        "hints",
        "leases",
        "granted_at",
        "expires_in",
        "memory_mb",
        "places",
        "room_mb",
        "group",
        "user",
        "host",
        "pid",
    ]
)
plausible = st.integers(0, 3) | st.floats(0.0, 100.0) | st.booleans() | ids | st.none()
items = plausible | json_values
nested = items | st.lists(items | st.dictionaries(FIELDS, items, max_size=6), max_size=3)
some_documents = st.dictionaries(FIELDS, nested | st.dictionaries(FIELDS, nested, max_size=6), max_size=12)


@given(some_documents)
def test_any_document_is_read_or_refused(document):
    """No request and no answer of the lease API is anything but a value or one error with a sentence."""
    try:
        arrived = across(document)
    except BadAnswer as exc:
        shown_safely(exc)
        return
    for reader in READERS:
        try:
            reader(arrived)
        except BadDocument as exc:
            shown_safely(exc)


# --- a client of a server that lies ----------------------------------------------------------------------------


class Scripted:
    """In place of the network: says what the test has it say."""

    def __init__(self, status: int, document: object) -> None:
        self.answer = Answer(status, {}, json.dumps(document).encode(), 0.001)

    def post(self, path, payload, deadline, *more) -> Answer:
        return self.answer

    def get(self, path, deadline, *more) -> Answer:
        return self.answer

    def close(self) -> None:
        pass


asked = st.sampled_from(["a", "b", "c", "d"])
told = {
    "cards": st.lists(asked, min_size=1, max_size=2),
    "token": st.integers(1, 2**63),
    "ttl": st.floats(0.01, 300),
    "since": st.floats(0, 100),
    "position": st.integers(0, 5),
    "reasons": st.dictionaries(asked, st.fixed_dictionaries({"code": st.just("held"), "text": st.text(max_size=9)})),
    "closed": st.lists(asked, max_size=2),
    "holders": st.lists(lease_infos.map(documents.lease_info_document), max_size=2),
    "alive": st.lists(st.booleans(), max_size=2),
    "hints": st.lists(st.text(max_size=5), max_size=2),
    "found": st.booleans(),
    "error": st.none() | st.text(max_size=9) | st.fixed_dictionaries({"message": st.text(max_size=9)}),
}
answers = st.builds(
    lambda status, right, wrong, left_out: (status, {k: v for k, v in {**right, **wrong}.items() if k not in left_out}),
    st.sampled_from([200, 200, 202, 409, 410, 404, 422, 429, 500, 503]),
    st.fixed_dictionaries(told),
    st.just({}) | st.dictionaries(st.sampled_from(sorted(told)), items, max_size=2),
    st.just(()) | st.sets(st.sampled_from(sorted(told)), max_size=3),
)


@given(answers | st.tuples(st.sampled_from([200, 202, 409, 410]), json_values), st.integers(1, 2))
@example((200, {"cards": ["d"], "token": 1, "ttl": 60, "since": 0}), 1)
@example((200, {"cards": ["b", "c"], "token": 1, "ttl": 60, "since": 0}), 2)
@example((409, {"reasons": {}, "closed": ["d"]}), 1)
def test_a_lying_server_grants_what_was_asked_for_or_nothing(answer, count):
    """Whatever a server answers, a client gets what it asked for, all of it, or one of our errors."""
    store = HTTPStore(Endpoint("http://liar"), Settings())
    store._transport.close()
    store._transport = Scripted(*answer)
    wish = Claim("id-1", Holder("h", None, "u", "h", 1), ((Wanted("a"), Wanted("b")), (Wanted("c"),)), count)
    try:
        outcome = store.claim(wish)
    except (LeaseStoreError, LeaseLost) as exc:
        shown_safely(exc)
    else:
        assert isinstance(outcome, Granted | Queued | Refused)
        if isinstance(outcome, Granted):
            assert len(set(outcome.lease.cards)) == count
            assert any(set(outcome.lease.cards) <= {w.key for w in group} for group in wish.groups)
    assert set(store.closed()) <= {"a", "b", "c"}
    for call in (
        lambda: store.renew(["id-1"]),
        lambda: store.release(["id-1"]),
        lambda: store.revoke("a", 1, "me"),
        store.leases,
        store.queue,
        lambda: store.listen(0.0),
    ):
        try:
            call()
        except LeaseStoreError as exc:
            shown_safely(exc)
    assert store.is_held("d") is False


@given(st.text(max_size=40) | st.from_regex(r"[0-9eE+\-._]{1,400}", fullmatch=True))
def test_a_servers_numbers_in_headers_are_numbers_of_ours(text):
    """A header that should be a duration is one, within bounds, or counts as none."""
    told = retry_after(Answer(503, {"Retry-After": text, "Date": text}, b"", 0.0))
    age, problem = _sample_age(text)

    assert told is None or 0.0 <= told <= MAX_RETRY_AFTER
    assert age >= 0.0
    assert math.isfinite(age) or problem is not None


# --- URLs, ids and secrets ---------------------------------------------------------------------------------------

host_names = st.from_regex(r"[a-z0-9]([a-z0-9\-]{0,6}[a-z0-9])?(\.[a-z]{1,5}){0,2}", fullmatch=True)
url_ends = st.builds(
    lambda host, port, path: f"{host}{'' if port is None else f':{port}'}{path}",
    host_names | st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
    st.none() | st.integers(1, 65535),
    st.sampled_from(["", "/", "/gpu", "/a/b/", "/%7e"]),
)
passwords = st.text("ab:@/?#%,=\\ 4\u00e9", max_size=6)


@given(st.sampled_from(["http", "HTTPS", "dns+http", "redis", ""]), st.text(max_size=5), passwords, passwords, url_ends)
@example("http", "u", "", "", "host")
def test_a_password_in_a_url_is_seen_nowhere(scheme, user, before, after, rest):
    """Wherever it stands, and whether or not the URL can be used: no id, repr, text or error has it."""
    url = f"{scheme}://{user}:{before}{SECRET}{after}@{rest}"
    assert SECRET not in redact_url(url)
    for make in (Endpoint, EndpointSource, lambda text: resolve(environ={"GPU_SERVICE_ENDPOINTS": text})):
        try:
            made = make(url)
        except ConfigError as exc:
            error: BaseException | None = exc
            while error is not None:
                assert SECRET not in str(error)
                assert SECRET not in repr(error)
                error = error.__cause__ or error.__context__
            continue
        assert SECRET not in repr(made)
        assert SECRET not in str(made)
        for endpoint in made.endpoints if isinstance(made, Settings) else [getattr(made, "template", made)]:
            assert SECRET not in endpoint.id
            assert SECRET not in endpoint.url
            assert endpoint.auth is None or SECRET in endpoint.auth[0] + endpoint.auth[1]


@given(st.sampled_from(["http", "https"]), st.none() | st.text("abc", min_size=1, max_size=4), url_ends)
def test_what_a_url_means_does_not_change_when_it_is_read_again(scheme, user, rest):
    """Sanitising is done once and for all: the second time changes nothing."""
    try:
        endpoint = Endpoint(f"{scheme}://{user + '@' if user else ''}{rest}")
    except ConfigError:
        assume(False)
    again = Endpoint(endpoint.url)

    assert (again.url, again.id, again.host) == (endpoint.url, endpoint.id, endpoint.host)
    assert again.auth is None
    assert redact_url(redact_url(endpoint.url)) == redact_url(endpoint.url) == endpoint.url


@given(st.lists(url_ends, min_size=1, max_size=4), st.integers(0, 2**31 - 1))
def test_a_global_id_names_one_card(ends, number):
    """From ``server1:0`` the endpoint and its own id can be read again, and different servers have different ids."""
    urls = {}
    for end in ends:
        try:
            endpoint = Endpoint(f"http://{end}")
        except ConfigError:
            continue
        card = Card(f"{endpoint.url}#{number}", endpoint.id, reading(number))
        endpoint_id, colon, local_id = card.global_gpu_id.partition(":")
        assert (endpoint_id, colon, int(local_id)) == (endpoint.id, ":", number)
        urls.setdefault(endpoint.id, set()).add(endpoint.url)
    try:
        settings = resolve([url for found in urls.values() for url in found], environ={})
    except ConfigError as exc:
        assert "same id" in str(exc)  # noqa: PT017
        assert any(len(found) > 1 for found in urls.values())
    else:
        assert len({endpoint.id for endpoint in settings.endpoints}) == len(settings.endpoints)


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.lists(st.text(max_size=4))
)


@given(st.dictionaries(st.sampled_from([field.name for field in attrs.fields(GPURequest)]), anything, max_size=5))
def test_any_request_is_one_or_a_config_error(options):
    """Whatever a caller writes into ``pool.gpu(…)`` is understood or refused, and what is understood makes sense."""
    try:
        request = GPURequest.make(**options)
    except ConfigError as exc:
        shown_safely(exc)
        return
    assert request.count >= 1
    assert isinstance(hash(request), int)
    for number in (request.min_free_memory_mb, request.memory_mb, request.max_utilization_percent):
        assert number is None or 0.0 <= number < math.inf


# --- settings ----------------------------------------------------------------------------------------------------

VARIABLES = [name for setting in SETTINGS for name in setting.variables]
texts = st.text(max_size=25) | st.sampled_from(
    [
        "1",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "١",
        "1_0",
        "true",
        "memory:",
        "host:/x",
        "weighted",
        f"redis://:{SECRET}@h/0",
    ]
)


@given(st.dictionaries(st.sampled_from(VARIABLES), texts | st.integers().map(str) | st.floats().map(str), max_size=6))
def test_any_environment_gives_settings_or_a_config_error(environ):
    """Whatever stands in the variables, what comes out is complete and allowed, or an error that names the variable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            settings = resolve(environ=environ)
        except ConfigError as exc:
            shown_safely(exc)
            assert any(name in str(exc) for name in VARIABLES)  # noqa: PT017
            assert SECRET not in str(exc)  # noqa: PT017
            return
    assert SECRET not in repr(settings)
    # What was taken is taken again when it is given as an argument.
    given_again = {setting.name: getattr(settings, setting.name) for setting in SETTINGS if setting.name != "endpoints"}
    assert resolve(settings.endpoints, environ={}, **given_again) == attrs.evolve(settings, sources=())


@given(
    st.dictionaries(
        st.sampled_from(["HOST", "PORT", "REFRESH_INTERVAL", "LOG_LEVEL"]), texts | st.floats().map(str), max_size=4
    )
)
def test_any_environment_of_a_server_gives_options_or_a_config_error(environ):
    """The predecessor's variables are taken as they were meant, or refused."""
    try:
        options = Options.resolve(environ=environ)
    except ConfigError as exc:
        shown_safely(exc)
        return
    assert 0 <= options.port <= 65535
    assert 0.01 <= options.interval <= 3600


# --- files ---------------------------------------------------------------------------------------------------------

lines = st.lists(
    st.text(max_size=20)
    | url_ends.map("http://".__add__)
    | st.builds("{}=http://{}".format, st.text("ab-1", min_size=1, max_size=3), url_ends),
    max_size=5,
).map("\n".join)
targets = st.fixed_dictionaries(
    {"targets": st.lists(url_ends | st.text(max_size=9), max_size=3) | json_values},
    optional={"labels": st.dictionaries(st.sampled_from(["__scheme__", "a"]), st.sampled_from(["http", "https", "x"]))},
)
file_sd = st.lists(targets | json_values, max_size=3).map(json.dumps)
NONE = Endpoint("http://file.invalid")


@given(lines | file_sd | st.text(max_size=60))
@example("[" * 100_000)
@example('[{"targets": [' + "9" * 5000 + "]}]")
def test_any_list_of_servers_is_read_or_refused(text):
    """A discovery file gives endpoints with ids of their own, or one error."""
    for parse in (endpoints_of_lines, endpoints_of_file_sd):
        try:
            found = parse(text, NONE)
        except ConfigError as exc:
            shown_safely(exc)
            continue
        assert len({each.id for each in found}) == len(found) == len({each.url for each in found})


@given(content=st.lists((lines | file_sd).map(str.encode) | st.binary(max_size=40), min_size=1, max_size=3))
def test_a_watched_file_may_say_anything(content, tmp_path_factory):
    """Whatever is written into it, a look never raises, and ends with endpoints or with a reason."""
    path = tmp_path_factory.getbasetemp() / "watched"
    watch = Watch(EndpointSource(f"file:{path}"), Settings())
    for data in content:
        path.write_bytes(data)
        found = watch.poll()
        assert found.endpoints == watch.endpoints
        assert watch.why is None or watch.why.isprintable()
        assert watch.pause() >= 0.0


toml_keys = st.sampled_from([setting.name for setting in SETTINGS] + ["url", "verify", "cert", "token", "headers", "x"])
toml_values = st.recursive(
    st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.text("ab:/@,=1 .-", max_size=12)
    | st.sampled_from(["http://a:1", f"redis://:{SECRET}@h", "memory:", "weighted", "file:/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(toml_keys, inner, max_size=3),
    max_leaves=6,
)


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {as_toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    return json.dumps(value)


toml_files = st.dictionaries(toml_keys, toml_values, max_size=4).map(
    lambda table: "".join(f"{name} = {as_toml(value)}\n" for name, value in table.items())
)


@given(data=toml_files.map(str.encode) | st.text(max_size=40).map(str.encode) | st.binary(max_size=40))
@example(data=b"x=" + b"[" * 100_000)
@example(data=b"x=" + b"{a=" * 100_000)
@example(data=b"x=" + b"9" * 5000)
@example(data=b"max_waiting = 1979-05-27")
def test_any_configuration_file_gives_settings_or_a_config_error(data, tmp_path_factory):
    """Whatever the file says, what comes out is allowed, or an error that names the file."""
    path = tmp_path_factory.getbasetemp() / "gpu-pool.toml"
    path.write_bytes(data)
    path.chmod(0o600)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            settings = resolve(environ={CONFIG_VARIABLE: str(path)})
        except ConfigError as exc:
            shown_safely(exc)
            assert str(path) in str(exc)  # noqa: PT017
            assert SECRET not in str(exc)  # noqa: PT017
            return
    assert SECRET not in repr(settings)
