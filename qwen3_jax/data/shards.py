"""Logical shards: the parts of a run's data that are dealt to rows of the batch, whatever processes there are.

A shard has draws and a packer of its own, and knows nothing of the others. Row r of every batch comes from shard r // (rows //
shards). So a batch depends on seed and step alone, and whoever holds a shard's state, a few hundred bytes, can go on with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_jax.data.files import DataError
from qwen3_jax.data.mixture import Draws, View
from qwen3_jax.data.packing import Packer, Piece

MOST_SHARDS = 256


def shards_for(batch: int, wanted: int | None) -> int:
    """How many logical shards a batch has.

    Args:
        batch: rows of the whole batch.
        wanted: how many; None: the largest divisor of the batch that is at most MOST_SHARDS.

    Returns:
        A divisor of the batch.

    Raises:
        DataError: one that is none.
    """
    if batch < 1:
        raise DataError(f"batch is {batch}: accepted is at least 1")
    if wanted is None:
        return next(count for count in range(min(batch, MOST_SHARDS), 0, -1) if batch % count == 0)
    if wanted < 1 or batch % wanted:
        raise DataError(
            f"shards is {wanted}: accepted is a divisor of the batch, {batch}, for a row is always of the same shard"
        )
    return wanted


class Shard:
    """A logical shard.

    Attributes:
        rows: how many it has given.
        used: slots of them that hold a document.
    """

    def __init__(self, views: Sequence[View], *, seed: int, number: int, shards: int, slots: int, waiting: int):
        self._draws = Draws(views, seed, number, shards)
        self._packer = Packer(slots, waiting, self._draws)
        self.rows = 0
        self.used = 0

    def row(self) -> list[Piece]:
        """The next row."""
        row = self._packer.row()
        self.rows += 1
        self.used += sum(piece.slots for piece in row)
        return row

    def state(self) -> dict[str, Any]:
        """All that the next rows depend on, as JSON has it; later rows leave it as it is."""
        return {
            "rows": self.rows,
            "used": self.used,
            "drawn": list(self._draws.drawn),
            "slots": list(self._draws.slots),
            "held": list(self._packer.held),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: of this shard, of the same mixture.
        """
        self.rows, self.used = state["rows"], state["used"]
        self._draws.drawn, self._draws.slots = list(state["drawn"]), list(state["slots"])
        self._packer.held = [Piece(*piece) for piece in state["held"]]
