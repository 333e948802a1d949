"""The keys and values that a shard's queries need: those of its own heads, and of the whole sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3_jax.parallel.rules import active_rules, meshless


def keys_for_shard(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    segments: Int[Array, "B S"],
) -> tuple[Float[Array, "B k s H"], Float[Array, "B k s H"], Int[Array, "B s"]]:
    """Keys and values for the queries at hand; for use inside shard_map, and without a mesh, where it gives what it gets.

    Where key heads are fewer than the shards of query heads every shard holds them all, and takes out those that its query
    heads read. Where the sequence is split its parts, in the order of `zigzag`, are gathered and put in the order of the text;
    the rules of a call with a cache split none.

    Args:
        q: this shard's queries.
        k: this shard's keys.
        v: this shard's values.
        segments: documents of this shard's keys.

    Returns:
        Keys, values, and the keys' documents.
    """
    if meshless():
        return k, v, segments
    rules, mesh = active_rules(), jax.sharding.get_abstract_mesh()
    shards, kv_shards = rules.shards("heads", mesh), rules.shards("kv_heads", mesh)
    if shards > kv_shards:
        group = q.shape[2] * shards // (k.shape[1] * kv_shards)  # query heads that read one key head
        first = jax.lax.axis_index(rules.axes("heads", mesh)) * q.shape[2] // group
        count = max(1, q.shape[2] // group)
        k, v = (jax.lax.dynamic_slice_in_dim(side, first, count, axis=1) for side in (k, v))
    context = rules.axes("seq", mesh)
    parts = rules.shards("seq", mesh)
    if parts > 1:
        k, v = (_in_order(jax.lax.all_gather(side, context, axis=2, tiled=True), 2, parts) for side in (k, v))
        segments = _in_order(jax.lax.all_gather(segments, context, axis=1, tiled=True), 1, parts)
    return k, v, segments


def zigzag(x: Array, axis: int, parts: int) -> Array:
    """The order in which a sequence is split over `parts` shards so that causal attention costs each of them the same.

    Cut into 2 * parts pieces, shard i gets piece i and piece 2 * parts - 1 - i.

    Args:
        x: whole along the axis, which 2 * parts divides.
        axis: the sequence.
        parts: shards.

    Returns:
        x, its pieces in that order.
    """
    return _pieces(x, axis, parts, [piece for i in range(parts) for piece in (i, 2 * parts - 1 - i)])


def _in_order(x: Array, axis: int, parts: int) -> Array:
    """The inverse of `zigzag`."""
    order = [piece for i in range(parts) for piece in (i, 2 * parts - 1 - i)]
    return _pieces(x, axis, parts, [order.index(piece) for piece in range(2 * parts)])


def _pieces(x: Array, axis: int, parts: int, order: list[int]) -> Array:
    pieces = jnp.split(x, 2 * parts, axis=axis)
    return jnp.concatenate([pieces[i] for i in order], axis=axis)


def unzigzag_shards(x: Array, axis: int) -> Array:
    """Bring an activation that lies in the order of `zigzag` into the order of the text; for use inside shard_map.

    Each shard sends its two pieces to where they belong: two exchanges of an even piece and two of an odd one.

    Args:
        x: this shard's two pieces.
        axis: the sequence.

    Returns:
        Two pieces that follow one another.
    """
    rules, mesh = active_rules(), jax.sharding.get_abstract_mesh()
    axes, parts = rules.axes("seq", mesh), rules.shards("seq", mesh)
    if parts == 1:
        return x
    halves = []
    for slot in (0, 1):
        arrived = []
        for half, piece in enumerate(jnp.split(x, 2, axis=axis)):
            moves = []
            for shard in range(parts):
                number = shard if half == 0 else 2 * parts - 1 - shard
                if number % 2 == slot:
                    moves.append((shard, number // 2))
            arrived.append(jax.lax.ppermute(piece, axes, moves))  # zeros where nobody sends
        halves.append(arrived[0] + arrived[1])
    return jnp.concatenate(halves, axis=axis)
