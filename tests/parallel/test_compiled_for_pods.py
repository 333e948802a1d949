"""Training and decode compiled for real pods, which are not here: what a chip would hold and send, read from the program."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from qwen3_jax import Qwen3Config, make_mesh
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.programs import lowered
from qwen3_jax.planning.topology import devices_of, parse_topology

# Four layers, dense and MoE by turns: one scan of two. Widths are whole tiles, and tell the arrays of a program apart.
CONFIG = Qwen3Config(
    vocab_size=4000,
    hidden_size=512,
    intermediate_size=1024,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=16,
    num_experts_per_tok=4,
    decoder_sparse_step=2,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
SPREAD = RULES.replace(embed=("fsdp", "expert"), vocab=("fsdp", "expert", "tensor"))
# chip, shape, mesh, rules, and the collectives that it must have.
PODS = {
    "v5e": ("v5e:2x4", "fsdp=2,context=2,tensor=2", RULES, ("all-gather", "all-reduce", "reduce-scatter")),
    "v5p": ("v5p:2x2x2", "fsdp=2,expert=4", SPREAD, ("all-gather", "collective-permute", "reduce-scatter")),
    "v6e": ("v6e:2x2", "data=2,tensor=2", RULES, ("all-reduce",)),
    "tpu7x": ("tpu7x:2x2x1", "fsdp=4,expert=2", RULES, ("all-gather", "reduce-scatter")),
}


@functools.cache
def compiled(chip: str, mode: str) -> jax.stages.Compiled:
    shape, wish, rules, _ = PODS[chip]
    mesh = make_mesh(wish, devices=devices_of(parse_topology(shape)))
    job = Job(CONFIG, mode, batch=16, seq=1024 if mode == "train" else 8192)
    with jax.default_matmul_precision("default"):
        return lowered(job, mesh, rules).program.compile()


def text_of(program: jax.stages.Compiled) -> str:
    text = program.as_text()
    assert text is not None
    return text


@pytest.mark.parametrize("chip", PODS)
def test_training(chip):
    program = compiled(chip, "train")
    text, memory = text_of(program), program.memory_analysis()
    # The state is given away and written in place: only metrics are new.
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
    assert memory.alias_size_in_bytes > 0.99 * (memory.argument_size_in_bytes - 4 * 16 * 1024 * 4)
    # Beside float32 gradients, a third of the state, activations of one layer, which the bound is for.
    gradients = memory.alias_size_in_bytes // 3
    rows = 16 * 1024 * CONFIG.num_experts_per_tok * CONFIG.hidden_size * 2 // len(devices_of(parse_topology(PODS[chip][0])))
    assert memory.temp_size_in_bytes < gradients + 12 * rows
    for kind in PODS[chip][3]:
        assert re.search(rf" {kind}(-start)?\(", text), kind
    # Attention forward and backward, and the experts' products and their gradients, are kernels.
    assert all(f"/{kernel}" in text for kernel in ("splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq", "gmm", "tgmm", "cast"))


@pytest.mark.parametrize("chip", PODS)
def test_no_weight_of_all_layers_is_gathered_or_kept_in_another_dtype(chip):
    """Each scanned stack has two repeats: arrays [2, ...] of a weight are parameters, moments and gradients, in float32."""
    text = text_of(compiled(chip, "train"))
    for line in text.splitlines():
        if re.search(r" all-gather(-start)?\(", line):
            assert not re.search(r"= \(?(f32|bf16)\[2,(\d+,){2}", line), line
    experts = [shape for shape in re.findall(r"bf16\[2,([\d,]+)\]", text) if shape.count(",") == 2]
    activations = "1024"  # what is kept of each layer's input is the only stack in bfloat16
    assert all(activations in shape.split(",") or "512" in shape.split(",") for shape in experts)


@pytest.mark.parametrize("chip", PODS)
def test_decode_writes_its_cache_in_place(chip):
    program = compiled(chip, "decode")
    memory, text = program.memory_analysis(), text_of(program)
    devices = 8 if chip != "v6e" else 4
    cache = 2 * 4 * 16 * 4 * 8192 * 128 * 2
    assert memory.alias_size_in_bytes >= cache / devices
    assert memory.temp_size_in_bytes < 0.15 * memory.alias_size_in_bytes
    assert "tpu_custom_call" in text
