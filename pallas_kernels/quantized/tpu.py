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
MOST = 512  # scales of such a row: the kernel holds ones and zeros, and the numbers they are made of, 10 bytes for each by WIDE


def takes(inner: int, blocks: int) -> bool:
    """Tells whether a block of the result needs few enough scales: of blocks of 2, 4 ... 128 columns, and most others, it does.

    Args:
        inner: columns of a matrix.
        blocks: scales of a row.

    Returns:
        True where the kernel can be used.
    """
    return inner > 0 and _width(inner, blocks)[1] <= MOST


def _width(inner: int, blocks: int) -> tuple[int, int]:
    """Columns of a block of the result, and scales it is given: its own if they fill tiles of 8, else a whole row's."""
    unit = math.lcm(8 * (inner // blocks), LANES)
    if inner <= WIDE or unit > WIDE:
        return min(inner, WIDE), blocks
    wide = WIDE // unit * unit
    return wide, wide * blocks // inner


def dequantize(
    codes: Integer[Array, "*L rows in_"], scales: Float[Array, "*L blocks out"], kind: str, dtype: jnp.dtype
) -> Float[Array, "*L out in_"]:
    """As the reference, block by block; those at the edges hang over it, and what is made there is dropped.

    Args:
        codes: packed, of matrices that `takes` takes.
        scales: of the blocks, bfloat16.
        kind: of the codes.
        dtype: of the result; float16 is made of the kernel's float32.

    Returns:
        The matrices.
    """
    leading, inner, (blocks, out) = codes.shape[:-2], codes.shape[-1], scales.shape[-2:]
    count = math.prod(leading)
    tall, (wide, part) = min(out, TALL), _width(inner, blocks)
    rows = tall * bits(kind) // 8
    made = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype

    def kernel(codes_ref, scales_ref, out_ref):
        # A byte's two codes are two rows of 4 bits to the TPU, as they are kept.
        codes = codes_ref[...] if bits(kind) == 8 else pltpu.bitcast(codes_ref[...], jnp.uint4)
        scales, first = scales_ref[...], pl.program_id(2) * part if part < blocks else 0
        if blocks % part:  # behind the last scale there may be anything, and 0 times infinity is no 0
            there = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 0) + first < blocks
            scales = jnp.where(there, scales.astype(jnp.float32), 0).astype(scales.dtype)
        # Each block's scale, repeated along its columns by a product with ones and zeros: exact, and lanes stay where they are.
        row = jax.lax.broadcasted_iota(jnp.int32, (part, wide), 0) + first
        column = jax.lax.broadcasted_iota(jnp.int32, (part, wide), 1) + pl.program_id(2) * wide
        ones = (row == jax.lax.div(column, inner // blocks)).astype(jnp.bfloat16)
        contracted = (((0,), (0,)), ((), ()))
        scale = jax.lax.dot_general(scales, ones, contracted, precision="default", preferred_element_type=jnp.float32)
        out_ref[...] = (meaning(codes.astype(jnp.int32), kind) * scale).astype(out_ref.dtype)

    run = pl.pallas_call(
        kernel,
        grid=(count, pl.cdiv(out, tall), pl.cdiv(inner, wide)),
        in_specs=[
            pl.BlockSpec((None, rows, wide), lambda matrix, i, j: (matrix, i, j)),
            pl.BlockSpec((None, part, tall), lambda matrix, i, j: (matrix, j if part < blocks else 0, i)),
        ],
        out_specs=pl.BlockSpec((None, tall, wide), lambda matrix, i, j: (matrix, i, j)),
        out_shape=jax.ShapeDtypeStruct((count, out, inner), made),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * out * inner * (1 + part),
            transcendentals=0,
            bytes_accessed=codes.size + 2 * scales.size + count * out * inner * made.itemsize,
        ),
        name="dequantize",
    )
    found = run(codes.reshape(count, *codes.shape[-2:]), scales.reshape(count, blocks, out))
    return found.reshape(*leading, out, inner).astype(dtype)
