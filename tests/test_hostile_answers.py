"""Every answer of `hostile_answers`, given to a pool with a decent endpoint beside the hostile one, and to stores."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

import servers
from gpupool_sync import AcquireTimeout, Endpoint, GPUPool
from gpupool_sync.cli.status import render
from gpupool_sync.cli.status import summary as status_line
from gpupool_sync.config import Settings
from gpupool_sync.errors import BadAnswer, EndpointUnavailable, GPUPoolError, LeaseLost, LeaseStoreError
from gpupool_sync.leases.base import Granted, Queued, Refused
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import Snapshot
from helpers import MARGIN
from hostile_answers import (
    CLAIMS,
    EVIL,
    LISTS,
    RELEASES,
    RENEWALS,
    STATUSES,
    SUMMARIES,
    WAITS,
    Accepted,
    Board,
    Hostile,
    all_names,
    body,
    garbled_leases,
    gpu,
    grant,
    lease,
    once,
    summary,
    written,
)
from hostile_answers import Refused as Failed
from servers import Authority, Server
from test_display import check as check_page
from test_leases_contract import claim
from test_transport import HOSTILE, time_for

#: Seconds for what ends by itself: never reached.
AMPLE = 60.0
MOST_MEMORY = 32 << 20

WELL = body(written(summary(gpu(0, uuid="GPU-well"))))
GOOD = body(written(summary()))


@contextlib.contextmanager
def bounded(timeout: float) -> Iterator[None]:
    """What is done here takes *timeout* + 1 seconds at most, and 32 MiB."""
    begin = time.monotonic()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < timeout + 1.0 + MARGIN
    assert peak - before < MOST_MEMORY, f"{(peak - before) >> 20} MiB"


def make_pool(*urls: str | Endpoint, timeout: float = AMPLE, **options: Any) -> GPUPool:
    defaults = {
        # Polls are made when the test asks for them.
        "poll_interval": 1000.0,
        "health_check_interval": 1000.0,
        "endpoint_timeout": timeout,
        "endpoint_max_retries": 1,  # a kept connection may have ended
        "breaker_failures": 1000,
        "lease_store": MemoryStore(),
    }
    return GPUPool(list(urls), **{**defaults, **options})


def recorded(pool: GPUPool, endpoint_id: str) -> list[Snapshot | BaseException]:
    """What each poll of the endpoint brings from now on."""
    polled = pool._state.engine.endpoints[endpoint_id]
    poll, outcomes = polled.poll, []

    def recording() -> Snapshot:
        try:
            outcomes.append(poll())
        except BaseException as exc:
            outcomes.append(exc)
            raise
        return outcomes[-1]

    polled.poll = recording
    return outcomes


def fit_for_a_line(text: str, longest: int = 1000) -> None:
    assert text.isprintable(), ascii(text)
    assert len(text) <= longest, f"{len(text)} characters"


def fit_for_screens(pool: GPUPool, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that a server said acts on a terminal or in a page, or floods it."""
    state, explanation = pool.status(), pool.explain()
    for page in (state._repr_html_(), explanation._repr_html_(), pool._repr_html_()):
        check_page(page)
    for text in (str(state), status_line(state), *str(explanation).split("\n"), *explanation.lines()):
        fit_for_a_line(text, longest=400_000)  # a line has every card's number where all are of one kind
    console = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
    console.print(render(state, 200))
    for line in console.file.getvalue().split("\n"):
        fit_for_a_line(line)
    for each in state.endpoints:
        for text in (each.last_error or "", *each.problems):
            fit_for_a_line(text)
    for record in caplog.records:
        fit_for_a_line(record.getMessage())
    caplog.clear()


def check_outcome(
    expected: Accepted | Failed, outcome: Snapshot | BaseException, endpoint: Any, cards: list[Any]
) -> None:
    if isinstance(expected, Accepted):
        assert isinstance(outcome, Snapshot), outcome
        assert tuple(each.local_gpu_id for each in outcome.sample.gpus) == expected.gpus
        assert len(outcome.sample.faults) == expected.lost
        assert endpoint.is_healthy
        assert tuple(each.local_gpu_id for each in cards) == expected.gpus
        assert all(each.name and len(each.name) <= 256 for each in cards)
        if expected.lost:
            assert endpoint.problems
        return
    assert type(outcome) is not GPUPoolError
    assert isinstance(outcome, (EndpointUnavailable, BadAnswer))
    assert isinstance(outcome, expected.kind), repr(outcome)
    assert expected.told in outcome.message
    fit_for_a_line(str(outcome), longest=300)
    assert (endpoint.is_healthy, endpoint.available_gpus) == (False, 0)
    assert endpoint.last_error == outcome.message
    assert not any(each.is_available for each in cards)
    if isinstance(outcome, EndpointUnavailable) and outcome.retry_after is not None:
        assert 0.0 <= outcome.retry_after <= 300.0


