"""Pairs of fused experts (PEFT's `target_parameters`, transformers 5) as the pairs of single matrices that they are.

The pair of a parameter [E, out, in] lies as A [E r, in], a row for each expert and rank, and B [out, r E], a column for each
rank and expert. Gate and up are one parameter: its A is the A of both, the rows of its B are gate's and then up's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from qwen3_jax.checkpoint.names import Slot
from qwen3_jax.checkpoint.tensor import Box, Tensor
from qwen3_jax.config import Qwen3Config
from qwen3_jax.tune.peft_config import Told
from qwen3_jax.tune.peft_names import FUSED, PREFIX, SUFFIX, adapter_slots


def file_shapes(config: Qwen3Config, told: Told) -> dict[str, tuple[int, ...]]:
    """The tensors that a folder must hold.

    Args:
        config: the model's.
        told: the folder's adapter_config.json.

    Returns:
        The shape of each, by its name.
    """
    found: dict[str, tuple[int, ...]] = {}
    for slot in adapter_slots(config, told.lora):
        leaf = _leaf(slot, told)
        if leaf is None:
            found[slot.name] = slot.shape
            continue
        rows, columns = slot.shape
        if slot.path.endswith(".a"):
            found[_name(slot, leaf, told)] = (config.num_experts * rows, columns)
        else:
            found[_name(slot, leaf, told)] = (len(FUSED[leaf]) * rows, columns * config.num_experts)
    return found


def readers(
    config: Qwen3Config, told: Told, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, np.dtype], Callable[[Slot, Box], np.ndarray]]:
    """How each slot is read.

    Args:
        config: the model's.
        told: the folder's adapter_config.json.
        tensors: what `file_shapes` asks for.

    Returns:
        The dtype of each slot by its name, and (slot, box) -> what the box of `slot.part` holds.
    """

    # An expert's columns lie apart from one another: the whole is read once for all experts, who are asked for in turn.
    @functools.lru_cache(maxsize=1)
    def columns(name: str) -> np.ndarray:
        return tensors[name].read()

    def read_box(slot: Slot, box: Box) -> np.ndarray:
        leaf = _leaf(slot, told)
        if leaf is None:
            return tensors[slot.name].reshaped(*slot.part).read_box(box)
        name, expert, (rows, _) = _name(slot, leaf, told), slot.index[1], slot.shape
        if slot.path.endswith(".a"):
            return tensors[name].part(expert * rows, (expert + 1) * rows).read_box(box)
        first = rows * FUSED[leaf].index(_matrix(slot))
        whole = columns(name)[first : first + rows]
        return whole.reshape(rows, told.lora.rank, config.num_experts)[..., expert][box].copy()

    dtypes = {}
    for slot in adapter_slots(config, told.lora):
        leaf = _leaf(slot, told)
        dtypes[slot.name] = tensors[slot.name if leaf is None else _name(slot, leaf, told)].dtype
    return dtypes, read_box


def _matrix(slot: Slot) -> str:
    """The matrix of experts that a slot's factor is of: "gate" of "segments.0.blocks.0.moe.gate_lora.a"."""
    return slot.path.split(".")[5].removesuffix("_lora")


def _leaf(slot: Slot, told: Told) -> str | None:
    """The fused parameter that a slot is a part of; None where the file holds it by itself."""
    if len(slot.index) == 1:
        return None
    return next((leaf for leaf in told.fused if _matrix(slot) in FUSED[leaf]), None)


def _name(slot: Slot, leaf: str, told: Told) -> str:
    """The tensor that holds a slot. PEFT wraps a module once for each of its parameters, gate and up within down."""
    module, factor = slot.name.removeprefix(PREFIX).split(".experts.")[0], slot.name.split(".")[-2]
    inner = ".base_layer" if leaf == "gate_up_proj" and len(told.fused) == 2 else ""
    return f"{PREFIX}{module}.experts{inner}.{factor}{SUFFIX}"
