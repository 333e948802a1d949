"""What is lowered for CUDA, and the values of what surrounds cuDNN; `tools/compile_for_gpu.py` makes the machine code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.attention import gpu, reference
from pallas_kernels.late import on_cuda


@pytest.mark.parametrize("dtype, inner, calls", [(jnp.bfloat16, 128, 3), (jnp.float32, 128, 0), (jnp.bfloat16, 96, 0)])
def test_the_grouped_matmul_of_16_bit_floats_is_a_mosaic_kernel(dtype, inner, calls):
    """Forward, and both gradients; what the kernels do not take goes to the loop over blocks."""

    def loss(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=True).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((256, inner), (4, 192, inner))]
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == calls
    assert ("stablehlo.while" in text) == (calls == 0)


def test_a_function_for_cuda_is_not_traced_elsewhere():
    def fails(x):
        raise RuntimeError("traced")

    def op(x):
        return jax.lax.platform_dependent(x, cuda=on_cuda(fails, jax.ShapeDtypeStruct(x.shape, x.dtype)), default=jnp.sin)

    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(jax.vmap(op))(x), jnp.sin(x))
    with pytest.raises(RuntimeError, match="traced"):
        jax.jit(op).trace(x).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("window", [None, 9])
def test_blocks_around_cudnn_equal_the_reference(monkeypatch, window):
    """jax's plain implementation of the same function stands in for cuDNN's."""
    attend = jax.nn.dot_product_attention
    lengths = []

    def plainly(*args, implementation, **options):
        assert implementation == "cudnn"
        lengths.append((args[0].shape[1], args[1].shape[1]))
        return attend(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plainly)
    monkeypatch.setattr(gpu, "BLOCK", 8)
    draw = np.random.default_rng(0)
    q, d_out = (jnp.asarray(draw.normal(size=(2, 21, 4, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(draw.normal(size=(2, 2, 27, 8)), jnp.float32) for _ in range(2))
    k_segments = np.repeat([[0, 1, 2, 0], [1, 2, 3, 4]], [2, 9, 10, 6], axis=1).astype(np.int32)
    q_slots = np.stack([np.arange(21), np.r_[0:7, 13:27]]).astype(np.int32)
    q_segments = np.take_along_axis(k_segments, q_slots, 1)
    q_segments[1, 4] = 9  # a document that has no key
    places = dict(q_segments=q_segments, k_segments=k_segments, q_slots=q_slots)
    given: dict[str, Any] = {**jax.tree.map(jnp.asarray, places), "window": window, "scale": 0.4}
    wanted, pull = jax.vjp(lambda q, k, v: reference.attention(q, k, v, **given), q, k, v)
    out, normaliser = gpu.forward(q, k, v, **given)
    found = out, *gpu.backward(q, k, v, out=out, normaliser=normaliser, d_out=d_out, **given)
    for one, other in zip(found, (wanted, *pull(d_out)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    blind = (q_segments == 0) | (q_segments == 9)
    np.testing.assert_array_equal(out[blind], 0)
    np.testing.assert_array_equal(found[1][blind], 0)
    assert set(lengths) == {(8, 28)}  # even, as cuDNN's gradient asks for