class Pair:
    """A pool of a hostile and a decent endpoint."""

    def __init__(self, board: Board, pool: GPUPool, caplog: pytest.LogCaptureFixture) -> None:
        self.board = board
        self.pool = pool
        self._caplog = caplog
        self._outcomes = recorded(pool, "hostile")
        self._well = pool._state.engine.endpoints["well"]

    def give(self, answer: Hostile, screens: bool = True) -> None:
        self.board.put("/gpu/summary", answer.script)
        before = len(self._outcomes)
        with bounded(AMPLE):
            assert self.pool.refresh(AMPLE + MARGIN)
        assert len(self._outcomes) == before + 1
        state = self.pool.status()
        hostile = next(each for each in state.endpoints if each.endpoint_id == "hostile")
        cards = [each for each in state.gpus if each.endpoint_id == "hostile"]
        check_outcome(answer.expected, self._outcomes[-1], hostile, cards)
        assert self._well.numbers().failures == 0
        with self.pool.gpu(timeout=0, endpoint="well") as granted:
            assert granted.uuid == "GPU-well"
        if screens:
            fit_for_screens(self.pool, self._caplog)


@pytest.fixture
def pair(caplog):
    caplog.set_level(logging.DEBUG, logger="gpupool_sync")
    board = Board()
    board.put("/gpu/summary", GOOD)
    with contextlib.ExitStack() as stack:
        hostile, well = stack.enter_context(Server(board.script)), stack.enter_context(Server(WELL))
        named = Endpoint(hostile.url, name="hostile"), Endpoint(well.url, name="well")
        pool = stack.enter_context(make_pool(*named))
        pool.open(wait=True)
        yield Pair(board, pool, caplog)


def in_turn(names: list[str], give: Callable[[str], None]) -> None:
    """All of them, with the names of those that failed: one bad answer does not hide the next."""
    failed = {}
    for name in names:
        try:
            give(name)
        except (Exception, pytest.fail.Exception) as exc:
            failed[name] = f"{type(exc).__name__}: {exc}"[:300]
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())


def test_the_catalogue_is_large_enough():
    """At least 150 answers of different names, besides every status."""
    names = all_names()
    assert len(set(names)) == len(names) >= 600
    assert len({*STATUSES, 200}) == 397


# -- /gpu/summary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_a_hostile_summary_costs_as_little_as_it_can(pair, part):
    """
    A card or the endpoint is lost, by the right error, in bounded time and memory; the other endpoint never notices,
    and nothing of it gets onto a screen as it came.
    """
    in_turn(list(SUMMARIES)[part::4], lambda name: pair.give(SUMMARIES[name]))


def test_nothing_but_200_is_an_answer(pair):
    """Each status from 204 to 599, with a good summary behind it."""
    content = written(summary())

    def give(name: str) -> None:
        expected = Failed(EndpointUnavailable, f"status {name}")
        pair.give(Hostile(body(content, int(name)), expected), screens=int(name) % 20 == 4)

    in_turn([str(each) for each in STATUSES], give)
    pair.give(Hostile(GOOD, Accepted()))


def test_hostile_transports_are_the_endpoints_loss(pair):
    """What the transport refuses (`test_transport.HOSTILE`) and that ends by itself, through a pool."""
    names = [name for name in HOSTILE if time_for(name) > 1.0]

    def give(name: str) -> None:
        script, kind, told = HOSTILE[name]
        pair.give(Hostile(once(script), Failed(kind, told)))

    in_turn(names, give)
    pair.give(Hostile(GOOD, Accepted()))


def test_a_redirect_is_not_followed(pair):
    """Not to another host, however it is written."""
    with Server(GOOD) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            for to in (elsewhere.url, f"{elsewhere.url}/gpu/summary", elsewhere.url.removeprefix("http:")):
                expected = Failed(EndpointUnavailable, f"status {status}")
                pair.give(Hostile(body(b"", status, {"Location": to, "Refresh": f"0; url={to}"}), expected))
        assert elsewhere.connections == 0


