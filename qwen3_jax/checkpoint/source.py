"""A Hugging Face folder as the tensors that a config needs, whatever layout it has; everything is checked before it is read.

Layouts that are read: one file or a sharded index; experts one by one or fused (`gate_up_proj` [E, 2F, D],
`down_proj` [E, D, F]); names with `model.` or bare (embedding checkpoints); a tied model with or without its redundant head;
FP8 blocks with scales.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen3_jax.checkpoint.casting import any_infinite, cast
from qwen3_jax.checkpoint.names import Slot, slots
from qwen3_jax.checkpoint.reading import CheckpointError, check_size, parse_json, system_errors
from qwen3_jax.checkpoint.safetensors import read_header
from qwen3_jax.checkpoint.tensor import Box, Tensor
from qwen3_jax.config import Qwen3Config

FLOATS = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32)))
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE = "_scale_inv"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a slot's values come from.

    Attributes:
        slot: the tensor that the model wants.
        tensor: its bytes, in the slot's shape.
        scale: FP8 only: the scales, [ceil(out / block), ceil(in / block)].
        block: FP8 only: rows and columns that share a scale.
    """

    slot: Slot
    tensor: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (128, 128)

    @property
    def dtype(self) -> np.dtype:
        """What the values are in; bfloat16 for FP8."""
        return np.dtype(ml_dtypes.bfloat16) if self.scale is not None else self.tensor.dtype

    def read_box(self, box: Box) -> np.ndarray:
        """What a box of `slot.part` holds; FP8 is multiplied by its scales and rounded to bfloat16, whole rows at a time."""
        part = self.slot.part
        if self.scale is None:
            return self.tensor.reshaped(*part).read_box(box)
        rows = self.slot.shape[0] // part[0]  # of the hub's, for each of the part's
        values = self._dequantised(self.scale, box[0].start * rows, box[0].stop * rows)
        return values.reshape(-1, *part[1:])[(slice(None), *box[1:])]

    def _dequantised(self, scales: Tensor, first: int, last: int) -> np.ndarray:
        """Rows first..last in the hub's shape, multiplied in float32."""
        values = self.tensor.part(first, last).read()
        scale = cast(scales.read(), np.dtype(np.float32), scales.name)
        wide = values.astype(np.float32)
        rows, columns = self.block
        with np.errstate(over="ignore"):  # said below, by name
            for i in range(first // rows, -(-last // rows)):
                band = wide[max(i * rows - first, 0) : (i + 1) * rows - first]
                band *= np.repeat(scale[i], columns)[: band.shape[1]]
            rounded = wide.astype(self.dtype)
        if any_infinite(rounded) and np.isinf(rounded).any() and np.isfinite(scale).all():
            raise CheckpointError(
                f"{self.tensor.file}: {self.slot.name} times its scales of up to {scale.max():.4g} is more than bfloat16 holds"
            )
        return rounded


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, each file's header checked, the index held against the files.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: no weights, an index that points nowhere or outside, or files that hold other tensors than it says.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(f"{folder}: neither model.safetensors nor {index.name} is there")
        return read_header(single)
    with system_errors(index):
        weight_map = parse_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor name -> file, found {weight_map!r:.100}")
    found: dict[str, Tensor] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: {name} is said to be in {file!r:.100}: accepted is a file name")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: {file!r} points outside the folder: accepted is a plain file name")
        if not (folder / file).is_file():
            raise CheckpointError(f"{index}: {file!r} is not there")
    for file in sorted(set(weight_map.values())):
        here = read_header(folder / file)
        told = {name for name, value in weight_map.items() if value == file}
        if told != set(here):
            name = sorted(told ^ set(here))[0]
            raise CheckpointError(f"{folder / file}: the index and the file disagree about {name}")
        found |= here
    return found


def find_sources(config: Qwen3Config, tensors: dict[str, Tensor], where: Path) -> list[Source]:
    """A source for each tensor of the model, and none left over.

    Args:
        config: what the model needs.
        tensors: what there is.
        where: the folder, for messages.

    Returns:
        One Source per slot, in slot order.

    Raises:
        CheckpointError: missing or extra tensors, a wrong shape or dtype.
    """
    check_size(config, where, len(tensors), sum(math.prod(tensor.shape) for tensor in tensors.values()))
    left = dict(tensors)
    if "embed_tokens.weight" in left:  # saved from the bare backbone
        left = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in left.items()}
    _split_fused(left, config)
    wanted = slots(config)
    if config.tie_word_embeddings and "lm_head.weight" in left:
        # Redundant: held to what an untied model's would be, then left out with its scale.
        _source(config, dataclasses.replace(wanted[0], name="lm_head.weight"), left)
    missing = [slot.name for slot in wanted if slot.name not in left]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing: {_some(missing)}")
    found = [_source(config, slot, left) for slot in wanted]
    if left:
        raise CheckpointError(f"{where}: {len(left)} tensors belong to no layer of this config: {_some(sorted(left))}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _split_fused(left: dict[str, Tensor], config: Qwen3Config) -> None:
    """Replace fused expert tensors by their parts, named as the hub names experts."""
    e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
    fused = [name for name in left if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    layers = {name.rsplit(".", 1)[0]: name for name in fused}
    for name in left if fused else ():
        single = re.match(r"(.*\.experts)\.\d+\.", name)
        if single and single[1] in layers:
            raise CheckpointError(
                f"{left[name].file}: {name} is of one expert, and {layers[single[1]]} of all in that layer: accepted is either"
            )
    for name in fused:
        tensor = left.pop(name)
        prefix, kind = name.rsplit(".", 1)
        shape = (e, 2 * f, d) if kind == "gate_up_proj" else (e, d, f)
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor.file}: {name} has shape {list(tensor.shape)}; accepted is {list(shape)}")
        for expert in range(e):
            whole = tensor.part(expert, expert + 1).reshaped(*shape[1:])
            if kind == "down_proj":
                left[f"{prefix}.{expert}.down_proj.weight"] = whole
            else:
                left[f"{prefix}.{expert}.gate_proj.weight"] = whole.part(0, f)
                left[f"{prefix}.{expert}.up_proj.weight"] = whole.part(f, 2 * f)


def _source(config: Qwen3Config, slot: Slot, left: dict[str, Tensor]) -> Source:
    tensor = left.pop(slot.name)
    if tensor.shape != slot.shape:
        raise CheckpointError(
            f"{tensor.file}: {slot.name} has shape {list(tensor.shape)}; the config makes it {list(slot.shape)}"
        )
    if tensor.dtype in FLOATS:
        return Source(slot, tensor)
    quantization = config.quantization_config
    if tensor.dtype != FP8 or quantization is None:
        accepted = "bfloat16, float16 and float32" + (", and float8_e4m3 by its quantization_config" if quantization else "")
        raise CheckpointError(f"{tensor.file}: {slot.name} is {tensor.dtype}; accepted are {accepted}")
    if len(slot.shape) != 2:
        raise CheckpointError(
            f"{tensor.file}: {slot.name} is float8 of shape {list(slot.shape)}; float8 is read in 2 dimensions"
        )
    scale = left.pop(slot.name + SCALE, None)
    if scale is None:
        raise CheckpointError(f"{tensor.file}: {slot.name} is float8 and {slot.name}{SCALE} is missing")
    rows, columns = quantization.weight_block_size
    shape = (-(-slot.shape[0] // rows), -(-slot.shape[1] // columns))
    if scale.shape != shape or scale.dtype not in (*FLOATS, np.float64):
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {scale.dtype}{list(scale.shape)}; accepted is any float {list(shape)}"
        )
    return Source(slot, tensor, scale, (rows, columns))
