"""`qwen3-jax generate MODEL PROMPT...`: plain continuations, all prompts in one batch."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Continue prompts; the chat template is not used."""

    model: tyro.conf.Positional[str]
    """Folder of the model."""
    prompts: tyro.conf.Positional[tuple[str, ...]]
    """Texts to continue."""
    adapter: str | None = None
    """Folder of LoRA adapters for it, as PEFT or `qwen3-jax train` writes them."""
    max_new_tokens: int = 128
    """Tokens written at most, per prompt."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Only the k most probable tokens; 0 is all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach p."""
    min_p: float = 0.0
    """Only tokens at least this times as probable as the first."""
    seed: int = 0
    """Of the draw."""
    samples: int = 1
    """Continuations per prompt."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of computation; float32 on CPU, else bfloat16."""
    compilation_cache: bool = True
    """Keep compiled programs for the next start, in $XDG_CACHE_HOME or ~/.cache."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `qwen3-jax generate`.

    Returns:
        Exit code.
    """
    options = tyro.cli(Options, args=argv, prog="qwen3-jax generate")
    if not options.prompts or not all(options.prompts):
        raise ValueError("prompts: accepted is at least one, none of them empty")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}: accepted is an integer >= 1")

    import jax
    import numpy as np

    from qwen3_jax import Sampling, from_pretrained, generate, load_tokenizer
    from qwen3_jax.cli.adapter import with_adapter
    from qwen3_jax.cli.programs import keep_programs
    from qwen3_jax.cli.text import is_text, make_console, write

    if wrong := next((prompt for prompt in options.prompts if not is_text(prompt)), None):
        raise ValueError(f"prompts: {wrong!r} holds bytes that are no UTF-8: accepted is text")

    keep_programs(options.compilation_cache)
    tok = load_tokenizer(options.model)
    model = with_adapter(from_pretrained(options.model, dtype=options.dtype), options.adapter)
    rows = [tok.encode(prompt) for prompt in options.prompts]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    out = generate(
        model,
        jax.numpy.asarray(tokens),
        lengths=[len(ids) for ids in rows],
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.min_p),
        key=jax.random.key(options.seed),
        stop_tokens=tok.stop_token_ids,
        samples=options.samples,
    )
    console = make_console()
    for number, (ids, length) in enumerate(zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)):
        text = tok.decode(ids[:length], skip_special_tokens=True)
        write(console, options.prompts[number // options.samples], dim=True)
        write(console, f"{text}\n")
    return 0
