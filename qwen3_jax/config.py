"""What a Qwen3 is: its shape, and everything else that its config.json says. Frozen, hashable, checked when it is made.

Fields are named as Hugging Face names them. `Qwen3Config.from_hf` and `to_hf` (qwen3_jax.hf_config) read and write the file;
`preset` (qwen3_jax.presets) knows the published models.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from qwen3_jax.checks import ConfigError, above, at_least, check_fields, shown
from qwen3_jax.segments import BlockKind, Segment, split

RopeKind = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]

MOST_LAYERS = MOST_EXPERTS = 100_000  # a config beyond is a mistake, and would keep the machine busy before it fails


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary embedding; the formulas are in qwen3_jax.model.rope. None leaves a value to its formula's default.

    Attributes:
        kind: the file's `rope_type`.
        factor: how many times longer than original_max_position_embeddings.
        original_max_position_embeddings: tokens that the model was trained on before scaling.
        attention_factor: multiplies cosines and sines (yarn, longrope).
        beta_fast, beta_slow: turns that bound yarn's ramp; None is 32 and 1.
        mscale, mscale_all_dim: yarn's attention factor as a ratio of two.
        truncate: whether yarn's bounds are rounded outwards; None is True.
        low_freq_factor, high_freq_factor: llama3's bounds on wavelengths.
        short_factor, long_factor: longrope's factor of each rotated pair, head_dim / 2 of them.
    """

    kind: RopeKind
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in ROPE_KEYS:
            raise ConfigError(f"rope_type {self.kind!r}: accepted are default, {', '.join(ROPE_KEYS)}")
        required, optional = ROPE_KEYS[self.kind]
        for field in dataclasses.fields(self)[1:]:
            given = getattr(self, field.name)
            if field.name in required and given is None:
                raise ConfigError(f"rope_type {self.kind!r} needs {field.name}")
            if field.name not in required + optional and given is not None:
                raise ConfigError(
                    f"{field.name} has no meaning for rope_type {self.kind!r}, which reads {', '.join(required + optional)}"
                )
        at_least(self, 1, ("factor", "original_max_position_embeddings"))
        at_least(self, 0, ("mscale", "mscale_all_dim"))
        above(self, 0, ("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor"))
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not 0 < low < high:
            raise ConfigError(f"low_freq_factor {low} and high_freq_factor {high}: accepted is 0 < low < high")


# kind -> (keys it needs, keys it may have).
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}


@dataclasses.dataclass(frozen=True)
class DualChunkAttention:
    """`dual_chunk_attention_config` of the million-token files, in tokens."""

    chunk_size: int = 8192
    local_size: int = 1024
    original_max_position_embeddings: int | None = None
    sparse_attention_enabled: bool | None = None
    sparse_attention_config: str | None = None  # the per-head table, kept as JSON text
    sparse_attention_threshold: int = 32768
    sparse_attention_last_q: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.local_size < self.chunk_size:
            raise ConfigError(
                f"local_size {self.local_size} and chunk_size {self.chunk_size}: accepted is 0 < local_size < chunk_size"
            )
        at_least(self, 1, ("original_max_position_embeddings",))
        at_least(self, 0, ("sparse_attention_threshold", "sparse_attention_last_q"))


