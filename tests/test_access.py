"""Who is let in by a server: tokens, TLS, and the log of what was done."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import logging
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import requests

from gpupool_sync import AcquireTimeout, Endpoint, GPUPool
from gpupool_sync.cli import main
from gpupool_sync.errors import ConfigError, LeaseStoreError
from gpupool_sync.server import access, setup
from gpupool_sync.server.access import Tokens, User
from helpers import eventually

ANN, BOB, ROOT = "the-token-of-ann-is-long", "the-token-of-bob-is-long", "the-token-of-root-is-long"


def bearer(token):
    return [(b"authorization", f"Bearer {token}".encode())]


@pytest.fixture
def tokens_file(tmp_path):
    def write(text: str, mode: int = 0o600) -> str:
        fresh = tmp_path / "fresh"
        fresh.write_text(text)
        fresh.chmod(mode)
        fresh.replace(tmp_path / "tokens")
        return str(tmp_path / "tokens")

    return write


def test_a_token_names_a_user(tokens_file):
    """From the file and from the variable, as Bearer, or as Basic with the user's own name."""
    tokens = Tokens(tokens_file(f"# comment\n\nann {ANN}\nroot\t{ROOT} admin\n"), {access.VARIABLE: f"bob:{BOB}"})
    assert tokens.who(bearer(ANN)) == User("ann")
    assert tokens.who(bearer(BOB)) == User("bob")
    assert tokens.who(bearer(ROOT)) == User("root", admin=True)

    def basic(user, token):
        return [(b"authorization", b"Basic " + base64.b64encode(f"{user}:{token}".encode()))]

    assert tokens.who(basic("ann", ANN)) == User("ann")
    assert tokens.who(basic("bob", ANN)) is None


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(ANN[:-1]),
        bearer(ANN + "x"),
        bearer(""),
        [(b"authorization", ANN.encode())],
        [(b"authorization", b"Basic %%%")],
        [(b"authorization", b"\xff\xfe \xff")],
        bearer(ANN) + bearer(ANN),
    ],
    ids=["none", "short", "long", "empty", "bare", "not base64", "bytes", "twice"],
)
def test_anything_else_names_nobody(headers):
    """Also what nearly is a token, and two at once."""
    assert Tokens(None, {access.VARIABLE: f"ann:{ANN}"}).who(headers) is None


def test_every_token_is_compared_in_constant_time(monkeypatch):
    """Neither how much of a token is right nor which one it is shows in the time."""
    compared = []

    def compare(one, other):
        compared.append(other)
        return same(one, other)

    same = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    tokens = Tokens(None, {access.VARIABLE: f"ann:{ANN},bob:{BOB},root:{ROOT}:admin"})
    for token in (ANN, ROOT, "nobody"):
        compared.clear()
        tokens.who(bearer(token))
        assert len(compared) == 3


def test_a_token_is_revoked_without_a_restart(tokens_file, monkeypatch):
    """As soon as the file is looked at again; a new one is let in as well."""
    monkeypatch.setattr(access, "REREAD", 0.0)
    tokens = Tokens(tokens_file(f"ann {ANN}\n"), {})
    tokens_file(f"bob {BOB}\n")
    assert tokens.who(bearer(ANN)) is None
    assert tokens.who(bearer(BOB)) == User("bob")


