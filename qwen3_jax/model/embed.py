"""The table of word vectors, read by row going in and, when tied, by product coming out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.param import normal_param


class Embed(nnx.Module):
    """One row per word: `weight` [V, D]. The input table, and the output table (`lm_head`) of an untied model."""

    def __init__(self, config: Qwen3Config, key: jax.Array, *, param_dtype: DTypeLike):
        self.weight = normal_param(
            key,
            (config.vocab_size, config.hidden_size),
            ("vocab", "embed"),
            stddev=config.initializer_range,
            dtype=param_dtype,
        )

    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """The rows of these words, cast to dtype."""
        return self.weight[...][tokens].astype(dtype)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 product of every hidden state with every word's row, computed in hidden's dtype."""
        weight = self.weight[...].astype(hidden.dtype)
        return pallas_kernels.rows_matmul(hidden, weight, dtype=jnp.float32)
