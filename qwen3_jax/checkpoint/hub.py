"""A model by its folder, or by its name on the hub through the hub's own library (the `hub` extra)."""

from os import PathLike
from pathlib import Path

from qwen3_jax.checkpoint.reading import CheckpointError, system_errors

# Weights in other formats, and training leftovers, are not fetched.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "README.md"]


def local_folder(name: str | PathLike[str]) -> Path:
    """The folder of a model.

    Args:
        name: a folder, or "owner/model" on the hub. The hub's cache (HF_HOME) and offline mode (HF_HUB_OFFLINE) are honoured.

    Returns:
        The folder that was named, or the snapshot in the hub's cache, fetched first where it is not there.

    Raises:
        CheckpointError: neither, the extra is missing, the hub refuses, or the system will not say what is there.
    """
    folder = Path(name)
    with system_errors(folder):
        if folder.exists():
            return folder
    if not isinstance(name, str) or not _is_hub_id(name):
        raise CheckpointError(f"{folder} is no folder: accepted is one with config.json and weights, or owner/model on the hub")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(f"{name} is no folder; as a name on the hub it needs `pip install qwen3-jax[hub]`") from error
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())  # the hub's library writes paragraphs
        raise CheckpointError(f"{name} is no folder, and the hub has not given it: {reason}") from error


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))
