"""Attention against a float64 loop over queries: padding, packing, windows, cache slots, rows that see nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention, rms_norm, rms_norm_rope
from pallas_kernels.attention import blocked, reference

B, T, S, N, K, H = 2, 6, 11, 4, 2, 8


def definition(q, k, v, q_segments, k_segments, q_slots, window):
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(q.shape[1]):
            slots = np.arange(k.shape[2])
            seen = (slots <= q_slots[b, t]) & (k_segments[b] == q_segments[b, t]) & (k_segments[b] != 0)
            if window is not None:
                seen &= q_slots[b, t] - slots < window
            for n in range(N):
                if seen.any():
                    head = n // (N // K)
                    scores = k[b, head, seen] @ q[b, t, n] / np.sqrt(H)
                    weights = np.exp(scores - scores.max())
                    out[b, t, n] = weights @ v[b, head, seen] / weights.sum()
    return out


def inputs(seed):
    draw = np.random.default_rng(seed)
    q, k, v = (draw.normal(size=shape) for shape in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    k_segments = np.sort(draw.integers(0, 3, (B, S)), axis=1).astype(np.int32)
    q_slots = (draw.integers(0, S - T + 1, (B, 1)) + np.arange(T)).astype(np.int32)
    q_segments = np.take_along_axis(k_segments, q_slots, 1)
    return q, k, v, q_segments, k_segments, q_slots


@pytest.mark.parametrize("implementation", ["reference", "blocked", None])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), window=st.sampled_from([None, 1, 3, 50]))
def test_values(implementation, seed, window):
    q, k, v, q_segments, k_segments, q_slots = inputs(seed)
    out = attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        q_segments=jnp.asarray(q_segments),
        k_segments=jnp.asarray(k_segments),
        q_slots=jnp.asarray(q_slots),
        window=window,
        implementation=implementation,
    )
    np.testing.assert_allclose(out, definition(q, k, v, q_segments, k_segments, q_slots, window), atol=1e-5)


def test_a_query_that_sees_nothing_gives_zero_and_a_zero_gradient():
    q, k, v, q_segments, k_segments, q_slots = inputs(3)
    q_segments[0, 2] = 0

    def loss(q):
        out = attention(
            q,
            jnp.asarray(k, jnp.float32),
            jnp.asarray(v, jnp.float32),
            q_segments=jnp.asarray(q_segments),
            k_segments=jnp.asarray(k_segments),
            q_slots=jnp.asarray(q_slots),
        )
        return (out**2).sum(), out

    gradient, out = jax.grad(loss, has_aux=True)(jnp.asarray(q, jnp.float32))
    np.testing.assert_array_equal(out[0, 2], 0)
    np.testing.assert_array_equal(gradient[0, 2], 0)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", ["blocked", None])
def test_implementations_have_the_same_gradient_on_a_longer_text(implementation):
    draw = np.random.default_rng(0)
    length = 700
    q = jnp.asarray(draw.normal(size=(1, length, 2, 4)), jnp.float32)
    k, v = (jnp.asarray(draw.normal(size=(1, 1, length, 4)), jnp.float32) for _ in range(2))
    segments = jnp.asarray((np.arange(length)[None] // 300) + 1, jnp.int32)
    slots = jnp.arange(length, dtype=jnp.int32)[None]

    def loss(q, k, v, implementation):
        options = dict(q_segments=segments, k_segments=segments, q_slots=slots, implementation=implementation)
        return (attention(q, k, v, **options) ** 2).sum()

    wanted, found = (jax.grad(loss, (0, 1, 2))(q, k, v, name) for name in ("reference", implementation))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("dtype, limit", [(jnp.float32, 2e-5), (jnp.bfloat16, 0.05)])
@pytest.mark.parametrize("most", [2**26, B * N * S * 4, 1])  # all queries at once, four (and two that are padding), one by one
def test_a_gradient_from_the_normaliser_is_the_scores_own(dtype, limit, most):
    *values, q_segments, k_segments, q_slots = inputs(3)
    q_segments[0, 2] = 0
    q, k, v = (jnp.asarray(x, dtype) for x in values)
    where: dict[str, Any] = dict(q_segments=jnp.asarray(q_segments), k_segments=jnp.asarray(k_segments))
    where |= dict(q_slots=jnp.asarray(q_slots), window=5, scale=0.3)
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), dtype)

    def wide(q, k, v):
        return reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)), **where)

    wanted = jax.vjp(wide, q, k, v)[1](d_out.astype(jnp.float32))
    out, normaliser = blocked.forward(q, k, v, **where, max_scores=most)
    found = blocked.backward(q, k, v, out=out, normaliser=normaliser, d_out=d_out, **where, max_scores=most)
    assert normaliser.dtype == jnp.float32 and (np.asarray(normaliser)[0, :, 2] == 0).all()
    for one, other in zip(wanted, found, strict=True):
        assert other.dtype == dtype
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=limit)
    np.testing.assert_array_equal(found[0][0, 2], 0)


def test_a_dtype_that_the_kernel_does_not_take_is_refused():
    q, k, one = jnp.zeros((1, 4, 1, 8), jnp.float16), jnp.zeros((1, 1, 4, 8), jnp.float16), jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"q is float16\[1, 4, 1, 8\]; 'tpu' accepts bfloat16 and float32, H up to 256"):
        attention(q, k, k, q_segments=one, k_segments=one, q_slots=one, implementation="tpu")


def test_norm_casts_before_the_weight_and_rotation_follows():
    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.normal(size=(1, 3, 2, 6)) * 3, jnp.bfloat16)
    weight = jnp.asarray(1 + 0.3 * draw.normal(size=6), jnp.float32)
    wide = np.asarray(x, np.float64)
    normed = jnp.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6), jnp.bfloat16)
    wanted = normed * weight.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rms_norm(x, weight, 1e-6)), np.asarray(wanted))
    angles = draw.normal(size=(1, 3, 3))
    angles = np.concatenate([angles, angles], -1)
    found = rms_norm_rope(
        x.astype(jnp.float32), weight, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), 1e-6
    )
    y = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    turned = np.concatenate([-y[..., 3:], y[..., :3]], -1)
    expected = y * np.cos(angles)[:, :, None] + turned * np.sin(angles)[:, :, None]
    np.testing.assert_allclose(found, expected, atol=1e-5)
