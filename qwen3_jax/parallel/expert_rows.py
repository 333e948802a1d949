"""What a shard does with tokens and its own experts: rows sorted by expert, three grouped matmuls, weighted sums.

`local_experts` is differentiated as it stands, and works on all rows at once. Where experts are split few of the rows that
tokens could have are this shard's: `visit` and `visit_back`, a pass and its derivative, work on them in a buffer of `capacity`
rows, as often as it takes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.parallel.expert_weights import Adapted, Coded, Weights, decoded

Sums = list[Any]  # for each array of the weights a sum, or None
WIDENED = 2**26  # bytes of rows that may be widened at once: 64 MiB


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
    order, sizes = _sorted(ids, _count(weights))
    out = _products(weights, x[order // ids.shape[1]], sizes, layer)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    out = out[places].reshape(*ids.shape, x.shape[1])
    return jnp.einsum("mkd,mk->md", out, routing.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def visit(
    weights: Weights,
    x: Float[Array, "M D"],
    routing: Float[Array, "M k"],
    ids: Int[Array, "M k"],
    capacity: int,
    rounds: int | None = None,
    layer: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """`local_experts` in bounded memory.

    Args:
        weights: gate, up and down of E experts, or stacks of them.
        x: tokens.
        routing: weight of each of a token's experts.
        ids: index among these experts; one that is none of them adds nothing.
        capacity: rows that are worked on at a time.
        rounds: at most so many times; later rows are left out. None: as often as it takes.
        layer: which layer of the stacks.

    Returns:
        [M, D] in x's dtype, summed in float32; and the number of rows that were worked on.
    """

    def one(window: Window, total: Any) -> Any:
        out = _products(weights, window.rows(x), window.sizes, layer)
        return window.added(total, out, window.weights(routing).astype(x.dtype))

    total = jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    total, done = _windows(ids, _count(weights), capacity, rounds, one, total)
    return total.astype(x.dtype), done


def visit_back(
    weights: Weights,
    x: Float[Array, "M D"],
    routing: Float[Array, "M k"],
    ids: Int[Array, "M k"],
    d_out: Float[Array, "M D"],
    d_weights: Sums,
    capacity: int,
    rounds: int | None = None,
) -> tuple[Sums, Float[Array, "M D"], Float[Array, "M k"]]:
    """The derivative of `visit`, which recomputes what it needs from the sorted inputs.

    Args:
        weights: gate, up and down of E experts.
        x: tokens.
        routing: weight of each of a token's experts.
        ids: as `visit`.
        d_out: cotangent of the sums.
        d_weights: for each array of the weights the sum so far of its gradient, to which each round's own, in the weights'
            dtype, is added; None for one whose gradient is not wanted.
        capacity: as `visit`.
        rounds: as `visit`.

    Returns:
        The weights' gradients, and those of x and routing in float32.
    """
    arrays, tree = jax.tree.flatten(weights)
    wanted = [None if total is None else array for array, total in zip(arrays, d_weights, strict=True)]

    def one(window: Window, sums: Any) -> Any:
        d_weights, d_x, d_routing = sums
        rows, weight = window.rows(x), window.weights(routing).astype(x.dtype)

        def products(wanted: list[Any], rows: Any, weight: Any) -> Any:
            weights = tree.unflatten(array if part is None else part for array, part in zip(arrays, wanted, strict=True))
            # Weighted before the last product rather than behind it: its derivative then does not want that product.
            return _products(weights, rows, window.sizes, None, weight)

        _, pull = jax.vjp(products, wanted, rows, weight)
        more, d_rows, d_weight = pull(window.rows(d_out))
        d_weights = jax.tree.map(lambda total, part: total + part.astype(total.dtype), d_weights, more)
        return d_weights, window.added(d_x, d_rows), window.added_weights(d_routing, d_weight)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = (d_weights, jnp.zeros(x.shape, wide), jnp.zeros(routing.shape, wide))
    return _windows(ids, _count(weights), capacity, rounds, one, sums)[0]


class Window:
    """Some of the rows that are sorted by expert."""

    def __init__(self, index: Int[Array, " R"], sizes: Int[Array, " E"], top_k: int):
        """index: into tokens x top_k, no two alike, out of bounds where there is no row; sizes: rows of each expert in it."""
        self.index, self.sizes, self.token = index, sizes, index // top_k

    def rows(self, x: Float[Array, "M D"]) -> Float[Array, "R D"]:
        """Each row's token; where there is no row any, which the grouped matmul neither reads nor counts."""
        return x.at[self.token].get(mode="clip")

    def weights(self, routing: Float[Array, "M k"]) -> Float[Array, " R"]:
        """Each row's weight."""
        return routing.reshape(-1).at[self.index].get(mode="fill", fill_value=0)

    def added(
        self, total: Float[Array, "M D"], rows: Float[Array, "R D"], weights: Float[Array, " R"] | None = None
    ) -> Float[Array, "M D"]:
        """Sums over tokens with each row's part added, times a weight of its own if there is one.

        Many rows go in eight pieces: widened to the sums' dtype at once they would be one of a
        layer's largest arrays. Few stay out of a loop, whose operands the TPU compiler keeps in HBM.
        """
        many = rows.size * total.dtype.itemsize > WIDENED and rows.shape[0] % 8 == 0
        pieces = 8 if many else 1
        size = rows.shape[0] // pieces

        def add(piece: Any, total: Any) -> Any:
            def part(x: Any) -> Any:
                return jax.lax.dynamic_slice_in_dim(x, piece * size, size)

            wide = part(rows).astype(total.dtype)
            wide = wide if weights is None else wide * part(weights).astype(total.dtype)[:, None]
            return total.at[part(self.token)].add(wide, mode="drop")

        return jax.lax.fori_loop(0, pieces, add, total)

    def added_weights(self, total: Float[Array, "M k"], weights: Float[Array, " R"]) -> Float[Array, "M k"]:
        """Sums over tokens' weights with each row's part added."""
        # No two indices are alike, and a TPU that is not told so sorts them first.
        sums = total.reshape(-1).at[self.index].add(weights.astype(total.dtype), mode="drop", unique_indices=True)
        return sums.reshape(total.shape)


