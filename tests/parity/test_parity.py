"""Float32 logits, router logits, losses and gradients equal transformers' on 512 tokens, every weight random.

The fixtures were written by tools/make_parity_fixtures.py. Aimed for is 1e-5; the limit is 1e-4.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import cross_entropy, load_balancing_loss
from qwen3_jax.checkpoint.names import slots
from tests.parity import cases
from tests.parity.build import at, config_of, model_of

FOLDER = Path(__file__).parents[1] / "fixtures" / "parity"
EXPERTS = [name for name, content in cases.CASES.items() if content["model_type"] == "qwen3_moe"]
LIMIT = 2.5e-5  # the order of sums decides the last digit: 2.0e-5 is the largest seen, of logits up to 6


@jax.jit
def run(model, tokens, segment_ids=None):
    return model(tokens, segment_ids=segment_ids)


def kept(name):
    return np.load(FOLDER / f"{name}.npz")


@pytest.mark.parametrize("name", cases.CASES)
def test_logits(name):
    out, wanted = run(model_of(name), jnp.asarray(cases.tokens())), kept(name)
    assert wanted["logits"].shape == (cases.LENGTH, cases.VOCABULARY)
    np.testing.assert_allclose(out.logits[0], wanted["logits"], rtol=0, atol=LIMIT)
    labels = jnp.asarray(cases.tokens())[:, 1:]
    config, loss = config_of(name), cross_entropy(out.logits[:, :-1], labels)
    if name in EXPERTS:
        np.testing.assert_allclose(out.router[:, 0], wanted["router"], rtol=0, atol=LIMIT)
        balance = load_balancing_loss(out.router, config.num_experts, config.num_experts_per_tok)
        np.testing.assert_allclose(balance, wanted["balance"], rtol=1e-6)
        loss = loss + config.router_aux_loss_coef * balance
    np.testing.assert_allclose(loss, wanted["loss"], rtol=2e-6)


@pytest.mark.parametrize("name", cases.GRADIENTS)
def test_gradients(name):
    config, wanted, tokens = config_of(name), kept(name), jnp.asarray(cases.tokens())

    def loss(params):
        out = nnx.merge(graph, params)(tokens, remat="full")
        balance = load_balancing_loss(out.router, config.num_experts, max(1, config.num_experts_per_tok))
        return cross_entropy(out.logits[:, :-1], tokens[:, 1:]) + config.router_aux_loss_coef * balance

    graph, params = nnx.split(model_of(name), nnx.Param)
    gradients = jax.jit(jax.grad(loss))(params)
    told = {key.removeprefix("gradient."): wanted[key] for key in wanted.files if key.startswith("gradient.")}
    names = {slot.name for slot in slots(config)}
    assert set(told) == names
    for slot in slots(config):
        found, length = cases.probe(slot.name, at(gradients, slot)), max(told[slot.name][0], 1e-3)
        # Along a random direction of length 1 an error shows a root of the size smaller than it is.
        spread = np.sqrt([1.0] + [slot.size] * 7)
        np.testing.assert_allclose(
            found * spread / length, told[slot.name] * spread / length, rtol=0, atol=1e-4, err_msg=slot.name
        )


@pytest.mark.parametrize("name", cases.PADDED)
def test_padding_on_either_side(name):
    tokens, real = cases.padded()
    out, wanted = run(model_of(name), jnp.asarray(tokens), jnp.asarray(real)), kept(name)
    found = np.where(real[..., None] > 0, out.logits, 0)
    np.testing.assert_allclose(found, np.where(real[..., None] > 0, wanted["padded_logits"], 0), rtol=0, atol=LIMIT)
    if name in EXPERTS:
        config = config_of(name)
        # transformers computes its padding too, and masks it here.
        balance = load_balancing_loss(out.router, config.num_experts, config.num_experts_per_tok, jnp.asarray(real))
        np.testing.assert_allclose(balance, wanted["padded_balance"], rtol=2e-6)
