"""Models from Hugging Face folders and back, one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import Progress, track

from qwen3_jax.checkpoint.card import generation_config, model_card
from qwen3_jax.checkpoint.folder import check_destination, whole_folder
from qwen3_jax.checkpoint.hub import local_folder
from qwen3_jax.checkpoint.names import Slot, slots, stacked_shape
from qwen3_jax.checkpoint.safetensors import CheckpointError, Plan, write_file
from qwen3_jax.checkpoint.source import FLOATS, Source, find_sources, folder_tensors
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.abstract import abstract_model


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer: writes its files into a folder."""

    def save(self, folder: Path) -> None:
        """Write the files."""


def from_pretrained(folder: str | PathLike[str], dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Qwen3:
    """A model from a Hugging Face folder: any Qwen3, dense or MoE, FP8 too.

    Each tensor is read, placed in its stacked parameter and dropped: the peak is the model and two tensors.

    Args:
        folder: holds config.json and safetensors; or a name on the hub, "Qwen/Qwen3-0.6B", with the `hub` extra.
        dtype: of computation; None is bfloat16, float32 on CPU.
        param_dtype: of storage; None is the file's own, bfloat16 for FP8.

    Returns:
        The model.

    Raises:
        CheckpointError: names the file and tensor, what was found and what is accepted; also when memory does not suffice.
        ConfigError: a config.json that is refused.
    """
    folder = local_folder(folder)
    config = Qwen3Config.from_hf(folder)
    sources = find_sources(config, folder_tensors(folder), folder)
    dtypes: dict[str, np.dtype] = {}
    for source in sources:
        path = source.slot.path
        given = source.dtype if param_dtype is None else np.dtype(param_dtype)
        dtypes[path] = np.promote_types(dtypes.get(path, given), given)
    _check_memory(folder, sum(source.slot.size * dtypes[source.slot.path].itemsize for source in sources))
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    # Storage dtypes are the file's; the config keeps no quantization, for the values are plain now.
    config = dataclasses.replace(config, quantization_config=None)
    graph, state = nnx.split(abstract_model(config, dtype=dtype))
    nnx.replace_by_pure_dict(state, _nested(_filled(config, sources, dtypes)))
    return nnx.merge(graph, state)


def _filled(config: Qwen3Config, sources: list[Source], dtypes: dict[str, np.dtype]) -> dict[str, jax.Array]:
    whole: dict[str, jax.Array] = {}
    for source in track(
        sources, "reading", transient=True, console=Console(stderr=True), disable=not Console(stderr=True).is_terminal
    ):
        slot = source.slot
        values = source.read().reshape(slot.part).astype(dtypes[slot.path], copy=False)
        if not slot.index:
            whole[slot.path] = jnp.asarray(values)
            continue
        if slot.path not in whole:
            whole[slot.path] = jnp.zeros(stacked_shape(slot, config), values.dtype)
        index = slot.index + (0,) * len(slot.part)
        whole[slot.path] = _placed(whole[slot.path], values.reshape((1,) * len(slot.index) + slot.part), index)
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


def _check_memory(folder: Path, needed: int) -> None:
    """Refuse a model that host memory cannot hold; on an accelerator the device decides."""
    if jax.default_backend() != "cpu":
        return
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    if free is not None and needed > free:
        raise CheckpointError(f"{folder} needs {needed / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are available")


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
        CheckpointError: the destination is not empty, its disk too small, or the dtype none of these.
    """
    folder, config = Path(folder), model.config
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chosen = None if dtype is None else np.dtype(dtype)
    ordered = sorted(slots(config), key=lambda slot: slot.name)
    dtypes = {slot.name: chosen or np.dtype(_parameter(params, slot).dtype) for slot in ordered}
    for name, kind in dtypes.items():
        if kind not in FLOATS:
            raise CheckpointError(f"{name} would be written as {kind}; accepted are bfloat16, float16 and float32")
    shards = list(_shards(ordered, dtypes, max_shard_bytes))
    total = sum(slot.size * dtypes[slot.name].itemsize for slot in ordered)
    check_destination(folder, overwrite, total)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    with whole_folder(folder) as part, _progress() as progress:
        task = progress.add_task("writing", total=total)
        for name, shard in zip(names, shards, strict=True):
            plan = Plan(part / name, {slot.name: (dtypes[slot.name], slot.shape) for slot in shard})

            def arrays(shard: list[Slot] = shard) -> Iterator[np.ndarray]:
                for slot in shard:
                    value = np.asarray(_parameter(params, slot)[slot.index]).astype(dtypes[slot.name], copy=False)
                    yield value.reshape(slot.shape)
                    progress.advance(task, value.nbytes)

            write_file(plan, arrays())
        if len(shards) > 1:
            where = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
            _write_json(part / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
        stored = dtypes["model.embed_tokens.weight"].name
        _write_json(part / "config.json", dataclasses.replace(config, dtype=stored).to_hf())
        if tokenizer is not None:
            tokenizer.save(part)
        if not (part / "generation_config.json").exists():
            _write_json(part / "generation_config.json", generation_config(config))
        (part / "README.md").write_text(model_card(config, stored), "utf-8")


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _parameter(params: dict[Any, Any], slot: Slot) -> jax.Array:
    node: Any = params
    for key in slot.path.split("."):
        node = node[int(key) if key.isdigit() else key]
    return node


def _shards(ordered: list[Slot], dtypes: dict[str, np.dtype], limit: float) -> Iterator[list[Slot]]:
    shard: list[Slot] = []
    size = 0
    for slot in ordered:
        nbytes = math.prod(slot.shape) * dtypes[slot.name].itemsize
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(slot)
        size += nbytes
    yield shard


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
