"""The TPU implementation: its values in the interpreter, and its machine code by the real compiler for every chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import PREFILL

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@pytest.mark.parametrize(
    "rows, sizes, inner, outer, dtype, layer",
    [
        (40, (0, 17, 0, 8, 15), 256, 128, "float32", 1),
        (50, (0, 0, 41, 0, 0), 128, 96, "float32", 7),
        (33, (1, 7, 8, 9, 0), 96, 128, "float32", -1),
        (33, (1, 7, 8, 9, 0), 128, 128, "bfloat16", 1),
        (9, (0, 0, 0, 0, 0), 256, 128, "float32", 1),
    ],
    ids=["empty groups", "one group and rows of none", "edges of a tile", "another dtype", "no rows"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_equal_to_the_reference(rows, sizes, inner, outer, dtype, layer, transposed):
    """Of the last layer of a stack, by its number or one past it.

    Of matrices with a part of a tile's lanes the kernel is given the other orientation.
    """
    generator = np.random.default_rng(rows)
    lhs = jnp.asarray(generator.normal(size=(rows, inner)), jnp.float32)
    rhs = jnp.asarray(generator.normal(size=(2, 5, *((outer, inner) if transposed else (inner, outer)))), dtype)
    cotangent = jnp.asarray(generator.normal(size=(rows, outer)), jnp.float32)

    def both(implementation):
        def op(lhs, rhs):
            options = dict(layer=layer, transpose_rhs=transposed, implementation=implementation)
            return grouped_matmul(lhs, rhs, jnp.asarray(sizes, jnp.int32), **options)

        out, pull = jax.vjp(op, lhs, rhs)
        return out, *pull(cotangent)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        found = both("tpu")
    for one, other in zip(found, both("reference"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chip", CHIPS)
def test_it_is_chosen_and_compiles_for_every_chip(chip):
    device = SingleDeviceSharding(topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0])
    case = PREFILL[0]

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=device)

    def loss(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=True).astype(jnp.float32).sum()

    args = shape(case.rows, case.inner), shape(case.groups, case.outer, case.inner), shape(case.groups, dtype=jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
    text = compiled.as_text()
    assert text is not None and text.count('custom_call_target="tpu_custom_call"') == 3  # the product and its two gradients
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2 * 2 * case.rows * (case.inner + case.outer)


@pytest.mark.parametrize("inner", [2048, 192])
def test_a_layer_is_read_from_its_stack(inner):
    """In a scan over layers no matrix is copied, whichever of its axes the compiler has laid along the lanes."""
    device = SingleDeviceSharding(topologies.get_topology_desc(CHIPS["v6e"], "tpu").devices[0])
    layers, groups, outer, rows = 3, 128, 2048, 64  # more than the chip keeps beside its products

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=device)

    def run(lhs, rhs, sizes):
        def one(total, layer):
            return total + grouped_matmul(lhs, rhs, sizes, layer=layer, transpose_rhs=True), None

        return jax.lax.scan(one, jnp.zeros((rows, outer), lhs.dtype), jnp.arange(layers))[0]

    args = shape(rows, inner), shape(layers, groups, outer, inner), shape(groups, dtype=jnp.int32)
    compiled = jax.jit(run).lower(*args).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and text.count('custom_call_target="tpu_custom_call"') == 1
    assert memory is not None and memory.temp_size_in_bytes < 2 * outer * inner  # one matrix of 384
