"""How the shards of a parameter meet the bytes of a file.

A mesh cuts weights along any axis. Cut along the last one, a shard is thousands of short runs of a file, to be read at a disk's
worst or with all that lies between. So a layer passes between disk and mesh in a layout of its own, cut along its first axes
by the same mesh axes, and the devices exchange the rest: a process reads and writes no more bytes than its own shards have.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qwen3_jax.checkpoint.tensor import LONG_RUN, Box


def disk_route(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh, itemsize: int
) -> tuple[PartitionSpec, ...]:
    """Layouts from a mesh's own to one whose shards are long runs of a file: what makes short ones moves to earlier axes.

    Args:
        shape: one layer's part of a parameter.
        spec: its layout on the mesh.
        mesh: the mesh.
        itemsize: bytes of a value in the file.

    Returns:
        The mesh's own layout first; each next one has moved one mesh axis, for that is one exchange of equal parts (of two at
        once XLA makes copies of the whole). A mesh axis that divides no earlier axis stays where it is.
    """
    axes = [_axes_of(part) for part in (*spec, *[None] * (len(shape) - len(spec)))]
    sizes = [size // math.prod(mesh.shape[axis] for axis in part) for size, part in zip(shape, axes, strict=True)]
    route = [_spec_of(axes)]
    for last in range(len(shape) - 1, 0, -1):
        if math.prod(sizes[:last]) == 1 or math.prod(sizes[last:]) * itemsize >= LONG_RUN:
            break
        for axis in reversed(axes[last]):
            taker = next((i for i in range(last) if sizes[i] % mesh.shape[axis] == 0), None)
            if taker is not None and mesh.shape[axis] > 1:
                axes[last] = tuple(kept for kept in axes[last] if kept != axis)
                axes[taker] = (*axes[taker], axis)
                sizes[last] *= mesh.shape[axis]
                sizes[taker] //= mesh.shape[axis]
                route.append(_spec_of(axes))
        if sizes[last] != shape[last]:
            break
    return tuple(route)


def local_boxes(sharding: NamedSharding, shape: tuple[int, ...]) -> list[tuple[Box, tuple[jax.Device, ...]]]:
    """What this process's devices hold of an array, each box once.

    Args:
        sharding: the array's.
        shape: the array's.

    Returns:
        Each box with the devices that hold it.
    """
    found: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        sides = tuple((side.start, side.stop) for side in box_of(index, shape))
        found.setdefault(sides, []).append(device)
    return [(tuple(slice(*side) for side in sides), tuple(devices)) for sides, devices in found.items()]


def box_of(index: Any, shape: tuple[int, ...]) -> Box:
    """A shard's index, a tuple of slices, with every start and stop."""
    return tuple(slice(*side.indices(size)[:2]) for side, size in zip(index, shape, strict=True))


def _axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _spec_of(axes: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in axes))
