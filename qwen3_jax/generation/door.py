"""The door of generation: arguments are checked, prompts padded to buckets, settings brought into a form that is traced."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from qwen3_jax.generation.budget import ThinkingBudget, budget_rule
from qwen3_jax.generation.sample import Sampling, broadcast
from qwen3_jax.model.cache import Cache
from qwen3_jax.model.transformer import Qwen3

LogitsHook = Callable[[Float[Array, "B V"], Int[Array, "B N"], Int[Array, ""]], Float[Array, "B V"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What one call of generate decides, in a fixed form: B rows, and token lists padded with -1.

    Attributes:
        sampling: every field [B].
        keys: [B] typed keys; step t of row b draws with fold_in(keys[b], t).
        stop: [S] int32.
        budget: a BudgetRule.
        hook: a jax.tree_util.Partial of a LogitsHook, or None.
        limit: int32, max_new_tokens.
        pad: int32.
    """

    sampling: Any
    keys: Any
    stop: Any
    budget: Any
    hook: Any
    limit: Any
    pad: Any


def bucket(length: int) -> int:
    """The length that arrays for this many tokens get: four sizes per power of two, at least 16."""
    if length <= 16:
        return 16
    step = 1 << ((length - 1).bit_length() - 3)
    return -(-length // step) * step


def make_settings(
    model: Qwen3,
    rows: int,
    sampling: Sampling,
    key: Key[Array, "..."] | None,
    stop_tokens: Sequence[int] | Int[Array, " S"],
    thinking: ThinkingBudget | None,
    logits_hook: LogitsHook | None,
    max_new_tokens: int,
) -> Settings:
    """Settings of these arguments of generate.

    Args:
        model: for its pad token.
        rows: of the output.
        sampling: numbers, or one per row.
        key: one, or one per row.
        stop_tokens: any number.
        thinking: a budget or None.
        logits_hook: a function, a Partial or None.
        max_new_tokens: the bound.

    Returns:
        The settings.

    Raises:
        ValueError: keys that are neither one nor one per row, stop tokens that are no ids, and what sampling and budget refuse.
    """
    keys = jnp.broadcast_to(jax.random.key(0), (rows,)) if key is None else key
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key is {keys.dtype}{list(keys.shape)}: accepted is a typed key, jax.random.key(seed), or one per row"
        )
    if keys.shape == ():
        keys = jax.vmap(functools.partial(jax.random.fold_in, keys))(jnp.arange(rows))
    if keys.shape != (rows,):
        raise ValueError(f"key has shape {list(keys.shape)}: accepted is one key or [{rows}], one per row")
    stop = jnp.asarray(stop_tokens if len(stop_tokens) else [-1])
    if stop.ndim != 1 or not jnp.issubdtype(stop.dtype, jnp.integer):
        raise ValueError(f"stop_tokens is {stop_tokens!r}: accepted is a sequence of token ids")
    spare = bucket(stop.shape[0]) - stop.shape[0]
    stop = jnp.pad(stop.astype(jnp.int32), (0, spare), constant_values=-1)
    pad = model.config.pad_token_id
    return Settings(
        sampling=broadcast(sampling, rows),
        keys=keys,
        stop=stop,
        budget=budget_rule(thinking, rows),
        hook=logits_hook if logits_hook is None or isinstance(logits_hook, jax.tree_util.Partial) else _partial(logits_hook),
        limit=jnp.int32(max_new_tokens),
        pad=jnp.int32(0 if pad is None else pad),
    )


@functools.cache
def _partial(hook: LogitsHook) -> jax.tree_util.Partial:
    return jax.tree_util.Partial(hook)


def _known(array: Any) -> bool:
    return not isinstance(array, jax.core.Tracer)


def check_prompts(
    tokens: Shaped[Array, "..."],
    lengths: Any,
    max_new_tokens: int,
    logprobs: int,
    samples: int,
    key: Any,
    sampling: Sampling,
) -> int:
    """The number of prompts; ValueError for what generate refuses of these arguments."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or 0 in tokens.shape:
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}: accepted are integers [B, T], at least [1, 1]")
    for name, value, low in (("max_new_tokens", max_new_tokens, 1), ("samples", samples, 1), ("logprobs", logprobs, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} is {value!r}: accepted is an integer >= {low}")
    batch, length = tokens.shape
    if lengths is not None and _known(lengths):
        values = np.asarray(lengths)
        if values.shape != (batch,) or not np.issubdtype(values.dtype, np.integer) or values.min() < 1 or values.max() > length:
            raise ValueError(f"lengths is {lengths}: accepted are {batch} integers from 1 to {length}")
    if key is None and not (_known(sampling.temperature) and np.all(np.asarray(sampling.temperature) == 0)):
        raise ValueError("key is missing: accepted is jax.random.key(seed), or none where every temperature is 0")
    return batch


def fitted(
    model: Qwen3, tokens: jax.Array, max_new_tokens: int, cache: Cache | None, cache_len: int | None
) -> tuple[jax.Array, int, Cache | None]:
    """Prompts padded to a bucket, as far as the cache has room for it, and the cache's slots per row."""
    batch, length = tokens.shape
    padded = bucket(length)
    if cache is None:
        capacity = padded + bucket(max_new_tokens) if cache_len is None else cache_len
        used = 0
    else:
        capacity = cache.capacity if cache_len is None else cache_len
        used = int(cache.lengths.max()) if _known(cache.lengths) else 0
        if cache.k.shape[1] != batch:
            raise ValueError(f"cache has {cache.k.shape[1]} rows, tokens {batch}: accepted are as many")
        if capacity < cache.capacity:
            raise ValueError(f"cache_len is {cache_len}: accepted is at least the {cache.capacity} slots of the cache given")
    needed = used + length + max_new_tokens
    if needed > capacity:
        where = "the cache has" if cache_len is None else "cache_len is"
        raise ValueError(
            f"{where} {capacity} slots per row: {used} in use, {length} tokens and {max_new_tokens} new ones need {needed}; "
            "cache_len makes it larger"
        )
    # Padding is written to the cache too (and overwritten later): it must not run over its end.
    room = cache is None or _known(cache.lengths)
    padded = padded if room and used + padded <= capacity else length
    return jnp.pad(tokens, ((0, 0), (0, padded - length))), capacity, cache
