"""A batch; and batches over many processes: which rows each one reads, and how they become arrays of the mesh."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen3_jax.parallel.fit import check_batch
from qwen3_jax.parallel.rules import RULES, Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of rows, each a document or several packed ones.

    Attributes:
        tokens: [B, T] int32.
        labels: [B, T] int32, the word that follows each token.
        mask: [B, T], weight of each label in the loss; 0 leaves it out.
        segment_ids: [B, T] int32, the document of each token, 0 padding; None: each row is one document.
    """

    tokens: Any
    labels: Any
    mask: Any
    segment_ids: Any = None


def process_rows(mesh: Mesh, rows: int, rules: Rules = RULES) -> np.ndarray:
    """The rows of a batch that lie on this process's devices, and that it therefore reads.

    Two processes have the same rows where their devices differ along `context` or `tensor` alone.

    Args:
        mesh: the mesh.
        rows: rows of the whole batch.
        rules: which mesh axes split what.

    Returns:
        [rows of this process] int, ascending.

    Raises:
        MeshError: the mesh does not share out that many rows.
    """
    check_batch(rules, mesh, rows)
    held = NamedSharding(mesh, rules.spec("batch", mesh=mesh)).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held]))


def global_batch[Tree](batch: Tree, mesh: Mesh, rows: int, rules: Rules = RULES) -> Tree:
    """A batch on the mesh, of the rows that each process has read.

    Args:
        batch: any pytree of arrays [rows of this process, ...], those of `process_rows` in order.
        mesh: the mesh.
        rows: rows of the whole batch.
        rules: which mesh axes split what.

    Returns:
        The tree with arrays [rows, ...], split over rows.

    Raises:
        MeshError: the mesh does not share out that many rows.
        ValueError: an array of another number of rows.
    """
    expected = len(process_rows(mesh, rows, rules))
    sharding = NamedSharding(mesh, rules.spec("batch", mesh=mesh))

    def placed(leaf: np.ndarray) -> jax.Array:
        if leaf.shape[0] != expected:
            raise ValueError(f"{leaf.shape[0]} rows from this process: accepted are its {expected} of {rows}")
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), (rows, *leaf.shape[1:]))

    return jax.tree.map(placed, batch)
