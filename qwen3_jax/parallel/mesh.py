"""The mesh: five named axes over all devices, laid out for the network that joins them.

    data      rows of the batch; joined across slices
    fsdp      rows of the batch, and a share of every weight, gathered where it is used
    expert    rows of the batch, and a share of the experts, which tokens travel to
    context   a share of every sequence
    tensor    a share of heads, MLP width and vocabulary

All five are always there, those that nobody asked for with size 1, so that no code asks which axes a mesh has.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")


class MeshError(ValueError):
    """A mesh that cannot be made or does not fit a model, with the arithmetic."""


def make_mesh(wish: str = "", *, slices: int = 1, devices: Sequence[jax.Device] | None = None, **axes: int) -> Mesh:
    """A mesh with Explicit axes, in an order of devices that suits the chips' network.

    Args:
        wish: sizes by name, "fsdp=8,expert=2"; one may be -1, which takes what is left; axes not named have size 1.
        slices: how many groups of devices a slower network joins; `data` runs across them.
        devices: in place of all devices; compile-only ones do as well.
        **axes: sizes by name, instead of or beside `wish`.

    Returns:
        The mesh, its axes in the order of AXES.

    Raises:
        MeshError: an unknown axis, a size that is none, sizes whose product is not the number of devices, slices that do not
            divide `data`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(wish, len(devices), axes)
    check_slices(sizes, slices)
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(_ordered(shape, slices, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def axis_sizes(wish: str, count: int, axes: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """The size of every axis that a wish means.

    Args:
        wish: as of `make_mesh`.
        count: devices.
        axes: sizes by name, beside the wish.

    Returns:
        Axis -> size, in the order of AXES.

    Raises:
        MeshError: an unknown axis, a size that is none, sizes whose product is not the number of devices.
    """
    asked: dict[str, int] = {}
    pairs = [part.partition("=") for part in wish.replace(" ", "").split(",") if part]
    for name, size in [*((name, size) for name, _, size in pairs), *axes.items()]:
        if name not in AXES:
            raise MeshError(f"mesh axis {name!r}: accepted are {', '.join(AXES)}")
        if name in asked:
            raise MeshError(f"mesh axis {name} is given twice")
        try:
            asked[name] = int(str(size))
        except ValueError:
            raise MeshError(f"mesh axis {name}={size}: accepted is a whole number, or -1 for what is left") from None
        if asked[name] < 1 and asked[name] != -1:
            raise MeshError(f"mesh axis {name}={size}: accepted is a whole number from 1, or -1 for what is left")
    open_axes = [name for name, size in asked.items() if size == -1]
    if len(open_axes) > 1:
        raise MeshError(f"mesh axes {' and '.join(open_axes)} are both -1: accepted is one")
    given = math.prod(size for size in asked.values() if size != -1)
    said = " x ".join(f"{name}={size}" for name, size in asked.items() if size != -1) or "nothing"
    if open_axes:
        if count % given:
            raise MeshError(f"{said} is {given}, which does not divide the {count} devices: nothing is left for {open_axes[0]}")
        asked[open_axes[0]] = count // given
    elif given != count:
        raise MeshError(f"{said} is {given}, and there are {count} devices: accepted is a product of {count}, or one axis -1")
    return {axis: asked.get(axis, 1) for axis in AXES}


def check_slices(sizes: Mapping[str, int], slices: int) -> None:
    """Refuse slices that a mesh cannot be cut into.

    Args:
        sizes: axis -> size.
        slices: as of `make_mesh`.

    Raises:
        MeshError: they do not divide `data`.
    """
    data = sizes["data"]
    if slices < 1 or data % slices:
        raise MeshError(f"slices={slices} with data={data}: accepted are slices that divide data, which runs across them")


def _ordered(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    groups = sorted({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 and len(groups) > 1 and devices[0].platform == "tpu":
        raise MeshError(
            f"the devices belong to {len(groups)} slices: accepted is slices={len(groups)}, with data a multiple of it"
        )
    if slices == 1:
        # A torus that cannot be cut along its own axes is cut across them rather than refused.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = (shape[0] // slices, *shape[1:])
    if len(groups) == slices:
        across = (slices, *(1,) * (len(shape) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    if len(groups) > 1:
        raise MeshError(f"slices={slices}: the devices belong to {len(groups)} slices")
    # Devices that know of no slices, as those of a CPU: consecutive ones are taken for one.
    size = len(devices) // slices
    parts = [
        mesh_utils.create_device_mesh(within, devices[i * size : (i + 1) * size], allow_split_physical_axes=True)
        for i in range(slices)
    ]
    return np.concatenate(parts, axis=0)


def mesh_of(tree: object) -> Mesh | None:
    """The mesh that the arrays of a tree lie on.

    Args:
        tree: any pytree, a model for instance; abstract leaves with a sharding count as well.

    Returns:
        The mesh of the first leaf that has one; None where none has, and under jit.
    """
    for leaf in jax.tree.leaves(tree):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def on_mesh_of(tree: object, *, by_shape: bool = True) -> contextlib.AbstractContextManager[object]:
    """Set the mesh that a tree's arrays lie on, for the length of a block; none where they lie on single devices.

    Traced arrays know the mesh that they will lie on, so this holds under jit and vmap too. What is set stays where the tree
    does not say: where its arrays are abstract, or traced on no mesh.

    Args:
        tree: any pytree.
        by_shape: under jit and vmap the mesh can be set by its shape alone, which a program is traced under, and no operation
            outside of one can run under: vmap's, where no jit is around it. False sets none there.

    Returns:
        For a `with` statement.

    Raises:
        MeshError: under jit, where another mesh is set already.
    """
    mesh, leaves = mesh_of(tree), jax.tree.leaves(tree)
    traced = [jax.typeof(leaf).sharding.mesh for leaf in leaves if isinstance(leaf, jax.core.Tracer)]
    shape = next((found for found in traced if not found.empty), None) if mesh is None else mesh.abstract_mesh
    if mesh is not None or any(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        try:
            return jax.set_mesh(mesh)
        except ValueError:
            pass  # under jit and vmap
    current = jax.sharding.get_abstract_mesh()
    if shape is None or shape == current or not by_shape:
        return contextlib.nullcontext()
    if not current.empty:
        raise MeshError(f"the arrays lie on {said(shape)}, and {said(current)} is set: accepted under jit is one mesh")
    return jax.sharding.use_abstract_mesh(shape)


def said(mesh: Mesh | AbstractMesh) -> str:
    """The mesh in words, for messages: "a mesh of data=2 x tensor=4"."""
    return "a mesh of " + (" x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device")
