"""The mixture-of-experts layer: every token goes through its top-k experts, and none is ever dropped."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.mlp import Projection
from qwen3_jax.model.param import ExpertParam, normal_param


class MoE(nnx.Module):
    """Router and experts. Expert weights are [E, F, D] (gate, up) and [E, D, F] (down), as on the hub.

    `gate`, `up` and `down` may also hold the stack of all layers, [L, E, ...]: the call then names its layer, and the grouped
    matmul reads that layer's experts where they lie.
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

        self.gate = experts(keys[1], (e, f, d), ("experts", "mlp", "embed"))
        self.up = experts(keys[2], (e, f, d), ("experts", "mlp", "embed"))
        self.down = experts(keys[3], (e, d, f), ("experts", "embed", "mlp"))

    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""] | int | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
        """The weighted sum of each token's experts.

        Args:
            x: normalised input.
            layer: which layer of the stack to read, when the expert weights are stacks.

        Returns:
            The layer's output in x's dtype, and the router's logits in float32.
        """
        logits = self.router(x).astype(jnp.float32)
        weights, experts = self.route(logits)
        out = self.apply_experts(
            x.reshape(-1, x.shape[-1]),
            weights.reshape(-1, self.top_k).astype(x.dtype),
            experts.reshape(-1, self.top_k),
            layer,
        )
        return out.reshape(x.shape), logits

    def route(self, logits: Float[Array, "*B E"]) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
        """Float32 weights and indices of each token's experts: softmax over all experts, then the k largest."""
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.top_k)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights, experts

    def apply_experts(
        self,
        x: Float[Array, "M D"],
        weights: Float[Array, "M k"],
        experts: Int[Array, "M k"],
        layer: Int[Array, ""] | int | None,
    ) -> Float[Array, "M D"]:
        """Sort rows by expert, three grouped matmuls, un-sort, weighted sum."""
        flat = experts.reshape(-1)
        order = jnp.argsort(flat)  # stable: equal inputs take equal paths
        sizes = jnp.bincount(flat, length=self.gate.shape[-3]).astype(jnp.int32)
        stack_layer = layer if self.gate.ndim == 4 else None

        def grouped(rows: Float[Array, "R n"], weight: nnx.Param) -> Float[Array, "R m"]:
            return pallas_kernels.grouped_matmul(rows, weight[...], sizes, layer=stack_layer, transpose_rhs=True)

        rows = x[order // self.top_k]
        gate = checkpoint_name(grouped(rows, self.gate), "moe_gate")
        up = checkpoint_name(grouped(rows, self.up), "moe_up")
        out = grouped(jax.nn.silu(gate) * up, self.down)
        out = out[jnp.argsort(order)].reshape(x.shape[0], self.top_k, x.shape[1])
        out = jnp.einsum("mkd,mk->md", out, weights, preferred_element_type=jnp.float32)
        return out.astype(x.dtype)
