"""Rows sorted by group, each multiplied by its group's matrix: the public op, its checks and its derivative."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.checks import check_float, check_int32, check_rank, check_shape
from pallas_kernels.grouped_matmul import batching

__all__ = ["grouped_matmul"]

Implementation = Literal["reference", "blocked", "tpu"]


def grouped_matmul(
    lhs: Float[Array, "M _"],
    rhs: Float[Array, "*L G _ _"],
    group_sizes: Int32[Array, " G"],
    *,
    layer: Int32[Array, ""] | int | None = None,
    transpose_rhs: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "M n"]:
    """Multiplies each row of lhs by the matrix of its group: the experts' products of a mixture-of-experts layer.

    Row i belongs to group g iff `sum(group_sizes[:g]) <= i < sum(group_sizes[:g + 1])`. Works under jit, vmap, scan,
    checkpoint and reverse-mode differentiation; no array of M * G * n or M * k * n elements is made.

    Args:
        lhs: [M, k], any float dtype, rows sorted by group.
        rhs: [G, k, n], or [G, n, k] with transpose_rhs (how `[out, in]` weights lie); or a stack of layers with a
            leading L. Any float dtype; the matrices in use are cast to lhs's dtype one at a time.
        group_sizes: int32 [G], rows of each group, not negative. Rows past their sum are zero in the output, and get
            no gradient.
        layer: scalar int32, may be traced: which layer of a stack; given iff rhs has 4 axes. Its matrices are read
            where they lie; they are copied by CUDA's kernels, and on a TPU where rhs's dtype is another than lhs's. The
            gradient of a stack is a whole stack that is zero elsewhere: to train, pass a layer's slice.
        transpose_rhs: the orientation of rhs.
        implementation: "tpu" (megablox), "blocked" (a loop over blocks of rows) or "reference" (every group multiplies all
            rows); None is "tpu" where the program is lowered for a TPU, jax's Mosaic kernels where for CUDA (a Hopper, 16-bit
            floats, k and n multiples of 64; the gradient of rhs is then rounded to lhs's dtype), else "blocked". Inside
            shard_map the kernels need check_vma=False.

    Returns:
        [M, n] in lhs's dtype, accumulated in float32 (float64 for float64). The gradient of rhs is accumulated likewise
        and is in rhs's dtype.

    Raises:
        ValueError: a rank, a size, a dtype, the layer or the implementation is not as above.
    """
    op = "grouped_matmul"
    check_float(op, lhs=lhs, rhs=rhs)
    check_int32(op, group_sizes=group_sizes)
    check_rank(op, "lhs", lhs, "M k")
    if rhs.ndim not in (3, 4):
        accepted = "G n k" if transpose_rhs else "G k n"
        check_rank(op, "rhs", rhs, accepted)
    if (layer is None) != (rhs.ndim == 3):
        raise ValueError(
            f"{op}: layer is {'missing' if layer is None else 'given'} and rhs has {rhs.ndim} axes; accepted is a layer "
            "with a stack of 4 axes, and no layer with 3"
        )
    inner = rhs.shape[-1 if transpose_rhs else -2]
    check_shape(op, "lhs", lhs, (lhs.shape[0], inner), f"M, k of rhs with transpose_rhs={transpose_rhs}")
    check_shape(op, "group_sizes", group_sizes, (rhs.shape[-3],), "G of rhs")
    if implementation not in (None, "reference", "blocked", "tpu"):
        raise ValueError(f"{op}: implementation is {implementation!r}; accepted is None, 'reference', 'blocked' or 'tpu'")
    if layer is not None:
        layer = jnp.asarray(layer)
        if layer.shape != () or not jnp.issubdtype(layer.dtype, jnp.integer):
            raise ValueError(f"{op}: layer is {layer.dtype}{list(layer.shape)}; accepted is a scalar integer")
        layer = layer.astype(jnp.int32)
    return _differentiable(lhs, rhs, group_sizes, layer, transpose_rhs, implementation or "auto")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _differentiable(lhs, rhs, group_sizes, layer, transpose_rhs, implementation):
    return batching.grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs, implementation)


def _forward(lhs, rhs, group_sizes, layer, transpose_rhs, implementation):
    layer = None if layer is None else layer.value
    out = batching.grouped_matmul(lhs.value, rhs.value, group_sizes.value, layer, transpose_rhs, implementation)
    # Of matrices that nobody differentiates no gradient is made, and rows are kept for nothing else.
    return out, (lhs.value if rhs.perturbed else None, rhs.value, group_sizes.value, layer)


def _backward(transpose_rhs, implementation, kept, d_out):
    lhs, rhs, group_sizes, layer = kept
    d_rhs = None
    d_lhs = batching.grouped_matmul(d_out, rhs, group_sizes, layer, not transpose_rhs, implementation)
    if lhs is not None:
        left, right = (d_out, lhs) if transpose_rhs else (lhs, d_out)
        d_rhs = batching.grouped_outer(left, right, group_sizes, rhs.dtype, implementation)
        if layer is not None:
            d_rhs = jax.lax.dynamic_update_index_in_dim(jnp.zeros(rhs.shape, rhs.dtype), d_rhs, layer, 0)
    return d_lhs, d_rhs, None, None


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)
