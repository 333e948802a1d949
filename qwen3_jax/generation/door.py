"""The door of generation: arguments are checked, prompts padded to buckets, settings brought into a form that is traced."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int, Key

from qwen3_jax.generation.budget import UNLIMITED, ThinkingBudget, budget_rule, budget_tokens
from qwen3_jax.generation.rows import padded_rows
from qwen3_jax.generation.sample import Sampling, broadcast
from qwen3_jax.generation.values import check_ids, integers, known
from qwen3_jax.model.cache import Cache
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import mesh_of, on_mesh_of, said

LogitsHook = Callable[[Float[Array, "B V"], Int[Array, "B N"], Int[Array, ""]], Float[Array, "B V"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What one call of generate decides for each row.

    Attributes:
        sampling: a Sampling, every field [B].
        keys: [B] typed keys; step t of row b draws with fold_in(keys[b], t).
        budget: [B] int32, tokens that a thought may take.
    """

    sampling: Any
    keys: Any
    budget: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What one call of generate decides, in a fixed form: B rows, and token lists padded with -1.

    Attributes:
        rows: a RowSettings.
        stop: [S] int32.
        budget: a BudgetRule.
        hook: a jax.tree_util.Partial of a LogitsHook, or None.
        limit: int32, max_new_tokens.
        room: int32, slots of a row of the cache that may be filled.
        pad: int32.
    """

    rows: Any
    stop: Any
    budget: Any
    hook: Any
    limit: Any
    room: Any
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
    sampling: Any,
    key: Any,
    stop_tokens: Any,
    thinking: Any,
    logits_hook: Any,
    max_new_tokens: int,
    room: int = UNLIMITED,
) -> Settings:
    """Settings of these arguments of generate.

    Args:
        model: for its vocabulary and pad token.
        rows: of the output.
        sampling: a Sampling, numbers or one per row.
        key: one, or one per row; None where every temperature is 0.
        stop_tokens: any number.
        thinking: a budget or None.
        logits_hook: a function, a Partial or None.
        max_new_tokens: the bound.
        room: slots of a row of the cache that may be filled, as far as it has them.

    Returns:
        The settings.

    Raises:
        ValueError: an argument that is refused, by name.
    """
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is {sampling!r}: accepted is a Sampling")
    if thinking is not None and not isinstance(thinking, ThinkingBudget):
        raise ValueError(f"thinking is {thinking!r}: accepted is a ThinkingBudget, as tok.thinking_budget(n) makes it, or None")
    vocabulary, pad = model.config.vocab_size, model.config.pad_token_id
    stop = integers(stop_tokens)
    if stop is None or stop.ndim != 1:
        raise ValueError(f"stop_tokens is {stop_tokens!r}: accepted is a sequence of token ids, or none: ()")
    check_ids("stop_tokens", stop, vocabulary)
    spare = bucket(stop.shape[0]) - stop.shape[0]
    return Settings(
        rows=RowSettings(broadcast(sampling, rows), _keys(key, sampling, rows), budget_tokens(thinking, rows)),
        stop=jnp.pad(jnp.asarray(stop, jnp.int32), (0, spare), constant_values=-1),
        budget=budget_rule(thinking, vocabulary),
        hook=_partial(logits_hook),
        limit=jnp.int32(max_new_tokens),
        room=jnp.int32(room),
        pad=jnp.int32(0 if pad is None else pad),
    )


def _keys(key: Any, sampling: Sampling, rows: int) -> Key[Array, " B"]:
    if key is None:
        temperature = known(sampling.temperature)
        if temperature is None or np.any(temperature != 0):
            raise ValueError("key is missing: accepted is jax.random.key(seed), or none where every temperature is 0")
        return jnp.broadcast_to(jax.random.key(0), (rows,))
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        found = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array | np.ndarray) else repr(key)
        raise ValueError(f"key is {found}: accepted is a typed key, jax.random.key(seed), or one per row")
    if key.shape == ():
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows, dtype=jnp.int32))
    if key.shape != (rows,):
        raise ValueError(f"key has shape {list(key.shape)}: accepted is one key or [{rows}], one per row")
    return key


def _partial(hook: Any) -> jax.tree_util.Partial | None:
    """The hook as a pytree. Two of one function are equal, so that it is traced once."""
    if hook is None:
        return None
    if not callable(hook):
        raise ValueError(f"logits_hook is {hook!r}: accepted is a function of logits, written and step")
    partial = hook if isinstance(hook, jax.tree_util.Partial) else jax.tree_util.Partial(hook)
    try:
        hash(partial.func)
    except TypeError:
        # The hash of a bound method is its object's identity, which any object has.
        return jax.tree_util.Partial(partial.func.__call__, *partial.args, **partial.keywords)
    return partial


def checked_prompts(tokens: Any, lengths: Any, vocabulary: int) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Prompts and their lengths as arrays.

    Args:
        tokens: integers [B, T] in any form.
        lengths: of each row, or None.
        vocabulary: how many tokens there are.

    Returns:
        Both as int32.

    Raises:
        ValueError: another form, a length out of bounds, or what is no token; padding may be anything.
    """
    found = integers(tokens)
    if found is None or found.ndim != 2 or 0 in found.shape:
        shown = f"{tokens.dtype}{list(tokens.shape)}" if isinstance(tokens, jax.Array | np.ndarray) else repr(tokens)
        raise ValueError(f"tokens are {shown}: accepted are integers [B, T], at least [1, 1]")
    batch, length = found.shape
    ends = np.full((batch,), length, np.int32) if lengths is None else integers(lengths)
    values = None if ends is None else known(ends)
    outside = values is not None and values.size and (values.min() < 1 or values.max() > length)
    if ends is None or ends.shape != (batch,) or outside:
        raise ValueError(f"lengths is {lengths}: accepted are {batch} integers from 1 to {length}")
    if values is not None:
        check_ids("tokens", found, vocabulary, np.arange(length) < values[:, None])
    return jnp.asarray(found, jnp.int32), jnp.asarray(ends, jnp.int32)


