"""The model without its memory: shapes, dtypes and axes, for lowering, restoring and converting."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.rules import RULES


def abstract_model(
    config: Qwen3Config,
    mesh: jax.sharding.Mesh | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
) -> Qwen3:
    """A Qwen3 whose every parameter is a jax.ShapeDtypeStruct.

    `jax.jit(f).lower(abstract_model(config), ...)` compiles a program for a model that fits nowhere here.

    Args:
        config: the model's shape.
        mesh: each parameter then carries its NamedSharding by the table of qwen3_jax.parallel.rules.
        dtype: compute dtype.
        param_dtype: storage dtype.

    Returns:
        The module; each parameter keeps its logical axis names in its `out_sharding` metadata.
    """

    def init() -> Qwen3:
        return Qwen3(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)

    if mesh is None:
        return jax.eval_shape(init)
    present = set(mesh.axis_names)
    rules = []
    for name, axes in RULES:
        parts = (axes,) if isinstance(axes, str) else axes or ()
        rules.append((name, tuple(part for part in parts if part in present) or None))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        graph, state = nnx.get_abstract_model(init, mesh)
        return nnx.merge(graph, state)
