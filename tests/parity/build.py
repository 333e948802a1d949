"""Our model of a parity case, filled tensor by tensor through the name table."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen3_jax import Qwen3, Qwen3Config, abstract_model
from qwen3_jax.checkpoint.names import Slot, slots, stacked_shape
from tests.parity import cases


def config_of(name: str) -> Qwen3Config:
    return Qwen3Config.from_hf(cases.CASES[name], strict=True)


@functools.cache
def model_of(name: str) -> Qwen3:
    return filled_model(cases.CASES[name])


def filled_model(content: dict[str, Any], draw: Callable[[str, tuple[int, ...]], np.ndarray] = cases.weight) -> Qwen3:
    config = Qwen3Config.from_hf(content, strict=True)
    whole: dict[str, np.ndarray] = {}
    for slot in slots(config):
        stack = whole.setdefault(slot.path, np.full(stacked_shape(slot, config), np.nan, np.float32))
        stack[slot.index] = draw(slot.name, slot.shape).reshape(slot.part)
    model = abstract_model(config, dtype=jnp.float32)
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, nest(whole))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, state))


def nest(flat):
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return tree


def at(tree, slot: Slot):
    """The slot's slice of a parameter tree, in the hub's shape."""
    node: Any = nnx.to_pure_dict(tree)
    for key in slot.path.split("."):
        node = node[int(key) if key.isdigit() else key]
    return np.asarray(node[slot.index]).reshape(slot.shape)
