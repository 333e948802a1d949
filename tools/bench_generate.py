"""Prefill and decode on this machine's CPU beside transformers on torch: same shapes, same cores, one run.

    python -m tools.bench_generate --peer-python PATH [--models qwen3-0.6b moe] [--dtypes float32 bfloat16]

PATH is the python of an environment with torch and transformers. Weights are random. Each program runs in a process of its own;
the two take turns (`--rounds`), and the table gives medians and the ratio (above 1: this package is faster).
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROMPT, NEW = 128, 32


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    peer_python: Path
    """Python of an environment with torch and transformers."""
    models: tuple[str, ...] = ("qwen3-0.6b", "moe")
    """Presets; `moe` is four layers of qwen3-30b-a3b."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Compute and storage."""
    rounds: int = 2
    """Turns of each program."""
    repeats: int = 3
    """Measurements per turn."""


def config_of(name: str):
    """The shape of that name."""
    from qwen3_jax import Qwen3Config

    if name == "moe":
        return dataclasses.replace(Qwen3Config.preset("qwen3-30b-a3b"), num_hidden_layers=4)
    return Qwen3Config.preset(name)


def measure_ours(name: str, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of prefill, and per token of decode."""
    import jax
    import jax.numpy as jnp

    from qwen3_jax import generate, init_cache
    from qwen3_jax.generation.unstack import views
    from qwen3_jax.model.abstract import abstract_model

    shapes, kind = abstract_model(config_of(name), dtype=jnp.dtype(dtype)), jnp.dtype(dtype)
    # One small random block repeated: drawing ten gigabytes would take longer than the measurement.
    block = 0.02 * jax.random.normal(jax.random.key(0), (1 << 20,), kind)
    model = jax.tree.map(lambda leaf: jnp.resize(block, leaf.shape), shapes)
    tokens = jax.random.randint(jax.random.key(1), (1, PROMPT), 0, 1000)

    @jax.jit
    def forward(model, layers):
        seen = model(tokens, cache=init_cache(model, 1, 256), output="hidden", fresh=True, layers=layers)
        return model.logits(seen.hidden[:, -1])

    return timed(
        lambda: jax.block_until_ready(forward(model, views(model))),  # layers one by one, as generate runs them here
        lambda count: jax.block_until_ready(generate(model, tokens, max_new_tokens=count)),
        repeats,
    )


def measure_torch(config: dict, dtype: str, repeats: int) -> dict[str, list[float]]:
    """The same of transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(**config)
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=kind)
    model = model.to_empty(device="cpu").eval()
    block = 0.02 * torch.randn(1 << 20).to(kind)
    with torch.no_grad():
        for weight in model.parameters():
            flat = weight.view(-1)
            for at in range(0, flat.numel(), block.numel()):
                flat[at : at + block.numel()] = block[: flat[at : at + block.numel()].numel()]
        model.model.rotary_emb.inv_freq = 1.0 / (1e6 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim))
        tokens = torch.randint(0, 1000, (1, PROMPT))

        def run(count: int) -> None:
            options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

        return timed(lambda: model(tokens, use_cache=True, logits_to_keep=1), run, repeats)


def timed(forward, run, repeats: int) -> dict[str, list[float]]:
    """Seconds of one forward pass over the prompt, of a whole generation, and per token of decode."""
    found: dict[str, list[float]] = {"prefill": [], "decode": [], "whole": []}
    for count in (1, 1 + NEW):
        run(count)
    forward()
    for _ in range(repeats):
        begin = time.perf_counter()
        forward()
        found["prefill"].append(time.perf_counter() - begin)
        seconds = []
        for count in (1, 1 + NEW):
            begin = time.perf_counter()
            run(count)
            seconds.append(time.perf_counter() - begin)
        found["whole"].append(seconds[1])
        found["decode"].append((seconds[1] - seconds[0]) / NEW)
    return found


def main(options: Options) -> None:
    """Compare and print the table."""
    from rich.live import Live
    from rich.table import Table

    table = Table("model", "dtype", "phase", "qwen3_jax", "transformers", "ratio", title="seconds, median")
    with Live(table, auto_refresh=False) as live:
        for name, dtype, phase, a, b in compare(options):
            table.add_row(name, dtype, phase, f"{a:.4f}", f"{b:.4f}", f"{b / a:.2f}")
            live.refresh()


def compare(options: Options) -> Iterator[tuple[str, str, str, float, float]]:
    """The table's rows, each when it is measured: model, dtype, phase, our seconds, transformers'."""
    from statistics import median

    for name in options.models:
        config = config_of(name).to_hf()
        for dtype in options.dtypes:
            ours: dict[str, list[float]] = {"prefill": [], "decode": [], "whole": []}
            theirs: dict[str, list[float]] = {"prefill": [], "decode": [], "whole": []}
            for _ in range(options.rounds):
                for python, kept, words in (
                    (sys.executable, ours, ["ours", name]),
                    (str(options.peer_python), theirs, ["torch", json.dumps(config)]),
                ):
                    with tempfile.NamedTemporaryFile("r") as file:
                        command = [python, __file__, *words, dtype, str(options.repeats), file.name]
                        # An installed libtpu would look for its host's metadata for half a minute.
                        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
                        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment)
                        for phase, seconds in json.load(file).items():
                            kept[phase] += seconds
            for phase in ours:
                yield name, dtype, phase, median(ours[phase]), median(theirs[phase])


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["torch"]):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        which, what, dtype, repeats, file = sys.argv[1:]
        got = (
            measure_ours(what, dtype, int(repeats)) if which == "ours" else measure_torch(json.loads(what), dtype, int(repeats))
        )
        Path(file).write_text(json.dumps(got))
    else:
        import tyro  # not in the peer's environment

        main(tyro.cli(Options))
