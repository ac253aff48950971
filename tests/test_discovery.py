"""Endpoints that come and go while the pool runs: by calls, from a file, and from a name with several addresses."""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import threading

import pytest

from gpupool_sync import AcquireTimeout, ConfigError, Endpoint, EndpointSource, GPUPool, NoSuchGPU, config, discovery
from gpupool_sync.cli import main
from gpupool_sync.config_file import MAX_BYTES
from gpupool_sync.discovery import Watch, endpoints_of_file_sd, endpoints_of_lines
from gpupool_sync.engine import arrived
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually, run_threads
from servers import Authority, Server, answer

NONE = Endpoint("http://file.invalid")
SECRET = "s3cr3t"


def summary(host, cards=1):
    """What a statistics server says that tells UUIDs and grants no leases."""
    gpus = [
        {
            "gpu_id": n,
            "name": "A100",
            "uuid": f"GPU-{host}-{n}",
            "memory_usage_percent": 1.0,
            "utilization_percent": 0.0,
        }
        for n in range(cards)
    ]
    return json.dumps({"gpu_count": cards, "gpus_summary": gpus, "timestamp": "2026-01-01T00:00:00"}).encode()


@pytest.fixture
def two():
    """Two statistics servers."""
    with Server(answer(summary("one"))) as one, Server(answer(summary("two"))) as other:
        yield one, other


@pytest.fixture
def listing(tmp_path):
    """A file, and a function that replaces it at once, as careful writers do."""
    path = tmp_path / "servers"

    def write(text):
        new = tmp_path / "new"
        new.write_text(text, encoding="utf-8")
        new.replace(path)
        return path

    return write


def make_pool(endpoints, **options):
    defaults = {"lease_store": MemoryStore(), "poll_interval": 0.05, "health_check_interval": 0.1}
    return GPUPool(endpoints, **{**defaults, **options})


def ids(pool):
    return [each.endpoint_id for each in pool.status().endpoints]


def watch_of(spec, **options):
    source = spec if isinstance(spec, EndpointSource) else EndpointSource(spec)
    return Watch(source, config.resolve(environ={}, **options))


def urls(watch):
    return [each.url for each in watch.poll().endpoints]


# -- how places are written ------------------------------------------------------------------------------------


def test_places_and_servers_may_be_mixed():
    """One setting has both; nothing is asked while it is read."""
    text = "http://a:1, file:/etc/gpus ,box=http://b,dns+http://GPUs.example:8000/,racks=DNS+https://u:p@racks.example"
    for settings in (
        config.resolve(text, environ={}),
        config.resolve(environ={"GPU_SERVICE_ENDPOINTS": text}),
        config.resolve(text.split(","), environ={}),
    ):
        assert [each.id for each in settings.endpoints] == ["a-1", "box"]
        assert [each.spec for each in settings.sources] == [
            "file:/etc/gpus",
            "dns+http://gpus.example:8000",
            "dns+https://racks.example",
        ]
        assert settings.sources[2].template.auth == ("u", "p")
    assert settings.endpoints_from == "argument"
    assert config.resolve("file:///etc/gpus", environ={}).sources == (EndpointSource("file:/etc/gpus"),)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("file:relative", "absolute"),
        ("file:", "absolute"),
        ("file:/etc/", "absolute"),
        ("file:/a\nb", "absolute"),
        ("box=file:/etc/gpus", "lines of the file name"),
        ("dns+http://10.0.0.1:8000", "without dns"),
        ("dns+ftp://gpus", "only http"),
        ("dns+http://", "host is missing"),
        (f"dns+http://u:{SECRET}@gpus?x", "'?'"),
        ("ftp://gpus", "only http"),
    ],
)
def test_wrong_places_are_refused(spec, told):
    """The error says what is allowed, and shows no password."""
    with pytest.raises(ConfigError, match="endpoint") as caught:
        config.resolve(spec, environ={})
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


