"""Next-word losses over a large vocabulary, of which the logits of all tokens are never in memory.

Tokens go in blocks. A shard multiplies a block of everybody's tokens by the words that it holds; maxima, sums and the label's
logit are joined over the shards of the vocabulary, and only they are kept. The backward pass makes each block's logits once
more: the gradient of the words stays where the words are, that of the tokens is summed at home.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from qwen3_jax.parallel.rules import Rules, active_rules, meshless, spec, use_rules
from qwen3_jax.parallel.vocabulary import vocabulary_axes

LOGITS = 2**25  # float32 logits of a block on a shard: 128 MiB


def word_losses(
    weight: Float[Array, "V D"], hidden: Float[Array, "B T D"], labels: Int[Array, "B T"], words: int, block: int | None = None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Each label's negative log-probability, and the log of the softmax's normaliser.

    Args:
        weight: the words' rows, on a mesh split over the vocabulary and padded.
        hidden: after the final norm; the product is computed in its dtype, all else in float32.
        labels: the words to be predicted; of a negative one the loss is the normaliser's, and should not count.
        words: how many of the rows are words.
        block: tokens of a shard that are worked on at a time; by default as many as LOGITS allows.

    Returns:
        Two float32 arrays [B, T]; both are differentiable in weight and hidden.
    """
    if meshless():
        return _losses(((), (), ()), active_rules(), words, block, weight, hidden, labels)
    rules, mesh = active_rules(), jax.sharding.get_abstract_mesh()
    tokens = (*rules.axes("batch", mesh), *rules.axes("seq", mesh))
    vocab, travelling, _ = vocabulary_axes()
    others = tuple(axis for axis in tokens if axis not in vocab)
    return _losses((vocab, travelling, others), rules, words, block, weight, hidden, labels)


Axes = tuple[
    tuple[str, ...], tuple[str, ...], tuple[str, ...]
]  # of the vocabulary; of them those that tokens are split over too; others


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _losses(axes, rules, words, block, weight, hidden, labels):
    table, states, tokens = _specs(rules)
    run = _on_shards(functools.partial(_forward, axes, words, block), (table, states, tokens), (tokens, tokens))
    return run(weight, hidden, labels)


def _losses_forward(axes, rules, words, block, weight, hidden, labels):
    given = weight.value, hidden.value, labels.value
    losses, normaliser = _losses(axes, rules, words, block, *given)
    # Whether the words are differentiated is told by the form of what is kept: values are not known when programs are traced.
    return (losses, normaliser), (*given, normaliser, () if weight.perturbed else None)


def _losses_backward(axes, rules, words, block, kept, d_out):
    *given, normaliser, differentiated = kept
    d_out = [jnp.zeros_like(normaliser) if isinstance(part, SymbolicZero) else part for part in d_out]
    table, states, tokens = _specs(rules)
    taken = (table, states, tokens, tokens, tokens, tokens)
    tables = () if differentiated is None else (table,)
    run = _on_shards(functools.partial(_backward, axes, words, block, bool(tables)), taken, (tables, states))
    d_tables, d_hidden = run(*given, normaliser, *d_out)
    return (*(d_tables or (None,)), d_hidden, None)


_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)


def _specs(rules: Rules) -> tuple[Any, Any, Any]:
    """Of the table, of states, of labels. By the rules of the call: a backward pass is traced where they are active no more."""
    with use_rules(rules):
        return spec("vocab", None), spec("batch", "seq", None), spec("batch", "seq")


def _on_shards(run: Any, in_specs: Any, out_specs: Any) -> Any:
    return run if meshless() else jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _forward(axes: Axes, words: int, block: int | None, weight: Any, hidden: Any, labels: Any) -> tuple[Any, Any]:
    table = weight.astype(hidden.dtype)

    def one(carry: None, piece: tuple[Any, Any]) -> tuple[None, tuple[Any, Any]]:
        states, labels = (_everyones(x, axes) for x in piece)
        logits, mine = _logits(axes, words, table, states, labels)
        peak = _joined(logits.max(axis=-1), axes, jax.lax.pmax)
        total = _joined(jnp.exp(logits - peak[:, None]).sum(axis=-1), axes, jax.lax.psum)
        chosen = _joined(jnp.where(mine, logits, 0).sum(axis=-1), axes, jax.lax.psum)
        normaliser = jnp.log(total) + peak
        return carry, (_own(normaliser - chosen, axes), _own(normaliser, axes))

    _, found = jax.lax.scan(one, None, _blocks(axes, weight, block, hidden, labels))
    return tuple(x.reshape(-1)[: labels.size].reshape(labels.shape) for x in found)


