"""The one table from logical axes to mesh axes.

A parameter or activation names what its axes mean ("embed", "heads", "batch"); only this file says over which mesh axes
they are split. Outside a mesh every answer is None, so the same code runs in a notebook. A model carries its table, so that a
run may override rows and two models may differ.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

import pallas_kernels
from qwen3_jax.parallel.dispatch import Dispatch
from qwen3_jax.parallel.mesh import AXES, MeshError

WHOLE = ("layers", "head_dim", "router", "norm", "rank")  # logical axes that are never split
MeshAxes = str | tuple[str, ...] | list[str] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes, hashable: a static part of a model.

    Attributes:
        rows: pairs of a logical axis and the mesh axes that it is split over, in the mesh's order.
        dispatch: how tokens travel to experts.
    """

    rows: tuple[tuple[str, tuple[str, ...]], ...]
    dispatch: Dispatch = Dispatch()

    @functools.cached_property
    def table(self) -> dict[str, tuple[str, ...]]:
        """The rows as a dictionary."""
        return dict(self.rows)

    def replace(self, **rows: MeshAxes) -> Rules:
        """These rules with other mesh axes for some logical axes.

        Args:
            **rows: logical axis -> a mesh axis, several, or None.

        Returns:
            The new table.

        Raises:
            MeshError: a logical axis that the table lacks or that is never split, a mesh axis that does not exist.
        """
        table = dict(self.table)
        for name, axes in rows.items():
            if name not in table or name in WHOLE:
                accepted = ", ".join(other for other in table if other not in WHOLE)
                why = "is never split" if name in WHOLE else "no such logical axis"
                raise MeshError(f"rule for {name!r}: {why}; accepted are {accepted}")
            parts = (axes,) if isinstance(axes, str) else tuple(axes or ())
            for part in parts:
                if part not in AXES:
                    raise MeshError(f"rule {name} -> {part!r}: no such mesh axis; accepted are {', '.join(AXES)}")
            table[name] = parts
        return dataclasses.replace(self, rows=tuple(table.items()))

    def replace_rows(self, rows: Iterable[str]) -> Rules:
        """These rules with rows as a command line gives them.

        Args:
            rows: each "LOGICAL=AXIS+AXIS"; nothing behind the sign is an axis that is never split.

        Returns:
            The new table.

        Raises:
            MeshError: a row that is none, and as `replace`.
        """
        table: dict[str, MeshAxes] = {}
        for row in rows:
            name, sign, axes = row.partition("=")
            if not sign:
                raise MeshError(f"rule {row!r}: accepted is LOGICAL=AXIS+AXIS, as embed=fsdp+expert")
            table[name] = tuple(axes.split("+")) if axes else None
        return self.replace(**table)

    def axes(self, name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over; those that the mesh lacks are left out.

        Args:
            name: a logical axis, or None for an axis that is never split.
            mesh: the mesh.

        Returns:
            Mesh axes in the mesh's order, those of size 1 included.

        Raises:
            MeshError: a name that the table lacks.
        """
        if name is None:
            return ()
        if name not in self.table:
            raise MeshError(f"no sharding rule for the logical axis {name!r}; known: {', '.join(self.table)}")
        return tuple(axis for axis in mesh.axis_names if axis in self.table[name])

    def shards(self, name: str, mesh: Mesh | AbstractMesh) -> int:
        """Into how many parts the mesh splits a logical axis."""
        return math.prod(mesh.shape[axis] for axis in self.axes(name, mesh))

    def spec(self, *names: str | None, mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """PartitionSpec of an array whose axes have these logical names.

        A mesh axis splits one axis of an array: the first that asks for it.

        Args:
            *names: one logical axis per array axis; None for an axis that is never split.
            mesh: the mesh.

        Returns:
            The spec.
        """
        used: set[str] = set()
        parts = []
        for name in names:
            part = tuple(axis for axis in self.axes(name, mesh) if axis not in used)
            used.update(part)
            parts.append(part[0] if len(part) == 1 else part or None)
        return PartitionSpec(*parts)


# Parameters first. The last two are of activations alone; along heads and width they are split as parameters are, and along
# embed they are whole.
RULES = Rules(
    (
        ("layers", ()),
        ("vocab", ("fsdp", "tensor")),  # a word's row stays whole where it is: tokens travel to it
        ("embed", ("fsdp",)),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("head_dim", ()),
        ("mlp", ("tensor",)),
        ("experts", ("expert",)),
        ("router", ()),
        ("norm", ()),
        ("rank", ()),  # of adapters
        ("batch", ("data", "fsdp", "expert")),
        ("seq", ("context",)),
    )
)

# For training: dense weights and words are split over `expert` too. What a step gathers and scatters of them is what it would
# sum in gradients, and a chip holds less. Decode reads its weights for each token: gathering them would take all the time.
TRAIN_RULES = RULES.replace(embed=("fsdp", "expert"), vocab=("fsdp", "expert", "tensor"))

_active: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=RULES)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Let `spec` answer by this table within the block."""
    token = _active.set(rules)
    try:
        yield
    finally:
        _active.reset(token)


def active_rules() -> Rules:
    """The table that `spec` answers by."""
    return _active.get()


def meshless() -> bool:
    """Whether no mesh is set at this point of the program."""
    return jax.sharding.get_abstract_mesh().empty


def spec(*names: str | None) -> PartitionSpec | None:
    """PartitionSpec of an array whose axes have these logical names, by the active table.

    Args:
        *names: one logical axis name per array axis; None for an axis that is never split.

    Returns:
        The spec under the current mesh; mesh axes that the mesh lacks are left out. None where no mesh is set.

    Raises:
        MeshError: a name that the table lacks.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else active_rules().spec(*names, mesh=mesh)


def placed(x: jax.Array, *names: str | None) -> jax.Array:
    """The array laid out by logical axes: gathered where it was split and these are not, and the other way round.

    Args:
        x: any array.
        *names: one logical axis name per array axis; None for an axis that shall be whole.

    Returns:
        x itself where no mesh is set.
    """
    wanted = spec(*names)
    return x if wanted is None else jax.sharding.reshard(x, wanted)


def cast_in_place(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The array in another dtype, converted on the shards that hold it, at this point of the program: before it is gathered.

    Args:
        x: any array of floats.
        dtype: of the result.

    Returns:
        x, laid out as it was.
    """
    if meshless() or x.dtype == dtype:
        return pallas_kernels.cast(x, dtype)
    layout = jax.typeof(x).sharding.spec
    run = functools.partial(pallas_kernels.cast, dtype=dtype)
    return jax.shard_map(run, in_specs=layout, out_specs=layout, check_vma=False)(x)


def by_rows(run: Callable[..., Any], *args: Any, whole: tuple[Any, ...] = ()) -> Any:
    """Call a function whose every result has the batch as its first axis, on each shard's rows alone.

    Args:
        run: works on each row by itself.
        *args: pytrees of arrays whose first axis is the batch.
        whole: pytrees of arrays that every shard is given as they are, after the others.

    Returns:
        run(*args, *whole).
    """
    if meshless():
        return run(*args, *whole)
    rows, everything = spec("batch"), PartitionSpec()
    args = jax.tree.map(lambda x: jax.sharding.reshard(x, rows), args)
    whole = jax.tree.map(lambda x: jax.sharding.reshard(x, everything), whole)
    layouts = (rows,) * len(args) + (everything,) * len(whole)
    return jax.shard_map(run, in_specs=layouts, out_specs=rows, check_vma=False)(*args, *whole)
