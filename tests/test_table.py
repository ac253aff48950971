"""The global GPU table."""

from __future__ import annotations

import inspect
import itertools
import sys

from cards import reading
from gpupool_sync import table as table_module
from gpupool_sync.models import Card, Sample, Snapshot
from gpupool_sync.table import Table
from helpers import run_threads


def snapshot(endpoint_id, *indices, at=1.0):
    readings = tuple(reading(index) for index in indices)
    cards = tuple(Card(r.uuid, endpoint_id, r) for r in readings)
    return Snapshot(endpoint_id, f"http://{endpoint_id}", Sample(readings, at), cards, at)


def test_a_card_that_is_not_listed_any_more_is_gone():
    """A snapshot replaces all that its endpoint said before, and nothing of the others."""
    table = Table()
    assert table.update(snapshot("a", 0, 1)) is None
    table.update(snapshot("b", 2))
    before = table.update(snapshot("a", 1))
    snapshots, _ = table.view()

    assert len(before.cards) == 2
    assert [card.key for card in snapshots["a"].cards] == ["GPU-00000001"]
    assert len(snapshots["b"].cards) == 1


def test_a_view_does_not_change_under_its_reader():
    """Whoever looks at a view sees one state, however long it looks."""
    table = Table()
    table.update(snapshot("a", 0))
    view, _ = table.view()
    table.update(snapshot("b", 1))
    table.forget("a")

    assert list(view) == ["a"]
    assert list(table.view()[0]) == ["b"]


def test_cards_that_several_endpoints_list_are_known():
    """Several URLs of one host are noticed by their cards, and forgotten again."""
    table = Table()
    table.update(snapshot("a", 0, 1))
    table.update(snapshot("b", 1, 2))
    assert table.view()[1] == {"GPU-00000001"}
    table.update(snapshot("b", 0, 1, 2))
    assert table.view()[1] == {"GPU-00000000", "GPU-00000001"}
    table.update(snapshot("b", 2))
    assert table.view()[1] == frozenset()
    table.update(snapshot("b", 0))
    table.forget("a")
    assert table.view()[1] == frozenset()


def test_updates_from_many_threads_are_all_there():
    """No answer gets lost when many arrive at once."""
    table = Table()
    run_threads(8, lambda n: [table.update(snapshot(f"{n}-{i}", n)) for i in range(50)])

    snapshots, duplicates = table.view()
    assert len(snapshots) == 400
    assert len(duplicates) == 8


def test_an_interrupt_leaves_counts_and_snapshots_of_one_state():
    """Ctrl-C while an endpoint is removed: whatever is said of it afterwards is taken in."""
    source = inspect.getsource(table_module).splitlines()

    def interrupt_after(lines):
        def trace(frame, event, _):
            if frame.f_code.co_filename != table_module.__file__:
                return None
            # Not where the lock is taken, which Python does in more than one step.
            if (
                event == "line"
                and not source[frame.f_lineno - 1].lstrip().startswith("with")
                and next(counted) == lines
            ):
                raise KeyboardInterrupt
            return trace

        counted = itertools.count()
        return trace

    interrupted = 0
    for step in range(100):
        table = Table()
        table.update(snapshot("a", 0, 1))
        table.update(snapshot("b", 1))
        sys.settrace(interrupt_after(step))
        try:
            table.forget("a")
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            sys.settrace(None)
        table.update(snapshot("a", 2))
        table.update(snapshot("b", 2))
        assert table.view()[1] == {"GPU-00000002"}
    assert interrupted >= 10
