"""Losses against their definitions written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax import cross_entropy, load_balancing_loss
from qwen3_jax.training.losses import balance_of_counts
from qwen3_jax.training.router import router_metrics
from tests.model.models import random_model, random_tokens

pytestmark = pytest.mark.usefixtures("quick")


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), z_loss=st.sampled_from([0.0, 1e-2]), share=st.floats(0.1, 1.0))
def test_cross_entropy_is_the_mean_over_tokens_that_count(seed, z_loss, share):
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(size=(2, 7, 11)) * 3, draw.integers(0, 11, (2, 7))
    mask = (draw.random((2, 7)) < share).astype(np.float32)
    mask[0, 0] = 1
    normaliser = np.log(np.exp(logits).sum(-1))
    each = normaliser - np.take_along_axis(logits, labels[..., None], -1)[..., 0] + z_loss * normaliser**2
    expected = (each * mask).sum() / mask.sum()
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(mask), z_loss)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_no_tokens_is_zero_with_a_zero_gradient():
    logits = jnp.ones((1, 3, 5))
    loss, grad = jax.value_and_grad(cross_entropy)(logits, jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3)))
    assert float(loss) == 0
    np.testing.assert_array_equal(grad, np.zeros((1, 3, 5)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), top_k=st.integers(1, 4), masked=st.booleans())
def test_balance_pools_the_rows_of_all_layers(seed, top_k, masked):
    draw = np.random.default_rng(seed)
    router = draw.normal(size=(3, 2, 5, 6)) * 2
    mask = np.ones((2, 5), np.float32)
    if masked:
        mask[1, 2:] = 0
    probabilities = softmax(router)
    rows = probabilities[:, mask > 0].reshape(-1, 6)
    chosen = np.argsort(-rows, axis=-1)[:, :top_k]
    share = np.bincount(chosen.reshape(-1), minlength=6) / len(rows)
    expected = 6 * (share * rows.mean(0)).sum()
    found = load_balancing_loss(jnp.asarray(router, jnp.float32), 6, top_k, jnp.asarray(mask) if masked else None)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_weights_are_relative_and_negative_labels_count_nowhere():
    logits, labels = jax.random.normal(jax.random.key(0), (1, 4, 5)), jnp.asarray([[1, 2, -100, 3]])
    mask = jnp.asarray([[0.0, 0.03, 0.5, 0.01]])
    each = [float(cross_entropy(logits[:, t : t + 1], labels[:, t : t + 1])) for t in range(4)]
    assert float(cross_entropy(logits, labels, mask)) == pytest.approx((3 * each[1] + each[3]) / 4, rel=1e-5)
    assert float(cross_entropy(logits, labels)) == pytest.approx((each[0] + each[1] + each[3]) / 3, rel=1e-5)
    with pytest.raises(ValueError, match=r"mask is \[1, 3\], logits are of tokens \[1, 4\]"):
        getattr(cross_entropy, "__wrapped__", cross_entropy)(logits, labels, mask[:, :3])  # past the tests' type hook
    router = jax.random.normal(jax.random.key(1), (2, 1, 4, 6))
    halves = [float(load_balancing_loss(router, 6, 2, weight * jnp.sign(mask))) for weight in (1.0, 0.01)]
    assert halves[0] == pytest.approx(halves[1], rel=1e-5)


def test_balance_is_top_k_when_even_and_grows_when_not():
    even = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 4096, 8)) * 1e-3, jnp.float32)
    assert float(load_balancing_loss(even, 8, 2)) == pytest.approx(2.0, abs=0.01)
    skewed = even.at[..., 0].add(9.0)
    assert float(load_balancing_loss(skewed, 8, 2)) > 7
    with pytest.raises(ValueError, match="router logits are for 8 experts; num_experts=4"):
        load_balancing_loss(even, 4, 2)


def test_what_the_model_counts_is_what_its_router_says():
    """Of real tokens only: the loss of counts is that of logits, and shares are those of the chosen."""
    model, tokens = random_model("moe"), random_tokens(3, 12)
    segments = jnp.ones((3, 12), jnp.int32).at[1, 7:].set(0).at[2, 4:].set(2)
    out, real = model(tokens, segment_ids=segments), segments != 0
    top_k = model.config.num_experts_per_tok
    wanted = load_balancing_loss(out.router, model.config.num_experts, top_k, real.astype(jnp.float32))
    np.testing.assert_allclose(balance_of_counts(out.counts, out.probabilities, top_k), wanted, rtol=1e-6)
    chosen = jax.nn.one_hot(jax.lax.top_k(out.router, top_k)[1], model.config.num_experts).sum(axis=-2)
    np.testing.assert_array_equal(out.counts, (chosen * real[..., None]).sum(axis=2))
    logits, counted = np.asarray(out.router, np.float64), np.asarray(real)
    normaliser = np.log(np.exp(logits).sum(-1))
    p = softmax(logits)
    np.testing.assert_allclose(out.squares, (normaliser**2 * counted).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(out.entropy, (-(p * np.log(p)).sum(-1) * counted).sum(-1), rtol=1e-5)


def test_figures_of_the_router_are_those_of_its_counts():
    found = router_metrics(jnp.asarray([[2.0, 6, 0, 0], [3, 3, 3, 3]]))
    np.testing.assert_allclose(found["expert_load"], [[0.25, 0.75, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(found["max_violation"], [2, 0], atol=1e-6)
    np.testing.assert_array_equal(found["dead_experts"], [2, 0])
