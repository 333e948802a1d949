"""What the grouped matmul becomes under jax.vmap.

Batched plainly, a loop with a traced number of steps runs for the longest of the batch and gathers one matrix a row.
Here a batch that shares its matrices is sorted into one grouped matmul, and any other is done one after the other.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped_matmul import blocked, gpu, reference, tpu
from pallas_kernels.late import on_cuda


def grouped_matmul(
    lhs: Float[Array, "M _"],
    rhs: Float[Array, "*L G _ _"],
    group_sizes: Int32[Array, " G"],
    layer: Int32[Array, ""] | None,
    transpose_rhs: bool,
    implementation: str,
) -> Float[Array, "M outer"]:
    """Calls the implementation by name; under vmap with shared matrices it becomes one call with all rows.

    Args:
        lhs: rows sorted by group.
        rhs: the matrices, or a stack of layers of them.
        group_sizes: rows of each group.
        layer: which of a stack.
        transpose_rhs: the orientation of rhs.
        implementation: "auto", "tpu", "blocked" or "reference".

    Returns:
        In lhs's dtype; rows of no group are zero.
    """
    layers = () if layer is None else (layer,)
    return _matmul(transpose_rhs, implementation)(lhs, rhs, group_sizes, *layers)


def grouped_outer(
    left: Float[Array, "M p"],
    right: Float[Array, "M q"],
    group_sizes: Int32[Array, " G"],
    dtype: jnp.dtype,
    implementation: str,
) -> Float[Array, "G p q"]:
    """Calls the implementation by name; under vmap one after the other.

    Args:
        left: rows sorted by group.
        right: the same rows of another array.
        group_sizes: rows of each group.
        dtype: of the result.
        implementation: "auto", "tpu", "blocked" or "reference".

    Returns:
        The sum of the outer products of each group's rows.
    """
    return _outer(jnp.dtype(dtype), implementation)(left, right, group_sizes)


@functools.cache
def _matmul(transpose_rhs: bool, implementation: str) -> Callable[..., Array]:
    @custom_vmap
    def run(lhs: Array, rhs: Array, group_sizes: Array, *layers: Array) -> Array:
        return _chosen(functools.partial(_matmul_by, transpose_rhs), implementation, lhs, rhs, group_sizes, *layers)

    @run.def_vmap
    def batched(size: int, is_batched: Sequence[bool], lhs: Array, rhs: Array, sizes: Array, *layers: Array):
        if is_batched[1] or any(is_batched[3:]):
            return _one_by_one(run, is_batched, (lhs, rhs, sizes, *layers)), True
        lhs = lhs if is_batched[0] else jnp.broadcast_to(lhs, (size, *lhs.shape))
        sizes = sizes if is_batched[2] else jnp.broadcast_to(sizes, (size, *sizes.shape))
        rows, groups = lhs.shape[1], sizes.shape[1]
        # The rows of every group of the whole batch side by side; rows of no group get the group past the last.
        row = jnp.arange(rows, dtype=jnp.int32)
        group = jax.vmap(lambda ends: jnp.searchsorted(ends, row, side="right"))(jnp.cumsum(sizes, axis=1))
        order = jnp.argsort(jnp.minimum(group, groups).reshape(-1), stable=True)
        out = run(lhs.reshape(size * rows, -1)[order], rhs, sizes.sum(axis=0, dtype=jnp.int32), *layers)
        return jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(size, rows, -1), True

    return run


@functools.cache
def _outer(dtype: jnp.dtype, implementation: str) -> Callable[..., Array]:
    @custom_vmap
    def run(left: Array, right: Array, group_sizes: Array) -> Array:
        return _chosen(functools.partial(_outer_by, dtype), implementation, left, right, group_sizes)

    @run.def_vmap
    def batched(size: int, is_batched: Sequence[bool], *args: Array):
        return _one_by_one(run, is_batched, args), True

    return run


def _chosen(run: Callable[..., Array], implementation: str, *args: Array) -> Array:
    """run(implementation, *args); "auto" is decided by the platform that the program is lowered for."""
    if implementation != "auto":
        return run(implementation, *args)
    branches, rows = {}, args[0]
    if rows.dtype in (jnp.bfloat16, jnp.float32):  # megablox takes no others
        branches["tpu"] = functools.partial(run, "tpu")
    like = jax.eval_shape(functools.partial(run, "blocked"), *args)
    if gpu.fits(rows.dtype, rows.shape[1], like.shape[-1]):
        branches["cuda"] = on_cuda(functools.partial(run, "gpu"), like)
    return jax.lax.platform_dependent(*args, **branches, default=functools.partial(run, "blocked"))


def _matmul_by(transpose_rhs: bool, implementation: str, lhs: Array, rhs: Array, group_sizes: Array, *layers: Array) -> Array:
    layer = layers[0] if layers else None
    if implementation == "tpu":
        return tpu.grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs)
    if implementation == "gpu":
        return gpu.grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs)
    if implementation == "blocked":
        return blocked.grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs)
    matrices = rhs if layer is None else jax.lax.dynamic_index_in_dim(rhs, layer, 0, keepdims=False)
    return reference.grouped_matmul(lhs, matrices, group_sizes, transpose_rhs)


def _outer_by(dtype: jnp.dtype, implementation: str, left: Array, right: Array, group_sizes: Array) -> Array:
    modules = {"tpu": tpu, "gpu": gpu, "blocked": blocked, "reference": reference}
    return modules[implementation].grouped_outer(left, right, group_sizes, dtype)


def _one_by_one(run: Callable[..., Array], is_batched: Sequence[bool], args: tuple[Array, ...]) -> Array:
    """Maps run over the leading axis of the batched arguments in a loop."""
    mapped = [arg for arg, batched in zip(args, is_batched, strict=True) if batched]

    def one(some: list[Array]) -> Array:
        given = iter(some)
        return run(*(next(given) if batched else arg for arg, batched in zip(args, is_batched, strict=True)))

    return jax.lax.map(one, mapped)
