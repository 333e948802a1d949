"""Next-word losses over a large vocabulary, of which the logits of all tokens are never in memory.

Tokens go in blocks. A shard multiplies a block of everybody's tokens by the words that it holds; maxima, sums and the label's
logit are joined over the shards of the vocabulary. The gradient of the words stays where the words are, that of the tokens is
summed at home.

`word_losses` is of each token, and its backward pass makes each block's logits once more: only then is known what each loss
counts. `weighted_word_loss` is one sum, whose weights are given: where it is differentiated, its gradient is made of the logits
that it is made of itself, and the backward pass only scales it: three products of tokens by words in place of four.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qwen3_jax.parallel.rules import Rules, active_rules, meshless, spec, use_rules
from qwen3_jax.parallel.vocabulary import vocabulary_axes

LOGITS = 2**25  # float32 logits of a block on a shard: 128 MiB


class WeightedLoss(NamedTuple):
    """Sums over all tokens, in nats: float32 scalars, float64 where hidden states are.

    Attributes:
        objective: sum of weight (loss + z_loss normaliser^2); the one to differentiate.
        losses: sum of weight x loss, to look at: no gradient goes through it.
    """

    objective: Any
    losses: Any


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
    return _losses(_axes(), active_rules(), words, block, weight, hidden, labels)


def weighted_word_loss(
    weight: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    words: int,
    z_loss: float = 0.0,
    block: int | None = None,
) -> WeightedLoss:
    """The sum of the tokens' losses, each as often as it counts: as from `word_losses`, with a cheaper gradient.

    Of both inputs the gradient is made with the loss, for a sum that counts once; a backward pass multiplies it in float32 by
    what the sum counts. It waits in hidden's dtype, that of the words in float32: weights should be around 1, and what all of
    them are multiplied or divided by is better applied to the sum.

    Args:
        weight: the words' rows, on a mesh split over the vocabulary and padded.
        hidden: after the final norm; the product is computed in its dtype, all else in float32.
        labels: the words to be predicted; a negative one's weight should be 0.
        weights: how much each token counts; constants, that no gradient goes to.
        words: how many of the rows are words.
        z_loss: weight of the squared log of the softmax's normaliser.
        block: tokens of a shard that are worked on at a time; by default as many as LOGITS allows.

    Returns:
        Two sums, of which the objective is differentiable, in weight and hidden.
    """
    # Said here of what the rule below takes for granted.
    weights = jax.lax.stop_gradient(weights.astype(jnp.promote_types(hidden.dtype, jnp.float32)))
    objective, losses = _weighted(_axes(), active_rules(), words, z_loss, block, weight, hidden, labels, weights)
    return WeightedLoss(objective, jax.lax.stop_gradient(losses))


class Axes(NamedTuple):
    """Mesh axes: of the vocabulary; of them those that tokens are split over too; others that tokens are split over."""

    vocab: tuple[str, ...] = ()
    travelling: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _axes() -> Axes:
    if meshless():
        return Axes()
    rules, mesh = active_rules(), jax.sharding.get_abstract_mesh()
    vocab, travelling, _ = vocabulary_axes()
    tokens = (*rules.axes("batch", mesh), *rules.axes("seq", mesh))
    return Axes(vocab, travelling, tuple(axis for axis in tokens if axis not in vocab))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _weighted(axes, rules, words, z_loss, block, weight, hidden, labels, weights):
    return _weighted_sums(axes, rules, words, z_loss, block, None, weight, hidden, labels, weights)[0]


def _weighted_forward(axes, rules, words, z_loss, block, weight, hidden, labels, weights):
    given = weight.value, hidden.value, labels.value, weights.value
    sums, d_tables, d_hidden = _weighted_sums(axes, rules, words, z_loss, block, weight.perturbed, *given)
    return sums, (weight.value, d_tables, d_hidden)  # the words for their dtype


def _weighted_backward(axes, rules, words, z_loss, block, kept, d_sums):
    weight, d_tables, d_hidden = kept
    d_objective, _ = d_sums
    if isinstance(d_objective, SymbolicZero):
        d_objective = jnp.float32(0)
    d_tables = [(d_table * d_objective).astype(weight.dtype) for d_table in d_tables]
    return (*(d_tables or (None,)), (d_hidden * d_objective).astype(d_hidden.dtype), None, None)


_weighted.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)


def _weighted_sums(axes, rules, words, z_loss, block, differentiated, *given):
    """Both sums; and unless `differentiated` is None the gradients of the words, () if it is False, and of the tokens."""
    table, states, tokens = _specs(rules)
    gradients = ((), ()) if differentiated is None else ((table,) if differentiated else (), states)
    sums = (PartitionSpec(), PartitionSpec())
    run = functools.partial(_weigh, axes, words, z_loss, block, differentiated)
    return _on_shards(run, (table, states, tokens, tokens), (sums, *gradients))(*given)


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
        losses, normaliser = _losses_of(axes, *_logits(axes, words, table, states, labels))
        return carry, (_own(losses, axes), _own(normaliser, axes))

    _, found = jax.lax.scan(one, None, _blocks(axes, weight, block, hidden, labels))
    return tuple(_whole(x, labels) for x in found)


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

    def one(d_tables: tuple[Any, ...], piece: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        states, labels, normaliser, d_losses, d_normaliser = (_everyones(x, axes) for x in piece)
        logits, mine = _logits(axes, words, table, states, labels)
        return _gradients(axes, table, states, logits, mine, normaliser, d_losses, d_normaliser, d_tables)

    pieces = _blocks(axes, weight, block, hidden, labels, normaliser, d_losses, d_normaliser)
    d_tables, d_hidden = jax.lax.scan(one, _no_gradients(weight, differentiated), pieces)
    return tuple(d_table.astype(weight.dtype) for d_table in _of_all(axes, d_tables)), _whole(d_hidden, labels)


def _weigh(
    axes: Axes,
    words: int,
    z_loss: float,
    block: int | None,
    differentiated: bool | None,
    weight: Any,
    hidden: Any,
    labels: Any,
    weights: Any,
) -> tuple[Any, tuple[Any, ...], Any]:
    table = weight.astype(hidden.dtype)

    def one(carry: tuple[Any, Any], piece: tuple[Any, ...]) -> tuple[tuple[Any, Any], Any]:
        sums, d_tables = carry
        states, labels, weights = (_everyones(x, axes) for x in piece)
        logits, mine = _logits(axes, words, table, states, labels)
        losses, normaliser = _losses_of(axes, logits, mine)
        more = (weights * (losses + z_loss * jnp.square(normaliser))).sum(), (weights * losses).sum()
        sums = jax.tree.map(jnp.add, sums, more)
        if differentiated is None:
            return (sums, d_tables), ()
        d_normaliser = 2 * z_loss * normaliser * weights
        d_tables, d_states = _gradients(axes, table, states, logits, mine, normaliser, weights, d_normaliser, d_tables)
        return (sums, d_tables), d_states

    zero = jnp.zeros((), weights.dtype)
    start = (zero, zero), _no_gradients(weight, bool(differentiated))
    (sums, d_tables), d_hidden = jax.lax.scan(one, start, _blocks(axes, weight, block, hidden, labels, weights))
    # Shards that tokens travel between have all of each other's in their sums.
    sums, d_tables = _of_all(axes, (sums, d_tables))
    return sums, d_tables, () if differentiated is None else _whole(d_hidden, labels)


def _losses_of(axes: Axes, logits: Any, mine: Any) -> tuple[Any, Any]:
    """Of a block's logits: each token's loss and normaliser."""
    peak = _joined(logits.max(axis=-1), axes, jax.lax.pmax)
    total = _joined(jnp.exp(logits - peak[:, None]).sum(axis=-1), axes, jax.lax.psum)
    chosen = _joined(jnp.where(mine, logits, 0).sum(axis=-1), axes, jax.lax.psum)
    normaliser = jnp.log(total) + peak
    return normaliser - chosen, normaliser


def _gradients(
    axes: Axes,
    table: Any,
    states: Any,
    logits: Any,
    mine: Any,
    normaliser: Any,
    d_losses: Any,
    d_normaliser: Any,
    d_tables: tuple[Any, ...],
) -> tuple[tuple[Any, ...], Any]:
    """Of a block: what its tokens add to the words' gradient, if there is one, and this shard's tokens' own."""
    d_logits = jnp.exp(logits - normaliser[:, None]) * (d_losses + d_normaliser)[:, None] - jnp.where(
        mine, d_losses[:, None], 0
    )
    d_logits = d_logits.astype(states.dtype)
    d_tables = tuple(
        total + jnp.einsum("mv,md->vd", d_logits, states, preferred_element_type=total.dtype) for total in d_tables
    )
    d_states = jnp.einsum("mv,vd->md", d_logits, table, preferred_element_type=logits.dtype)
    if axes.travelling:
        d_states = jax.lax.psum_scatter(d_states, axes.travelling, scatter_dimension=0, tiled=True)
    staying = tuple(axis for axis in axes.vocab if axis not in axes.travelling)
    if staying:
        d_states = jax.lax.psum(d_states, staying)
    return d_tables, d_states.astype(states.dtype)


