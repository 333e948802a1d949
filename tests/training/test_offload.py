"""Optimizer state in host memory: the same training, fetched a layer at a time, and on a TPU its bytes off the chip."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qwen3_jax import adamw, init_train_state, make_mesh, make_train_step
from qwen3_jax.cli.main import main
from qwen3_jax.runs.dry_run import dry_run
from qwen3_jax.runs.resolve import resolve
from qwen3_jax.training.offload import to_host
from qwen3_jax.training.optimizer import muon
from tests.model.models import random_model
from tests.parallel.test_on_mesh import batch, on_mesh, skewed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    "name, wish, optimizer", [("alternating", "fsdp=2,expert=4", adamw(1e-2)), ("dense", None, optax.adamw(1e-2))]
)
def test_training_is_the_same_and_stays_in_host_memory(name, wish, optimizer):
    """Also with an optimizer that knows nothing of host memory, to which a step hands its state fetched."""
    found = []
    for offload in (False, True):
        model = jax.tree.map(jnp.copy, skewed(name))
        if wish is not None:
            model = on_mesh(model, make_mesh(wish))
        state = init_train_state(model, optimizer, offload=offload)
        step = make_train_step(model.config, optimizer, dtype=jnp.float32)
        for _ in range(2):
            state, _ = step(state, batch())
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host" if offload else "device"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
        found.append([np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


OPTIMIZERS = {"adamw": adamw(1e-2, mu_dtype=jnp.bfloat16), "muon": muon(1e-2)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_fetches_a_layer_at_a_time(name):
    """The same updates and moments, none of which was on the device for all layers; the old ones where a step is left out."""
    params, optimizer = nnx.state(random_model("alternating"), nnx.Param), OPTIMIZERS[name]
    grads = jax.tree.map(lambda leaf: jnp.cos(leaf * 100), params)
    update = jax.jit(lambda grads, state, params, finite: optimizer.update(grads, state, params, finite=finite))
    state = optimizer.init(params)
    wanted = update(grads, state, params, True)
    there = to_host(state)
    found = update(grads, there, params, True)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-5, atol=1e-6)
    left_out = update(grads, there, params, False)[1]
    for old, kept in zip(jax.tree.leaves(there), jax.tree.leaves(left_out), strict=True):
        assert kept.sharding.memory_kind == ("pinned_host" if kept.ndim else "device")
        assert not kept.ndim or (np.asarray(kept) == np.asarray(old)).all()

    layers = {leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "segments" in str(path[0])}
    fetched = [
        each.aval.shape
        for eqn in _equations(jax.make_jaxpr(update)(grads, there, params, True).jaxpr)
        if eqn.primitive.name == "device_put"
        for each in eqn.invars
        if each.aval.memory_space == jax.memory.Space.Host
    ]
    assert fetched and layers.isdisjoint(fetched)


def _equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from _equations(getattr(value, "jaxpr", value))


def test_a_tpu_keeps_the_state_off_the_chip(tmp_path):
    """The step's arguments on the chip are a dry run's weights alone; with Muon, which leaves AdamW words and norms."""
    file = tmp_path / "run.toml"
    file.write_text(
        f'extends = "{CONFIGS / "demo.toml"}"\n[mesh]\ntopology = "v5p:2x2x2"\n[optimizer]\nname = "muon"\noffload = true\n'
    )
    (stage,) = dry_run(resolve(file).run).stages
    assert stage.memory["optimizer"] == 0
    # Its arrays are smaller than the tiles that they are padded to.
    assert main(["plan", str(file), "--json", str(tmp_path / "plan.json")]) == 0
    (found,) = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert found["bytes"]["arguments"] == pytest.approx(stage.memory["weights"], rel=0.3)
