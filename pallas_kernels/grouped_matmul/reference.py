"""The grouped matmul in plain jax.numpy, one masked product of all rows a group: the definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def _members(group_sizes: Int32[Array, " G"], rows: int) -> Bool[Array, "G M"]:
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows, dtype=jnp.int32)
    return (row >= (ends - group_sizes)[:, None]) & (row < ends[:, None])


def grouped_matmul(
    lhs: Float[Array, "M inner"], rhs: Float[Array, "G _ _"], group_sizes: Int32[Array, " G"], transpose_rhs: bool
) -> Float[Array, "M outer"]:
    """Multiplies each row by its group's matrix, as a scan over groups that multiplies all rows and keeps the group's.

    Args:
        lhs: rows sorted by group.
        rhs: [G, k, n], or [G, n, k] with transpose_rhs; each matrix is cast to lhs's dtype.
        group_sizes: rows of each group; rows past their sum belong to none.
        transpose_rhs: the orientation of rhs.

    Returns:
        In lhs's dtype, accumulated in float32; rows of no group are zero.
    """
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    outer = rhs.shape[1 if transpose_rhs else 2]

    def add_group(out: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        matrix, member = group
        matrix = matrix.T if transpose_rhs else matrix
        product = jnp.dot(lhs, matrix.astype(lhs.dtype), preferred_element_type=wide)
        return jnp.where(member[:, None], product, out), None

    out = jnp.zeros((lhs.shape[0], outer), wide)
    out, _ = jax.lax.scan(add_group, out, (rhs, _members(group_sizes, lhs.shape[0])))
    return out.astype(lhs.dtype)


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
    wide = jnp.promote_types(left.dtype, jnp.float32)

    def one_group(member: Array) -> Array:
        kept = jnp.where(member[:, None], left, 0)
        return jnp.dot(kept.T, jnp.where(member[:, None], right, 0), preferred_element_type=wide).astype(dtype)

    return jax.lax.map(one_group, _members(group_sizes, left.shape[0]))
