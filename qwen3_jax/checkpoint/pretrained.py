"""A model in memory from a folder, and a folder from a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen3_jax.checkpoint.casting import float_dtype
from qwen3_jax.checkpoint.folder import check_destination, whole_folder
from qwen3_jax.checkpoint.hf import check_hf_dtypes, check_shard_bytes, hf_order, write_hf
from qwen3_jax.checkpoint.hub import local_folder
from qwen3_jax.checkpoint.names import Slot, slots, stacked_shape
from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.checkpoint.reading import system_errors
from qwen3_jax.checkpoint.weights import SavesItself, Weights, check_memory, stream, write_beside
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.abstract import abstract_model


def from_pretrained(folder: str | PathLike[str], dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Qwen3:
    """A model from a Hugging Face folder or a native checkpoint: any Qwen3, dense or MoE, FP8 too.

    Each tensor is read, placed in its stacked parameter and dropped: the peak is the model and two tensors.

    Args:
        folder: holds config.json and safetensors, or what `qwen3-jax convert --to orbax` wrote; or a name on the hub,
            "Qwen/Qwen3-0.6B", with the `hub` extra.
        dtype: of computation: bfloat16, float16 or float32; None is bfloat16, float32 on CPU.
        param_dtype: of storage, one of the same; None is the file's own, bfloat16 for FP8.

    Returns:
        The model.

    Raises:
        CheckpointError: names the file and tensor, or the argument, what was found and what is accepted; also when memory does
            not suffice.
        ConfigError: a config.json that is refused.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    compute = float_dtype("dtype", dtype)
    storage = None if param_dtype is None else float_dtype("param_dtype", param_dtype)
    weights = open_weights(local_folder(folder))
    stacked = weights.stacked_dtypes()
    if storage is not None:
        stacked = dict.fromkeys(stacked, storage)
    if jax.default_backend() == "cpu":  # on an accelerator the device decides
        check_memory(str(folder), sum(slot.size * stacked[slot.path].itemsize for slot in weights.slots()))
    graph, state = nnx.split(abstract_model(weights.config, dtype=compute))
    with system_errors(folder):
        nnx.replace_by_pure_dict(state, _nested(_filled(weights, stacked)))
    return nnx.merge(graph, state)


def _filled(weights: Weights, stacked: Mapping[str, np.dtype]) -> dict[str, jax.Array]:
    whole: dict[str, jax.Array] = {}
    order = weights.slots()
    for block in stream(weights, order, {slot.name: stacked[slot.path] for slot in order}, "reading"):
        slot, values = block.slot, block.values
        if len(values) == slot.shape[0]:
            values = values.reshape((1,) * len(slot.index) + slot.part)
        shape = stacked_shape(slot, weights.config)
        if values.shape == shape:
            whole[slot.path] = jnp.asarray(values)
            continue
        if slot.path not in whole:
            whole[slot.path] = jnp.zeros(shape, values.dtype)
        start = slot.index or (block.first,)
        whole[slot.path] = _placed(whole[slot.path], values, (*start, *(0,) * (len(shape) - len(start))))
    return whole


@jax.jit(donate_argnums=0)
def _placed(stack: jax.Array, part: jax.Array, index: tuple[int | jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(stack, part, index)


def _nested(flat: dict[str, jax.Array]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def save_pretrained(
    model: Qwen3,
    folder: str | PathLike[str],
    tokenizer: SavesItself | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: float = 5e9,
    *,
    overwrite: bool = False,
) -> None:
    """Write the model as the hub lays it out; transformers 4.57 and 5 load it. The folder appears whole or not at all.

    Args:
        model: any Qwen3.
        folder: where; parents are made.
        tokenizer: writes its own files beside the weights.
        dtype: bfloat16, float16 or float32; None is each parameter's own.
        max_shard_bytes: data of one file at most; a larger tensor has a file to itself.
        overwrite: replace what stands there.

    Raises:
        CheckpointError: the destination is not empty or cannot be replaced, its disk too small, or an argument refused.
    """
    check_shard_bytes(max_shard_bytes)
    folder, weights = Path(folder), in_memory(model)
    dtypes = weights.dtypes if dtype is None else dict.fromkeys(weights.dtypes, float_dtype("dtype", dtype))
    check_hf_dtypes(dtypes)
    ordered = hf_order(weights.slots())
    check_destination(folder, overwrite, sum(slot.size * dtypes[slot.name].itemsize for slot in ordered))
    with whole_folder(folder, overwrite) as part:
        write_hf(part, ordered, dtypes, stream(weights, ordered, dtypes, "writing"), max_shard_bytes)
        write_beside(part, model.config, dtypes["model.embed_tokens.weight"], tokenizer=tokenizer)


def in_memory(model: Qwen3) -> Weights:
    """The tensors of a model in memory.

    Args:
        model: any Qwen3.

    Returns:
        Its tensors, in the dtypes of its parameters.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def parameter(slot: Slot) -> jax.Array:
        node: Any = params
        for key in slot.path.split("."):
            node = node[int(key) if key.isdigit() else key]
        return node

    def read_rows(slot: Slot, first: int, last: int) -> np.ndarray:
        if not slot.index:
            return np.asarray(parameter(slot)[first:last])
        return np.asarray(parameter(slot)[slot.index]).reshape(slot.shape)[first:last]

    dtypes = {slot.name: np.dtype(parameter(slot).dtype) for slot in slots(model.config)}
    return Weights(config=model.config, form="memory", dtypes=dtypes, read_rows=read_rows)
