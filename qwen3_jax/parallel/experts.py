"""Tokens to experts and back, dropless; over a mesh inside one shard_map over all axes.

Each shard holds some tokens and some experts. Tokens travel around the experts' axes in a ring: at every step a shard works on
the chunk of tokens that it has while the next one is on its way, and the chunk's sums follow one step behind, so that they too
move while others are computed. The backward pass is a ring of its own that keeps nothing of the forward pass but its inputs.
Where the experts are not split the same local function runs once; without a mesh it is differentiated as it stands.

Weights split over other axes are gathered in the compute dtype, and the gradient of them is scattered back; a width split
leaves partial sums, which are added once per chunk at its home.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.parallel.rules import active_rules, meshless

Weights = tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]  # gate, up [E, F, D], down [E, D, F]
AXES = (("experts", "mlp", "embed"), ("experts", "mlp", "embed"), ("experts", "embed", "mlp"))


def apply_experts(
    weights: Weights,
    x: Float[Array, "B T D"],
    routing: Float[Array, "B T k"],
    ids: Int[Array, "B T k"],
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "B T D"]:
    """Every token through its experts, weighted and summed.

    Args:
        weights: gate and up [E, F, D], down [E, D, F]; or the stacks of all layers with a leading L.
        x: tokens.
        routing: weight of each of a token's experts.
        ids: the experts, 0 <= id < E.
        layer: which layer of the stacks.

    Returns:
        The sums, in x's dtype.
    """
    if meshless():
        tokens, routing, ids = (array.reshape(-1, array.shape[-1]) for array in (x, routing, ids))
        return local_experts(weights, tokens, routing, ids, layer).reshape(x.shape)
    return _on_mesh(_layout(weights[0].ndim == 4), weights, x, routing, ids, layer)


def local_experts(
    weights: Weights,
    x: Float[Array, "M D"],
    routing: Float[Array, "M k"],
    ids: Int[Array, "M k"],
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "M D"]:
    """Sort rows by expert, three grouped matmuls, un-sort, weighted sum.

    Args:
        weights: gate, up and down of E experts, or stacks of them.
        x: tokens.
        routing: weight of each of a token's experts.
        ids: index among these experts; one that is none of them adds nothing.
        layer: which layer of the stacks.

    Returns:
        [M, D] in x's dtype, summed in float32.
    """
    top_k, experts = ids.shape[1], weights[0].shape[-3]
    flat = ids.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    order = jnp.argsort(flat)  # stable: equal inputs take equal paths
    sizes = jnp.bincount(flat, length=experts + 1)[:experts].astype(jnp.int32)

    def grouped(rows: Float[Array, "R _"], weight: Float[Array, "..."]) -> Float[Array, "R _"]:
        stack_layer = layer if weight.ndim == 4 else None
        return pallas_kernels.grouped_matmul(rows, weight, sizes, layer=stack_layer, transpose_rhs=True)

    gate, up, down = weights
    rows = x[order // top_k]
    gated = checkpoint_name(grouped(rows, gate), "moe_gate")
    upped = checkpoint_name(grouped(rows, up), "moe_up")
    out = grouped(jax.nn.silu(gated) * upped, down)
    out = out[jnp.argsort(order)].reshape(x.shape[0], top_k, x.shape[1])
    return jnp.einsum("mkd,mk->md", out, routing.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Over which mesh axes what is split: the static part of a dispatch.

    Attributes:
        tokens: specs of x, routing and ids.
        weights: specs of gate, up and down.
        experts: axes that the experts are split over.
        embed: axes that weights are gathered over.
        width: axes that the experts' width is split over.
        others: axes that tokens are split over and weights are not.
        shards: of the experts.
        stacked: whether the weights have a leading L.
    """

    tokens: PartitionSpec
    weights: tuple[PartitionSpec, ...]
    experts: tuple[str, ...]
    embed: tuple[str, ...]
    width: tuple[str, ...]
    others: tuple[str, ...]
    shards: int
    stacked: bool


def _layout(stacked: bool) -> Layout:
    rules, mesh = active_rules(), jax.sharding.get_abstract_mesh()
    leading = ("layers",) if stacked else ()
    specs = tuple(rules.spec(*leading, *names, mesh=mesh) for names in AXES)
    experts, width, embed = (_axes_of(part) for part in specs[0][len(leading) :])
    tokens = rules.spec("batch", "seq", None, mesh=mesh)
    over = (*_axes_of(tokens[0]), *_axes_of(tokens[1]))
    return Layout(
        tokens=tokens,
        weights=specs,
        experts=experts,
        embed=embed,
        width=width,
        others=tuple(axis for axis in over if axis not in experts and axis not in embed),
        shards=math.prod(mesh.shape[axis] for axis in experts),
        stacked=stacked,
    )


def _axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_mesh(layout: Layout, weights: Weights, x: Any, routing: Any, ids: Any, layer: Any) -> Any:
    layer = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    tokens = layout.tokens
    run = jax.shard_map(
        functools.partial(_forward, layout),
        in_specs=(layout.weights, tokens, tokens, tokens, PartitionSpec()),
        out_specs=tokens,
        check_vma=False,
    )
    return run(weights, x, routing, ids, layer)


