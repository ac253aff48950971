"""The judge of the soak finds what it is there to find, and the soak runs over each store."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # pytest itself only finds what lies in tests/

from benchmarks import soak  # noqa: E402
from benchmarks.soak import Ask, History, Hold, Span, Worker  # noqa: E402

pytestmark = pytest.mark.checkout


def hold(begin, end, *, key="a", who="w1", token=None, asked=None, **more):
    """By default its token is its beginning."""
    token = int(begin * 1000) if token is None else token
    return Hold(key, who, token, begin if asked is None else asked, begin, end, **more)


def history(*holds, asks=(), workers=(), **more):
    return History(holds, list(asks), list(workers), **{"end": 100.0, **more})


def verdict(past, *, cards=("a",), reclaimed=("a",)):
    return soak.judge(past, cards=cards, reclaimed=reclaimed)


def test_a_good_history_is_good():
    """Cards that are handed on, shares of one card, a death that is made good: nothing to say."""
    past = history(
        hold(1.0, 2.0),
        hold(2.0, 3.0, who="w2"),
        hold(3.0, 5.0, places=2),
        hold(4.0, 6.0, who="w2", places=2),
        hold(7.0, 8.0, killed=8.0),
        hold(8.5, 9.0, who="w2", asked=7.5),
        asks=[Ask("w2", 7.5, 8.5)],
        workers=[Worker("w1", 0.0, 8.0, got=3), Worker("w2", 0.0, 99.0, got=3)],
    )
    found = verdict(past)
    assert found.problems == ()
    assert found.measures["takeover_p99_s"] == 0.5


@pytest.mark.parametrize(
    "second",
    [hold(1.5, 3.0, who="w2"), hold(1.5, 1.6, who="w2", places=2)],
    ids=["whole", "share"],
)
def test_an_overlap_is_found(second):
    """Two hold one card at the same time."""
    found = verdict(history(hold(1.0, 2.0), second))
    assert found.measures["overlaps"] == 1
    assert "overlap" in found.problems[0]


def test_one_share_too_many_is_an_overlap():
    """Two may share a card by halves, three may not."""
    shares = [hold(begin, 5.0, who=f"w{begin}", places=2) for begin in (1.0, 2.0, 3.0)]
    assert soak.overlaps(history(*shares[:2])) == []
    assert len(soak.overlaps(history(*shares))) == 1


def test_a_long_hold_overlaps_also_behind_a_short_one():
    """Each hold is compared with all that still last."""
    holds = [hold(1.0, 9.0), hold(2.0, 3.0, who="w2"), hold(4.0, 5.0, who="w3")]
    assert len(soak.overlaps(history(*holds))) == 2


@pytest.mark.parametrize("token", [1000, 999])
def test_a_token_regression_is_found(token):
    """A later holder's token is not larger."""
    found = verdict(history(hold(1.0, 2.0, token=1000), hold(3.0, 4.0, token=token)))
    assert found.measures["token_regressions"] == 1
    assert "token regression" in found.problems[0]


def test_tokens_are_compared_for_each_card():
    """Another card's tokens say nothing; those of two sharers may be noted in either order, not those of others."""
    assert soak.token_regressions(history(hold(1.0, 2.0, token=9), hold(3.0, 4.0, token=5, key="b"))) == []
    shares = [hold(1.0, 2.0, token=9, places=2), hold(1.1, 3.0, token=8, asked=0.5, places=2)]
    assert soak.token_regressions(history(*shares)) == []
    assert len(soak.token_regressions(history(*shares, hold(4.0, 5.0, token=9)))) == 1


def test_a_leak_is_found():
    """A card that nobody can claim when all are gone; a worker that ends with a lease it does not know of."""
    past = history(hold(1.0, 2.0), workers=[Worker("w1", 0.0, 3.0, got=1)])
    found = verdict(past, cards=("a", "b"))
    assert found.measures["leaks"] == 1
    assert "leak: b" in found.problems[0]
    kept = attrs.evolve(past, workers=[Worker("w1", 0.0, 3.0, got=1, left=1)])
    assert "leak: w1" in verdict(kept).problems[0]
    lock = attrs.evolve(past, workers=[Worker("w1", 0.0, 3.0, got=1, leaked=("gpu-a",))])
    assert "leak: w1 held nothing and had gpu-a open" in verdict(lock).problems[0]


