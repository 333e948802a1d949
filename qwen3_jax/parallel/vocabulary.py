"""Words on a mesh: their rows, split over the vocabulary, stay where they are, and tokens travel to them.

A row of 151,936 words gathered at every use, and its gradient before it is scattered, would be the largest arrays of a training
step. The table is padded in memory to a multiple of its shards. Tokens travel in blocks, for the rows of everybody's at once
would be larger still.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.parallel.rules import Rules, active_rules, meshless, spec, use_rules

ROWS = 2**25  # values of the rows of a block on a shard: 64 MiB in 16-bit floats


def padded_vocabulary(words: int) -> int:
    """Rows of a table of so many words under the current mesh: the next multiple of its shards."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else active_rules().shards("vocab", mesh)
    return -(-words // shards) * shards


def look_up(weight: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """The rows of these words.

    Args:
        weight: the table, split over the vocabulary.
        tokens: words.
        dtype: of the result.

    Returns:
        [B, T, D].
    """
    if meshless():
        return weight[tokens].astype(dtype)
    return _look_up(jnp.dtype(dtype), active_rules(), weight, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(dtype: jnp.dtype, rules: Rules, weight: Array, tokens: Array) -> Array:
    vocab, travelling, staying = vocabulary_axes()

    def local(weight: Array, tokens: Array) -> Array:
        def block(_: None, tokens: Array) -> tuple[None, Array]:
            index, here = _here(_everyones(tokens, travelling), vocab, weight)
            rows = jnp.where(here[:, None], weight[index].astype(dtype), 0)
            if travelling:
                rows = jax.lax.psum_scatter(rows, travelling, scatter_dimension=0, tiled=True)
            return None, jax.lax.psum(rows, staying) if staying else rows

        _, rows = jax.lax.scan(block, None, _blocks(tokens, weight, travelling, -1))
        return rows.reshape(-1, rows.shape[-1])[: tokens.size].reshape(*tokens.shape, -1)

    places = spec("batch", "seq")
    return jax.shard_map(local, in_specs=(spec("vocab", None), places), out_specs=spec("batch", "seq", None), check_vma=False)(
        weight, tokens
    )


def _look_up_forward(dtype: jnp.dtype, rules: Rules, weight: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return _look_up(dtype, rules, weight, tokens), (weight, tokens)


def _look_up_backward(dtype: jnp.dtype, rules: Rules, kept: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    weight, tokens = kept
    with use_rules(rules):  # those of the call, which is over
        table, places, rows = spec("vocab", None), spec("batch", "seq"), spec("batch", "seq", None)
        vocab, travelling, _ = vocabulary_axes()
    mesh = jax.sharding.get_abstract_mesh()
    others = tuple(axis for axis in (*rules.axes("batch", mesh), *rules.axes("seq", mesh)) if axis not in vocab)

    def local(weight: Array, tokens: Array, d_rows: Array) -> Array:
        def block(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
            tokens, d_rows = (_everyones(x, travelling) for x in piece)
            index, here = _here(tokens, vocab, weight)
            # What is nobody's here, padding too, is sent out of bounds, and dropped.
            index = jnp.where(here, index, weight.shape[0])
            return total.at[index].add(d_rows.astype(total.dtype), mode="drop"), None

        # Sums in float32, where each row was.
        total = jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32))
        pieces = _blocks(tokens, weight, travelling, -1), _blocks(d_rows, weight, travelling, 0)
        total, _ = jax.lax.scan(block, total, pieces)
        return (jax.lax.psum(total, others) if others else total).astype(weight.dtype)

    run = jax.shard_map(local, in_specs=(table, places, rows), out_specs=table, check_vma=False)
    return run(weight, tokens, d_rows), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _everyones(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def _here(tokens: Array, vocab: tuple[str, ...], weight: Array) -> tuple[Array, Array]:
    """Rows of this shard's part of the table, and which of the tokens they are."""
    index = tokens - jax.lax.axis_index(vocab) * weight.shape[0]
    here = (tokens >= 0) & (index >= 0) & (index < weight.shape[0])
    return jnp.clip(index, 0, weight.shape[0] - 1), here


def _blocks(x: Array, weight: Array, travelling: tuple[str, ...], filling: int) -> Array:
    """[B, T, ...] of a shard -> [blocks, tokens, ...], the last block filled up: everybody's block stays within ROWS values."""
    count, mesh = x.shape[0] * x.shape[1], jax.sharding.get_abstract_mesh()
    together = math.prod(mesh.shape[axis] for axis in travelling)
    size = min(count, max(1, ROWS // (together * weight.shape[1])))
    number = -(-count // size)
    flat = x.reshape(count, *x.shape[2:])
    flat = jnp.pad(flat, [(0, number * size - count)] + [(0, 0)] * (flat.ndim - 1), constant_values=filling)
    return flat.reshape(number, size, *flat.shape[1:])


def word_logits(weight: Float[Array, "V D"], hidden: Float[Array, "*B D"], words: int) -> Float[Array, "*B {words}"]:
    """The product of every hidden state with every word's row, in float32, computed in hidden's dtype.

    Args:
        weight: the table, split over the vocabulary and padded.
        hidden: after the final norm; [B, T, D] on a mesh.
        words: how many of the table's rows are words.

    Returns:
        [..., words], whole along the vocabulary on every shard.
    """
    if meshless():
        return pallas_kernels.rows_matmul(hidden, weight.astype(hidden.dtype), dtype=jnp.float32)
    vocab, travelling, staying = vocabulary_axes()
    mesh = jax.sharding.get_abstract_mesh()

    def local(weight: Array, hidden: Array) -> Array:
        batch, length, _ = hidden.shape
        everyone = jax.lax.all_gather(hidden, travelling, axis=0, tiled=True) if travelling else hidden
        found = pallas_kernels.rows_matmul(everyone, weight.astype(hidden.dtype), dtype=jnp.float32)
        sizes = {axis: mesh.shape[axis] for axis in (*travelling, *staying)}
        if travelling:  # [everyone's rows, this shard's words] -> [own rows, the words of all shards]
            found = found.reshape(-1, batch, length, found.shape[-1])
            found = jax.lax.all_to_all(found, travelling, split_axis=0, concat_axis=0, tiled=True)
        else:
            found = found[None]
        found = jax.lax.all_gather(found, staying) if staying else found[None]
        shards = [sizes[axis] for axis in (*staying, *travelling)]
        found = found.reshape(*shards, batch, length, -1)
        order = [(*staying, *travelling).index(axis) for axis in vocab]
        last = len(shards)
        found = found.transpose(last, last + 1, *order, last + 2)
        return found.reshape(batch, length, -1)[..., :words]

    whole = spec("batch", "seq", None)
    return jax.shard_map(local, in_specs=(spec("vocab", None), whole), out_specs=whole, check_vma=False)(weight, hidden)


def vocabulary_axes() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Mesh axes of the vocabulary; those of them that tokens are split over too, and must travel over; and the rest of them."""
    rules, mesh = active_rules(), jax.sharding.get_abstract_mesh()
    tokens = (*rules.axes("batch", mesh), *rules.axes("seq", mesh))
    vocab = rules.axes("vocab", mesh)
    return vocab, tuple(axis for axis in vocab if axis in tokens), tuple(axis for axis in vocab if axis not in tokens)
