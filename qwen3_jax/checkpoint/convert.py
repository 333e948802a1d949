"""From one form of a model to another, a block at a time: no model, no stacked parameter, no accelerator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen3_jax.checkpoint.casting import float_dtype
from qwen3_jax.checkpoint.folder import check_destination, resolved, whole_folder
from qwen3_jax.checkpoint.hf import check_hf_dtypes, check_shard_bytes, hf_order, write_hf
from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.store import write_store
from qwen3_jax.checkpoint.weights import Checksums, Form, Weights, check_form, check_memory, stream, write_beside


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and can be run.

    Attributes:
        weights: what is read.
        destination: the folder to be written.
        to: its form.
        dtypes: what each tensor becomes, by its name.
        hub_dtypes: what tensors are in on the hub, where the native form keeps them in a wider one.
        overwrite: whether `destination` may be replaced.
        max_shard_bytes: of one safetensors file.
    """

    weights: Weights
    destination: Path
    to: Form
    dtypes: Mapping[str, np.dtype]
    hub_dtypes: Mapping[str, np.dtype]
    overwrite: bool
    max_shard_bytes: float

    @property
    def bytes_read(self) -> int:
        """Bytes of the source's tensors."""
        return sum(self.weights.files.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of the destination's tensors."""
        return sum(slot.size * self.dtypes[slot.name].itemsize for slot in self.weights.slots())

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of memory at most: a block being written, one waiting and one being read, each also in the source's dtype."""
        largest = max(slot.size // slot.shape[0] * slot.block_rows for slot in self.weights.slots())
        return 3 * largest * (max(dtype.itemsize for dtype in self.dtypes.values()) + 4)

    def run(self, verify: bool = False) -> None:
        """Write the destination; it appears whole or not at all.

        Args:
            verify: read everything back before it appears, and compare checksums.

        Raises:
            CheckpointError: a file that cannot be read or written, or does not read back as written.
        """
        weights, sums = self.weights, Checksums()
        # Layer by layer, as the hub's shards mostly lie, where the destination has no order of its own.
        ordered = hf_order(weights.slots()) if self.to == "hf" else weights.slots()
        with whole_folder(self.destination, self.overwrite) as part:
            blocks = stream(weights, ordered, self.dtypes, "converting")
            if verify:
                blocks = sums.noting(blocks)
            if self.to == "hf":
                write_hf(part, ordered, self.dtypes, blocks, self.max_shard_bytes)
            else:
                write_store(part, weights.config, self.dtypes, blocks, self.hub_dtypes)
            write_beside(part, weights.config, self.dtypes["model.embed_tokens.weight"], weights.folder)
            if verify:
                sums.compare(open_weights(part), self.dtypes)


def plan_conversion(
    source: Path,
    destination: Path,
    to: Form,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
) -> Conversion:
    """Check a conversion from one end to the other before a byte is written.

    Args:
        source: a Hugging Face folder or a native checkpoint.
        destination: a folder that is new or empty, or may be replaced.
        to: "hf" for Hugging Face's form, "orbax" for the native one.
        dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's own, bfloat16 for FP8.
        overwrite: replace what stands at the destination, once the new folder is complete.
        max_shard_bytes: data of one safetensors file at most.

    Returns:
        The conversion.

    Raises:
        CheckpointError: an argument or the source is refused; the destination is not empty, holds the source or cannot be
            replaced; memory or disk do not suffice.
        ConfigError: a config.json that is refused.
    """
    check_form(to)
    check_shard_bytes(max_shard_bytes)
    wanted = None if dtype is None else float_dtype("dtype", dtype)
    weights = open_weights(source)
    here, there = resolved(source), resolved(destination)
    if here != there and here.is_relative_to(there):
        raise CheckpointError(f"{destination} holds the source {source}: replacing it would remove that")
    dtypes, hub_dtypes = dict(weights.dtypes), {}
    if wanted is not None:
        dtypes = dict.fromkeys(dtypes, wanted)
    elif to == "orbax":
        stacked = weights.stacked_dtypes()
        dtypes = {slot.name: stacked[slot.path] for slot in weights.slots()}
        hub_dtypes = {name: kept for name, kept in weights.dtypes.items() if kept != dtypes[name]}
    check_hf_dtypes(dtypes)
    conversion = Conversion(weights, destination, to, dtypes, hub_dtypes, overwrite, max_shard_bytes)
    check_destination(destination, overwrite, conversion.bytes_written)
    check_memory(f"converting {source}", conversion.bytes_in_memory)
    return conversion
