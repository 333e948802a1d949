"""Attention on a TPU: jax's own splash kernels behind this op's contract, forward and backward.

Splash is entered below its masks. Which tiles of the scores are worked on, and what of a tile is hidden, follow from the slots
that the queries occupy, and those may be traced: one program serves whole sequences, pieces of a split one, and a cache.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

LANES = 128

# A hidden score, as splash writes it; and a score that every query sees beside its keys', of value 0. Beside a visible key it
# weighs nothing, beside hidden ones everything: a query that sees nothing gives 0, and has no gradient.
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
SINK = HIDDEN / 2


def fits(dtype: jnp.dtype, size: int) -> bool:
    """Tells whether the kernels take these heads.

    Args:
        dtype: of the queries.
        size: H.

    Returns:
        True for bfloat16 and float32 of up to 256 values.
    """
    return dtype in (jnp.bfloat16, jnp.float32) and size <= 256


def tile(length: int, size: int, dtype: jnp.dtype) -> int:
    """Gives the side of a tile of scores, so that what a kernel holds fits the 16 MiB of VMEM that it has on every chip.

    Args:
        length: queries or keys.
        size: H.
        dtype: of the queries.

    Returns:
        A power of 2 from 128 to 1024 for 16-bit floats, to 512 for wider ones and heads. There are two tiles at least, for
        causality to hide one or a split sequence to give each a piece, and they add no more than an eighth to the length.
    """
    most = 1024 if dtype.itemsize == 2 and size <= LANES else 512
    fitting = (side for side in (1024, 512, 256) if side <= min(most, length // 2) and -length % side <= length // 8)
    return next(fitting, LANES)


def tiles_to_visit(
    q_segments: Int32[Array, " T"],
    k_segments: Int32[Array, " S"],
    q_slots: Int32[Array, " T"],
    window: int | None,
    q_tile: int,
    k_tile: int,
) -> Bool[Array, "i j"]:
    """Tells which tiles of a row's scores hold one that is visible.

    Args:
        q_segments: document of each query, 0 for padding.
        k_segments: document of each key slot, 0 for padding.
        q_slots: the slot of each query.
        window: number of slots that a query sees, or None.
        q_tile: queries of a tile; divides T.
        k_tile: keys of a tile; divides S.

    Returns:
        At least the tiles in question: of slots and documents of a tile only the lowest and the highest are compared.
    """
    slots = q_slots.reshape(-1, q_tile, 1)
    start = jnp.arange(0, k_segments.shape[0], k_tile, dtype=jnp.int32)
    seen = start <= slots.max(axis=1)
    if window is not None:
        seen &= slots.min(axis=1) - (start + k_tile - 1) < window

    def ends(segments: Array, side: int) -> tuple[Array, Array]:
        tiles = segments.reshape(-1, side)
        return jnp.where(tiles == 0, jnp.iinfo(jnp.int32).max, tiles).min(axis=1), tiles.max(axis=1)

    (q_first, q_last), (k_first, k_last) = ends(q_segments, q_tile), ends(k_segments, k_tile)
    return seen & (q_first[:, None] <= k_last) & (k_first <= q_last[:, None])


def next_column(visited: Bool[Array, "i j"]) -> Int[Array, "i j"]:
    """Gives the column of the next tile to visit, at each tile of a walk row by row: what a kernel fetches ahead.

    Args:
        visited: which tiles are.

    Returns:
        The tile's own column where it is visited. After the last one the walk begins anew, for the next head.
    """
    number = jnp.arange(visited.size, dtype=jnp.int32)
    following = jax.lax.cummin(jnp.where(visited.reshape(-1), number, visited.size), reverse=True)
    following = jnp.where(following == visited.size, following[0], following)
    return (following % visited.shape[1]).reshape(visited.shape)


@functools.cache
def _seen(window: int | None) -> Callable[[Array, Array], Array]:
    """The rule within a tile, by slots of queries and keys; one function a window, for jit tells functions by identity."""
    if window is None:
        return lambda q_slots, k_slots: q_slots >= k_slots
    return lambda q_slots, k_slots: (q_slots >= k_slots) & (q_slots - k_slots < window)


def _precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager[None]:
    """Of the kernels' products: 16-bit floats have one on a TPU, float32 two, and any other wish would be refused."""
    wish = str(jax.config.jax_default_matmul_precision).lower()
    plain = dtype.itemsize == 2 or wish in ("none", "default", "fastest", "bfloat16")
    return jax.default_matmul_precision("default" if plain else "highest")


class _Row(NamedTuple):
    """A row's queries, keys and values as splash takes them: heads first, whole tiles, heads of whole lanes."""

    q: Any  # [N, P, W], scaled
    k: Any  # [K, R, W]
    v: Any
    segments: Any  # of queries [P] and of keys [R]
    by_query: Any  # the mask as walked over the keys of each tile of queries,
    by_key: Any  # and over the queries of each tile of keys
    options: dict[str, Any]


def _whole(x: Float[Array, "N T H"], side: int) -> Float[Array, "N P W"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % side), (0, -x.shape[2] % LANES)))


