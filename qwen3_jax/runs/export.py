"""The trained model as a Hugging Face folder."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qwen3_jax.checkpoint.pretrained import save_pretrained
from qwen3_jax.config import Qwen3Config
from qwen3_jax.parallel.rules import Rules
from qwen3_jax.runs.look import find_tokenizer
from qwen3_jax.runs.parts import lora_config, stage_config
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.toml import RunError
from qwen3_jax.training.state import trained_model
from qwen3_jax.tune.lora import merge


def check_export(run: Run, first: int) -> None:
    """Refuse, before the first step, a folder that holds something: nothing is written over.

    Args:
        run: the run.
        first: the step that it begins with; after the last one the folder may stand already.

    Raises:
        RunError: checkpoint.export is a file, or a folder that is not empty.
    """
    if run.checkpoint.export is not None and first < run.steps and stands(run.checkpoint.export):
        raise RunError(f"checkpoint.export {run.checkpoint.export} holds something: accepted is a path where nothing stands")


def stands(folder: str) -> bool:
    """Whether there is something at the path, be it a file or a folder that is not empty."""
    path = Path(folder)
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def export(run: Run, config: Qwen3Config, state: Any, rules: Rules, folder: str) -> None:
    """Write the model that a run has made. Every process of the mesh makes the same call.

    Args:
        run: the run; its last stage's base of positions is the model's.
        config: the model's, before any stage.
        state: the last TrainState; adapters are merged into the weights.
        rules: which mesh axes split what.
        folder: where; nothing stands there.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    last = list(run.stages.values())[-1]
    dtype, adapt = jnp.dtype(run.model.compute_dtype), lora_config(run)
    model = trained_model(stage_config(config, last), state, dtype=dtype, rules=rules, adapt=adapt)
    save_pretrained(model if adapt is None else merge(model), folder, tokenizer=find_tokenizer(run))