def test_a_starved_worker_is_found():
    """Who lives for long and gets nothing; not who was stopped for most of it."""
    past = history(hold(1.0, 2.0), workers=[Worker("w1", 0.0, 30.0, got=1), Worker("w2", 0.0, 30.0)])
    found = verdict(past)
    assert found.measures["starved"] == 1
    assert "starved: w2" in found.problems[0]
    stopped = attrs.evolve(past, workers=[Worker("w2", 0.0, 30.0, stops=(Span(1.0, 29.0),))])
    assert soak.starved(stopped) == []
    assert soak.starved(attrs.evolve(past, outages=(Span(0.0, 20.0),))) == []


def test_a_wait_that_is_too_long_is_starvation():
    """Also of somebody who got something before."""
    past = history(
        hold(1.0, 2.0), asks=[Ask("w1", 3.0, 30.0, outcome="timeout")], workers=[Worker("w1", 0.0, 40.0, got=1)]
    )
    assert "w1 waited 27.0 s (timeout)" in verdict(past).problems[0]


def test_nobody_served_at_all_is_starvation():
    """An empty log is not a good one."""
    assert verdict(history()).problems == ("starved: nobody got anything",)


def test_an_order_inversion_is_found():
    """Somebody who asked much later was served first, and the other was awake all the time."""
    asks = [Ask("w1", 1.0, 8.0), Ask("w2", 4.0, 6.0)]
    past = history(hold(6.0, 7.0), asks=asks, workers=[Worker("w1", 0.0, 9.0, got=1), Worker("w2", 0.0, 9.0, got=1)])
    found = verdict(past)
    assert found.measures["inversions"] == 1
    assert "inversion: w2 asked 3.00 s after w1" in found.problems[0]


@pytest.mark.parametrize(
    "change",
    [
        {"asks": [Ask("w1", 1.0, 8.0), Ask("w2", 2.5, 6.0)]},
        {"asks": [Ask("w1", 1.0, 8.0, count=2), Ask("w2", 4.0, 6.0)]},
        {"asks": [Ask("w1", 1.0, 8.0), Ask("w2", 4.0, 6.0, outcome="gone")]},
        {"workers": [Worker("w1", 0.0, 9.0, stops=(Span(2.0, 2.5),), got=1)]},
        {"outages": [Span(2.0, 2.5)]},
    ],
    ids=["not much later", "several cards", "not served", "stopped", "outage"],
)
def test_what_the_design_allows_is_no_inversion(change):
    """A stopped waiter may be passed over, and those who come back to an arbiter come one by one."""
    past = history(
        hold(6.0, 7.0), asks=[Ask("w1", 1.0, 8.0), Ask("w2", 4.0, 6.0)], workers=[Worker("w1", 0.0, 9.0, got=1)]
    )
    assert verdict(attrs.evolve(past, **change)).problems == ()


def test_a_late_takeover_is_found():
    """A dead holder's card is free long before it is held again, and somebody waited for it."""
    past = history(
        hold(1.0, 2.0, killed=2.0), hold(5.0, 6.0, who="w2", asked=1.5), asks=[Ask("w2", 1.5, 5.0)], workers=[]
    )
    found = verdict(past)
    assert found.measures["takeover_p99_s"] == 3.0
    assert "late takeover: p99 3.00 s > 1.5 s" in found.problems[0]
    assert verdict(attrs.evolve(past, ttl=True)).problems == ()


def test_a_card_that_nobody_gets_any_more_is_a_late_takeover():
    """There is no next hold to measure; the wait for it is."""
    past = history(hold(1.0, 2.0, killed=2.0), asks=[Ask("w2", 1.5, 10.0, outcome="timeout")], end=10.0)
    assert any("was still not held 8.00 s later" in problem for problem in verdict(past).problems)


