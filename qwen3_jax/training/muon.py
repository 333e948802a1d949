"""Muon for stacks of layers on a mesh: optax's orthogonalisation, of each layer on one share of the devices."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from optax import contrib

from qwen3_jax.parallel.rules import meshless
from qwen3_jax.training.offload import in_turn, names_of

# Which axes behind those of layers and experts are a matrix's output: of `[heads, head_dim, embed]` the first two.
OUTPUTS = {"q": 2, "k": 2, "v": 2, "o": 1, "gate": 1, "up": 1, "down": 1}
CONSISTENT_RMS = 0.2  # of an update, as AdamW's, so that one learning rate serves both (arXiv 2502.16982, section 2.2)


class MuonState(NamedTuple):
    """Of `scale_by_muon`.

    Attributes:
        count: int32 scalar, updates so far.
        mu: momentum.
    """

    count: Any
    mu: Any


def scale_by_muon(
    b1: float = 0.95, *, eps: float = 1e-8, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Momentum (Nesterov's, as of NAdam), then the nearest orthogonal matrix, by Newton and Schulz's iteration.

    The same as `optax.contrib.scale_by_muon` with `consistent_rms`, for leaves that are stacks `[layers, (experts,) out...,
    in...]` by the names of OUTPUTS. optax works on all layers at once, for which every device gathers a stack whole; here the
    devices that split a stack's matrices exchange them for whole ones of fewer layers, which they work on one after another.

    Args:
        b1: decay of the momentum.
        eps: added to a matrix's norm.
        mu_dtype: of the momentum; None: the parameters'.

    Returns:
        An optax transformation.
    """
    # Of no momentum of its own, optax's transformation is its orthogonalisation.
    orthogonal = contrib.scale_by_muon(beta=0.0, nesterov=False, eps=eps)

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def ahead_of(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, b1, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, b1, count)
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, ahead, now)
        return momentum, MuonState(count, optax.tree.cast(mu, mu_dtype))

    momentum_ahead = in_turn(optax.GradientTransformation(init, ahead_of)).update

    def update(updates: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any) -> tuple[Any, Any]:
        momentum, state = momentum_ahead(updates, state, params, finite=finite)

        def of_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
            outputs = OUTPUTS[_matrix(path)]
            return _orthogonalised(orthogonal, leaf, leaf.ndim - _inputs(_matrix(path)) - outputs, outputs)

        return jax.tree_util.tree_map_with_path(of_leaf, momentum), state

    return optax.GradientTransformationExtraArgs(init, update)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter is one that Muon is for: a projection's or expert's matrix, not words, the router, norms or biases.

    Args:
        path: of the parameter in the tree.
        leaf: the parameter.

    Returns:
        True where `scale_by_muon` takes it.
    """
    names = names_of(path)
    return "router" not in names and "bias" not in names and _matrix(path) in OUTPUTS and leaf.ndim >= 3


def _matrix(path: tuple[Any, ...]) -> str:
    names = [name for name in names_of(path) if name not in ("weight", "value")]
    return names[-1] if names else ""


def _inputs(name: str) -> int:
    return 2 if name == "o" else 1


def _orthogonalised(orthogonal: Any, stack: Float[Array, "L ..."], batch: int, outputs: int) -> Float[Array, "L ..."]:
    """The matrices of a stack, orthogonal and scaled; `batch` of its axes come before a matrix's, layers first."""
    rows, columns = math.prod(stack.shape[batch : batch + outputs]), math.prod(stack.shape[batch + outputs :])

    def one(matrix: Float[Array, "O I"]) -> Float[Array, "O I"]:
        update, _ = orthogonal.update(matrix, orthogonal.init(matrix))
        return update * (CONSISTENT_RMS * max(rows, columns) ** 0.5)

    of_layer = one
    for _ in range(batch - 1):
        of_layer = jax.vmap(of_layer)

    def of_layers(stack: Any) -> Any:
        return jax.lax.map(of_layer, stack.reshape(*stack.shape[:batch], rows, columns)).reshape(stack.shape)

    if meshless():
        return of_layers(stack)
    layouts = _to_whole_matrices(jax.typeof(stack).sharding.spec, batch)
    sizes = jax.sharding.get_abstract_mesh().shape
    layers, parts = len(stack), math.prod(sizes[axis] for axis in _axes(layouts[-1][0]))
    # Layers of zeros make the count a multiple: what a device has of the stack grows by less than a layer.
    stack = jnp.pad(stack, [(0, -layers % parts)] + [(0, 0)] * (stack.ndim - 1))
    for layout in layouts[1:]:
        stack = jax.sharding.reshard(stack, layout)
    stack = jax.shard_map(of_layers, in_specs=layouts[-1], out_specs=layouts[-1], check_vma=False)(stack)
    for layout in reversed(layouts[:-1]):
        stack = jax.sharding.reshard(stack, layout)
    return stack[:layers]


def _to_whole_matrices(layout: PartitionSpec, batch: int) -> list[PartitionSpec]:
    """From a stack's layout to one in which the mesh axes that split matrices split layers, one moved at a time.

    Each step is an all-to-all; XLA makes a gather of two moved at once.
    """
    split, found = [list(_axes(names)) for names in layout], [layout]
    for axes in reversed(split[batch:]):
        while axes:
            split[0].append(axes.pop())
            found.append(PartitionSpec(*(tuple(names) or None for names in split)))
    return found


def _axes(names: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a layout."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)
