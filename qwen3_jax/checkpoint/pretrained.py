"""A model in memory from a folder, and a folder from a model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen3_jax.checkpoint.casting import float_dtype
from qwen3_jax.checkpoint.folder import check_destination, shared_folder
from qwen3_jax.checkpoint.hf import check_hf_dtypes, check_shard_bytes, hf_order, plan_files, write_hf, write_index
from qwen3_jax.checkpoint.hub import local_folder
from qwen3_jax.checkpoint.names import Slot, slots, stacked_shape
from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.checkpoint.reading import CheckpointError, system_errors
from qwen3_jax.checkpoint.sharded import load, save
from qwen3_jax.checkpoint.store import chunk_files, create_store, write_store
from qwen3_jax.checkpoint.tensor import Box, Place
from qwen3_jax.checkpoint.together import Team, team_of
from qwen3_jax.checkpoint.weights import Form, SavesItself, Weights, check_form, check_memory, stream, write_beside
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.abstract import abstract_model
from qwen3_jax.model.quantized import QuantizedParam
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import mesh_of
from qwen3_jax.parallel.rules import RULES, Rules


def from_pretrained(
    folder: str | PathLike[str],
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> Qwen3:
    """A model from a Hugging Face folder or a native checkpoint: any Qwen3, dense or MoE, FP8 too.

    Each tensor is read, placed in its stacked parameter and dropped: the peak is the model and two tensors. On a mesh each
    process reads a share of the bytes that its own devices will hold; every process of the mesh makes the same call.

    Args:
        folder: holds config.json and safetensors, or what `qwen3-jax convert --to orbax` wrote; or a name on the hub,
            "Qwen/Qwen3-0.6B", with the `hub` extra.
        dtype: of computation: bfloat16, float16 or float32; None is bfloat16, float32 on CPU.
        param_dtype: of storage, one of the same; None is the file's own, bfloat16 for FP8.
        mesh: where the parameters shall lie; None is one device.
        rules: which mesh axes split what.

    Returns:
        The model.

    Raises:
        CheckpointError: names the file and tensor, or the argument, what was found and what is accepted; also when memory does
            not suffice, and when another process of the mesh has failed.
        ConfigError: a config.json that is refused.
        MeshError: the model does not fit the mesh, with the arithmetic.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    compute = float_dtype("dtype", dtype)
    storage = None if param_dtype is None else float_dtype("param_dtype", param_dtype)
    team = team_of(mesh)
    with team.agreed():
        weights = open_weights(local_folder(folder))
        stacked = weights.stacked_dtypes()
        if storage is not None:
            stacked = dict.fromkeys(stacked, storage)
        graph, state = nnx.split(abstract_model(weights.config, mesh, rules=rules, dtype=compute))
        shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, stacked[path], sharding=leaf.sharding)
            for path, leaf in parameters(state).items()
        }
        if jax.default_backend() == "cpu":  # on an accelerator the device decides
            check_memory(str(folder), sum(map(_local_bytes, shapes.values())))
    with system_errors(folder):
        nnx.replace_by_pure_dict(state, nested(filled(weights, stacked) if mesh is None else load(weights, shapes, team)))
    return nnx.merge(graph, state)


def parameters(state: Any) -> dict[str, Any]:
    """The leaves of a model's nnx.State by their paths in the table of names."""
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a parameter on this process's devices."""
    if leaf.sharding is None:
        return leaf.size * leaf.dtype.itemsize
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
    return shard * leaf.dtype.itemsize * len(leaf.sharding.addressable_devices)


def filled(weights: Weights, stacked: Mapping[str, np.dtype]) -> dict[str, jax.Array]:
    """The parameters on one device.

    Args:
        weights: where from.
        stacked: the dtype of each parameter that is wanted, by its path.

    Returns:
        These parameters by their paths.

    Raises:
        CheckpointError: as of `stream`.
    """
    whole: dict[str, jax.Array] = {}
    order = [slot for slot in weights.slots() if slot.path in stacked]
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


