"""How evenly a step's tokens used the experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def router_metrics(counts: Float[Array, "L E"]) -> dict[str, jax.Array]:
    """Figures of each MoE layer.

    Args:
        counts: real tokens of the whole batch that chose each expert.

    Returns:
        expert_load [L, E]: shares, each row summing to 1. max_violation [L]: the largest over the even share, less 1
        (arXiv 2408.15664, section 4.1). dead_experts [L]: int32, experts that nobody chose.
    """
    load = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
    return dict(
        expert_load=load,
        max_violation=load.max(-1, initial=0) * counts.shape[-1] - 1,
        dead_experts=(counts == 0).sum(-1, dtype=jnp.int32),
    )
