"""config.json, read as transformers 4.x and 5.x write it, and written so that both read the same model."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
import math
import os
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from qwen3_jax.checks import ConfigError, checked, field_types, shown
from qwen3_jax.config import ROPE_KEYS, DualChunkAttention, Quantization, Qwen3Config, RopeScaling

MODEL_TYPES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

# Two spellings of one field: 5.x's and 4.x's.
SPELLINGS = {"num_local_experts": "num_experts", "torch_dtype": "dtype"}

# What transformers takes where the file is silent, when it is not what the family's files say.
ABSENT = {
    "qwen3": dict(
        intermediate_size=22016,
        num_hidden_layers=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        rope_theta=1e4,
    ),
    "qwen3_moe": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=1e4,
        num_experts=128,
        norm_topk_prob=False,
    ),
}

# Keys that change nothing that is computed here: of every transformers model, and of how a file came to be.
INERT = frozenset(
    """_name_or_path _attn_implementation _attn_implementation_autoset add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores
    prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers_version typical_p use_bfloat16 use_cache transformers.js_config pretraining_tp""".split()
)

# Keys of other members of the house: accepted with the one value that means "as Qwen3 does it".
FIXED = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}

# Keys of quantization_config that transformers 5 writes beside the format's own: each with what a hub file means by silence.
FIXED_FP8 = {"modules_to_convert": None, "dequantize": False, "scale_fmt": "float", "expert_dtype": "fp8"}

# Keys that may be null, which then means what their absence does.
NULL_IS_ABSENT = ("head_dim", "mlp_only_layers", "dtype", "num_experts")

# What a file that slides and doesn't say how far means, in either version's classes.
SILENT_WINDOW = 4096

_ORIGINAL = "original_max_position_embeddings"


def read_config(source: str | PathLike[str] | Mapping[str, Any], strict: bool) -> Qwen3Config:
    """Qwen3Config.from_hf.

    Args:
        source: a folder with a config.json, or the content of one.
        strict: refuse unknown top-level keys.

    Returns:
        The config.

    Raises:
        ConfigError: names the file and key, what was found and what is accepted.
    """
    if isinstance(source, Mapping):
        return _parse(dict(source), strict)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"config is {shown(source)}: accepted is a folder, or the object that its config.json holds")
    file = Path(source) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file} is not there: accepted is a folder that holds a config.json")
    try:
        content = json.loads(file.read_text("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of more digits than Python reads
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a JSON {type(content).__name__}: accepted is an object")
    try:
        return _parse(content, strict)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = sorted(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        raise ConfigError(f"the key {', '.join(twice)} stands twice")
    return content


def _parse(content: dict[str, Any], strict: bool) -> Qwen3Config:
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"config.json has a key {shown(key)}: accepted are strings")
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type is {shown(model_type)}: read are {' and '.join(MODEL_TYPES)}")
    for new, name in SPELLINGS.items():
        if new in content:
            given = content.pop(new)
            if name in content and content[name] is not None and given is not None and content[name] != given:
                raise ConfigError(f"{new} is {shown(given)} but {name} is {shown(content[name])}: they name one thing")
            if content.get(name) is None:
                content[name] = given
    values: dict[str, Any] = dict(ABSENT[model_type])
    values.update(_rope(content))
    layer_types = content.pop("layer_types", None)
    types = field_types(Qwen3Config)
    if model_type == "qwen3" and "num_key_value_heads" in content and content["num_key_value_heads"] is None:
        content["num_key_value_heads"] = content.get("num_attention_heads", Qwen3Config.num_attention_heads)
    for key, given in content.items():
        if key in INERT or (given is None and key in NULL_IS_ABSENT):
            continue
        if key in FIXED:
            if given is not None and given != FIXED[key]:
                raise ConfigError(f"{key} is {shown(given)}: accepted is {FIXED[key]!r}")
        elif key in types:
            values[key] = _value(key, given, types[key])
        else:
            _unknown(key, strict)
    if model_type == "qwen3":
        if values.get("num_experts"):
            raise ConfigError(f"num_experts is {values['num_experts']} but model_type is 'qwen3': accepted is 'qwen3_moe'")
        values["num_experts"] = 0
    elif not values.get("num_experts"):
        raise ConfigError("model_type 'qwen3_moe' needs num_experts above 0")
    if "head_dim" not in values:
        # Only an absent head_dim is worked out, as each class of transformers does it.
        width, heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
        values["head_dim"] = 128 if model_type == "qwen3" else max(1, width // max(1, heads))
    if not values.get("use_sliding_window"):
        values["sliding_window"] = None
    elif "sliding_window" not in values:
        values["sliding_window"] = SILENT_WINDOW
    config = Qwen3Config(**values)
    if layer_types is not None:
        _check_layer_types(config, layer_types)
    return config


def _unknown(key: str, strict: bool) -> None:
    near = difflib.get_close_matches(key, [*field_types(Qwen3Config), *SPELLINGS, "rope_parameters", "layer_types"], 1)
    message = f"config.json has an unknown key {shown(key)}" + (f"; did you mean {near[0]!r}?" if near else "")
    if strict:
        raise ConfigError(message)
    warnings.warn(f"{message}; it is ignored", UserWarning, stacklevel=5)


def _value(key: str, given: Any, kind: Any) -> Any:
    """A top-level value as its field holds it."""
    if given is None and type(None) not in get_args(kind):
        raise ConfigError(f"{key} is null: accepted is {kind.__name__}")
    if given is not None and key == "dual_chunk_attention_config":
        return _dual_chunk(key, _object(key, given))
    if given is not None and key == "quantization_config":
        return _quantization(key, _object(key, given))
    if key == "dtype" and isinstance(given, str):
        given = given.removeprefix("torch.")
    return checked(key, given, kind)


def _object(key: str, given: Any) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} is {shown(given)}: accepted is an object")
    return dict(given)


def _table[T](key: str, values: dict[Any, Any], kind: type[T]) -> T:
    """A nested object into its dataclass; every key of it must be known."""
    types = field_types(kind)
    for name in values:
        if name not in types:
            raise ConfigError(f"{key} has an unknown key {shown(name)}: accepted are {', '.join(types)}")
    try:
        return kind(**{name: checked(name, value, types[name]) for name, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _quantization(key: str, values: dict[Any, Any]) -> Quantization:
    method = values.get("quant_method")
    if method != "fp8":
        raise ConfigError(f"{key}: quant_method is {shown(method)}, a method that isn't read: accepted is 'fp8'")
    values["quant_method"] = "fp8"  # transformers' own objects have an enum here
    for name, value in FIXED_FP8.items():
        if name in values:
            given = values.pop(name)
            if type(given) is not type(value) or given != value:
                raise ConfigError(f"{key}: {name} is {shown(given)}: accepted is {'null' if value is None else repr(value)}")
    if values.get("modules_to_not_convert", ()) is None:
        values["modules_to_not_convert"] = ()
    return _table(key, values, Quantization)


def _dual_chunk(key: str, values: dict[Any, Any]) -> DualChunkAttention:
    sparse = values.get("sparse_attention_config")
    if not isinstance(sparse, Mapping | list | None):
        raise ConfigError(f"{key}: sparse_attention_config is {shown(sparse)}: accepted is an object or a list")
    if sparse is not None:
        try:
            values["sparse_attention_config"] = json.dumps(sparse, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{key}: sparse_attention_config is no JSON: {error}") from error
    return _table(key, values, DualChunkAttention)


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling out of 4.x's keys, 5.x's rope_parameters, or both where they agree."""
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        table = content.pop(key, None)
        if table is not None:
            found[key] = _rope_table(key, _object(key, table))
    if len(found) == 2:
        (scaling, old_theta), (parameters, theta) = found["rope_scaling"], found["rope_parameters"]
        if scaling != parameters or (None not in (old_theta, theta) and old_theta != theta):
            raise ConfigError("rope_scaling and rope_parameters disagree: accepted is one of them, or both saying the same")
    values: dict[str, Any] = {}
    for scaling, theta in found.values():
        values["rope_scaling"] = scaling
        if theta is not None:
            values["rope_theta"] = theta
    theta = content.pop("rope_theta", None)
    if theta is not None:
        theta = checked("rope_theta", theta, float)
        if "rope_theta" in values and values["rope_theta"] != theta:
            raise ConfigError(f"rope_theta is {theta} but rope_parameters says {values['rope_theta']}")
        values["rope_theta"] = theta
    original = content.pop(_ORIGINAL, None)
    if original is not None:
        values["rope_scaling"] = _with_original(values.get("rope_scaling"), checked(_ORIGINAL, original, int))
    return values


