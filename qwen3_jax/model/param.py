"""How a parameter is declared: initialiser, shape, logical axes, dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen3_jax.parallel.rules import placed, spec


class ExpertParam(nnx.Param):
    """A weight with one matrix per expert, which a kernel may read from the stack of layers where it lies."""


def normal_param(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    stddev: float,
    dtype: DTypeLike,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A weight drawn from N(0, stddev squared), as the family initialises them.

    Args:
        key: PRNG key.
        shape: the weight's shape, `[out, in]` where it is a projection.
        axes: a logical name per axis (qwen3_jax.parallel.rules).
        stddev: standard deviation, `initializer_range` of the config.
        dtype: storage dtype.
        kind: the Param class, ExpertParam for weights of experts.

    Returns:
        The parameter.
    """
    return _param(kind, stddev * jax.random.normal(key, shape, dtype, out_sharding=spec(*axes)), axes)


def constant_param(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> nnx.Param:
    """A norm's weight (1) or a bias (0).

    Args:
        value: what every element begins as.
        shape: the parameter's shape.
        axes: a logical name per axis (qwen3_jax.parallel.rules).
        dtype: storage dtype.

    Returns:
        The parameter.
    """
    return _param(nnx.Param, jnp.full(shape, value, dtype), axes)


def _param(kind: type[nnx.Param], value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    if len(axes) != value.ndim:
        raise ValueError(f"{value.ndim} axes of shape {value.shape} need as many names, found {axes}")
    # Laid out here by our own table: flax's has no row that depends on an array's other axes.
    return kind(placed(value, *axes), out_sharding=axes, eager_sharding=False)
