"""The cache that a call of the model continues from: made, made larger, and with the text that it holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from qwen3_jax.generation.rows import padded_rows, taken, whole
from qwen3_jax.model.cache import Cache, KeyValues
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import placed, spec, use_rules

KEYS = ("layers", "batch", "kv_heads", None, None)  # the axes of keys and values


def init_cache(model: Qwen3, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
    """An empty cache; of a model on a mesh, its rows and key heads are split as the model's are.

    Args:
        model: whose layers it serves.
        batch: rows. On a mesh the cache has as many as its shards divide, the last ones padding.
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
    dtype = model.dtype if dtype is None else dtype

    def zeros(shape: tuple[int, ...], dtype: DTypeLike, *axes: str | None) -> Array:
        return jnp.zeros(shape, dtype, out_sharding=spec(*axes))

    with on_mesh_of(model), use_rules(model.rules):
        batch = padded_rows(batch)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        return Cache(
            k=zeros(shape, dtype, *KEYS),
            v=zeros(shape, dtype, *KEYS),
            segments=zeros((batch, length), jnp.int32, "batch", None),
            lengths=zeros((batch,), jnp.int32, "batch"),
            positions=zeros((batch,), jnp.int32, "batch"),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache(Cache):
    """A Cache that knows its text: what a next turn needs to know of the turns before. `generate` returns it.

    Attributes:
        tokens: [B, S] int32, the token of every slot; -1 where there is none, or it is unknown.
        generated: [B, S] bool, slots whose token `generate` wrote, forced ones too.
        next_forced: [B] int32, where the row stands among the forced tokens of a thinking budget.
    """

    tokens: Any
    generated: Any
    next_forced: Any


def with_text(cache: Cache) -> TextCache:
    """The cache with its text, of which nothing is known unless it is a TextCache.

    Args:
        cache: any.

    Returns:
        It, its text without what stands past each row's length.
    """
    if isinstance(cache, TextCache):
        held = jnp.arange(cache.capacity, dtype=jnp.int32) < cache.lengths[:, None]
        return dataclasses.replace(cache, tokens=jnp.where(held, cache.tokens, -1), generated=cache.generated & held)
    unknown = jnp.full(cache.segments.shape, -1, jnp.int32)
    return TextCache(**vars(cache), tokens=unknown, generated=unknown > 0, next_forced=jnp.full_like(cache.lengths, -1))


def written(
    before: TextCache, after: Cache, tokens: Int[Array, "B T"], generated: bool, next_forced: Int[Array, " B"]
) -> TextCache:
    """The cache after a call of the model.

    Args:
        before: what the call was given.
        after: what it returned.
        tokens: its tokens; of those past a row's new length nothing is kept.
        generated: whether the model wrote them.
        next_forced: for the new cache.

    Returns:
        `after` with its text.
    """
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    slots = before.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    slots = jnp.where(slots < after.lengths[:, None], slots, before.capacity)  # out of bounds is dropped
    return TextCache(
        **vars(after),
        tokens=before.tokens.at[rows, slots].set(tokens, mode="drop"),
        generated=before.generated.at[rows, slots].set(generated, mode="drop"),
        next_forced=next_forced,
    )


def without_keys(cache: Cache) -> Cache:
    """The cache without keys and values, whose first axis is not the batch."""
    return dataclasses.replace(cache, k=None, v=None)


def in_rows(cache: Cache, rows: int, copies: int) -> Cache:
    """The cache with the rows that a call has: each of its own so many times, then padding.

    Args:
        cache: any.
        rows: of the result.
        copies: of each row.

    Returns:
        It, on a mesh laid out as `init_cache` does.
    """
    if copies > 1 or cache.segments.shape[0] != rows:
        # Rows of other shards are wanted here.
        stacks = [taken(placed(x, "layers", None, *KEYS[2:]), rows, copies, axis=1) for x in (cache.k, cache.v)]
        others = jax.tree.map(lambda x: taken(x, rows, copies), whole(without_keys(cache)))
        cache = dataclasses.replace(others, k=stacks[0], v=stacks[1])
    others = jax.tree.map(lambda x: placed(x, "batch", *[None] * (x.ndim - 1)), without_keys(cache))
    return dataclasses.replace(others, k=placed(cache.k, *KEYS), v=placed(cache.v, *KEYS))


def keys_of_samples(cache: Cache, samples: int) -> KeyValues:
    """Keys and values with each row as often as there are samples.

    Args:
        cache: B rows.
        samples: how many each becomes.

    Returns:
        Those of B * samples rows, those of one row side by side.
    """
    keys, layout = KeyValues(cache.k, cache.v), spec(*KEYS)
    if samples == 1:
        return keys

    def run(keys: KeyValues) -> KeyValues:
        return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=1), keys)

    return run(keys) if layout is None else jax.shard_map(run, in_specs=layout, out_specs=layout, check_vma=False)(keys)


def grown(cache: Cache, capacity: int) -> Cache:
    """The cache with more slots per row, or as it is.

    Args:
        cache: any.
        capacity: slots per row, at least as many as it has.
    """
    more = capacity - cache.capacity
    if not more:
        return cache
    slots, large = ((0, 0), (0, more)), ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
    longer = dict(k=jnp.pad(cache.k, large), v=jnp.pad(cache.v, large), segments=jnp.pad(cache.segments, slots))
    if isinstance(cache, TextCache):
        tokens = jnp.pad(cache.tokens, slots, constant_values=-1)
        longer |= dict(tokens=tokens, generated=jnp.pad(cache.generated, slots))
    return dataclasses.replace(cache, **longer)
