"""Steps that are not finite: nothing of them is kept, they are counted, and float16's scale finds its size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Batch, adamw, init_train_state, make_train_step
from qwen3_jax.training.guard import GROWS_AFTER, init_guard
from tests.model.models import CONFIGS, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("quick")


def batch_of(seed):
    tokens = random_tokens(2, 12, seed)
    return Batch(tokens, jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_step_that_is_not_finite_leaves_no_trace_but_its_count():
    optimizer = adamw(lambda step: 1e-2 / (1 + step))
    step = make_train_step(CONFIGS["moe"], optimizer, dtype=jnp.float32)
    good, bad = batch_of(0), dataclasses.replace(batch_of(1), mask=jnp.full((2, 12), jnp.nan))

    def start():
        return init_train_state(jax.tree.map(jnp.copy, random_model("moe")), optimizer)

    state, _ = step(start(), good)
    before = bits((state.params, state.opt_state))
    counts = []
    for given in (bad, bad):
        state, metrics = step(state, given)
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert not np.isfinite(metrics["loss"])
    assert counts == [(1, 1), (2, 2)]
    assert bits((state.params, state.opt_state)) == before
    # The rate is that of the run's step, which the bad ones were steps of.
    state, metrics = step(state, good)
    assert (int(state.step), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (4, 2, 0)
    other, _ = step(start(), good)
    other, _ = step(dataclasses.replace(other, step=jnp.int32(3)), good)
    assert bits(state.params) == bits(other.params)


def test_float16_finds_a_scale_and_gives_the_gradient_of_float32():
    optimizer, found = adamw(1e-2, max_grad_norm=None), {}
    for dtype, scale in ((jnp.float16, 2.0**34), (jnp.float32, 1.0)):
        model = jax.tree.map(jnp.copy, random_model("alternating"))
        state = init_train_state(model, optimizer, loss_scale=scale)
        step = make_train_step(model.config, optimizer, dtype=dtype)
        norms = []
        for _ in range(40):
            state, metrics = step(state, batch_of(2))
            norms.append(float(metrics["grad_norm"]))
            assert float(metrics.get("loss_scale", 0)) == (float(state.guard.scale) if dtype == jnp.float16 else 0)
            if np.isfinite(norms[-1]):
                break
        found[jnp.dtype(dtype)] = norms, float(state.guard.scale), int(state.guard.skipped)
    norms, scale, skipped = found[jnp.dtype(jnp.float16)]
    assert skipped == len(norms) - 1 > 3
    assert scale == 2.0 ** (34 - skipped)
    assert norms[-1] == pytest.approx(found[jnp.dtype(jnp.float32)][0][0], rel=2e-2)


def test_a_scale_grows_after_so_many_good_steps_and_shrinks_at_once():
    guard, after = init_guard(8.0), jax.jit(lambda guard, finite: guard.after(finite, scaling=True))
    for _ in range(GROWS_AFTER - 1):
        guard = after(guard, jnp.asarray(True))
    assert float(guard.scale) == 8.0
    guard = after(guard, jnp.asarray(True))
    assert (float(guard.scale), int(guard.good)) == (16.0, 0)
    guard = after(guard, jnp.asarray(False))
    assert (float(guard.scale), int(guard.skipped)) == (8.0, 1)
