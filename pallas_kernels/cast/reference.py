"""A plain conversion: the definition of cast."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cast(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Converts floats, rounding to nearest even.

    Args:
        x: any float dtype.
        dtype: of the result.

    Returns:
        x in that dtype.
    """
    return x.astype(dtype)
