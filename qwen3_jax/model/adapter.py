"""The pair of low rank beside a frozen matrix (LoRA, arXiv 2106.09685): what it holds; its layer multiplies with it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen3_jax.model.param import ExpertParam
from qwen3_jax.model.quantized import Quantized, axes_of, stacked_axes
from qwen3_jax.parallel.rules import placed, spec


class ExpertLoRAParam(ExpertParam, nnx.LoRAParam):
    """A factor with one matrix per expert: it stays where the experts' own matrices do."""


class Adapter(nnx.Module):
    """The factors of an update of a matrix W [out..., in...], which with it is W + scale * b a.

    `a` [r, in...] and `b` [out..., r] lie behind the axes that W has of layers and experts, split over a mesh as W is. They are
    multiplied in the dtype of the layer's input, one after the other: the update itself is never made.
    """

    def __init__(
        self,
        weight: nnx.Param | Quantized,
        outputs: int,
        *,
        rank: int,
        scale: float,
        key: jax.Array,
        param_dtype: DTypeLike,
    ):
        """Factors that begin as PEFT's do: a uniform within 1 / sqrt(in), b 0, so that the update begins at 0.

        Args:
            weight: W, which names its axes.
            outputs: how many axes W's output has.
            rank: r.
            scale: of the update.
            key: PRNG key.
            param_dtype: storage dtype.
        """
        shape, axes = weight.shape, axes_of(weight)
        held = weight.codes if isinstance(weight, Quantized) else weight
        kind = ExpertLoRAParam if isinstance(held, ExpertParam) else nnx.LoRAParam
        stacked = stacked_axes(axes)
        inner = stacked + outputs
        self.scale = scale
        bound = 1 / math.sqrt(math.prod(shape[inner:]))
        a_axes = (*axes[:stacked], "rank", *axes[inner:])
        a_shape = (*shape[:stacked], rank, *shape[inner:])
        a = jax.random.uniform(key, a_shape, param_dtype, -bound, bound, out_sharding=spec(*a_axes))
        b_axes = (*axes[:inner], "rank")
        b = jnp.zeros((*shape[:inner], rank), param_dtype)
        self.a = kind(placed(a, *a_axes), out_sharding=a_axes, eager_sharding=False)
        self.b = kind(placed(b, *b_axes), out_sharding=b_axes, eager_sharding=False)
