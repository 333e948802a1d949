"""A model from a folder straight into codes: never more than one kind of matrix of all layers in floats."""

from os import PathLike

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen3_jax.checkpoint.casting import float_dtype
from qwen3_jax.checkpoint.hub import local_folder
from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.checkpoint.pretrained import filled, nested, parameters
from qwen3_jax.checkpoint.reading import system_errors
from qwen3_jax.checkpoint.sharded import load
from qwen3_jax.checkpoint.together import team_of
from qwen3_jax.model.abstract import abstract_model
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.rules import RULES, Rules
from qwen3_jax.tune.matrices import matrices_at, weight_of
from qwen3_jax.tune.quantize import BLOCK, check_codes, quantize_matrix


def from_pretrained_in_codes(
    folder: str | PathLike[str],
    kind: str,
    *,
    block: int = BLOCK,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> Qwen3:
    """`quantize(from_pretrained(folder))`, but that each kind of matrix is read, quantised and dropped before the next is read.

    Args:
        folder: as of `from_pretrained`.
        kind: "int8", "int4" or "nf4".
        block: values that share a scale.
        dtype: of computation.
        param_dtype: of what is kept in floats; matrices are read in it too.
        mesh: where the parameters shall lie; None is one device. Every process of the mesh makes the same call.
        rules: which mesh axes split what.

    Returns:
        The model.

    Raises:
        CheckpointError, ConfigError, MeshError: as of `from_pretrained`, and of `check_codes` before anything is read.
        ValueError: as of `quantize`.
    """
    compute, storage, team = float_dtype("dtype", dtype), float_dtype("param_dtype", param_dtype), team_of(mesh)
    with team.agreed():
        weights = open_weights(local_folder(folder))
        check_codes(weights.config, rules, mesh, kind, block)
        model = abstract_model(weights.config, mesh, rules=rules, dtype=compute, param_dtype=storage)
    graph, state = nnx.split(model)
    shapes = parameters(state)

    def read(paths: list[str]) -> dict[str, jax.Array]:
        wanted = {path: shapes[path] for path in paths}
        with system_errors(folder):
            if mesh is None:
                return filled(weights, dict.fromkeys(paths, storage))
            return load(weights, wanted, team)

    later = {path for path, *_ in matrices_at(model)}
    nnx.replace_by_pure_dict(state, nested(shapes | read([path for path in shapes if path not in later])))
    model = nnx.merge(graph, state)
    for path, module, where, name in list(matrices_at(model)):
        weight, _ = weight_of(module, name)
        assert isinstance(weight, nnx.Param)
        weight.set_value(read([path])[path])
        quantize_matrix(model, module, where, name, kind, block)
    return model
