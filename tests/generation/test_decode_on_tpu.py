"""Decode compiled for v5p, without a device: the cache is written in place."""

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qwen3_jax import Qwen3Config, Sampling, abstract_model, init_cache
from qwen3_jax.generation.loop import advance, make_settings, start

ROWS, SLOTS = 16, 4096


def test_temporaries_are_a_small_part_of_the_cache():
    """All of decode: sampling, the thinking budget, one position per row. With the cache as scan inputs they were 100 %."""
    device = SingleDeviceSharding(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0])

    def placed(tree, dtype=None):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=device), tree)

    model = placed(abstract_model(Qwen3Config.preset("qwen3-0.6b")), jnp.bfloat16)
    settings = make_settings(model, ROWS, Sampling(), jax.random.key(0), (1,), None, None, 64)
    prompts = jax.ShapeDtypeStruct((ROWS, 32), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def begin(model, tokens, lengths, settings):
        return start(model, None, tokens, lengths, init_cache(model, ROWS, SLOTS), settings, 64, 0, 1)

    running = placed(jax.eval_shape(begin, model, *prompts, settings))
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(running.out.cache))

    def decode(model, running, settings):
        return advance(model, None, running, settings, settings.limit)

    memory = jax.jit(decode, donate_argnums=1).lower(model, running, placed(settings)).compile().memory_analysis()
    assert memory is not None and cache > 7e9
    assert memory.alias_size_in_bytes > cache
    assert memory.temp_size_in_bytes < 0.15 * cache
