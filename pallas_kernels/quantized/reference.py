"""Matrices from codes and back, in plain jax.numpy: the definition of both."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.quantized.formats import LARGEST, meaning, nearest, packed, unpacked


def quantize(x: Float[Array, "*L out in_"], kind: str, block: int) -> tuple[Integer[Array, "..."], Float[Array, "..."]]:
    """Codes and scales; shapes as of the public op.

    Args:
        x: matrices.
        kind: of the codes.
        block: values that share a scale.

    Returns:
        Codes, packed; scales, bfloat16.
    """
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    # Rounded first: codes are then the nearest by the scale that is kept.
    scales = (jnp.abs(blocks).max(axis=-1) / LARGEST[kind]).astype(jnp.bfloat16)
    wide = scales.astype(jnp.float32)[..., None]
    codes = nearest(blocks / jnp.where(wide > 0, wide, 1), kind).reshape(x.shape)
    return packed(codes, kind), scales.swapaxes(-1, -2)


def dequantize(
    codes: Integer[Array, "*L rows in_"], scales: Float[Array, "*L blocks out"], kind: str, dtype: jnp.dtype
) -> Float[Array, "*L out in_"]:
    """What the codes stand for, times their blocks' scales; shapes as of the public op.

    Args:
        codes: packed.
        scales: of the blocks.
        kind: of the codes.
        dtype: of the result.

    Returns:
        The matrices, multiplied in float32.
    """
    values = meaning(unpacked(codes, kind), kind)
    blocks = values.reshape(*values.shape[:-1], scales.shape[-2], -1)
    return (blocks * scales.astype(jnp.float32).swapaxes(-1, -2)[..., None]).reshape(values.shape).astype(dtype)
