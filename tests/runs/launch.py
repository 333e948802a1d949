"""A small run of training as processes of their own, for tests: its file, its starts, and what it has left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import tensorstore as ts

from qwen3_jax.training.journal import read_lines

# Compilers take most of a start's time, and these programs run for a second.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds for a start; on a machine with ten times the work of its cores one has taken more than 300
RUN = """\
name = "tiny"
output = "{place}/runs"

[model]
preset = "qwen3-30b-a3b"
compute_dtype = "float32"

[model.config]
vocab_size = 400
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
intermediate_size = 48
moe_intermediate_size = 24
num_experts = 4
num_experts_per_tok = 2
max_position_embeddings = 128
bos_token_id = 0
eos_token_id = 1

[mesh]
axes = "fsdp=2,expert=2"

[data.sources.text]
folder = "{place}/text"

[data.sources.more]
folder = "{place}/more"

[stages.first]
tokens = 3072
batch = 8
seq = 64
accumulation = 2
learning_rate = 1e-2
warmup = 1024
mixture = {{ text = 0.75, more = 0.25 }}

[stages.second]
tokens = 4096
batch = 4
seq = 128
rope_theta = 50000.0
learning_rate = 3e-3
mixture = {{ text = 0.5, more = 0.5 }}

[checkpoint]
every = 3

[watch]
every = 1
held_out = "{place}/more"
held_out_every = 7
held_out_batches = 2
"""
WATCHED = [*("--watch.tensorboard", "true", "--watch.prompts", '["def read(", "path"]'), "--checkpoint.export"]
EXPORTS = ["--checkpoint.export_every", "4", "--checkpoint.export_keep", "2"]


def environ_of(prepared):
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICK}",
        "JAX_COMPILATION_CACHE_DIR": str(prepared / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def command_of(place, *words):
    return [sys.executable, "-m", "qwen3_jax.cli.main", "train", str(place / "run.toml"), *words]


def begin(prepared, place, *words, told=None):
    """A start of the run; told, a step and a signal, it sends itself that signal just before the step."""
    command = command_of(place, *words) if told is None else signalling(*told, place / "run.toml", *words)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environ_of(prepared), **options)


def signalling(step, number, *words):
    return [sys.executable, "-m", "tests.runs.signal_program", *map(str, (step, int(number), *words))]


def finish(process):
    try:
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()  # one that hangs takes nothing from the tests after it
    return process.returncode, out


def curve(place, runs="runs"):
    """What a run's lines say of its steps, and of its held-out loss."""
    told = ("step", "stage", "loss", "grad_norm", "expert_load", "tokens_seen", "held_out_loss")
    return [{name: line[name] for name in told if name in line} for line in read_lines(place / runs / "tiny/metrics.jsonl")]


def arrays_of(place, step=14, runs="runs", name="tiny"):
    """What a checkpoint holds, by its names there."""
    folder = place / runs / f"{name}/checkpoints/{step}/state"
    names = json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()
    found = {}
    for entry in names:
        name = ".".join(key["key"] for key in entry["key_metadata"])
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}", "path": f"{name}/"}}
        found[name] = ts.open(spec, open=True).result().read().result()
    return found


def as_at_step_9(watched, place):
    """The run as it was then, with lines of steps that come again; its newest checkpoint is step 9's."""
    shutil.copytree(watched / "runs/tiny/checkpoints/9", place / "runs/tiny/checkpoints/9")
    shutil.copy(watched / "runs/tiny/metrics.jsonl", place / "runs/tiny")
    return place / "runs"
