"""A model between a mesh and a disk, a layer of a parameter at a time: no process ever holds the whole.

Each process reads and writes its share of every layer, in a layout that suits the disk (`disk_route`); devices exchange what
lies elsewhere. Words, which have no layer axis, are read and written where they lie, by runs of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.checkpoint.casting import cast
from qwen3_jax.checkpoint.layout import box_of, disk_route, local_boxes
from qwen3_jax.checkpoint.names import BLOCK, Slot
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.tensor import Box, Place, extents
from qwen3_jax.checkpoint.together import Team
from qwen3_jax.checkpoint.weights import Weights, read_ahead

Unit = tuple[str, tuple[int, ...]]  # a parameter's path, and (repeat,); () where it has no layer axis


@dataclasses.dataclass(frozen=True)
class Share:
    """What some of this process's devices hold of a layer of a parameter."""

    unit: Unit
    box: Box
    devices: tuple[jax.Device, ...]


@dataclasses.dataclass(frozen=True)
class Way:
    """The shape of a layer of a parameter, and its layouts from the mesh's own to the disk's."""

    shape: tuple[int, ...]
    mesh: Mesh
    route: tuple[PartitionSpec, ...]


def load(weights: Weights, shapes: Mapping[str, jax.ShapeDtypeStruct], team: Team) -> dict[str, jax.Array]:
    """The parameters of a model on a mesh.

    Args:
        weights: where from.
        shapes: of each parameter that is wanted, by its path, with its dtype and its NamedSharding.
        team: the processes of the mesh, every one of which calls this.

    Returns:
        These parameters; rows that pad the vocabulary are zero.

    Raises:
        CheckpointError: as of `Weights.read_box`, of this or another process.
    """
    units = {unit: parts for unit, parts in _units(weights.slots()).items() if unit[0] in shapes}
    ways = {unit: _way(unit, shapes[unit[0]]) for unit in units}
    shares = [
        Share(unit, box, devices)
        for unit, way in ways.items()
        for box, devices in local_boxes(NamedSharding(way.mesh, way.route[-1]), way.shape)
    ]
    failing = _Failing(team)

    def read(share: Share) -> np.ndarray:
        path, repeat = share.unit
        values = np.zeros(extents(share.box), shapes[path].dtype)
        for slot in units[share.unit]:
            failing.attempt(_read_slot, weights, slot, share.box, values)
        return values

    total = sum(math.prod(extents(share.box)) * shapes[share.unit[0]].dtype.itemsize for share in shares)
    whole: dict[str, jax.Array] = {}
    held: list[jax.Array] = []
    with team.agreed():
        for share, values in read_ahead(shares, read, lambda values: values.nbytes, total, "reading"):
            held += [jax.device_put(values, device) for device in share.devices]
            del values
            (path, repeat), way = share.unit, ways[share.unit]
            if len(held) < len(way.mesh.local_devices):
                continue
            piece = jax.make_array_from_single_device_arrays(way.shape, NamedSharding(way.mesh, way.route[-1]), held)
            held = []
            if not repeat:
                whole[path] = piece
                continue
            wanted = shapes[path]
            with jax.set_mesh(way.mesh):
                if path not in whole:
                    whole[path] = jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)
                whole[path] = _placed(whole[path], piece, repeat[0], way.route)
            del piece
            whole[path].block_until_ready()  # one layer is on its way, no queue of them
        failing.now()
    return whole


def _read_slot(weights: Weights, slot: Slot, box: Box, values: np.ndarray) -> None:
    """Put what a box holds of a slot into its place among the box's values, a block of rows at a time."""
    if len(slot.index) == 2:  # one of the layer's experts, whose axis leads
        expert = slot.index[1] - box[0].start
        if 0 <= expert < len(values):
            values[expert] = cast(weights.read_box(slot, box[1:]), values.dtype, slot.name)
        return
    for rows in _blocks(slot, box):
        found = weights.read_box(slot, (rows, *box[1:]))
        values[rows.start - box[0].start : rows.stop - box[0].start] = cast(found, values.dtype, slot.name)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _placed(stack: jax.Array, piece: jax.Array, repeat: int | jax.Array, route: tuple[PartitionSpec, ...]) -> jax.Array:
    """The stack with one layer of it, which comes in the route's last layout."""
    for spec in reversed(route[:-1]):
        piece = jax.sharding.reshard(piece, spec)
    return jax.lax.dynamic_update_slice_in_dim(stack, piece[None], repeat, axis=0)


