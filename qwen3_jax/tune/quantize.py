"""A frozen base in 8 or 4 bits (QLoRA, arXiv 2305.14314): codes in place of the matrices that adapters stand beside.

Embeddings, the output table, the router, norms and biases stay as they are: rows of a table are looked up one by one, a router
that is rounded sends tokens elsewhere, and all of them are 2 % of Qwen3-30B-A3B.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from pallas_kernels.quantized.formats import KINDS, bits
from qwen3_jax.checks import ConfigError
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.abstract import abstract_model
from qwen3_jax.model.param import ExpertParam
from qwen3_jax.model.quantized import Quantized, axes_of, expanded, stacked_axes
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.fit import fitted
from qwen3_jax.parallel.mesh import MeshError, on_mesh_of
from qwen3_jax.parallel.rules import Rules, use_rules
from qwen3_jax.tune.matrices import copied, matrices, set_weight, weight_of

BLOCK = 64


def check_codes(config: Qwen3Config, rules: Rules, mesh: Mesh | AbstractMesh | None, kind: str, block: int = BLOCK) -> None:
    """Refuse a model, or a mesh for it, whose matrices cannot be codes. Nothing is made, and no mesh need be set.

    Args:
        config: the model's shape.
        rules: which mesh axes split what.
        mesh: where the model shall lie, of compile-only devices or abstract too; None is one device.
        kind: "int8", "int4" or "nf4".
        block: values along a matrix's in axes that share a scale.

    Raises:
        ConfigError: what no mesh can mend: another kind, a matrix whose columns are no whole blocks, one with an odd number of
            rows in 4 bits.
        MeshError: the model does not fit the mesh, or a shard of a matrix would hold a part of a block, or of a byte; with
            the matrix, the arithmetic and what is accepted.
    """
    _check(_shapes(config), rules if mesh is None else fitted(rules, config, mesh), mesh, kind, block)


# A matrix by its name in a layer, its logical axes without that of layers, its shape likewise, and how many are of its output.
_Shape = tuple[str, tuple[str, ...], tuple[int, ...], int]


@functools.cache
def _shapes(config: Qwen3Config) -> tuple[_Shape, ...]:
    """The matrices of a model."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # as on one device, whatever is set
        return _shapes_of(abstract_model(config))


def _shapes_of(model: Qwen3) -> tuple[_Shape, ...]:
    found = {}
    for module, where, name in matrices(model):
        weight, outputs = weight_of(module, name)
        found[f"{where}.{name}"] = axes_of(weight)[1:], weight.shape[1:], outputs
    return tuple((name, *rest) for name, rest in found.items())


def _check(shapes: Iterable[_Shape], rules: Rules, mesh: Mesh | AbstractMesh | None, kind: str, block: int) -> None:
    """`check_codes` of matrices, by the rules that hold on the mesh."""
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}: accepted are {', '.join(KINDS)}")
    if block < 1:
        raise ConfigError(f"block is {block}: accepted is a whole number from 1 that divides a matrix's columns")
    pair = 1 if bits(kind) == 8 else 2
    for name, axes, shape, outputs in shapes:
        stacked = stacked_axes(axes)
        inner = stacked + outputs
        rows, columns = math.prod(shape[stacked:inner]), math.prod(shape[inner:])
        if columns % block:
            raise ConfigError(
                f"{name} has {columns} columns in blocks of {block}: {columns} / {block} leaves {columns % block}; accepted is "
                "a number that divides them"
            )
        if rows % pair:
            raise ConfigError(
                f"{name} has {rows} rows in {kind}, where two rows share bytes; accepted is an even number of rows, or int8"
            )
        if mesh is not None:
            # As it is kept, and as a layer multiplies with it: whole along embed, whose mesh axes may then split the other.
            for names in (axes, tuple(None if axis == "embed" else axis for axis in axes)):
                layout = rules.spec(*names, mesh=mesh)
                _check_shards(name, f"{columns} columns in blocks of {block}", columns // block, layout[inner], mesh)
                _check_shards(name, f"{rows} rows in {kind}, by {pair} in a byte", rows // pair, layout[stacked], mesh)


def _check_shards(name: str, what: str, parts: int, split: Any, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh that would cut parts of a matrix which codes keep together."""
    sizes = {axis: mesh.shape[axis] for axis in ((split,) if isinstance(split, str) else split or ())}
    shards = math.prod(sizes.values())
    if parts % shards:
        over = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise MeshError(
            f"{name} has {what}, over {over}: {parts} / {shards} leaves {parts % shards}; accepted is a number of shards that "
            f"divides {parts}"
        )


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
        ValueError: a model that has codes already, a matrix with infinities or NaN.
        ConfigError, MeshError: as of `check_codes`, before anything is made.
    """
    if (found := kind_of(model)) is not None:
        raise ValueError(f"the model is in {found[0]} already: accepted is one of floats; `dequantize` makes one of it")
    with on_mesh_of(model):
        mesh = jax.sharding.get_abstract_mesh()
        _check(_shapes_of(model), model.rules, None if mesh.empty else mesh, kind, block)
    model = copied(model)
    for module, where, name in list(matrices(model)):
        quantize_matrix(model, module, where, name, kind, block)
    return model


def quantize_matrix(model: Qwen3, module: Any, where: str, name: str, kind: str, block: int) -> None:
    """Put codes in the place of one of a model's matrices, which `check_codes` lets pass.

    Args:
        model: whose.
        module: the matrix's.
        where: the module's name in its layer.
        name: the matrix's own.
        kind: of the codes.
        block: values that share a scale.

    Raises:
        ValueError: the matrix holds infinities or NaN. Not told where it is traced.
    """
    weight, outputs = weight_of(module, name)

    @jax.jit
    def run(weight: nnx.Param) -> tuple[Quantized, jax.Array]:
        made = Quantized(weight, outputs, kind=kind, block=block)
        return made, jnp.isfinite(made.scales[...]).all()

    with on_mesh_of(weight), use_rules(model.rules):
        made, finite = run(weight)
    if not isinstance(finite, jax.core.Tracer) and not finite:
        # A kernel that multiplies a row's scales by zeros would spread it over other blocks.
        raise ValueError(f"{where}.{name} has infinities or NaN, or what is infinite in bfloat16: accepted are finite values")
    set_weight(module, name, made)


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
