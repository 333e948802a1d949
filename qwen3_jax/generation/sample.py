"""From logits to a token: penalties, temperature, top-k, top-p, min-p, each row with settings of its own.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p; presence and frequency penalties (which
transformers lacks) stand beside the repetition penalty. Nothing is sorted: the k-th largest logit, and the least logit of the
smallest set that holds the mass p, are found by bisection over the bits of float32, 32 passes that a compiler fuses.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from qwen3_jax.generation.values import known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Every field is a number or one per row [B], and may be traced.

    Attributes:
        temperature: logits are divided by it; 0 is greedy, whatever the filters say.
        top_k: only the k largest logits; 0 is all.
        top_p: only the smallest set whose probability reaches p; 1 is all.
        min_p: only tokens at least min_p times as probable as the first; 0 is all.
        presence_penalty: taken off the logit of every token that was generated.
        frequency_penalty: taken off once for each time it was generated.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or generated; 1 is none.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    presence_penalty: Any = 0.0
    frequency_penalty: Any = 0.0
    repetition_penalty: Any = 1.0


# What each field accepts: lowest, whether that itself is accepted, highest, words for the message.
_BOUNDS = {
    "temperature": (0.0, True, np.inf, "a number >= 0"),
    "top_k": (0, True, np.iinfo(np.int32).max, "an integer >= 0 that int32 holds"),
    "top_p": (0.0, False, 1.0, "a number in (0, 1]"),
    "min_p": (0.0, True, 1.0, "a number in [0, 1]"),
    "presence_penalty": (-np.inf, False, np.inf, "a finite number"),
    "frequency_penalty": (-np.inf, False, np.inf, "a finite number"),
    "repetition_penalty": (0.0, False, np.inf, "a number > 0"),
}


def broadcast(sampling: Sampling, batch: int) -> Sampling:
    """The same settings with one value per row, so that their form never makes a program be traced again.

    Args:
        sampling: numbers, or arrays [B].
        batch: rows.

    Returns:
        Every field [B]: float32, top_k int32.

    Raises:
        ValueError: a value out of bounds (where it is known), or an array that is neither a number nor [B].
    """
    fields = {}
    for name, (low, at_low, high, accepted) in _BOUNDS.items():
        given = getattr(sampling, name)
        values = known(given)
        if values is not None:
            number = np.issubdtype(values.dtype, np.integer) or (name != "top_k" and jnp.issubdtype(values.dtype, jnp.floating))
            # A comparison with NaN is false, so NaN is refused with the rest.
            above = number and np.all(values >= low if at_low else values > low)
            if not (above and np.all(values <= high) and np.all(np.isfinite(values.astype(np.float64)))):
                raise ValueError(f"sampling: {name} is {given}: accepted is {accepted}, or one per row")
        array = jnp.asarray(given, jnp.int32 if name == "top_k" else jnp.float32)
        if array.shape not in ((), (batch,)):
            raise ValueError(f"sampling: {name} has shape {list(array.shape)}: accepted is a number or [{batch}], one per row")
        fields[name] = jnp.broadcast_to(array, (batch,))
    return Sampling(**fields)


def penalised(
    logits: Float[Array, "B V"], sampling: Sampling, counts: Int[Array, "B V"], prompt: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
    """Logits after the penalties.

    Args:
        logits: of the model.
        sampling: one value per row.
        counts: how often each token was generated.
        prompt: which tokens the prompt holds.

    Returns:
        As transformers' RepetitionPenaltyLogitsProcessor, then less `presence * (count > 0) + frequency * count`.
    """
    repetition, presence, frequency = (
        field[:, None] for field in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    )

    def apply(logits: jax.Array) -> jax.Array:
        written = counts > 0
        repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
        logits = jnp.where(written | prompt, repeated, logits)
        return logits - presence * written - frequency * counts

    used = jnp.any(repetition != 1) | jnp.any(presence != 0) | jnp.any(frequency != 0)
    return jax.lax.cond(used, apply, lambda logits: logits, logits)


def filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from: divided by the temperature, -inf for what the filters leave out.

    Args:
        logits: penalised already.
        sampling: one value per row; rows of temperature 0 are left undivided.

    Returns:
        Float32; tokens that tie with the last one kept are kept too.
    """
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    vocabulary = logits.shape[-1]

    def top_k(logits: jax.Array) -> jax.Array:
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)
        bits = _ordered_bits(logits)
        least = _largest(lambda bound: jnp.sum(bits >= bound[:, None], axis=-1) >= k, logits.shape[0])
        return jnp.where(bits >= least[:, None], logits, -jnp.inf)

    def top_p(logits: jax.Array) -> jax.Array:
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        wanted = sampling.top_p * weights.sum(-1)
        bits = _ordered_bits(logits)
        least = _largest(
            lambda bound: jnp.sum(jnp.where(bits >= bound[:, None], weights, 0), axis=-1) >= wanted, logits.shape[0]
        )
        # At p = 1 rounding must not cost the last tokens.
        return jnp.where((bits >= least[:, None]) | (sampling.top_p >= 1)[:, None], logits, -jnp.inf)

    def same(logits: jax.Array) -> jax.Array:
        return logits

    logits = jax.lax.cond(jnp.any(sampling.top_k > 0), top_k, same, logits)
    logits = jax.lax.cond(jnp.any(sampling.top_p < 1), top_p, same, logits)
    # p >= min_p * max(p) in logits; min_p = 0 gives -inf.
    return jnp.where(logits >= (jnp.max(logits, axis=-1) + jnp.log(sampling.min_p))[:, None], logits, -jnp.inf)


def sample(logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token per row.

    Args:
        logits: penalised already.
        sampling: one value per row.
        keys: one per row; a row's draw depends on its own key alone.

    Returns:
        int32 tokens; the first of the largest logits where the temperature is 0.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: jax.Array) -> jax.Array:
        drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda logits: greedy, logits)


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of these float32 values."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Any, batch: int) -> UInt32[Array, " B"]:
    """The largest integer of each row for which `holds`, which is true of 0 and false beyond some point."""

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((batch,), jnp.uint32))
