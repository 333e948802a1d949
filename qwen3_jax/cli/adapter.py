"""A model for the commands that run one, with the adapters that the user names."""

from qwen3_jax.model.transformer import Qwen3


def with_adapter(model: Qwen3, folder: str | None) -> Qwen3:
    """A model with a folder's adapters beside its weights.

    Args:
        model: without adapters.
        folder: as PEFT lays it out; None: no adapters.

    Returns:
        The model itself, or a new one that shares its arrays.

    Raises:
        CheckpointError: adapters that are not this model's, or a folder that holds none.
    """
    if folder is None:
        return model
    from qwen3_jax.tune.peft import load_adapter

    return load_adapter(model, folder)