def _backward(
    axes: Axes,
    words: int,
    block: int | None,
    differentiated: bool,
    weight: Any,
    hidden: Any,
    labels: Any,
    normaliser: Any,
    d_losses: Any,
    d_normaliser: Any,
) -> tuple[tuple[Any, ...], Any]:
    table = weight.astype(hidden.dtype)
    _, travelling, others = axes
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    staying = tuple(axis for axis in axes[0] if axis not in travelling)

    def one(d_tables: tuple[Any, ...], piece: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        states, labels, normaliser, d_losses, d_normaliser = (_everyones(x, axes) for x in piece)
        logits, mine = _logits(axes, words, table, states, labels)
        d_logits = jnp.exp(logits - normaliser[:, None]) * (d_losses + d_normaliser)[:, None] - jnp.where(
            mine, d_losses[:, None], 0
        )
        d_logits = d_logits.astype(states.dtype)
        d_tables = tuple(total + jnp.einsum("mv,md->vd", d_logits, states, preferred_element_type=wide) for total in d_tables)
        d_states = jnp.einsum("mv,vd->md", d_logits, table, preferred_element_type=wide)
        if travelling:
            d_states = jax.lax.psum_scatter(d_states, travelling, scatter_dimension=0, tiled=True)
        if staying:
            d_states = jax.lax.psum(d_states, staying)
        return d_tables, d_states.astype(hidden.dtype)

    zeros = (jnp.zeros(weight.shape, wide),) if differentiated else ()
    pieces = _blocks(axes, weight, block, hidden, labels, normaliser, d_losses, d_normaliser)
    d_tables, d_hidden = jax.lax.scan(one, zeros, pieces)
    if others:
        d_tables = jax.lax.psum(d_tables, others)
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
    return tuple(d_table.astype(weight.dtype) for d_table in d_tables), d_hidden


def _blocks(axes: Axes, weight: Any, block: int | None, *arrays: Any) -> tuple[Any, ...]:
    """[B, T, ...] -> [blocks, tokens of a block, ...], the last block filled up with zeros."""
    count = math.prod(arrays[0].shape[:2])
    mesh = jax.sharding.get_abstract_mesh()
    together = math.prod(mesh.shape[axis] for axis in axes[1])
    size = min(block or max(1, LOGITS // (weight.shape[0] * together)), count)
    size -= size % 128 if size >= 128 else 0  # whole tiles
    number = -(-count // size)

    def cut(x: Any) -> Any:
        flat = x.reshape(count, *x.shape[2:])
        flat = jnp.pad(flat, [(0, number * size - count)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(number, size, *flat.shape[1:])

    return tuple(map(cut, arrays))


def _logits(axes: Axes, words: int, table: Any, states: Any, labels: Any) -> tuple[Any, Any]:
    """Float32 logits of this shard's words, -inf for padding; and where among them the labels are."""
    logits = jnp.einsum("md,vd->mv", states, table, preferred_element_type=jnp.promote_types(states.dtype, jnp.float32))
    first = jax.lax.axis_index(axes[0]) * table.shape[0] if axes[0] else 0
    word = first + jnp.arange(table.shape[0], dtype=jnp.int32)
    return jnp.where(word < words, logits, -jnp.inf), labels[:, None] == word


def _everyones(x: Any, axes: Axes) -> Any:
    return jax.lax.all_gather(x, axes[1], axis=0, tiled=True) if axes[1] else x


def _own(x: Any, axes: Axes) -> Any:
    if not axes[1]:
        return x
    size = x.shape[0] // math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes[1])
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes[1]) * size, size)


def _joined(x: Any, axes: Axes, reduce: Any) -> Any:
    return reduce(x, axes[0]) if axes[0] else x
