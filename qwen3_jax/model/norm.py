"""RMSNorm."""

from typing import Any

import jax
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from qwen3_jax.model.param import constant_param


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, cast back, then multiplied by its weight (`Qwen3RMSNorm` of transformers)."""

    def __init__(self, size: int, eps: float, *, param_dtype: DTypeLike):
        self.eps = eps
        self.weight = constant_param(1.0, (size,), ("norm",), param_dtype)

    def __call__(self, x: Float[Array, "*B D"], *, together: bool = False) -> Float[Array, "*B D"]:
        """The normalised x, in x's dtype.

        Args:
            x: any number of states.
            together: the weight's gradient is made before x's goes on. Left to itself, the TPU compiler makes that of the last
                norm behind the backward pass of all layers, and keeps what it is made of until then: three states a token.

        Returns:
            As many states.
        """
        weight = self.weight[...]
        if together:
            x, weight = _together(x, weight)
        return pallas_kernels.rms_norm(x, weight, self.eps)


@jax.custom_vjp
def _together(x: Array, weight: Array) -> tuple[Array, Array]:
    return x, weight


def _together_forward(x: Any, weight: Any) -> tuple[tuple[Array, Array], tuple[()] | None]:
    # A weight that is frozen has no gradient to wait for.
    return (x.value, weight.value), () if x.perturbed and weight.perturbed else None


def _together_backward(both: tuple[()] | None, gradients: tuple[Any, Any]) -> tuple[Array | None, ...]:
    if both is None or any(isinstance(each, SymbolicZero) for each in gradients):
        return tuple(None if isinstance(each, SymbolicZero) else each for each in gradients)
    return jax.lax.optimization_barrier(gradients)


_together.defvjp(_together_forward, _together_backward, symbolic_zeros=True)
