"""The published models as data: each a difference from its parent, each saying how it is known.

A checkpoint's own config.json always goes before these.
"""

import difflib
from typing import Any, Literal, NamedTuple

from qwen3_jax.config import ConfigError, Qwen3Config


class Known(NamedTuple):
    """How a row is known. Parameter counts of all shapes were worked out and agree with the published counts.

    Attributes:
        evidence: COPY, a verbatim copy of the model's own config.json; 2ND, another project's configuration of the same
            model or its users' words on that file; MEM, recalled and not verified, so trust the checkpoint's file alone.
        source: where it was read.
    """

    evidence: Literal["COPY", "2ND", "MEM"]
    source: str


_DENSE = Known("2ND", "AI-Hypercomputer/maxtext src/maxtext/configs/models/qwen3-*.yml; counts as on the model cards")
_RECALLED = Known("MEM", "huggingface.co/Qwen, not verified; the model cards give 32,768 as the length of training")

_WORDS: dict[str, Any] = dict(bos_token_id=151643, eos_token_id=151645)
_MOE: dict[str, Any] = dict(
    _WORDS, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, hidden_size=2048, num_key_value_heads=4
)
_BASE: dict[str, Any] = dict(max_position_embeddings=32768, eos_token_id=151643)
_LONG: dict[str, Any] = dict(max_position_embeddings=262144)
_CODER: dict[str, Any] = dict(_LONG, rope_theta=1e7, router_aux_loss_coef=0.0, bos_token_id=None)

# name -> (parent or None, what differs, how it is known)
PRESETS: dict[str, tuple[str | None, dict[str, Any], Known]] = {
    "qwen3-0.6b": (
        None,
        dict(
            _WORDS,
            num_hidden_layers=28,
            hidden_size=1024,
            num_attention_heads=16,
            intermediate_size=3072,
            max_window_layers=28,
            tie_word_embeddings=True,
        ),
        _DENSE,
    ),
    "qwen3-1.7b": ("qwen3-0.6b", dict(hidden_size=2048, intermediate_size=6144), _DENSE),
    "qwen3-4b": (
        "qwen3-0.6b",
        dict(num_hidden_layers=36, max_window_layers=36, hidden_size=2560, num_attention_heads=32, intermediate_size=9728),
        _DENSE,
    ),
    "qwen3-8b": ("qwen3-4b", dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False), _DENSE),
    "qwen3-14b": (
        "qwen3-8b",
        dict(
            num_hidden_layers=40,
            max_window_layers=40,
            hidden_size=5120,
            num_attention_heads=40,
            intermediate_size=17408,
        ),
        _DENSE,
    ),
    "qwen3-32b": (
        "qwen3-14b",
        dict(num_hidden_layers=64, max_window_layers=64, num_attention_heads=64, intermediate_size=25600),
        _DENSE,
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
        Known("2ND", "huggingface/trl#5716; zyzshishui/slime scripts/models/qwen3-30B-A3B.sh; counts as on the card"),
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
        Known("2ND", "vllm-project/vllm-ascend#5201 (rope_theta); zyzshishui/slime scripts/models/qwen3-235B-A22B.sh"),
    ),
    "qwen3-coder-30b-a3b-instruct": (
        "qwen3-30b-a3b",
        dict(_CODER, intermediate_size=5472, max_window_layers=28),
        Known("COPY", "ztxz16/fastllm@f8f04c3 Qwen3-Coder-30B-A3B-Instruct/config.json"),
    ),
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
        Known("2ND", "QwenLM/Qwen3-Coder's model card for the shape; keys as in the 30B-A3B Coder's config.json"),
    ),
    **{f"qwen3-{size}-base": (f"qwen3-{size}", _BASE, _RECALLED) for size in ("0.6b", "1.7b", "4b", "8b", "14b", "30b-a3b")},
    **{
        f"qwen3-4b-{kind}-2507": (
            "qwen3-4b",
            dict(_LONG, rope_theta=5e6),
            Known("COPY", "akougkas/warpio-cli warpio-docs/ai-docs/model_cards/qwen3:4b.md, the Instruct file"),
        )
        for kind in ("instruct", "thinking")
    },
    **{
        f"qwen3-30b-a3b-{kind}-2507": (
            "qwen3-30b-a3b",
            dict(_LONG, rope_theta=1e7),
            Known("2ND", "AI-Hypercomputer/maxtext#4039, UbiquitousLearning/mllm#619, radixark/miles#742 (rope_theta)"),
        )
        for kind in ("instruct", "thinking")
    },
    **{
        f"qwen3-235b-a22b-{kind}-2507": (
            "qwen3-235b-a22b",
            dict(_LONG, rope_theta=5e6),
            Known("2ND", "radixark/miles#327 cites rope_theta of the Thinking model's config.json"),
        )
        for kind in ("instruct", "thinking")
    },
    "qwen3-embedding-0.6b": ("qwen3-0.6b", dict(_BASE, vocab_size=151669), Known("COPY", "QwenLM/Qwen3-Embedding@f4ad0c4")),
    "qwen3-embedding-4b": (
        "qwen3-4b",
        dict(vocab_size=151665, eos_token_id=151643),
        Known("2ND", "QwenLM/Qwen3-Embedding@f4ad0c4"),
    ),
    "qwen3-embedding-8b": ("qwen3-8b", dict(vocab_size=151665, eos_token_id=151643), _RECALLED),
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