def test_places_have_the_options_of_endpoints():
    """What holds for all endpoints of a place is given once; it is shown nowhere, and checked at once."""
    source = EndpointSource("file:/etc/gpus", token=SECRET)
    assert SECRET not in repr(source)
    assert pickle.loads(pickle.dumps(source)) == source
    with pytest.raises(ConfigError, match="max_rate"):
        EndpointSource("dns+http://gpus", max_rate=0)
    for wrong in ("http://gpus", 5):
        with pytest.raises(ConfigError, match=r"file:/path.* dns\+http"):
            EndpointSource(wrong)
    with pytest.raises(ConfigError, match="given twice"):
        config.resolve([source, "file:/etc/gpus"], environ={})


# -- what a file says ------------------------------------------------------------------------------------------


def test_lines_with_comments():
    """One URL or name=URL a line."""
    text = "# ours\nhttp://a:1\n\n  box=http://b   # the big one\nhttps://u:p%23q@c\n"
    found = endpoints_of_lines(text, Endpoint("http://x", max_rate=3))
    assert [(each.id, each.url, each.max_rate) for each in found] == [
        ("a-1", "http://a:1", 3.0),
        ("box", "http://b", 3.0),
        ("c", "https://c", 3.0),
    ]
    assert found[2].auth == ("u", "p#q")


def test_prometheus_files():
    """The format of Prometheus' file_sd, in JSON."""
    text = json.dumps(
        [
            {"targets": ["10.0.0.1:8000", "server2:8000"], "labels": {"job": "gpus"}},
            {"targets": ["server3"], "labels": {"__scheme__": "https"}},
            {"targets": ["http://server4:1"]},
        ]
    )
    assert [each.url for each in endpoints_of_file_sd(text, NONE)] == [
        "http://10.0.0.1:8000",
        "http://server2:8000",
        "https://server3",
        "http://server4:1",
    ]


@pytest.mark.parametrize(
    ("parse", "text", "told"),
    [
        (endpoints_of_lines, f"http://a\nhttp://u:{SECRET}@b?x\n", "line 2"),
        (endpoints_of_lines, "box=http://a\nbox=http://b\n", "same id"),
        (endpoints_of_file_sd, '[{"targets": ["a:1"', "complete JSON"),
        (endpoints_of_file_sd, "[" * 100000, "complete JSON"),
        (endpoints_of_file_sd, "{}", "list of target groups"),
        (endpoints_of_file_sd, '["a:1"]', "group 1"),
        (endpoints_of_file_sd, '[{"targets": "a:1"}]', "group 1"),
        (endpoints_of_file_sd, '[{"targets": [], "labels": 1}]', "group 1"),
        (endpoints_of_file_sd, '[{"targets": [5]}]', "group 1"),
        (endpoints_of_file_sd, '[{"targets": ["a b"]}]', "group 1"),
    ],
)
def test_wrong_files_are_refused_as_a_whole(parse, text, told):
    """The error says where it is wrong, and shows no password."""
    with pytest.raises(ConfigError) as caught:
        parse(text, NONE)
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


# -- looking again ---------------------------------------------------------------------------------------------


def test_what_cannot_be_read_changes_nothing_and_is_told_once(listing, caplog):
    """Deleted, broken, half written: the last good list stays, and one line says so."""
    caplog.set_level(logging.INFO, logger="gpupool_sync")
    path = listing("http://a\nhttp://b\n")
    watch = watch_of(f"file:{path}")
    assert urls(watch) == ["http://a", "http://b"]
    for spoil in (
        path.unlink,
        lambda: listing("http://a\nnonsense\n"),
        lambda: listing('[{"targets": ["a:1", '),
        lambda: path.write_bytes(b"http://\xff\n"),
        lambda: path.write_bytes(b"#" * (MAX_BYTES + 1)),
        lambda: (path.unlink(), path.mkdir()),
    ):
        caplog.clear()
        spoil()
        for _ in range(4):
            assert urls(watch) == ["http://a", "http://b"]
        assert watch.sick
        assert len([each for each in caplog.records if "endpoints that it listed before stay" in each.message]) == 1
    path.rmdir()
    listing("http://c\n")
    caplog.clear()
    assert "http://c" in urls(watch)
    assert [each.message for each in caplog.records] == [f"{watch.id} is read again"]
    assert not watch.sick


