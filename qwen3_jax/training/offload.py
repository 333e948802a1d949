"""Optimizer state in host memory: a step fetches it, and puts what follows it back."""

from typing import Any

import jax


def to_host(tree: Any) -> Any:
    """Arrays in pinned host memory of the machines that hold them; scalars stay.

    Args:
        tree: arrays, or jax.ShapeDtypeStructs with shardings.

    Returns:
        The same, laid out alike.
    """

    def moved(leaf: Any) -> Any:
        if not leaf.ndim:
            return leaf
        sharding = leaf.sharding.with_memory_kind("pinned_host")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(moved, tree)


def fetched(tree: Any) -> Any:
    """Within a step: what lies in host memory, on the device.

    Args:
        tree: tracers.

    Returns:
        The tree, all of it on the device.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if _on_host(leaf) else leaf, tree)


def put_back(new: Any, old: Any) -> Any:
    """Within a step: a new tree where the old one lay.

    Args:
        new: tracers on the device.
        old: tracers of the same form.

    Returns:
        The new tree.
    """
    return jax.tree.map(
        lambda after, before: jax.device_put(after, jax.memory.Space.Host) if _on_host(before) else after, new, old
    )


def _on_host(leaf: Any) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host
