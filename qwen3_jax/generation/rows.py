"""Rows on a mesh: as many as its shards divide, the last ones padding that nobody sees.

Padding costs nothing that the mesh would not spend anyway: the shards run in step, and those of experts pass tokens on.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qwen3_jax.parallel.rules import active_rules, meshless, placed


def padded_rows(rows: int) -> int:
    """How many rows arrays for this many have, under the current mesh and rules: the next multiple of the batch's shards."""
    shards = _shards()
    return -(-rows // shards) * shards


def early_copies(rows: int, samples: int) -> int:
    """How often each prompt is a row of the prefill; the rest of its samples share one.

    Args:
        rows: prompts.
        samples: answers per prompt.

    Returns:
        1 where the shards divide the prompts. Else the least divisor of `samples` with which they do, so that no shard works on
        padding, or all of them.
    """
    shards = _shards()
    return next((n for n in range(1, samples) if samples % n == 0 and rows * n % shards == 0), samples if rows % shards else 1)


def taken(x: Array, rows: int, copies: int = 1, axis: int = 0) -> Array:
    """Each row of an array `copies` times, and the last one again up to so many rows.

    Args:
        x: an array; on a mesh whole along the axis.
        rows: of the result.
        copies: of each row.
        axis: of the rows.

    Returns:
        x itself where it has these rows.
    """
    if copies == 1 and x.shape[axis] == rows:
        return x
    index = jnp.minimum(jnp.arange(rows, dtype=jnp.int32) // copies, x.shape[axis] - 1)
    return jnp.take(x, index, axis=axis)


def whole(tree: Any) -> Any:
    """A tree of arrays, each of them whole on every device."""
    return jax.tree.map(lambda x: placed(x, *[None] * x.ndim), tree)


def _shards() -> int:
    return 1 if meshless() else active_rules().shards("batch", jax.sharding.get_abstract_mesh())
