"""The one table from logical axes to mesh axes.

A parameter or activation names what its axes mean ("embed", "heads", "batch"); only this file says over which mesh axes
they are split. Outside a mesh every answer is None, so the same code runs in a notebook.
"""

import jax
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None

# Parameters first, then activations. None: never split.
RULES: tuple[tuple[str, MeshAxes], ...] = (
    ("layers", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("experts", "expert"),
    ("router", None),
    ("norm", None),
    ("batch", ("data", "fsdp", "expert")),
    ("seq", "context"),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)


def meshless() -> bool:
    """Whether no mesh is set at this point of the program."""
    return jax.sharding.get_abstract_mesh().empty


def spec(*names: str | None) -> PartitionSpec | None:
    """PartitionSpec of an array whose axes have these logical names.

    Args:
        *names: one logical axis name per array axis; None for an axis that is never split.

    Returns:
        The spec under the current mesh; mesh axes that the mesh lacks are left out. None where no mesh is set.

    Raises:
        ValueError: a name that the table lacks.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    table = dict(RULES)
    axes: list[MeshAxes] = []
    for name in names:
        if name is not None and name not in table:
            raise ValueError(f"no sharding rule for the logical axis {name!r}; known: {', '.join(table)}")
        wanted = None if name is None else table[name]
        parts = (wanted,) if isinstance(wanted, str) else wanted or ()
        present = tuple(part for part in parts if part in mesh.axis_names)
        axes.append(present[0] if len(present) == 1 else present or None)
    return PartitionSpec(*axes)
