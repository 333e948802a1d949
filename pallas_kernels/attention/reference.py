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
    return forward(q, k, v, q_segments, k_segments, q_slots, window, scale)[0]


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Computes `attention`, and what `backward` needs of its softmax.

    Args:
        q: queries.
        k: keys.
        v: values.
        q_segments: document of each query.
        k_segments: document of each key slot.
        q_slots: the key slot of each query.
        window: see `visible`.
        scale: factor of the scores.

    Returns:
        The output, and the log of each softmax's normaliser in float32; 0 for a query that sees nothing.
    """
    batch, length, heads, size = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores, seen = _scores(q, k, q_segments, k_segments, q_slots, window, scale)
    # A finite lowest score keeps a row that sees nothing free of inf - inf, in the gradient too.
    scores = jnp.where(seen, scores, jnp.finfo(wide).min)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True, initial=jnp.finfo(wide).min))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0)
    total = weights.sum(axis=-1, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    weights = (weights / total).astype(q.dtype)
    out = jnp.einsum("bkrts,bksh->bkrth", weights, v.astype(q.dtype), preferred_element_type=wide)
    normaliser = jnp.where(nothing, 0, peak + jnp.log(total)).astype(jnp.float32)
    return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype), normaliser.reshape(batch, heads, length)


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
    """Computes the gradient of `attention` from what `forward` gave (FlashAttention, arXiv 2205.14135, appendix B.2).

    Args:
        q: queries.
        k: keys.
        v: values.
        q_segments: document of each query.
        k_segments: document of each key slot.
        q_slots: the key slot of each query.
        out: the output.
        normaliser: the log of each softmax's normaliser.
        d_out: the gradient of the output.
        window: see `visible`.
        scale: factor of the scores.

    Returns:
        The gradients of q, k and v, each in its dtype; 0 for what is not seen.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores, seen = _scores(q, k, q_segments, k_segments, q_slots, window, scale)
    grouped, d_grouped = _grouped(q, k.shape[1]), _grouped(d_out, k.shape[1])
    weights = jnp.where(seen, jnp.exp(scores - normaliser.astype(wide).reshape(*scores.shape[:-1], 1)), 0)
    d_weights = jnp.einsum("bkrth,bksh->bkrts", d_grouped, v.astype(q.dtype), preferred_element_type=wide)
    products = d_out.astype(wide) * out.astype(wide)
    own = _grouped(products.sum(axis=-1, keepdims=True), k.shape[1])
    # Both are read as they lie and turned: made for each product anew, XLA:CPU writes them turned at a tenth of the speed.
    weights, d_scores = jax.lax.optimization_barrier(
        (weights.astype(q.dtype), (weights * (d_weights - own) * scale).astype(q.dtype))
    )
    d_v = jnp.einsum("bkrts,bkrth->bksh", weights, d_grouped, preferred_element_type=wide)
    d_k = jnp.einsum("bkrts,bkrth->bksh", d_scores, grouped, preferred_element_type=wide)
    d_q = jnp.einsum("bkrts,bksh->bkrth", d_scores, k.astype(q.dtype), preferred_element_type=wide)
    return jnp.moveaxis(d_q, 3, 1).reshape(q.shape).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _grouped(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K R T H"]:
    """Query heads of one key head become rows of one product, so that keys and values are never repeated in memory.

    Queries are moved, not scores: a product gives its axes in the operands' order, and XLA:CPU copies one that is asked for in
    another.
    """
    batch, length, heads, size = x.shape
    return jnp.moveaxis(x.reshape(batch, length, kv_heads, heads // kv_heads, size), 1, 3)


def _scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "B K R T S"], Bool[Array, "B 1 1 T S"]]:
    """Scores in float32, and which of them count."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkrth,bksh->bkrts", _grouped(q, k.shape[1]), k.astype(q.dtype), preferred_element_type=wide) * scale
    return scores, visible(q_segments, k_segments, q_slots, window)[:, None, None]
