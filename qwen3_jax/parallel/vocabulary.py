"""Words on a mesh: their rows, split over the vocabulary, stay where they are, and tokens travel to them.

A row of 151,936 words gathered at every use, and its gradient before it is scattered, would be the largest arrays of a training
step. The table is padded in memory to a multiple of its shards.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.parallel.rules import active_rules, meshless, spec


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
    vocab, travelling, staying = vocabulary_axes()

    def local(weight: Array, tokens: Array) -> Array:
        everyone = jax.lax.all_gather(tokens, travelling, axis=0, tiled=True) if travelling else tokens
        index = everyone - jax.lax.axis_index(vocab) * weight.shape[0]
        here = (index >= 0) & (index < weight.shape[0])
        rows = jnp.where(here[..., None], weight[jnp.clip(index, 0, weight.shape[0] - 1)].astype(dtype), 0)
        if travelling:
            rows = jax.lax.psum_scatter(rows, travelling, scatter_dimension=0, tiled=True)
        return jax.lax.psum(rows, staying) if staying else rows

    return jax.shard_map(
        local, in_specs=(spec("vocab", None), spec("batch", "seq")), out_specs=spec("batch", "seq", None), check_vma=False
    )(weight, tokens)


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
