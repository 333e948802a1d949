"""Another dtype as an operation of its own, which the compiler leaves where it stands: the public op and its derivative."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.cast import reference, tpu
from pallas_kernels.checks import check_float

__all__ = ["cast"]


def cast(
    x: Float[Array, "*shape"], dtype: DTypeLike, *, implementation: Literal["reference", "tpu"] | None = None
) -> Float[Array, "*shape"]:
    """Converts floats, at this point of the program on a TPU too.

    The TPU compiler moves a plain conversion of a layer's slice out of a loop over layers, in front of which it then converts,
    and keeps, the weights of all layers; `jax.lax.optimization_barrier` does not stop it. It cannot move a kernel.

    Args:
        x: any float dtype.
        dtype: of the result.
        implementation: "tpu" (a Pallas kernel, between float32 and bfloat16) or "reference" (a plain conversion); None is "tpu"
            where the program is lowered for a TPU and the array has whole tiles of it. Inside shard_map "tpu" needs
            check_vma=False.

    Returns:
        x in that dtype, rounded to nearest even; x itself where it has it. The gradient is cast to x's dtype.

    Raises:
        ValueError: dtypes that are not floats, an array that the implementation does not take.
    """
    check_float("cast", x=x)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"cast: dtype is {dtype}; accepted is a float dtype (float32, bfloat16, float16)")
    if implementation not in (None, "reference", "tpu"):
        raise ValueError(f"cast: implementation is {implementation!r}; accepted is None, 'reference' or 'tpu'")
    if implementation == "tpu" and not tpu.takes(x.shape, x.dtype, dtype):
        raise ValueError(
            f"cast: x is {x.dtype}{list(x.shape)}, to {dtype}; 'tpu' accepts float32 and bfloat16, at least two axes, "
            f"the last of whole {tpu.LANES}, the one before of whole {tpu.SUBLANES}"
        )
    return x if x.dtype == dtype else _cast(x, dtype, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _cast(x, dtype, implementation):
    if implementation is None and not tpu.takes(x.shape, x.dtype, dtype):
        implementation = "reference"
    by_name = {name: functools.partial(module.cast, dtype=dtype) for name, module in (("tpu", tpu), ("reference", reference))}
    if implementation is not None:
        return by_name[implementation](x)
    return jax.lax.platform_dependent(x, tpu=by_name["tpu"], default=by_name["reference"])


def _forward(x, dtype, implementation):
    # What is kept of x is its dtype, in an array of no elements.
    return _cast(x, dtype, implementation), jnp.zeros((0,), x.dtype)


def _backward(dtype, implementation, kept, d_out):
    return (d_out.astype(kept.dtype),)


_cast.defvjp(_forward, _backward)
