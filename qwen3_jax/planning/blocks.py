"""Whether a mesh leaves the blocks of a frozen matrix in 8 or 4 bits whole, whose values share a scale."""

import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh

from qwen3_jax.config import Qwen3Config
from qwen3_jax.parallel.mesh import MeshError
from qwen3_jax.parallel.rules import Rules
from qwen3_jax.planning.job import Job
from qwen3_jax.tune.quantize import BLOCK

Axis = tuple[str, int]  # a logical axis, and the values of a matrix along it


def check_blocks(job: Job, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """Refuse a mesh by which a shard of codes would hold a part of a block, or of a byte with two rows of 4 bits.

    Args:
        job: of a base in codes.
        mesh: any mesh with the five axes.
        rules: which of its axes split what, fitted to the model.

    Raises:
        MeshError: the matrix, with the arithmetic.
    """
    for name, leading, (out, rows), (inner, columns) in _matrices(job.config):
        *_, split, across = rules.spec(*leading, out, inner, mesh=mesh)
        shards = _parts(across, mesh)
        if columns // shards % BLOCK:
            raise MeshError(
                f"{name} has {columns} columns in {job.base}, in blocks of {BLOCK}, over {_said(across, mesh)}: {columns} / "
                f"{shards} leaves a part of a block to a device; accepted are shards of whole blocks"
            )
        shards = _parts(split, mesh)
        if job.base != "int8" and rows // shards % 2:
            raise MeshError(
                f"{name} has {rows} rows in {job.base}, two of which share bytes, over {_said(split, mesh)}: {rows} / {shards} "
                "is odd; accepted is an even number of rows a device"
            )


def _matrices(config: Qwen3Config) -> Iterator[tuple[str, tuple[str, ...], Axis, Axis]]:
    """Every kind of matrix that may be codes: its name, the axis that it is stacked along and split by, output and input."""
    embed = "embed", config.hidden_size
    heads = "heads", config.num_attention_heads * config.head_dim
    keys = "kv_heads", config.num_key_value_heads * config.head_dim
    yield "attention.q", (), heads, embed
    yield "attention.k", (), keys, embed
    yield "attention.o", (), embed, heads
    kinds = {kind.mlp for kind in config.block_kinds()}
    dense, expert = ("mlp", config.intermediate_size), ("mlp", config.moe_intermediate_size)
    for kind, module, leading, width in (("dense", "mlp", (), dense), ("moe", "moe", ("experts",), expert)):
        if kind in kinds:
            yield f"{module}.gate", leading, width, embed
            yield f"{module}.down", leading, embed, width


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _parts(part: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(part))


def _said(part: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in _axes(part) if mesh.shape[axis] > 1)
