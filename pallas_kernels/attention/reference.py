"""Attention in plain jax.numpy with the whole score matrix: the definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def visible(
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Tells which key slots each query sees.

    Args:
        q_segments: document of each query; 0 is padding and sees nothing.
        k_segments: document of each key slot; 0 is seen by nobody.
        q_slots: the key slot that each query itself occupies.
        window: number of slots that a query sees, its own included; None is all.

    Returns:
        True where slot s is at or before the query's own, in the same document, and in the window.
    """
    slots = jnp.arange(k_segments.shape[1], dtype=jnp.int32)
    distance = q_slots[:, :, None] - slots
    seen = (distance >= 0) & (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    return seen if window is None else seen & (distance < window)


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
    """Computes softmax(scale * q k^T) v over the visible keys, query head n reading key head n // (N/K).

    Args:
        q: queries.
        k: keys, cast to q's dtype.
        v: values, cast to q's dtype.
        q_segments: document of each query, 0 for padding.
        k_segments: document of each key slot, 0 for padding.
        q_slots: the key slot of each query.
        window: see `visible`.
        scale: factor of the scores.

    Returns:
        In q's dtype; exactly 0 for a query that sees nothing. Scores and softmax are float32 and the probabilities are
        cast to q's dtype, as transformers' eager attention does.
    """
    batch, length, heads, size = q.shape
    kv_heads = k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Query heads of one key head become rows of one product, so that keys and values are never repeated in memory. Queries are
    # moved, not scores: a product gives its axes in the operands' order, and XLA:CPU copies what is asked for in another.
    grouped = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, size), 1, 3)
    scores = jnp.einsum("bkrth,bksh->bkrts", grouped, k.astype(q.dtype), preferred_element_type=wide) * scale
    seen = visible(q_segments, k_segments, q_slots, window)[:, None, None]
    # A finite lowest score keeps a row that sees nothing free of inf - inf, in the gradient too.
    scores = jnp.where(seen, scores, jnp.finfo(wide).min)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True, initial=jnp.finfo(wide).min))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1, total)).astype(q.dtype)
    out = jnp.einsum("bkrts,bksh->bkrth", weights, v.astype(q.dtype), preferred_element_type=wide)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, size).astype(q.dtype)
