"""Attention with grouped heads over segments and cache slots: the public function, its checks, its implementations."""

import functools
from typing import Literal

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import blocked, gpu, reference, tpu
from pallas_kernels.checks import check_float, check_int32, check_rank, check_shape

__all__ = ["attention"]

Implementation = Literal["reference", "blocked", "tpu"]


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
    implementation: Implementation | None = None,
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
        implementation: "tpu" (splash attention; bfloat16 and float32), "blocked" (holds the scores of some queries at a time)
            or "reference" (of all). None is "blocked", but with 128 queries a row or more what suits the platform that the
            program is lowered for: "tpu" with H up to 256; cuDNN on CUDA for 16-bit floats with H a multiple of 8 up to 128.
            Inside shard_map "tpu" needs check_vma=False.

    Returns:
        [B, T, N, H] in q's dtype; exactly 0, with zero gradient, for a query that sees nothing. Scores and softmax are
        float32, the probabilities are cast to q's dtype, as transformers' eager attention does. "tpu" scales bfloat16
        queries instead of their scores, and multiplies float32 in the TPU's highest precision unless
        jax_default_matmul_precision allows its default. What the gradient needs of the forward pass carries the name
        "attention_out", for the policies of jax.checkpoint.

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
    if implementation not in (None, "reference", "blocked", "tpu"):
        raise ValueError(f"attention: implementation is {implementation!r}; accepted is None, 'reference', 'blocked' or 'tpu'")
    if implementation == "tpu" and not tpu.fits(q.dtype, size):
        raise ValueError(f"attention: q is {q.dtype}{list(q.shape)}; 'tpu' accepts bfloat16 and float32, H up to 256")
    scale = size**-0.5 if scale is None else float(scale)
    kernel = length >= tpu.LANES and slots > 0 and (tpu.fits(q.dtype, size) or gpu.fits(q.dtype, size))
    if implementation == "tpu" or implementation is None and kernel:
        return _differentiable(q, k, v, q_segments, k_segments, q_slots, window, scale, implementation)
    chosen = reference.attention if implementation == "reference" else blocked.attention
    return checkpoint_name(chosen(q, k, v, q_segments, k_segments, q_slots, window, scale), "attention_out")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _differentiable(q, k, v, q_segments, k_segments, q_slots, window, scale, implementation):
    return _chosen("attention", implementation, window, scale, q, k, v, q_segments, k_segments, q_slots)


def _forward(q, k, v, q_segments, k_segments, q_slots, window, scale, implementation):
    given = q, k, v, q_segments, k_segments, q_slots
    kept = _chosen("forward", implementation, window, scale, *given)
    out, normaliser = (checkpoint_name(x, "attention_out") for x in kept)
    return out, (*given, out, normaliser)


def _backward(window, scale, implementation, kept, d_out):
    gradients = _chosen("backward", implementation, window, scale, *kept, d_out)
    # Integers have no tangent; float0 is how jax writes that.
    return *gradients, *(np.zeros(x.shape, jax.dtypes.float0) for x in kept[3:6])


_differentiable.defvjp(_forward, _backward)


def _chosen(part: str, implementation: str | None, window: int | None, scale: float, *args: Array):
    """A function of the chosen implementation; None is decided by the platform that the program is lowered for."""

    def of(module):
        return functools.partial(getattr(module, part), window=window, scale=scale)

    if implementation == "tpu":
        return of(tpu)(*args)
    branches = {}
    if tpu.fits(args[0].dtype, args[0].shape[3]):
        branches["tpu"] = of(tpu)
    if gpu.fits(args[0].dtype, args[0].shape[3]):
        branches["cuda"] = of(gpu)
    return jax.lax.platform_dependent(*args, **branches, default=of(blocked))
