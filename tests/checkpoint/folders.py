"""Model folders as somebody else would have written them."""

import json
from pathlib import Path

import numpy as np

from qwen3_jax import Qwen3Config
from qwen3_jax.checkpoint.names import slots
from qwen3_jax.checkpoint.safetensors import Plan, write_file
from qwen3_jax.checkpoint.source import folder_tensors


def write(folder: Path, config: Qwen3Config, tensors: dict[str, np.ndarray], files: int = 1) -> None:
    """A Hugging Face folder of one file, or of several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    names = sorted(tensors)
    weight_map = {}
    for i in range(files):
        mine = names[i::files]
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05}-of-{files:05}.safetensors"
        weight_map |= dict.fromkeys(mine, file)
        plan = Plan(folder / file, {name: (tensors[name].dtype, tensors[name].shape) for name in mine})
        write_file(plan, iter([tensors[name] for name in mine]))
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def hub_tensors(config: Qwen3Config, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for every tensor of a config."""
    draw = np.random.default_rng(seed)
    return {slot.name: (0.2 * draw.standard_normal(slot.shape)).astype(dtype) for slot in slots(config)}


def contents(folder: Path) -> dict[str, tuple[np.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a Hugging Face folder."""
    return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in folder_tensors(folder).items()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
