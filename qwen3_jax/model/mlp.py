"""The dense feed-forward layer (SwiGLU) and the projection that attention and it are made of."""

import math

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.param import constant_param, normal_param
from qwen3_jax.model.quantized import Quantized, made
from qwen3_jax.parallel.rules import cast_in_place, placed, spec


class Projection(nnx.Module):
    """A linear map whose weight lies `[out..., in...]` as on the hub, with an optional bias over the out axes.

    `lora` is None, or the Adapter that qwen3_jax.tune.lora attaches; `weight` may be the Quantized that
    qwen3_jax.tune.quantize puts in its place.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        key: jax.Array,
        *,
        stddev: float,
        param_dtype: DTypeLike,
        outputs: int = 1,
        bias_axes: tuple[str, ...] | None = None,
    ):
        self.outputs = outputs  # how many leading axes of the weight are its output
        # Split as the parameter is, but for the embed axis, along which activations are whole.
        self.axes = tuple(None if axis == "embed" else axis for axis in axes)
        self.weight: nnx.Param | Quantized = normal_param(key, shape, axes, stddev=stddev, dtype=param_dtype)
        self.bias = nnx.data(None if bias_axes is None else constant_param(0.0, shape[:outputs], bias_axes, param_dtype))
        self.lora = nnx.data(None)

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """The product in x's dtype, plus the bias; the weight's in axes are the last axes of x, its out axes those of y."""
        out, inner = self.axes[: self.outputs], self.axes[self.outputs :]
        if isinstance(self.weight, Quantized):
            y = self._from_codes(x, self.weight)
        else:
            y = _product(x, cast_in_place(self.weight[...], x.dtype), (out, inner))
        if self.lora is not None:  # its factors are small: the compiler may convert those of all layers at once
            a, b = self.lora.a[...].astype(x.dtype), self.lora.b[...].astype(x.dtype)
            # Scaled where there are r numbers a token: behind the products it would be a pass over y, and over its cotangent.
            y = y + _product(self.lora.scale * _product(x, a, (("rank",), inner)), b, (out, ("rank",)))
        return y if self.bias is None else y + placed(self.bias[...].astype(x.dtype), *out)

    def _from_codes(self, x: Float[Array, "B T ..."], weight: Quantized) -> Float[Array, "B T ..."]:
        """The product with a matrix that is made here, and again in the backward pass: what is kept for it is codes."""
        axes, kind, columns = (self.axes[0], self.axes[self.outputs]), weight.kind, len(weight.inner)

        def run(x: Array, codes: Array, scales: Array) -> Array:
            return _rows_times(x, columns, made(codes, scales, kind, x.dtype, axes), weight.out, axes[0])

        return jax.checkpoint(run, prevent_cse=False)(x, weight.codes[...], weight.scales[...])


def _product(x: Float[Array, "B T ..."], weight: Float[Array, "..."], axes: tuple[tuple[str | None, ...], ...]) -> Array:
    """x, whose last axes are the weight's in axes, times the weight, split along its out and in axes as these say."""
    out_axes, in_axes = axes
    weight = placed(weight, *out_axes, *in_axes)
    out, inner = weight.shape[: len(out_axes)], weight.shape[len(out_axes) :]
    # As a plain matrix: with more axes XLA:CPU multiplies vectors at 2 GB/s of weights instead of 28.
    matrix = weight.reshape(math.prod(out), math.prod(inner))
    return _rows_times(x, len(inner), matrix, out, out_axes[0])


def _rows_times(
    x: Float[Array, "B T ..."], columns: int, matrix: Float[Array, "_ _"], out: tuple[int, ...], out_axis: str | None
) -> Float[Array, "B T ..."]:
    """x, whose so many last axes are the matrix's columns, times the matrix, whose rows are the out axes of the result."""
    batch = x.shape[: x.ndim - columns]
    merged = spec("batch", "seq", out_axis)
    return pallas_kernels.rows_matmul(x.reshape(*batch, -1), matrix, out_sharding=merged).reshape(*batch, *out)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, key: jax.Array, *, param_dtype: DTypeLike):
        d, f = config.hidden_size, config.intermediate_size
        keys = jax.random.split(key, 3)
        options = dict(stddev=config.initializer_range, param_dtype=param_dtype)
        self.gate = Projection((f, d), ("mlp", "embed"), keys[0], **options)
        self.up = Projection((f, d), ("mlp", "embed"), keys[1], **options)
        self.down = Projection((d, f), ("embed", "mlp"), keys[2], **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output, in x's dtype."""
        gate = checkpoint_name(pallas_kernels.gradient_made_once(self.gate(x)), "mlp_gate")
        up = checkpoint_name(pallas_kernels.gradient_made_once(self.up(x)), "mlp_up")
        return self.down(jax.nn.silu(gate) * up)