@dataclasses.dataclass(frozen=True)
class Quantization:
    """`quantization_config` of the FP8 files: blocks of float8 weights, each with one scale."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in (("quant_method", "fp8"), ("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if getattr(self, name) != value:
                raise ConfigError(f"{name} is {shown(getattr(self, name))}: accepted is {value!r}")
        if min(self.weight_block_size) < 1:
            raise ConfigError(f"weight_block_size is {shown(list(self.weight_block_size))}: accepted are two sizes above 0")


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """A Qwen3, dense (`num_experts` 0) or mixture-of-experts. Flat, for the names are Hugging Face's.

    Raises:
        ConfigError: sizes that contradict each other or have no meaning, when it is made.
    """

    # Shape
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    tie_word_embeddings: bool = False
    # Numerics
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    # Attention and position
    max_position_embeddings: int = 40960
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    dual_chunk_attention_config: DualChunkAttention | None = None
    # Experts
    num_experts: int = 0
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    # Storage and words
    quantization_config: Quantization | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings decoder_sparse_step"
        )
        if self.num_experts:
            sizes += " num_experts_per_tok moe_intermediate_size"
        at_least(self, 1, sizes.split())
        above(self, 0, ("rms_norm_eps",))
        above(self, 1, ("rope_theta",))
        at_least(
            self,
            0,
            ("initializer_range", "attention_dropout", "router_aux_loss_coef", "num_experts", "max_window_layers"),
        )
        for name, most in (("num_hidden_layers", MOST_LAYERS), ("num_experts", MOST_EXPERTS)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name} is {getattr(self, name)}: accepted is at most {most}")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act is {shown(self.hidden_act)}: accepted is 'silu'")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError(f"dtype is {shown(self.dtype)}: accepted are bfloat16, float16 and float32")
        if self.attention_dropout != 0:
            raise ConfigError(f"attention_dropout is {self.attention_dropout}: accepted is 0, the family has none")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}: accepted is an even number, pairs of it are rotated")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ConfigError(f"num_experts_per_tok {self.num_experts_per_tok} is above num_experts {self.num_experts}")
        outside = [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ConfigError(f"mlp_only_layers names layers {shown(outside)}; there are {self.num_hidden_layers}, from 0")
        if self.use_sliding_window and (self.sliding_window is None or self.sliding_window < 1):
            raise ConfigError(f"use_sliding_window needs a sliding_window above 0, found {self.sliding_window}")
        self._check_tokens()
        self._check_rope()

    def _check_tokens(self) -> None:
        if self.eos_token_id == ():
            raise ConfigError("eos_token_id is an empty list: accepted is a token id, some of them, or None")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = getattr(self, name)
            for token in given if isinstance(given, tuple) else (given,):
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ConfigError(f"{name} is {token}: accepted is None, or 0 to vocab_size - 1 = {self.vocab_size - 1}")

    def _check_rope(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        for name in ("short_factor", "long_factor"):
            factors = getattr(scaling, name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ConfigError(f"{name} has {len(factors)} numbers: accepted is head_dim / 2 = {self.head_dim // 2}")
        original = scaling.original_max_position_embeddings or self.max_position_embeddings
        if scaling.kind == "longrope" and original < 2:
            raise ConfigError(f"original_max_position_embeddings is {original}: accepted for longrope is a number above 1")
        if scaling.kind == "dynamic" and self.head_dim < 4:
            raise ConfigError(f"head_dim is {self.head_dim}: accepted with rope_type 'dynamic' is at least 4")
        if scaling.kind == "yarn" and self.dual_chunk_attention_config is not None:
            raise ConfigError(
                "dual_chunk_attention_config and rope_scaling of type 'yarn' contradict each other: accepted is one of them"
            )

    @classmethod
    def from_hf(cls, source: str | PathLike[str] | Mapping[str, Any], strict: bool = False) -> Qwen3Config:
        """Read a config.json as transformers 4.x or 5.x writes it.

        Args:
            source: the folder that holds config.json, or its content.
            strict: refuse an unknown top-level key; otherwise it is one warning.

        Returns:
            The config.

        Raises:
            ConfigError: names the file and key, what was found and what is accepted.
        """
        from qwen3_jax.hf_config import read_config

        return read_config(source, strict)

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers 4.x and 5.x both read to this model."""
        from qwen3_jax.hf_config import config_dict

        return config_dict(self)

    @classmethod
    def preset(cls, name: str) -> Qwen3Config:
        """A published model by its hub name in lower case, `qwen3-30b-a3b`.

        Raises:
            ConfigError: an unknown name; the message has the nearest ones.
        """
        from qwen3_jax.presets import preset

        return preset(name)

    def block_kinds(self) -> tuple[BlockKind, ...]:
        """What each layer is made of, in order.

        A window slides over the layers from max_window_layers on in a dense model and over every layer of a
        mixture of experts, as in transformers, whose `Qwen3MoeModel` has one mask for all.
        """
        return _block_kinds(self)

    def segments(self) -> tuple[Segment, ...]:
        """The layers in order as segments, chosen so that the scans' bodies hold as few layers as can be.

        Returns:
            Segments whose units, repeated and joined, are the layers; alternating dense and MoE is one segment of two.
        """
        return _segments(self)

    def num_params(self) -> int:
        """Parameters in all; a tied table counts once."""
        return self._count(self.num_experts)

    def num_active_params(self) -> int:
        """Parameters that one token meets, embedding and head counted, as the family's names do (A3B, A22B)."""
        return self._count(self.num_experts_per_tok)

    def _count(self, experts: int) -> int:
        d, n, k, h = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        attention = 2 * d * n * h + 2 * d * k * h + 2 * h + (n * h + 2 * k * h + d if self.attention_bias else 0)
        dense = 3 * d * self.intermediate_size
        moe = experts * 3 * d * self.moe_intermediate_size + self.num_experts * d
        layers = sum(attention + 2 * d + (moe if kind.mlp == "moe" else dense) for kind in self.block_kinds())
        return layers + d + self.vocab_size * d * (1 if self.tie_word_embeddings else 2)


@functools.lru_cache(maxsize=64)
def _block_kinds(config: Qwen3Config) -> tuple[BlockKind, ...]:
    dense = frozenset(config.mlp_only_layers) if config.num_experts else range(config.num_hidden_layers)
    slides_from = 0 if config.num_experts else config.max_window_layers
    return tuple(
        BlockKind(
            "dense" if layer in dense or (layer + 1) % config.decoder_sparse_step else "moe",
            config.use_sliding_window and layer >= slides_from,
        )
        for layer in range(config.num_hidden_layers)
    )


@functools.lru_cache(maxsize=64)
def _segments(config: Qwen3Config) -> tuple[Segment, ...]:
    return split(config.block_kinds())