def _with_original(scaling: RopeScaling | None, original: int) -> RopeScaling:
    """The scaling with the original length that stands beside it, where transformers 4 looks for longrope's."""
    if scaling is None or scaling.kind != "longrope":
        raise ConfigError(f"{_ORIGINAL} is {original}: accepted is it beside rope_scaling of type longrope")
    if scaling.original_max_position_embeddings not in (None, original):
        raise ConfigError(f"{_ORIGINAL} is {original} but longrope's own is {scaling.original_max_position_embeddings}")
    return dataclasses.replace(scaling, original_max_position_embeddings=original)


def _rope_table(key: str, table: dict[Any, Any]) -> tuple[RopeScaling | None, float | None]:
    theta = table.pop("rope_theta", None)
    if theta is not None:
        theta = checked(f"{key}.rope_theta", theta, float)
    kinds = {checked(f"{key}.{name}", table.pop(name), str) for name in ("rope_type", "type") if name in table}
    if len(kinds) > 1:
        raise ConfigError(f"{key} has rope_type and type with different values: {shown(sorted(kinds))}")
    if not kinds and table:
        raise ConfigError(f"{key} has no rope_type: accepted are default, {', '.join(ROPE_KEYS)}")
    kind: Any = kinds.pop() if kinds else "default"
    if kind != "default" and kind not in ROPE_KEYS:
        raise ConfigError(f"{key}: rope_type is {shown(kind)}; accepted are default, {', '.join(ROPE_KEYS)}")
    required, optional = ROPE_KEYS.get(kind, ((), ()))
    for name in table:
        if name not in required + optional:
            accepted = ", ".join(("rope_type", "rope_theta", *required, *optional))
            raise ConfigError(f"{key} has an unknown key {shown(name)} for rope_type {kind!r}: accepted are {accepted}")
    return (None if kind == "default" else _table(key, {"kind": kind, **table}, RopeScaling)), theta


