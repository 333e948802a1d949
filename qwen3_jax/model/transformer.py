"""The network: word vectors in, segments of scanned layers, final norm, logits out."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.config import BlockKind, Qwen3Config
from qwen3_jax.model.attention import Places
from qwen3_jax.model.block import Block
from qwen3_jax.model.cache import Cache, KeyValues
from qwen3_jax.model.embed import Embed
from qwen3_jax.model.moe import Routed
from qwen3_jax.model.norm import RMSNorm
from qwen3_jax.model.param import ExpertParam
from qwen3_jax.model.places import in_shard_order, in_text_order, spread
from qwen3_jax.model.remat import rematerialised
from qwen3_jax.parallel.fit import check_batch, fitted
from qwen3_jax.parallel.rules import RULES, Rules, meshless, placed, use_rules

Carry = tuple[jax.Array, KeyValues | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a call of the model returns. A pytree.

    Attributes:
        logits: [B, T, V] float32, or None when only hidden states were asked for.
        hidden: [B, T, D] after the final norm, in the compute dtype.
        router: [L_moe, B, T, E] float32, router logits of the MoE layers in order; L_moe is 0 for a dense model.
        cache: the cache after this call, or None when none was given.
        dropped: [L_moe] int32, rows of each MoE layer that were sent to an expert and did not come back; all 0 unless the
            rules' dispatch bounds the rounds.
        counts: [L_moe, B, E] float32, how many of each row's real tokens chose each expert.
        probabilities: [L_moe, B, E] float32, sums over them of the router's probabilities. Training reads these: router
            logits of all layers, which a program that does not ask for them never holds, would be one of its larger arrays.
        squares: [L_moe, B] float32, sums over them of the squared log of the router's normaliser.
        entropy: [L_moe, B] float32, sums over them of the entropy of the router's probabilities, in nats.
        losses: [B, T] float32, negative log-probability of each label, or None unless labels were given without weights.
        normaliser: [B, T] float32, log of the normaliser of each softmax over words, or None likewise.
        weighted: their sums over all tokens (qwen3_jax.parallel.word_losses.WeightedLoss), or None unless weights were given.
    """

    logits: Any
    hidden: Any
    router: Any
    cache: Any
    dropped: Any
    counts: Any
    probabilities: Any
    squares: Any
    entropy: Any
    losses: Any
    normaliser: Any
    weighted: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer outside of the scan, made by qwen3_jax.generation.unstack.

    Attributes:
        block: its Block; expert weights are still the segment's stack.
        repeat: which layer of that stack is this one's.
    """

    block: Any
    repeat: int = dataclasses.field(metadata=dict(static=True))


class Unit(nnx.Module):
    """The layers that one step of a segment's scan runs; every parameter of it is stacked over the segment's repeats."""

    def __init__(self, config: Qwen3Config, kinds: tuple[BlockKind, ...], key: jax.Array, *, param_dtype: DTypeLike):
        keys = jax.random.split(key, len(kinds))
        self.blocks = nnx.List([Block(config, kind, keys[i], param_dtype=param_dtype) for i, kind in enumerate(kinds)])


class Qwen3(nnx.Module):
    """Qwen3, dense or mixture-of-experts. A pytree: jit, grad and vmap it as usual.

    `config` is its Qwen3Config, `dtype` the compute dtype, `segments` the stacked layers, one Unit per segment of
    `config.segments()`. Every weight lies as the hub stores it, `[out, in]`, behind its layer axis.
    """

    def __init__(
        self,
        config: Qwen3Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        rules: Rules = RULES,
    ):
        """Declare and initialise every parameter, under a mesh laid out on it.

        Args:
            config: the model's shape.
            rngs: gives one key; none is kept.
            dtype: compute dtype.
            param_dtype: storage dtype of parameters.
            rules: which mesh axes split what, where a mesh is set.

        Raises:
            MeshError: the model does not fit the mesh, with the arithmetic.
        """
        pallas_kernels.load_kernels()
        self.config = config
        self.dtype = jnp.dtype(dtype)
        mesh = jax.sharding.get_abstract_mesh()
        self.rules = rules if mesh.empty else fitted(rules, config, mesh)
        with use_rules(self.rules):
            self._declare(rngs, param_dtype)

    def _declare(self, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        config = self.config
        segments = config.segments()
        embed_key, head_key, *keys = jax.random.split(rngs.params(), 2 + len(segments))
        self.embed = Embed(config, embed_key, param_dtype=param_dtype)
        self.segments = nnx.List([])
        for segment, key in zip(segments, keys, strict=True):

            @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
            def unit(key: jax.Array, kinds: tuple[BlockKind, ...] = segment.unit) -> Unit:
                return Unit(config, kinds, key, param_dtype=param_dtype)

            self.segments.append(jax.vmap(unit)(jax.random.split(key, segment.repeats)))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        # Tied embeddings are one parameter: a second attribute holding the same Variable would be untied by jax.
        self.lm_head = nnx.data(None if config.tie_word_embeddings else Embed(config, head_key, param_dtype=param_dtype))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        output: Literal["logits", "hidden"] = "logits",
        *,
        labels: Int[Array, "B T"] | None = None,
        weights: Float[Array, "B T"] | None = None,
        z_loss: float = 0.0,
        fresh: bool = False,
        remat: str = "none",
        layers: Sequence[Layer] | None = None,
    ) -> Output:
        """Run the network. Pure and jittable.

        Args:
            tokens: words, 0 <= token < V.
            positions: position of each token within its document; by default they restart in each segment and go on from
                the cache.
            segment_ids: document of each token, int32, 0 is padding, which may lie anywhere; by default all of a row is one
                document. An id does not come back in a row after another document's.
            cache: keys and values to continue from. Each row's tokens are written at its own length, and its length then
                stands just past its last token that is not padding. There must be room for all of these: under jit, where
                lengths are not known, tokens past a row's last slot are dropped from the cache.
            output: "hidden" leaves the logits out.
            labels: the word that follows each token: asks for the losses, for which never more than a block of tokens' logits
                are in memory. A negative label's loss should not be counted.
            weights: how much each label's loss counts, a constant: asks for their weighted sum in place of each one, whose
                gradient costs a product of tokens by words less.
            z_loss: with weights, what the squared log of the softmax's normaliser counts beside the loss.
            fresh: the cache is empty: attention then reads the call's own keys, T instead of the cache's S.
            remat: what the backward pass keeps (qwen3_jax.model.remat).
            layers: the layers one by one instead of this model's stacks (qwen3_jax.generation.unstack makes them).

        Returns:
            Logits, hidden states, router logits, cache and losses.

        Raises:
            ValueError: inputs of wrong rank, dtype or shape, a cache with too few slots, an unknown output or policy.
        """
        _check_inputs(self.config, tokens, positions, segment_ids, labels, cache, output, fresh)
        _check_weights(weights, z_loss, labels)
        # A call with a cache keeps sequences whole: one token is not split.
        rules = self.rules if cache is None else self.rules.replace(seq=None)
        with use_rules(rules):
            if not meshless():
                check_batch(rules, jax.sharding.get_abstract_mesh(), *tokens.shape)
            return self._run(tokens, positions, segment_ids, labels, weights, z_loss, cache, output, fresh, remat, layers)

    def _run(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        labels: Int[Array, "B T"] | None,
        weights: Float[Array, "B T"] | None,
        z_loss: float,
        cache: Cache | None,
        output: str,
        fresh: bool,
        remat: str,
        layers: Sequence[Layer] | None,
    ) -> Output:
        tokens, places, rows = spread(self.config, tokens, positions, segment_ids, cache, fresh)
        x = self.embed(tokens, self.dtype)
        carry: Carry = (x, None if cache is None else KeyValues(cache.k, cache.v))
        if layers is None:
            carry, routed = self._scan(carry, places, remat)
        else:
            blocks, repeats = [layer.block for layer in layers], [layer.repeat for layer in layers]
            carry, routed = _layers(blocks, carry, places, range(len(layers)), repeats)
            routed = [] if routed is None else [routed]
        x, key_values = carry
        x = self.norm(x, together=True)
        losses = normaliser = weighted = None
        if labels is not None and weights is not None:
            weighted = self._head.weighted_loss(x, in_shard_order(labels), in_shard_order(weights), z_loss)
        elif labels is not None:
            # In the shards' order: two numbers of each token are brought into the text's instead of all of its state.
            found = jnp.stack(self._head.losses(x, in_shard_order(labels)))
            losses, normaliser = in_text_order(found, axis=2)
        hidden = in_text_order(x, axis=1)
        batch, length = tokens.shape
        router, dropped = jnp.zeros((0, batch, length, self.config.num_experts), jnp.float32), jnp.zeros(0, jnp.int32)
        counts = probabilities = router[:, :, 0]
        squares = entropy = jnp.zeros((0, batch), jnp.float32)
        if routed:
            router = in_text_order(jnp.concatenate([segment.logits for segment in routed]), axis=2)
            dropped = jnp.concatenate([segment.dropped for segment in routed])
            counts = jnp.concatenate([segment.counts for segment in routed])
            probabilities = jnp.concatenate([segment.probabilities for segment in routed])
            squares = jnp.concatenate([segment.squares for segment in routed])
            entropy = jnp.concatenate([segment.entropy for segment in routed])
        if rows is not None and key_values is not None:
            cache = Cache(key_values.k, key_values.v, rows.segments, rows.lengths, rows.positions)
        return Output(
            logits=self._head.logits(hidden) if output == "logits" else None,
            hidden=hidden,
            router=router,
            cache=cache,
            dropped=dropped,
            counts=counts,
            probabilities=probabilities,
            squares=squares,
            entropy=entropy,
            losses=losses,
            normaliser=normaliser,
            weighted=weighted,
        )

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of hidden states that the final norm has passed; on a mesh sequences are whole in them."""
        if meshless():
            return self._head.logits(hidden)
        with use_rules(self.rules.replace(seq=None)):
            rows = placed(hidden.reshape(hidden.shape[0], -1, hidden.shape[-1]), "batch", None, None)
            return self._head.logits(rows).reshape(*hidden.shape[:-1], -1)

    @property
    def _head(self) -> Embed:
        return self.embed if self.lm_head is None else self.lm_head

    def _scan(self, carry: Carry, places: Places, remat: str) -> tuple[Carry, list[Routed]]:
        """All segments, one scan each; what became of the rows of each segment that has experts, its layers stacked."""
        routed, first = [], 0
        for unit, segment in zip(self.segments, self.config.segments(), strict=True):
            graph, experts, rest = nnx.split(unit, ExpertParam, ...)
            # With a cache nothing is differentiated: expert weights stay out of the scan's slices, and the grouped matmul reads
            # its layer from the stack. In training a slice is what the gradient wants.
            whole = carry[1] is not None

            size = len(segment.unit)

            def body(carry: Carry, step, graph=graph, experts=experts, first=first, size=size, whole=whole):
                repeat, sliced = step
                parts = (experts, sliced) if whole else sliced
                blocks = nnx.merge(graph, *parts).blocks
                indices = [first + repeat * size + i for i in range(size)]
                return _layers(blocks, carry, places, indices, [repeat if whole else None] * size)

            steps = (jnp.arange(segment.repeats), rest if whole else (experts, rest))
            carry, found = jax.lax.scan(rematerialised(body, remat), carry, steps)
            if found is not None:
                routed.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found))
            first += segment.repeats * size
        return carry, routed


