"""Rotary position embedding: inverse frequencies of every scaling kind, and the tables of cosines and sines.

Formulas are those of transformers' `modeling_rope_utils.py` (the functions are named beside each), in float32 in the same
order of operations: at position 100,000 a frequency that is off by one unit in the last place turns by 0.01 rad.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen3_jax.config import Qwen3Config, RopeScaling


def rope_tables(
    config: Qwen3Config, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosines and sines for half-rotation, float32, already times the scaling's attention factor.

    Args:
        config: the model's; rope_theta, rope_scaling, head_dim and max_position_embeddings are read.
        positions: position of each token within its document.
        lengths: tokens of each token's document so far. Only the dynamic and longrope kinds read it: their frequencies depend
            on the length, and here on a document's own, so that what shares its row or batch changes nothing.

    Returns:
        cos and sin, both halves of the last axis equal.
    """
    frequencies, factor = inverse_frequencies(config, lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def inverse_frequencies(
    config: Qwen3Config, lengths: Int[Array, "*B"]
) -> tuple[Float[np.ndarray, "h"] | Float[Array, "*B h"], float]:
    """Radians per position of each of the H/2 rotated pairs.

    Args:
        config: the model's.
        lengths: document lengths, for the kinds that depend on them.

    Returns:
        float32 [H/2], or [..., H/2] where it depends on the length; and the factor that multiplies cosines and sines.
    """
    scaling, dim, base = config.rope_scaling, config.head_dim, config.rope_theta
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = (np.float32(1.0) / np.float32(base) ** exponents).astype(np.float32)
    if scaling is None:
        return plain, 1.0
    match scaling.kind:
        case "linear":
            return plain / np.float32(_given(scaling.factor)), 1.0
        case "dynamic":
            return _dynamic(scaling, base, exponents, config.max_position_embeddings, lengths), 1.0
        case "yarn":
            return _yarn(scaling, plain, dim, base, config.max_position_embeddings)
        case "llama3":
            return _llama3(scaling, plain), 1.0
        case "longrope":
            return _longrope(scaling, base, exponents, config.max_position_embeddings, lengths)
    raise ValueError(f"rope_scaling kind {scaling.kind!r} has no formula here")


def _given(value: float | None) -> float:
    """A value that RopeScaling has made sure of for this kind."""
    if value is None:
        raise ValueError("rope_scaling lacks a value that its kind needs")
    return value


def _dynamic(
    scaling: RopeScaling, base: float, exponents: np.ndarray, max_positions: int, lengths: Int[Array, "*B"]
) -> Float[Array, "*B h"]:
    """`_compute_dynamic_ntk_parameters`: the base grows with the length past max_position_embeddings."""
    dim = 2 * exponents.size
    length = jnp.maximum(lengths, max_positions).astype(jnp.float32)[..., None]
    factor = _given(scaling.factor)
    stretch = (factor * length / max_positions) - (factor - 1)
    return 1.0 / (base * stretch ** (dim / (dim - 2))) ** exponents


def _yarn(
    scaling: RopeScaling, plain: np.ndarray, dim: int, base: float, max_positions: int
) -> tuple[Float[np.ndarray, "h"], float]:
    """`_compute_yarn_parameters` (YaRN, arXiv 2309.00071): slow pairs are interpolated, fast ones left, a ramp between."""
    original = scaling.original_max_position_embeddings or max_positions
    factor = scaling.factor if scaling.factor is not None else max_positions / original

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.attention_factor is not None:
        attention = scaling.attention_factor
    elif scaling.mscale and scaling.mscale_all_dim:
        attention = magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    else:
        attention = magnitude(1.0)

    def pair_turning(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_turning(scaling.beta_fast or 32), pair_turning(scaling.beta_slow or 1)
    if scaling.truncate is None or scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - ramp
    frequencies = (plain / np.float32(factor)) * (1 - keep) + plain * keep
    return frequencies.astype(np.float32), float(attention)


def _llama3(scaling: RopeScaling, plain: np.ndarray) -> Float[np.ndarray, "h"]:
    """`_compute_llama3_parameters`: by wavelength, long ones divided, short ones left, a smooth step between."""
    original, factor = _given(scaling.original_max_position_embeddings), np.float32(_given(scaling.factor))
    low, high = _given(scaling.low_freq_factor), _given(scaling.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    mixed = (1 - smooth) * plain / factor + smooth * plain
    slow = np.where(wavelengths > original / low, plain / factor, plain)
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(between, mixed, slow).astype(np.float32)


def _longrope(
    scaling: RopeScaling, base: float, exponents: np.ndarray, max_positions: int, lengths: Int[Array, "*B"]
) -> tuple[Float[Array, "*B h"], float]:
    """`_compute_longrope_parameters`: one list of factors up to the original length, another beyond it."""
    original = scaling.original_max_position_embeddings or max_positions
    factor = scaling.factor if scaling.factor is not None else max_positions / original
    if scaling.attention_factor is not None:
        attention = scaling.attention_factor
    else:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    powers = np.float32(base) ** exponents
    short = (np.float32(1.0) / (np.asarray(scaling.short_factor, np.float32) * powers)).astype(np.float32)
    long = (np.float32(1.0) / (np.asarray(scaling.long_factor, np.float32) * powers)).astype(np.float32)
    return jnp.where((lengths > original)[..., None], long, short), float(attention)
