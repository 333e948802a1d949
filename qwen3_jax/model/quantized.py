"""A frozen matrix as codes of 8 or 4 bits: what it holds, and the matrix that a layer makes of it where it multiplies."""

import math

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from qwen3_jax.model.param import ExpertParam
from qwen3_jax.parallel.rules import meshless, placed, spec


class QuantizedParam(nnx.Param):
    """Codes or scales of a quantised matrix. Never trained."""


class ExpertQuantizedParam(ExpertParam, QuantizedParam):
    """Those of matrices of experts."""


class Quantized(nnx.Module):
    """A matrix W [out..., in...] behind the axes that it has of layers and experts, as `pallas_kernels.quantize` makes it.

    `codes` [out, in] (of 4 bits [out / 2, in]) and `scales` [in / block, out] have its out axes as one and its in axes as one,
    and are split over a mesh as W is. `kind`, `out` and `inner` say which codes they are, and the axes of W.
    """

    def __init__(self, weight: nnx.Param, outputs: int, *, kind: str, block: int):
        """The nearest codes of a weight, one matrix after another.

        Args:
            weight: W, which names its axes; its size and its mesh hold the codes (qwen3_jax.tune.quantize.check_codes).
            outputs: how many axes its output has.
            kind: int8, int4 or nf4.
            block: values along W's in axes that share a scale.
        """
        axes = weight.get_metadata("out_sharding")
        stacked = stacked_axes(axes)
        self.kind, self.out, self.inner = kind, weight.shape[stacked : stacked + outputs], weight.shape[stacked + outputs :]
        self.axes = axes
        out, inner = axes[stacked], axes[stacked + outputs]
        value = placed(weight[...], *axes)
        layout = None if meshless() else jax.typeof(value).sharding.spec
        split = None if layout is None else (*layout[:stacked], layout[stacked], layout[stacked + outputs])

        def codes_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            leading, rows = x.shape[:stacked], math.prod(x.shape[stacked : stacked + outputs])
            matrices = x.reshape(-1, rows, math.prod(x.shape[stacked + outputs :]))
            found = jax.lax.map(lambda matrix: pallas_kernels.quantize(matrix, kind, block=block), matrices)
            return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), found)

        if split is not None:
            # Scales as the codes: a spec of their own, by the order of their axes, may split the other of two that share one.
            layouts = PartitionSpec(*split), turned(PartitionSpec(*split))
            codes_of = jax.shard_map(codes_of, in_specs=layout, out_specs=layouts, check_vma=False)
        codes, scales = codes_of(value)
        param = ExpertQuantizedParam if isinstance(weight, ExpertParam) else QuantizedParam
        names = (*axes[:stacked], out, inner), (*axes[:stacked], inner, out)
        # Under the kind's name: codes of int4 and of nf4 are alike else, and a state of one must not pass as the other's.
        setattr(self, kind, param(codes, out_sharding=names[0], eager_sharding=False))
        self.scales = param(scales, out_sharding=names[1], eager_sharding=False)

    @property
    def codes(self) -> QuantizedParam:
        """The codes."""
        return getattr(self, self.kind)

    @property
    def block(self) -> int:
        """Values that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W."""
        return (*self.codes.shape[:-2], *self.out, *self.inner)

    @property
    def ndim(self) -> int:
        """Axes of W."""
        return len(self.shape)


def turned(layout: PartitionSpec) -> PartitionSpec:
    """How scales [..., in / block, out] lie beside codes [..., out, in] that lie like this."""
    *leading, rows, columns = layout
    return PartitionSpec(*leading, columns, rows)


def stacked_axes(axes: tuple[str | None, ...]) -> int:
    """How many of a parameter's axes are of layers or experts."""
    return sum(axis in ("layers", "experts") for axis in axes)


def axes_of(weight: nnx.Param | Quantized) -> tuple[str, ...]:
    """The logical axes of a matrix W, whichever way it is kept."""
    return weight.axes if isinstance(weight, Quantized) else weight.get_metadata("out_sharding")


def made(
    codes: jax.Array, scales: jax.Array, kind: str, dtype: DTypeLike, axes: tuple[str | None, str | None]
) -> Float[Array, "out inner"]:
    """The matrix of one layer, in which the layer then multiplies; its codes travel where it lies otherwise, not it.

    Args:
        codes: of one matrix.
        scales: likewise.
        kind: of the codes.
        dtype: of the result.
        axes: logical axes of its rows and columns, as it shall lie.

    Returns:
        [out, in].
    """
    layout = spec(*axes)
    if layout is None:
        return pallas_kernels.dequantize(codes, scales, kind, dtype)
    layouts = layout, turned(layout)
    codes, scales = jax.sharding.reshard((codes, scales), layouts)

    def run(codes: jax.Array, scales: jax.Array) -> jax.Array:
        return pallas_kernels.dequantize(codes, scales, kind, dtype)

    return jax.shard_map(run, in_specs=layouts, out_specs=layouts[0], check_vma=False)(codes, scales)


def expanded(
    codes: jax.Array, scales: jax.Array, kind: str, out: tuple[int, ...], inner: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."]:
    """W with the axes that it had, split as its codes are.

    Args:
        codes: of a matrix, or of one for each expert.
        scales: likewise.
        kind: of the codes.
        out: W's out axes.
        inner: W's in axes.
        dtype: of the result.

    Returns:
        [(E,) out..., in...].
    """

    def run(codes: jax.Array, scales: jax.Array) -> jax.Array:
        matrices = pallas_kernels.dequantize(codes, scales, kind, dtype)
        *leading, rows, columns = matrices.shape
        sizes = rows // math.prod(out[1:]), *out[1:], columns // math.prod(inner[1:]), *inner[1:]
        return matrices.reshape(*leading, *sizes)

    if meshless():
        return run(codes, scales)
    layout = jax.typeof(codes).sharding.spec
    *leading, rows, columns = layout
    whole = PartitionSpec(*leading, rows, *(None,) * (len(out) - 1), columns, *(None,) * (len(inner) - 1))
    layouts = layout, turned(layout)
    scales = jax.sharding.reshard(scales, layouts[1])
    return jax.shard_map(run, in_specs=layouts, out_specs=whole, check_vma=False)(codes, scales)