def test_a_pipe_in_the_place_of_the_file_hangs_nobody(tmp_path):
    """Only regular files are read."""
    os.mkfifo(tmp_path / "pipe")
    watch = watch_of(f"file:{tmp_path / 'pipe'}")
    assert urls(watch) == []
    assert "not a regular file" in watch.why


def test_a_file_that_is_written_in_place_is_not_taken_by_halves(tmp_path):
    """Missing is believed at the second look; a last line without an end is, when it stays so."""
    path = tmp_path / "servers"
    path.write_text("http://a:8000\nhttp://b:8000\n")
    watch = watch_of(f"file:{path}")
    assert urls(watch) == ["http://a:8000", "http://b:8000"]
    for half in ("", "http://a:8000\n", "http://a:8000\nhttp://b:80"):
        path.write_text(half)
        assert sorted(urls(watch)) == ["http://a:8000", "http://b:8000"]
        assert watch.pause() <= discovery.CONFIRM
        path.write_text("http://a:8000\nhttp://b:8000\n")
        assert urls(watch) == ["http://a:8000", "http://b:8000"]
    path.write_text("http://a:8000\nhttp://c:8000")
    assert "http://c:8000" not in urls(watch)
    assert urls(watch) == ["http://a:8000", "http://c:8000"]
    path.write_text("http://a:8000\n")
    assert sorted(urls(watch)) == ["http://a:8000", "http://c:8000"]
    assert urls(watch) == ["http://a:8000"]
    assert watch.pause() == 5.0


def test_a_first_look_takes_a_file_without_a_last_newline(listing):
    """printf writes such files; nobody waits for a second look at the beginning."""
    assert urls(watch_of(f"file:{listing('http://a')}")) == ["http://a"]