@pytest.mark.parametrize("broken", ["gone", "open to all", "nonsense"])
def test_a_file_that_can_no_longer_be_used_lets_nobody_in(tokens_file, monkeypatch, caplog, broken):
    """It is told once, and mended without a restart."""
    monkeypatch.setattr(access, "REREAD", 0.0)
    path = tokens_file(f"ann {ANN}\n")
    tokens = Tokens(path, {})
    if broken == "gone":
        os.unlink(path)
    else:
        tokens_file(
            f"ann {ANN}\n" if broken == "open to all" else f"ann {ANN} boss\n", 0o644 if "open" in broken else 0o600
        )
    for _ in range(3):
        assert tokens.who(bearer(ANN)) is None
        assert tokens, "tokens are still asked for"
    assert len(caplog.records) == 1
    assert ANN not in caplog.text
    tokens_file(f"ann {ANN}\n")
    assert tokens.who(bearer(ANN)) == User("ann")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ann short\n", "16 or more"),
        (f"ann {ANN},{ANN}\n", "without comma"),
        (f"ann {ANN} boss\n", "only 'admin'"),
        (f"an/n {ANN}\n", "name of a user"),
        (f"{ANN}\n", "USER TOKEN"),
        (f"ann {ANN}\nbob {ANN}\n", "ann and bob have the same token"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tokens_file, text, why):
    """With the reason, and without what may be a token."""
    with pytest.raises(ConfigError, match=why) as caught:
        Tokens(tokens_file(text), {})
    assert "the-token-of" not in str(caught.value)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_read_or_write_is_refused(tokens_file, mode):
    """The message has the command that mends it."""
    with pytest.raises(ConfigError, match="chmod 600"):
        Tokens(tokens_file(f"ann {ANN}\n", mode), {})


def test_a_symbolic_link_is_not_followed(tokens_file, tmp_path):
    """It may lead anywhere."""
    (tmp_path / "link").symlink_to(tokens_file(f"ann {ANN}\n"))
    with pytest.raises(ConfigError, match="symbolic link"):
        Tokens(str(tmp_path / "link"), {})


def test_a_flood_of_refusals_is_not_a_flood_of_lines(caplog):
    """How many there were is told all the same."""
    caplog.set_level(logging.INFO, "gpupool_sync.audit")
    audit = access.Audit()
    for _ in range(1000):
        audit.denied(why="no valid token")
    audit._second -= 1  # a second later
    audit.denied(why="no valid token")
    lines = [json.loads(record.message) for record in caplog.records]
    assert len(lines) < 3 * access.MOST_DENIALS
    assert len(lines) + sum(line.get("untold_before", 0) for line in lines) >= 1001


# -- a pinned certificate --------------------------------------------------------------------------------------

PIN = "sha256:" + "ab" * 32


@pytest.mark.parametrize("written", ["sha256:" + "AB" * 32, "sha256=" + "ab" * 32, "sha256:" + ":".join(["ab"] * 32)])
def test_a_fingerprint_in_its_forms(written):
    """As an option, and in a URL, where it leaves no trace in the id."""
    assert Endpoint("https://server1", verify=written).verify == PIN
    endpoint = Endpoint(f"https://server1:8000#{written}")
    assert (endpoint.verify, endpoint.url, endpoint.id) == (PIN, "https://server1:8000", "server1-8000")


@pytest.mark.parametrize("written", ["sha256:", "sha256:xyz", "sha256:" + "ab" * 31])
def test_what_is_no_fingerprint(written):
    """It is neither the path of a file nor ignored."""
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        Endpoint("https://server1", verify=written)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        Endpoint(f"https://server1#{written}")
    with pytest.raises(ConfigError, match="one of them"):
        Endpoint(f"https://server1#{PIN}", verify=False)


# -- the first set-up ------------------------------------------------------------------------------------------


def test_init_makes_files_for_this_user_alone(tmp_path):
    """Whatever the umask; a second time it overwrites nothing."""
    before = os.umask(0)
    try:
        made = setup.init(tmp_path / "new" / "secrets", "ann")
    finally:
        os.umask(before)
    directory = tmp_path / "new" / "secrets"
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {
        "tokens": 0o600,
        "cert.pem": 0o600,
        "key.pem": 0o600,
    }
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    tokens = Tokens(str(directory / "tokens"), {})
    assert tokens.who(bearer(made.token)) == User("ann")
    assert tokens.who(bearer(made.admin_token)) == User("ann-admin", admin=True)
    assert made.fingerprint == setup.fingerprint_of(str(directory / "cert.pem"))
    assert made.token not in repr(made)
    assert made.admin_token not in repr(made)
    with pytest.raises(ConfigError, match="there already"):
        setup.init(directory, "ann")
    assert len(list(directory.iterdir())) == 3


