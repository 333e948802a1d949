"""RMSNorm."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from qwen3_jax.model.param import constant_param


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, cast back, then multiplied by its weight (`Qwen3RMSNorm` of transformers)."""

    def __init__(self, size: int, eps: float, *, param_dtype: DTypeLike):
        self.eps = eps
        self.weight = constant_param(1.0, (size,), ("norm",), param_dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The normalised x, in x's dtype."""
        return pallas_kernels.rms_norm(x, self.weight[...], self.eps)
