"""The simulation of many servers still runs, repeats itself, and loses neither a GPU nor a client."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # pytest itself only finds what lies in tests/

from benchmarks import simulate as module  # noqa: E402
from benchmarks.simulate import Scenario, World, report, simulate  # noqa: E402

pytestmark = pytest.mark.checkout

SMALL = Scenario(endpoints=8, duration=10.0, jobs=400, load=1.0)


def run(scenario):
    world = World(scenario)
    world.run()
    return world


def test_the_same_seed_gives_the_same_run():
    """To the last claim; another seed gives another one."""
    first = simulate(SMALL)

    assert simulate(SMALL) == first
    assert simulate(attrs.evolve(SMALL, seed=2)) != {**first, "seed": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "strict", "spread_polls": False},
        {"load": 1.1, "tickets": "everywhere"},
        {"mixed": True},
        {"failing": 0.3, "outage": 3.0},
        {"watch": 2, "load": 0.9},
        {"visible_after": 3.0},
        {"backlog": 50},
    ],
)
def test_no_gpu_is_held_twice_and_nobody_is_lost(changes):
    """Every GPU has one holder at a time, and every client that came was served or still waits."""
    world = run(attrs.evolve(SMALL, **changes))
    came = [job for job in world.jobs if job.number >= 0]
    served = [job for job in came if job.granted_at is not None]

    holds = {}
    for job in served:
        began, ended = job.held
        holds.setdefault(job.key, []).append((began, ended))
    for intervals in holds.values():
        intervals.sort()
        assert all(ended <= begins for (_, ended), (begins, _) in itertools.pairwise(intervals))
    assert len(served) > 150
    assert len(came) + world.turned_away == len(world.jobs)
    assert sorted(job.number for job in came if job.granted_at is None) == world.unserved
    for job in served:
        assert job.granted_at >= job.arrival
        assert job.claims + job.tickets >= 1
        if job.request.model is not None:
            assert any(card.key == job.key and "H100" in card.reading.name for card in job.server.cards)


def test_the_yardstick_is_a_queue_without_gaps():
    """With one server the pool's waits are those of the central queue, but for the network."""
    world = run(Scenario(endpoints=1, duration=100.0, jobs=300, load=0.95, latency=0.0001, clients=200))
    ideal = module.central_queue(world)

    pairs = [
        (job.granted_at - job.arrival, wait)
        for job, wait in zip(world.jobs, ideal, strict=True)
        if job.granted_at is not None
    ]
    assert max(ideal) > 10.0
    assert world.turned_away == 0
    assert len(pairs) > 250
    assert sum(ours for ours, _ in pairs) == pytest.approx(sum(theirs for _, theirs in pairs), rel=0.05)


def test_a_lone_client_always_gets_the_most_available_endpoint():
    """Jobs that come one after the other, on a fleet that is otherwise in use and does not change."""
    world = World(Scenario(endpoints=6, load=0.5, duration=1e6, jobs=20, clients=1))
    for job in world.jobs:
        job.arrival, job.duration = 100.0 + 50.0 * job.number, 1.0
    world.end = 100.0 + 50.0 * len(world.jobs)
    most = {server.id: len(server.cards) - bin(server.held).count("1") for server in world.servers}
    world.run()

    assert [job.granted_at is not None for job in world.jobs] == [True] * 20
    assert {most[job.server.id] for job in world.jobs} == {max(most.values())}
    assert all(job.claims == 1 for job in world.jobs)


def test_what_is_reported_adds_up():
    """Load, grants and claims are those of the run; every scenario of a mode makes a row."""
    world = run(attrs.evolve(SMALL, load=0.8, jobs=1500))
    result = report(world)

    used = sum(server.used for server in world.servers) / world.now / world.gpus
    assert 0.6 < used < 1.0
    assert result["granted"] + result["unserved"] == result["arrived"]
    assert result["claims_per_grant"] >= 0.9
    text = module.table([result, {**result, "seed": 2, "wait_p99": 2 * result["wait_p99"]}])
    assert len(text.splitlines()) == 3
    assert "–" in text


def test_the_smallest_mode_runs_and_can_be_drawn(tmp_path, capsys):
    """`--smoke` goes through every section; the plots need matplotlib."""
    results = tmp_path / "results.json"
    assert module.main(["--smoke", "--json", str(results)]) == 0
    assert "## largest (seeds 1)" in capsys.readouterr().out

    pytest.importorskip("matplotlib")
    from benchmarks import _plots

    made = _plots.draw(json.loads(results.read_text()), tmp_path)
    assert [path.read_bytes()[:4] for path in made] == [b"\x89PNG"] * 3
    assert max(path.stat().st_size for path in made) < 60_000
