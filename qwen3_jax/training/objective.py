"""What a step makes smaller, over rows that may be worked on in parts, and the gradient of it.

Everything is normalised by what the whole batch holds: the cross-entropy by the weights of all its labels, the router's losses
by all its real tokens. So the sum over parts is the one big batch's, and so is its gradient. Only the load-balancing loss is no
sum over tokens: E / N sum_e f_e sum_t p_te, with f_e the share of rows that chose expert e. Which f a part is held against is
`balance_over`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen3_jax.training.losses import at_least_something, label_weights

BalanceOver = Literal["microbatch", "running", "exact"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the losses, all in nats per token. Static.

    Attributes:
        z_loss: of the squared log of the words' normaliser (PaLM, arXiv 2204.02311, section 5).
        balance: of the router's load-balancing loss.
        router_z_loss: of the squared log of the router's normaliser (arXiv 2202.08906).
        top_k: experts per token.
        parts: that the rows are worked on in, one after another.
        balance_over: the rows whose shares of experts a part's probabilities are held against: "microbatch", its own;
            "running", those of all parts so far (arXiv 2501.11873, section 3.2); "exact", the whole batch's, which a pass that
            only counts finds first. Without parts they are the same.
    """

    z_loss: float = 0.0
    balance: float = 0.0
    router_z_loss: float = 0.0
    top_k: int = 1
    parts: int = 1
    balance_over: BalanceOver = "running"


def gradient(
    objective: Objective,
    run: Callable[..., Any],
    params: Any,
    batch: Any,
    scale: Float[Array, ""] | float = 1.0,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of the objective over a batch.

    Args:
        objective: the weights.
        run: parameters and rows to the model's Output; by `labels`, `weights` and `z_loss`, which go to the model, it has the
            weighted loss. A pass that only counts what experts are chosen gives none.
        params: what is differentiated.
        batch: the rows (qwen3_jax.parallel.batches.Batch), a multiple of `parts` of them.
        scale: what the loss is multiplied by before, and the gradient divided by after.

    Returns:
        Gradient in the parameters' dtypes; and metrics, summed over parts: loss, balance_loss, router_z_loss, router_entropy,
        counts [L_moe, E], dropped_rows, tokens.
    """
    total = label_weights(batch.labels, batch.mask).sum()
    normaliser = at_least_something(total)
    parts = in_parts(batch, objective.parts)
    real = jnp.float32(batch.tokens.size) if batch.segment_ids is None else (batch.segment_ids != 0).sum(dtype=jnp.float32)
    real = at_least_something(real)

    def loss(params: Any, part: Any, seen: Any) -> tuple[jax.Array, dict[str, Any]]:
        weights = label_weights(part.labels, part.mask)
        out = run(params, part, labels=part.labels, weights=weights, z_loss=objective.z_loss)
        counts = jax.lax.stop_gradient(out.counts.sum(axis=1))
        held = (
            counts if objective.balance_over == "microbatch" else seen if objective.balance_over == "exact" else seen + counts
        )
        layers, experts = counts.shape
        rows = real * max(layers, 1)
        shares = held.sum(axis=0) * objective.top_k / at_least_something(held.sum())
        balance = experts * (shares * out.probabilities.sum(axis=(0, 1))).sum() / rows
        router_z = out.squares.sum() / rows
        # What all labels weigh is divided by here and not in their weights, which so stay in a 16-bit float's range.
        value = out.weighted.objective / normaliser + objective.balance * balance + objective.router_z_loss * router_z
        metrics = dict(
            loss=out.weighted.losses / normaliser,
            balance_loss=balance,
            router_z_loss=router_z,
            router_entropy=out.entropy.sum(axis=1) / real,
            counts=counts,
            dropped_rows=out.dropped.sum(),
        )
        return value * scale, metrics

    one = jax.value_and_grad(loss, has_aux=True)
    if objective.parts == 1:
        # Whatever is counted, it is this part: as "microbatch" no counts need be given.
        alone = dataclasses.replace(objective, balance_over="microbatch")
        if objective != alone:
            return gradient(alone, run, params, batch, scale)
        (_, metrics), grads = one(params, batch, None)
    else:
        seen = _no_counts(run, params, parts)
        form = jax.eval_shape(one, params, _first(parts), seen)
        if objective.balance_over == "exact":
            seen = _counted(run, params, parts, seen)

        def step(carry: Any, part: Any) -> tuple[Any, None]:
            grads, sums, seen = carry
            (_, metrics), more = one(params, part, seen)
            grads, sums = jax.tree.map(jnp.add, (grads, sums), (more, metrics))
            return (grads, sums, seen + metrics["counts"] if objective.balance_over == "running" else seen), None

        (_, metrics_form), grads_form = form
        start = jax.tree.map(_zeros, (grads_form, metrics_form))
        (grads, metrics, _), _ = jax.lax.scan(step, (*start, seen), parts)
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(scale, leaf.dtype), grads), metrics | dict(tokens=total)


def in_parts(batch: Any, parts: int) -> Any:
    """Rows in parts, along a new first axis: each part has as many of every shard's rows, so none of them moves.

    Args:
        batch: pytree of arrays whose first axis is the rows.
        parts: how many.

    Returns:
        Arrays [parts, B / parts, ...].
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _first(parts: Any) -> Any:
    return jax.tree.map(lambda x: x[0], parts)


def _zeros(like: Any) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding)


def _no_counts(run: Any, params: Any, parts: Any) -> jax.Array:
    form = jax.eval_shape(lambda params, part: run(params, part).counts.sum(axis=1), params, _first(parts))
    return _zeros(form)


def _counted(run: Any, params: Any, parts: Any, zero: Any) -> jax.Array:
    """How many tokens of the whole batch choose each expert: a pass without gradients."""

    def step(seen: Any, part: Any) -> tuple[Any, None]:
        return seen + run(params, part).counts.sum(axis=1), None

    return jax.lax.stop_gradient(jax.lax.scan(step, zero, parts)[0])
