"""The table of word vectors, read by row going in and, when tied, by product coming out."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.param import normal_param
from qwen3_jax.parallel.vocabulary import look_up, padded_vocabulary, word_logits
from qwen3_jax.parallel.word_losses import WeightedLoss, weighted_word_loss, word_losses


class Embed(nnx.Module):
    """One row per word: `weight` [V, D]. The input table, and the output table (`lm_head`) of an untied model.

    On a mesh V is padded to a multiple of the vocabulary's shards; rows of padding are never read.
    """

    def __init__(self, config: Qwen3Config, key: jax.Array, *, param_dtype: DTypeLike):
        self.words = config.vocab_size
        self.weight = normal_param(
            key,
            (padded_vocabulary(config.vocab_size), config.hidden_size),
            ("vocab", None),
            stddev=config.initializer_range,
            dtype=param_dtype,
        )

    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """The rows of these words, cast to dtype."""
        return look_up(self.weight[...], tokens, dtype)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 product of every hidden state with every word's row, computed in hidden's dtype."""
        return word_logits(self.weight[...], hidden, self.words)

    def losses(
        self, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Negative log-probability of each label, and the log of each softmax's normaliser, without all logits at once."""
        return word_losses(self.weight[...], hidden, labels, self.words)

    def weighted_loss(
        self, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"], weights: Float[Array, "B T"], z_loss: float
    ) -> WeightedLoss:
        """The same summed over tokens by these weights, which costs a product less where it is differentiated."""
        return weighted_word_loss(self.weight[...], hidden, labels, weights, self.words, z_loss)
