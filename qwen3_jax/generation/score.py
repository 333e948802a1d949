"""Log-probabilities of given text, without generating."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3_jax.model.transformer import Qwen3

BLOCK = 256  # tokens of each row whose logits exist at one time


def score(model: Qwen3, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T"]:
    """Log-probability of each token given those before it in its document.

    Logits are made for 256 columns at a time, so a long text at a large vocabulary needs no [B, T, V] array.

    Args:
        model: any Qwen3.
        tokens: the text.
        segment_ids: document of each token, 0 is padding; by default all of a row is one document.

    Returns:
        float32; `[:, t]` is the log-probability of `tokens[:, t]`, 0 for the first token of a document and for padding.
    """
    return _score(model, tokens, segment_ids)


@jax.jit
def _score(model: Qwen3, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    hidden = model(tokens, segment_ids=segment_ids, output="hidden").hidden[:, :-1]
    batch, length, width = hidden.shape
    targets = tokens[:, 1:]
    blocks = -(-length // BLOCK)
    spare = ((0, 0), (0, blocks * BLOCK - length))
    columns = jnp.pad(hidden, (*spare, (0, 0))).reshape(batch, blocks, BLOCK, width).swapaxes(0, 1)
    wanted = jnp.pad(targets, spare).reshape(batch, blocks, BLOCK).swapaxes(0, 1)

    def block(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.logits(piece[0])
        chosen = jnp.take_along_axis(logits, piece[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    scores = jax.lax.map(block, (columns, wanted)).swapaxes(0, 1).reshape(batch, -1)[:, :length]
    if segment_ids is not None:
        follows = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
        scores = jnp.where(follows, scores, 0.0)
    return jnp.pad(scores, ((0, 0), (1, 0)))