@pytest.mark.parametrize("user", ["DOMAIN\\ann", "ann smith", "#ann", "ann:b", "a" * 300, "änn", ""])
def test_init_for_users_of_any_name(tmp_path, user):
    """What it writes the server can read."""
    made = setup.init(tmp_path / "secrets", user)
    tokens = Tokens(made.tokens, {})
    assert tokens.who(bearer(made.token)) == User(made.user)
    assert tokens.who(bearer(made.admin_token)) == User(made.admin, admin=True)
    assert Endpoint(made.url("gpu1", 8000)).auth == (made.user, made.token)


def test_init_gives_clients_no_token_of_an_admin(tmp_path, capsys):
    """The line for everybody has the ordinary one; the admin's is told apart, and how to give others their own."""
    assert main(["serve", "--init", "--config-dir", str(tmp_path / "secrets"), "--host", "gpu1"]) == 0
    text = capsys.readouterr().out
    for_all, _, for_others = text.partition("All who share a token are one user")
    for_others, _, for_me = for_others.partition("For yourself alone")

    tokens = Tokens(str(tmp_path / "secrets" / "tokens"), {})
    (url,) = re.findall(r"GPU_SERVICE_ENDPOINTS='(.*)'", for_all)
    user, token = Endpoint(url).auth
    assert tokens.who(bearer(token)) == User(user)
    (admin_url,) = re.findall(r"GPU_SERVICE_ENDPOINTS='(.*)' gpupool-sync release --force", for_me)
    admin, admin_token = Endpoint(admin_url).auth
    assert tokens.who(bearer(admin_token)) == User(admin, admin=True)
    assert admin != user
    assert text.count(token) == text.count(admin_token) == 1
    assert Endpoint(url).verify == Endpoint(admin_url).verify == setup.fingerprint_of(f"{tmp_path}/secrets/cert.pem")

    # What it says for one more user does that, as it stands.
    (command,) = [line for line in for_others.splitlines() if line.startswith("    ")]
    subprocess.run(command.replace("NAME", "bob"), shell=True, check=True, timeout=60)
    (bob,) = [line.split() for line in (tmp_path / "secrets" / "tokens").read_text().splitlines() if "bob" in line]
    assert Tokens(str(tmp_path / "secrets" / "tokens"), {}).who(bearer(bob[1])) == User("bob")


# -- a server --------------------------------------------------------------------------------------------------


class Served:
    """A `gpupool-sync serve` of two simulated cards, on every address."""

    def __init__(self, tmp_path, *options, environ=None) -> None:
        self.log = tmp_path / f"server-{len(list(tmp_path.iterdir()))}.log"
        command = [sys.executable, "-m", "gpupool_sync", "serve", "--simulate", "2", "--port", "0", "--json", *options]
        environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "nothing"), **(environ or {})}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        self.told = json.loads(self._first())
        self.url = self.told["url"].replace(self.told["url"].split("/")[2].rpartition(":")[0], "127.0.0.1")

    def _first(self) -> bytes:
        text = b""
        while True:
            line = self.process.stdout.readline()
            assert line, self.log.read_text()
            text += line
            with contextlib.suppress(ValueError):
                json.loads(text)
                return text

    def ask(self, token, method, path, document=None):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return requests.request(method, self.url + path, json=document, headers=headers, timeout=30)

    def audit(self, event) -> list[dict]:
        lines = [line.partition("gpupool_sync.audit: ")[2] for line in self.log.read_text().splitlines()]
        return [found for line in lines if line and (found := json.loads(line))["event"] == event]

    def close(self) -> None:
        self.process.terminate()
        try:
            assert self.process.wait(30) == 0
        finally:
            self.process.kill()
            self.process.wait(10)
            self.process.stdout.close()


@pytest.fixture
def served(tmp_path) -> Iterator:
    running = []

    def start(*options, **more) -> Served:
        running.append(Served(tmp_path, *options, **more))
        return running[-1]

    yield start
    for each in running:
        each.close()


