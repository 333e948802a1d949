"""RMS normalisation and half-rotation in plain jax.numpy: the definition of rms_norm and rms_norm_rope."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Divides by the root mean square over the last axis in float32, casts to x's dtype, then multiplies by weight.

    Args:
        x: any float dtype.
        weight: cast to x's dtype before the product.
        eps: added to the mean square.

    Returns:
        The normalised array in x's dtype. Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4; the order of
        cast and weight is that of transformers' Qwen3RMSNorm.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def rotate_half(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """Maps the halves (x1, x2) of the last axis to (-x2, x1).

    Args:
        x: the last axis is even.

    Returns:
        The same shape and dtype. Source: transformers' rotate_half (RoPE, arXiv 2104.09864, with the halves as pairs).
    """
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def rms_norm_rope(
    x: Float[Array, "B T N H"],
    weight: Float[Array, " H"],
    cos: Float[Array, "B T H"],
    sin: Float[Array, "B T H"],
    eps: float,
) -> Float[Array, "B T N H"]:
    """Normalises every head over H and rotates it by its position's angles.

    Args:
        x: queries or keys, any float dtype.
        weight: the norm's, shared by all heads.
        cos: cosines of the angles, the H/2 frequencies twice over; cast to x's dtype.
        sin: sines, likewise.
        eps: added to the mean square.

    Returns:
        The rotated heads in x's dtype. Source: transformers' Qwen3Attention (q_norm, then apply_rotary_pos_emb).
    """
    normed = rms_norm(x, weight, eps)
    cos, sin = (angles[:, :, None, :].astype(x.dtype) for angles in (cos, sin))
    return normed * cos + rotate_half(normed) * sin