def poll_all(stack: contextlib.ExitStack, hostile: dict[str, Endpoint], timeout: float, caplog) -> dict[str, Any]:
    """One poll of each at the same time, beside a decent one; the errors by name."""
    well = stack.enter_context(Server(WELL))
    renamed = [
        Endpoint(each.url, name=f"h{number}", verify=each.verify) for number, each in enumerate(hostile.values())
    ]
    pool = stack.enter_context(make_pool(*renamed, Endpoint(well.url, name="well"), timeout=timeout))
    with bounded(timeout):
        pool.open(wait=True, timeout=timeout + 1.0 + MARGIN)
        errors = {
            name: pool._state.engine.endpoints[f"h{number}"].numbers().last_error for number, name in enumerate(hostile)
        }
    with pool.gpu(timeout=0) as granted:
        assert granted.uuid == "GPU-well"
    fit_for_screens(pool, caplog)
    return errors


def test_what_never_ends_is_over_with_the_timeout(caplog):
    """Hanging, dripping and interim answers without end: all of them at once, and each ends with its deadline."""
    caplog.set_level(logging.DEBUG, logger="gpupool_sync")
    slow = {name: HOSTILE[name] for name in HOSTILE if time_for(name) <= 1.0}
    slow["drips a summary"] = (drip(written(summary())), EndpointUnavailable, "no complete answer")
    with contextlib.ExitStack() as stack:
        hosts = {name: stack.enter_context(Server(script)) for name, (script, _, _) in slow.items()}
        urls = {name: server.url for name, server in hosts.items()}
        urls["swallows packets"] = stack.enter_context(servers.swallowing())
        errors = poll_all(stack, {name: Endpoint(url) for name, url in urls.items()}, 1.0, caplog)
    assert len(errors) >= 10
    for name, error in errors.items():
        told = slow[name][2] if name in slow else ""
        assert error, name
        assert told in error, name


def drip(content: bytes) -> servers.Script:
    """A good answer that would take half an hour."""

    def script(connection: servers.Connection) -> None:
        connection.request()
        connection.drip(servers.head(length=len(content)) + content, every=2.0)

    return script


def test_a_certificate_that_is_none_of_its_is_refused(caplog, tmp_path):
    """Wrong name, expired, self-signed, of an unknown authority; and what speaks no TLS."""
    caplog.set_level(logging.DEBUG, logger="gpupool_sync")
    (tmp_path / "known").mkdir()
    (tmp_path / "other").mkdir()
    known, other = Authority(tmp_path / "known"), Authority(tmp_path / "other")
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=400)
    contexts = {
        "another name": (known.context("elsewhere.example.org"), "127.0.0.1"),
        "expired": (known.context(not_before=past, not_after=past + datetime.timedelta(days=1)), "expired"),
        "not valid yet": (known.context(not_before=past + datetime.timedelta(days=800)), "valid"),
        "self-signed": (other.context(), "certificate"),
    }
    with contextlib.ExitStack() as stack:
        hosts = {name: stack.enter_context(Server(GOOD, tls=context)) for name, (context, _) in contexts.items()}
        http = servers.head(length=2) + b"{}"
        speaking = {"closes": servers.close_at_once(), "speaks HTTP": lambda connection: connection.send(http)}
        for name, script in speaking.items():
            hosts[name] = stack.enter_context(Server(servers.before_tls(script), tls=known.context()))
        trusting = {name: Endpoint(server.url, verify=known.ca_path) for name, server in hosts.items()}
        errors = poll_all(stack, trusting, AMPLE, caplog)
        # It is the certificates that are wrong: with the right one the same server is accepted.
        right = stack.enter_context(Server(GOOD, tls=known.context()))
        with make_pool(Endpoint(right.url, verify=known.ca_path)) as pool:
            pool.open(wait=True)
            assert pool.status().total_gpus == 2
        assert not any(server.requests for server in hosts.values())
    for name, error in errors.items():
        assert error, name
        assert contexts.get(name, (None, ""))[1] in error, (name, error)


# -- the lease API -------------------------------------------------------------------------------------------------

CLAIM, RENEW, RELEASE, WAIT = "/v1/leases", "/v1/leases/renew", "/v1/leases/release", "/v1/wait"


class Arbiter:
    """A store whose server says what a test puts up."""

    def __init__(self, board: Board, url: str) -> None:
        self.board = board
        settings = Settings(endpoint_timeout=AMPLE, ttl=300.0, endpoint_max_retries=0)
        self.store = HTTPStore(Endpoint(url), settings)

    def fails(self, call: Callable[[], object], kind: type[GPUPoolError] = LeaseStoreError) -> None:
        with bounded(AMPLE), pytest.raises(GPUPoolError) as caught:
            call()
        assert isinstance(caught.value, kind)
        fit_for_a_line(str(caught.value), longest=1000)

    def hold(self) -> str:
        """A lease that is granted properly."""
        wish = claim("GPU-1", "GPU-2")
        self.board.put(CLAIM, body(written(grant())))
        outcome = self.store.claim(wish)
        assert isinstance(outcome, Granted)
        assert outcome.lease.cards == ("GPU-1",)
        return wish.id


