"""The global GPU table: the last snapshot of every endpoint, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from gpupool_sync.models import Snapshot

_View = tuple[Mapping[str, Snapshot], frozenset[str]]


class Table:
    """
    What every endpoint last said.

    Writers replace what `view` returns under the lock, and never change it; so a reader takes one reference, which is
    atomic, and looks at it as long as it likes.
    """

    def __init__(self) -> None:
        # Guards changes of what is below. Innermost lock: held for dictionary work only, never while polling, choosing,
        # leasing, or calling what the user gave us.
        self._lock = threading.Lock()
        #: What `view` returns, and how many endpoints list each card. Replaced in one step: Ctrl-C in a thread of the
        #: user's, which removes an endpoint, must not leave counts of other snapshots than these.
        self._state: tuple[_View, Mapping[str, int]] = ({}, frozenset()), {}

    def view(self) -> _View:
        """The snapshots by endpoint id, and the keys of the cards that more than one endpoint lists."""
        return self._state[0]

    def update(self, snapshot: Snapshot) -> Snapshot | None:
        """Replace all that the endpoint said before (returned): a card it no longer lists is gone."""
        with self._lock:
            (snapshots, duplicates), listed = self._state
            before = snapshots.get(snapshot.endpoint_id)
            listed, duplicates = _recounted(listed, duplicates, before, snapshot)
            self._state = ({**snapshots, snapshot.endpoint_id: snapshot}, duplicates), listed
        return before

    def forget(self, endpoint_id: str) -> None:
        """Drop everything that the endpoint said."""
        with self._lock:
            (snapshots, duplicates), listed = self._state
            listed, duplicates = _recounted(listed, duplicates, snapshots.get(endpoint_id), None)
            left = {key: value for key, value in snapshots.items() if key != endpoint_id}
            self._state = (left, duplicates), listed


def _recounted(
    listed: Mapping[str, int], duplicates: frozenset[str], before: Snapshot | None, after: Snapshot | None
) -> tuple[Mapping[str, int], frozenset[str]]:
    """How many endpoints list each card, and which cards more than one, after one has said something else."""
    # Which cards an endpoint lists changes rarely, while this runs at every poll.
    gone, come = _keys(before), _keys(after)
    if gone == come:
        return listed, duplicates
    counts = dict(listed)
    for key in gone:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]
    for key in come:
        counts[key] = counts.get(key, 0) + 1
    changed = {*gone, *come}
    twice = {key for key in changed if counts.get(key, 0) > 1}
    return counts, duplicates if not twice and duplicates.isdisjoint(changed) else (duplicates - changed) | twice


def _keys(snapshot: Snapshot | None) -> list[str]:
    return [] if snapshot is None else [card.key for card in snapshot.cards]
