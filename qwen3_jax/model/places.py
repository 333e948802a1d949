"""Where tokens stand: positions, documents and slots, worked out once per call from what the caller gave.

Padding is segment 0; documents are 1, 2, ... A document is a run of equal segment ids, and its positions begin at 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.attention import Places
from qwen3_jax.model.cache import Cache
from qwen3_jax.model.rope import rope_tables


def place(
    config: Qwen3Config,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache | None,
) -> tuple[Places, Int[Array, "B"], Int[Array, "B"]]:
    """Places of the tokens, and where each row stands after them.

    Args:
        config: the model's.
        tokens: the words; only their shape is read.
        positions: position of each token in its document; None: counted from the segments, going on from the cache.
        segment_ids: document of each token; None: one document, going on from the cache.
        cache: what the call continues from, or None.

    Returns:
        The places; the next slot and the next position of each row: just past its last token that is not padding.
    """
    batch, length = tokens.shape
    rows = jnp.zeros((batch,), jnp.int32)
    starts, before, last = (rows, rows, rows) if cache is None else (cache.lengths, cache.positions, _last_segment(cache))
    if segment_ids is None:
        # An empty row begins document 1; any other goes on with the document that it ended with.
        segments = jnp.broadcast_to(jnp.maximum(last, 1)[:, None], (batch, length))
    else:
        segments = segment_ids.astype(jnp.int32)
    index = jnp.arange(length, dtype=jnp.int32)
    changes = segments[:, 1:] != segments[:, :-1]
    first = jnp.concatenate([jnp.ones((batch, 1), bool), changes], axis=1)
    run_start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    counted = index - run_start
    if cache is not None:
        # The first run goes on where the cache ended if it is the same document.
        goes_on = (run_start == 0) & (segments[:, :1] == last[:, None])
        counted = counted + jnp.where(goes_on, before[:, None], 0)
    if positions is None:
        positions = counted
    ends = jnp.concatenate([changes, jnp.ones((batch, 1), bool)], axis=1)
    run_end = jax.lax.cummin(jnp.where(ends, index, length), axis=1, reverse=True)
    document_lengths = jnp.take_along_axis(positions, run_end, axis=1) + 1

    slots = starts[:, None] + index
    if cache is None:
        key_segments = segments
    else:
        write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start,)))
        key_segments = write(cache.segments, segments, starts)
    real = segments != 0
    used = jnp.where(real, index + 1, 0).max(axis=1)
    next_position = jnp.take_along_axis(positions, jnp.maximum(used - 1, 0)[:, None], axis=1)[:, 0] + 1
    cos, sin = rope_tables(config, positions, document_lengths)
    places = Places(cos=cos, sin=sin, slots=slots, segments=segments, key_segments=key_segments, starts=starts)
    return places, starts + used, jnp.where(used > 0, next_position, before)


def _last_segment(cache: Cache) -> Int[Array, "B"]:
    """The document that each row ends with; 0 where the row is empty."""
    last = jnp.take_along_axis(cache.segments, jnp.maximum(cache.lengths - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(cache.lengths > 0, last, 0)
