"""Adapter folders as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from qwen3_jax.checkpoint.casting import float_dtype
from qwen3_jax.checkpoint.folder import check_destination, shared_folder
from qwen3_jax.checkpoint.hf import check_hf_dtypes
from qwen3_jax.checkpoint.names import Slot
from qwen3_jax.checkpoint.pretrained import filled, in_memory, nested, parameters
from qwen3_jax.checkpoint.reading import CheckpointError, system_errors
from qwen3_jax.checkpoint.safetensors import Plan, read_header, write_file
from qwen3_jax.checkpoint.sharded import load, save
from qwen3_jax.checkpoint.source import FLOATS
from qwen3_jax.checkpoint.tensor import Place, Tensor
from qwen3_jax.checkpoint.together import team_of
from qwen3_jax.checkpoint.weights import Weights, stream, write_json
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import mesh_of
from qwen3_jax.tune.lora import MATRICES, LoraConfig, adapted, attach, config_of
from qwen3_jax.tune.peft_config import CONFIG, from_peft, to_peft
from qwen3_jax.tune.peft_fused import file_shapes, readers
from qwen3_jax.tune.peft_names import adapter_slots

WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: Qwen3, folder: str | PathLike[str], base: str | PathLike[str] | None = None, *, overwrite: bool = False
) -> None:
    """Write a model's adapters as PEFT lays them out. The folder appears whole or not at all.

    A model on a mesh is written by all of its processes, each of which makes the same call and sees the same file system; the
    files are the same to the byte as those of one device. Warns of targets that PEFT misreads on transformers 5.

    Args:
        model: with adapters, which are written in their own dtypes.
        folder: where; parents are made.
        base: the model's folder or name on the hub, for who reads the adapters.
        overwrite: replace what stands there.

    Raises:
        CheckpointError: the destination is not empty or cannot be replaced, or its disk too small; another process of the mesh
            has failed.
        ValueError: a model without adapters, or with such as no one LoraConfig attaches.
    """
    folder, mesh, lora = Path(folder), mesh_of(model), config_of(model)
    team, weights = team_of(mesh), in_memory(model, functools.partial(adapter_slots, lora=lora))
    wanted, dtypes = weights.slots(), weights.dtypes
    check_hf_dtypes(dtypes)
    if (what := misread(model.config, lora)) is not None:
        warnings.warn(
            f"{folder}: on transformers 5 PEFT does not read adapters of {what}; read them with transformers 4.57, or merge "
            "them into the model (qwen3_jax.tune.lora.merge) and save that",
            UserWarning,
            stacklevel=2,
        )
    with team.agreed():
        check_destination(folder, overwrite, sum(slot.size * dtypes[slot.name].itemsize for slot in wanted))
    with shared_folder(folder, overwrite, team) as part:
        plan = Plan(part / WEIGHTS, {slot.name: (dtypes[slot.name], slot.shape) for slot in wanted})
        if mesh is None:
            write_file(plan, _arrays(weights, wanted))
        else:
            with team.agreed():
                if team.leads:
                    plan.create()
            tensors = plan.places()
            places = {slot.name: Place((tensors[slot.name].reshaped(*slot.part),)) for slot in wanted}
            save(parameters(nnx.state(model, nnx.LoRAParam)), wanted, lambda slot: places[slot.name], dtypes, team)
        if team.leads:
            write_json(part / CONFIG, to_peft(model.config, lora, None if base is None else os.fspath(base)))


def misread(config: Qwen3Config, lora: LoraConfig) -> str | None:
    """What PEFT on transformers 5 makes nothing, or something else, of: it fuses pairs of experts by the ends of names alone.

    Args:
        config: the model's.
        lora: its adapters'.

    Returns:
        The targets in words; None where all is read as it is meant. docs/lora.md has the measured cases.
    """
    kinds = {kind.mlp for segment in config.segments() for kind in segment.unit}
    dense, experts = (
        [f"{module}.{name}" for name in MATRICES[module] if lora.wants(module, name)] for module in ("mlp", "moe")
    )
    if "moe" not in kinds:
        return None
    if "dense" in kinds:
        return f"{', '.join(dense + experts)} in a model of dense and MoE layers" if dense or experts else None
    whole = len(experts) in (0, len(MATRICES["moe"])) or experts == ["moe.down"]
    return None if whole else f"{', '.join(experts)} without the other matrices of experts"


def _arrays(weights: Weights, wanted: list[Slot]) -> Iterator[np.ndarray]:
    return (block.values for block in stream(weights, wanted, weights.dtypes, "writing"))


def load_adapter(model: Qwen3, folder: str | PathLike[str], *, param_dtype: DTypeLike | None = None) -> Qwen3:
    """The model with the adapters of a folder that PEFT or `save_adapter` wrote.

    Args:
        model: without adapters; on a mesh they are laid out as it is, and every process makes the same call.
        folder: holds adapter_config.json and adapter_model.safetensors.
        param_dtype: storage dtype of the adapters: bfloat16, float16 or float32; None is the file's own.

    Returns:
        A new model; it shares the given one's arrays. `qwen3_jax.tune.lora.config_of` says what was read.

    Raises:
        CheckpointError: names the file and the field or tensor, what was found and what is accepted; also when another process
            of the mesh has failed.
        ValueError: the model has adapters already.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: accepted is one without; `merge` makes one of it")
    folder, mesh = Path(folder), mesh_of(model)
    storage = None if param_dtype is None else float_dtype("param_dtype", param_dtype)
    team = team_of(mesh)
    with team.agreed():
        weights, lora = _opened(folder, model.config)
        stacked = weights.stacked_dtypes()
        if storage is not None:
            stacked = dict.fromkeys(stacked, storage)
    # Places for what is read: of no memory, nothing drawn.
    abstract = jax.eval_shape(lambda model: attach(model, lora, jax.random.key(0)), model)
    graph, factors, _ = nnx.split(abstract, nnx.LoRAParam, ...)
    shapes = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, stacked[path], sharding=None if mesh is None else NamedSharding(mesh, leaf.sharding.spec)
        )
        for path, leaf in parameters(factors).items()
    }
    with system_errors(folder):
        values = filled(weights, stacked) if mesh is None else load(weights, shapes, team)
    nnx.replace_by_pure_dict(factors, nested(values))
    return nnx.merge(graph, factors, nnx.state(model))