@pytest.mark.parametrize(
    ("change", "judged"),
    [
        ({"asks": []}, 0),
        ({"outages": [Span(2.5, 2.6)]}, 0),
        ({"workers": [Worker("w2", 0.0, 9.0, stops=(Span(1.6, 4.5),), got=1)]}, 1),
        ({"asks": [Ask("w2", 1.5, 5.0), Ask("w3", 1.5, 4.0, count=2)]}, 0),
    ],
    ids=["nobody waits", "outage", "stopped waiter", "kept for several"],
)
def test_takeovers_that_nobody_could_have_done_sooner(change, judged):
    """Only the time counts in which an awake client waited."""
    past = history(hold(1.0, 2.0, killed=2.0), hold(5.0, 6.0, who="w2", asked=1.5), asks=[Ask("w2", 1.5, 5.0)])
    found = verdict(attrs.evolve(past, **change))
    assert found.problems == ()
    assert found.measures["takeovers"] == judged


def test_a_lease_that_was_lost_for_nothing_is_found():
    """Its holder ran and the arbiter was there: renewals must survive cut connections."""
    past = history(hold(5.0, 8.0, lost=8.1), workers=[Worker("w1", 0.0, 99.0, got=1)], ttl=True)
    found = verdict(past)
    assert found.measures["lost_for_nothing"] == 1
    assert "lost for nothing" in found.problems[0]
    for excuse in (
        {"outages": [Span(3.0, 4.0)]},
        {"workers": [Worker("w1", 0.0, 99.0, stops=(Span(3.0, 4.0),), got=1)]},
    ):
        assert verdict(attrs.evolve(past, **excuse)).problems == ()


def test_an_error_that_nobody_should_see_is_found():
    """A wait that ends with one while the arbiter is there; not around its outages, and not a timeout."""
    past = history(hold(1.0, 2.0), asks=[Ask("w1", 3.0, 4.0, outcome="LeaseStoreError: it is gone")], workers=[])
    found = verdict(past)
    assert found.measures["wrong"] == 1
    assert "wrong: w1, which asked at 3.0: LeaseStoreError: it is gone" in found.problems[0]
    assert verdict(attrs.evolve(past, outages=[Span(2.0, 2.5)])).problems == ()
    for outcome in ("timeout", "interrupted", "gone"):
        assert verdict(attrs.evolve(past, asks=[Ask("w1", 3.0, 4.0, outcome=outcome)])).problems == ()


def test_what_the_workers_find_wrong_themselves_is_told():
    """Such as a forked child whose pool says that it holds something."""
    assert verdict(history(hold(1.0, 2.0), wrong=["w1.f1: it holds"])).problems == ("wrong: w1.f1: it holds",)


def test_forked_children_that_get_nothing_are_starved():
    """One may be unlucky; most of them are not."""
    asks = [Ask(f"w1.f{number}", 1.0, 6.0, outcome="timeout") for number in range(6)]
    workers = [Worker(f"w1.f{number}", 1.0, 6.0, child=True) for number in range(6)]
    past = history(hold(1.0, 2.0), asks=asks, workers=workers)
    assert verdict(past).problems == ("starved: 0 of 6 forked children got anything",)
    assert verdict(attrs.evolve(past, outages=[Span(2.0, 2.5)])).problems == ()
    assert verdict(attrs.evolve(past, asks=asks[:2])).problems == ()
    served = [attrs.evolve(ask, outcome="served") for ask in asks[:3]]
    assert verdict(attrs.evolve(past, asks=[*served, *asks[3:]])).problems == ()


# -- from the notes to the history -----------------------------------------------------------------------------


def notes_of(who, *notes):
    defaults = {
        "ask": {"count": 1, "places": 1},
        "begin": {"keys": ["a"], "token": 1},
        "end": {"lost": False},
    }
    return [{"note": what, "who": who, "at": at, **defaults.get(what, {}), **more} for what, at, more in notes]


BEGUN = notes_of("w1", ("ready", 0.5, {}), ("ask", 1.0, {}), ("begin", 2.0, {}))


