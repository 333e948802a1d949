"""The training that is held against transformers': its model, first weights, batches and settings, as plain data.

Imports numpy alone, so that tools/compare_training.py can read it in an environment with torch too.
"""

import functools
import zlib

import numpy as np

STEPS, ROWS, LENGTH, VOCABULARY = 100, 4, 64, 512
CONFIG = dict(
    model_type="qwen3_moe",
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    rope_theta=1e6,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    norm_topk_prob=True,
    router_aux_loss_coef=0.01,
)
ADAMW = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
# A token that rounding sends to another expert moves the loss by 1e-3. So the seed of the batches is one of few near choices,
# and the rate rises slowly: after a short warm-up weights 1e-7 apart do not stay near each other.
PEAK_RATE, WARMUP, END = 1.5e-3, 60, 0.1


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The first value of the tensor of that name on the hub: norms about 1, a router that uses its experts unevenly."""
    draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = draw.standard_normal(shape)
    if "norm" in name:
        return (1 + 0.1 * values).astype(np.float32)
    if name.endswith("mlp.gate.weight"):
        return (0.1 * values * np.linspace(0.6, 1.8, shape[0])[:, None]).astype(np.float32)
    return (0.05 * values).astype(np.float32)


@functools.cache
def _language() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each word begins anew, the words that may follow each, and how likely each of those is."""
    draw = np.random.Generator(np.random.PCG64(1))
    often = 1 / np.arange(1, VOCABULARY + 1)
    often = draw.permutation(often / often.sum())
    following = draw.choice(VOCABULARY, (VOCABULARY, 4), p=often)
    return often, following, np.array([0.6, 0.2, 0.15, 0.05])


def tokens(step: int) -> np.ndarray:
    """The batch of a step, [ROWS, LENGTH] int32: nine words in ten follow from the one before."""
    often, following, likely = _language()
    draw = np.random.Generator(np.random.PCG64([5, step]))
    anew = draw.choice(VOCABULARY, (ROWS, LENGTH), p=often)
    which = draw.choice(len(likely), (ROWS, LENGTH), p=likely)
    follows = draw.random((ROWS, LENGTH)) < 0.9
    rows = anew.astype(np.int32)
    for at in range(1, LENGTH):
        rows[:, at] = np.where(follows[:, at], following[rows[:, at - 1], which[:, at]], anew[:, at])
    return rows


def rate(step: int) -> float:
    """The learning rate of a step, counted from 0: up in a line, its peak at the last step of the warm-up, then a cosine."""
    done = step + 1
    if done <= WARMUP:
        return PEAK_RATE * done / WARMUP
    passed = (done - WARMUP) / (STEPS - WARMUP)
    return PEAK_RATE * (END + (1 - END) * (1 + np.cos(np.pi * passed)) / 2)