def _no_gradients(weight: Any, differentiated: bool) -> tuple[Any, ...]:
    return (jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32)),) if differentiated else ()


def _of_all(axes: Axes, sums: Any) -> Any:
    """Summed over the shards whose tokens did not come here."""
    return jax.lax.psum(sums, axes.others) if axes.others else sums


def _whole(blocks: Any, labels: Any) -> Any:
    """[blocks, tokens of a block, ...] -> [B, T, ...], without what filled up the last block."""
    return blocks.reshape(-1, *blocks.shape[2:])[: labels.size].reshape(*labels.shape, *blocks.shape[2:])


def block_size(tokens: int, rows: int, together: int = 1, block: int | None = None) -> int:
    """Tokens of a shard that are worked on at a time.

    Args:
        tokens: all that the shard has.
        rows: words of a shard.
        together: shards whose tokens come to the words at once.
        block: what is asked for in place of LOGITS' share.

    Returns:
        At most `tokens`; whole tiles of 128 from there on.
    """
    size = min(block or max(1, LOGITS // (rows * together)), tokens)
    return size - size % 128 if size >= 128 else size


def _blocks(axes: Axes, weight: Any, block: int | None, *arrays: Any) -> tuple[Any, ...]:
    """[B, T, ...] -> [blocks, tokens of a block, ...], the last block filled up with zeros."""
    count = math.prod(arrays[0].shape[:2])
    mesh = jax.sharding.get_abstract_mesh()
    together = math.prod(mesh.shape[axis] for axis in axes.travelling)
    size = block_size(count, weight.shape[0], together, block)
    number = -(-count // size)

    def cut(x: Any) -> Any:
        flat = x.reshape(count, *x.shape[2:])
        flat = jnp.pad(flat, [(0, number * size - count)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(number, size, *flat.shape[1:])

    return tuple(map(cut, arrays))


def _logits(axes: Axes, words: int, table: Any, states: Any, labels: Any) -> tuple[Any, Any]:
    """Float32 logits of this shard's words, -inf for padding; and where among them the labels are."""
    logits = jnp.einsum("md,vd->mv", states, table, preferred_element_type=jnp.promote_types(states.dtype, jnp.float32))
    first = jax.lax.axis_index(axes.vocab) * table.shape[0] if axes.vocab else 0
    word = first + jnp.arange(table.shape[0], dtype=jnp.int32)
    return jnp.where(word < words, logits, -jnp.inf), labels[:, None] == word


def _everyones(x: Any, axes: Axes) -> Any:
    return jax.lax.all_gather(x, axes.travelling, axis=0, tiled=True) if axes.travelling else x


def _own(x: Any, axes: Axes) -> Any:
    if not axes.travelling:
        return x
    size = x.shape[0] // math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes.travelling)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes.travelling) * size, size)


def _joined(x: Any, axes: Axes, reduce: Any) -> Any:
    return reduce(x, axes.vocab) if axes.vocab else x
