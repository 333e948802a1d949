"""The model without its memory: shapes, dtypes and axes, for lowering, restoring and converting."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.rules import RULES, Rules


def abstract_model(
    config: Qwen3Config,
    mesh: Mesh | None = None,
    *,
    rules: Rules = RULES,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
    adapt: Callable[[Qwen3], Qwen3] | None = None,
) -> Qwen3:
    """A Qwen3 whose every parameter is a jax.ShapeDtypeStruct.

    `jax.jit(f).lower(abstract_model(config), ...)` compiles a program for a model that fits nowhere here; with a mesh, of
    compile-only devices too, inside `jax.set_mesh(mesh)`.

    Args:
        config: the model's shape.
        mesh: each parameter then carries its NamedSharding.
        rules: which mesh axes split what.
        dtype: compute dtype.
        param_dtype: storage dtype.
        adapt: what is done to the model then: a LoraConfig attaches its adapters.

    Returns:
        The module; each parameter keeps its logical axis names in its `out_sharding` metadata.

    Raises:
        MeshError: the model does not fit the mesh, with the arithmetic.
    """

    def init() -> Qwen3:
        model = Qwen3(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype, rules=rules)
        return model if adapt is None else adapt(model)

    if mesh is None:
        return jax.eval_shape(init)
    with jax.set_mesh(mesh):
        model = jax.eval_shape(init)
    # The shapes name an abstract mesh: restoring and lowering want the devices.
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)), model
    )