@pytest.fixture
def arbiter():
    board = Board()
    with Server(board.script) as server:
        made = Arbiter(board, server.url)
        yield made
        made.store.close()


@pytest.mark.parametrize("queue", [False, True], ids=["at once", "with a ticket"])
def test_a_hostile_claim_is_never_granted(arbiter, queue):
    """Whatever is answered: an error of ours, no card, and the next proper grant counts."""

    def give(name: str) -> None:
        arbiter.board.put(CLAIM, CLAIMS[name])
        wish = claim("GPU-1", "GPU-2", queue=queue)
        arbiter.fails(lambda: arbiter.store.claim(wish))
        assert not any(arbiter.store.is_held(card) for card in ("GPU-1", "GPU-2", "GPU-3"))
        assert not arbiter.store._leases
        arbiter.board.put(RELEASE, body(b"{}"))
        arbiter.store.withdraw([wish.id])

    in_turn(list(CLAIMS), give)
    arbiter.hold()


def test_several_cards_are_those_of_one_group(arbiter):
    """Fewer than were asked for, or of two hosts, is no grant."""
    for cards in (["GPU-1"], ["GPU-1", "GPU-3"], ["GPU-1", "GPU-2", "GPU-3"], ["GPU-1", "GPU-1"]):
        arbiter.board.put(CLAIM, body(written(grant(cards=cards))))
        wish = claim(groups=[("GPU-1", "GPU-2"), ("GPU-3", "GPU-4")], count=2)
        arbiter.fails(lambda wish=wish: arbiter.store.claim(wish))
    assert not arbiter.store._leases


def test_only_four_statuses_answer_a_claim(arbiter):
    """A grant behind another status is none; 410 says that the id is gone; 202 and 409 do not grant."""
    content = written(grant(position=0, reasons={"GPU-1": {"code": EVIL[:20], "text": EVIL}}))

    def give(name: str) -> None:
        arbiter.board.put(CLAIM, body(content, int(name)))
        wish = claim("GPU-1")
        if name in ("202", "409"):
            outcome = arbiter.store.claim(wish)
            assert isinstance(outcome, Queued if name == "202" else Refused)
            if isinstance(outcome, Refused):
                for reason in outcome.reasons.values():
                    fit_for_a_line(f"{reason.code} {reason.text}")
        else:
            arbiter.fails(lambda: arbiter.store.claim(wish), LeaseLost if name == "410" else LeaseStoreError)
        assert not arbiter.store._leases

    in_turn([str(each) for each in (202, *STATUSES)], give)


@pytest.mark.parametrize(("call", "answers"), [("renew", RENEWALS), ("release", RELEASES)])
def test_what_is_held_is_neither_lost_nor_kept_by_a_hostile_answer(arbiter, call, answers):
    """A renewal that is not answered clearly changes nothing; a release that is not stays owed, and is told again."""

    def give(name: str) -> None:
        mine = arbiter.hold()
        until = arbiter.store._leases[mine].until
        arbiter.board.put(RENEW if call == "renew" else RELEASE, answers[name])
        if name.startswith("why "):
            with contextlib.suppress(LeaseStoreError):
                assert arbiter.store.renew([mine]) == {mine: True}
            fit_for_a_line(arbiter.store.why_gone(mine) or "")
        elif call == "renew":
            arbiter.fails(lambda: arbiter.store.renew([mine]))
            assert arbiter.store._leases[mine].until == until
            assert arbiter.store.is_held("GPU-1")
        else:
            arbiter.fails(lambda: arbiter.store.release([mine]))
            assert mine in arbiter.store._owed
        assert set(arbiter.store._leases) <= {mine}
        arbiter.board.put(RELEASE, body(b"{}"))
        arbiter.store.release([mine])
        assert not arbiter.store._leases
        assert not arbiter.store._owed

    in_turn(list(answers), give)


def test_only_200_answers_a_renewal_or_a_release(arbiter):
    """Every other status is an error, whatever stands behind it."""
    mine = arbiter.hold()

    def give(name: str) -> None:
        for path, call in ((RENEW, arbiter.store.renew), (RELEASE, arbiter.store._pay)):
            arbiter.board.put(path, body(b'{"alive": [true]}', int(name)))
            arbiter.fails(lambda call=call: call([mine]))
        assert set(arbiter.store._leases) == {mine}

    in_turn([str(each) for each in STATUSES], give)


