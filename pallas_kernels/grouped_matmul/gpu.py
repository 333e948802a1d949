"""The grouped matmul on an NVIDIA Hopper: jax's own Mosaic-GPU kernels behind this op's contract."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped_matmul import blocked

# Rows and columns of a tile, and the depth of a step: four steps in flight take 128 KiB of shared memory.
TILE, DEPTH = 128, 64


def fits(dtype: jnp.dtype, *sizes: int) -> bool:
    """Tells whether the kernels take these arrays.

    Args:
        dtype: of both.
        *sizes: inner and outer size.

    Returns:
        True for 16-bit floats with sizes that 64 divides.
    """
    return dtype in (jnp.bfloat16, jnp.float16) and all(size and size % DEPTH == 0 for size in sizes)


def _options(side: int) -> dict[str, Any]:
    count = -(-side // TILE)
    across = next(width for width in (8, 4, 2, 1) if count % width == 0)
    return dict(block_k=DEPTH, max_concurrent_steps=4, grid_block_n=across)


def _other_card() -> bool:
    """Whether the program is for a card at hand that is no Hopper; where one only compiles, a Hopper is meant."""
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0"


def grouped_matmul(
    lhs: Float[Array, "M inner"],
    rhs: Float[Array, "*L G _ _"],
    group_sizes: Int32[Array, " G"],
    layer: Int32[Array, ""] | None,
    transpose_rhs: bool,
) -> Float[Array, "M outer"]:
    """Multiplies each row by its group's matrix, in tiles; to be traced where the program is lowered.

    Args:
        lhs: rows sorted by group, 16-bit floats.
        rhs: [G, k, n] or a stack [L, G, k, n]; with transpose_rhs [G, n, k] or [L, G, n, k]. A layer of a stack is copied.
        group_sizes: rows of each group; rows past their sum belong to none.
        layer: which of a stack.
        transpose_rhs: the orientation of rhs.

    Returns:
        In lhs's dtype, accumulated in float32; rows of no group are zero.
    """
    if _other_card():
        return blocked.grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs)
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    matrices = rhs if layer is None else jax.lax.dynamic_index_in_dim(rhs, layer, 0, keepdims=False)
    rows, outer = lhs.shape[0], matrices.shape[1 if transpose_rhs else 2]
    if rows == 0:
        return jnp.zeros((0, outer), lhs.dtype)
    tall = TILE if rows >= TILE * matrices.shape[0] else TILE // 2
    out = ragged_dot(
        lhs,
        matrices.astype(lhs.dtype),
        group_sizes=group_sizes,
        block_m=tall,
        block_n=TILE,
        transpose_rhs=transpose_rhs,
        **_options(outer),
    )
    # The kernel leaves rows of no group as it finds them.
    return jnp.where(jnp.arange(rows)[:, None] < group_sizes.sum(), out, 0)


def grouped_outer(
    left: Float[Array, "M p"], right: Float[Array, "M q"], group_sizes: Int32[Array, " G"], dtype: jnp.dtype
) -> Float[Array, "G p q"]:
    """Sums the outer products of the rows of each group; to be traced where the program is lowered.

    Args:
        left: rows sorted by group, 16-bit floats.
        right: the same rows of another array.
        group_sizes: rows of each group; rows past their sum count nowhere.
        dtype: of the result.

    Returns:
        `left[rows of g].T @ right[rows of g]` for each g, accumulated in float32; rounded to left's dtype before dtype.
    """
    if left.shape[0] == 0 or _other_card():
        return blocked.grouped_outer(left, right, group_sizes, dtype)
    # A tile's rows of another group are multiplied by 0, which would not hide a NaN in rows of none.
    member = jnp.arange(left.shape[0])[:, None] < group_sizes.sum()
    left, right = jnp.where(member, left, 0), jnp.where(member, right, 0)
    tall, wide = (TILE if x.shape[1] % TILE == 0 else TILE // 2 for x in (left, right))
    out = _transposed_ragged_dot()(
        left, right, group_sizes=group_sizes, block_m=tall, block_n=wide, **_options(right.shape[1] * TILE // wide)
    )
    return out.astype(dtype)


@functools.cache
def _transposed_ragged_dot():
    """Jax's function, but for where it asks the first device of this process for its multiprocessors.

    One that only compiles has a CPU there. Its other kernel counts on those of an H100; more or fewer cost time alone.
    """
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot as run

    card = types.SimpleNamespace(core_count=132)
    named = {**run.__globals__, "jax": types.SimpleNamespace(**{**vars(jax), "devices": lambda: [card]})}
    copy = types.FunctionType(run.__code__, named, run.__name__, run.__defaults__, run.__closure__)
    copy.__kwdefaults__ = run.__kwdefaults__
    return copy
