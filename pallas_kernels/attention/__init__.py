"""Attention with grouped heads over segments and cache slots: the public function, its checks, its implementations."""

from typing import Literal

from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import blocked, reference
from pallas_kernels.checks import check_float, check_int32, check_rank, check_shape

__all__ = ["attention"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None = None,
    scale: float | None = None,
    implementation: Literal["reference", "blocked"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(scale * q k^T) v over the visible keys, query head n reading key head n // (N/K).

    Query t sees key slot s iff `s <= q_slots[b, t]`, both are of the same segment and that is not 0, and, with a
    window, `q_slots[b, t] - s < window`. One rule serves a cache, left and right padding, and packed documents.

    Args:
        q: queries [B, T, N, H], any float dtype.
        k: keys [B, K, S, H], any float dtype, cast to q's; K divides N.
        v: values, like k.
        q_segments: int32 [B, T], the document of each query; 0 is padding.
        k_segments: int32 [B, S], the document of each key slot; 0 is padding or not yet written.
        q_slots: int32 [B, T], the key slot that each query itself occupies.
        window: number of slots that a query sees, its own included; None is all of them.
        scale: factor of the scores; None is H ** -0.5.
        implementation: "reference" holds all scores at once, "blocked" those of some queries at a time; None is blocked
            where the scores are many.

    Returns:
        [B, T, N, H] in q's dtype; exactly 0, with zero gradient, for a query that sees nothing. Scores and softmax are
        float32, the probabilities are cast to q's dtype, as transformers' eager attention does.

    Raises:
        ValueError: a rank, a size, a dtype, the window or the implementation is not as above.
    """
    check_float("attention", q=q, k=k, v=v)
    check_int32("attention", q_segments=q_segments, k_segments=k_segments, q_slots=q_slots)
    check_rank("attention", "q", q, "B T N H")
    check_rank("attention", "k", k, "B K S H")
    batch, length, heads, size = q.shape
    _, kv_heads, slots, _ = k.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: k has {kv_heads} heads; accepted is a divisor of q's {heads}")
    check_shape("attention", "k", k, (batch, kv_heads, slots, size), "B, H of q")
    check_shape("attention", "v", v, k.shape, "as k")
    check_shape("attention", "q_segments", q_segments, (batch, length), "B, T of q")
    check_shape("attention", "q_slots", q_slots, (batch, length), "B, T of q")
    check_shape("attention", "k_segments", k_segments, (batch, slots), "B, S of k")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; accepted is a positive number of slots, or None")
    if implementation not in (None, "reference", "blocked"):
        raise ValueError(f"attention: implementation is {implementation!r}; accepted is None, 'reference' or 'blocked'")
    scale = size**-0.5 if scale is None else scale
    chosen = reference.attention if implementation == "reference" else blocked.attention
    return chosen(q, k, v, q_segments, k_segments, q_slots, window, scale)
