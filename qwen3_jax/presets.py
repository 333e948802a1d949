"""The published models as data: each a difference from its parent, each saying how it is known.

A checkpoint's own config.json always goes before these.
"""

import difflib
from typing import Any

from qwen3_jax.config import ConfigError, Qwen3Config

# How a row is known. Parameter counts of all shapes were worked out and agree with the published counts.
FILE = "the model's own config.json, or a verbatim copy of it"
SECOND = "another project's configuration of the same model"
RECALLED = "recalled from the hub, not verified: trust the checkpoint's file"

_MOE: dict[str, Any] = dict(
    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, hidden_size=2048, num_key_value_heads=4
)
_BASE: dict[str, Any] = dict(max_position_embeddings=32768, eos_token_id=151643)
_LONG: dict[str, Any] = dict(max_position_embeddings=262144)
_CODER: dict[str, Any] = dict(_LONG, rope_theta=1e7, router_aux_loss_coef=0.0, bos_token_id=None)

# name -> (parent or None, what differs, how it is known)
PRESETS: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "qwen3-0.6b": (
        None,
        dict(
            num_hidden_layers=28,
            hidden_size=1024,
            num_attention_heads=16,
            intermediate_size=3072,
            max_window_layers=28,
            tie_word_embeddings=True,
        ),
        FILE,
    ),
    "qwen3-1.7b": ("qwen3-0.6b", dict(hidden_size=2048, intermediate_size=6144), FILE),
    "qwen3-4b": (
        "qwen3-0.6b",
        dict(num_hidden_layers=36, max_window_layers=36, hidden_size=2560, num_attention_heads=32, intermediate_size=9728),
        FILE,
    ),
    "qwen3-8b": ("qwen3-4b", dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False), FILE),
    "qwen3-14b": (
        "qwen3-8b",
        dict(
            num_hidden_layers=40,
            max_window_layers=40,
            hidden_size=5120,
            num_attention_heads=40,
            intermediate_size=17408,
        ),
        FILE,
    ),
    "qwen3-32b": (
        "qwen3-14b",
        dict(num_hidden_layers=64, max_window_layers=64, num_attention_heads=64, intermediate_size=25600),
        FILE,
    ),
    "qwen3-30b-a3b": (
        None,
        dict(
            _MOE,
            num_hidden_layers=48,
            max_window_layers=48,
            num_attention_heads=32,
            intermediate_size=6144,
            moe_intermediate_size=768,
        ),
        FILE,
    ),
    "qwen3-235b-a22b": (
        "qwen3-30b-a3b",
        dict(
            num_hidden_layers=94,
            max_window_layers=94,
            hidden_size=4096,
            num_attention_heads=64,
            intermediate_size=12288,
            moe_intermediate_size=1536,
        ),
        FILE,
    ),
    "qwen3-coder-30b-a3b-instruct": ("qwen3-30b-a3b", dict(_CODER, intermediate_size=5472, max_window_layers=28), FILE),
    "qwen3-coder-480b-a35b-instruct": (
        "qwen3-30b-a3b",
        dict(
            _CODER,
            num_hidden_layers=62,
            max_window_layers=62,
            hidden_size=6144,
            num_attention_heads=96,
            num_key_value_heads=8,
            intermediate_size=8192,
            num_experts=160,
            moe_intermediate_size=2560,
        ),
        FILE,
    ),
    **{f"qwen3-{size}-base": (f"qwen3-{size}", _BASE, RECALLED) for size in ("0.6b", "1.7b", "4b", "8b", "14b", "30b-a3b")},
    **{f"qwen3-4b-{kind}-2507": ("qwen3-4b", dict(_LONG, rope_theta=5e6), FILE) for kind in ("instruct", "thinking")},
    **{
        f"qwen3-30b-a3b-{kind}-2507": ("qwen3-30b-a3b", dict(_LONG, rope_theta=1e7), SECOND)
        for kind in ("instruct", "thinking")
    },
    **{
        f"qwen3-235b-a22b-{kind}-2507": ("qwen3-235b-a22b", dict(_LONG, rope_theta=5e6), FILE)
        for kind in ("instruct", "thinking")
    },
    "qwen3-embedding-0.6b": ("qwen3-0.6b", dict(_BASE, vocab_size=151669), FILE),
    "qwen3-embedding-4b": ("qwen3-4b", dict(vocab_size=151665, eos_token_id=151643), SECOND),
    "qwen3-embedding-8b": ("qwen3-8b", dict(vocab_size=151665, eos_token_id=151643), RECALLED),
}


def preset(name: str) -> Qwen3Config:
    """A published model's config.

    Args:
        name: as on the hub, lower case, without the owner.

    Returns:
        The config.

    Raises:
        ConfigError: an unknown name; the message has the nearest ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower().removeprefix("qwen/"), PRESETS, 3, 0.4)
        raise ConfigError(
            f"no preset {name!r}" + (f"; did you mean {', '.join(near)}?" if near else f": there are {', '.join(PRESETS)}")
        )
    return Qwen3Config(**_values(name))


def _values(name: str) -> dict[str, Any]:
    parent, difference, _ = PRESETS[name]
    return {**(_values(parent) if parent else {}), **difference}