def nested(flat: dict[str, jax.Array]) -> dict[Any, Any]:
    """The pure dict of an nnx.State, from its leaves by their paths: `parameters` the other way."""
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
    to: Form = "hf",
) -> None:
    """Write the model as the hub lays it out; transformers 4.57 and 5 load it. The folder appears whole or not at all.

    A model on a mesh is written by all of its processes, each of which makes the same call and sees the same file system; the
    files are the same to the byte as those of one device.

    Args:
        model: any Qwen3 without adapters, its matrices floats.
        folder: where; parents are made.
        tokenizer: writes its own files beside the weights.
        dtype: bfloat16, float16 or float32; None is each parameter's own.
        max_shard_bytes: data of one file at most; a larger tensor has a file to itself.
        overwrite: replace what stands there.
        to: "hf" for Hugging Face's form, "orbax" for the native one.

    Raises:
        CheckpointError: the destination is not empty or cannot be replaced, its disk too small, or an argument refused; another
            process of the mesh has failed; the model has adapters, or matrices in codes.
    """
    check_form(to)
    check_shard_bytes(max_shard_bytes)
    if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        raise CheckpointError("the model has adapters, for which a checkpoint has no place: accepted is `merge(model)`")
    if jax.tree.leaves(nnx.state(model, QuantizedParam)):
        raise CheckpointError(
            "the model's matrices are codes, for which a checkpoint has no place: accepted is `dequantize(model)`"
        )
    folder, mesh = Path(folder), mesh_of(model)
    team, weights = team_of(mesh), in_memory(model)
    dtypes = weights.dtypes if dtype is None else dict.fromkeys(weights.dtypes, float_dtype("dtype", dtype))
    check_hf_dtypes(dtypes)
    ordered = hf_order(weights.slots())
    with team.agreed():
        check_destination(folder, overwrite, sum(slot.size * dtypes[slot.name].itemsize for slot in ordered))
    with shared_folder(folder, overwrite, team) as part:
        if mesh is not None:
            _save_shares(model, part, dtypes, max_shard_bytes, to, team)
        elif to == "hf":
            write_hf(part, ordered, dtypes, stream(weights, ordered, dtypes, "writing"), max_shard_bytes)
        else:
            write_store(part, model.config, dtypes, stream(weights, weights.slots(), dtypes, "writing"), {})
        if team.leads:
            write_beside(part, model.config, dtypes["model.embed_tokens.weight"], tokenizer=tokenizer)


def _save_shares(
    model: Qwen3, part: Path, dtypes: Mapping[str, np.dtype], max_shard_bytes: float, to: Form, team: Team
) -> None:
    """Lay out the files on the first process, then let every process put its share into them."""
    config, wanted = model.config, slots(model.config)
    plans = plan_files(part, hf_order(wanted), dtypes, max_shard_bytes)
    with team.agreed():
        if team.leads and to == "hf":
            for plan in plans:
                plan.create()
            write_index(part, plans)
        elif team.leads:
            create_store(part, config, dtypes)
    tensors = {name: tensor for plan in plans for name, tensor in plan.places().items()}

    def place(slot: Slot) -> Place:
        if to == "hf":
            return Place((tensors[slot.name].reshaped(*slot.part),))
        return chunk_files(part, slot, dtypes[slot.name])

    save(parameters(nnx.state(model, nnx.Param)), wanted, place, dtypes, team)


def in_memory(model: Qwen3, table: Callable[[Qwen3Config], list[Slot]] = slots) -> Weights:
    """The tensors of a model in memory.

    Args:
        model: any Qwen3.
        table: config -> the slots that are wanted: the model's own, or those of its adapters.

    Returns:
        Its tensors, in the dtypes of its parameters.
    """
    params = parameters(nnx.state(model, nnx.Param))

    def read_box(slot: Slot, box: Box) -> np.ndarray:
        if slot.index:
            return np.asarray(params[slot.path][slot.index])[box]
        return np.asarray(params[slot.path][box[0]])[(slice(None), *box[1:])]

    dtypes = {slot.name: np.dtype(params[slot.path].dtype) for slot in table(model.config)}
    return Weights(config=model.config, form="memory", dtypes=dtypes, read_box=read_box, table=table)
