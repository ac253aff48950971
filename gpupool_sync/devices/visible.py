"""``CUDA_VISIBLE_DEVICES``: which cards this process may see, by CUDA's own rules.

Indices are taken in PCI bus order, as nvidia-smi counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

VARIABLE = "CUDA_VISIBLE_DEVICES"

_NUMBER = re.compile(r"[+-]?[0-9]+")


class Mask:
    """
    The parsed variable; unset means that every card is visible.

    As in CUDA: the kind of the first item (number, ``GPU-…``, ``MIG-…``) is the kind of the list; a negative, unknown
    or ambiguous item ends it, what stood before still counts; a card named twice empties it; the empty text hides
    all.  UUIDs may be shortened to any unambiguous beginning.
    """

    def __init__(self, text: str | None) -> None:
        self.text = text
        self._prefix = ""
        self._items: list[str] = []
        if text is None:
            return
        self._items = [item.strip() for item in text.split(",")]
        self._prefix = next((kind for kind in ("GPU-", "MIG-") if self._items[0].startswith(kind)), "")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Mask:
        return cls((os.environ if environ is None else environ).get(VARIABLE))

    def __repr__(self) -> str:
        return f"Mask({self.text!r})"

    @property
    def hides_all(self) -> bool:
        """Whether no card can be visible, whatever there is: the driver need not be asked."""
        if self.text is None or self._prefix:
            return False
        number = _NUMBER.match(self._items[0])
        return number is None or int(number[0]) < 0

    @property
    def by_instance(self) -> bool:
        """Whether the items name MIG instances, not cards."""
        return self._prefix == "MIG-"

    def choose(self, known: Iterable[tuple[int, str | None]], *, complete: bool = True) -> set[int]:
        """
        Of (number, UUID) pairs, the numbers that are visible.

        Not *complete*: the UUID of some card is not known, since it does not answer. An unknown UUID may be its, so
        it does not hide the cards that the list names after it.
        """
        cards = list(known)
        if self.text is None:
            return {number for number, _ in cards}
        chosen: list[int] = []
        for item in self._items:
            found = self._find(item, cards)
            if found is None:
                if self._prefix and not complete:
                    continue
                break
            if found in chosen:
                return set()
            chosen.append(found)
        return set(chosen)

    def _find(self, item: str, cards: list[tuple[int, str | None]]) -> int | None:
        if self._prefix:
            if not item.startswith(self._prefix):
                return None
            matches = [number for number, uuid in cards if uuid is not None and uuid.startswith(item)]
            return matches[0] if len(matches) == 1 else None
        number = _NUMBER.match(item)
        wanted = int(number[0]) if number else -1
        return wanted if any(wanted == index for index, _ in cards) else None