def _windows(
    ids: Int[Array, "M k"], experts: int, capacity: int, rounds: int | None, one: Any, sums: Any
) -> tuple[Any, Int[Array, ""]]:
    """Run `one` on window after window of the sorted rows; its last sums, and how many rows it saw."""
    order, sizes = _sorted(ids, experts)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    count = ends[-1]

    def window(first: Any) -> Window:
        place = first + jnp.arange(capacity, dtype=jnp.int32)
        index = jnp.where(place < count, order.at[place].get(mode="clip"), order.size + place)
        part = jnp.diff(jnp.clip(ends - first, 0, capacity), prepend=0)
        return Window(index, part.astype(jnp.int32), ids.shape[1])

    if capacity >= ids.size or rounds == 1:
        return one(window(jnp.int32(0)), sums), jnp.minimum(count, capacity)
    limit = count if rounds is None else jnp.minimum(count, rounds * capacity)

    def step(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        first, sums = carry
        return first + capacity, one(window(first), sums)

    _, sums = jax.lax.while_loop(lambda carry: carry[0] < limit, step, (jnp.int32(0), sums))
    return sums, limit


def _sorted(ids: Int[Array, "M k"], experts: int) -> tuple[Int[Array, "R"], Int[Array, " E"]]:
    """Rows in the order of their experts, those of none behind; and the number of each expert's."""
    flat = ids.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    if (experts + 1) * flat.size < 2**31:
        # Expert and row as one number: a sort of two operands in a stable order takes a TPU four times as long to compile.
        rows = jnp.arange(flat.size, dtype=jnp.int32)
        order = jax.lax.sort(flat.astype(jnp.int32) * flat.size + rows, is_stable=False) % flat.size
    else:
        order = jnp.argsort(flat)  # stable: equal inputs take equal paths
    # Comparisons and sums rather than bincount's scatter, which a TPU does one by one.
    sizes = (flat[:, None] == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)
    return order.astype(jnp.int32), sizes


def _count(weights: Weights) -> int:
    """How many experts there are."""
    return jax.tree.leaves(weights)[0].shape[-3]


def _products(
    weights: Weights, rows: Float[Array, "R D"], sizes: Int[Array, " E"], layer: Any, weight: Float[Array, " R"] | None = None
) -> Float[Array, "R D"]:
    """Each row through its expert, its hidden states times a weight of its own if there is one."""

    def product(rows: Float[Array, "R _"], weight: Any) -> Float[Array, "R _"]:
        if isinstance(weight, Coded):
            return _from_codes(rows, weight, sizes, layer)
        stack_layer = layer if weight.ndim == 4 else None
        return pallas_kernels.grouped_matmul(rows, weight, sizes, layer=stack_layer, transpose_rhs=True)

    def grouped(rows: Float[Array, "R _"], matrix: Any) -> Float[Array, "R _"]:
        if not isinstance(matrix, Adapted):
            return product(rows, matrix)
        low = matrix.scale * product(rows, matrix.a)
        if matrix.b.ndim == 4:
            return product(rows, matrix.weight) + product(low, matrix.b)
        # With the rank before the last axis, as a TPU lays out the array anyway: as the last one it would be padded to 128.
        b = matrix.b.swapaxes(1, 2)
        return product(rows, matrix.weight) + pallas_kernels.grouped_matmul(low, b, sizes)

    gate, up, down = weights
    gated = checkpoint_name(grouped(rows, gate), "moe_gate")
    upped = checkpoint_name(grouped(rows, up), "moe_up")
    hidden = jax.nn.silu(gated) * upped
    return grouped(hidden if weight is None else hidden * weight[:, None], down)


def _from_codes(rows: Float[Array, "R _"], matrix: Coded, sizes: Int[Array, " E"], layer: Any) -> Float[Array, "R _"]:
    """The product with matrices that are made here, and again in the backward pass: what is kept for it is codes."""
    if matrix.codes.ndim == 4:
        matrix = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), matrix)

    def run(rows: Array, matrix: Coded) -> Array:
        return pallas_kernels.grouped_matmul(rows, decoded(matrix, rows.dtype), sizes, transpose_rhs=True)

    return jax.checkpoint(run, prevent_cse=False)(rows, matrix)
