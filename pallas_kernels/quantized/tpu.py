"""Matrices from codes as a TPU kernel: bytes stream through VMEM, and the compiler sees a call that it cannot move."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Integer

from pallas_kernels.quantized.formats import bits, meaning

LANES = 128
TALL, WIDE = 256, 1024  # of a block of the result at most: 1 MiB of float32
MOST = 512  # scales of a row: the kernel holds ones and zeros, and the numbers that they are made of, 10 bytes for each by WIDE


def takes(out: int, inner: int, blocks: int, dtype: jnp.dtype) -> bool:
    """Tells whether a matrix has whole tiles, of codes and of scales.

    Args:
        out: its rows.
        inner: its columns.
        blocks: scales of a row.
        dtype: of the result.

    Returns:
        True where the kernel can be used.
    """
    whole = out > 0 and inner > 0 and out % LANES == 0 and inner % LANES == 0
    return whole and blocks <= MOST and dtype in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def dequantize(
    codes: Integer[Array, "*L rows in_"], scales: Float[Array, "*L blocks out"], kind: str, dtype: jnp.dtype
) -> Float[Array, "*L out in_"]:
    """As the reference, block by block.

    Args:
        codes: packed, of matrices that `takes` takes.
        scales: of the blocks.
        kind: of the codes.
        dtype: of the result.

    Returns:
        The matrices.
    """
    leading, inner, (blocks, out) = codes.shape[:-2], codes.shape[-1], scales.shape[-2:]
    count = math.prod(leading)
    tall, wide = _part(out, TALL), _part(inner, WIDE)
    rows = tall * bits(kind) // 8

    def kernel(codes_ref, scales_ref, out_ref):
        # A byte's two codes are two rows of 4 bits to the TPU, as they are kept.
        codes = codes_ref[...] if bits(kind) == 8 else pltpu.bitcast(codes_ref[...], jnp.uint4)
        # Each block's scale, repeated along its columns by a product with ones and zeros: exact, and lanes stay where they are.
        row = jax.lax.broadcasted_iota(jnp.int32, (blocks, wide), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (blocks, wide), 1) + pl.program_id(2) * wide
        ones = (row == jax.lax.div(column, inner // blocks)).astype(jnp.bfloat16)
        contracted = (((0,), (0,)), ((), ()))
        scale = jax.lax.dot_general(scales_ref[...], ones, contracted, precision="default", preferred_element_type=jnp.float32)
        out_ref[...] = (meaning(codes.astype(jnp.int32), kind) * scale).astype(out_ref.dtype)

    run = pl.pallas_call(
        kernel,
        grid=(count, out // tall, inner // wide),
        in_specs=[
            pl.BlockSpec((None, rows, wide), lambda matrix, i, j: (matrix, i, j)),
            pl.BlockSpec((None, blocks, tall), lambda matrix, i, j: (matrix, 0, i)),
        ],
        out_specs=pl.BlockSpec((None, tall, wide), lambda matrix, i, j: (matrix, i, j)),
        out_shape=jax.ShapeDtypeStruct((count, out, inner), dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * out * inner,
            transcendentals=0,
            bytes_accessed=codes.size + 2 * scales.size + count * out * inner * dtype.itemsize,
        ),
        name="dequantize",
    )
    found = run(codes.reshape(count, *codes.shape[-2:]), scales.reshape(count, blocks, out))
    return found.reshape(*leading, out, inner)


def _part(size: int, most: int) -> int:
    """The largest number of whole lanes, at most so many, that divides a size."""
    return next(part for part in range(most, 0, -LANES) if size % part == 0)