@functools.partial(jax.jit, static_argnums=2)
def _layer(stack: jax.Array, repeat: int | jax.Array, route: tuple[PartitionSpec, ...]) -> jax.Array:
    """One layer of a stack in the route's last layout."""
    piece = jax.lax.dynamic_index_in_dim(stack, repeat, axis=0, keepdims=False)
    for spec in route[1:]:
        piece = jax.sharding.reshard(piece, spec)
    return piece


_copied = jax.jit(jnp.copy)


def save(
    params: Mapping[str, jax.Array],
    slots: list[Slot],
    places: Callable[[Slot], Place],
    dtypes: Mapping[str, np.dtype],
    team: Team,
) -> None:
    """Write this process's share of a model into files that are there in their full size.

    Args:
        params: the parameters on the mesh, by path.
        slots: every tensor.
        places: where each lies, in the shape of `slot.part`.
        dtypes: of each in its file, by name.
        team: the processes of the mesh, every one of which calls this.

    Raises:
        CheckpointError: the disk refuses, or a value that a dtype cannot hold, on this process. It has then taken part in all
            exchanges: the caller agrees with the others.
    """
    failing = _Failing(team)
    for unit, parts in _units(slots).items():
        path, repeat = unit
        way = _way(unit, params[path])
        with jax.set_mesh(way.mesh):
            # An array of its own: jax keeps what the host has read of an array for as long as that lives.
            piece = _layer(params[path], repeat[0], way.route) if repeat else _copied(params[path])
        for shard in piece.addressable_shards:
            if shard.replica_id == 0:
                failing.attempt(_write_shard, shard.data, box_of(shard.index, piece.shape), parts, places, dtypes)
    failing.now()


def _write_shard(
    data: jax.Array, box: Box, parts: list[Slot], places: Callable[[Slot], Place], dtypes: Mapping[str, np.dtype]
) -> None:
    """Write what a shard holds of each of a unit's slots."""
    values = np.asarray(data)
    for slot in parts:
        dtype, place = dtypes[slot.name], places(slot)
        if len(slot.index) == 2:
            expert = slot.index[1] - box[0].start
            if 0 <= expert < len(values):
                place.write_box(box[1:], cast(values[expert], dtype, slot.name))
            continue
        for rows in _blocks(slot, box):
            here = slice(rows.start - box[0].start, rows.stop - box[0].start)
            place.write_box((rows, *box[1:]), cast(values[here], dtype, slot.name))


def _blocks(slot: Slot, box: Box) -> Iterator[slice]:
    """Rows of a slot that a box holds, some at a time where they are words; rows that pad the vocabulary are none of it."""
    last = min(box[0].stop, slot.part[0])
    step = last if slot.index else max(1, BLOCK // math.prod(slot.part[1:]))
    for first in range(box[0].start, last, step):
        yield slice(first, min(first + step, last))


def _units(slots: list[Slot]) -> dict[Unit, list[Slot]]:
    """Tensors by the layer of a parameter that they make, in the order in which they lie on the hub."""
    units: dict[Unit, list[Slot]] = {}
    for slot in slots:
        units.setdefault((slot.path, slot.index[:1]), []).append(slot)
    return units


def _way(unit: Unit, parameter: Any) -> Way:
    """How a layer of a parameter, or of its shape, travels."""
    shape, mesh, spec = parameter.shape, parameter.sharding.mesh, parameter.sharding.spec
    if not unit[1]:
        return Way(shape, mesh, (spec,))
    shape, spec = shape[1:], PartitionSpec(*spec[1:])
    return Way(shape, mesh, disk_route(shape, spec, mesh, parameter.dtype.itemsize))


class _Failing:
    """The first error of a process, kept until nobody waits for it any more; alone it is raised at once."""

    def __init__(self, team: Team):
        self._team = team
        self._error: CheckpointError | None = None

    def attempt(self, work: Callable[..., None], *args: Any) -> None:
        """Do work(*args), unless something has failed before."""
        if self._error is None:
            try:
                work(*args)
            except CheckpointError as error:
                if self._team.size == 1:
                    raise
                self._error = error

    def now(self) -> None:
        """Raise what was kept."""
        if self._error is not None:
            raise self._error
