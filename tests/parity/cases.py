"""The models that are compared with transformers: configs as data, weights by a seeded draw on both sides.

Imports numpy alone, so that the script that writes the fixtures (tools/make_parity_fixtures.py) can read it too.
"""

import zlib

import numpy as np

LENGTH, VOCABULARY = 512, 160
BASE = dict(
    model_type="qwen3",
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    rope_theta=1e6,
)
MOE = dict(
    BASE,
    model_type="qwen3_moe",
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    norm_topk_prob=True,
    router_aux_loss_coef=0.05,
)
HALF = BASE["head_dim"] // 2
LONGROPE = dict(
    rope_type="longrope",
    factor=4.0,
    short_factor=[1 + 0.05 * i for i in range(HALF)],
    long_factor=[1 + 0.5 * i for i in range(HALF)],
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)

CASES = {
    "dense": BASE,
    "tied": dict(BASE, tie_word_embeddings=True),
    "bias": dict(BASE, attention_bias=True),
    "sliding": dict(BASE, use_sliding_window=True, sliding_window=64, max_window_layers=2),
    "moe": MOE,
    "moe_raw": dict(MOE, norm_topk_prob=False),
    "moe_sliding": dict(MOE, use_sliding_window=True, sliding_window=64, max_window_layers=2),
    "moe_many": dict(MOE, num_experts=16, num_experts_per_tok=4),
    "mixed": dict(MOE, mlp_only_layers=[1]),
    "alternating": dict(MOE, decoder_sparse_step=2),
    "linear": dict(BASE, rope_scaling=dict(rope_type="linear", factor=3.0)),
    "dynamic": dict(BASE, max_position_embeddings=128, rope_scaling=dict(rope_type="dynamic", factor=2.0)),
    "yarn": dict(BASE, rope_scaling=YARN),
    "yarn_scales": dict(BASE, rope_scaling=dict(YARN, mscale=0.7, mscale_all_dim=1.2, truncate=False, beta_fast=16.0)),
    "yarn_moe": dict(MOE, rope_scaling=dict(YARN, attention_factor=0.9)),
    "llama3": dict(
        BASE,
        rope_theta=1e4,
        rope_scaling=dict(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
    "longrope_long": dict(BASE, rope_scaling=dict(LONGROPE, original_max_position_embeddings=256)),
    "longrope_short": dict(BASE, rope_scaling=dict(LONGROPE, original_max_position_embeddings=512)),
}
# Gradients of every tensor are kept for these.
GRADIENTS = ("tied", "moe", "mixed", "yarn_moe", "bias")
# Batches with padding on either side.
PADDED = ("dense", "moe")


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that name on the hub: norms about 1, the router skewed so that experts are used unevenly."""
    draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = draw.standard_normal(shape)
    if "norm" in name:
        return (1 + 0.2 * values).astype(np.float32)
    if name.endswith("mlp.gate.weight"):
        return (0.2 * values * np.linspace(0.6, 1.8, shape[0])[:, None]).astype(np.float32)
    return (0.2 * values).astype(np.float32)


def tokens(batch: int = 1, length: int = LENGTH) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(7)).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Two rows of 48, one padded on the left, one on the right; 1 where a token is real."""
    real = np.ones((2, 48), np.int32)
    real[0, :15] = 0
    real[1, 37:] = 0
    return tokens(2, 48), real


def probe(name: str, gradient: np.ndarray) -> np.ndarray:
    """A gradient told in eight numbers: its norm and seven products with seeded directions."""
    draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + 1))
    flat = np.asarray(gradient, np.float64).reshape(-1)
    directions = draw.standard_normal((7, flat.size)) / np.sqrt(flat.size)
    return np.concatenate([[np.linalg.norm(flat)], directions @ flat])