def test_a_hold_lasts_as_long_as_it_was_known_to_be_good():
    """Not to its end: it may have been lost in between."""
    past = soak.understand([*BEGUN, *notes_of("w1", ("end", 9.0, {"good": 4.0}))], [], ttl=True, end=10.0)
    assert past.holds == [Hold("a", "w1", 1, 1.0, 2.0, 4.0)]
    assert past.asks == [Ask("w1", 1.0, 2.0)]
    assert past.workers == [Worker("w1", 0.5, 10.0, got=1)]


def test_a_killed_holder_holds_until_then():
    """There is nobody to note the end."""
    past = soak.understand(BEGUN, [{"event": "kill", "who": "w1", "at": 5.0}], ttl=False, end=10.0)
    assert past.holds == [Hold("a", "w1", 1, 1.0, 2.0, 5.0, killed=5.0)]


@pytest.mark.parametrize(("ttl", "end"), [(False, 9.0), (True, 3.0 + soak.GOOD_AFTER_STOP)])
def test_a_stopped_holder_keeps_a_local_card_and_loses_one_with_a_ttl(ttl, end):
    """Killed while it was stopped: nobody knows when it was good for the last time, but for how long at least."""
    events = [{"event": "stop", "who": "w1", "at": 3.0}, {"event": "kill", "who": "w1", "at": 9.0}]
    past = soak.understand(BEGUN, events, ttl=ttl, end=10.0)
    assert past.holds[0].end == pytest.approx(end)
    assert past.workers[0].stops == (Span(3.0, 9.0),)


def test_waits_that_end_without_a_card_and_outages():
    """Interrupted, gone with its process; an arbiter that is away, and one that does not come back."""
    notes = notes_of(
        "w1", ("ready", 0.5, {}), ("ask", 1.0, {}), ("fail", 2.0, {"why": "interrupted"}), ("ask", 3.0, {"count": 2})
    )
    events = [{"event": name, "at": at} for name, at in [("down", 1.0), ("up", 2.0), ("down", 6.0)]]
    past = soak.understand(notes, [*events, {"event": "kill", "who": "w1", "at": 7.0}], ttl=True, end=10.0)
    assert past.asks == [Ask("w1", 1.0, 2.0, outcome="interrupted"), Ask("w1", 3.0, 7.0, count=2, outcome="gone")]
    assert past.outages == [Span(1.0, 2.0), Span(6.0, 10.0)]


def test_a_stop_in_an_outage_leaves_nothing_certain():
    """The lease may not have been renewed for long before it."""
    events = [
        {"event": "down", "at": 2.5},
        {"event": "up", "at": 2.9},
        {"event": "stop", "who": "w1", "at": 3.0},
        {"event": "kill", "who": "w1", "at": 9.0},
    ]
    assert soak.understand(BEGUN, events, ttl=True, end=10.0).holds[0].end == 3.0


def test_cut_connections_are_no_outage():
    """Clients must get over them by themselves."""
    events = [{"event": "cut", "kind": "cut connections", "at": 2.0}]
    assert soak.understand(BEGUN, events, ttl=True, end=10.0).outages == []


def test_a_hold_that_was_lost():
    """When its holder saw it, for the judge to ask why."""
    past = soak.understand([*BEGUN, *notes_of("w1", ("end", 9.0, {"good": 4.0, "lost": True}))], [], ttl=True, end=10.0)
    assert past.holds == [Hold("a", "w1", 1, 1.0, 2.0, 4.0, lost=9.0)]


def test_an_unexpected_error_is_kept_with_its_words():
    """Also one at a release, which is not the end of a wait."""
    failed = {"why": "BadAnswer", "text": "no GPU"}
    past = soak.understand(
        [
            *notes_of("w1", ("ready", 0.5, {}), ("ask", 1.0, {}), ("fail", 2.0, failed)),
            *notes_of("w1", ("error", 3.0, {"why": "LeaseStoreError at release", "text": "gone"})),
        ],
        [],
        ttl=True,
        end=10.0,
    )
    assert past.asks == [Ask("w1", 1.0, 2.0, outcome="BadAnswer: no GPU")]
    assert past.wrong == ("w1: LeaseStoreError at release: gone",)