def _opened(folder: Path, config: Qwen3Config) -> tuple[Weights, LoraConfig]:
    """An adapter folder, its header checked against its config and the model's."""
    file = folder / WEIGHTS
    with system_errors(folder):
        for needed in (folder / CONFIG, file):
            if not needed.is_file():
                raise CheckpointError(f"{folder}: {needed.name} is not there; accepted is a folder with {CONFIG} and {WEIGHTS}")
    told = from_peft(folder, config)
    tensors = read_header(file)
    _check(file, tensors, file_shapes(config, told))
    dtypes, read_box = readers(config, told, tensors)
    weights = Weights(
        config=config,
        form="PEFT",
        dtypes=dtypes,
        read_box=read_box,
        folder=folder,
        files={WEIGHTS: sum(tensor.nbytes for tensor in tensors.values())},
        table=functools.partial(adapter_slots, lora=told.lora),
    )
    return weights, told.lora


def _check(file: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """One error for all tensors that are missing, of no place, of another shape or dtype."""
    found = [
        ("missing", [name for name in wanted if name not in tensors]),
        ("left over", [name for name in tensors if name not in wanted]),
        (
            "of another shape",
            [
                f"{name} {list(tensors[name].shape)}, accepted is {list(shape)}"
                for name, shape in wanted.items()
                if name in tensors and tensors[name].shape != shape
            ],
        ),
        (
            "of a dtype other than bfloat16, float16 and float32",
            [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if name in wanted and tensor.dtype not in FLOATS],
        ),
    ]
    told = [f"{len(names)} {what}: {'; '.join(names[:4])}{'; ...' if len(names) > 4 else ''}" for what, names in found if names]
    if told:
        raise CheckpointError(f"{file}: by {CONFIG} and the model's config, tensors are {'. '.join(told)}")
