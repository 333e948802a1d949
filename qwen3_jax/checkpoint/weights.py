"""A model's tensors wherever they lie (a Hugging Face folder, a native store, a model in memory), one stream for all.

Readers make a `Weights`, writers take its `stream`: no reader knows a writer, and no more than two blocks are in memory.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qwen3_jax.checkpoint.card import generation_config, model_card
from qwen3_jax.checkpoint.casting import cast, holding
from qwen3_jax.checkpoint.names import Slot, slots
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.tensor import Box, whole
from qwen3_jax.config import Qwen3Config

# What belongs to a model beside its weights and its config, and goes where it goes.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
TEMPLATES = "additional_chat_templates"  # a folder of chat templates by name

Form = Literal["hf", "orbax"]  # Hugging Face's, and the native one


def check_form(to: str) -> None:
    """Refuse a form that nothing is written in.

    Raises:
        CheckpointError: what is accepted.
    """
    if to not in get_args(Form):
        raise CheckpointError(f"to is {to!r}: accepted are {' and '.join(map(repr, get_args(Form)))}")


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer: writes its files into a folder."""

    def save(self, folder: Path) -> None:
        """Write the files."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a model: checked, not yet read.

    Attributes:
        config: the model's; values are plain, so it names no quantization.
        form: what they lie in, for people: "Hugging Face", "Orbax", "memory".
        dtypes: each slot's dtype, by its name; every slot of the config is there.
        read_box: (slot, box) -> what a box of `slot.part` holds, in the slot's dtype.
        folder: where they lie; None for a model in memory.
        files: the files that hold them, with their bytes.
        notes: what is worth telling: a redundant tensor that is left out, a dtype that changes by reading.
        table: config -> its slots: a model's own, or those of its adapters.
    """

    config: Qwen3Config
    form: str
    dtypes: Mapping[str, np.dtype]
    read_box: Callable[[Slot, Box], np.ndarray]
    folder: Path | None = None
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    table: Callable[[Qwen3Config], list[Slot]] = slots

    def read_rows(self, slot: Slot, first: int, last: int) -> np.ndarray:
        """Rows first..last of `slot.shape`, in the slot's dtype."""
        if slot.index:  # its rows on the hub are none of its part's
            return self.read_box(slot, whole(slot.part)).reshape(slot.shape)[first:last]
        return self.read_box(slot, (slice(first, last), *whole(slot.part[1:])))

    def slots(self) -> list[Slot]:
        """Every tensor, in the table's order."""
        return self.table(self.config)

    def stacked_dtypes(self) -> dict[str, np.dtype]:
        """The dtype of each parameter of the tree, by its path: where a parameter's layers differ, the one that holds all."""
        found: dict[str, np.dtype] = {}
        for slot in self.slots():
            given = self.dtypes[slot.name]
            found[slot.path] = holding(found.get(slot.path, given), given)
        return found


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of one tensor on their way: `values` are rows `first`.. of `slot.shape`."""

    slot: Slot
    first: int
    values: np.ndarray


def stream(weights: Weights, order: Iterable[Slot], dtypes: Mapping[str, np.dtype], doing: str) -> Iterator[Block]:
    """The tensors block by block with a progress bar; the next is read while the one before is used.

    Args:
        weights: where from.
        order: slots in the order in which they are wanted.
        dtypes: what each is turned into, by its name.
        doing: a word for the bar.

    Yields:
        Blocks, each slot's in the order of its rows.

    Raises:
        CheckpointError: a file that ends too early, a value that the dtype cannot hold.
    """
    order = list(order)
    pieces = [(slot, first) for slot in order for first in range(0, slot.shape[0], slot.block_rows)]

    def read(piece: tuple[Slot, int]) -> Block:
        slot, first = piece
        values = weights.read_rows(slot, first, min(first + slot.block_rows, slot.shape[0]))
        return Block(slot, first, cast(values, dtypes[slot.name], slot.name))

    total = sum(slot.size * dtypes[slot.name].itemsize for slot in order)
    for _, block in read_ahead(pieces, read, lambda block: block.values.nbytes, total, doing):
        yield block
        del block


def read_ahead[P, V](
    pieces: Sequence[P], read: Callable[[P], V], size: Callable[[V], int], total: int, doing: str
) -> Iterator[tuple[P, V]]:
    """What is read piece by piece, with a progress bar; the next is read while the one before is used.

    Args:
        pieces: what is to be read, in order.
        read: piece -> value; called in a thread.
        size: value -> its bytes.
        total: bytes of all of them.
        doing: a word for the bar.

    Yields:
        Each piece with its value.
    """
    with _progress() as progress, ThreadPoolExecutor(1) as reader:
        task = progress.add_task(doing, total=total)
        ahead = reader.submit(read, pieces[0])
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            value = ahead.result()
            if following is not None:
                ahead = reader.submit(read, following)
            nbytes = size(value)
            yield piece, value
            del value
            progress.advance(task, nbytes)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Checksums:
    """CRC-32 of every block that passes, to be held against what is found later."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], int] = {}

    def noting(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks, each noted."""
        for block in blocks:
            self._sums[block.slot.name, block.first] = _crc(block.values)
            yield block

    def compare(self, weights: Weights, dtypes: Mapping[str, np.dtype]) -> None:
        """Read all of it again.

        Args:
            weights: what was written.
            dtypes: what the blocks were in, by name; none narrower than what is there.

        Raises:
            CheckpointError: names the first tensor that is not what was written.
        """
        for block in stream(weights, weights.slots(), dtypes, "verifying"):
            if self._sums[block.slot.name, block.first] != _crc(block.values):
                rows = f"rows {block.first}..{block.first + len(block.values) - 1}"
                raise CheckpointError(f"{weights.folder}: {block.slot.name}, {rows}: read back, it is not what was written")


def _crc(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def write_beside(
    part: Path,
    config: Qwen3Config,
    stored: np.dtype,
    source: Path | None = None,
    tokenizer: SavesItself | None = None,
) -> None:
    """Write what stands beside the weights: config, generation config, tokenizer files, card.

    Args:
        part: the folder being written.
        config: the model's.
        stored: dtype of the weights.
        source: the folder that the weights come from, whose own files are carried over.
        tokenizer: writes its files instead.
    """
    # What is written is plain, whatever the config's own file held.
    plain = dataclasses.replace(config, dtype=stored.name, quantization_config=None)
    write_json(part / "config.json", plain.to_hf())
    if source is not None:
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, part / TEMPLATES)
    if tokenizer is not None:
        tokenizer.save(part)
    if not (part / "generation_config.json").exists():
        write_json(part / "generation_config.json", generation_config(config))
    (part / "README.md").write_text(model_card(config, stored.name), "utf-8")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object for people to read: indented, UTF-8."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def available_memory() -> int | None:
    """Bytes that a process of this host could still take; None where the system does not say."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def check_memory(what: str, needed: int) -> None:
    """Refuse what host memory cannot hold.

    Args:
        what: is to be read, for the message.
        needed: bytes.

    Raises:
        CheckpointError: both figures.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise CheckpointError(f"{what} needs {decimal(needed)} of memory and {decimal(free)} are available")
