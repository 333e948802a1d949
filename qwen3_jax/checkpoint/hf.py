"""Hugging Face folders, opened and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from qwen3_jax.checkpoint.names import Slot
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.safetensors import Plan, write_file
from qwen3_jax.checkpoint.source import FLOATS, find_sources, folder_tensors
from qwen3_jax.checkpoint.weights import Block, Weights, write_json
from qwen3_jax.config import Qwen3Config


def open_hf(folder: Path) -> Weights:
    """A Hugging Face folder, its headers and index checked against its config.

    Args:
        folder: holds config.json and safetensors.

    Returns:
        Its tensors, FP8 as bfloat16.

    Raises:
        CheckpointError: names the file and tensor, what was found and what is accepted.
        ConfigError: a config.json that is refused.
    """
    config = Qwen3Config.from_hf(folder)
    tensors = folder_tensors(folder)
    sources = {source.slot.name: source for source in find_sources(config, tensors, folder)}
    files: dict[str, int] = {}
    for tensor in tensors.values():
        files[tensor.file.name] = files.get(tensor.file.name, 0) + tensor.nbytes
    notes = []
    quantised = sum(source.scale is not None for source in sources.values())
    if quantised:
        notes.append(f"{quantised} tensors are FP8 with scales: they are read as bfloat16")
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        notes.append("lm_head.weight is redundant, the embeddings are tied: it is left out")
    return Weights(
        # The values are plain once read, so the config keeps no quantization.
        config=dataclasses.replace(config, quantization_config=None),
        form="Hugging Face",
        dtypes={name: source.dtype for name, source in sources.items()},
        read_box=lambda slot, box: sources[slot.name].read_box(box),
        folder=folder,
        files=files,
        notes=tuple(notes),
    )


def hf_order(slots: Iterable[Slot]) -> list[Slot]:
    """The order in which `write_hf` wants its blocks."""
    return sorted(slots, key=lambda slot: slot.name)


def check_hf_dtypes(dtypes: Mapping[str, np.dtype]) -> None:
    """Refuse dtypes that the family's files do not have.

    Raises:
        CheckpointError: the tensor and its dtype.
    """
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise CheckpointError(f"{name} would be written as {dtype}; accepted are bfloat16, float16 and float32")


def check_shard_bytes(given: float) -> None:
    """Refuse a size that no shard can have.

    Raises:
        CheckpointError: it is not above 0.
    """
    if isinstance(given, bool) or not isinstance(given, int | float) or not given > 0:
        raise CheckpointError(f"max_shard_bytes is {given!r}: accepted is a number above 0")


def write_hf(
    part: Path, ordered: list[Slot], dtypes: Mapping[str, np.dtype], blocks: Iterator[Block], max_shard_bytes: float
) -> None:
    """Write safetensors, and an index where there is more than one.

    Args:
        part: an empty folder.
        ordered: every slot, in `hf_order`.
        dtypes: of each, by its name.
        blocks: the slots' values in that order.
        max_shard_bytes: data of one file at most; a larger tensor has a file to itself.
    """
    plans = plan_files(part, ordered, dtypes, max_shard_bytes)
    arrays = (block.values for block in blocks)
    for plan in plans:
        write_file(plan, arrays)
    # The last block has been taken, not yet asked for what follows it: the stream ends here, its bar with it.
    if next(arrays, None) is not None:
        raise CheckpointError(f"{part}: more blocks came than were planned")
    write_index(part, plans)


def plan_files(part: Path, ordered: list[Slot], dtypes: Mapping[str, np.dtype], max_shard_bytes: float) -> list[Plan]:
    """The files of a Hugging Face folder; arguments as of `write_hf`."""
    shards = list(_shards(ordered, dtypes, max_shard_bytes))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return [
        Plan(part / name, {slot.name: (dtypes[slot.name], slot.shape) for slot in shard})
        for name, shard in zip(names, shards, strict=True)
    ]


def write_index(part: Path, plans: list[Plan]) -> None:
    """Write which file holds what, where there is more than one.

    Args:
        part: the folder.
        plans: its files.
    """
    if len(plans) > 1:
        where = {name: plan.file.name for plan in plans for name in plan.tensors}
        total = sum(plan.nbytes for plan in plans)
        write_json(part / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _shards(ordered: list[Slot], dtypes: Mapping[str, np.dtype], limit: float) -> Iterator[list[Slot]]:
    shard: list[Slot] = []
    size = 0
    for slot in ordered:
        nbytes = slot.size * dtypes[slot.name].itemsize
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(slot)
        size += nbytes
    yield shard
