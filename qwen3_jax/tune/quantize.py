"""A frozen base in 8 or 4 bits (QLoRA, arXiv 2305.14314): codes in place of the matrices that adapters stand beside.

Embeddings, the output table, the router, norms and biases stay as they are: rows of a table are looked up one by one, a router
that is rounded sends tokens elsewhere, and all of them are 2 % of Qwen3-30B-A3B.
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.quantized.formats import KINDS
from qwen3_jax.model.param import ExpertParam
from qwen3_jax.model.quantized import Quantized, axes_of, expanded, stacked_axes
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import use_rules
from qwen3_jax.tune.matrices import copied, matrices, set_weight, weight_of

BLOCK = 64


def quantize(model: Qwen3, kind: str, *, block: int = BLOCK) -> Qwen3:
    """The model with codes in place of the matrices of attention, MLPs and experts. They are frozen from then on.

    One kind of matrix is made after another, of it one layer's (and one expert's) matrix after another.

    Args:
        model: any Qwen3 whose matrices are floats; on a mesh codes are laid out as they are.
        kind: "int8", "int4" or "nf4".
        block: values along a matrix's in axes that share a scale of bfloat16.

    Returns:
        A new model; what has no codes, adapters among it, it shares with the given one.

    Raises:
        ValueError: another kind, a model that has codes already, or matrices that blocks or bytes do not divide.
        MeshError: a mesh that cuts a block or a byte, with the arithmetic.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: accepted are {', '.join(KINDS)}")
    if (found := kind_of(model)) is not None:
        raise ValueError(f"the model is in {found[0]} already: accepted is one of floats; `dequantize` makes one of it")
    model = copied(model)
    for module, where, name in list(matrices(model)):
        quantize_matrix(model, module, where, name, kind, block)
    return model


def quantize_matrix(model: Qwen3, module: Any, where: str, name: str, kind: str, block: int) -> None:
    """Put codes in the place of one of a model's matrices.

    Args:
        model: whose.
        module: the matrix's.
        where: the module's name in its layer.
        name: the matrix's own.
        kind: of the codes.
        block: values that share a scale.

    Raises:
        ValueError, MeshError: as of `quantize`.
    """
    weight, outputs = weight_of(module, name)
    inner = math.prod(weight.shape[stacked_axes(axes_of(weight)) + outputs :])
    if block < 1 or inner % block:
        rest = f": {inner} / {block} leaves {inner % block}" if block > 0 else ""
        raise ValueError(
            f"{where}.{name} has {inner} columns in blocks of {block}{rest}; accepted is a number that divides them"
        )
    with on_mesh_of(weight), use_rules(model.rules):
        set_weight(module, name, jax.jit(lambda weight: Quantized(weight, outputs, kind=kind, block=block))(weight))


def dequantize(model: Qwen3, dtype: DTypeLike | None = None) -> Qwen3:
    """The model of the floats that its codes stand for.

    Args:
        model: any Qwen3.
        dtype: of those matrices; None is that of the embeddings.

    Returns:
        A new model, whose other parameters are the given one's.
    """
    model = copied(model)
    dtype = model.embed.weight.dtype if dtype is None else dtype
    for module, _, name in list(matrices(model)):
        weight, _ = weight_of(module, name)
        if not isinstance(weight, Quantized):
            continue
        arrays = weight.codes[...], weight.scales[...]
        with on_mesh_of(model):
            values = jax.jit(lambda arrays, weight=weight: jax.lax.map(lambda one: layer_of(weight, one, dtype), arrays))(
                arrays
            )
        set_weight(module, name, plain_param(weight, values))
    return model


def layer_of(weight: Quantized, arrays: tuple[jax.Array, jax.Array], dtype: DTypeLike) -> jax.Array:
    """One layer's matrix, with the axes that it had, from its codes and scales."""
    codes, scales = arrays
    return expanded(codes, scales, weight.kind, weight.out, weight.inner, dtype)


def plain_param(weight: Quantized, values: jax.Array) -> nnx.Param:
    """The parameter that stood in the place of codes."""
    param = ExpertParam if isinstance(weight.codes, ExpertParam) else nnx.Param
    return param(values, out_sharding=weight.axes, eager_sharding=False)


def kind_of(model: Qwen3) -> tuple[Any, int] | None:
    """The kind and the block of a model's codes; None of a model of floats."""
    for module, _, name in matrices(model):
        weight, _ = weight_of(module, name)
        if isinstance(weight, Quantized):
            return weight.kind, weight.block
    return None
