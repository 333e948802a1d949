"""Which form a folder is in."""

from pathlib import Path

from qwen3_jax.checkpoint.hf import open_hf
from qwen3_jax.checkpoint.reading import CheckpointError, system_errors
from qwen3_jax.checkpoint.store import is_store, open_store
from qwen3_jax.checkpoint.weights import Weights


def open_weights(folder: Path) -> Weights:
    """A model's tensors from a folder of either form; all checks are made, nothing is read but headers.

    Args:
        folder: a Hugging Face folder or a native checkpoint.

    Returns:
        Its tensors.

    Raises:
        CheckpointError: it is no folder, or its content is refused.
        ConfigError: a config.json that is refused.
    """
    with system_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: accepted is one with config.json and weights")
        return open_store(folder) if is_store(folder) else open_hf(folder)
