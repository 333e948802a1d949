"""The model's config that a run names."""

import dataclasses
from pathlib import Path
from typing import Any

from qwen3_jax.checks import ConfigError, checked, field_types
from qwen3_jax.config import Qwen3Config
from qwen3_jax.data.prepared import read_index
from qwen3_jax.runs.schema import ModelSection
from qwen3_jax.runs.toml import RunError, unknown

# What makes weights of one model none of another's.
SHAPE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "tie_word_embeddings"),
)


def model_config(model: ModelSection) -> Qwen3Config:
    """The config of a run's model.

    Args:
        model: the section; a preset, a folder or both. A folder that is not there yet is taken to hold the preset.

    Returns:
        The folder's or preset's config, with the section's own fields in place of its.

    Raises:
        RunError: a folder of another shape than the preset's; a field that is none, or a value that the config refuses.
        ConfigError: an unknown preset, a folder without a config.
    """
    preset = None if model.preset is None else Qwen3Config.preset(model.preset)
    wanted = None if preset is None else _with_fields(preset, model)
    if model.folder is not None and (wanted is None or Path(model.folder).exists()):
        config = Qwen3Config.from_hf(model.folder)
        if preset is not None and wanted is not None:
            accepted = {name: (getattr(wanted, name), getattr(preset, name)) for name in SHAPE}
            differ = {name: values for name, values in accepted.items() if getattr(config, name) not in values}
            if differ:
                found = ", ".join(f"{name} {getattr(config, name)}, not {value}" for name, (value, _) in differ.items())
                raise RunError(f"model.folder {model.folder} is no {model.preset}: {found}")
        return _with_fields(config, model)
    if wanted is None:
        raise RunError("neither model.preset nor model.folder is given: accepted is one, or both")
    return wanted


def check_weights(model: ModelSection, config: Qwen3Config) -> None:
    """Refuse weights of another shape than the run's model, before they are read.

    Args:
        model: the section.
        config: the run's model.

    Raises:
        RunError: the folder's weights do not fit model.config.
    """
    if model.folder is None or model.weights == "random" or not Path(model.folder).exists():
        return
    there = Qwen3Config.from_hf(model.folder)
    if differ := [name for name in SHAPE if getattr(there, name) != getattr(config, name)]:
        found = ", ".join(f"{name} {getattr(there, name)}, not {getattr(config, name)}" for name in differ)
        raise RunError(
            f"model.folder {model.folder} has weights of another shape than model.config says: {found}; accepted is "
            "the folder's own shape, or model.weights = 'random'"
        )


def check_words(key: str, folder: str, config: Qwen3Config) -> None:
    """Refuse data of more words than the model has: what is beyond them would be another word to it, and nobody would notice.

    Args:
        key: of the run that names the folder, for the message.
        folder: that `data prepare` has written.
        config: the run's model, whose table may have more rows than there are words, as those of published models have.

    Raises:
        RunError: its tokenizer has more words than the model.
        DataError: a folder that is none.
    """
    words = read_index(folder)["vocab_size"]
    if words > config.vocab_size:
        raise RunError(
            f"{key} {folder} has tokens of {words:,} words, and the model's vocab_size is {config.vocab_size:,}: accepted are "
            "data of a tokenizer of at most as many words, or a model of more (model.config.vocab_size)"
        )


def check_field(name: str, value: Any) -> None:
    """Refuse what is no field of a model's config, or no value of one.

    Args:
        name: below model.config.
        value: of it.

    Raises:
        ConfigError: an unknown name, with the nearest that is known; a value of another type.
    """
    fields = field_types(Qwen3Config)
    table = name.partition(".")[0]
    if table != name and table in fields:
        raise RunError(f"model.config.{table} is a table: accepted is a value; a folder's config.json may have one there")
    if name not in fields:
        raise RunError(unknown(("model", "config"), name, list(fields)))
    checked(f"model.config.{name}", value, fields[name])


def _with_fields(config: Qwen3Config, model: ModelSection) -> Qwen3Config:
    """A config with the section's own fields in place of its."""
    for name, value in model.config.items():
        check_field(name, value)
    try:
        return dataclasses.replace(config, **model.config)
    except ConfigError as error:
        raise RunError(f"model.config: {error}") from error
