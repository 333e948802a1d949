"""The dense feed-forward layer (SwiGLU) and the projection that attention and it are made of."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.param import constant_param, normal_param


class Projection(nnx.Module):
    """A linear map whose weight lies `[out..., in...]` as on the hub, with an optional bias over the out axes.

    `equation` is the einsum of input and weight, the letters those of the package: "btd,nhd->btnh".
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        key: jax.Array,
        *,
        stddev: float,
        param_dtype: DTypeLike,
        bias: tuple[int, tuple[str, ...]] | None = None,
    ):
        self.equation = equation
        self.weight = normal_param(key, shape, axes, stddev=stddev, dtype=param_dtype)
        # `bias` gives how many leading axes of the weight are its output, and the bias's own axis names.
        self.bias = nnx.data(None if bias is None else constant_param(0.0, shape[: bias[0]], bias[1], param_dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product in x's dtype, plus the bias."""
        y = jnp.einsum(self.equation, x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, key: jax.Array, *, param_dtype: DTypeLike):
        d, f = config.hidden_size, config.intermediate_size
        keys = jax.random.split(key, 3)
        options = dict(stddev=config.initializer_range, param_dtype=param_dtype)
        self.gate = Projection("btd,fd->btf", (f, d), ("mlp", "embed"), keys[0], **options)
        self.up = Projection("btd,fd->btf", (f, d), ("mlp", "embed"), keys[1], **options)
        self.down = Projection("btf,df->btd", (d, f), ("embed", "mlp"), keys[2], **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output, in x's dtype."""
        gate = checkpoint_name(self.gate(x), "mlp_gate")
        up = checkpoint_name(self.up(x), "mlp_up")
        return self.down(jax.nn.silu(gate) * up)
