"""Small jobs and compile-only meshes that the tests of planning share."""

from typing import Any

from qwen3_jax import Qwen3Config, make_mesh
from qwen3_jax.planning.job import Job, Mode
from qwen3_jax.planning.topology import devices_of, parse_topology
from tests.model.models import CONFIGS

TINY = Qwen3Config(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
)


def job(name: str = "moe", mode: Mode = "train", batch: int = 16, seq: int = 64, **options: Any) -> Job:
    return Job(CONFIGS[name], mode, batch, seq, **options)


def mesh_on(topology, wish, slices=1):
    """A mesh of a topology's devices, and the topology."""
    parsed = parse_topology(topology, slices)
    return make_mesh(wish, slices=slices, devices=devices_of(parsed)), parsed
