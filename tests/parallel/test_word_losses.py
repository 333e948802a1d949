"""Losses over the words beside a softmax over all of them: values, gradients, 16-bit floats, and products that they cost."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from qwen3_jax import Batch, make_mesh, make_train_step
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.parallel.word_losses import weighted_word_loss, word_losses
from qwen3_jax.training.losses import cross_entropy, label_weights, mean_loss
from qwen3_jax.training.state import abstract_train_state
from qwen3_jax.tune.lora import LoraConfig
from tests.model.models import CONFIGS

pytestmark = pytest.mark.usefixtures("quick")

WORDS, ROWS, LENGTH, WIDTH, Z_LOSS = 93, 8, 6, 16, 0.1


def given():
    """Words, hidden states, labels of which some do not count, and a mask of fractions."""
    keys = jax.random.split(jax.random.key(0), 4)
    table, hidden = jax.random.normal(keys[0], (WORDS, WIDTH)), jax.random.normal(keys[1], (ROWS, LENGTH, WIDTH))
    labels = jax.random.randint(keys[2], (ROWS, LENGTH), 0, WORDS).at[0, :2].set(-100)
    return table, hidden, labels, jnp.round(jax.random.uniform(keys[3], (ROWS, LENGTH)), 1)


def plain(table, hidden, labels, mask):
    return cross_entropy(jnp.einsum("btd,vd->btv", hidden, table[:WORDS]), labels, mask, Z_LOSS)


def token_by_token(table, hidden, labels, mask):
    return mean_loss(*word_losses(table, hidden, labels, WORDS, 5), labels, mask, Z_LOSS)


def at_once(table, hidden, labels, mask):
    weights = label_weights(labels, mask)
    return weighted_word_loss(table, hidden, labels, weights, WORDS, Z_LOSS, 5).objective / weights.sum()


def on_mesh(wish, table, hidden, labels, mask):
    mesh = make_mesh(wish)
    padding = -WORDS % RULES.shards("vocab", mesh)
    table = jnp.pad(table, ((0, padding), (0, 0)), constant_values=1e4)
    axes = (("vocab", None), ("batch", "seq", None), ("batch", "seq"), ("batch", "seq"))
    arrays = zip((table, hidden, labels, mask), axes, strict=True)
    return mesh, [jax.device_put(x, NamedSharding(mesh, RULES.spec(*names, mesh=mesh))) for x, names in arrays]


@pytest.mark.parametrize("loss", [token_by_token, at_once])
@pytest.mark.parametrize("wish", ["", "fsdp=4,tensor=2", "data=2,context=2,tensor=2"])
def test_the_loss_equals_the_plain_one(loss, wish):
    """Losses to 1e-6, with and without a gradient; the derivatives of both inputs too, and none of words that pad the table."""
    wanted, wanted_gradients = jax.value_and_grad(plain, (0, 1))(*given())
    mesh, arrays = on_mesh(wish, *given()) if wish else (None, given())
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        both = jax.jit(lambda *arrays: (loss(*arrays), jax.value_and_grad(loss, (0, 1))(*arrays)))
        value, (found, gradients) = both(*arrays)
    np.testing.assert_allclose((value, found), (wanted, wanted), rtol=1e-6)
    d_table, d_hidden = map(np.asarray, gradients)
    np.testing.assert_allclose(d_table[:WORDS], wanted_gradients[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(d_table[WORDS:], 0)
    np.testing.assert_allclose(d_hidden, wanted_gradients[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_16_bits_are_scaled_in_32(dtype):
    """By 2^17, which float16 does not hold: what comes out it does, and is rounded twice."""
    table, hidden, labels, mask = given()
    weights, scale = label_weights(labels, mask), 2.0**17
    hidden, table = hidden.astype(dtype), (0.01 * table).astype(dtype).astype(jnp.float32)

    def dense(table, hidden):
        return plain(table, hidden, labels, mask) * weights.sum() * scale

    def ours(table, hidden):
        return weighted_word_loss(table, hidden, labels, weights, WORDS, Z_LOSS).objective * scale

    wanted = jax.grad(dense, (0, 1))(table, hidden.astype(jnp.float32))
    found = jax.jit(jax.grad(ours, (0, 1)))(table, hidden)
    assert [each.dtype for each in found] == [jnp.float32, dtype]
    for one, other in zip(found, wanted, strict=True):
        room = 2 * float(jnp.finfo(dtype).eps * jnp.abs(other).max())
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=room)


def test_the_sum_of_losses_is_only_looked_at():
    table, hidden, labels, mask = given()
    weights = label_weights(labels, mask)

    def looked_at(table, hidden, weights):
        return weighted_word_loss(table, hidden, labels, weights, WORDS, Z_LOSS).losses

    value, gradients = jax.jit(jax.value_and_grad(looked_at, (0, 1, 2)))(table, hidden, weights)
    np.testing.assert_allclose(value, cross_entropy(hidden @ table.T, labels, mask) * weights.sum(), rtol=1e-6)
    assert not any(jnp.any(each) for each in gradients)


@pytest.mark.parametrize("adapt, products", [(None, 3), (LoraConfig(rank=2), 2)])
def test_a_step_multiplies_tokens_by_words_three_times_and_by_frozen_ones_twice(adapt, products):
    """The same program for each part, everything rematerialised that can be: as it is lowered, no product of it is left out."""
    config = dataclasses.replace(CONFIGS["dense"], vocab_size=181)
    optimizer = optax.sgd(0.1)
    mesh = make_mesh("", devices=jax.devices()[:1])
    state = abstract_train_state(config, optimizer, mesh, adapt=adapt)
    tokens, mask = (
        jax.ShapeDtypeStruct((4, 16), dtype, sharding=NamedSharding(mesh, RULES.spec("batch", None, mesh=mesh)))
        for dtype in (jnp.int32, jnp.float32)
    )
    step = make_train_step(config, optimizer, adapt=adapt, parts=2, z_loss=1e-3, remat="full")
    text = step.lower(state, Batch(tokens, tokens, mask)).as_text()
    of_words = [line for line in text.splitlines() if "dot_general" in line and re.search(r"[<x]181x", line)]
    assert len(of_words) == products
