"""The global GPU table: the last snapshot of every endpoint, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from gpupool_sync.models import Snapshot


class Table:
    """
    What every endpoint last said.

    Writers replace what `view` returns under the lock, and never change it; so a reader takes one reference, which is
    atomic, and looks at it as long as it likes.
    """

    def __init__(self) -> None:
        # Guards changes of everything below. Innermost lock: held for dictionary work only, never while polling,
        # choosing, leasing, or calling what the user gave us.
        self._lock = threading.Lock()
        self._view: tuple[Mapping[str, Snapshot], frozenset[str]] = ({}, frozenset())
        self._listed: dict[str, int] = {}  # how many endpoints list the card

    def view(self) -> tuple[Mapping[str, Snapshot], frozenset[str]]:
        """The snapshots by endpoint id, and the keys of the cards that more than one endpoint lists."""
        return self._view

    def update(self, snapshot: Snapshot) -> Snapshot | None:
        """Replace all that the endpoint said before (returned): a card it no longer lists is gone."""
        with self._lock:
            snapshots, duplicates = self._view
            before = snapshots.get(snapshot.endpoint_id)
            duplicates = self._recount_locked(before, snapshot, duplicates)
            self._view = {**snapshots, snapshot.endpoint_id: snapshot}, duplicates
        return before

    def forget(self, endpoint_id: str) -> None:
        """Drop everything that the endpoint said."""
        with self._lock:
            snapshots, duplicates = self._view
            duplicates = self._recount_locked(snapshots.get(endpoint_id), None, duplicates)
            self._view = {key: value for key, value in snapshots.items() if key != endpoint_id}, duplicates

    def _recount_locked(
        self, before: Snapshot | None, after: Snapshot | None, duplicates: frozenset[str]
    ) -> frozenset[str]:
        """Which cards are listed more than once, after *duplicates*."""
        # Which cards an endpoint lists changes rarely, while this runs at every poll.
        gone, come = _keys(before), _keys(after)
        if gone == come:
            return duplicates
        for key in gone:
            self._listed[key] -= 1
            if not self._listed[key]:
                del self._listed[key]
        for key in come:
            self._listed[key] = self._listed.get(key, 0) + 1
        changed = {*gone, *come}
        twice = {key for key in changed if self._listed.get(key, 0) > 1}
        return duplicates if not twice and duplicates.isdisjoint(changed) else (duplicates - changed) | twice


def _keys(snapshot: Snapshot | None) -> list[str]:
    return [] if snapshot is None else [card.key for card in snapshot.cards]
