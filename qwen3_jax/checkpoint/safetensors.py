"""The safetensors format: headers checked before anything is read, tensors read and written one at a time.

A file is 8 bytes of header length (little endian), a JSON header of name -> dtype, shape, [begin, end), then the data, which
the tensors must tile without a gap (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen3_jax.checkpoint.reading import CheckpointError, parse_json, system_errors
from qwen3_jax.checkpoint.tensor import Tensor, start_writeback, write_all

MAX_HEADER = 100_000_000  # bytes, the format's own bound
MAX_SIZE = 2**63  # bytes that no file has
MAX_AXES = 32

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, after checking that header and data agree.

    Args:
        file: a .safetensors file.

    Returns:
        Tensors by name, in the order of their data.

    Raises:
        CheckpointError: names the file, and the tensor where one is at fault.
    """
    with system_errors(file), open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{file}: {size} bytes are no safetensors file")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{file}: its header claims {length} bytes; the file has {size}, the format allows {MAX_HEADER}"
            )
        header = parse_json(handle.read(length), f"{file}: its header")
    found = [
        (_tensor(file, name, entry, 8 + length), entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    found.sort(key=lambda item: item[1])
    at = 0
    for tensor, (begin, end) in found:
        if end - begin != tensor.nbytes:
            raise CheckpointError(
                f"{file}: {tensor.name} has {end - begin} bytes; its dtype and shape {list(tensor.shape)} need {tensor.nbytes}"
            )
        if begin != at:
            how = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise CheckpointError(f"{file}: {tensor.name} begins at byte {begin} and {how}, which ends at {at}")
        at = end
    if 8 + length + at != size:
        raise CheckpointError(f"{file}: its tensors need {8 + length + at} bytes, the file has {size}: cut off, or not its own")
    return {tensor.name: tensor for tensor, _ in found}


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _tensor(file: Path, name: str, entry: Any, data: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: {name} must have dtype, shape and data_offsets, found {entry!r:.200}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r:.200}; read are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_natural, shape)) or math.prod(shape) >= MAX_SIZE:
        raise CheckpointError(f"{file}: {name} has shape {shape!r:.200}; accepted is a list of sizes that a file can hold")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_natural, offsets)) and offsets[0] <= offsets[1]):
        raise CheckpointError(f"{file}: {name} has data_offsets {offsets!r:.200}; accepted is [begin, end]")
    return Tensor(file, name, DTYPES[dtype], tuple(shape), data + offsets[0])


@dataclasses.dataclass(frozen=True)
class Plan:
    """A file to be written: its tensors in order, with what each will be."""

    file: Path
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        """Bytes of data, the header left out."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())

    def places(self) -> dict[str, Tensor]:
        """Where each tensor lies in the file, by its name."""
        at, found = len(header_bytes(self.tensors)), {}
        for name, (dtype, shape) in self.tensors.items():
            found[name] = Tensor(self.file, name, dtype, shape, at)
            at += found[name].nbytes
        return found

    def create(self) -> None:
        """Make the file with its header and its full size; its data is zeros."""
        header = header_bytes(self.tensors)
        with open(self.file, "xb", buffering=0) as handle:
            write_all(handle, header)
            handle.truncate(len(header) + self.nbytes)


def header_bytes(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """What stands before the data: the header's length and the header.

    Args:
        tensors: dtype and shape of each, in the order of their data.

    Returns:
        A multiple of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_file(plan: Plan, arrays: Iterator[np.ndarray]) -> None:
    """Write a file tensor by tensor, and fsync it.

    Args:
        plan: what it will hold.
        arrays: the tensors in the plan's order, each in the plan's dtype and shape, whole or as runs of its rows that follow
            one another; each is dropped once written.

    Raises:
        CheckpointError: an array that is not the planned one.
    """
    with open(plan.file, "xb", buffering=0) as handle:
        write_all(handle, header_bytes(plan.tensors))
        for name, (dtype, shape) in plan.tensors.items():
            rows = 0
            while rows < shape[0]:
                array = next(arrays)
                if array.dtype != dtype or array.shape[1:] != shape[1:] or rows + len(array) > shape[0]:
                    raise CheckpointError(
                        f"{plan.file}: {name} is {array.dtype}{list(array.shape)}, planned {dtype}{list(shape)}"
                    )
                write_all(handle, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                rows += len(array)
            start_writeback(handle)
        os.fsync(handle.fileno())
