"""Rows worked on in parts: one big batch's gradient, and each way to balance experts over them by its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qwen3_jax import Batch, cross_entropy, init_train_state, make_mesh, make_train_step
from qwen3_jax.parallel.rules import TRAIN_RULES
from tests.model.models import CONFIGS, random_model, random_tokens
from tests.parallel.test_on_mesh import on_mesh, skewed

pytestmark = pytest.mark.usefixtures("quick")

ROWS, LENGTH = 8, 24


def uneven(rows=ROWS, length=LENGTH):
    """Rows that weigh unlike: packed, padded, some with few labels that count."""
    draw = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[1, 9:] = 2
    segments[2, 5:] = 0
    segments[5, :15] = 0
    mask = (draw.random((rows, length)) < np.linspace(0.1, 1, rows)[:, None]) * (segments != 0)
    tokens = random_tokens(rows, length, 3)
    labels = jnp.roll(tokens, -1, 1).at[0, :4].set(-100)
    return Batch(tokens, labels, jnp.asarray(mask, jnp.float32), jnp.asarray(segments))


def moved(model, batch, **options):
    """How far one step of plain descent at rate 1 moves each parameter, and the metrics."""
    optimizer = optax.sgd(1.0)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    state = init_train_state(jax.tree.map(jnp.copy, model), optimizer)
    step = make_train_step(model.config, optimizer, dtype=jnp.float32, rules=model.rules, **options)
    state, metrics = step(state, batch)
    return jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params), metrics


def close(found, wanted, scale=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=scale * max(np.abs(other).max(), 1e-3))


@pytest.mark.parametrize("name", ["dense", "alternating"])
def test_parts_are_one_big_batch(name):
    model, batch = skewed(name), uneven()
    options = dict(z_loss=1e-2, balance=0.1, balance_over="exact", router_z_loss=1e-2)
    wanted, whole = moved(model, batch, **options)
    found, metrics = moved(model, batch, parts=4, **options)
    close(found, wanted)
    for key in ("loss", "balance_loss", "router_z_loss", "router_entropy", "expert_load", "max_violation", "grad_norm"):
        np.testing.assert_allclose(metrics[key], whole[key], rtol=2e-6, atol=1e-7, err_msg=key)
    assert float(metrics["tokens"]) == float(whole["tokens"])


@pytest.mark.parametrize("over", ["microbatch", "running", "exact"])
def test_each_balance_is_its_own_definition(over):
    """Gradient and value of a loss that is written out: part after part, from the router's logits."""
    model, batch, parts = skewed("moe"), uneven(), 4
    config = model.config
    graph, params = nnx.split(model, nnx.Param)
    real = np.asarray(batch.segment_ids) != 0

    def written_out(params):
        out = nnx.merge(graph, params)(batch.tokens, segment_ids=batch.segment_ids)
        words = cross_entropy(out.logits, batch.labels, batch.mask)
        p = jax.nn.softmax(out.router)
        chosen = jax.nn.one_hot(jax.lax.top_k(out.router, config.num_experts_per_tok)[1], config.num_experts).sum(-2)
        p, chosen = (x * real[None, :, :, None] for x in (p, chosen))
        balance = 0.0
        for part in range(parts):
            counted = {"microbatch": [part], "running": range(part + 1), "exact": range(parts)}[over]
            hits = sum(chosen[:, other::parts].sum((0, 1, 2)) for other in counted)
            tokens = sum(real[other::parts].sum() for other in counted) * p.shape[0]
            balance += (hits / tokens * p[:, part::parts].sum((0, 1, 2))).sum()
        balance = balance * config.num_experts / (real.sum() * p.shape[0])
        return words + 0.1 * balance, balance

    wanted, balance = jax.jit(jax.grad(written_out, has_aux=True))(params)
    found, metrics = moved(model, batch, parts=parts, balance=0.1, balance_over=over)
    close(found, wanted)
    assert float(metrics["balance_loss"]) == pytest.approx(float(balance), rel=1e-6)


@pytest.mark.parametrize("wish, over", [("data=2,fsdp=2,expert=2", "exact"), ("fsdp=2,context=2,tensor=2", "running")])
def test_parts_on_a_mesh_are_parts_on_one_device(wish, over):
    model, batch = skewed("alternating"), uneven(16, 16)
    options = dict(parts=2, balance=0.1, balance_over=over, router_z_loss=1e-2)
    wanted, alone = moved(model, batch, **options)
    found, metrics = moved(on_mesh(model, make_mesh(wish), TRAIN_RULES), batch, **options)
    close(found, wanted)
    assert float(metrics["balance_loss"]) == pytest.approx(float(alone["balance_loss"]), rel=1e-6)


@pytest.mark.parametrize("parts, said", [(0, "parts is 0"), (3, "8 rows in 3 parts: 8 / 3 leaves 2")])
def test_parts_that_do_not_divide_are_refused(parts, said):
    with pytest.raises(ValueError, match=said):
        moved(random_model("dense"), uneven(), parts=parts)


def test_figures_of_a_dense_model_are_empty():
    _, metrics = moved(random_model("dense"), uneven())
    assert metrics["expert_load"].shape == (0, 0)
    assert float(metrics["balance_loss"]) == float(metrics["router_z_loss"]) == 0.0
    assert CONFIGS["dense"].num_experts == 0
