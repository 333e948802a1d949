"""Optimizer state in host memory: the same training, and on a TPU its bytes off the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import adamw, init_train_state, make_mesh, make_train_step
from tests.parallel.test_on_mesh import batch, on_mesh, skewed

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("name, wish", [("dense", None), ("alternating", "fsdp=2,expert=4")])
def test_training_is_the_same_to_the_bit_and_stays_in_host_memory(name, wish):
    optimizer, found = adamw(1e-2), []
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
        found.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.opt_state))])
    assert found[0] == found[1]
