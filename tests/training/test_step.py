"""A training step: its gradient is the loss's, its optimizer optax's, and a small model learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qwen3_jax import Batch, adamw, cross_entropy, init_train_state, load_balancing_loss, make_train_step
from qwen3_jax.training.optimizer import decayed
from qwen3_jax.training.state import trained_model
from tests.model.models import CONFIGS, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("quick")


def batch_of(tokens, segment_ids=None):
    return Batch(tokens=tokens, labels=jnp.roll(tokens, -1, 1), mask=jnp.ones(tokens.shape), segment_ids=segment_ids)


@pytest.mark.parametrize("name, sparse", [("mixed", 3), ("dense", 0)])
def test_one_step_of_sgd_moves_along_the_gradient_of_both_losses(name, sparse):
    config, model, tokens = CONFIGS[name], random_model(name), random_tokens(2, 9)
    optimizer = optax.sgd(0.1)
    batch = batch_of(tokens)

    def loss(params):
        out = nnx.merge(graph, params)(tokens)
        balance = load_balancing_loss(out.router, config.num_experts, config.num_experts_per_tok)
        return cross_entropy(out.logits, batch.labels, batch.mask) + config.router_aux_loss_coef * balance

    graph, params = nnx.split(model, nnx.Param)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.jit(jax.grad(loss))(params))
    # The step donates its state: give it copies.
    state = init_train_state(jax.tree.map(jnp.copy, model), optimizer)
    state, metrics = make_train_step(config, optimizer, dtype=jnp.float32)(state, batch)
    for wanted, found in zip(jax.tree.leaves(expected), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert int(state.step) == 1
    out = jax.jit(type(model).__call__)(model, tokens)
    assert float(metrics["loss"]) == pytest.approx(float(cross_entropy(out.logits, batch.labels)), rel=1e-5)
    np.testing.assert_allclose(metrics["expert_load"].sum(-1), np.ones(sparse), rtol=1e-6)


def test_a_small_model_learns_a_text_by_heart():
    config, tokens = CONFIGS["alternating"], random_tokens(4, 16, 7)
    optimizer = adamw(1e-2)
    state = init_train_state(jax.tree.map(jnp.copy, random_model("alternating")), optimizer)
    step = make_train_step(config, optimizer, dtype=jnp.float32)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch_of(tokens))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]
    model = trained_model(config, state, dtype=jnp.float32)
    logits = jax.jit(type(model).__call__)(model, tokens).logits
    assert float((logits[:, :-1].argmax(-1) == tokens[:, 1:]).mean()) > 0.9


def test_padding_is_no_part_of_the_balance():
    config, tokens = CONFIGS["moe"], random_tokens(1, 8)
    step = make_train_step(config, optax.sgd(0.0), dtype=jnp.float32)
    real = jnp.asarray([[1] * 5 + [0] * 3], jnp.int32)
    other = tokens.at[:, 5:].set(3)
    metrics = []
    for row in (tokens, other):
        state = init_train_state(jax.tree.map(jnp.copy, random_model("moe")), optax.sgd(0.0))
        batch = Batch(tokens=row, labels=tokens, mask=real, segment_ids=real)
        metrics.append(step(state, batch)[1])
    assert float(metrics[0]["balance_loss"]) == pytest.approx(float(metrics[1]["balance_loss"]), rel=1e-5)


def test_weight_decay_leaves_norms_and_biases():
    params = nnx.to_pure_dict(nnx.state(random_model("bias"), nnx.Param))
    flags = {jax.tree_util.keystr(path): flag for path, flag in jax.tree_util.tree_leaves_with_path(decayed(params))}
    kept = {name for name, flag in flags.items() if not flag}
    assert all("norm" in name or "bias" in name for name in kept)
    assert not any("norm" in name or "bias" in name for name, flag in flags.items() if flag)
    assert len(kept) == 1 + 4 + 4