def _layers(
    blocks: Sequence[Block],
    carry: Carry,
    places: Places,
    indices: Sequence[int | jax.Array],
    repeats: Sequence[int | jax.Array | None],
) -> tuple[Carry, Routed | None]:
    """These layers one after another; what became of the rows of those with experts, stacked."""
    x, cache = carry
    routed = []
    for block, index, repeat in zip(blocks, indices, repeats, strict=True):
        x, cache, found = block(x, places, cache, index, repeat)
        if found is not None:
            routed.append(found)
    return (x, cache), jax.tree.map(lambda *leaves: jnp.stack(leaves), *routed) if routed else None


def _check_inputs(
    config: Qwen3Config,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    labels: jax.Array | None,
    cache: Cache | None,
    output: str,
    fresh: bool,
) -> None:
    if output not in ("logits", "hidden"):
        raise ValueError(f"output={output!r}: accepted are 'logits' and 'hidden'")
    for name, array in dict(tokens=tokens, positions=positions, segment_ids=segment_ids, labels=labels).items():
        if array is None:
            continue
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(f"{name} is a {type(array).__name__}: accepted is an array of integers [B, T]")
        if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers [B, T], found {array.dtype}{list(array.shape)}")
        if array.shape != tokens.shape:
            raise ValueError(f"{name} is {list(array.shape)}, tokens are {list(tokens.shape)}: the shapes must be equal")
    batch, length = tokens.shape
    if length == 0:
        raise ValueError("tokens has no columns: a call needs at least one token per row")
    if segment_ids is not None and not isinstance(segment_ids, jax.core.Tracer):
        _check_segments(np.asarray(segment_ids))
    if cache is not None:
        if cache.k.shape[1] != batch:
            raise ValueError(f"the cache has {cache.k.shape[1]} rows, tokens {batch}")
        if fresh and not isinstance(cache.lengths, jax.core.Tracer) and np.asarray(cache.lengths).any():
            raise ValueError(
                f"fresh=True and the cache's rows hold {np.asarray(cache.lengths).tolist()} tokens: accepted is none"
            )
        if length > cache.capacity:
            raise ValueError(f"{length} tokens do not fit the cache: it has {cache.capacity} slots per row")
        if not isinstance(cache.lengths, jax.core.Tracer) and not isinstance(segment_ids, jax.core.Tracer):
            real = np.ones(tokens.shape, bool) if segment_ids is None else np.asarray(segment_ids) != 0
            lacking = np.asarray(cache.lengths) + np.where(real, np.arange(1, length + 1), 0).max(axis=1) - cache.capacity
            if lacking.max() > 0:
                row = int(lacking.argmax())
                raise ValueError(
                    f"row {row} of the tokens does not fit the cache: {lacking[row]} more than the "
                    f"{cache.capacity - int(cache.lengths[row])} of its {cache.capacity} slots that are free"
                )
    chunked = config.dual_chunk_attention_config
    if chunked is not None:
        reach = length if cache is None else cache.capacity
        whole = chunked.chunk_size - chunked.local_size
        if reach > whole:
            raise ValueError(
                f"{reach} slots with dual_chunk_attention_config: up to chunk_size - local_size = {whole} it equals plain "
                "attention and is served; longer needs dual chunk attention, which is not built yet"
            )


