"""Muon one layer at a time is optax's; on a mesh it is what it is on one device; rates follow the run's step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from qwen3_jax import abstract_model, adamw, make_mesh
from qwen3_jax.training.muon import CONSISTENT_RMS, OUTPUTS, is_matrix
from qwen3_jax.training.offload import names_of
from qwen3_jax.training.optimizer import by_step, decayed, muon
from tests.model.models import random_model

pytestmark = pytest.mark.usefixtures("quick")


def tree(name="alternating"):
    return nnx.to_pure_dict(nnx.state(random_model(name), nnx.Param))


def noise(params, seed):
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(form, [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def dimensions(params):
    """optax's own way to name axes: those that are neither reduced nor output are a batch."""

    def of(path, leaf):
        if not is_matrix(path, leaf):
            return None
        name = [word for word in names_of(path) if word != "weight"][-1]
        inputs = 2 if name == "o" else 1
        axes = list(range(leaf.ndim))
        return contrib.MuonDimensionNumbers(tuple(axes[-inputs:]), tuple(axes[-inputs - OUTPUTS[name] : -inputs]))

    return jax.tree_util.tree_map_with_path(of, params)


def test_updates_are_those_of_optax():
    params = tree()
    ours = muon(1e-2, b1=0.9, adam_b1=0.8, b2=0.99, weight_decay=0.1, max_grad_norm=None)
    adam = optax.adamw(1e-2, b1=0.8, b2=0.99, weight_decay=0.1, mask=decayed)
    theirs = contrib.muon(
        1e-2,
        beta=0.9,
        weight_decay=0.1,
        weight_decay_mask=decayed,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=CONSISTENT_RMS,
    )
    optimizers = (ours, theirs, adam)
    states = [optimizer.init(params) for optimizer in optimizers]
    for seed in range(3):
        grads, found = noise(params, seed), []
        for at, optimizer in enumerate(optimizers):
            updates, states[at] = jax.jit(optimizer.update)(grads, states[at], params)
            found.append(updates)
        for (path, one), of_muon, of_adam in zip(
            jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), jax.tree.leaves(found[2]), strict=True
        ):
            wanted = of_muon if is_matrix(path, one) else of_adam
            np.testing.assert_allclose(one, wanted, rtol=1e-4, atol=2e-6, err_msg=str(names_of(path)))


def test_muon_takes_the_matrices_of_layers_and_experts():
    taken = {
        ".".join(names_of(path)[-3:])
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree("mixed"))
        if is_matrix(path, leaf)
    }
    attention = {f"attention.{name}.weight" for name in "qkvo"}
    dense = {f"mlp.{name}.weight" for name in ("gate", "up", "down")}
    assert {name for name in taken if "moe" not in name} == attention | dense
    assert sorted(name.split(".")[-1] for name in taken if "moe" in name) == ["down", "gate", "up"]


@pytest.mark.parametrize("wish", ["fsdp=2,expert=2,tensor=2", "fsdp=8"])
def test_muon_on_a_mesh_is_muon_on_one_device(wish):
    mesh, model = make_mesh(wish), random_model("alternating")
    params = nnx.state(model, nnx.Param)
    optimizer = muon(1e-2)
    grads = noise(params, 5)
    wanted, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    layouts = nnx.state(abstract_model(model.config, mesh), nnx.Param)

    def split(values):
        return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), values, layouts)

    with jax.set_mesh(mesh):
        there = split(params)
        found, _ = jax.jit(optimizer.update)(split(grads), jax.jit(optimizer.init)(there), there)
    for a, b, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), jax.tree.leaves(layouts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert a.sharding.is_equivalent_to(like.sharding, a.ndim)


def test_rates_follow_the_step_that_is_handed_over():
    optimizer: Any = by_step(lambda step: jnp.float32(10.0) * step)
    state = optimizer.init(None)
    found = []
    for step in (3, None, 7, None):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, step=step)
        found.append(float(updates["w"]))
    assert found == [-30.0, -10.0, -70.0, -30.0]


def test_the_first_moment_may_be_of_16_bits():
    params: Any = {"w": jnp.ones((4, 4))}
    optimizer: Any = adamw(1e-2, mu_dtype=jnp.bfloat16, weight_decay=0.0, max_grad_norm=None)
    state = optimizer.init(params)
    adam: Any = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    assert (adam.mu["w"].dtype, adam.nu["w"].dtype) == (jnp.bfloat16, jnp.float32)
    for _ in range(3):
        updates, state = optimizer.update({"w": jnp.full((4, 4), 0.3)}, state, params)
        np.testing.assert_allclose(updates["w"], -1e-2, rtol=1e-2)