def _check_layer_types(config: Qwen3Config, layer_types: Any) -> None:
    expected = ["sliding_attention" if kind.sliding else "full_attention" for kind in config.block_kinds()]
    if layer_types not in (expected, tuple(expected)):
        raise ConfigError(
            "layer_types disagrees with use_sliding_window, sliding_window and max_window_layers: accepted is a list of "
            f"{expected.count('full_attention')} full_attention, then {expected.count('sliding_attention')} sliding_attention"
        )


def config_dict(config: Qwen3Config) -> dict[str, Any]:
    """Qwen3Config.to_hf: a config.json for transformers 4.x and 5.x alike.

    Args:
        config: the model's.

    Returns:
        JSON values. Position is written in both spellings: 4.x reads rope_theta and rope_scaling, 5.x rope_parameters.
    """
    model_type = "qwen3_moe" if config.num_experts else "qwen3"
    experts = {
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
        "router_aux_loss_coef",
        "output_router_logits",
    }
    content: dict[str, Any] = {"architectures": [MODEL_TYPES[model_type]], "model_type": model_type}
    for name in field_types(Qwen3Config):
        value = getattr(config, name)
        if name in experts and not config.num_experts:
            continue
        if name in ("quantization_config", "dual_chunk_attention_config"):
            if value is not None:
                content[name] = _written(value)
        elif name == "rope_scaling":
            content[name] = _rope_written(config)
        else:
            content["torch_dtype" if name == "dtype" else name] = list(value) if isinstance(value, tuple) else value
    content["rope_parameters"] = {
        "rope_theta": config.rope_theta,
        **(content["rope_scaling"] or {"rope_type": "default"}),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        # transformers 4 reads longrope's original length here alone, 5 in rope_parameters.
        if config.rope_scaling.original_max_position_embeddings is not None:
            content[_ORIGINAL] = config.rope_scaling.original_max_position_embeddings
    return content


def _rope_written(config: Qwen3Config) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    values = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None and name != "kind"}
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    if scaling.kind == "longrope" and original and factor and scaling.attention_factor is None:
        if factor != config.max_position_embeddings / original:
            # transformers 4 would take the ratio in spite of the factor that stands there: this is what the factor means.
            values["attention_factor"] = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "rope_type": scaling.kind,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
    }


def _written(value: Any) -> dict[str, Any]:
    content = {}
    for name, item in dataclasses.asdict(value).items():
        if item is None:
            continue
        if name == "sparse_attention_config":
            content[name] = json.loads(item)
        else:
            content[name] = list(item) if isinstance(item, tuple) else item
    return content
