"""The mixture-of-experts layer: every token goes through its top-k experts, and none is ever dropped."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.mlp import Projection
from qwen3_jax.model.param import ExpertParam, normal_param
from qwen3_jax.model.quantized import Quantized
from qwen3_jax.parallel.expert_weights import Adapted, Coded
from qwen3_jax.parallel.experts import apply_experts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """What a layer tells of its routing. A pytree.

    Attributes:
        logits: [B, T, E] float32, the router's.
        dropped: int32 scalar, rows that were sent to an expert and did not come back.
        counts: [B, E] float32, how many of a row's real tokens chose each expert.
        probabilities: [B, E] float32, sums over a row's real tokens of what the router gave each expert.
        squares: [B] float32, sums over them of the squared log of the router's normaliser: its z-loss (arXiv 2202.08906).
        entropy: [B] float32, sums over them of the entropy of those probabilities, in nats.
    """

    logits: Any
    dropped: Any
    counts: Any
    probabilities: Any
    squares: Any
    entropy: Any


class MoE(nnx.Module):
    """Router and experts. Expert weights are [E, F, D] (gate, up) and [E, D, F] (down), as on the hub.

    `gate`, `up` and `down` may also hold the stack of all layers, [L, E, ...]: the call then names its layer, and the grouped
    matmul reads that layer's experts where they lie. `gate_lora`, `up_lora` and `down_lora` are None, or the Adapters that
    qwen3_jax.tune.lora attaches: a pair per expert. In place of the matrices there may be Quantized ones.
    """

    def __init__(self, config: Qwen3Config, key: jax.Array, *, param_dtype: DTypeLike):
        d, f, e = config.hidden_size, config.moe_intermediate_size, config.num_experts
        keys = jax.random.split(key, 4)
        stddev = config.initializer_range
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.router = Projection((e, d), ("router", "embed"), keys[0], stddev=stddev, param_dtype=param_dtype)

        def experts(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return normal_param(key, shape, axes, stddev=stddev, dtype=param_dtype, kind=ExpertParam)

        self.gate: nnx.Param | Quantized = experts(keys[1], (e, f, d), ("experts", "mlp", "embed"))
        self.up: nnx.Param | Quantized = experts(keys[2], (e, f, d), ("experts", "mlp", "embed"))
        self.down: nnx.Param | Quantized = experts(keys[3], (e, d, f), ("experts", "embed", "mlp"))
        self.gate_lora, self.up_lora, self.down_lora = nnx.data(None), nnx.data(None), nnx.data(None)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], layer: Int[Array, ""] | int | None = None
    ) -> tuple[Float[Array, "B T D"], Routed]:
        """The weighted sum of each token's experts.

        Args:
            x: normalised input.
            real: tokens that are not padding, for the counts.
            layer: which layer of the stack to read, when the expert weights are stacks.

        Returns:
            The layer's output in x's dtype, and what became of its rows.
        """
        logits = self.router(x).astype(jnp.float32)
        probabilities, weights, experts = self.route(logits)
        # Comparisons and sums rather than a scatter, whose result no mesh could split.
        hits = (experts[..., None] == jnp.arange(logits.shape[-1])).sum(axis=-2)
        counts, sums = ((x * real[..., None]).sum(axis=1, dtype=jnp.float32) for x in (hits, probabilities))
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        entropy = normaliser - (probabilities * logits).sum(axis=-1)
        squares, entropy = ((x * real).sum(axis=1) for x in (jnp.square(normaliser), entropy))
        matrices = (_matrix(self.gate, self.gate_lora), _matrix(self.up, self.up_lora), _matrix(self.down, self.down_lora))
        out, dropped = apply_experts(matrices, x, weights, experts, layer if self.gate.ndim == 4 else None)
        return out, Routed(logits, dropped, counts, sums, squares, entropy)

    def route(self, logits: Float[Array, "*B E"]) -> tuple[Float[Array, "*B E"], Float[Array, "*B k"], Int[Array, "*B k"]]:
        """Float32 probabilities of all experts (softmax), weights and indices of each token's own (the k largest)."""
        probabilities = jax.nn.softmax(logits, axis=-1)
        _, experts = jax.lax.top_k(jax.lax.stop_gradient(probabilities), self.top_k)
        # Comparisons again, for their gradient: that of top_k's own values is a scatter, which a TPU sorts for.
        chosen = experts[..., None] == jnp.arange(probabilities.shape[-1])
        weights = jnp.where(chosen, probabilities[..., None, :], 0).sum(axis=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return probabilities, weights, experts


def _matrix(weight: nnx.Param | Quantized, lora: Any) -> Any:
    """A matrix as the dispatch takes it."""
    if isinstance(weight, Quantized):
        matrix = Coded(weight.codes[...], weight.scales[...], weight.kind)
    else:
        matrix = weight[...]
    return matrix if lora is None else Adapted(matrix, lora.a[...], lora.b[...], lora.scale)
