"""Quantised matrices: against the formulas written in numpy, within each block's bound, and the TPU kernel against both."""

import re

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
    "kind, shape, block, dtype",
    [
        ("int8", (2, 128, 1280), 64, jnp.bfloat16),
        ("int4", (256, 768), 64, jnp.bfloat16),
        ("nf4", (2, 384, 256), 128, jnp.bfloat16),
        # Blocks of the result that hang over the edge, and behind the last scale.
        ("int8", (303, 1280), 20, jnp.float32),
        ("nf4", (258, 1096), 4, jnp.bfloat16),
        ("int4", (10, 2112), 64, jnp.float16),
        ("nf4", (2, 1880), 47, jnp.float32),
    ],
)
def test_the_kernel_is_the_definition(kind, shape, block, dtype):
    codes, scales = quantize(jax.random.normal(jax.random.key(0), shape), kind, block=block)
    wanted = dequantize(codes, scales, kind, dtype)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        found = dequantize(codes, scales, kind, dtype, implementation="tpu")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_loop_over_layers_keeps_it_inside(chip):
    """Plain operations of the same loop would be done for the whole stack, in front of it, and the backward pass keep all."""
    device = SingleDeviceSharding(topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0])
    # Whole lanes; and neither rows nor columns whole lanes, more scales a row than there is room for, a result of float16.
    forms = [(512, 512, 64, jnp.bfloat16), (600, 1504, 2, jnp.float16)]
    forms = forms if chip in ("v5e", "v5p") else forms[:1]  # two compilers' word will do
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
    made = [quantize_shapes(out, inner, block) for out, inner, block, _ in forms]
    xs = [jax.ShapeDtypeStruct((128, inner), dtype, sharding=device) for _, inner, _, dtype in forms]

    def loss(xs, stacks):
        def body(xs, layer):
            matrices = [dequantize(codes, scales, "nf4", x.dtype) for (codes, scales), x in zip(layer, xs, strict=True)]
            return [jnp.tanh(x @ matrix.T @ matrix) for x, matrix in zip(xs, matrices, strict=True)], None

        ends = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), xs, stacks)[0]
        return sum(end.astype(jnp.float32).sum() for end in ends)

    text = jax.jit(jax.grad(loss)).lower(xs, jax.tree.map(place, made)).compile().as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') >= 2 * len(forms)
    for out, inner, *_ in forms:
        assert not re.search(rf"(bf16|f16|f32)\[6,({out},{inner}|{inner},{out})\]", text)


def quantize_shapes(out: int, inner: int, block: int):
    return jax.eval_shape(lambda: quantize(jnp.ones((6, out, inner)), "nf4", block=block))


def test_what_the_kernel_has_no_room_for_is_warned_of_on_a_tpu(monkeypatch):
    codes, scales = quantize(jnp.ones((4, 1024)), "int8", block=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.warns(UserWarning, match="dequantize: 4 x 1024 by 1024 scales a row of bfloat16; 'tpu' accepts scales of"):
        dequantize(codes, scales, "int8", jnp.float32)


def test_scales_have_no_derivative():
    codes, scales = quantize(jnp.ones((4, 64)), "nf4", block=16)
    x = jnp.ones((2, 64))

    def run(x, scales):
        return (x @ dequantize(codes, scales, "nf4", jnp.float32).T).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(run))(x, scales), np.full((2, 64), 4.0))
    with pytest.raises(ValueError, match="dequantize: scales are differentiated, and they are frozen as their codes are; acc"):
        jax.jit(jax.grad(run, argnums=1))(x, scales)


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
    with pytest.raises(ValueError, match="dequantize: 4 x 64 by 1 scales a row of float32; 'tpu' accepts scales of bfloat16"):
        dequantize(codes, scales.astype(jnp.float32), "int8", jnp.float32, implementation="tpu")
    with pytest.raises(ValueError, match="dequantize: dtype is int8; accepted are float32, bfloat16 and float16"):
        dequantize(codes, scales, "int8", jnp.int8)
