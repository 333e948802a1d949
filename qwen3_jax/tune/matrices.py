"""The matrices that adapters and codes are made for: those of attention, of dense MLPs and of every expert."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from qwen3_jax.model.quantized import Quantized
from qwen3_jax.model.transformer import Qwen3

# A layer's matrices: the module and the name that each has in it.
MATRICES = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "moe": ("gate", "up", "down"),
}


def copied(model: Qwen3) -> Qwen3:
    """Modules and variables of its own, the same arrays."""
    return jax.tree.map(lambda leaf: leaf, model)


def matrices(model: Qwen3) -> Iterator[tuple[Any, str, str]]:
    """Every matrix: its module, that module's name in its layer, and its own name."""
    yield from ((module, kind, name) for _, module, kind, name in matrices_at(model))


def matrices_at(model: Qwen3) -> Iterator[tuple[str, Any, str, str]]:
    """Every matrix with its parameter's path in the table of names, of a model of floats."""
    for s, unit in enumerate(model.segments):
        for u, block in enumerate(unit.blocks):
            for kind, names in MATRICES.items():
                module = getattr(block, kind, None)
                if module is None:
                    continue
                for name in names:
                    path = f"segments.{s}.blocks.{u}.{kind}.{name}"
                    yield path if isinstance(getattr(module, name), nnx.Param) else f"{path}.weight", module, kind, name


# Experts' matrices are parameters of their module, all others are modules.
def weight_of(module: Any, name: str) -> tuple[nnx.Param | Quantized, int]:
    """A matrix, and how many axes its output has."""
    found = getattr(module, name)
    return (found, 1) if isinstance(found, nnx.Param | Quantized) else (found.weight, found.outputs)


def set_weight(module: Any, name: str, weight: nnx.Param | Quantized) -> None:
    """Put another in a matrix's place."""
    found = getattr(module, name)
    if isinstance(found, nnx.Param | Quantized):
        setattr(module, name, weight)
    else:
        found.weight = weight


def lora_of(module: Any, name: str) -> Any:
    """The adapter beside a matrix, or None."""
    found = getattr(module, name)
    return getattr(module, f"{name}_lora") if isinstance(found, nnx.Param | Quantized) else found.lora


def set_lora(module: Any, name: str, pair: Any) -> None:
    """Put an adapter, or None, beside a matrix."""
    found = getattr(module, name)
    if isinstance(found, nnx.Param | Quantized):
        setattr(module, f"{name}_lora", nnx.data(pair))
    else:
        found.lora = nnx.data(pair)
