"""What stands beside the weights of an exported model: its generation config and its card."""

from typing import Any

from qwen3_jax.config import Qwen3Config


def generation_config(config: Qwen3Config) -> dict[str, Any]:
    """A generation_config.json for a model that came without one: its token ids, and no opinion on sampling.

    Args:
        config: the model's.

    Returns:
        The file's content, as transformers derives it from a config.
    """
    eos = config.eos_token_id
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True} | {name: value for name, value in ids.items() if value is not None}


def model_card(config: Qwen3Config, dtype: str) -> str:
    """A README.md that the hub can read.

    Args:
        config: the model's.
        dtype: of the weights.

    Returns:
        Markdown behind a YAML header.
    """
    kind = "mixture of experts" if config.num_experts else "dense"
    rows = {
        "kind": kind,
        "parameters": f"{config.num_params():,}",
        "active per token": f"{config.num_active_params():,}",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "query / key-value heads": f"{config.num_attention_heads} / {config.num_key_value_heads} of {config.head_dim}",
        "experts": f"{config.num_experts}, {config.num_experts_per_tok} per token" if config.num_experts else "none",
        "positions": f"{config.max_position_embeddings:,}",
        "weights": dtype,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- qwen3\n- jax\n---\n\n"
        f"# Qwen3, {kind}\n\nWritten by qwen3-jax; transformers reads it as well.\n\n| | |\n|---|---|\n{table}\n"
    )