def _row(given: Sequence[Array], window: int | None, scale: float) -> _Row:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes, SegmentIds
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    q, k, v, q_segments, k_segments, q_slots = given
    q_tile, k_tile = (tile(length, q.shape[2], q.dtype) for length in (q.shape[0], k.shape[1]))
    scaled = _whole((q.astype(jnp.float32) * scale).astype(q.dtype).swapaxes(0, 1), q_tile)
    k, v = (_whole(side.astype(q.dtype), k_tile) for side in (k, v))
    more = -q.shape[0] % q_tile
    q_segments, k_segments = jnp.pad(q_segments, (0, more)), jnp.pad(k_segments, (0, k.shape[1] - k_segments.shape[0]))
    q_slots: Any = jnp.pad(q_slots, (0, more), mode="edge")
    visited = tiles_to_visit(q_segments, k_segments, q_slots, window, q_tile, k_tile)

    def mask(following: Int[Array, "i j"]) -> MaskInfo:
        small = jnp.int8 if max(visited.shape) <= 128 else jnp.int16  # scalar memory is scarce
        return MaskInfo(
            data_next=following.astype(small)[None],
            mask_next=None,
            block_mask=visited.astype(jnp.int8)[None],
            partial_mask_blocks=None,
            q_sequence=q_slots,
        )

    options = dict(
        is_mqa=False,
        block_sizes=BlockSizes(
            block_q=q_tile,
            block_kv=k_tile,
            block_q_dkv=q_tile,
            block_kv_dkv=k_tile,
            block_q_dq=q_tile,
            block_kv_dq=k_tile,
        ),
        mask_value=HIDDEN,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_seen(window),
        interpret=False,
    )
    return _Row(
        q=scaled,
        k=k,
        v=v,
        # Splash compares ids alone: padding must not be the same number on both sides.
        segments=SegmentIds(q=jnp.where(q_segments == 0, -1, q_segments), kv=k_segments),
        by_query=mask(next_column(visited)),
        by_key=mask(next_column(visited.T).T),
        options=options,
    )


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Computes attention row by row and tile by tile.

    Args:
        q: queries, bfloat16 or float32. bfloat16 is rounded once more where it is scaled, unless the scale is a power of 2.
        k: keys, cast to q's dtype.
        v: values, cast to q's dtype.
        q_segments: document of each query, 0 for padding.
        k_segments: document of each key slot, 0 for padding.
        q_slots: the key slot of each query.
        window: number of slots a query sees, or None.
        scale: factor of the scores.

    Returns:
        As `reference.attention`.
    """
    return _forward(q, k, v, q_segments, k_segments, q_slots, window, scale, False)[0]


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Computes attention, and what its gradient needs beside it.

    Args:
        q: as of `attention`, like all the others.
        k: keys.
        v: values.
        q_segments: document of each query.
        k_segments: document of each key slot.
        q_slots: the key slot of each query.
        window: number of slots a query sees, or None.
        scale: factor of the scores.

    Returns:
        As `attention`; and the float32 log of each query's sum of exponentials.
    """
    return _forward(q, k, v, q_segments, k_segments, q_slots, window, scale, True)


def _forward(q, k, v, q_segments, k_segments, q_slots, window: int | None, scale: float, normalisers: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

    def one_row(given):
        row = _row(given, window, scale)
        # The normaliser is written once for each of 128 lanes, 4 x the output in bfloat16: only where it is asked for.
        kernel = SplashAttentionKernel(row.by_query, None, None, save_residuals=normalisers, **row.options)
        found: Any = kernel(row.q, row.k, row.v, row.segments, jnp.full((q.shape[2],), SINK, jnp.float32))
        out, normaliser = (found[0], found[1][0][:, : q.shape[1]]) if normalisers else (found, None)
        return out[:, : q.shape[1], : q.shape[3]].swapaxes(0, 1), normaliser

    with _precision(q.dtype):
        return jax.lax.map(one_row, (q, k, v, q_segments, k_segments, q_slots))


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    q_slots: Int32[Array, "B T"],
    out: Float[Array, "B T N H"],
    normaliser: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Computes the gradient of `forward`, tile by tile: once for the queries, once for keys and values.

    Args:
        q: as of `forward`, and so the others up to
        k: keys,
        v: values,
        q_segments: document of each query,
        k_segments: document of each key slot,
        q_slots: the key slot of each query.
        out: what `forward` gave,
        normaliser: both of it.
        d_out: the gradient of out.
        window: as of `forward`.
        scale: as of `forward`.

    Returns:
        The gradients of q, k and v, each in its dtype.
    """
    # The public kernel is differentiated by running its forward pass again; its backward pass alone has no public name.
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import _splash_attention_bwd

    def one_row(given):
        *given, out, normaliser, d_out = given
        row = _row(given, window, scale)
        side = row.options["block_sizes"].block_q
        more = row.q.shape[1] - q.shape[1]
        out, d_out = (_whole(x.astype(q.dtype).swapaxes(0, 1), side) for x in (out, d_out))
        normaliser = jnp.pad(normaliser, ((0, 0), (0, more)))
        kept = row.q, row.k, row.v, row.segments, None, out, normaliser, row.by_query, row.by_key
        _, _, _, d_q, d_k, d_v, _, _ = _splash_attention_bwd(**row.options, save_residuals=False, res=kept, do=d_out)
        d_q = d_q[:, : q.shape[1], : q.shape[3]].swapaxes(0, 1)
        d_k, d_v = (side[:, : k.shape[2], : k.shape[3]] for side in (d_k, d_v))
        return (d_q.astype(jnp.float32) * scale).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    with _precision(q.dtype):
        return jax.lax.map(one_row, (q, k, v, q_segments, k_segments, q_slots, out, normaliser, d_out))
