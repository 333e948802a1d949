"""A training state as Orbax keeps it: its leaves by their paths, whatever mesh they lie on."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from qwen3_jax import TrainState


def flat(state: TrainState) -> dict[str, jax.Array]:
    """The leaves by their paths."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def loaded(folder: Path, like: TrainState) -> TrainState:
    """A state from a folder, laid out as another is; rows that pad the vocabulary come and go with the mesh."""
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for path, leaf in flat(like).items()}
    with ocp.StandardCheckpointer() as reader:
        found = reader.restore(folder, wanted, strict=False)
    return jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in wanted])


def stepped(state: TrainState) -> TrainState:
    """The state with other values in every leaf, as a step would leave it."""
    return jax.tree.map(lambda leaf: leaf + leaf.dtype.type(3), state)