def test_a_change_within_the_resolution_of_the_times_is_seen(tmp_path):
    """Same size, same inode, same time: the content counts."""
    path = tmp_path / "servers"
    path.write_text("http://a\n")
    before = path.stat()
    watch = watch_of(f"file:{path}")
    assert urls(watch) == ["http://a"]
    path.write_text("http://b\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "http://b" in urls(watch)


def test_a_look_that_hangs_is_left_behind(monkeypatch, listing):
    """A dead network file system costs one thread that nobody waits for, however often it is looked at."""
    gate, calls = threading.Event(), []
    path = listing("http://a\n")
    read = discovery.read_bytes
    watch = watch_of(f"file:{path}", endpoint_timeout=0.05)
    assert urls(watch) == ["http://a"]

    def hang(name):
        calls.append(name)
        gate.wait(30)
        return read(name)

    monkeypatch.setattr(discovery, "read_bytes", hang)
    for _ in range(5):
        assert urls(watch) == ["http://a"]
        assert "no answer within" in watch.problem
    assert len(calls) == 1
    gate.set()
    eventually(lambda: watch.poll() and watch.problem is None, message="it is read again")


def test_passwords_in_a_readable_file_are_told(listing, caplog):
    """Once; and the password is not in what is told."""
    path = listing(f"http://u:{SECRET}@a\n")
    path.chmod(0o644)
    watch = watch_of(f"file:{path}")
    for _ in range(3):
        assert urls(watch) == ["http://a"]
    assert len([each for each in caplog.records if "chmod 600" in each.message]) == 1
    assert SECRET not in caplog.text


def resolver(monkeypatch, *addresses):
    """Names have these addresses; the list may be changed, an exception in it is raised."""
    known = list(addresses)
    real = socket.getaddrinfo

    def lookup(host, port, family=0, kind=0, *rest, **named):
        if not str(host).endswith(".example"):
            return real(host, port, family, kind, *rest, **named)
        for each in known:
            if isinstance(each, Exception):
                raise each
        return [
            (
                socket.AF_INET6 if ":" in each else socket.AF_INET,
                kind,
                6,
                "",
                (each, port or 0, 0, 0)[: 4 if ":" in each else 2],
            )
            for each in known
        ]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return known


def test_each_address_of_a_name_is_an_endpoint(monkeypatch):
    """With the port, path and options of the place, and the name for TLS; IPv6 only where there is no IPv4."""
    known = resolver(monkeypatch, "10.0.0.10", "10.0.0.9", "2001:db8::1", "10.0.0.9")
    watch = watch_of(EndpointSource("dns+https://gpus.example:8443/x", token=SECRET, name="gpus"))
    found = watch.poll().endpoints
    assert [(each.id, each.url) for each in found] == [
        ("gpus-10.0.0.9", "https://10.0.0.9:8443/x"),
        ("gpus-10.0.0.10", "https://10.0.0.10:8443/x"),
    ]
    assert {(each.server_name, each.token) for each in found} == {("gpus.example", SECRET)}
    known[:] = ["2001:db8::1", "fe80::1%eth0"]
    watch.poll()
    assert urls(watch) == ["https://[2001:db8::1]:8443/x"]
    assert watch.pause() == 30.0


def test_a_name_that_is_not_resolved_keeps_its_addresses(monkeypatch, caplog):
    """Name servers fail; what was known stays."""
    known = resolver(monkeypatch, "10.0.0.9")
    watch = watch_of("dns+http://gpus.example")
    assert [each.id for each in watch.poll().endpoints] == ["10.0.0.9"]
    known[:] = [socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")]
    for _ in range(3):
        assert urls(watch) == ["http://10.0.0.9"]
    assert watch.pause() == 5.0
    assert "cannot be resolved" in watch.problem
    assert len(caplog.records) == 1


# -- in a pool -------------------------------------------------------------------------------------------------


def test_a_file_is_followed(two, listing):
    """Servers come and go with their lines; held GPUs stay, drained servers get nothing new and leave at last."""
    one, other = two
    path = listing(f"one={one.url}\n")
    with make_pool(f"file:{path}") as pool:
        held = pool.acquire(timeout=0)  # the first acquire waits for the file, and for what it lists
        assert held.global_gpu_id == "one:0"
        listing(f"one={one.url}\ntwo={other.url}\n")
        with pool.gpu(timeout=20) as gpu:
            assert gpu.global_gpu_id == "two:0"
        listing(f"two={other.url}\n")
        eventually(lambda: pool.status().endpoints[0].draining, message="the first is drained")
        held.check()
        assert [card.holders != [] for card in pool.status().gpus if card.endpoint_id == "one"] == [True]
        with pytest.raises(AcquireTimeout, match="one: is being drained"):
            pool.acquire(endpoint="one", timeout=0)
        held.release()
        eventually(lambda: ids(pool) == ["two"], message="it is gone with its last lease")
        with pool.gpu(timeout=20) as gpu:
            assert gpu.global_gpu_id == "two:0"


def test_a_server_that_is_listed_again_is_not_drained_any_more(two, listing):
    """The lease that kept it saw nothing of it."""
    path = listing(f"one={two[0].url}\n")
    with make_pool(f"file:{path}") as pool, pool.gpu() as gpu:
        listing(f"two={two[1].url}\n")
        eventually(lambda: pool.status().endpoints[0].draining)
        listing(f"one={two[0].url}\ntwo={two[1].url}\n")
        eventually(lambda: not pool.status().endpoints[0].draining)
        assert pool.status().endpoints[0].total_gpus == 1
        gpu.check()


def test_a_server_whose_line_changes_is_made_anew(two, listing):
    """Another URL or other credentials under the same name."""
    path = listing(f"box={two[0].url}\n")
    with make_pool(f"file:{path}") as pool:
        assert pool.acquire().uuid == "GPU-one-0"
        listing(f"box={two[1].url}\n")
        assert pool.acquire(timeout=20).uuid == "GPU-two-0"
        listing(f"box=http://ann:{SECRET}@127.0.0.1:{two[1].port}\n")
        eventually(lambda: any("authorization" in each.headers for each in two[1].requests), message="the password")
        assert ids(pool) == ["box"]
        assert SECRET not in repr(pool) + str(pool.status().to_dict())


def test_a_place_without_servers_is_waited_for(two, tmp_path):
    """Nothing listed yet is no proof that there will never be such a GPU; the error says what is missing."""
    path = tmp_path / "servers"
    with make_pool(f"file:{path}") as pool:
        with pytest.raises(AcquireTimeout, match="No such file"):
            pool.acquire(timeout=0)
        assert "No such file" in str(pool.explain())
        path.write_text("# none yet\n")
        eventually(lambda: "lists no endpoint" in str(pool.explain()))
        got = []
        thread = threading.Thread(target=lambda: got.append(pool.acquire(timeout=30).endpoint_id))
        thread.start()
        eventually(lambda: pool.stats()["waiting"] == 1)
        path.write_text(f"one={two[0].url}\n")
        thread.join(30)
        assert got == ["one"]
        with pytest.raises(NoSuchGPU):
            pool.acquire(model="H200")


def test_what_the_pool_has_already_is_left_out(two, listing, caplog):
    """Listed in two places, a server is there once; a clash of names is told once."""
    path = listing(f"one={two[1].url}\ntwo={two[1].url}\n".splitlines(keepends=True)[1] + "one=http://127.0.0.1:9\n")
    with make_pool([Endpoint(two[0].url, name="one"), f"file:{path}"]) as pool:
        pool.open(wait=True)
        assert ids(pool) == ["one", "two"]
        assert [each.url for each in pool.status().endpoints] == [two[0].url, two[1].url]
        with pytest.raises(ConfigError, match="has two already"):
            pool.add_endpoint("http://127.0.0.1:9", name="two")
        eventually(lambda: pool.stats()["polls"] > 10)
    assert len([each for each in caplog.records if "the pool has already" in each.message]) == 1


def test_a_found_server_can_be_removed_by_hand(two, listing):
    """It stays away until its line is changed, or goes and comes back."""
    path = listing(f"one={two[0].url}\ntwo={two[1].url}\n")
    with make_pool(f"file:{path}") as pool:
        pool.open(wait=True)
        pool.remove_endpoint("one")
        looks = pool.stats()["polls"]
        eventually(lambda: pool.stats()["polls"] > looks + 10)
        assert ids(pool) == ["two"]
        listing(f"two={two[1].url}\n")
        eventually(lambda: len(pool._state.engine.watches[f"file:{path}"].endpoints) == 1)
        listing(f"one={two[0].url}\ntwo={two[1].url}\n")
        eventually(lambda: sorted(ids(pool)) == ["one", "two"])


def test_the_file_counts_and_not_the_order_of_opening(two, listing):
    """close() and open(), and a copy in another process, look again by themselves."""
    path = listing(f"one={two[0].url}\n")
    pool = make_pool(f"file:{path}", lease_store="memory:")
    with pool:
        pool.open(wait=True)
        assert ids(pool) == ["one"]
    listing(f"two={two[1].url}\n")
    with pool:
        pool.open(wait=True)
        assert ids(pool) == ["two"]
        copy = pickle.loads(pickle.dumps(pool))
    with pytest.warns(UserWarning, match="memory"):
        copy.open(wait=True)
    with copy:
        assert ids(copy) == ["two"]


def test_a_dead_file_system_delays_nobody(two, listing, monkeypatch):
    """Neither the servers that are listed elsewhere, nor the monitor, nor close()."""
    gate = threading.Event()
    monkeypatch.setattr(discovery, "read_bytes", lambda path: gate.wait(50) and (b"", 0))
    path = listing("http://127.0.0.1:9\n")
    pool = make_pool([Endpoint(two[0].url, name="one"), f"file:{path}"], endpoint_timeout=40.0)
    try:
        with pool.gpu(timeout=20) as gpu:
            assert gpu.endpoint_id == "one"
        polls = pool.stats()["endpoints"]["one"]["successes"]
        eventually(lambda: pool.stats()["endpoints"]["one"]["successes"] > polls + 5, message="it is polled on")
        pool.close()
        assert not [each.name for each in threading.enumerate() if "-poll_" in each.name or "-monitor" in each.name]
    finally:
        gate.set()
        pool.close()


def test_a_real_name(two):
    """localhost is resolved by the system."""
    with make_pool(f"dns+http://localhost:{two[0].port}") as pool:
        with pool.gpu(timeout=0) as gpu:
            assert gpu.endpoint_id == f"127.0.0.1-{two[0].port}"
        assert two[0].requests[0].headers["host"] == f"localhost:{two[0].port}"


@pytest.mark.allow_hosts(["127.0.0.1", "127.0.0.2"])
def test_a_name_with_two_addresses_and_tls(monkeypatch, tmp_path):
    """Each address is asked, by the name, which alone is in the certificate; the set follows the name server."""
    known = resolver(monkeypatch, "127.0.0.1", "127.0.0.2")
    authority = Authority(tmp_path)
    tls = authority.context("gpus.example")
    with Server(answer(summary("one")), tls=tls, host="0.0.0.0") as server:
        source = EndpointSource(f"dns+https://gpus.example:{server.port}", verify=authority.ca_path, token=SECRET)
        with make_pool(source) as pool:
            pool.open(wait=True)
            assert [each.is_healthy for each in pool.status().endpoints] == [True, True]
            assert pool.status().total_gpus == 1  # one machine, by its UUID
            assert {each.origin for each in pool.status().endpoints} == {source.spec}
            asked = server.requests[0].headers
            assert (asked["host"], asked["authorization"]) == (f"gpus.example:{server.port}", f"Bearer {SECRET}")
            known.remove("127.0.0.1")
            eventually(lambda: ids(pool) == [f"127.0.0.2-{server.port}"], message="one address is gone")
        other = Endpoint(f"https://127.0.0.1:{server.port}", verify=authority.ca_path, server_name="other.example")
        with (
            make_pool(other) as pool,
            pytest.raises(AcquireTimeout, match=r"certificate.*not accepted.*other\.example"),
        ):
            pool.acquire(timeout=0)


# -- shown -----------------------------------------------------------------------------------------------------


def test_status_says_where_an_endpoint_came_from(two, listing, monkeypatch, capsys):
    """A place, a variable, the argument, or a call."""
    path = listing(f"one={two[0].url}\n")
    with make_pool([f"file:{path}", f"two={two[1].url}"]) as pool:
        pool.open(wait=True)
        pool.add_endpoint("http://127.0.0.1:9", name="nine")
        origins = {each.endpoint_id: each.origin for each in pool.status().endpoints}
        assert origins == {"one": f"file:{path}", "two": "argument", "nine": "add_endpoint"}
        (source,) = pool.status().to_dict()["sources"]
        assert source == {"source": f"file:{path}", "endpoints": 1, "problem": None}
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"file:{path},file:/nowhere/servers,two={two[1].url}")
    assert main(["status"]) == 0
    text = capsys.readouterr().out
    assert f"file:{path}" in text
    assert "GPU_SERVICE_ENDPOINTS" in text
    assert "file:/nowhere/servers: cannot be read: No such file" in text


def test_doctor_says_where_an_endpoint_came_from(two, listing, monkeypatch, capsys):
    """And names a place that cannot be read."""
    path = listing(f"one={two[0].url}\n")
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", f"file:{path},two={two[1].url},file:/nowhere/servers")
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert {each["endpoint_id"]: each["origin"] for each in told["endpoints"]} == {
        "two": "GPU_SERVICE_ENDPOINTS",
        "one": f"file:{path}",
    }
    (problem,) = [each for each in told["findings"] if each["level"] == "problem"]
    assert problem["where"] == "file:/nowhere/servers"
    assert "No such file" in problem["what"]
    assert main(["doctor"]) == 1
    assert f"from file:{path}" in capsys.readouterr().out


# -- by calls --------------------------------------------------------------------------------------------------


def test_a_drained_endpoint_stays_drained(two):
    """Also after close() and open(), and in a copy; the lease there goes on; added anew, it is a new one."""
    pool = make_pool([Endpoint(two[0].url, name="one")])
    with pool, pool.gpu() as gpu:
        pool.drain_endpoint("one")
        gpu.check()
        with pytest.raises(AcquireTimeout, match="drained"):
            pool.acquire(timeout=0)
    with pool:
        with pytest.raises(AcquireTimeout, match="drained"):
            pool.acquire(timeout=0)
        pool.remove_endpoint("one")
        pool.add_endpoint(two[0].url, name="one")
        pool.acquire(timeout=20)
    assert "one" not in pool._state.drained


def test_changes_by_many_threads(two):
    """Whoever adds, drains and removes at the same time as others acquire: nobody gets an error."""
    log, stop = HoldLog(), threading.Event()

    def change(number):
        name = f"extra{number}"
        while not stop.is_set():
            pool.add_endpoint(f"{two[1].url}/{number}", name=name)
            pool.drain_endpoint(name)
            pool.remove_endpoint(name)

    def work(number):
        for _ in range(40):
            with pool.gpu(timeout=30) as gpu, log.holding(gpu.uuid, gpu.fencing_token):
                pass

    with make_pool([Endpoint(two[0].url, name="one")]) as pool:
        changers = [threading.Thread(target=change, args=(n,)) for n in range(3)]
        for each in changers:
            each.start()
        try:
            run_threads(4, work)
        finally:
            stop.set()
            for each in changers:
                each.join(20)
        assert ids(pool) == ["one"]
        assert list(pool._state.table.view()[0]) == ["one"]
    assert len(log.holds()) == 160
    assert log.overlaps() == []


def test_a_reading_of_a_removed_endpoint_is_not_granted_from(two):
    """Its name may be another server's by now, with another arbiter; a poll that was under way must not matter."""
    with make_pool([Endpoint(two[0].url, name="box")], poll_interval=60.0, health_check_interval=60.0) as pool:
        pool.open(wait=True)
        old = pool._state.table.view()[0]["box"]
        pool.remove_endpoint("box")
        arrived(pool._state, old)
        assert pool._state.table.view()[0] == {}
        pool.add_endpoint("http://127.0.0.1:9", name="box")
        arrived(pool._state, old)
        assert pool._state.table.view()[0] == {}
        pool._state.table.update(old)  # even if it came in between two steps
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=0)
        assert pool.stats()["grants"] == 0


@pytest.mark.real
def test_another_server_under_the_name_of_a_removed_one():
    """Leases at the old one are renewed and released there; new ones come from the new one alone."""
    with FakeFleet([1, 1]) as fleet:
        old, new = fleet
        with GPUPool([Endpoint(old.url, name="box")], poll_interval=0.1, ttl=3.0) as pool:
            held = pool.acquire(timeout=20)
            pool.remove_endpoint("box")
            pool.add_endpoint(new.url, name="box")
            other = pool.acquire(timeout=20)
            assert other.uuid != held.uuid
            assert new.url in pool._state.engine.store_of("box").description
            renewals = old.request_count("/v1/leases/renew")
            eventually(lambda: old.request_count("/v1/leases/renew") > renewals, message="the old lease is renewed")
            held.check()
            (retired,) = pool._state.engine.retired
            held.release()
            assert old.request_count("/v1/leases/release") >= 1
            eventually(lambda: not pool._state.engine.retired, message="its connections are closed")
            assert retired._closed
            other.check()