def check_cache(model: Qwen3, cache: Any, batch: int) -> None:
    """Refuse what is no cache of so many rows of that model.

    Args:
        model: whose cache it should be.
        cache: anything.
        batch: prompts.

    Raises:
        ValueError: another type, number of rows, or shape; a cache that lies elsewhere than the model.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}: accepted is a Cache: an earlier turn's `.cache`, or init_cache's")
    home, place = _home(model), _home(cache)
    if home is not None and place is not None and home != place:
        raise ValueError(f"cache lies on {_said(place)} and the model on {_said(home)}: accepted is one place for both")
    config = model.config
    layers, rows, heads, _, width = cache.k.shape
    with on_mesh_of(model):
        padded = padded_rows(batch)
    if rows not in (batch, padded):
        raise ValueError(f"cache has {rows} rows, tokens {batch}: accepted are as many")
    found, wanted = (layers, heads, width), (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    if found != wanted:
        raise ValueError(f"cache is another model's: layers, heads and head_dim are {found}: accepted are {wanted}")


def beside(model: Qwen3, tree: Any) -> Any:
    """Arguments whose arrays lie elsewhere than the model, brought to it; on a mesh whole to every device.

    Args:
        model: any Qwen3. On a mesh of several processes each of them gives the same arguments.
        tree: a pytree; what is no array, or is traced, stays as it is.

    Returns:
        The tree.
    """
    home = _home(model)

    def brought(x: Any) -> Any:
        place = _home(x)
        if home is None or place is None or home == place:
            return x
        # Put on a plain device, an array from a mesh would keep the mesh in its type.
        if not isinstance(home, Mesh):
            return jax.device_put(x, SingleDeviceSharding(home))
        whole = NamedSharding(home, PartitionSpec())
        return jax.device_put(x, whole) if whole.is_fully_addressable else _put_by_all(x, whole)

    return jax.tree.map(brought, tree)


def _put_by_all(x: jax.Array, whole: Sharding) -> jax.Array:
    """An array of each of several processes, on a mesh of them all; jax compares its values, which must be the same."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put_by_all(jax.random.key_data(x), whole), impl=jax.random.key_impl(x))
    return jax.device_put(np.asarray(x), whole)


def _home(tree: Any) -> Mesh | jax.Device | None:
    """The mesh or the device that a tree's first array lies on; None where it is traced or there is none."""
    first = next((leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)), None)
    if first is None or isinstance(first, jax.core.Tracer):
        return None
    return mesh_of(first) or next(iter(first.devices()))


def _said(place: Mesh | jax.Device) -> str:
    return said(place) if isinstance(place, Mesh) else str(place)


def fitted(
    tokens: Int[Array, "B T"], max_new_tokens: int, cache: Cache | None, cache_len: int | None
) -> tuple[Int[Array, "B P"], int, int]:
    """Prompts padded to a bucket, and the size of their cache.

    Args:
        tokens: prompts.
        max_new_tokens: the bound.
        cache: what they follow on, or None.
        cache_len: slots of a row that may be filled; None is what the cache has, or just enough.

    Returns:
        The prompts; the slots of a row that may be filled; the slots that it has, which are a bucket where the caller has not
        made the cache, so that a cache_len that grows seldom makes another program.

    Raises:
        ValueError: prompts and new tokens do not fit, as far as the cache's lengths are known.
    """
    length = tokens.shape[1]
    padded = bucket(length)
    room = cache_len
    if room is None:
        room = padded + bucket(max_new_tokens) if cache is None else cache.capacity
    capacity = room if cache_len is None else bucket(room)
    values = None if cache is None else known(cache.lengths)
    used = 0 if values is None else int(values.max())
    needed = used + length + max_new_tokens
    if needed > room:
        where = "the cache has" if cache_len is None else "cache_len is"
        raise ValueError(
            f"{where} {room} slots per row: {used} in use, {length} tokens and {max_new_tokens} new ones need {needed}; "
            "cache_len makes it larger"
        )
    capacity = capacity if cache is None else max(capacity, cache.capacity)
    # Padding may run over the end of the cache, where it is dropped, but may not be longer than all of it.
    padded = min(padded, capacity)
    return jnp.pad(tokens, ((0, 0), (0, padded - length))), room, capacity
