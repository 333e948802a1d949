"""The models and adapters that are compared with PEFT: configs as data, every weight and factor by a seeded draw.

Imports numpy alone, so that the script that writes the fixtures (tools/make_peft_fixtures.py) can read it too.
"""

from typing import Any

import numpy as np

from tests.parity.cases import BASE, MOE, tokens

LENGTH = 72
SIZE = dict(vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
DENSE = dict(BASE, **SIZE, intermediate_size=48)
EXPERTS = dict(MOE, **SIZE, intermediate_size=48, num_experts=4, moe_intermediate_size=24)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# What PEFT writes and we read: the model's config, what its LoraConfig is told, and transformers' major version.
WRITTEN_BY_PEFT: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "dense": (DENSE, dict(r=4, lora_alpha=6, target_modules=ALL), 4),
    "moe": (EXPERTS, dict(r=3, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "o_proj", *ALL[4:]]), 4),
    "fused": (EXPERTS, dict(r=3, lora_alpha=5, target_modules=["k_proj"], target_parameters=FUSED), 5),
    "fused_gate_up": (EXPERTS, dict(r=2, lora_alpha=4, target_parameters=["experts.gate_up_proj"], use_rslora=True), 5),
}

# What we write and PEFT reads: the model's config, and our LoraConfig's rank, alpha and targets.
ALTERNATING = dict(EXPERTS, decoder_sparse_step=2)
WRITTEN_BY_US: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, dict(rank=4, alpha=6.0, targets=("attention", "mlp"))),
    "moe": (EXPERTS, dict(rank=4, alpha=6.5, targets=("attention", "moe"))),
    "moe_attention": (EXPERTS, dict(rank=4, alpha=8.0, targets=("attention.q", "attention.v"))),
    "moe_gate_up": (EXPERTS, dict(rank=4, alpha=8.0, targets=("moe.gate", "moe.up"))),
    "moe_down": (EXPERTS, dict(rank=4, alpha=8.0, targets=("moe.down",))),
    "moe_gate": (EXPERTS, dict(rank=4, alpha=8.0, targets=("moe.gate",))),
    "alternating": (ALTERNATING, dict(rank=4, alpha=6.0, targets=("attention", "mlp", "moe"))),
    "alternating_attention": (ALTERNATING, dict(rank=4, alpha=6.0, targets=("attention",))),
    "alternating_dense": (ALTERNATING, dict(rank=4, alpha=6.0, targets=("attention", "mlp"))),
    "alternating_experts": (ALTERNATING, dict(rank=4, alpha=6.0, targets=("moe",))),
}


def words() -> np.ndarray:
    """The tokens, [1, LENGTH]."""
    return tokens()[:, :LENGTH]
