"""What a code stands for: its kind, its values, and how codes lie in bytes."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

Kind = Literal["int8", "int4", "nf4"]
KINDS: tuple[str, ...] = get_args(Kind)

# NormalFloat, 4 bits (arXiv 2305.14314, appendix E): quantiles of N(0, 1) scaled to [-1, 1], one of them exactly 0.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# The largest value that a kind's codes stand for: a block's scale is its largest magnitude over this.
LARGEST = {"int8": 127.0, "int4": 7.0, "nf4": 1.0}


def bits(kind: str) -> int:
    """Bits of a code."""
    return 8 if kind == "int8" else 4


def meaning(codes: Integer[Array, "..."], kind: str) -> Float[Array, "..."]:
    """What codes stand for, in blocks whose scale is 1, float32; in a TPU kernel too.

    Args:
        codes: int32; of 4 bits from 0 to 15, of int8 from -127 to 127.
        kind: of the codes.

    Returns:
        Their values: of int8 the code, of int4 the code less 8, of nf4 NF4[code].
    """
    if kind == "int8":
        return codes.astype(jnp.float32)
    if kind == "int4":
        return (codes - 8).astype(jnp.float32)

    # Four levels of choices: neither a vector unit nor a fused loop has a look-up as fast.
    def pick(values: tuple[float, ...]) -> Float[Array, "..."]:
        if len(values) == 1:
            return jnp.full(codes.shape, values[0], jnp.float32)
        half = len(values) // 2
        return jnp.where((codes & half) != 0, pick(values[half:]), pick(values[:half]))

    return pick(NF4)


def nearest(x: Float[Array, "..."], kind: str) -> Integer[Array, "..."]:
    """The codes that stand for what is nearest, int32.

    Args:
        x: float32, in blocks whose scale is 1.
        kind: of the codes.

    Returns:
        As `meaning` takes them.
    """
    if kind == "nf4":
        middles = [(low + high) / 2 for low, high in zip(NF4[:-1], NF4[1:], strict=True)]
        return sum(((x > middle).astype(jnp.int32) for middle in middles), start=jnp.zeros(x.shape, jnp.int32))
    largest = int(LARGEST[kind])
    codes = jnp.clip(jnp.round(x), -largest, largest).astype(jnp.int32)
    return codes + 8 if kind == "int4" else codes


def packed(codes: Integer[Array, "*L out in_"], kind: str) -> Integer[Array, "*L rows in_"]:
    """Codes as they are kept: int8 as they are; of 4 bits those of rows 2i and 2i + 1 in byte i, the first in the low half.

    Pairs along the output leave a block of the input whole, and are how a TPU packs rows of 4 bits anyway.

    Args:
        codes: int32; of 4 bits an even number of rows.
        kind: of the codes.

    Returns:
        int8 [..., out, in], or uint8 [..., out / 2, in].
    """
    if bits(kind) == 8:
        return codes.astype(jnp.int8)
    pairs = codes.reshape(*codes.shape[:-2], codes.shape[-2] // 2, 2, codes.shape[-1])
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).astype(jnp.uint8)


def unpacked(codes: Integer[Array, "*L rows in_"], kind: str) -> Integer[Array, "*L out in_"]:
    """`packed` the other way: int32 codes."""
    wide = codes.astype(jnp.int32)
    if bits(kind) == 8:
        return wide
    pairs = jnp.stack([wide & 15, jax.lax.shift_right_logical(wide, 4)], axis=-2)
    return pairs.reshape(*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])
