"""The grouped matmul on a TPU: jax's own megablox kernels behind this op's contract."""

import contextlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Rows, inner and outer sizes of a tile in 16-bit floats: some 10 MB of VMEM with double buffering. Tiles of rows are few
# where rows are, or most of a tile would be another group's.
TILE = (512, 1024, 1024)


def _tiling(rows: int, inner: int, outer: int, itemsize: int) -> tuple[int, int, int]:
    tall, *rest = TILE
    tall = min(tall, max(8 * (4 // itemsize), 1 << max(rows - 1, 1).bit_length()))
    wide = [size * 2 // max(itemsize, 2) for size in rest]
    return tall, min(wide[0], _lanes(inner)), min(wide[1], _lanes(outer))


def _lanes(size: int) -> int:
    return -(-size // 128) * 128


def _precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager[None]:
    """16-bit floats have one precision on a TPU: a program's wish for float32's would be refused by the compiler."""
    return jax.default_matmul_precision("default") if dtype.itemsize == 2 else contextlib.nullcontext()


def _padded(x: Float[Array, "M n"], tile: int) -> Float[Array, "P n"]:
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def grouped_matmul(
    lhs: Float[Array, "M inner"],
    rhs: Float[Array, "*L G _ _"],
    group_sizes: Int32[Array, " G"],
    layer: Int32[Array, ""] | None,
    transpose_rhs: bool,
) -> Float[Array, "M outer"]:
    """Multiplies each row by its group's matrix, in tiles.

    Args:
        lhs: rows sorted by group.
        rhs: [G, k, n] or a stack [L, G, k, n]; with transpose_rhs [G, n, k] or [L, G, n, k]. A layer of a stack is read where
            it lies; it is copied where rhs's dtype is another than lhs's.
        group_sizes: rows of each group; rows past their sum belong to none.
        layer: which of a stack.
        transpose_rhs: the orientation of rhs.

    Returns:
        In lhs's dtype, accumulated in float32; rows of no group are zero.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # a third of a second, for those who have experts

    rows, inner = lhs.shape
    outer = rhs.shape[-2 if transpose_rhs else -1]
    if 0 in (rows, inner, outer):
        return jnp.zeros((rows, outer), lhs.dtype)
    groups, before = group_sizes.shape[0], jnp.int32(0)
    if layer is not None and rhs.dtype == lhs.dtype:
        # The kernel reads matrix `group - group_offset`, which may count from before the first group: the stack is one long row
        # of matrices, and those of earlier layers are of no group.
        # A number past the stack means what it means to `dynamic_index_in_dim`; the kernel would visit no group at all.
        before = jnp.clip(jnp.where(layer < 0, layer + rhs.shape[0], layer), 0, rhs.shape[0] - 1) * groups
        if rhs.shape[-1] % 128 and not rhs.shape[-2] % 128:
            # Of such a parameter the compiler lays the other axis along the lanes: to be read as it lies it is turned.
            rhs, transpose_rhs = rhs.swapaxes(-1, -2), not transpose_rhs
    elif layer is not None:
        rhs = jax.lax.dynamic_index_in_dim(rhs, layer, 0, keepdims=False)
    tiling = _tiling(rows, inner, outer, lhs.dtype.itemsize)
    with _precision(lhs.dtype):
        out = gmm(
            _padded(lhs, tiling[0]),
            rhs.reshape(-1, *rhs.shape[-2:]).astype(lhs.dtype),
            group_sizes,
            preferred_element_type=lhs.dtype,
            tiling=tiling,
            group_offset=-before,
            transpose_rhs=transpose_rhs,
        )[:rows]
    # The kernel leaves rows of no group as it finds them.
    return jnp.where(jnp.arange(rows)[:, None] < group_sizes.sum(), out, 0)


def grouped_outer(
    left: Float[Array, "M p"], right: Float[Array, "M q"], group_sizes: Int32[Array, " G"], dtype: jnp.dtype
) -> Float[Array, "G p q"]:
    """Sums the outer products of the rows of each group: the gradient of the grouped matmul's matrices.

    Args:
        left: rows sorted by group.
        right: the same rows of another array.
        group_sizes: rows of each group; rows past their sum count nowhere.
        dtype: of the result.

    Returns:
        `left[rows of g].T @ right[rows of g]` for each g, accumulated in float32.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, inner = left.shape
    outer = right.shape[1]
    if 0 in (rows, inner, outer):
        return jnp.zeros((group_sizes.shape[0], inner, outer), dtype)
    tiling = _tiling(rows, inner, outer, left.dtype.itemsize)
    left, right = _padded(left, tiling[0]), _padded(right, tiling[0])
    with _precision(left.dtype):
        return tgmm(left.T, right, group_sizes, preferred_element_type=dtype, tiling=tiling)