def test_the_threads_of_a_process_die_together():
    """A second thread notes under its own name, and is killed and stopped with the first."""
    notes = [*BEGUN, *notes_of("w1.b", ("ready", 1.0, {"of": "w1"}), ("ask", 1.5, {}), ("begin", 2.5, {"keys": ["b"]}))]
    events = [{"event": name, "who": "w1", "at": at} for name, at in [("stop", 3.0), ("continue", 4.0), ("kill", 5.0)]]
    past = soak.understand(notes, events, ttl=False, end=10.0)
    assert [(each.who, each.end, each.killed) for each in past.holds] == [("w1", 5.0, 5.0), ("w1.b", 5.0, 5.0)]
    assert [(each.who, each.gone, each.stops) for each in past.workers] == [
        ("w1", 5.0, (Span(3.0, 4.0),)),
        ("w1.b", 5.0, (Span(3.0, 4.0),)),
    ]


FORK = notes_of("w1", ("fork", 3.0, {"child": "w1.f1"}))
CHILD = notes_of("w1.f1", ("ready", 3.1, {"parent": "w1", "forked": 3.0}))
LEFT = notes_of("w1.f1", ("left", 7.0, {"held": 0}))
KILL = [{"event": "kill", "who": "w1", "at": 5.0}]


def test_a_forked_child_keeps_the_card_of_its_dead_parent():
    """Where there is no ttl: until it ends nobody may hold the card, and only then is it late."""
    past = soak.understand([*BEGUN, *FORK, *CHILD, *LEFT], KILL, ttl=False, end=10.0)
    assert past.holds == [Hold("a", "w1", 1, 1.0, 2.0, 7.0, killed=7.0)]
    assert past.wrong == ()
    assert [(each.who, each.gone, each.child) for each in past.workers] == [("w1", 5.0, False), ("w1.f1", 7.0, True)]
    waiting = [Ask("w2", 4.0, 7.2)]
    good = attrs.evolve(past, holds=[*past.holds, hold(7.2, 8.0, who="w2", asked=4.0)], asks=waiting)
    assert verdict(good).problems == ()
    assert verdict(good).measures["takeover_p99_s"] == pytest.approx(0.2)
    bad = attrs.evolve(past, holds=[*past.holds, hold(6.0, 8.0, who="w2", asked=4.0)], asks=waiting)
    assert verdict(bad).measures["overlaps"] == 1


def test_a_forked_child_keeps_nothing_else():
    """Not with a ttl, not what was granted after the fork, not what the parent has given back."""
    past = soak.understand([*BEGUN, *FORK, *CHILD, *LEFT], KILL, ttl=True, end=10.0)
    assert (past.holds[0].end, past.holds[0].killed) == (5.0, 5.0)
    later = notes_of("w1", ("ready", 0.5, {}), ("fork", 0.6, {"child": "w1.f1"}), ("ask", 3.5, {}), ("begin", 4.0, {}))
    born = notes_of("w1.f1", ("ready", 0.7, {"parent": "w1", "forked": 0.6}))
    past = soak.understand([*later, *born, *LEFT], KILL, ttl=False, end=10.0)
    assert (past.holds[0].end, past.holds[0].killed) == (5.0, 5.0)
    ended = notes_of("w1", ("end", 4.0, {"good": 4.0}))
    past = soak.understand([*BEGUN, *FORK, *CHILD, *ended, *LEFT], KILL, ttl=False, end=10.0)
    assert (past.holds[0].end, past.holds[0].killed) == (4.0, None)


def test_what_is_granted_during_a_fork_may_be_kept_or_not():
    """Nobody is called late before the child ends, and nobody's hold an overlap."""
    notes = notes_of("w1", ("ready", 0.5, {}), ("ask", 2.0, {}), ("fork", 3.0, {"child": "w1.f1"}), ("begin", 3.2, {}))
    past = soak.understand([*notes, *CHILD, *LEFT], KILL, ttl=False, end=10.0)
    assert (past.holds[0].end, past.holds[0].killed) == (5.0, 7.0)


@pytest.mark.parametrize("notes", [FORK, [*FORK, *CHILD]], ids=["in its birth", "later"])
def test_a_forked_child_that_hangs_is_found(notes):
    """It never says that it ends."""
    past = soak.understand([*BEGUN, *notes], [], ttl=True, end=40.0)
    assert past.wrong == ("w1.f1, forked at 3.0, did not end by itself",)


