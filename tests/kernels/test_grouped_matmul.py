"""The grouped matmul and its gradients against a float64 loop, whatever the group sizes, orientation and stacking."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.blocked import row_block

K, N, G, L = 12, 10, 5, 3


def definition(lhs, rhs, sizes):
    out, at = np.zeros((lhs.shape[0], rhs.shape[-1])), 0
    for group, size in enumerate(sizes):
        out[at : at + size] = lhs[at : at + size] @ rhs[group]
        at += size
    return out


def draw(seed, rows):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, K)), generator.normal(size=(L, G, K, N)), generator.normal(size=(rows, N))


@st.composite
def cases(take):
    kind = take(st.sampled_from(["any", "one group", "edges"]))
    if kind == "one group":
        sizes = [0] * G
        sizes[take(st.integers(0, G - 1))] = take(st.integers(0, 40))
    elif kind == "edges":
        block = row_block(40, G)
        sizes = [take(st.sampled_from([0, 1, block - 1, block, block + 1])) for _ in range(G)]
    else:
        sizes = [take(st.integers(0, 12)) for _ in range(G)]
    return sizes, sum(sizes) + take(st.integers(0, 5)), take(st.booleans()), take(st.booleans()), take(st.integers(0, 9))


@jax.jit(static_argnames=("transposed", "implementation"))
def both(lhs, rhs, sizes, layer, cotangent, transposed, implementation):
    def op(lhs, rhs):
        return grouped_matmul(
            lhs, rhs, sizes, layer=layer if rhs.ndim == 4 else None, transpose_rhs=transposed, implementation=implementation
        )

    out, pull = jax.vjp(op, lhs, rhs)
    return out, *pull(cotangent)


@settings(max_examples=40, deadline=None)
@given(case=cases(), implementation=st.sampled_from(["blocked", "reference"]))
def test_value_and_gradients(case, implementation):
    sizes, rows, transposed, stacked, seed = case
    rows = max(rows, 1)
    padded = 64  # few compiled shapes; rows past the groups are zero, whatever they hold
    lhs, stack, cotangent = draw(seed, padded)
    total, layer = sum(sizes), seed % L
    weights = stack[layer]
    given_rhs = stack if stacked else weights
    if transposed:
        given_rhs = given_rhs.swapaxes(-1, -2)
    out, d_lhs, d_rhs = both(
        jnp.asarray(lhs, jnp.float32),
        jnp.asarray(given_rhs, jnp.float32),
        jnp.asarray(sizes, jnp.int32),
        jnp.int32(layer),
        jnp.asarray(cotangent, jnp.float32),
        transposed,
        implementation,
    )
    close = dict(rtol=0, atol=2e-5)
    np.testing.assert_allclose(out, definition(lhs, weights, sizes), **close)
    np.testing.assert_allclose(d_lhs, definition(cotangent, weights.swapaxes(-1, -2), sizes), **close)
    wanted, at = np.zeros((G, K, N)), 0
    for group, size in enumerate(sizes):
        wanted[group] = lhs[at : at + size].T @ cotangent[at : at + size]
        at += size
    assert at == total
    found = np.asarray(d_rhs[layer] if stacked else d_rhs)
    np.testing.assert_allclose(found.swapaxes(-1, -2) if transposed else found, wanted, **close)
    if stacked:
        assert not np.asarray(d_rhs)[[i for i in range(L) if i != layer]].any()


def test_bfloat16_rows_with_float32_weights_accumulate_in_float32():
    lhs, stack, _ = draw(0, 64)
    sizes = jnp.asarray([10, 20, 0, 30, 4], jnp.int32)
    out = grouped_matmul(jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(stack[0], jnp.float32), sizes)
    assert out.dtype == jnp.bfloat16
    rows, weights = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (lhs, stack[0]))
    wanted = definition(rows, weights, sizes)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=2**-8, atol=1e-3)


def test_infinities_past_the_groups_reach_nothing():
    lhs, stack, cotangent = draw(1, 64)
    lhs[40:] = np.inf
    cotangent[40:] = np.nan
    sizes = jnp.asarray([8, 8, 8, 8, 8], jnp.int32)
    arrays = (jnp.asarray(x, jnp.float32) for x in (lhs, stack[0]))
    results = both(*arrays, sizes, jnp.int32(0), jnp.asarray(cotangent, jnp.float32), False, "blocked")
    assert all(np.isfinite(x).all() for x in results)
    assert not np.asarray(results[0])[40:].any()


def test_vmap_over_rows_and_sizes_equals_a_loop():
    lhs, stack, _ = draw(2, 128)
    rows = jnp.asarray(lhs.reshape(2, 64, K), jnp.float32)
    sizes = jnp.asarray([[10, 0, 5, 20, 3], [0, 64, 0, 0, 0]], jnp.int32)
    rhs = jnp.asarray(stack[0], jnp.float32)
    mapped = jax.jit(jax.vmap(lambda r, s: grouped_matmul(r, rhs, s)))(rows, sizes)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], grouped_matmul(rows[i], rhs, sizes[i]), atol=1e-5)


def test_no_array_of_all_rows_by_all_groups():
    rows, k, n, groups = 512, 32, 48, 16

    def loss(lhs, rhs, sizes):
        return (grouped_matmul(lhs, rhs, sizes) ** 2).sum()

    shapes = (
        jax.ShapeDtypeStruct((rows, k), jnp.float32),
        jax.ShapeDtypeStruct((groups, k, n), jnp.float32),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    assert text
    largest = max(np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text))
    assert largest <= max(rows * n, groups * k * n)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(lhs=jnp.zeros((4, K + 1))), "lhs"),
        (dict(group_sizes=jnp.zeros((G + 1,), jnp.int32)), "group_sizes"),
        (dict(layer=jnp.int32(0)), "layer is given"),
        (dict(rhs=jnp.zeros((L, G, K, N))), "layer is missing"),
        (dict(implementation="fast"), "implementation is 'fast'"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, says):
    inputs = dict(lhs=jnp.zeros((4, K)), rhs=jnp.zeros((G, K, N)), group_sizes=jnp.zeros((G,), jnp.int32)) | change
    unchecked = getattr(grouped_matmul, "__wrapped__", grouped_matmul)
    with pytest.raises(ValueError, match=says):
        unchecked(**inputs)
