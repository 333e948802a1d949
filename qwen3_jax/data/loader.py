"""The loader: packed batches that a training loop takes, and a state with which any number of processes go on.

First the rows are planned, from lengths alone; then their documents are read. A plan carries the state after it, so reading
ahead changes neither the order nor what `state()` says. Underneath are grain's data sets: its iterators, shuffle, ArrayRecord
source and prefetching thread.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jaxtyping import Int

from qwen3_jax.checks import check_fields
from qwen3_jax.data.encoding import NO_TARGET
from qwen3_jax.data.files import DataError
from qwen3_jax.data.mixture import Source, View, epochs
from qwen3_jax.data.packing import Piece
from qwen3_jax.data.prepared import allow_open_files
from qwen3_jax.data.shards import Shard, shards_for
from qwen3_jax.data.state import VERSION, carried, restored, short
from qwen3_jax.data.state import merge_states as merge_states


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What decides every batch, together with its rows and length.

    Attributes:
        sources: of the mixture.
        seed: of order and mixture.
        shards: logical ones, a divisor of the batch's rows; None: the largest one up to 256.
        waiting: documents that a shard keeps waiting for a row where they fit.
        cache: folder on a disk to which sources in a store are copied; None: fetch.CACHE.
    """

    sources: tuple[Source, ...]
    seed: int = 0
    shards: int | None = None
    waiting: int = 32
    cache: str | Path | None = None

    def __post_init__(self):
        check_fields(self)
        if not self.sources:
            raise DataError("sources is empty: accepted is at least one")
        names = [source.name for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"two sources are named {twice}: accepted is a name of its own for each")
        if self.waiting < 1:
            raise DataError(f"waiting is {self.waiting}: accepted is at least 1")


class _Snapshot(dict):
    """A state that nobody changes, so whoever wants a copy may have it itself: grain copies one for each batch."""

    def __deepcopy__(self, memo: Any) -> _Snapshot:
        return self


