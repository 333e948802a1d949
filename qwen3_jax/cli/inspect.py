"""`qwen3-jax inspect SRC`: what a model's folder holds, from its headers alone."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Show a model's shape, tensors and bytes; its headers are read and checked, its weights are not."""

    src: tyro.conf.Positional[str]
    """Folder of the model, of either form; or its name on the hub."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `qwen3-jax inspect`.

    Returns:
        Exit code.
    """
    options = tyro.cli(Options, args=argv, prog="qwen3-jax inspect")

    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from qwen3_jax.checkpoint.hub import local_folder
    from qwen3_jax.checkpoint.opening import open_weights

    weights = open_weights(local_folder(options.src))
    config = weights.config
    console = Console(highlight=False, soft_wrap=True, markup=False)
    layers = "; ".join(f"{segment.repeats} x ({', '.join(kind.mlp for kind in segment.unit)})" for segment in config.segments())
    rope = config.rope_scaling.kind if config.rope_scaling else "default"
    rows = {
        "form": f"{weights.form}, {len(weights.files)} {'file' if weights.form == 'Hugging Face' else 'array'}(s)",
        "parameters": f"{config.num_params():,}, {config.num_active_params():,} active per token",
        "layers": f"{config.num_hidden_layers}: {layers}",
        "hidden size": str(config.hidden_size),
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key-value, of {config.head_dim}",
        "experts": f"{config.num_experts}, {config.num_experts_per_tok} per token" if config.num_experts else "none",
        "vocabulary": f"{config.vocab_size:,}, head {'tied to the embedding' if config.tie_word_embeddings else 'of its own'}",
        "positions": f"{config.max_position_embeddings:,}, rope {rope}",
    }
    for name, value in rows.items():
        console.print(f"{name:<12} {value}")
    for note in weights.notes:
        console.print(f"{'note':<12} {note}")
    table = Table("part", "tensors", "parameters", "dtype", "bytes")
    for column in table.columns[1:3] + table.columns[4:]:
        column.justify = "right"
    parts: dict[str, list] = {}
    for slot in weights.slots():
        parts.setdefault(_part(slot.path), []).append(slot)
    for part, slots in parts.items():
        dtypes = Counter(weights.dtypes[slot.name].name for slot in slots)
        nbytes = sum(slot.size * weights.dtypes[slot.name].itemsize for slot in slots)
        size = sum(slot.size for slot in slots)
        table.add_row(part, f"{len(slots):,}", f"{size:,}", ", ".join(sorted(dtypes)), decimal(nbytes))
    console.print(table)
    total = config.num_params()
    console.print(f"in memory: {decimal(2 * total)} as bfloat16, {decimal(4 * total)} as float32")
    return 0


def _part(path: str) -> str:
    if path.startswith(("embed.", "lm_head.")):
        return path.removesuffix(".weight")
    for part in ("attention.", "mlp.", "moe."):
        if f".{part}" in path:
            return {"attention.": "attention", "mlp.": "dense MLP", "moe.": "router" if "router" in path else "experts"}[part]
    return "norms"