def test_a_fork_that_never_was_is_no_child_that_hangs():
    """Its parent was killed between the note and the deed."""
    past = soak.understand([*BEGUN, *FORK], [{"event": "kill", "who": "w1", "at": 3.1}], ttl=True, end=40.0)
    assert past.wrong == ()


# -- the whole -------------------------------------------------------------------------------------------------


#: How soon a dead holder's GPU is held again says how busy the machine is: here only a few seconds beside other tests
#: are looked at.
OF_SPEED = "late takeover: "


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="kernel locks of Linux")
@pytest.mark.parametrize(
    "store",
    [
        "host",
        "server",
        pytest.param(
            "redis",
            marks=[
                pytest.mark.external_service,
                pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
            ],
        ),
    ],
)
def test_a_short_soak_is_well(store, capsys):
    """Four seconds of chaos over each store: no double hold, no leak, in order, no error that nobody should see."""
    arguments = ["--store", store, "--seconds", "4", "--workers", "5", "--cards", "2", "--seed", "3", "--json"]
    status = soak.main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert [each for each in found["problems"] if not each.startswith(OF_SPEED)] == []
    assert status == (1 if found["problems"] else 0)
    assert found["acquisitions"] > 0
    assert sum(found["faults"].values()) > 0


@pytest.mark.parametrize("as_json", [True, False])
def test_all_stores_one_after_another(as_json, capsys, monkeypatch, tmp_path):
    """One list, one folder of logs each; one that is not well is enough for the exit status."""
    asked = []

    def run(options):
        asked.append((options.store, options.keep))
        well = options.store != "server"
        return {"store": options.store, "seed": 1, "problems": [] if well else ["it broke"], "well": well}

    monkeypatch.setattr(soak, "_soak", run)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    arguments = ["--store", "all", "--keep", str(tmp_path), *(["--json"] if as_json else [])]
    assert soak.main(arguments) == 1
    assert asked == [(store, tmp_path / store) for store in soak.STORES]
    out = capsys.readouterr().out
    if as_json:
        assert [found["store"] for found in json.loads(out)] == list(soak.STORES)
    else:
        assert "✗ it broke" in out
        assert "Soak of the redis" in out


@pytest.mark.real
@pytest.mark.external_service
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting a file system needs root")
@pytest.mark.timeout(240)
def test_everything_at_once(capfd):
    """All stores at the same time, each with a disk that is full now and then; no mount of it is left."""
    arguments = ["--store", "all", "--at-once", "--full-disk", "--seconds", "8", "--workers", "3", "--cards", "2"]
    before = Path("/proc/self/mountinfo").read_text()
    status = soak.main([*arguments, "--seed", "1", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert [each["store"] for each in found] == list(soak.STORES)
    # Order and latency are for a machine that has nothing else to do; safety is not.
    for unsafe in ("overlaps", "token_regressions", "leaks", "lost_for_nothing", "wrong"):
        assert [each[unsafe] for each in found] == [0, 0, 0], found
    assert status == any(each["problems"] for each in found)
    assert found[0]["faults"][soak.DISK_FULL] > 0
    assert min(each["acquisitions"] for each in found) > 10
    assert Path("/proc/self/mountinfo").read_text() == before


def test_at_once_is_for_all_stores(capsys):
    """Asked for with one store it is a mistake, and nothing is started."""
    with pytest.raises(SystemExit):
        soak.main(["--at-once", "--store", "host"])
    assert "--at-once needs --store all" in capsys.readouterr().err


def test_a_run_that_ends_without_a_result_is_not_well(monkeypatch):
    """It counts as a problem of that store; the others are still waited for and told."""
    runs = [soak.argparse.Namespace(store=store, seed=1) for store in ("host", "server")]
    for run in runs:
        vars(run).update(seconds=0.0, workers=1, cards=1, keep=None, full_disk=False)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    found = soak._at_once(runs)
    assert [(each["store"], each["well"]) for each in found] == [("host", False), ("server", False)]
    assert "ended with 1 and no result" in found[0]["problems"][0]
