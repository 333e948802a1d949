"""Making the cache that a call of the model continues from."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen3_jax.model.cache import Cache
from qwen3_jax.model.transformer import Qwen3


def init_cache(model: Qwen3, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
    """An empty cache.

    Args:
        model: whose layers it serves.
        batch: rows.
        length: slots per row: prompt, padding and new tokens together.
        dtype: of keys and values; the model's compute dtype when None.

    Returns:
        The cache: 2 * L * B * K * S * H values.

    Raises:
        ValueError: batch or length below 1.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"a cache needs at least one row and one slot, found batch={batch}, length={length}")
    config = model.config
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
    dtype = model.dtype if dtype is None else dtype
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        segments=jnp.zeros((batch, length), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        positions=jnp.zeros((batch,), jnp.int32),
    )


def grown(cache: Cache, capacity: int) -> Cache:
    """The cache with more slots per row, or as it is.

    Args:
        cache: any.
        capacity: slots per row, at least as many as it has.
    """
    more = capacity - cache.capacity
    if not more:
        return cache
    large = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
    segments = jnp.pad(cache.segments, ((0, 0), (0, more)))
    return dataclasses.replace(cache, k=jnp.pad(cache.k, large), v=jnp.pad(cache.v, large), segments=segments)