THREE = {access.VARIABLE: f"ann:{ANN},bob:{BOB},root:{ROOT}:admin"}


def claim(card, number, **more):
    holder = {"id": f"holder-of-{number}", "name": "job", "user": "somebody", "host": "elsewhere", "pid": 1}
    return {
        "id": f"{number:032x}",
        "holder": holder,
        "count": 1,
        "cards": [{"key": card}],
        "ttl": 60.0,
        "waited": 0.0,
        "queue": False,
        **more,
    }


@pytest.mark.real
def test_the_safe_way_is_the_short_way(served, tmp_path):
    """`serve --init`, `serve`, and the line that it printed: TLS, a token, a lease; and nothing without them."""
    command = [
        sys.executable,
        "-m",
        "gpupool_sync",
        "serve",
        "--config-dir",
        str(tmp_path / "secrets"),
        "--init",
        "--json",
    ]
    made = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    server = served("--host", "0.0.0.0", "--config-dir", str(tmp_path / "secrets"))
    assert server.told["leases"]
    assert server.url.startswith("https://127.0.0.1:")
    port = server.url.rpartition(":")[2]
    credentials, _, rest = made["url"].partition("://")[2].partition("@")
    line = f"https://{credentials}@127.0.0.1:{port}#{rest.partition('#')[2]}"
    for_admin = line.replace(credentials, made["admin_url"].partition("://")[2].partition("@")[0])
    assert for_admin != line
    with GPUPool(line) as pool, pool.gpu(timeout=30, local=False) as gpu:
        assert gpu.endpoint_id == f"127.0.0.1-{port}"
        assert credentials.partition(":")[2] not in repr(pool) + str(pool.status()) + repr(gpu)
    eventually(lambda: server.audit("release"), message=server.log.read_text)
    (grant,) = server.audit("grant")
    assert grant["user"] == made["user"]
    assert server.audit("denied") == []

    # Who has the line is no admin: a colleague with a token of their own keeps their GPU, unless the admin wants it.
    with open(tmp_path / "secrets" / "tokens", "a") as file:
        file.write(f"bob {BOB}\n")
    time.sleep(access.REREAD)
    with GPUPool(line.replace(credentials, f"bob:{BOB}")) as pool, pool.gpu(timeout=30, local=False) as gpu:
        with GPUPool(line) as other, pytest.raises(LeaseStoreError, match="403"):
            other.revoke(gpu.global_gpu_id, force=True)
        assert not gpu.lost
        command = [sys.executable, "-m", "gpupool_sync", "release", "--force", "--wait", "0", gpu.global_gpu_id]
        environment = {**os.environ, "GPU_SERVICE_ENDPOINTS": for_admin}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert "was told" in done.stdout, done.stderr
    (force,) = server.audit("force")
    assert force["user"] == made["admin"]

    endpoint = Endpoint(line)
    for wrong, why in (
        (Endpoint(endpoint.url, verify=PIN, auth=endpoint.auth), "fingerprint"),
        (Endpoint(endpoint.url, auth=endpoint.auth), "the certificate of"),
        (Endpoint(endpoint.url, verify=endpoint.verify), "401"),
    ):
        with GPUPool([wrong], endpoint_timeout=5) as pool, pytest.raises(AcquireTimeout, match=why):
            pool.acquire(timeout=8, local=False)
    assert len(server.audit("denied")) >= 2
    for each in (line, for_admin):
        assert Endpoint(each).auth[1] not in server.log.read_text()


