"""What a dispatch takes as the matrices of experts: arrays, codes of such, either with a pair of low rank beside them."""

import dataclasses
from typing import Any

import jax
from jax.typing import DTypeLike

import pallas_kernels
from pallas_kernels.quantized.formats import bits

# gate, up [E, F, D] and down [E, D, F], each an array, a Coded or an Adapted; or stacks of all layers
Weights = tuple[Any, Any, Any]
WEIGHT_AXES = (("experts", "mlp", "embed"), ("experts", "mlp", "embed"), ("experts", "embed", "mlp"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix of each expert and a pair beside it, in whose sum `weight + scale * b a` rows are multiplied. A pytree.

    Attributes:
        weight: [E, out, in], or the stack of all layers, [L, E, out, in]; an array or a Coded.
        a: [E, r, in], likewise.
        b: [E, out, r], likewise.
        scale: of the pair's product.
    """

    weight: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """A matrix of each expert as `pallas_kernels.quantize` makes it; frozen. A pytree.

    Attributes:
        codes: [E, out, in], of 4 bits [E, out / 2, in]; or the stack of all layers.
        scales: [E, in / block, out], likewise.
        kind: of the codes.
    """

    codes: Any
    scales: Any
    kind: str = dataclasses.field(metadata=dict(static=True))


def decoded(weights: Any, dtype: DTypeLike) -> Any:
    """Weights without codes.

    Args:
        weights: any tree of one layer's matrices.
        dtype: of what is made of codes.

    Returns:
        The tree with an array in place of each Coded.
    """

    def one(matrix: Any) -> Any:
        return pallas_kernels.dequantize(matrix.codes, matrix.scales, matrix.kind, dtype) if _is_coded(matrix) else matrix

    return jax.tree.map(one, weights, is_leaf=_is_coded)


def decoded_places(form: Any, count: int) -> list[int]:
    """Which of the arrays of weights those of `decoded` are made of; of a Coded it is its codes.

    Args:
        form: the weights' structure.
        count: of their arrays.

    Returns:
        A place for each array of the decoded weights.
    """
    places = form.unflatten(range(count))
    return jax.tree.leaves(jax.tree.map(lambda at: at.codes if _is_coded(at) else at, places, is_leaf=_is_coded))


def is_coded(weights: Any) -> bool:
    """Whether there are codes among weights."""
    return any(map(_is_coded, jax.tree.leaves(weights, is_leaf=_is_coded)))


def _is_coded(matrix: Any) -> bool:
    return isinstance(matrix, Coded)


def rows_of(matrix: Any) -> int:
    """The size of a matrix's out axis."""
    matrix = matrix.weight if isinstance(matrix, Adapted) else matrix
    return matrix.codes.shape[-2] * 8 // bits(matrix.kind) if isinstance(matrix, Coded) else matrix.shape[-2]


def array_axes(weights: Weights) -> list[tuple[str, ...]]:
    """The logical axes of each array of the weights, in the order of `jax.tree.leaves`, without that of layers.

    Args:
        weights: gate, up and down.

    Returns:
        Three names an array.
    """
    names = []
    for matrix, (experts, out, inner) in zip(weights, WEIGHT_AXES, strict=True):
        names.append((experts, out, inner))
        if _is_coded(matrix.weight if isinstance(matrix, Adapted) else matrix):
            names.append((experts, inner, out))
        if isinstance(matrix, Adapted):
            names += [(experts, "rank", inner), (experts, out, "rank")]
    return names
