"""Training and decode compiled for real pods, which are not here: what a chip would hold and send, read from the program.

The compiler's own process is ended once the program is optimised, scheduled, and its buffers placed; the rest, nine tenths of
the time, is machine code, which tests/kernels makes of the kernels for every chip.
"""

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from qwen3_jax import Qwen3Config
from qwen3_jax.parallel.mesh import AXES
from qwen3_jax.parallel.rules import TRAIN_RULES
from qwen3_jax.planning.buffers import Memory, dumped, program_text, read_memory
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import adapters, parameters, shares

# Four layers, dense and MoE by turns: one scan of two. Widths are whole tiles, and tell the arrays of a program apart.
CONFIG = Qwen3Config(
    vocab_size=4000,
    hidden_size=512,
    intermediate_size=1280,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    num_experts=16,
    num_experts_per_tok=4,
    decoder_sparse_step=2,
    norm_topk_prob=True,
)
LENGTH, SLOTS = 1024, 4096
SCALARS = 3 + 4  # counts of the state, of Adam and of the rate; of the guard two counts of bad steps, one of good ones, a scale
STATE = 3 * 26 + SCALARS  # parameters and two moments of each
# topology, mesh, further options, the collectives that training must have, and MB that its temporaries stay under: 10 % more
# than they were.
EMBED = ("--rule=embed=fsdp+expert", "--rule=vocab=fsdp+expert+tensor")
WHOLE = ("--rule=embed=fsdp", "--rule=vocab=fsdp+tensor")  # dense weights along expert, as RULES have them
PODS = {
    "v5e": ("v5e:2x4", "fsdp=2,context=2,tensor=2", (), ("all-gather", "all-reduce"), 400),
    "v5p": ("v5p:2x2x1", "fsdp=2,expert=2", (*EMBED, "--transport=ring"), ("all-gather", "collective-permute"), 590),
    "v6e": ("v6e:2x2", "data=2,tensor=2", (), ("all-reduce",), 480),
    "tpu7x": ("tpu7x:2x2x1", "fsdp=4,expert=2", WHOLE, ("all-gather", "reduce-scatter"), 435),
}


ROWS = {"v5e": 8, "v5p": 5, "v6e": 8, "tpu7x": 8}  # of decode, on each shard of the batch


def shards(pod: str, *axes: str) -> int:
    """Into how many parts these axes of its mesh split an array."""
    sizes = dict(part.split("=") for part in PODS[pod][1].split(","))
    return math.prod(int(sizes.get(axis, 1)) for axis in axes)


@functools.cache
def placed(pod: str, mode: str) -> tuple[str, Memory]:
    """The optimised program of one device, and its memory."""
    topology, mesh, more, *_ = PODS[pod]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
        wish = ["--topology", topology, "--mesh", mesh, "--mode", mode, *more]
        rows, length = (16, LENGTH) if mode != "decode" else (ROWS[pod] * shards(pod, "data", "fsdp", "expert"), SLOTS)
        size = ["--batch", str(rows), "--seq", str(length)]
        with (folder / "log").open("wb") as log:
            command = [sys.executable, "tools/compile_for_pod.py", name, *wish, *size, "--dump", name]
            child = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while (path := dumped(folder)) is None and child.poll() is None:
                    time.sleep(0.2)
            finally:
                child.kill()
                child.wait()
        assert path is not None, (folder / "log").read_text()[-2000:]
        return program_text(path), read_memory(path)


@pytest.mark.parametrize("pod", PODS)
def test_training(pod):
    text, memory = placed(pod, "train")
    # The state is given away and written in place.
    assert text.split("\n", 1)[0].count("may-alias") == STATE
    *_, collectives, megabytes = PODS[pod]
    assert memory.temporaries < megabytes * 1e6
    for kind in collectives:
        assert re.search(rf" {kind}(-start)?\(", text), kind
    # Attention forward and backward, the experts' products and their gradients, and the cast of weights are kernels.
    for kernel in ("splash", "jit\\(gmm\\)/pallas_call", "jit\\(tgmm\\)/pallas_call", "/cast/pallas_call"):
        assert re.search(kernel, text), kernel


@pytest.mark.parametrize("pod", PODS)
def test_no_weight_of_all_layers_is_gathered_or_kept_in_another_dtype(pod):
    """Each scanned stack has two repeats: of weights there are float32 arrays [2, ...], parameters, moments and gradients."""
    text, _ = placed(pod, "train")
    stacks = [line for line in text.splitlines() if re.search(r"= \(?\w+\[2,[\d,]+\].* all-gather(-start)?\(", line)]
    assert not stacks
    fsdp, expert, tensor = (shards(pod, axis) for axis in ("fsdp", "expert", "tensor"))
    embed = 512 // (fsdp * expert if EMBED[0] in PODS[pod][2] else fsdp)
    for shape in (
        f"{16 // expert},{256 // tensor},{512 // fsdp}",  # experts' gate and up
        f"{16 // expert},{512 // fsdp},{256 // tensor}",  # their down
        f"{1280 // tensor},{embed}",  # and those of the dense layers
        f"{embed},{1280 // tensor}",
    ):
        assert f"f32[2,{shape}]" in text
        assert f"bf16[2,{shape}]" not in text


def test_adapters_alone_have_gradients():
    """Of the frozen model there are bfloat16 stacks, and nothing in float32: no gradient, no moment, no sum of either."""
    text, memory = placed("v5p", "lora")
    # Given away are the two factors beside each of 14 matrices and two moments of each.
    assert text.split("\n", 1)[0].count("may-alias") == 3 * 2 * 14 + SCALARS
    _, full = placed("v5p", "train")
    for experts in ("8,256,256", "8,256,512", "8,512,256"):  # a shard's, and whole along embed
        assert f"f32[{experts}]" not in text and f"f32[2,{experts}]" not in text
    for dense in ("1280,128", "128,1280", "1280,512", "512,1280", "1000,512"):  # and the words
        assert f"f32[{dense}]" not in text and f"f32[2,{dense}]" not in text
    assert "bf16[2,8,256,256]" in text and "bf16[2,1280,128]" in text
    given = Job(CONFIG, "lora", 16, LENGTH)
    cut = shares(given, AbstractMesh((1, 2, 2, 1, 1), AXES), TRAIN_RULES)
    factors = sum(each.total for each in adapters(given, cut).values())
    assert memory.arguments == pytest.approx(2 * parameters(given, cut).total + 12 * factors, rel=0.02)
    assert memory.temporaries < full.temporaries


@pytest.mark.parametrize("pod", PODS)
def test_decode_writes_its_cache_in_place(pod):
    text, memory = placed(pod, "decode")
    assert text.split("\n", 1)[0].count("may-alias") >= 5
    cache = 2 * 4 * ROWS[pod] * (16 // shards(pod, "tensor")) * SLOTS * 128 * 2
    assert memory.arguments > cache
    assert memory.temporaries < 0.15 * cache
    assert re.search("jit\\(gmm\\)/pallas_call", text)
