"""How tokens get to the shards that hold their experts, and their sums back: three ways with one contract.

Each is called inside shard_map with a `chunk`, a pytree of arrays [M, ...] of this shard's own tokens, and a function `visit`
that a shard of experts applies to tokens, whosever they are: (state, chunk) -> (state, sums). They return this shard's tokens'
sums over all shards that were visited, and the shard's state after all visits. A visit with the backward pass's chunk makes of
each a backward pass; nothing here is differentiated.

    ring        chunks go around, half each way, while each shard works on what it has; sums follow one step behind
    all_to_all  a token goes once to each shard that holds one of its experts, in buffers that may need several rounds
    gather      everybody's tokens come to every shard and sums are scattered: for few tokens, whose time is that of the weights

A visit's sums travel in their own dtype, and ring and gather add them in it: in bfloat16 a token's sum over n shards is rounded
n - 1 times more than on one device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Visit = Callable[[Any, Any], tuple[Any, Any]]


def ring(axes: tuple[str, ...], shards: int, visit: Visit, chunk: Any, state: Any) -> tuple[Any, Any]:
    """Let each shard's chunk visit every shard in turn, its two halves in opposite directions.

    Args:
        axes: mesh axes that make the ring.
        shards: of the ring.
        visit: what a shard does with a chunk, here with two halves of two shards' chunks.
        chunk: this shard's own.
        state: before the first visit.

    Returns:
        The sums for this shard's chunk, and the state after the last visit.
    """
    onward = [(i, (i + 1) % shards) for i in range(shards)]
    backward = [(to, start) for start, to in onward]
    tokens = jax.tree.leaves(chunk)[0].shape[0]
    ways = (onward, backward) if tokens % 2 == 0 else (onward,)

    def halves(tree: Any) -> tuple[Any, ...]:
        parts = [jnp.split(leaf, len(ways)) for leaf in jax.tree.leaves(tree)]
        return tuple(jax.tree.unflatten(jax.tree.structure(tree), part) for part in zip(*parts, strict=True))

    def passed_on(parts: tuple[Any, ...]) -> tuple[Any, ...]:
        pairs = zip(parts, ways, strict=True)
        return tuple(jax.tree.map(lambda leaf, way=way: jax.lax.ppermute(leaf, axes, way), part) for part, way in pairs)

    def joined(parts: tuple[Any, ...]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def step(carry: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], None]:
        parts, sums, state = carry
        # Neither waits for this step's work, so both are on their way while it is done.
        following, so_far = passed_on(parts), passed_on(sums)
        state, more = visit(state, joined(parts))
        return (following, jax.tree.map(jnp.add, so_far, halves(more)), state), None

    # The first hop carries zeros, the last one chunks that are home: steps of their own would compile all of the work again.
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(visit, state, chunk)[1])
    (_, sums, state), _ = jax.lax.scan(step, (halves(chunk), halves(sums), state), None, length=shards)
    return joined(passed_on(sums)), state


def gather(axes: tuple[str, ...], visit: Visit, chunk: Any, state: Any) -> tuple[Any, Any]:
    """Let everybody's tokens visit every shard at once.

    Args:
        axes: mesh axes that the experts are split over.
        visit: what a shard does with a chunk.
        chunk: this shard's own.
        state: before the visit.

    Returns:
        The sums for this shard's chunk, and the state after the visit.
    """
    everyones = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, axis=0, tiled=True), chunk)
    state, sums = visit(state, everyones)
    return jax.tree.map(lambda leaf: jax.lax.psum_scatter(leaf, axes, scatter_dimension=0, tiled=True), sums), state


def all_to_all(
    axes: tuple[str, ...],
    goes: Bool[Array, "M shards"],
    quota: int,
    rounds: int | None,
    everywhere: tuple[str, ...],
    visit: Visit,
    chunk: Any,
    state: Any,
) -> tuple[Any, Any]:
    """Send each token once to every shard where it has work.

    A round moves at most `quota` tokens between any two shards, so a shard's buffers hold shards * quota tokens. Where more go,
    further rounds follow: as many on every shard as the one that needs most.

    Args:
        axes: mesh axes that the experts are split over.
        goes: whether a token has work on a shard.
        quota: tokens from one shard to one shard in a round.
        rounds: at most so many; tokens of later ones are not visited. None: all that it takes.
        everywhere: all axes of the mesh.
        visit: what a shard does with a chunk; rows of zeros are nobody's.
        chunk: this shard's own.
        state: before the first visit.

    Returns:
        The sums for this shard's chunk in float32, and the state after the last visit.
    """
    tokens, shards = goes.shape
    counts = goes.sum(axis=0, dtype=jnp.int32)
    # turn[s, i]: the i-th token that goes to shard s; M where there is none.
    turn = jax.lax.sort(jnp.where(goes.T, jnp.arange(tokens, dtype=jnp.int32), tokens), dimension=1, is_stable=False)
    turn = jnp.pad(turn, ((0, 0), (0, quota)), constant_values=tokens)
    needed = jax.lax.pmax(-(-counts.max() // quota), everywhere)
    needed = needed if rounds is None else jnp.minimum(needed, rounds)
    visited = jax.eval_shape(visit, state, _received(chunk, shards * quota))[1]
    sums = jax.tree.map(lambda leaf: jnp.zeros((tokens, *leaf.shape[1:]), jnp.promote_types(leaf.dtype, jnp.float32)), visited)

    def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        number, sums, state = carry
        who = jax.lax.dynamic_slice_in_dim(turn, number * quota, quota, axis=1).reshape(-1)
        sent = jnp.clip(counts - number * quota, 0, quota)
        received = jax.lax.all_to_all(sent, axes, 0, 0, tiled=True)
        there = jax.tree.map(lambda leaf: exchange(_rows(leaf, who), sent, received, axes, quota), chunk)
        state, more = visit(state, there)
        back = jax.tree.map(lambda leaf: exchange(leaf, received, sent, axes, quota), more)
        sums = jax.tree.map(lambda total, leaf: total.at[who].add(leaf.astype(total.dtype), mode="drop"), sums, back)
        return number + 1, sums, state

    _, sums, state = jax.lax.while_loop(lambda carry: carry[0] < needed, one, (jnp.int32(0), sums, state))
    return sums, state


def exchange(
    x: Array, sent: Int[Array, " shards"], received: Int[Array, " shards"], axes: tuple[str, ...], quota: int
) -> Array:
    """Swap blocks of at most `quota` rows, one for each shard.

    Block i goes to shard i, where it comes to lie as its sender's. On a TPU only filled rows travel, elsewhere whole blocks.

    Args:
        x: [shards * quota, ...]; block i's first sent[i] rows are for shard i.
        sent: rows of each block.
        received: rows that each shard sends here.
        axes: mesh axes that number the shards.
        quota: rows of a block.

    Returns:
        As x; block i's first received[i] rows came from shard i, the others are 0.
    """
    empty = jnp.zeros_like(x)

    def ragged(x: Array, sent: Array, received: Array) -> Array:
        starts = jnp.arange(sent.shape[0], dtype=jnp.int32) * quota
        here = jnp.full_like(starts, jax.lax.axis_index(axes) * quota)
        return jax.lax.ragged_all_to_all(x, empty, starts, sent, here, received, axis_name=axes)

    def blocks(x: Array, sent: Array, received: Array) -> Array:
        swapped = jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
        filled = jnp.arange(quota, dtype=jnp.int32) < received[:, None]
        return jnp.where(filled.reshape(-1, *(1,) * (x.ndim - 1)), swapped, empty)

    return jax.lax.platform_dependent(x, sent, received, tpu=ragged, default=blocks)


def _rows(x: Array, index: Int[Array, "R"]) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _received(chunk: Any, rows: int) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), chunk)
