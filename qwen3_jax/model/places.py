"""Where tokens stand: positions, documents and slots, worked out once per call from what the caller gave.

Padding is segment 0; documents are 1, 2, ... A document is the tokens of one id, wherever padding lies between them, and its
positions begin at 0. An id does not come back after another document's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.attention import Places
from qwen3_jax.model.cache import Cache
from qwen3_jax.model.rope import rope_tables
from qwen3_jax.parallel.keys import unzigzag_shards, zigzag
from qwen3_jax.parallel.rules import active_rules, by_rows, meshless, placed, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where each row of a cache stands after a call: what Cache calls by the same names; None without a cache."""

    segments: Any
    lengths: Any
    positions: Any


def spread(
    config: Qwen3Config,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache | None,
    fresh: bool,
) -> tuple[Int[Array, "B T"], Places, Rows | None]:
    """Tokens and their places, on a mesh shared out over its rows and, in the order of `zigzag`, along the sequence.

    Args:
        config: the model's.
        tokens: the words.
        positions: as of `place`.
        segment_ids: as of `place`.
        cache: as of `place`.
        fresh: as of `place`.

    Returns:
        The tokens, their places, and where each row of the cache stands after them.
    """
    # Keys and values are not read here, and their first axis is not the batch.
    slim = None if cache is None else dataclasses.replace(cache, k=None, v=None)

    def run(tokens, positions, segment_ids, cache):
        places, lengths, following = place(config, tokens, positions, segment_ids, cache, fresh)
        rows = None if cache is None else Rows(written_segments(cache, places.segments), lengths, following)
        return places, rows

    places, rows = by_rows(run, tokens, positions, segment_ids, slim)
    if meshless():
        return tokens, places, rows
    places = dataclasses.replace(
        places,
        cos=in_shard_order(places.cos),
        sin=in_shard_order(places.sin),
        slots=in_shard_order(places.slots),
        segments=in_shard_order(places.segments),
        key_segments=in_shard_order(places.key_segments),
    )
    return in_shard_order(tokens), places, rows


def in_shard_order(x: Array) -> Array:
    """What a call is given of its tokens, [B, T, ...], laid out as its activations are, in the order of `zigzag`.

    Args:
        x: in the order of the text.

    Returns:
        x itself where no mesh is set.
    """
    if meshless():
        return x
    parts = active_rules().shards("seq", jax.sharding.get_abstract_mesh())
    rest = [None] * (x.ndim - 2)
    x = placed(x, "batch", None, *rest)
    return placed(zigzag(x, 1, parts) if parts > 1 else x, "batch", "seq", *rest)


def in_text_order(x: Array, axis: int) -> Array:
    """An activation [..., B, T, n] of a call, whose sequence axis is this one, in the order of the text.

    Args:
        x: in the order of `in_shard_order`.
        axis: the sequence's; the batch's is the one before.

    Returns:
        x itself where the sequence is not split.
    """
    if meshless() or active_rules().shards("seq", jax.sharding.get_abstract_mesh()) == 1:
        return x
    layout = spec(*[None] * (axis - 1), "batch", "seq", *[None] * (x.ndim - axis - 1))
    return jax.shard_map(lambda x: unzigzag_shards(x, axis), in_specs=layout, out_specs=layout, check_vma=False)(x)


def place(
    config: Qwen3Config,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache | None,
    fresh: bool = False,
) -> tuple[Places, Int[Array, "B"], Int[Array, "B"]]:
    """Places of the tokens, and where each row stands after them.

    Args:
        config: the model's.
        tokens: the words; only their shape is read.
        positions: position of each token in its document; None: counted from the segments, going on from the cache.
        segment_ids: document of each token; None: one document, going on from the cache.
        cache: what the call continues from, or None.
        fresh: the cache is known to be empty.

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
    real = segments != 0
    index = jnp.arange(length, dtype=jnp.int32)
    first = _first_of_document(segments, last)
    counted = _since_first(real, first, before)
    if positions is None:
        positions = counted
    # Each token's document ends, in this call, with the last real token before the next document's first.
    following = jnp.concatenate([first[:, 1:], jnp.ones((batch, 1), bool)], axis=1)
    next_first = jax.lax.cummin(jnp.where(following, index, length), axis=1, reverse=True)
    last_real = jax.lax.cummax(jnp.where(real, index, 0), axis=1)
    ends = jnp.take_along_axis(last_real, next_first, axis=1)
    document_lengths = jnp.take_along_axis(positions, ends, axis=1) + 1

    slots = starts[:, None] + index
    used = jnp.where(real, index + 1, 0).max(axis=1)
    next_position = jnp.take_along_axis(positions, jnp.maximum(used - 1, 0)[:, None], axis=1)[:, 0] + 1
    cos, sin = rope_tables(config, positions, document_lengths)
    places = Places(
        cos=cos,
        sin=sin,
        slots=slots,
        segments=segments,
        key_segments=segments if cache is None or fresh else written_segments(cache, segments),
        starts=starts,
        fresh=fresh,
    )
    return places, starts + used, jnp.where(used > 0, next_position, before)


def _first_of_document(segments: Int[Array, "B T"], last: Int[Array, "B"]) -> Bool[Array, "B T"]:
    """Which real tokens open a document: those whose id is not that of the real token before, be it in the cache."""
    batch, length = segments.shape
    index = jnp.arange(length, dtype=jnp.int32)
    so_far = jax.lax.cummax(jnp.where(segments != 0, index, -1), axis=1)
    before = jnp.concatenate([jnp.full((batch, 1), -1, jnp.int32), so_far[:, :-1]], axis=1)
    id_before = jnp.where(before < 0, last[:, None], jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1))
    return (segments != 0) & (segments != id_before)


def _since_first(real: Bool[Array, "B T"], first: Bool[Array, "B T"], before: Int[Array, "B"]) -> Int[Array, "B T"]:
    """Real tokens between each token and its document's first, which goes on from the cache where none opens here."""
    number = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real
    opened = jax.lax.cummax(jnp.where(first, number, -1), axis=1)
    return jnp.where(opened < 0, before[:, None] + number, number - opened)


def _last_segment(cache: Cache) -> Int[Array, "B"]:
    """The document that each row ends with; 0 where the row is empty."""
    last = jnp.take_along_axis(cache.segments, jnp.maximum(cache.lengths - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(cache.lengths > 0, last, 0)


def written_segments(cache: Cache, segments: Int[Array, "B T"]) -> Int[Array, "B S"]:
    """The documents of the cache's slots after these tokens; a slot past its end takes nothing."""
    slots = cache.lengths[:, None] + jnp.arange(segments.shape[1], dtype=jnp.int32)
    rows = jnp.arange(segments.shape[0], dtype=jnp.int32)[:, None]
    return cache.segments.at[rows, slots].set(segments, mode="drop")
