"""The TPU implementation: its values in the interpreter, and its machine code by the real compiler for every chip."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, SingleDeviceSharding

from pallas_kernels import attention
from pallas_kernels.attention import tpu
from pallas_kernels.attention.shapes import CASES
from qwen3_jax import Qwen3Config, abstract_model, init_cache
from qwen3_jax.parallel.mesh import AXES

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TRAINING = next(case for case in CASES if case.name == "30B-A3B, training")


def row(*runs: tuple[int, int]) -> np.ndarray:
    """A row of segments from pairs of an id and a number of slots."""
    return np.concatenate([np.full(count, number, np.int32) for number, count in runs])


def rows() -> dict[str, np.ndarray]:
    """Three rows of 130 queries over 200 slots, none a whole number of tiles."""
    k_segments = np.stack(
        [
            row((0, 9), (1, 70), (2, 30), (0, 91)),  # a packed row with padding on both sides
            row((1, 41), (0, 3), (2, 156)),  # a cache that the queries come last in
            row((1, 150), (2, 50)),  # a sequence split over two shards: this one has its first and its last piece
        ]
    )
    q_slots = np.stack([np.arange(130), np.arange(70, 200), np.r_[0:65, 135:200]]).astype(np.int32)
    q_segments = np.take_along_axis(k_segments, q_slots, 1)
    q_segments[1, 5:9] = 7  # a document that has no key
    return dict(q_segments=q_segments, k_segments=k_segments, q_slots=q_slots)


@pytest.mark.parametrize("window, dtype, close", [(None, jnp.bfloat16, 2e-2), (20, jnp.float32, 1e-6)])
def test_equal_to_the_reference(window, dtype, close):
    given = jax.tree.map(jnp.asarray, rows())
    draw = np.random.default_rng(0)
    q, d_out = (jnp.asarray(draw.normal(size=(3, 130, 2, 24)), dtype) for _ in range(2))
    k, v = (jnp.asarray(draw.normal(size=(3, 1, 200, 24)), dtype) for _ in range(2))

    def both(implementation):
        def op(q, k, v):
            return attention(q, k, v, **given, window=window, scale=0.3, implementation=implementation)

        out, pull = jax.vjp(op, q, k, v)
        return out, *pull(d_out)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        found = both("tpu")
    for one, other in zip(found, both("reference"), strict=True):
        assert one.dtype == other.dtype == dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=close * np.abs(other).max())
    blind = (given["q_segments"] == 0) | (given["q_segments"] == 7)
    assert blind.sum() == 34
    np.testing.assert_array_equal(found[0][blind], 0)
    np.testing.assert_array_equal(found[1][blind], 0)


def test_tiles_that_hide_everything_are_not_visited():
    one, slots = jnp.ones(512, jnp.int32), jnp.arange(512, dtype=jnp.int32)

    def visited(segments=one, slots=slots, window=None):
        return np.asarray(tpu.tiles_to_visit(segments[slots], segments, slots, window, 128, 128)).astype(int)

    np.testing.assert_array_equal(visited(), np.tri(4))
    np.testing.assert_array_equal(visited(window=100), np.eye(4) + np.eye(4, k=-1))
    packed = jnp.asarray(row((1, 200), (0, 56), (2, 128), (0, 128)))
    np.testing.assert_array_equal(visited(packed), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    split = jnp.concatenate([slots[:128], slots[384:]])
    np.testing.assert_array_equal(visited(slots=split), [[1, 0, 0, 0], [1, 1, 1, 1]])


def test_a_kernel_fetches_the_next_tile_that_it_visits():
    visited = jnp.asarray([[1, 0, 0], [0, 0, 1], [0, 1, 0]], bool)
    np.testing.assert_array_equal(tpu.next_column(visited), [[0, 2, 2], [2, 2, 2], [1, 1, 0]])
    np.testing.assert_array_equal(tpu.next_column(jnp.zeros((2, 2), bool)), 0)


@pytest.mark.parametrize(
    "dtype, wish, precision",
    [
        (jnp.float32, "highest", "HIGHEST"),
        (jnp.float32, "high", "HIGHEST"),
        (jnp.float32, "default", "DEFAULT"),
        (jnp.bfloat16, "highest", "DEFAULT"),
    ],
)
def test_every_product_has_the_precision_that_was_asked_for(dtype, wish, precision):
    given = jax.tree.map(jnp.asarray, rows())
    q, k = jnp.zeros((3, 130, 2, 24), dtype), jnp.zeros((3, 1, 200, 24), dtype)

    def op(q, k, v):
        return attention(q, k, v, **given, implementation="tpu")

    with jax.default_matmul_precision(wish):
        text = str(jax.make_jaxpr(lambda q, k, v: jax.vjp(op, q, k, v)[1](q))(q, k, k))
    # Two products forward, three for the queries' gradient, four for the keys'; one more outside, summed by the platform.
    kernels = re.findall(r"precision=\(Precision\.(\w+), Precision\.(\w+)\)", text)
    assert kernels.count((precision, precision)) >= 9
    assert {found for pair in kernels for found in pair} == {precision}


@pytest.mark.parametrize("chip", CHIPS)
def test_it_is_chosen_and_compiles_for_every_chip(chip):
    device = SingleDeviceSharding(topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0])
    case = TRAINING

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=device)

    def loss(q, k, v, segments, slots):
        out = attention(q, k, v, q_segments=segments, k_segments=segments, q_slots=slots)
        return out.astype(jnp.float32).sum()

    keys = shape(case.batch, case.kv_heads, case.slots, case.size)
    tokens = shape(case.batch, case.length, dtype=jnp.int32)
    args = shape(case.batch, case.length, case.heads, case.size), keys, keys, tokens, tokens
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*args).compile()
    text = compiled.as_text()
    assert text is not None and text.count('custom_call_target="tpu_custom_call"') == 3  # forward, of queries, of keys
    memory = compiled.memory_analysis()
    queries = 2 * case.batch * case.length * case.heads * case.size
    assert memory is not None and memory.temp_size_in_bytes < 8 * queries  # a score a pair would be 64 x


def kernels(text: str) -> dict[str, int]:
    """How often each of splash's kernels is called."""
    names = re.findall(r"%splash_mha_([a-z]+)_\S* = .* custom-call", text)
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.fixture(scope="module")
def mesh():
    devices = np.asarray(topologies.get_topology_desc(CHIPS["v5p"], "tpu").devices)
    sizes = dict(fsdp=2, context=2)
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


