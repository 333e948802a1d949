"""The run that tools/kill_runs.py kills: its file, and what that names."""

import json
from pathlib import Path
from typing import Any

from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from tools.bench_data import texts
from tools.demo.corpus import train_tokenizer

NAME, EVERY = "killed", 4  # of the run; steps between saves
MODEL = """\
preset = "qwen3-30b-a3b"
compute_dtype = "float32"

[model.config]
vocab_size = 400
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
moe_intermediate_size = 24
num_experts = 4
num_experts_per_tok = 2
max_position_embeddings = 128
bos_token_id = 0
eos_token_id = 1
"""
ADAPTED = """\
folder = "{place}/base"
compute_dtype = "float32"

[lora]
rank = 4
alpha = 8.0
base_dtype = "float32"
"""
RUN = """\
name = "{name}"

[model]
{model}
[mesh]
axes = "fsdp=2,expert=2"

[data.sources.functions]
folder = "{place}/functions"

[data.sources.files]
folder = "{place}/files"

[stages.short]
tokens = {short}
batch = 8
seq = 64
learning_rate = 3e-3
warmup = 5120
mixture = {{ functions = 0.75, files = 0.25 }}

[stages.long]
tokens = {long}
batch = 4
seq = 128
{theta}learning_rate = 1e-3
mixture = {{ functions = 0.5, files = 0.5 }}

[checkpoint]
every = {every}
{exports}
[watch]
every = 1
"""


def write_run(place: Path, steps: int, *, adapters: bool = False, export_every: int | None = None) -> None:
    """Write run.toml into a folder, and beside it the data, the tokenizer and the base.

    Args:
        place: the folder.
        steps: of the run, half of them in each stage.
        adapters: train adapters on a base, whose positions have one base throughout, for PEFT has no place for another.
        export_every: steps between exports, of which two are kept; None: none.
    """
    prepare_data(place)
    half = steps // 2
    parts: dict[str, Any] = dict(name=NAME, place=place, every=EVERY, short=half * 512, long=(steps - half) * 512)
    parts["exports"] = "" if export_every is None else f"export_every = {export_every}\nexport_keep = 2\n"
    file = place / "run.toml"
    file.write_text(RUN.format(**parts, model=MODEL, theta="rope_theta = 50000.0\n"))
    if adapters:
        write_base(file, place / "base")
        file.write_text(RUN.format(**parts, model=ADAPTED.format(place=place), theta=""))


def write_base(file: Path, folder: Path) -> None:
    """The model of a run's file with random weights, as a Hugging Face folder: on one device."""
    import jax
    from flax import nnx

    from qwen3_jax import Qwen3, save_pretrained
    from qwen3_jax.runs.models import model_config
    from qwen3_jax.runs.resolve import resolve

    jax.config.update("jax_platforms", "cpu")
    config = model_config(resolve(str(file), []).run.model)
    save_pretrained(jax.jit(lambda: Qwen3(config, rngs=nnx.Rngs(params=0)))(), folder)


def prepare_data(place: Path) -> None:
    """Two sources of the standard library's text, tokenised."""
    files, functions = texts()
    train_tokenizer([[{"content": text}] for text in functions[:400]], 400, place / "tokenizer")
    for name, found in (("functions", functions[:3000]), ("files", files[:60])):
        lines = [json.dumps({"text": text}) + "\n" for text in found if text.strip()]
        (place / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        prepare([str(place / f"{name}.jsonl")], place / name, Work(str(place / "tokenizer")), workers=0)
