"""Decode compiled for v5p, without a device: the cache is written in place, on one chip and on each of four."""

import contextlib
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from qwen3_jax import Qwen3Config, Sampling, abstract_model, make_mesh
from qwen3_jax.generation.loop import advance, make_settings, start

SLOTS = 4096


@pytest.mark.parametrize("wish, rows", [("", 16), ("fsdp=2,tensor=2", 31)])
def test_temporaries_are_a_small_part_of_the_cache(wish, rows):
    """All of decode: sampling, the thinking budget, one position per row. With the cache as scan inputs they were 100 %.

    Of 31 rows two shards of them make 32.
    """
    devices = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices
    mesh = make_mesh(wish, devices=devices) if wish else None

    def placed(tree, dtype=None):
        """Shapes on the chips: laid out as they say, whole where they say nothing."""

        def one(leaf):
            spec = getattr(getattr(leaf, "sharding", None), "spec", PartitionSpec())
            home = SingleDeviceSharding(devices[0]) if mesh is None else NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=home)

        return jax.tree.map(one, tree)

    model = placed(abstract_model(Qwen3Config.preset("qwen3-0.6b"), mesh), jnp.bfloat16)
    settings = placed(make_settings(model, rows, Sampling(), jax.random.key(0), (1,), None, None, 64))
    prompts = jax.ShapeDtypeStruct((rows, 32), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)

    def begin(model, tokens, lengths, settings):
        return start(model, None, tokens, lengths, settings, capacity=SLOTS, slots=64)

    def decode(model, running, settings):
        return advance(model, None, running, settings, settings.limit)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        running = placed(jax.eval_shape(begin, model, *prompts, settings))
        memory = jax.jit(decode, donate_argnums=1).lower(model, running, settings).compile().memory_analysis()
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in (running.out.cache.k, running.out.cache.v)]
    cache = sum(2 * math.prod(shape) for shape in shapes)  # bytes on one chip
    assert running.out.cache.k.shape[1] == running.done.shape[0] == -(-rows // 2) * 2
    assert memory is not None and cache == (7516192768 if mesh is None else 3758096384)
    assert memory.alias_size_in_bytes > cache
    assert memory.temp_size_in_bytes < 0.15 * cache
