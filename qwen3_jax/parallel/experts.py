"""Tokens to experts and back, dropless; over a mesh inside one shard_map over all axes.

Each shard holds some tokens and some experts. A transport (qwen3_jax.parallel.transports) brings tokens to where their experts
are and the sums back; a cost model picks it (qwen3_jax.parallel.dispatch) unless the run's rules do. The backward pass is a
journey of its own, with the tokens' cotangents beside them, that keeps nothing of the forward pass but its inputs, and makes
gradients of those arrays alone that are differentiated: beside a frozen matrix of its adapter's factors. Where the experts are
not split there is nothing to travel; without a mesh the local function is differentiated as it stands.

Weights split over other axes are gathered in the compute dtype, and the gradient of them is scattered back; a width split
leaves partial sums, which are added once per chunk at its home.
"""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.quantized import FROZEN
from qwen3_jax.config import Qwen3Config
from qwen3_jax.parallel import transports
from qwen3_jax.parallel.dispatch import Choice, Work, choose, speeds_of
from qwen3_jax.parallel.expert_rows import Sums, local_experts, visit, visit_back
from qwen3_jax.parallel.expert_weights import WEIGHT_AXES, Weights, array_axes, decoded, decoded_places, is_coded, rows_of
from qwen3_jax.parallel.fit import check_batch, fitted
from qwen3_jax.parallel.rules import RULES, Rules, active_rules, meshless

logger = logging.getLogger(__name__)


