"""PEFT's tensor names and the places of the adapters: one table, read in both directions, derived from that of the weights.

Both sides lay a pair as `a` [r, in] and `b` [out, r], so a tensor is a slice of a stacked factor up to a reshape.
"""

import math

from qwen3_jax.checkpoint.names import Slot, slots
from qwen3_jax.config import Qwen3Config
from qwen3_jax.tune.lora import LoraConfig
from qwen3_jax.tune.matrices import MATRICES

PREFIX = "base_model.model."
SUFFIX = ".weight"
# Transformers 5 holds a layer's experts in two parameters; the matrices that each is made of, one below the other.
FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def matrix_of(slot: Slot) -> tuple[str, str] | None:
    """Which matrix of a layer a weight is, as `LoraConfig.targets` call it; None for one that has no adapter.

    Args:
        slot: of the model's own table.

    Returns:
        The module and the name: ("attention", "q").
    """
    kind, name, *rest = [*slot.path.split(".")[4:], "", ""][:3]
    return (kind, name) if name in MATRICES.get(kind, ()) and rest in (["weight"], [""]) else None


def modules(config: Qwen3Config) -> dict[str, tuple[str, str] | None]:
    """The modules of transformers' model that hold a weight, by their names: "model.layers.0.self_attn.q_proj".

    Args:
        config: the model's.

    Returns:
        What `matrix_of` says of each.
    """
    found = {slot.name.removesuffix(SUFFIX): matrix_of(slot) for slot in slots(config) if slot.name.endswith(SUFFIX)}
    return found | {"lm_head": None}  # a module where embeddings are tied too


def expert_modules(config: Qwen3Config) -> list[str]:
    """The modules that hold a layer's experts: "model.layers.0.mlp.experts"."""
    found = (name.rsplit(".", 2)[0] for name, matrix in modules(config).items() if matrix is not None and matrix[0] == "moe")
    return list(dict.fromkeys(found))


def adapter_slots(config: Qwen3Config, lora: LoraConfig) -> list[Slot]:
    """Every tensor of an adapter folder, layer by layer.

    Args:
        config: the model's.
        lora: which matrices have a pair, and of which rank.

    Returns:
        Two Slots for each matrix, of each expert where it has experts; together they fill the adapters exactly.
    """
    found: list[Slot] = []
    for slot in slots(config):
        matrix = matrix_of(slot)
        if matrix is None or not lora.wants(*matrix):
            continue
        name = PREFIX + slot.name.removesuffix(SUFFIX)
        path = f"{slot.path}_lora" if matrix[0] == "moe" else f"{slot.path.removesuffix('weight')}lora"
        # Axes of the part that are the matrix's rows.
        outputs = next(axes for axes in range(1, len(slot.part)) if math.prod(slot.part[:axes]) == slot.shape[0])
        a = (lora.rank, *slot.part[outputs:])
        b = (*slot.part[:outputs], lora.rank)
        found.append(Slot(f"{name}.lora_A{SUFFIX}", (lora.rank, slot.shape[1]), f"{path}.a", slot.index, a))
        found.append(Slot(f"{name}.lora_B{SUFFIX}", (slot.shape[0], lora.rank), f"{path}.b", slot.index, b))
    return found