CONFIG = Qwen3Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)


@pytest.mark.parametrize("remat, forward", [("full", 2), ("save:attention_out", 1)])
def test_a_model_trains_with_it_on_a_split_sequence(mesh, remat, forward):
    """The policy that keeps attention's output keeps all that its gradient needs: the forward kernel does not run again."""
    model = abstract_model(CONFIG, mesh, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def loss(model, tokens):
        return (model(tokens, segment_ids=tokens, remat=remat, output="hidden").hidden ** 2).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(model, tokens).compile().as_text()
    assert text is not None and kernels(text) == {"dkv": 1, "dq": 1, "fwd": forward}


@pytest.mark.parametrize("length, forward", [(256, {"fwd": 1}), (1, {})])
def test_a_new_cache_is_filled_with_it_and_decoding_is_not(length, forward):
    device = SingleDeviceSharding(topologies.get_topology_desc(CHIPS["v5p"], "tpu").devices[0])

    def placed(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)

    model = placed(abstract_model(CONFIG, dtype=jnp.bfloat16))
    cache = placed(jax.eval_shape(lambda: init_cache(model, 2, 512)))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=device)

    def step(model, tokens, cache):
        return model(tokens, cache=cache, fresh=length > 1).cache

    text = jax.jit(step).lower(model, tokens, cache).compile().as_text()
    assert text is not None and kernels(text) == forward