def _forward(layout: Layout, weights: Weights, x: Any, routing: Any, ids: Any, layer: Any) -> Any:
    whole = _gathered(layout, weights, layer, x.dtype)
    first = _first_expert(layout, whole)

    def visit(state: None, chunk: tuple[Any, Any, Any]) -> tuple[None, Any]:
        x, routing, ids = chunk
        return state, local_experts(whole, x, routing, ids - first)

    chunk = tuple(array.reshape(-1, array.shape[-1]) for array in (x, routing, ids))
    out, _ = around(layout.experts, layout.shards, visit, chunk, None)
    return _summed(out, layout.width).reshape(x.shape)


def _kept(layout: Layout, weights: Weights, x: Any, routing: Any, ids: Any, layer: Any) -> tuple[Any, Any]:
    return _on_mesh(layout, weights, x, routing, ids, layer), (weights, x, routing, ids, layer)


def _backward(layout: Layout, kept: Any, d_out: Any) -> tuple[Any, ...]:
    weights, x, routing, ids, layer = kept
    index = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    tokens = layout.tokens
    run = jax.shard_map(
        functools.partial(_gradients, layout),
        in_specs=(layout.weights, tokens, tokens, tokens, PartitionSpec(), tokens),
        out_specs=(layout.weights, tokens, tokens),
        check_vma=False,
    )
    return (*run(weights, x, routing, ids, index, d_out), None, None)


_on_mesh.defvjp(_kept, _backward)


def _gradients(layout: Layout, weights: Weights, x: Any, routing: Any, ids: Any, layer: Any, d_out: Any) -> tuple[Any, ...]:
    whole = _gathered(layout, weights, layer, x.dtype)
    first = _first_expert(layout, whole)

    def visit(d_whole: Weights, chunk: tuple[Any, ...]) -> tuple[Weights, tuple[Any, Any]]:
        x, routing, ids, d_out = chunk
        _, pull = jax.vjp(lambda whole, x, routing: local_experts(whole, x, routing, ids - first), whole, x, routing)
        more, d_x, d_routing = pull(d_out)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), d_whole, more), (d_x, d_routing)

    chunk = tuple(array.reshape(-1, array.shape[-1]) for array in (x, routing, ids, d_out))
    # Sums over chunks in float32; each chunk's own gradient is in the compute dtype.
    zero = tuple(jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32)) for weight in whole)
    (d_x, d_routing), d_whole = around(layout.experts, layout.shards, visit, chunk, zero)
    d_x, d_routing = _summed(d_x, layout.width), _summed(d_routing, layout.width)
    d_weights = tuple(
        _scattered(layout, part, weight, names.index("embed"), layer)
        for part, weight, names in zip(d_whole, weights, AXES, strict=True)
    )
    return d_weights, d_x.reshape(x.shape), d_routing.reshape(routing.shape).astype(routing.dtype)


def _gathered(layout: Layout, weights: Weights, layer: Any, dtype: Any) -> Weights:
    """This shard's experts, whole along the embed axis, in the compute dtype."""

    def one(weight: Any, axis: int) -> Any:
        if layout.stacked:
            weight = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
        weight = pallas_kernels.cast(weight, dtype)  # a plain conversion would be one of all layers
        return jax.lax.all_gather(weight, layout.embed, axis=axis, tiled=True) if layout.embed else weight

    return tuple(one(weight, names.index("embed")) for weight, names in zip(weights, AXES, strict=True))


def _scattered(layout: Layout, d_whole: Any, weight: Any, axis: int, layer: Any) -> Any:
    """The gradient of this shard's part of a weight, summed over all shards that used it, in the weight's dtype."""
    if layout.embed:
        d_whole = jax.lax.psum_scatter(d_whole, layout.embed, scatter_dimension=axis, tiled=True)
    part = _summed(d_whole, layout.others).astype(weight.dtype)
    return jnp.zeros_like(weight).at[layer].set(part) if layout.stacked else part


def _first_expert(layout: Layout, whole: Weights) -> Any:
    return jax.lax.axis_index(layout.experts) * whole[0].shape[0] if layout.experts else 0


def _summed(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def around(
    axes: tuple[str, ...], shards: int, visit: Callable[[Any, Any], tuple[Any, Any]], chunk: Any, state: Any
) -> tuple[Any, Any]:
    """Let each shard's chunk visit every shard of a ring, and bring its sums home; for use inside shard_map.

    Args:
        axes: mesh axes that make the ring.
        shards: of the ring.
        visit: (state, chunk) -> (state, sums): what a shard does with a chunk; `state` stays on the shard.
        chunk: this shard's own, a pytree.
        state: before the first visit.

    Returns:
        The sums over all shards' visits of this shard's chunk, and the state after the last visit.
    """
    if shards == 1:
        state, sums = visit(state, chunk)
        return sums, state
    onward = [(i, (i + 1) % shards) for i in range(shards)]

    def passed_on(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axes, onward), tree)

    def step(carry: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], None]:
        chunk, sums, state = carry
        # Neither waits for this step's work, so both are on their way while it is done.
        following, so_far = passed_on(chunk), passed_on(sums)
        state, more = visit(state, chunk)
        return (following, jax.tree.map(jnp.add, so_far, more), state), None

    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(visit, state, chunk)[1])
    (chunk, sums, state), _ = jax.lax.scan(step, (chunk, sums, state), None, length=shards - 1)
    so_far = passed_on(sums)
    state, more = visit(state, chunk)  # the last: nothing follows
    return passed_on(jax.tree.map(jnp.add, so_far, more)), state
