"""The grouped matmul as a loop over the groups that have rows, and over blocks of each group's rows.

One group's matrix is sliced from where it lies, cast, and used for all of the group's blocks. So the work is that of the
rows (each group rounded up to whole blocks), and the traffic that of the matrices in use: with 8 rows, at most 8.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.rows import rows_matmul

MAX_BLOCK = 256
# A slice of a matrix is copied before a product reads it; a copy of this many bytes is still in a core's cache then.
PIECE_BYTES = 2**20


def row_block(rows: int, groups: int) -> int:
    """Chooses the rows of a block: some half of a group's mean, so that little of a group's last block is wasted.

    Args:
        rows: M.
        groups: G.

    Returns:
        A power of two from 8 to 256, but 1 where nearly every group in use has one row, and never more than M.
    """
    if 4 * rows <= groups:
        return 1
    half = rows // max(2 * groups, 1)
    return min(max(8, 1 << max(half - 1, 0).bit_length()), MAX_BLOCK, max(rows, 1))


def pieces(outer: int, inner: int, itemsize: int) -> int:
    """Chooses into how many slices of its outer axis a matrix is cut for products with a single row.

    Args:
        outer: n, the axis that is cut.
        inner: k.
        itemsize: bytes of an element.

    Returns:
        The smallest divisor of n that leaves slices of at most PIECE_BYTES, at most n.
    """
    fitting = -(-outer * inner * itemsize // PIECE_BYTES)
    return next((count for count in range(max(fitting, 1), outer) if outer % count == 0), outer)


def _spans(group_sizes: Int32[Array, " G"], rows: int) -> tuple[Array, Array, Array, Array]:
    """Lists the groups that have rows first, the first and past-the-last row of every group, and how many have rows."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    starts = jnp.minimum(ends, jnp.cumsum(group_sizes, dtype=jnp.int32) - group_sizes)
    used = ends > starts
    return jnp.argsort(~used, stable=True).astype(jnp.int32), starts, ends, jnp.sum(used, dtype=jnp.int32)


def _each_block(start: Array, end: Array, rows: int, block: int, step: Callable, carry: Array) -> Array:
    """Folds step(first row, mask of the group's rows in the block, carry) over the blocks of rows start..end."""

    def body(i: Array, carry: Array) -> Array:
        wanted = start + i * block
        # dynamic_slice clamps a block that would reach past the end: clamped here, so that the mask knows it.
        first = jnp.minimum(wanted, rows - block)
        row = first + jnp.arange(block, dtype=jnp.int32)
        return step(first, ((row >= wanted) & (row < end))[:, None], carry)

    return jax.lax.fori_loop(0, (end - start + block - 1) // block, body, carry)


def grouped_matmul(
    lhs: Float[Array, "M inner"],
    rhs: Float[Array, "*L G _ _"],
    group_sizes: Int32[Array, " G"],
    layer: Int32[Array, ""] | None,
    transpose_rhs: bool,
    block: int | None = None,
) -> Float[Array, "M outer"]:
    """Multiplies each row by its group's matrix, block by block.

    Args:
        lhs: rows sorted by group.
        rhs: [G, k, n] or a stack [L, G, k, n]; with transpose_rhs [G, n, k] or [L, G, n, k].
        group_sizes: rows of each group; rows past their sum belong to none.
        layer: which of a stack.
        transpose_rhs: the orientation of rhs.
        block: rows of a block; None is `row_block`'s choice.

    Returns:
        In lhs's dtype, accumulated in float32; rows of no group are zero.
    """
    rows, inner = lhs.shape
    groups, outer = rhs.shape[-3], rhs.shape[-2 if transpose_rhs else -1]
    out = jnp.zeros((rows, outer), lhs.dtype)
    if 0 in (rows, groups, outer, inner):
        return out
    block = min(block or row_block(rows, groups), rows)
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    order, starts, ends, used = _spans(group_sizes, rows)
    stack = rhs if layer is not None else rhs[None]
    zero = jnp.int32(0)
    layer = zero if layer is None else layer

    # Cut along n only where its slices are contiguous.
    count = pieces(outer, inner, lhs.dtype.itemsize) if block == 1 and transpose_rhs else 1
    size = (outer // count, inner) if transpose_rhs else (inner, outer)

    def one_piece(i: Array, out: Array) -> Array:
        group, column = order[i // count], i % count * (outer // count)
        place = (layer, group, column if transpose_rhs else zero, zero)
        matrix = jax.lax.dynamic_slice(stack, place, (1, 1, *size))
        matrix = matrix[0, 0].astype(lhs.dtype)

        def step(first: Array, mask: Array, out: Array) -> Array:
            rows_in = jax.lax.dynamic_slice_in_dim(lhs, first, block)
            product = rows_matmul(rows_in, matrix, transpose=transpose_rhs, dtype=wide).astype(lhs.dtype)
            before = jax.lax.dynamic_slice(out, (first, column), product.shape)
            return jax.lax.dynamic_update_slice(out, jnp.where(mask, product, before), (first, column))

        return _each_block(starts[group], ends[group], rows, block, step, out)

    return jax.lax.fori_loop(0, used * count, one_piece, out)


def grouped_outer(
    left: Float[Array, "M p"],
    right: Float[Array, "M q"],
    group_sizes: Int32[Array, " G"],
    dtype: jnp.dtype,
    block: int | None = None,
) -> Float[Array, "G p q"]:
    """Sums the outer products of the rows of each group: the gradient of the grouped matmul's matrices.

    Args:
        left: rows sorted by group.
        right: the same rows of another array.
        group_sizes: rows of each group; rows past their sum count nowhere.
        dtype: of the result.
        block: rows of a block; None is `row_block`'s choice.

    Returns:
        `left[rows of g].T @ right[rows of g]` for each g, accumulated in float32.
    """
    rows, groups = left.shape[0], group_sizes.shape[0]
    shape = (left.shape[1], right.shape[1])
    out = jnp.zeros((groups, *shape), dtype)
    if 0 in (rows, groups, *shape):
        return out
    block = min(block or row_block(rows, groups), rows)
    wide = jnp.promote_types(left.dtype, jnp.float32)
    order, starts, ends, used = _spans(group_sizes, rows)

    def one_group(i: Array, out: Array) -> Array:
        group = order[i]

        def step(first: Array, mask: Array, total: Array) -> Array:
            # Both are masked: a row of no group may hold infinities, and 0 * inf is not 0.
            left_rows = jnp.where(mask, jax.lax.dynamic_slice_in_dim(left, first, block), 0)
            right_rows = jnp.where(mask, jax.lax.dynamic_slice_in_dim(right, first, block), 0)
            return total + jnp.einsum("mp,mq->pq", left_rows, right_rows, preferred_element_type=wide)

        total = _each_block(starts[group], ends[group], rows, block, step, jnp.zeros(shape, wide))
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), group, 0)

    return jax.lax.fori_loop(0, used, one_group, out)