def apply_experts(
    weights: Weights,
    x: Float[Array, "B T D"],
    routing: Float[Array, "B T k"],
    ids: Int[Array, "B T k"],
    layer: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """Every token through its experts, weighted and summed.

    Args:
        weights: gate and up [E, F, D], down [E, D, F], each an array, a Coded or an Adapted; or the stacks of all layers with
            a leading L.
        x: tokens.
        routing: weight of each of a token's experts, float32.
        ids: the experts, 0 <= id < E.
        layer: which layer of the stacks.

    Returns:
        The sums, in x's dtype; and how many rows, of one token for one expert, were sent and did not come back: 0 unless
        the rules' dispatch bounds the rounds.

    Raises:
        ValueError: where it is differentiated in a Coded's scales.
    """
    if meshless():
        tokens, routing, ids = (array.reshape(-1, array.shape[-1]) for array in (x, routing, ids))
        return local_experts(weights, tokens, routing, ids, layer).reshape(x.shape), jnp.int32(0)
    layout = _layout(active_rules(), jax.sharding.get_abstract_mesh(), weights, x, ids.shape[-1])
    return _on_mesh(layout, jax.tree.leaves(weights), x, routing, ids, layer)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Over which mesh axes what is split (those of size 1 left out), and how tokens travel: the static part of a dispatch.

    Attributes:
        tokens: specs of x, routing and ids.
        matrices: the form of gate, up and down.
        weights: the spec of each of their arrays.
        names: the logical axes of each of them.
        experts: axes that the experts are split over.
        embed: axes that weights are gathered over.
        width: axes that the experts' width is split over.
        over: axes that tokens are split over.
        everywhere: all axes.
        shards: of the experts.
        stacked: whether the weights have a leading L.
        coded: whether there are codes among them.
        choice: how tokens travel.
    """

    tokens: PartitionSpec
    matrices: Any
    weights: tuple[PartitionSpec, ...]
    names: tuple[tuple[str, ...], ...]
    experts: tuple[str, ...]
    embed: tuple[str, ...]
    width: tuple[str, ...]
    over: tuple[str, ...]
    everywhere: tuple[str, ...]
    shards: int
    stacked: bool
    coded: bool
    choice: Choice

    def travel(self, visit: transports.Visit, per_shard: int, chunk: Any, state: Any) -> tuple[Any, Any]:
        """Bring this shard's tokens to where their experts are, and the sums home.

        Args:
            visit: what is done there.
            per_shard: experts of a shard.
            chunk: arrays [M, ...], the second of which is `_packed`.
            state: before the first visit.

        Returns:
            The sums, and the state after the last visit.
        """
        choice = self.choice
        if choice.transport is None:
            state, sums = visit(state, chunk)
            return sums, state
        if choice.transport == "ring":
            return transports.ring(self.experts, self.shards, visit, chunk, state)
        if choice.transport == "gather":
            return transports.gather(self.experts, visit, chunk, state)
        home = _picks(chunk[1], 0)[1] // per_shard
        goes = (home[:, :, None] == jnp.arange(self.shards)).any(axis=1)
        arguments = (self.experts, goes, choice.quota, choice.rounds, self.everywhere)
        return transports.all_to_all(*arguments, visit, chunk, state)


def dispatch_for(
    config: Qwen3Config,
    mesh: Mesh | AbstractMesh,
    batch: int,
    length: int,
    *,
    rules: Rules = RULES,
    dtype: DTypeLike = jnp.bfloat16,
) -> Choice:
    """How tokens would travel in a call of a model, and what each way would cost.

    Args:
        config: of a model with experts.
        mesh: the mesh.
        batch: rows of the call.
        length: tokens of a row.
        rules: the model's; their `dispatch` is what a run says about it.
        dtype: compute dtype.

    Returns:
        The choice, which is a static part of the compiled program.

    Raises:
        MeshError: the model or the rows do not fit the mesh.
    """
    rules = fitted(rules, config, mesh)
    check_batch(rules, mesh, batch, length)
    sizes = dict(experts=config.num_experts, mlp=config.moe_intermediate_size, embed=config.hidden_size)
    weights = tuple(jax.ShapeDtypeStruct([sizes[name] for name in names], dtype) for names in WEIGHT_AXES)
    x = jax.ShapeDtypeStruct((batch, length, config.hidden_size), dtype)
    return _layout(rules, mesh, weights, x, config.num_experts_per_tok).choice


def _layout(rules: Rules, mesh: Mesh | AbstractMesh, weights: Any, x: Any, top_k: int) -> Layout:
    (gate, *_), matrices = jax.tree.flatten(weights)
    names = tuple(array_axes(weights))
    stacked = gate.ndim == 4
    leading = ("layers",) if stacked else ()
    specs = tuple(rules.spec(*leading, *axes, mesh=mesh) for axes in names)

    def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
        axes = (part,) if isinstance(part, str) else part or ()
        return tuple(axis for axis in axes if mesh.shape[axis] > 1)

    experts, width, embed = (axes_of(part) for part in specs[0][len(leading) :])
    tokens = rules.spec("batch", "seq", None, mesh=mesh)
    over = (*axes_of(tokens[0]), *axes_of(tokens[1]))

    def parts(axes: tuple[str, ...]) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    work = Work(
        shards=parts(experts),
        tokens=math.prod(x.shape[:2]) // parts(over),
        top_k=top_k,
        embed=x.shape[2],
        width=rows_of(weights[0]) // parts(width),
        experts=gate.shape[-3] // parts(experts),
        itemsize=x.dtype.itemsize,
    )
    choice = choose(rules.dispatch, work, speeds_of(mesh))
    logger.info("experts: %s as %s", work, choice)
    return Layout(
        tokens=tokens,
        matrices=matrices,
        weights=specs,
        names=names,
        experts=experts,
        embed=embed,
        width=width,
        over=over,
        everywhere=mesh.axis_names,
        shards=work.shards,
        stacked=stacked,
        coded=is_coded(weights),
        choice=choice,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_mesh(layout: Layout, weights: list[Any], x: Any, routing: Any, ids: Any, layer: Any) -> Any:
    layer = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    tokens = layout.tokens
    run = jax.shard_map(
        functools.partial(_forward, layout),
        in_specs=(list(layout.weights), tokens, tokens, tokens, PartitionSpec()),
        out_specs=(tokens, PartitionSpec()),
        check_vma=False,
    )
    return run(weights, x, routing, ids, layer)


def _forward(layout: Layout, weights: list[Any], x: Any, routing: Any, ids: Any, layer: Any) -> tuple[Any, Any]:
    # Nothing to gather: the grouped matmul reads its layer from the stack where it lies.
    in_place = layout.stacked and not layout.embed and not layout.coded
    matrices = layout.matrices.unflatten(weights) if in_place else _gathered(layout, weights, layer, x.dtype)
    per_shard, choice = weights[0].shape[-3], layout.choice
    first = _first_expert(layout, per_shard)

    def at_experts(done: Any, chunk: tuple[Any, Any]) -> tuple[Any, Any]:
        x, picks = chunk
        out, rows = visit(matrices, x, *_picks(picks, first), choice.capacity, choice.rounds, layer if in_place else None)
        return done + rows, out

    chunk = (x.reshape(-1, x.shape[-1]), _packed(routing, ids))
    out, done = layout.travel(at_experts, per_shard, chunk, jnp.int32(0))
    # Where shards of experts hold the same tokens, each of them sends its own.
    dropped = _summed(ids.size - done, tuple(axis for axis in layout.everywhere if axis in layout.over + layout.experts))
    return _summed(out, layout.width).astype(x.dtype).reshape(x.shape), dropped


def _kept(layout: Layout, weights: list[Any], *others: Any) -> tuple[Any, Any]:
    arrays, made = [weight.value for weight in weights], decoded_places(layout.matrices, len(weights))
    if any(weight.perturbed for place, weight in enumerate(weights) if place not in made):
        raise ValueError(FROZEN)
    rest = jax.tree.map(lambda given: given.value, others, is_leaf=lambda given: isinstance(given, CustomVJPPrimal))
    # Which arrays are differentiated is told by the form of what is kept: values are not known when programs are traced.
    wanted = [() if weight.perturbed else None for weight in weights]
    return _on_mesh(layout, arrays, *rest), (arrays, wanted, *rest)


def _backward(layout: Layout, kept: Any, d_out: Any) -> tuple[Any, ...]:
    weights, wanted, x, routing, ids, layer = kept
    if isinstance(d_out[0], SymbolicZero):
        return (None,) * 5
    index = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    tokens = layout.tokens
    run = jax.shard_map(
        functools.partial(_gradients, layout, tuple(part is not None for part in wanted)),
        in_specs=(list(layout.weights), tokens, tokens, tokens, PartitionSpec(), tokens),
        out_specs=([spec for spec, part in zip(layout.weights, wanted, strict=True) if part is not None], tokens, tokens),
        check_vma=False,
    )
    found, d_x, d_routing = run(weights, x, routing, ids, index, d_out[0])
    d_weights = iter(found)
    return [None if part is None else next(d_weights) for part in wanted], d_x, d_routing, None, None


_on_mesh.defvjp(_kept, _backward, symbolic_zeros=True)


def _gradients(
    layout: Layout,
    wanted: tuple[bool, ...],
    weights: list[Any],
    x: Any,
    routing: Any,
    ids: Any,
    layer: Any,
    d_out: Any,
) -> tuple[Any, ...]:
    matrices = _gathered(layout, weights, layer, x.dtype)
    whole, places = jax.tree.leaves(matrices), decoded_places(layout.matrices, len(weights))
    per_shard, choice = whole[0].shape[0], layout.choice
    first = _first_expert(layout, per_shard)

    def at_experts(d_whole: Sums, chunk: tuple[Any, ...]) -> tuple[Sums, tuple[Any, Any]]:
        x, picks, d_out = chunk
        sums = visit_back(matrices, x, *_picks(picks, first), d_out, d_whole, choice.capacity, choice.rounds)
        d_whole, d_x, d_routing = sums
        return d_whole, (d_x.astype(x.dtype), d_routing)

    chunk = (x.reshape(-1, x.shape[-1]), _packed(routing, ids), d_out.reshape(-1, x.shape[-1]))
    # Sums over visits in float32; each visit's own gradient is in the compute dtype.
    zero = [
        jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32)) if wanted[place] else None
        for weight, place in zip(whole, places, strict=True)
    ]
    (d_x, d_routing), d_whole = layout.travel(at_experts, per_shard, chunk, zero)
    d_x, d_routing = _summed(d_x, layout.width), _summed(d_routing, layout.width)
    d_weights = [
        _scattered(layout, part, weights[place], layout.names[place], layer)
        for part, place in zip(d_whole, places, strict=True)
        if part is not None
    ]
    return d_weights, d_x.astype(x.dtype).reshape(x.shape), d_routing.reshape(routing.shape).astype(routing.dtype)


def _packed(routing: Any, ids: Any) -> Any:
    """[M, 2k]: weights, and experts counted from 1, so that 0 is none: one array to send rather than two."""
    return jnp.concatenate([part.reshape(-1, ids.shape[-1]) for part in (routing, (ids + 1).astype(routing.dtype))], axis=1)


def _picks(packed: Any, first: Any) -> tuple[Any, Any]:
    """The weights, and the experts counted from `first`."""
    routing, ids = jnp.split(packed, 2, axis=1)
    return routing, ids.astype(jnp.int32) - 1 - first


def _gathered(layout: Layout, weights: list[Any], layer: Any, dtype: Any) -> Any:
    """This shard's matrices, whole along the embed axis, in the compute dtype; what travels of coded ones is codes."""
    places = decoded_places(layout.matrices, len(weights))

    def one(place: int, weight: Any, names: tuple[str, ...]) -> Any:
        if layout.stacked:
            weight = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
        if place in places and jnp.issubdtype(weight.dtype, jnp.floating):  # neither codes nor scales
            # By a kernel, with whole lanes: a plain conversion would be one of all layers.
            turned = names[-1] == "rank"
            weight = pallas_kernels.cast(weight.swapaxes(-1, -2) if turned else weight, dtype)
            weight = weight.swapaxes(-1, -2) if turned else weight
        if not layout.embed or "embed" not in names:
            return weight
        return jax.lax.all_gather(weight, layout.embed, axis=names.index("embed"), tiled=True)

    whole = [one(place, weight, names) for place, (weight, names) in enumerate(zip(weights, layout.names, strict=True))]
    return decoded(layout.matrices.unflatten(whole), dtype)


def _scattered(layout: Layout, d_whole: Any, weight: Any, names: tuple[str, ...], layer: Any) -> Any:
    """The gradient of this shard's part of a weight, summed over all shards with other tokens, in the weight's dtype."""
    part, embed = d_whole, layout.embed if "embed" in names else ()
    if embed and set(embed) <= set(layout.over):
        part = jax.lax.psum_scatter(part, embed, scatter_dimension=names.index("embed"), tiled=True)
    elif embed:  # some of the shards that a weight was gathered from have the same tokens
        axis = names.index("embed")
        part = _summed(part, tuple(name for name in embed if name in layout.over))
        size = weight.shape[axis + layout.stacked]
        part = jax.lax.dynamic_slice_in_dim(part, jax.lax.axis_index(embed) * size, size, axis=axis)
    others = tuple(name for name in layout.over if name not in layout.experts + embed)
    # What is whole along the width meets on each shard a part of it alone.
    others += () if "mlp" in names else layout.width
    part = _summed(part, others).astype(weight.dtype)
    return jnp.zeros_like(weight).at[layer].set(part) if layout.stacked else part


def _first_expert(layout: Layout, per_shard: int) -> Any:
    return jax.lax.axis_index(layout.experts) * per_shard if layout.experts else 0


def _summed(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x