class _Plans(grain.IterDataset):
    """The rows of batch after batch, planned: for each row of this process its pieces."""

    def __init__(self, views: Sequence[View], config: LoaderConfig, *, shards: int, slots: int, each: int, rows: Sequence[int]):
        super().__init__()
        self._made = (views, config, shards, slots)
        self._each = each
        self._rows = rows

    def __iter__(self) -> grain.DatasetIterator:
        views, config, shards, slots = self._made
        held = {
            number: Shard(views, seed=config.seed, number=number, shards=shards, slots=slots, waiting=config.waiting)
            for number in sorted({row // self._each for row in self._rows})
        }
        return _PlanIterator(held, self._each, self._rows)


class _PlanIterator(grain.DatasetIterator):
    def __init__(self, held: dict[int, Shard], each: int, rows: Sequence[int]):
        super().__init__()
        self._held = held
        self._each = each
        self._rows = rows
        self._batches = 0
        self._state = self._snapshot()

    def __next__(self) -> list[list[Piece]]:
        # A shard plans all its rows of a batch, those of other processes too.
        planned = {number: [shard.row() for _ in range(self._each)] for number, shard in self._held.items()}
        self._batches += 1
        self._state = self._snapshot()
        return [planned[row // self._each][row % self._each] for row in self._rows]

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        for number, shard in self._held.items():
            shard.restore(state["shards"][str(number)])
        self._batches = state["batches"]
        self._state = self._snapshot()

    def _snapshot(self) -> _Snapshot:
        shards = {str(number): shard.state() for number, shard in self._held.items()}
        return _Snapshot(batches=self._batches, shards=shards)


class _Read(grain.transforms.Map):
    """Plans to arrays."""

    def __init__(self, views: Sequence[View], slots: int):
        self._views = views
        self._slots = slots

    def map(self, element: Any) -> Any:
        wanted: dict[int, dict[int, bytes]] = {}
        for row in element:
            for piece in row:
                wanted.setdefault(piece.source, {})[piece.document] = b""
        for source, documents in wanted.items():
            wanted[source] = dict(zip(documents, self._views[source].prepared.read(list(documents)), strict=True))
        shape = (len(element), self._slots)
        tokens, labels, segments = (np.zeros(shape, np.int32) for _ in range(3))
        mask = np.zeros(shape, np.float32)
        for at, row in enumerate(element):
            begin = 0
            for number, piece in enumerate(row, 1):
                end = begin + piece.slots
                # One word more than slots: the last one is predicted, and not read.
                words = np.frombuffer(wanted[piece.source][piece.document], "<u4", piece.slots + 1, 4 * piece.start)
                tokens[at, begin:end] = words[:-1] & ~NO_TARGET
                labels[at, begin:end] = words[1:] & ~NO_TARGET
                mask[at, begin:end] = words[1:] < NO_TARGET
                segments[at, begin:end] = number
                begin = end
        return {"tokens": tokens, "labels": labels, "mask": mask, "segment_ids": segments}


class Loader(Iterator[Any]):
    """Endless batches of this process's rows. Made by make_loader; close it, or use it as a context, when it is done.

    Attributes:
        rows: which of the batch's rows are this process's.
        vocab_size: of the tokenizer: every id is below it.
        close: call it to stop reading ahead.
    """

    def __init__(
        self, views: Sequence[View], config: LoaderConfig, *, batch: int, seq: int, rows: Sequence[int], prefetch: int
    ):
        shards = shards_for(batch, config.shards)
        self.rows = tuple(rows)
        self.vocab_size: int = views[0].prepared.index["vocab_size"]
        self._failed: Exception | None = None
        self._views = views
        self._seq = seq
        self._told = {
            "version": VERSION,
            "seed": config.seed,
            "seq": seq,
            "shard_count": shards,
            "waiting": config.waiting,
            "sources": [_told(view) for view in views],
        }
        plans = _Plans(views, config, shards=shards, slots=seq, each=batch // shards, rows=self.rows)
        batches = plans.map(_Read(views, seq))
        self._open = [iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch))]
        # At the latest before the interpreter takes modules apart, which grain's own clearing up needs.
        self.close = weakref.finalize(self, _close, self._open)

    def __next__(self) -> Any:
        """The next batch.

        Returns:
            A qwen3_jax Batch of numpy arrays [rows of this process, seq].

        Raises:
            DataError: a damaged file; from then on always. `state` is still that of the last batch given.
        """
        from qwen3_jax.parallel.batches import Batch

        if self._failed is not None:
            raise self._failed  # the plan has gone on, so the next batch would not be the next one
        try:
            return Batch(**next(self._iterator))
        except Exception as error:
            self._failed = error
            raise

    def state(self) -> dict[str, Any]:
        """What the next batch depends on, as JSON has it.

        Returns:
            The state of this process's shards: a few hundred bytes each. `merge_states` joins those of all processes.
        """
        return {**self._told, **self._iterator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next batch is the one that would have come then.

        Args:
            state: of all shards that this process has, of whatever processes there were.

        Raises:
            DataError: a state of another mixture, by the field that differs, or without a shard that is wanted.
        """
        self._set(restored(self._told, state, self._iterator.get_state()["shards"]))

    def carry_on(self, state: Mapping[str, Any]) -> None:
        """Begin this mixture with another one's sources where they were: for a stage of other weights, sources or length.

        Args:
            state: of the other mixture, of all shards that this process has.

        Raises:
            DataError: another seed or number of shards, or a source of the same name with other documents.
        """
        self._set(carried(self._told, state, self._iterator.get_state()["shards"]))

    def _set(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(_Snapshot(state))

    def report(self) -> dict[str, Any]:
        """What this process has given so far.

        Returns:
            batches; utilisation, the share of slots that hold a document; epochs of each source, as far as this process's
            shards tell; slots drawn of each; cut and dropped, documents of each that are too long for a row.
        """
        state = self._iterator.get_state()
        held = list(state["shards"].values())
        rows = sum(shard["rows"] for shard in held)
        names = [view.source.name for view in self._views]
        share = self._told["shard_count"] / len(held)
        return {
            "batches": state["batches"],
            "utilisation": sum(shard["used"] for shard in held) / (rows * self._seq) if rows else 1.0,
            "epochs": {name: epoch * share for name, epoch in epochs(self._views, held).items()},
            "slots": {name: sum(shard["slots"][at] for shard in held) for at, name in enumerate(names)},
            "cut": {view.source.name: view.cut for view in self._views},
            "dropped": {view.source.name: view.dropped for view in self._views},
        }

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._open:
            raise DataError("the loader is closed: accepted is an open one")
        return self._open[0]

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _close(held: list[grain.DatasetIterator]) -> None:
    held.pop().close()


def make_loader(
    config: LoaderConfig,
    *,
    batch: int,
    seq: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
    prefetch: int = 2,
) -> Loader:
    """Batches of a mixture of prepared sources.

    Args:
        config: sources, seed, shards.
        batch: rows of the whole batch, over all processes.
        seq: tokens of a row.
        process_index: this process's number.
        process_count: how many processes share the batch; each gets a run of its rows.
        rows: this process's rows instead, as process_rows(mesh, batch) gives them.
        prefetch: batches read ahead, by a thread; 0: none.

    Returns:
        The loader.

    Raises:
        DataError: a field that is refused, sources that are, or that were tokenised by different tokenizers, or more files than
            the process may open.
    """
    if seq < 1:
        raise DataError(f"seq is {seq}: accepted is at least 1")
    if not 0 <= process_index < process_count <= batch:
        raise DataError(
            f"process_index is {process_index} of process_count {process_count}: accepted are 0 to process_count - 1, "
            f"of at most {batch} processes, a row for each"
        )
    shards_for(batch, config.shards)
    if rows is None:
        rows = range(process_index * batch // process_count, (process_index + 1) * batch // process_count)
    rows = [int(row) for row in rows]
    if not rows or not 0 <= min(rows) <= max(rows) < batch:
        raise DataError(f"rows is {short(rows)}: accepted are some of 0 to {batch - 1}")
    if prefetch < 0:
        raise DataError(f"prefetch is {prefetch}: accepted is at least 0")
    views = [View(source, seq, config.seed, config.cache) for source in config.sources]
    first = views[0]
    for view in views[1:]:
        if view.prepared.index["tokenizer"] != first.prepared.index["tokenizer"]:
            raise DataError(
                f"sources {first.source.name} and {view.source.name} were tokenised by different tokenizers: "
                "accepted is one for all"
            )
    allow_open_files(sum(view.prepared.parts for view in views))
    return Loader(views, config, batch=batch, seq=seq, rows=rows, prefetch=prefetch)


def _told(view: View) -> dict[str, Any]:
    """What of a source a state depends on."""
    source, index = view.source, view.prepared.index
    told = {name: getattr(source, name) for name in ("name", "weight", "min_tokens", "max_tokens")}
    return told | {"over_long": view.over_long} | {name: index[name] for name in ("documents", "tokens", "tokenizer")}