@pytest.mark.real
def test_a_token_renews_and_releases_its_own_leases_only(served):
    """Others get 403, and nothing happens; an admin takes them; all of it is in the audit."""
    server = served("--host", "0.0.0.0", "--insecure", "--log-level", "error", environ=THREE)
    cards = [gpu["uuid"] for gpu in server.ask(ANN, "GET", "/gpu/summary").json()["gpus_summary"]]
    granted = server.ask(ANN, "POST", "/v1/leases", claim(cards[0], 1))
    assert granted.status_code == 200, granted.text
    token, ids = granted.json()["token"], {"ids": [claim(cards[0], 1)["id"]]}

    # Whose it is the token says, not the client.
    (lease,) = server.ask(BOB, "GET", "/v1/leases").json()["leases"]
    assert lease["holder"]["user"] == "ann"

    for path in ("renew", "release", "withdraw"):
        assert server.ask(BOB, "POST", f"/v1/leases/{path}", ids).status_code == 403
    assert server.ask(ROOT, "POST", "/v1/leases/release", ids).status_code == 403
    assert server.ask(BOB, "POST", "/v1/leases", claim(cards[0], 1)).status_code == 422
    taking = {"key": cards[0], "token": token, "by": "bob"}
    assert server.ask(BOB, "POST", "/v1/leases/revoke", taking).status_code == 403
    assert server.ask(ANN, "POST", "/v1/leases/renew", ids).json()["alive"] == [True]

    assert server.ask(ROOT, "POST", "/v1/leases/revoke", taking).json() == {"found": True}
    assert server.ask(ANN, "POST", "/v1/leases/renew", ids).json()["alive"] == [False]
    assert server.ask(ANN, "POST", "/v1/leases/release", ids).status_code == 200

    short = claim(cards[1], 2, ttl=1.0)
    assert server.ask(BOB, "POST", "/v1/leases", short).status_code == 200
    eventually(lambda: server.audit("expiry"), 30.0)
    (force,) = server.audit("force")
    assert (force["user"], force["card"], force["token"]) == ("root", cards[0], token)
    assert [each["user"] for each in server.audit("grant")] == ["ann", "bob"]
    assert [each["user"] for each in server.audit("release")] == ["ann"]
    assert [each["user"] for each in server.audit("expiry")] == ["bob"]
    assert {each["user"] for each in server.audit("denied")} == {"bob", "root"}
    # An id is the power to renew and release.
    assert ids["ids"][0] not in server.log.read_text()


@pytest.mark.real
def test_a_running_server_lets_in_whom_the_file_names_now(served, tokens_file):
    """A token that is taken out renews and releases nothing any more, on old connections either; put back, it does."""
    ann, bob = f"ann {ANN}\n", f"bob {BOB}\n"
    path = tokens_file(ann + bob)
    server = served("--host", "0.0.0.0", "--insecure", "--tokens", path, "--log-level", "error")
    cards = [gpu["uuid"] for gpu in server.ask(BOB, "GET", "/gpu/summary").json()["gpus_summary"]]
    with requests.Session() as kept:

        def ask_as_ann(path, document=None):
            method, headers = "GET" if document is None else "POST", {"Authorization": f"Bearer {ANN}"}
            return kept.request(method, server.url + path, json=document, headers=headers, timeout=30)

        mine, theirs = claim(cards[0], 1, ttl=300.0), claim(cards[1], 2, ttl=300.0)
        assert ask_as_ann("/v1/leases", mine).status_code == 200
        assert server.ask(BOB, "POST", "/v1/leases", theirs).status_code == 200
        mine, theirs = {"ids": [mine["id"]]}, {"ids": [theirs["id"]]}
        assert ask_as_ann("/v1/leases/renew", mine).json()["alive"] == [True]

        tokens_file(bob)
        eventually(lambda: ask_as_ann("/v1/leases/renew", mine).status_code == 401, message="the token is revoked")
        waiting = {"holder": "holder-of-1", "timeout": 0}
        for path, document in (
            ("/gpu/summary", None),
            ("/v1/leases", None),
            ("/v1/leases", claim(cards[0], 3)),
            ("/v1/leases/renew", mine),
            ("/v1/leases/withdraw", mine),
            ("/v1/leases/release", mine),
            ("/v1/wait", waiting),
        ):
            assert ask_as_ann(path, document).status_code == 401
        assert server.ask(BOB, "POST", "/v1/leases/renew", theirs).json()["alive"] == [True]
        # What the token has taken is kept until its ttl ends: there may be a job on it.
        leases = server.ask(BOB, "GET", "/v1/leases").json()["leases"]
        assert sorted(lease["holder"]["user"] for lease in leases) == ["ann", "bob"]

        tokens_file(bob + ann)
        eventually(lambda: ask_as_ann("/gpu/summary").status_code == 200, message="the token is given again")
        assert ask_as_ann("/v1/leases/renew", mine).json()["alive"] == [True]
        assert ask_as_ann("/v1/leases/release", mine).status_code == 200
        leases = server.ask(BOB, "GET", "/v1/leases").json()["leases"]
        assert [lease["holder"]["user"] for lease in leases] == ["bob"]
    assert server.audit("denied")
    assert ANN not in server.log.read_text()


