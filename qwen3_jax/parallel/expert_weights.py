"""What a dispatch takes as the matrices of experts: arrays, or arrays with a pair of low rank beside them."""

import dataclasses
from typing import Any

import jax

Weights = tuple[Any, Any, Any]  # gate, up [E, F, D] and down [E, D, F], each an array or an Adapted; or stacks of all layers
WEIGHT_AXES = (("experts", "mlp", "embed"), ("experts", "mlp", "embed"), ("experts", "embed", "mlp"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix of each expert and a pair beside it, in whose sum `weight + scale * b a` rows are multiplied. A pytree.

    Attributes:
        weight: [E, out, in], or the stack of all layers, [L, E, out, in].
        a: [E, r, in], likewise.
        b: [E, out, r], likewise.
        scale: of the pair's product.
    """

    weight: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata=dict(static=True))


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
        if isinstance(matrix, Adapted):
            names += [(experts, "rank", inner), (experts, out, "rank")]
    return names
