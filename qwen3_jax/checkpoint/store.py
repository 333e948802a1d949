"""The native form: an Orbax checkpoint on TensorStore, with a model's config and tokenizer beside it in one folder.

Each parameter of the tree is one zarr3 array named by its path (`segments.0.blocks.0.moe.gate`), uncompressed, a chunk for each
layer and expert ([1, 1, ...]), so that whoever restores reads the slices it wants and no more. A chunk is a file: OCDBT, which
Orbax uses by default, wrote the same chunks at 0.24-0.54 GB/s where files made 0.9-1.5. Orbax's own PyTreeRestore and
StandardRestore read it; and what Orbax has written of such a tree, OCDBT or not, zarr 2 or 3, is read here.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from qwen3_jax.checkpoint.casting import cast, holding
from qwen3_jax.checkpoint.names import GLOBAL, LAYER, Slot, slots, stacked_shape
from qwen3_jax.checkpoint.reading import CheckpointError, check_size, parse_json, system_errors
from qwen3_jax.checkpoint.source import FLOATS
from qwen3_jax.checkpoint.tensor import Box, Place, Tensor
from qwen3_jax.checkpoint.weights import Block, Weights
from qwen3_jax.config import Qwen3Config

METADATA = "_METADATA"
HUB_DTYPES = "hub_dtypes"  # in METADATA's custom_metadata: tensor name -> dtype, of tensors narrower than their array
IN_FLIGHT = 4  # writes at a time,
IN_FLIGHT_BYTES = 2**26  # or one, where that alone has more bytes


def is_store(folder: Path) -> bool:
    """Whether a folder holds an Orbax checkpoint."""
    return (folder / METADATA).is_file()


def chunk_shape(slot: Slot) -> tuple[int, ...]:
    """The chunks of the parameter that a slot is a part of: one layer's, one expert's; an embedding's by blocks of rows."""
    if slot.index:
        return (1,) * len(slot.index) + slot.part
    return (slot.block_rows, *slot.part[1:])


