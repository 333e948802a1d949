"""Log-probabilities of given text, without generating."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3_jax.generation.door import beside
from qwen3_jax.generation.rows import padded_rows, whole
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import active_rules, meshless, use_rules


def score(model: Qwen3, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T"]:
    """Log-probability of each token given those before it in its document.

    Logits are made for some tokens at a time, so a long text at a large vocabulary needs no [B, T, V] array.

    Args:
        model: any Qwen3.
        tokens: the text.
        segment_ids: document of each token, 0 is padding; by default all of a row is one document.

    Returns:
        float32; `[:, t]` is the log-probability of `tokens[:, t]`, 0 for the first token of a document and for padding. On a
        mesh it is whole on every device.

    Raises:
        ValueError: segment_ids of another shape than tokens.
    """
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(
            f"segment_ids is {list(segment_ids.shape)}, tokens are {list(tokens.shape)}: accepted are equal shapes"
        )
    with on_mesh_of(model):
        return _score(model, *beside(model, (tokens, segment_ids)))


@jax.jit
def _score(model: Qwen3, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    with use_rules(model.rules):
        batch, length = tokens.shape
        tokens, segments = whole((tokens, segment_ids))
        more = ((0, padded_rows(batch) - batch), (0, _padded_length(length) - length))
        if segments is None and any(after for _, after in more):
            segments = jnp.ones_like(tokens)
        padded = jnp.pad(tokens, more)
        padding = None if segments is None else jnp.pad(segments, more)
        out = model(padded, segment_ids=padding, labels=jnp.roll(padded, -1, axis=1), output="hidden")
        scores = -whole(out.losses)[:batch, : length - 1]
        if segments is not None:
            follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
            scores = jnp.where(follows, scores, 0.0)
        return jnp.pad(scores, ((0, 0), (1, 0)))


def _padded_length(length: int) -> int:
    """The next multiple of two pieces for every shard of the sequence."""
    pieces = 1 if meshless() else 2 * active_rules().shards("seq", jax.sharding.get_abstract_mesh())
    return -(-length // pieces) * pieces
