"""The global GPU table: the last snapshot of every endpoint, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from gpupool_sync.models import Snapshot


class Table:
    """
    What every endpoint last said.

    Writers replace the mapping, they never change it; so a reader takes one reference under the lock and looks at
    it as long as it likes.
    """

    def __init__(self) -> None:
        # Guards everything below. Innermost lock: held for dictionary work only, never while polling, choosing,
        # leasing, or calling what the user gave us.
        self._lock = threading.Lock()
        self._snapshots: Mapping[str, Snapshot] = {}
        self._listed: dict[str, int] = {}  # how many endpoints list the card
        self._duplicates: frozenset[str] = frozenset()

    def view(self) -> tuple[Mapping[str, Snapshot], frozenset[str]]:
        """The snapshots by endpoint id, and the keys of the cards that more than one endpoint lists."""
        with self._lock:
            return self._snapshots, self._duplicates

    def update(self, snapshot: Snapshot) -> Snapshot | None:
        """Replace all that the endpoint said before (returned): a card it no longer lists is gone."""
        with self._lock:
            before = self._snapshots.get(snapshot.endpoint_id)
            self._snapshots = {**self._snapshots, snapshot.endpoint_id: snapshot}
            self._recount_locked(before, snapshot)
        return before

    def forget(self, endpoint_id: str) -> None:
        """Drop everything that the endpoint said."""
        with self._lock:
            before = self._snapshots.get(endpoint_id)
            self._snapshots = {key: value for key, value in self._snapshots.items() if key != endpoint_id}
            self._recount_locked(before, None)

    def _recount_locked(self, before: Snapshot | None, after: Snapshot | None) -> None:
        # Which cards an endpoint lists changes rarely, while this runs at every poll.
        gone, come = _keys(before), _keys(after)
        if gone == come:
            return
        for key in gone:
            self._listed[key] -= 1
            if not self._listed[key]:
                del self._listed[key]
        for key in come:
            self._listed[key] = self._listed.get(key, 0) + 1
        changed = {*gone, *come}
        twice = {key for key in changed if self._listed.get(key, 0) > 1}
        if twice or not self._duplicates.isdisjoint(changed):
            self._duplicates = (self._duplicates - changed) | twice


def _keys(snapshot: Snapshot | None) -> list[str]:
    return [] if snapshot is None else [card.key for card in snapshot.cards]
