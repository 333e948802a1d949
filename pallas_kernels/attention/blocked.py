"""Attention over blocks of queries, so that the scores of all queries are never in memory at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import reference

# Scores held at once: 2**26 float32 are 256 MiB.
MAX_SCORES = 2**26


def query_block(batch: int, heads: int, length: int, slots: int, max_scores: int = MAX_SCORES) -> int:
    """Gives the number of queries a block holds: all of them, or the largest power of two within the bound.

    Args:
        batch: B.
        heads: N.
        length: T.
        slots: S.
        max_scores: bound on B * N * block * S.

    Returns:
        At least 1, at most max(length, 1).
    """
    fitting = max(max_scores // max(batch * heads * slots, 1), 1)
    return max(length, 1) if fitting >= length else 1 << (fitting.bit_length() - 1)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None,
    scale: float,
    max_scores: int = MAX_SCORES,
) -> Float[Array, "B T N H"]:
    """Computes the reference's attention block by block of queries; each block's scores are made again in the gradient.

    Args:
        q: queries.
        k: keys.
        v: values.
        q_segments: document of each query, 0 for padding.
        k_segments: document of each key slot, 0 for padding.
        q_slots: the key slot of each query.
        window: number of slots a query sees, or None.
        scale: factor of the scores.
        max_scores: bound on the scores of a block.

    Returns:
        As `reference.attention`.
    """
    return forward(q, k, v, q_segments, k_segments, q_slots, window, scale, max_scores)[0]


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None,
    scale: float,
    max_scores: int = MAX_SCORES,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Computes `attention`, and the log of each softmax's normaliser, from which `backward` makes the weights again.

    Args:
        q: queries.
        k: keys.
        v: values.
        q_segments: document of each query.
        k_segments: document of each key slot.
        q_slots: the key slot of each query.
        window: number of slots a query sees, or None.
        scale: factor of the scores.
        max_scores: bound on the scores of a block.

    Returns:
        As `reference.forward`.
    """
    batch, length, heads, _ = q.shape
    block = query_block(batch, heads, length, k.shape[2], max_scores)
    if block >= length:
        return reference.forward(q, k, v, q_segments, k_segments, q_slots, window, scale)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_block(queries: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, q_segments, q_slots = queries
        out, normaliser = reference.forward(q, k, v, q_segments, k_segments, q_slots, window, scale)
        return out, normaliser.swapaxes(1, 2)

    out, normaliser = jax.lax.map(one_block, tuple(_split(x, block) for x in (q, q_segments, q_slots)))
    return _joined(out, length), _joined(normaliser, length).swapaxes(1, 2)


def _split(x: Array, block: int) -> Array:
    """[B, T, ...] to [blocks, B, block, ...]; padding queries are of segment 0 and see nothing."""
    batch, length = x.shape[:2]
    count = -(-length // block)
    padded = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(batch, count, block, *x.shape[2:]), 1, 0)


def _joined(x: Array, length: int) -> Array:
    """The way back."""
    count, batch, block = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * block, *x.shape[3:])[:, :length]


def keeping_nothing(attention: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
    """Gives the forward pass of an implementation whose backward pass makes again what it needs of the softmax.

    Args:
        attention: takes what `attention` of this file takes, without max_scores.

    Returns:
        A function of the same arguments; it gives what `attention` does, [B, T, N, H], and zeros [B, N, T] in float32 in place
        of the normaliser that a kernel would keep.
    """

    def forward(
        q: Float[Array, "B T N H"], *rest: Any, **options: Any
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
        return attention(q, *rest, **options), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    return forward


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
    max_scores: int = MAX_SCORES,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Computes the gradient of `attention` block by block of queries; weights are made again from scores and normaliser.

    Args:
        q: queries.
        k: keys.
        v: values.
        q_segments: document of each query, 0 for padding.
        k_segments: document of each key slot, 0 for padding.
        q_slots: the key slot of each query.
        out: the output.
        normaliser: the log of each softmax's normaliser.
        d_out: the gradient of the output.
        window: number of slots a query sees, or None.
        scale: factor of the scores.
        max_scores: bound on the scores of a block.

    Returns:
        The gradients of q, k and v, each in its dtype.
    """
    batch, length, heads, _ = q.shape
    block = query_block(batch, heads, length, k.shape[2], max_scores)
    if block >= length:
        return reference.backward(q, k, v, q_segments, k_segments, q_slots, out, normaliser, d_out, window, scale)

    def one_block(sums: tuple[Array, Array], queries: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q, q_segments, q_slots, out, normaliser, d_out = queries
        d_q, *more = reference.backward(
            q, wide_k, wide_v, q_segments, k_segments, q_slots, out, normaliser.swapaxes(1, 2), d_out, window, scale
        )
        return (sums[0] + more[0], sums[1] + more[1]), d_q

    # Sums over blocks are float32: reference.backward gives the gradients of keys and values in their dtype.
    wide = jnp.promote_types(q.dtype, jnp.float32)
    wide_k, wide_v = k.astype(q.dtype).astype(wide), v.astype(q.dtype).astype(wide)
    queries = tuple(_split(x, block) for x in (q, q_segments, q_slots, out, normaliser.swapaxes(1, 2), d_out))
    (d_k, d_v), d_q = jax.lax.scan(one_block, (jnp.zeros_like(wide_k), jnp.zeros_like(wide_v)), queries)
    return _joined(d_q, length), d_k.astype(k.dtype), d_v.astype(v.dtype)