def test_a_hostile_wait_hints_nothing(arbiter):
    """An error of ours, or a hint that names nobody's ticket."""
    wish = claim("GPU-1", queue=True)
    arbiter.board.put(CLAIM, body(written({"position": 0}), 202))
    assert isinstance(arbiter.store.claim(wish), Queued)
    hinted: list[str] = []
    arbiter.store.subscribe(hinted.extend)

    def give(name: str) -> None:
        arbiter.board.put(WAIT, WAITS[name])
        arbiter.fails(lambda: arbiter.store.listen(0.0))

    in_turn(list(WAITS), give)
    arbiter.board.put(WAIT, body(written({"hints": [wish.id, "x", EVIL[:60]]})))
    arbiter.store.listen(0.0)
    assert not hinted, "an id in clear is no digest of it"


@pytest.mark.parametrize("call", ["leases", "queue"])
def test_a_hostile_list_is_refused_or_loses_its_bad_entries(arbiter, call):
    """Displays get what is readable; the rest is left out, and what cannot be read at all is an error."""
    ask = getattr(arbiter.store, call)

    def give(name: str) -> None:
        for path in ("/v1/leases", "/v1/queue"):
            arbiter.board.put(path, LISTS[name])
        arbiter.fails(ask)

    in_turn(list(LISTS), give)
    evil = {"id": "h", "name": EVIL, "user": EVIL, "host": EVIL, "pid": 1}
    good = {**lease(holder=evil, note=EVIL), "position": 1, "count": 1, "waited": 2.0}
    document = {call: [*garbled_leases(), good]}
    arbiter.board.put(f"/v1/{call}", body(written(document)))
    found = ask()
    assert len(found) == 1
    fit_for_a_line(f"{found[0].holder} {found[0].note}")


@pytest.fixture
def beside(caplog):
    """What a server with two good cards says, which is their arbiter, and a pool of it and of a decent one."""
    caplog.set_level(logging.DEBUG, logger="gpupool_sync")
    board = Board()
    board.put("/gpu/summary", body(written(summary(gpu(1, uuid="GPU-1"), gpu(2, uuid="GPU-2"), leases={"version": 1}))))
    with Server(board.script) as hostile, Server(WELL) as well:
        named = Endpoint(hostile.url, name="hostile"), Endpoint(well.url, name="well")
        with make_pool(*named, ttl=300.0, lease_store=None) as pool:
            pool.open(wait=True)
            yield board, pool


def test_a_pool_with_a_hostile_arbiter_grants_elsewhere(beside, caplog):
    """The cards are good and their arbiter is not: nothing there is granted, and the decent server's card is."""
    board, pool = beside

    def give(name: str) -> None:
        board.put(CLAIM, CLAIMS[name])
        with bounded(AMPLE), pytest.raises(AcquireTimeout) as caught:
            pool.acquire(timeout=0, endpoint="hostile")
        for line in str(caught.value).split("\n"):
            fit_for_a_line(line, longest=3000)
        with pool.gpu(timeout=0, endpoint="well") as granted:
            assert granted.uuid == "GPU-well"
        fit_for_screens(pool, caplog)

    in_turn(list(CLAIMS), give)
    # They were good cards, and nothing that was said of them is kept.
    board.put(CLAIM, body(written(grant())))
    with pool.gpu(timeout=20, endpoint="hostile") as granted:
        assert granted.uuid == "GPU-1"


def test_a_pool_goes_on_whatever_an_arbiter_says_later(beside, caplog):
    """Of what was given back, who holds what and who waits: leases at the decent server are as before, and listed."""
    board, pool = beside
    with pool.gpu(timeout=20, endpoint="well") as mine:

        def give_release(name: str) -> None:
            board.put(CLAIM, body(written(grant())))
            board.put(RELEASE, body(b"{}"))  # also for what the one before left owed
            with bounded(AMPLE):
                lease = pool.acquire(timeout=20, endpoint="hostile")
                board.put(RELEASE, RELEASES[name])
                lease.release()
            assert pool.stats()["held"] == 1
            mine.check()
            fit_for_screens(pool, caplog)

        def give_list(name: str) -> None:
            for path in ("/v1/leases", "/v1/queue"):
                board.put(path, LISTS[name])
            with bounded(AMPLE):
                found = pool.leases()
            listed = {tuple(each.gpus): each.token for each in found.leases}
            assert listed[(mine.global_gpu_id,)] == mine.fencing_token
            check_page(found._repr_html_())
            for line in str(found).split("\n"):
                fit_for_a_line(line, longest=3000)
            caplog.clear()

        in_turn(list(RELEASES), give_release)
        in_turn(list(LISTS), give_list)
        mine.check()
