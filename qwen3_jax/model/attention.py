"""Grouped-query attention with per-head norms on queries and keys, rotated by position, with or without a cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.cache import KeyValues
from qwen3_jax.model.mlp import Projection
from qwen3_jax.model.norm import RMSNorm
from qwen3_jax.parallel.keys import keys_for_shard
from qwen3_jax.parallel.rules import meshless, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the T tokens of a call stand: computed once, read by every layer.

    Attributes:
        cos, sin: [B, T, H] float32, the rotation of each token (qwen3_jax.model.rope).
        slots: [B, T] int32, each token's index along the key axis: what causality and the window are measured in.
        segments: [B, T] int32, each token's document, 0 for padding.
        key_segments: [B, S] int32, the document of every key slot that is attended to; `segments` itself without a cache.
        starts: [B] int32, the slot that each row's first token is written to.
        fresh: the cache was empty: the tokens attend to each other, and its slots are written but not read.
    """

    cos: Any
    sin: Any
    slots: Any
    segments: Any
    key_segments: Any
    starts: Any
    fresh: bool = dataclasses.field(default=False, metadata=dict(static=True))


class Attention(nnx.Module):
    """Projections, norms, rotation, the attention op, output projection."""

    def __init__(self, config: Qwen3Config, sliding: bool, key: jax.Array, *, param_dtype: DTypeLike):
        d, n, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        keys = jax.random.split(key, 4)
        options = dict(stddev=config.initializer_range, param_dtype=param_dtype)

        def projection(shape, axes, key, outputs, bias_axes):
            bias_axes = bias_axes if config.attention_bias else None
            return Projection(shape, axes, key, outputs=outputs, bias_axes=bias_axes, **options)

        query, kv = ("heads", "head_dim"), ("kv_heads", "head_dim")
        self.q = projection((n, h, d), (*query, "embed"), keys[0], 2, query)
        self.k = projection((k, h, d), (*kv, "embed"), keys[1], 2, kv)
        self.v = projection((k, h, d), (*kv, "embed"), keys[2], 2, kv)
        self.o = projection((d, n, h), ("embed", *query), keys[3], 1, ("norm",))
        self.q_norm = RMSNorm(h, config.rms_norm_eps, param_dtype=param_dtype)
        self.k_norm = RMSNorm(h, config.rms_norm_eps, param_dtype=param_dtype)
        self.window = config.sliding_window if sliding else None

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: KeyValues | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """Attention of the tokens over themselves, or over the cache that they are first written to.

        Args:
            x: normalised input.
            places: where the tokens stand.
            cache: keys and values of all layers, or None.
            layer: which layer of the cache is this one's; may be traced.

        Returns:
            The layer's output in x's dtype, and the cache with the tokens' keys and values.
        """
        eps = self.q_norm.eps
        q = pallas_kernels.rms_norm_rope(self.q(x), self.q_norm.weight[...], places.cos, places.sin, eps)
        k = pallas_kernels.rms_norm_rope(self.k(x), self.k_norm.weight[...], places.cos, places.sin, eps)
        q = checkpoint_name(q, "attention_q")
        k = checkpoint_name(k, "attention_k").swapaxes(1, 2)
        v = checkpoint_name(self.v(x), "attention_v").swapaxes(1, 2)
        out, cache = attend(q, k, v, places, cache, layer, self.window)
        return self.o(out), cache  # the op names its output "attention_out"


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    places: Places,
    cache: KeyValues | None,
    layer: Int[Array, ""] | int,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], KeyValues | None]:
    """Write keys and values to the cache, if there is one, and attend; on a mesh each shard to its own rows and heads.

    Args:
        q: queries.
        k: keys of the call's tokens.
        v: values of the call's tokens.
        places: where the tokens stand.
        cache: keys and values of all layers, or None.
        layer: which layer of the cache is this one's.
        window: slots that a query sees, or None.

    Returns:
        Attention's output, and the cache with the tokens' keys and values.
    """

    def local(q, k, v, places: Places, cache: KeyValues | None, layer) -> tuple[Array, KeyValues | None]:
        if cache is not None:
            cache = KeyValues(_written(cache.k, k, layer, places.starts), _written(cache.v, v, layer, places.starts))
        if cache is not None and not places.fresh:
            k, v = (jax.lax.dynamic_index_in_dim(side, layer, keepdims=False).astype(q.dtype) for side in (cache.k, cache.v))
        k, v, key_segments = keys_for_shard(q, k, v, places.key_segments)
        out = pallas_kernels.attention(
            q,
            k,
            v,
            q_segments=places.segments,
            k_segments=key_segments,
            q_slots=places.slots,
            window=window,
        )
        return out, cache

    layer = jnp.asarray(layer, jnp.int32)
    if meshless():
        return local(q, k, v, places, cache, layer)
    tokens, rows = spec("batch", "seq"), spec("batch")
    heads, keys = spec("batch", "seq", "heads", None), spec("batch", "kv_heads", "seq", None)
    stacks = None if cache is None else KeyValues(*[spec("layers", "batch", "kv_heads", None, None)] * 2)
    where = Places(cos=None, sin=None, slots=tokens, segments=tokens, key_segments=tokens, starts=rows, fresh=places.fresh)
    given = dataclasses.replace(places, cos=None, sin=None)
    run = jax.shard_map(
        local, in_specs=(heads, keys, keys, where, stacks, PartitionSpec()), out_specs=(heads, stacks), check_vma=False
    )
    return run(q, k, v, given, cache, layer)


def _written(
    stack: Float[Array, "L B K S H"], new: Float[Array, "B K T H"], layer: Int[Array, ""] | int, starts: Int[Array, "B"]
) -> Float[Array, "L B K S H"]:
    """The stack with each row's tokens written at that row's own slot; those past its last slot are dropped.

    A loop over rows of plain slice updates: the one scatter that says the same needs 8 x the temporary memory on a TPU.
    """
    # In the cache's own layout: as heads lie after their norm, the whole cache would be copied to theirs and back on a mesh.
    new = with_layout_constraint(new.astype(stack.dtype), Layout(major_to_minor=(0, 1, 2, 3)))
    length, slots = new.shape[2], stack.shape[3]
    zero, layer = jnp.int32(0), jnp.asarray(layer, jnp.int32)

    def write(row, stack):
        piece = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=0)[None]
        # A slice that would reach past the end is moved back; what it then covers is kept.
        first = jnp.minimum(starts[row], slots - length)
        past = starts[row] - first
        place = (layer, jnp.asarray(row, jnp.int32), zero, first, zero)
        there = jax.lax.dynamic_slice(stack, place, piece.shape)
        kept = jnp.arange(length)[:, None] < past
        return jax.lax.dynamic_update_slice(stack, jnp.where(kept, there, jnp.roll(piece, past, axis=3)), place)

    if new.shape[0] == 1:
        return write(0, stack)
    return jax.lax.fori_loop(0, new.shape[0], write, stack)