def _check_weights(weights: jax.Array | None, z_loss: float, labels: jax.Array | None) -> None:
    if weights is None:
        if z_loss:
            raise ValueError(f"z_loss={z_loss} without weights: accepted is 0, or weights of the labels beside it")
        return
    if labels is None:
        raise ValueError("weights without labels: they say how much each label's loss counts")
    if not isinstance(weights, jax.Array | np.ndarray) or not jnp.issubdtype(weights.dtype, jnp.floating):
        found = getattr(weights, "dtype", type(weights).__name__)
        raise ValueError(f"weights must be an array of floats [B, T], found {found}")
    if weights.shape != labels.shape:
        raise ValueError(f"weights is {list(weights.shape)}, labels are {list(labels.shape)}: the shapes must be equal")


def _check_segments(segments: np.ndarray) -> None:
    """Refuse ids that come back: attention would join what positions hold apart."""
    if segments.min() < 0:
        raise ValueError(f"segment_ids has {segments.min()}: accepted are 0 for padding, and documents from 1")
    for row, ids in enumerate(segments):
        real = ids[ids != 0]
        opened = real[np.flatnonzero(np.diff(real, prepend=0))]
        if len(set(opened.tolist())) < len(opened):
            raise ValueError(
                f"segment_ids of row {row}: an id comes back after another document's: accepted are runs of equal ids"
            )
