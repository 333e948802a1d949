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
        labels: the words, 0 <= label < V; a negative one (-100 on Hugging Face) leaves its token out.
        mask: weight of each token, 0 leaves it out; all count when None.
        z_loss: weight of the squared log of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5).

    Returns:
        A scalar in nats per token: the weighted mean; 0 when no token counts.

    Raises:
        ValueError: labels or a mask of another shape than the logits' tokens.
    """
    _check_tokens("logits", logits.shape[:-1], labels=labels, mask=mask)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return mean_loss(normaliser - chosen, normaliser, labels, mask, z_loss)


def mean_loss(
    losses: Float[Array, "B T"],
    normaliser: Float[Array, "B T"],
    labels: Int[Array, "B T"],
    mask: Float[Array, "B T"] | Int[Array, "B T"] | None = None,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Mean over the tokens that count of losses that a call of the model gives (qwen3_jax.model.transformer.Output).

    Args:
        losses: negative log-probability of each label.
        normaliser: log of each softmax's normaliser.
        labels: the words; a negative one leaves its token out.
        mask: weight of each token; all count when None.
        z_loss: weight of the squared normaliser.

    Returns:
        A scalar, as `cross_entropy`.
    """
    losses = losses + z_loss * jnp.square(normaliser)
    weights = label_weights(labels, mask)
    return (losses * weights).sum() / at_least_something(weights.sum())


def label_weights(
    labels: Int[Array, "B T"], mask: Float[Array, "B T"] | Int[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """How much each label counts: its mask, and 0 where it is negative.

    Args:
        labels: the words.
        mask: weight of each token; all count when None.

    Returns:
        Float32 weights.
    """
    weights = jnp.ones(labels.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    return jnp.where(labels < 0, 0, weights)


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
        ValueError: router logits of another number of experts, more experts per token than there are, a mask of another shape.
    """
    layers, batch, length, experts = router.shape
    if layers == 0:
        return jnp.zeros((), jnp.float32)
    if experts != num_experts or top_k > experts:
        raise ValueError(f"router logits are for {experts} experts; num_experts={num_experts}, top_k={top_k}")
    _check_tokens("router logits", (batch, length), mask=mask)
    probabilities = jax.nn.softmax(router.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(probabilities, top_k)
    weights = jnp.ones((batch, length), jnp.float32) if mask is None else mask.astype(jnp.float32)
    # Comparisons and sums rather than a scatter, whose result no mesh could split.
    hits = (chosen[..., None] == jnp.arange(num_experts)).sum(axis=-2) * weights[None, :, :, None]
    sums = (probabilities * weights[None, :, :, None]).sum(axis=2)
    return balance_of_counts(hits.sum(axis=2), sums, top_k)


def balance_of_counts(counts: Float[Array, "L B E"], probabilities: Float[Array, "L B E"], top_k: int) -> Float[Array, ""]:
    """`load_balancing_loss` of what the model counted layer by layer (qwen3_jax.model.transformer.Output).

    Args:
        counts: tokens that chose each expert, by layer and row.
        probabilities: sums over tokens of the router's probabilities.
        top_k: experts per token.

    Returns:
        A scalar, without its coefficient; 0 for a model without MoE layers.
    """
    if counts.shape[0] == 0:
        return jnp.zeros((), jnp.float32)
    rows = at_least_something(counts.sum() / top_k)
    share, mean = counts.sum(axis=(0, 1)) / rows, probabilities.sum(axis=(0, 1)) / rows
    return counts.shape[-1] * (share * mean).sum()


def at_least_something(total: Float[Array, ""]) -> Float[Array, ""]:
    """A sum of weights to divide by; 1 where nothing counts."""
    return jnp.where(total == 0, 1, total)


def _check_tokens(of: str, shape: tuple[int, ...], **arrays: jax.Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} is {list(array.shape)}, {of} are of tokens {list(shape)}: the shapes must be equal")
