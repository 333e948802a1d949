"""The cast: its values and derivative in the interpreter, its machine code, and what it is for: a loop that keeps it inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels import cast
from pallas_kernels.cast import tpu

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@pytest.mark.parametrize("shape", [(8, 128), (3, 24, 384), (2, 3, 40, 2048), (1, 2056, 128)])
@pytest.mark.parametrize("source, target", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_the_kernel_rounds_as_the_plain_conversion(shape, source, target):
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    x = x.at[..., 0].set(jnp.inf).at[..., 1].set(1 + 2**-8).astype(source)  # halfway between two of bfloat16
    assert tpu.takes(x.shape, x.dtype, jnp.dtype(target))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        found = cast(x, target, implementation="tpu")
    assert found.dtype == target
    np.testing.assert_array_equal(found, x.astype(target))


def test_the_gradient_is_cast_back():
    x, cotangent = jnp.ones((16, 128), jnp.float32), jax.random.normal(jax.random.key(0), (16, 128), jnp.bfloat16)
    ways = (lambda x: cast(x, jnp.bfloat16), lambda x: cast(x, jnp.bfloat16, implementation="reference"))
    for way in ways:
        _, pull = jax.vjp(way, x)
        (found,) = pull(cotangent)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, cotangent.astype(jnp.float32))
    many = jax.vmap(jax.grad(lambda x: cast(x, jnp.bfloat16).sum(dtype=jnp.float32)))(jnp.ones((3, 16, 128)))
    np.testing.assert_array_equal(many, np.ones((3, 16, 128)))


def test_what_has_the_dtype_is_left_alone():
    x = jnp.ones((16, 128))
    assert cast(x, jnp.float32) is x


def test_what_is_refused():
    with pytest.raises(ValueError, match="cast: dtype is int8; accepted is a float dtype"):
        cast(jnp.ones((8, 128)), jnp.int8)
    with pytest.raises(ValueError, match=r"cast: x is float32\[8, 100\], to bfloat16; 'tpu' accepts"):
        cast(jnp.ones((8, 100)), jnp.bfloat16, implementation="tpu")


@pytest.mark.parametrize("chip", CHIPS)
def test_a_loop_over_layers_keeps_it_inside(chip):
    """On every chip; a plain conversion of the same loop is one of the whole stack, in front of it."""
    device = SingleDeviceSharding(topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0])
    stack = jax.ShapeDtypeStruct((6, 512, 512), jnp.float32, sharding=device)
    x = jax.ShapeDtypeStruct((128, 512), jnp.bfloat16, sharding=device)

    def text(convert):
        def loss(stack, x):
            body = jax.checkpoint(lambda x, weight: (jnp.tanh(x @ convert(weight, jnp.bfloat16)), None), prevent_cse=False)
            return jax.lax.scan(body, x, stack)[0].astype(jnp.float32).sum()

        found = jax.jit(jax.grad(loss)).lower(stack, x).compile().as_text()
        assert found is not None
        return found

    assert "bf16[6,512,512]" in text(lambda weight, dtype: weight.astype(dtype))
    kept = text(cast)
    assert "bf16[6,512,512]" not in kept and 'custom_call_target="tpu_custom_call"' in kept
