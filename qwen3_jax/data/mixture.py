"""Mixtures: which document of which source comes next, for every logical shard on its own.

Documents of a source stand in one endless sequence: epoch after epoch, each in an order of its own (grain's shuffle: a
permutation computed index by index, so no order is ever stored). Shard s of S takes numbers s, s + S, s + 2S, ... of it. So
every document comes once an epoch, whatever S is, and where a shard stands is one number a source.

Among sources a shard takes the one that is furthest behind its share of tokens. Shares are thus kept to within a document, and
nothing is drawn by lot but where each shard begins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen3_jax.checks import check_fields
from qwen3_jax.data.files import DataError, check_choice
from qwen3_jax.data.packing import Piece
from qwen3_jax.data.prepared import Prepared

OverLong = Literal["split", "cut", "drop"]
LONG, MIDDLE = (16_384, 32_768), (4_096, 16_383)  # tokens of documents in the long-context stage (Qwen3 report, section 3.2)


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a mixture.

    Attributes:
        name: what reports and states call it; each one's own.
        folder: that `prepare` has written; one of a store (gs://...) is copied to a disk.
        weight: share of the mixture's tokens, relative to the others'.
        min_tokens: of the documents that are taken.
        max_tokens: likewise; None: any.
        over_long: a document longer than a row is split over rows, cut at the row's end, or dropped. None: split, but cut where
            the folder has conversations, for an answer without its question teaches something else.
    """

    name: str
    folder: str | Path
    weight: float = 1.0
    min_tokens: int = 2
    max_tokens: int | None = None
    over_long: OverLong | None = None

    def __post_init__(self):
        check_fields(self)
        check_choice(f"source {self.name}: over_long", self.over_long, OverLong)
        if not self.weight > 0:
            raise DataError(f"source {self.name}: weight is {self.weight}: accepted is a number above 0")
        if self.min_tokens < 2:
            raise DataError(
                f"source {self.name}: min_tokens is {self.min_tokens}: accepted is at least 2, for one predicts nothing"
            )
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise DataError(
                f"source {self.name}: max_tokens is {self.max_tokens}: accepted is at least min_tokens, {self.min_tokens}"
            )


def long_context(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The mixture of the long-context stage: 75 % of tokens from documents of 16,384 to 32,768, 25 % from 4,096 to 16,384.

    Args:
        sources: whose documents are used, each with its weight within both parts.

    Returns:
        Two sources for each: `NAME.long` and `NAME.middle`, whose weights add up to 1 in all.
    """
    whole = sum(source.weight for source in sources)
    found = []
    for share, label, (least, most) in ((0.75, "long", LONG), (0.25, "middle", MIDDLE)):
        for source in sources:
            weight = share * source.weight / whole
            name = f"{source.name}.{label}"
            found.append(dataclasses.replace(source, name=name, weight=weight, min_tokens=least, max_tokens=most))
    return tuple(found)


class View:
    """A source as it is drawn from: the documents that are taken, in their endless sequence.

    Attributes:
        source: what it was made of.
        prepared: its folder.
        over_long: what becomes of documents longer than a row.
        cut: how many documents are cut at a row's end.
        dropped: how many are too long for a row, and not taken.
    """

    def __init__(self, source: Source, slots: int, seed: int, cache: str | Path | None = None):
        """Open a source.

        Args:
            source: which.
            slots: of a row.
            seed: of the mixture.
            cache: where folders of a store are copied to; None: fetch.CACHE.

        Raises:
            DataError: a folder that is refused, or none of whose documents is taken.
        """
        import grain

        self.source = source
        self.prepared = Prepared(source.folder, cache)
        self.over_long = source.over_long or ("cut" if self.prepared.index["conversations"] else "split")
        lengths = self.prepared.lengths
        most = np.iinfo(np.int64).max if source.max_tokens is None else source.max_tokens
        chosen = (lengths >= source.min_tokens) & (lengths <= most)
        too_long = chosen & (lengths > slots + 1)
        self.cut = int(too_long.sum()) if self.over_long == "cut" else 0
        self.dropped = int(too_long.sum()) if self.over_long == "drop" else 0
        if self.dropped:
            chosen &= ~too_long
        # Where all are taken no list of them is kept.
        self._numbers = None if chosen.all() else np.flatnonzero(chosen)
        self._count = int(chosen.sum())
        if not self._count:
            raise DataError(
                f"source {source.name}: of {len(lengths)} documents in {source.folder} none has {source.min_tokens} to "
                f"{source.max_tokens or 'any number of'} tokens{' and fits a row' if self.dropped else ''}: accepted is one "
                "or more"
            )
        self._slots = slots if self.over_long == "cut" else int(most)
        self._lengths = lengths
        self.mean = float(lengths[chosen].mean())
        self._order = grain.MapDataset.range(self._count).seed(_number(seed, source.name)).shuffle().repeat()

    def __len__(self) -> int:
        return self._count

    def document(self, place: int) -> tuple[int, int]:
        """The document at a place of the endless sequence.

        Args:
            place: from 0.

        Returns:
            Its number in the folder, and its slots.
        """
        number: Any = self._order[place]
        if self._numbers is not None:
            number = self._numbers[number]
        return int(number), min(int(self._lengths[number]) - 1, self._slots)


def _number(*parts: Any) -> int:
    """A number below 2^31 that depends on all parts: the same on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4]) >> 1


class Draws:
    """A shard's way through the mixture.

    Attributes:
        drawn: documents taken of each source.
        slots: their slots, as many as will be in rows.
    """

    def __init__(self, views: Sequence[View], seed: int, shard: int, shards: int):
        self._views = views
        self._shard = shard
        self._shards = shards
        self.drawn = [0] * len(views)
        self.slots = [0] * len(views)
        # Each shard begins somewhere between two documents of each source, or all rows of the first batch would be of one.
        self._phase = [_number(seed, shard, view.source.name) / 2**31 * view.mean for view in views]

    def __call__(self) -> Piece:
        """The next document."""
        behind = [
            (slots + phase) / view.source.weight
            for slots, phase, view in zip(self.slots, self._phase, self._views, strict=True)
        ]
        at = behind.index(min(behind))
        number, slots = self._views[at].document(self._shard + self.drawn[at] * self._shards)
        self.drawn[at] += 1
        self.slots[at] += slots
        return Piece(at, number, 0, slots)


def epochs(views: Sequence[View], drawn: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How often each source was gone through, on average over shards.

    Args:
        views: the sources.
        drawn: of each shard, `drawn` as its state has it.

    Returns:
        Epochs by name of source, 1.0 at the end of the first.
    """
    totals = [sum(shard["drawn"][at] for shard in drawn) for at in range(len(views))]
    return {view.source.name: total / len(view) for view, total in zip(views, totals, strict=True)}
