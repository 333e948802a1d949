"""One layer: norm, attention, norm, feed-forward (dense or experts), each added to the residual stream."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen3_jax.config import BlockKind, Qwen3Config
from qwen3_jax.model.attention import Attention, Places
from qwen3_jax.model.cache import KeyValues
from qwen3_jax.model.mlp import MLP
from qwen3_jax.model.moe import MoE, Routed
from qwen3_jax.model.norm import RMSNorm


class Block(nnx.Module):
    """A layer of the kind that the config says; holds either `mlp` or `moe`."""

    def __init__(self, config: Qwen3Config, kind: BlockKind, key: jax.Array, *, param_dtype: DTypeLike):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.attention = Attention(config, kind.sliding, attention_key, param_dtype=param_dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        if kind.mlp == "moe":
            self.moe = MoE(config, mlp_key, param_dtype=param_dtype)
        else:
            self.mlp = MLP(config, mlp_key, param_dtype=param_dtype)
        self.is_moe = kind.mlp == "moe"

    def __call__(
        self,
        x: Float[Array, "B T D"],
        places: Places,
        cache: KeyValues | None,
        layer: Int[Array, ""] | int,
        repeat: Int[Array, ""] | int | None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None, Routed | None]:
        """The residual stream after this layer.

        Args:
            x: residual stream.
            places: where the tokens stand.
            cache: keys and values of all layers, or None.
            layer: this layer's index in the cache.
            repeat: this layer's index in its segment's stack, for expert weights that are stacks.

        Returns:
            The stream, the cache, and what became of the rows of a MoE layer (None of a dense one).
        """
        with jax.named_scope("attention"):
            out, cache = self.attention(self.attention_norm(x), places, cache, layer)
            x = x + out
        if self.is_moe:
            with jax.named_scope("moe"):
                out, routed = self.moe(self.mlp_norm(x), places.segments != 0, repeat)
            return x + out, cache, routed
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x)), cache, None
