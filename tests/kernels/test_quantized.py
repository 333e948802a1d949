"""Quantised matrices: against the formulas written in numpy, within each block's bound, and the TPU kernel against both."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels import dequantize, quantize

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# arXiv 2305.14314, appendix E, as it is printed there.
NF4 = """-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0"""
LEVELS = {
    "int8": np.arange(-127, 128) / 1.0,
    "int4": np.arange(-7, 8) / 1.0,
    "nf4": np.array([float(value) for value in NF4.split(",")]),
}


def defined(x: np.ndarray, kind: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """What a matrix becomes, and the scale at each of its values: row by row, block by block."""
    values, scales = np.zeros(x.shape, np.float32), np.zeros(x.shape, np.float32)
    for place in np.ndindex(*x.shape[:-1], x.shape[-1] // block):
        here = (*place[:-1], slice(place[-1] * block, (place[-1] + 1) * block))
        scale = (np.abs(x[here]).max() / LEVELS[kind].max()).astype(ml_dtypes.bfloat16).astype(np.float32)
        levels = LEVELS[kind].astype(np.float32) * scale
        values[here] = levels[np.abs(x[here][:, None] - levels).argmin(axis=1)]
        scales[here] = scale
    return values, scales


@pytest.mark.parametrize("kind", LEVELS)
def test_values_are_those_of_the_formulas_and_within_their_bounds(kind):
    x = np.random.default_rng(0).standard_t(3, (3, 10, 48)).astype(np.float32)
    x[0, 0, :16] = 0
    codes, scales = quantize(jnp.asarray(x), kind, block=16)
    assert codes.shape == ((3, 10, 48) if kind == "int8" else (3, 5, 48)) and scales.shape == (3, 3, 10)
    assert (codes.dtype, scales.dtype) == (np.int8 if kind == "int8" else np.uint8, jnp.bfloat16)
    found = np.asarray(dequantize(codes, scales, kind, jnp.float32))
    wanted, scale = defined(x, kind, 16)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)
    # Half of the widest gap between levels, and what the scale's own rounding cuts off the largest value.
    gap = np.diff(LEVELS[kind]).max()
    assert (np.abs(found - x) <= scale * (gap / 2 + LEVELS[kind].max() * 2.0**-8)).all()
    again = quantize(jnp.asarray(found), kind, block=16)
    np.testing.assert_array_equal(dequantize(*again, kind, jnp.float32), found)  # what is quantised stays what it is
    rounded = dequantize(codes, scales, kind, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, jnp.asarray(found).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "kind, shape, block", [("int8", (2, 128, 1280), 64), ("int4", (256, 768), 64), ("nf4", (3, 384, 256), 128)]
)
def test_the_kernel_is_the_definition(kind, shape, block):
    codes, scales = quantize(jax.random.normal(jax.random.key(0), shape), kind, block=block)
    wanted = dequantize(codes, scales, kind, jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        found = dequantize(codes, scales, kind, jnp.bfloat16, implementation="tpu")
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_loop_over_layers_keeps_it_inside(chip):
    """Plain operations of the same loop would be done for the whole stack, in front of it, and the backward pass keep all."""
    device = SingleDeviceSharding(topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0])
    codes, scales = jax.eval_shape(lambda: quantize(jnp.ones((6, 512, 512)), "nf4"))
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
    x = jax.ShapeDtypeStruct((128, 512), jnp.bfloat16, sharding=device)

    def loss(x, codes, scales):
        def body(x, layer):
            return jnp.tanh(x @ dequantize(layer[0], layer[1], "nf4", jnp.bfloat16)), None

        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, (codes, scales))[0].astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).lower(x, place(codes), place(scales)).compile().as_text() or ""
    assert "bf16[6,512,512]" not in text and text.count('custom_call_target="tpu_custom_call"') >= 2


def test_what_is_refused():
    with pytest.raises(ValueError, match="quantize: kind is 'fp4'; accepted are int8, int4, nf4"):
        quantize(jnp.ones((2, 64)), "fp4")
    with pytest.raises(ValueError, match="quantize: rows of 96 in blocks of 64: 96 / 64 leaves 32"):
        quantize(jnp.ones((2, 96)), "nf4")
    with pytest.raises(ValueError, match="quantize: 3 rows in int4, two of which share bytes; accepted is an even number"):
        quantize(jnp.ones((3, 64)), "int4")
    codes, scales = quantize(jnp.ones((4, 64)), "int8")
    with pytest.raises(ValueError, match=r"dequantize: codes are int8\[4, 64\] .* accepted of nf4 are uint8"):
        dequantize(codes, scales, "nf4", jnp.float32)
    with pytest.raises(ValueError, match="dequantize: 4 x 64 to float32 by 1 scales of bfloat16; 'tpu' accepts multiples"):
        dequantize(codes, scales, "int8", jnp.float32, implementation="tpu")
    with pytest.raises(ValueError, match="dequantize: dtype is int8; accepted are float32, bfloat16 and float16"):
        dequantize(codes, scales, "int8", jnp.int8)