PLACES = ("/", "/gpu/summary", "/gpu/stats", "/config", "/metrics", "/docs", "/openapi.json", "/nothing")


@pytest.mark.real
@pytest.mark.parametrize("public", [False, True])
def test_statistics_documentation_and_metrics_follow_one_rule(served, public):
    """All need a token, or with --public-stats none does; leases always do, and whether it lives anybody may ask."""
    server = served("--host", "0.0.0.0", "--insecure", *(["--public-stats"] if public else []), environ=THREE)
    for path in PLACES:
        assert (server.ask(None, "GET", path).status_code == 401) is not public
        assert (server.ask("x" * 20, "HEAD", path).status_code == 401) is not public
        assert server.ask(BOB, "GET", path).status_code == (404 if path == "/nothing" else 200)
    for path in ("/v1/leases", "/v1/queue"):
        assert server.ask(None, "GET", path).status_code == 401
    for path in ("/v1/leases", "/v1/leases/release", "/v1/wait", "/v1/anything"):
        assert server.ask(None, "POST", path, {}).status_code == 401
    assert server.ask(None, "GET", "/health").status_code == 200


@pytest.mark.real
def test_other_machines_get_no_leases_without_a_token(served):
    """Their statistics they get, as from the predecessor; why there is no more the server says."""
    server = served("--host", "0.0.0.0")
    assert not server.told["leases"]
    assert server.ask(None, "GET", "/gpu/summary").status_code == 200
    assert server.ask(None, "GET", "/v1/leases").status_code == 404
    assert "serve --init" in server.log.read_text()


def test_tokens_do_not_travel_in_the_open(tmp_path):
    """Unless --insecure says so; the error says what that would mean."""
    command = [sys.executable, "-m", "gpupool_sync", "serve", "--simulate", "1", "--host", "0.0.0.0", "--port", "0"]
    environment = {**os.environ, **THREE, "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1
    assert "--init" in done.stderr
    assert "whoever can read the network's packets" in done.stderr.replace("\n", " ")


def warnings_of(server) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if " WARNING " in line and "--insecure" in line]


@pytest.mark.real
@pytest.mark.parametrize("with_tokens", [True, False])
def test_a_server_that_is_insecure_says_what_that_means(served, with_tokens):
    """In one line of its log: with tokens, that they can be read and used; without, who reads what."""
    server = served("--host", "0.0.0.0", "--insecure", environ=THREE if with_tokens else {})
    (line,) = warnings_of(server)
    assert "readable and changeable by whoever is on the way" in line
    assert ("who reads one" in line) is with_tokens
    assert ("anybody who reaches the port" in line) is not with_tokens
    assert server.told["leases"] is with_tokens
    for token in (ANN, BOB, ROOT):
        assert token not in server.log.read_text()


@pytest.mark.real
def test_insecure_means_nothing_to_this_machine_alone_or_by_tls(served, tmp_path):
    """Nobody is on the way on loopback, nor reads TLS: then there is nothing to say."""
    server = served("--insecure", environ=THREE)
    assert warnings_of(server) == []
    setup.init(tmp_path / "secrets", "ann")
    files = [f"--{name}={tmp_path}/secrets/{file}" for name, file in (("tls-cert", "cert.pem"), ("tls-key", "key.pem"))]
    server = served("--host", "0.0.0.0", "--insecure", *files, environ=THREE)
    assert server.url.startswith("https:")
    assert warnings_of(server) == []
