"""RMSNorm, alone or followed by rotary position embedding: the public functions and their checks."""

from jaxtyping import Array, Float

from pallas_kernels.checks import check_float, check_rank, check_shape
from pallas_kernels.norm_rope import reference

__all__ = ["rms_norm", "rms_norm_rope"]


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Divides by the root mean square over the last axis in float32, casts to x's dtype, then multiplies by weight.

    Args:
        x: [..., D], any float dtype.
        weight: [D], any float dtype; cast to x's dtype before the product.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype. Source: arXiv 1910.07467, equation 4; the order of cast and weight is that of
        transformers' Qwen3RMSNorm.

    Raises:
        ValueError: x is a scalar, weight is not [D], or one of them is not of a float dtype.
    """
    check_float("rms_norm", x=x, weight=weight)
    if x.ndim == 0:
        raise ValueError("rms_norm: x is a scalar; accepted is an array [..., D]")
    check_shape("rms_norm", "weight", weight, x.shape[-1:], "D of x")
    return reference.rms_norm(x, weight, eps)


def rms_norm_rope(
    x: Float[Array, "B T N H"],
    weight: Float[Array, " H"],
    cos: Float[Array, "B T H"],
    sin: Float[Array, "B T H"],
    eps: float,
) -> Float[Array, "B T N H"]:
    """Normalises every head over H and rotates it by its position's angles.

    Args:
        x: queries or keys [B, T, N, H], any float dtype, H even.
        weight: the norm's [H], shared by all heads; cast to x's dtype.
        cos: cosines of the angles [B, T, H], the H/2 frequencies twice over; cast to x's dtype.
        sin: sines, likewise.
        eps: added to the mean square.

    Returns:
        [B, T, N, H] in x's dtype. Source: transformers' Qwen3Attention (q_norm, then apply_rotary_pos_emb).

    Raises:
        ValueError: a rank, a size or a dtype is not as above.
    """
    check_float("rms_norm_rope", x=x, weight=weight, cos=cos, sin=sin)
    check_rank("rms_norm_rope", "x", x, "B T N H")
    batch, length, _, head = x.shape
    if head % 2:
        raise ValueError(f"rms_norm_rope: x has head size {head}; accepted is an even one, as it is rotated by halves")
    check_shape("rms_norm_rope", "weight", weight, (head,), "H of x")
    check_shape("rms_norm_rope", "cos", cos, (batch, length, head), "B, T, H of x")
    check_shape("rms_norm_rope", "sin", sin, (batch, length, head), "B, T, H of x")
    return reference.rms_norm_rope(x, weight, cos, sin, eps)
