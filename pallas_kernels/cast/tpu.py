"""A conversion as a TPU kernel: rows stream through VMEM, and the compiler sees a call that it cannot move."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

LANES, SUBLANES = 128, 8  # how XLA tiles both dtypes in memory

TALL = 16  # rows of a block of bfloat16 come by so many

# Values of a block: with double buffering 3 MiB of VMEM for float32 to bfloat16, and streams run at full width.
BLOCK = 2**18


def takes(shape: tuple[int, ...], source: jnp.dtype, target: jnp.dtype) -> bool:
    """Tells whether an array has whole tiles, so that joining its leading axes moves nothing, and the TPU its dtypes.

    Args:
        shape: the array's.
        source: its dtype.
        target: the result's.

    Returns:
        True where the kernel can be used.
    """
    if len(shape) < 2 or math.prod(shape) == 0 or {source, target} != {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return False
    return shape[-1] % LANES == 0 and shape[-2] % SUBLANES == 0 and shape[-1] * TALL <= BLOCK


def cast(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Converts floats block by block, rounding to nearest even.

    Args:
        x: of whole tiles, as `takes` says.
        dtype: of the result.

    Returns:
        x in that dtype.
    """
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    tall = min(rows, BLOCK // width // TALL * TALL)
    block = pl.BlockSpec((tall, width), lambda i: (i, 0))

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...].astype(out_ref.dtype)

    run = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, tall),),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows, width), dtype),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=x.size * (x.dtype.itemsize + dtype.itemsize)),
        name="cast",
    )
    return run(x.reshape(rows, width)).reshape(x.shape)
