"""Losses: next-word cross-entropy and the router's load balance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"],
    labels: Int[Array, "B T"],
    mask: Float[Array, "B T"] | Int[Array, "B T"] | None = None,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Mean negative log-probability of the labels over the tokens that count.

    Args:
        logits: float32; `logits[:, t]` predicts `labels[:, t]` (the caller shifts).
        labels: the words, 0 <= label < V.
        mask: weight of each token, 0 leaves it out; all count when None.
        z_loss: weight of the squared log of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5).

    Returns:
        A scalar in nats per token; 0 when no token counts.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = normaliser - chosen + z_loss * jnp.square(normaliser)
    weights = jnp.ones_like(loss) if mask is None else mask.astype(loss.dtype)
    return (loss * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def load_balancing_loss(
    router: Float[Array, "L B T E"],
    num_experts: int,
    top_k: int,
    mask: Float[Array, "B T"] | Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """How unevenly the experts are used: E * sum(share of rows * mean probability), top_k when balanced.

    Rows of all layers are pooled first, as by transformers' `load_balancing_loss_func` (Switch, arXiv 2101.03961).

    Args:
        router: router logits of every MoE layer.
        num_experts: E.
        top_k: experts per token.
        mask: tokens that count, 0 is padding; all when None.

    Returns:
        A scalar, without its coefficient; 0 for a model without MoE layers.

    Raises:
        ValueError: router logits of another number of experts.
    """
    layers, batch, length, experts = router.shape
    if layers == 0:
        return jnp.zeros((), jnp.float32)
    if experts != num_experts:
        raise ValueError(f"router logits are for {experts} experts, num_experts={num_experts}")
    probabilities = jax.nn.softmax(router.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(probabilities, top_k)
    weights = jnp.ones((batch, length), jnp.float32) if mask is None else mask.astype(jnp.float32)
    weights = jnp.broadcast_to(weights, (layers, batch, length))
    rows = jnp.maximum(weights.sum(), 1.0)
    spread = jnp.broadcast_to(weights[..., None], chosen.shape)
    share = jnp.zeros((num_experts,), jnp.float32).at[chosen.reshape(-1)].add(spread.reshape(-1)) / rows
    mean = jnp.einsum("lbte,lbt->e", probabilities, weights) / rows
    return num_experts * (share * mean).sum()
