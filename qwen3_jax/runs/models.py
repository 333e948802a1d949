"""The model's config that a run names."""

import dataclasses
import difflib
from pathlib import Path

from qwen3_jax.checks import ConfigError
from qwen3_jax.config import Qwen3Config
from qwen3_jax.runs.schema import ModelSection
from qwen3_jax.runs.toml import RunError

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


def _with_fields(config: Qwen3Config, model: ModelSection) -> Qwen3Config:
    """A config with the section's own fields in place of its."""
    fields = [field.name for field in dataclasses.fields(Qwen3Config)]
    for name in model.config:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            meant = f"did you mean {nearest[0]}?" if nearest else f"accepted are {', '.join(fields)}"
            raise RunError(f"unknown key model.config.{name}: {meant}")
    try:
        return dataclasses.replace(config, **model.config)
    except ConfigError as error:
        raise RunError(f"model.config: {error}") from error