def chunk_files(folder: Path, slot: Slot, dtype: np.dtype) -> Place:
    """The files of a native checkpoint that hold a tensor.

    Args:
        folder: the checkpoint.
        slot: the tensor.
        dtype: of its array.

    Returns:
        Its place, in the shape of `slot.part`.
    """
    shape = chunk_shape(slot)[len(slot.index) :]
    zeros = ("0",) * (len(shape) - 1)
    if slot.index:
        files = ["/".join((*map(str, slot.index), "0", *zeros))]
    else:
        files = ["/".join((str(chunk), *zeros)) for chunk in range(-(-slot.shape[0] // slot.block_rows))]
    return Place(tuple(Tensor(folder / slot.path / "c" / file, slot.name, dtype, shape, 0) for file in files))


def open_store(folder: Path) -> Weights:
    """A native checkpoint, every array checked against the config, every raw chunk there and of its size.

    Args:
        folder: written by `write_store`, or by Orbax with a config.json put beside.

    Returns:
        Its tensors.

    Raises:
        CheckpointError: arrays missing, left over, of a wrong shape or dtype; a chunk missing or cut off.
        ConfigError: a config.json that is refused.
    """
    config = Qwen3Config.from_hf(folder)
    metadata = _metadata(folder)
    there = {".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()}
    context, shorts = _context(), {short for _, short in (*GLOBAL, *LAYER)}
    arrays = {
        path: _open(folder, path, _spec(folder, path, metadata), context)
        for path in sorted(there)
        if re.sub(r"^segments\.[0-9]+\.blocks\.[0-9]+\.", "", path) in shorts
    }
    # Before anything of the config's size is built.
    layers = sum(array.shape[0] for path, array in arrays.items() if path.startswith("segments.") and array.shape)
    check_size(config, folder, layers, sum(math.prod(array.shape) for array in arrays.values()))
    by_path: dict[str, Slot] = {slot.path: slot for slot in slots(config)}
    if missing := sorted(set(by_path) - there):
        raise CheckpointError(f"{folder}: {len(missing)} parameters are missing: {', '.join(missing[:5])}")
    if extra := sorted(there - set(by_path)):
        raise CheckpointError(f"{folder}: {len(extra)} parameters belong to no layer of this config: {', '.join(extra[:5])}")
    for path, array in arrays.items():
        wanted = stacked_shape(by_path[path], config)
        if array.shape != wanted:
            raise CheckpointError(f"{folder}: {path} has shape {list(array.shape)}; the config makes it {list(wanted)}")
        if array.dtype.numpy_dtype not in FLOATS:
            raise CheckpointError(f"{folder}: {path} is {array.dtype.name}; accepted are bfloat16, float16 and float32")
    dtypes = {slot.name: arrays[slot.path].dtype.numpy_dtype for slot in slots(config)}
    dtypes |= _hub_dtypes(folder, metadata, dtypes)
    files, raw = {}, set()
    for path, array in arrays.items():
        files[path] = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
        if (chunk := _raw_chunk(array)) is not None:
            _check_chunks(folder / path, path, array, chunk)
            if chunk == chunk_shape(by_path[path]):
                raw.add(path)

    def read_box(slot: Slot, box: Box) -> np.ndarray:
        array = arrays[slot.path]
        if slot.path in raw:  # TensorStore reads no less than a chunk
            values = chunk_files(folder, slot, array.dtype.numpy_dtype).read_box(box)
        else:
            with _store_errors(folder, slot.path):
                values = np.asarray(array[(*slot.index, *box)].read().result())
        return cast(values, dtypes[slot.name], slot.name)

    return Weights(
        config=config,
        form="Orbax",
        dtypes=dtypes,
        read_box=read_box,
        folder=folder,
        files=files,
    )


def write_store(
    part: Path,
    config: Qwen3Config,
    dtypes: Mapping[str, np.dtype],
    blocks: Iterable[Block],
    hub_dtypes: Mapping[str, np.dtype],
) -> None:
    """Write a native checkpoint's arrays, one chunk at a time, at most four in flight, and Orbax's metadata last.

    Args:
        part: an empty folder.
        config: the model's.
        dtypes: of each tensor, by its name; one for all of a parameter.
        blocks: the values of every slot, in any order.
        hub_dtypes: what tensors are in on the hub, where that is narrower.

    Raises:
        CheckpointError: the disk refuses. No write is in flight then.
    """
    arrays = _create_arrays(part, config, dtypes)
    writing: deque[tuple[str, int, Any]] = deque()

    def finish(most: int, most_bytes: int) -> None:
        while len(writing) > most or sum(nbytes for _, nbytes, _ in writing) > most_bytes:
            path, _, commit = writing.popleft()
            with _store_errors(part, path):
                commit.result()

    try:
        for block in blocks:
            slot = block.slot
            if slot.index:
                target, values = arrays[slot.path][slot.index], block.values.reshape(slot.part)
            else:
                target, values = arrays[slot.path][block.first : block.first + len(block.values)], block.values
            finish(IN_FLIGHT - 1, max(IN_FLIGHT_BYTES - values.nbytes, 0))
            # Blocks are never written to again: no copy of them is needed.
            commit = target.write(values, can_reference_source_data_indefinitely=True).commit
            writing.append((slot.path, values.nbytes, commit))
        finish(0, 0)
    finally:
        # After an error the folder is removed: nothing may still be written into it.
        for _, _, commit in writing:
            commit.exception()
    _write_metadata(part, arrays, hub_dtypes)


def create_store(part: Path, config: Qwen3Config, dtypes: Mapping[str, np.dtype]) -> None:
    """Make a native checkpoint whose every value is zero, to be filled where `chunk_files` says.

    Args:
        part: an empty folder.
        config: the model's.
        dtypes: of each tensor, by its name; one for all of a parameter.

    Raises:
        CheckpointError: the disk refuses.
    """
    _write_metadata(part, _create_arrays(part, config, dtypes), {})
    for slot in slots(config):
        for chunk in chunk_files(part, slot, dtypes[slot.name]).tensors:
            chunk.file.parent.mkdir(parents=True, exist_ok=True)
            with open(chunk.file, "xb") as handle:
                handle.truncate(chunk.nbytes)


def _write_metadata(part: Path, paths: Iterable[str], hub_dtypes: Mapping[str, np.dtype]) -> None:
    # As numpy arrays, which Orbax restores without being told a sharding; one that is told gives jax arrays all the same.
    tree = {}
    for path in paths:
        keys = path.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: key of a dict
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    content = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": {HUB_DTYPES: {name: dtype.name for name, dtype in hub_dtypes.items()}} if hub_dtypes else None,
    }
    (part / METADATA).write_text(json.dumps(content), "utf-8")


def _context() -> ts.Context:
    # No cache, or its memory grows with what is read; no sync of each chunk, for the folder is synced once as a whole.
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})


def _create_arrays(part: Path, config: Qwen3Config, dtypes: Mapping[str, np.dtype]) -> dict[str, Any]:
    context = _context()
    arrays: dict[str, Any] = {}
    for slot in slots(config):
        if slot.path not in arrays:
            arrays[slot.path] = _create(part, slot, config, dtypes[slot.name], context)
    return arrays


def _create(part: Path, slot: Slot, config: Qwen3Config, dtype: np.dtype, context: ts.Context) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{part / slot.path}/"},
        "metadata": {
            "shape": stacked_shape(slot, config),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape(slot)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,
    }
    with _store_errors(part, slot.path):
        return ts.open(spec, create=True, context=context).result()


def _open(folder: Path, path: str, spec: dict[str, Any], context: ts.Context) -> ts.TensorStore:
    with _store_errors(folder, path):
        return ts.open(spec, open=True, read=True, context=context).result()


def _spec(folder: Path, path: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if metadata.get("use_ocdbt"):
        # The base is no URL: a `#`, `?` or `%` in the folder's name means nothing.
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute()}/"}, "path": f"{path}/"}
    else:
        store = {"driver": "file", "path": f"{folder.absolute() / path}/"}
    # Without this a chunk that is gone reads as zeros.
    return {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": store, "fill_missing_data_reads": False}


def _metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    with system_errors(file):
        metadata = parse_json(file.read_bytes(), file)
    try:
        for entry in metadata["tree_metadata"].values():
            for key in entry["key_metadata"]:
                key["key"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: no metadata of an Orbax tree: {error!r}") from error
    return metadata


def _hub_dtypes(folder: Path, metadata: Mapping[str, Any], dtypes: Mapping[str, np.dtype]) -> dict[str, np.dtype]:
    """What `write_store` was told of tensors narrower than their array; nothing in what Orbax has written itself."""
    custom = metadata.get("custom_metadata")
    told = custom.get(HUB_DTYPES, {}) if isinstance(custom, dict) else {}
    if not isinstance(told, dict):
        raise CheckpointError(f"{folder / METADATA}: {HUB_DTYPES} is {told!r:.100}; accepted is an object of tensor -> dtype")
    floats, found = {dtype.name: dtype for dtype in FLOATS}, {}
    for name, given in told.items():
        dtype = floats.get(given) if isinstance(given, str) else None
        if name not in dtypes or dtype is None or holding(dtype, dtypes[name]) != dtypes[name]:
            raise CheckpointError(
                f"{folder / METADATA}: {HUB_DTYPES} has {name}: {given!r:.100}; accepted are this model's tensors, each with a "
                "dtype that its array's holds"
            )
        found[name] = dtype
    return found


def _raw_chunk(array: ts.TensorStore) -> tuple[int, ...] | None:
    """The shape of an array's chunks, where each is a file of plain bytes."""
    spec = array.spec().to_json()
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if spec["kvstore"]["driver"] != "file" or spec["metadata"].get("codecs") != plain:
        return None
    return tuple(spec["metadata"]["chunk_grid"]["configuration"]["chunk_shape"])


def _check_chunks(place: Path, path: str, array: ts.TensorStore, chunk: tuple[int, ...]) -> None:
    """Hold the sizes of raw chunk files against the array."""
    wanted = math.prod(chunk) * array.dtype.numpy_dtype.itemsize
    for index in np.ndindex(*(-(-size // step) for size, step in zip(array.shape, chunk, strict=True))):
        file = place.joinpath("c", *map(str, index))
        found = file.stat().st_size if file.is_file() else None
        if found != wanted:
            what = "is not there" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{file}: a chunk of {path} {what}; it needs {wanted}")


@contextlib.contextmanager
def _store_errors(folder: Path, path: str) -> Iterator[None]:
    """Turn what TensorStore makes of any failure, a ValueError, into one line."""
    try:
        yield
    except ValueError as error:
        reason = re.split(r" \[(?:tensorstore_spec|source locations)=", str(error))[0]
        raise CheckpointError(f"{folder}: {path}: {reason}") from error
