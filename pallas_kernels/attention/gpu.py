"""Attention on an NVIDIA GPU: cuDNN's fused kernels behind this op's contract, a block of queries at a time.

What a query sees is told to cuDNN by a number added to each score, in 16 bits: a block's are all that are ever there. Keys past
the last slot of a block's queries are cut off by the length of the keys, and cost nothing.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import blocked
from pallas_kernels.attention.reference import visible

# Queries of a block: with 8 blocks a causal row does 9/16 of all products. Numbers of a block, of 2 bytes: 128 MiB.
BLOCK = 512
MAX_SCORES = 2**26


@functools.cache
def _installed() -> bool:
    """Whether jax's CUDA plugin is, without which calls of cuDNN cannot even be traced."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def fits(dtype: jnp.dtype, size: int) -> bool:
    """Tells whether cuDNN is there and takes these heads on every card that it runs on.

    Args:
        dtype: of the queries.
        size: H.

    Returns:
        True for 16-bit floats of up to 128 values, a multiple of 8, where jax's CUDA plugin is installed.
    """
    return dtype in (jnp.bfloat16, jnp.float16) and size <= 128 and size % 8 == 0 and _installed()


def _some(q, k, v, q_segments, k_segments, q_slots, window: int | None, scale: float) -> Array:
    """Attention of some queries [B, t, N, H] over all keys [B, S, K, H]; t and S are even, for cuDNN's gradient."""
    seen = visible(q_segments, k_segments, q_slots, window)
    reach = jnp.clip(q_slots.max(axis=1) + 1, 1, k.shape[1])
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None], scale=scale, key_value_seq_lengths=reach, implementation="cudnn"
    )
    # Where all is hidden cuDNN gives the values' mean.
    return jnp.where(seen.any(axis=2)[:, :, None, None], out, 0)


def _keys(k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], k_segments: Int32[Array, "B S"], dtype: jnp.dtype):
    more = k.shape[2] % 2
    k, v = (jnp.pad(side.astype(dtype).swapaxes(1, 2), ((0, 0), (0, more), (0, 0), (0, 0))) for side in (k, v))
    return k, v, jnp.pad(k_segments, ((0, 0), (0, more)))


def _split(x: Array, batch: int, slots: int) -> Array:
    """What belongs to queries, [B, T, ...], in blocks [count, B, t, ...]; the last is filled with zeros: segment 0."""
    block = max(2, min(BLOCK, blocked.query_block(batch, 1, x.shape[1] + x.shape[1] % 2, slots, MAX_SCORES)))
    count = -(-x.shape[1] // block)
    x = jnp.pad(x, [(0, 0), (0, count * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, count, block, *x.shape[2:]), 1, 0)


def _joined(blocks: Array, length: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Computes attention block by block of queries.

    Args:
        q: queries that `fits` accepts.
        k: keys, cast to q's dtype.
        v: values, cast to q's dtype.
        q_segments: document of each query, 0 for padding.
        k_segments: document of each key slot, 0 for padding.
        q_slots: the key slot of each query.
        window: number of slots a query sees, or None.
        scale: factor of the scores.

    Returns:
        As `reference.attention`.
    """
    keys, values, segments = _keys(k, v, k_segments, q.dtype)

    def one(block: tuple[Array, Array, Array]) -> Array:
        q, q_segments, q_slots = block
        return _some(q, keys, values, q_segments, segments, q_slots, window, scale)

    out = jax.lax.map(one, tuple(_split(x, q.shape[0], k.shape[2]) for x in (q, q_segments, q_slots)))
    return _joined(out, q.shape[1])


forward = blocked.keeping_nothing(attention)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    out: Float[Array, "B T N H"],
    normaliser: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Computes the gradient of `attention`, block by block, whose forward pass is made again.

    Args:
        q: as of `attention`, like all the others.
        k: keys.
        v: values.
        q_segments: document of each query.
        k_segments: document of each key slot.
        q_slots: the key slot of each query.
        out: not read.
        normaliser: not read.
        d_out: the gradient of the output.
        window: number of slots a query sees, or None.
        scale: factor of the scores.

    Returns:
        The gradients of q, k and v, each in its dtype; those of k and v are summed over blocks in float32.
    """
    keys, values, segments = _keys(k, v, k_segments, q.dtype)

    def one(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q, q_segments, q_slots, d_out = block
        _, pull = jax.vjp(lambda q, k, v: _some(q, k, v, q_segments, segments, q_slots, window, scale), q, keys, values)
        d_q, d_k, d_v = pull(d_out.astype(q.dtype))
        return (sums[0] + d_k, sums[1] + d_v), d_q

    zeros = jnp.zeros(keys.shape, jnp.float32)
    blocks = tuple(_split(x, q.shape[0], k.shape[2]) for x in (q, q_segments, q_slots, d_out))
    (d_k, d_v), d_q = jax.lax.scan(one, (zeros, zeros), blocks)
    d_k, d_v = (side[:, : k.shape[2]].swapaxes(1, 2) for side in (d_k, d_v))
    return _joined(d_q, q.shape[1]), d_k.astype(k.dtype), d_v.astype(v.dtype)
