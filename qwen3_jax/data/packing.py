"""Packing: documents into rows, by their lengths alone. What is read, and when, does not matter here.

A document of n tokens has n - 1 slots: each token but the last is read, each but the first predicted. A row begins with the
document that has waited longest; then, as long as there is space, comes the longest waiting one that fits, or else the next of
the stream. A document that does not fit waits; a row is full when it has no space, or when `waiting` documents wait and none of
them fits. A document longer than a row fills one, and what is left of it waits again, behind the others. So whatever waits
moves up by one place a row, and what is held is four numbers for each.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple


class Piece(NamedTuple):
    """Some slots of a document.

    Attributes:
        source: which source's.
        document: its number there.
        start: first slot.
        slots: how many.
    """

    source: int
    document: int
    start: int
    slots: int


class Packer:
    """Fills rows from a stream of pieces.

    `draw` gives the next document, of any length. `held` are those that wait, the oldest first: all of the state beside the
    stream's own.
    """

    def __init__(self, slots: int, waiting: int, draw: Callable[[], Piece], held: list[Piece] | None = None):
        self._slots = slots
        self._waiting = waiting
        self._draw = draw
        self.held: list[Piece] = list(held or [])

    def row(self) -> list[Piece]:
        """The next row: pieces in order, at least one, of at most `slots` in all."""
        held = self.held
        if not held:
            held.append(self._draw())
        first = held.pop(0)
        if first.slots > self._slots:
            rest = first._replace(start=first.start + self._slots, slots=first.slots - self._slots)
            self.held = [*held, rest]
            return [first._replace(slots=self._slots)]
        row = [first]
        space = self._slots - first.slots
        # The waiting ones by length, and the older first of two alike.
        by_length = sorted((piece.slots, -at) for at, piece in enumerate(held))
        taken: set[int] = set()
        while space:
            found = bisect.bisect_right(by_length, (space, 1)) - 1
            if found >= 0:
                length, at = by_length.pop(found)
                taken.add(-at)
                row.append(held[-at])
                space -= length
            elif len(held) - len(taken) >= self._waiting:
                break
            else:
                piece = self._draw()
                bisect.insort(by_length, (piece.slots, -len(held)))
                held.append(piece)
        self.held = [piece for at, piece in enumerate(held) if at not in taken]
        return row
