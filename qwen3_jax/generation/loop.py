"""Generation as one jitted program: the prompts in one pass, then a while loop over tokens, ended as soon as every row is done.

`generate` is `start` (prefill) and `advance` (the loop). Whoever wants tokens as they come calls `advance` with a growing
bound on a `Running` that it gives away each time. A step draws a token from the logits at hand, writes it, and feeds it: so the
cache always holds every token that was written, and the next turn needs nothing but its own tokens.

Lengths are padded to buckets, four per power of two, and every setting is traced: another program is compiled only when a
bucket, the number of rows, `logprobs` or the hook changes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from qwen3_jax.generation.budget import ThinkingBudget
from qwen3_jax.generation.cache import grown, in_rows, init_cache, keys_of_samples, without_keys
from qwen3_jax.generation.door import LogitsHook, Settings, beside, bucket, check_cache, checked_prompts, fitted, make_settings
from qwen3_jax.generation.rows import early_copies, padded_rows, taken, whole
from qwen3_jax.generation.sample import Sampling
from qwen3_jax.generation.step import Generated, Running, begun, draw, enter, fed, many
from qwen3_jax.generation.unstack import on_cpu, unstack, views
from qwen3_jax.generation.values import count
from qwen3_jax.model.cache import Cache, KeyValues
from qwen3_jax.model.transformer import Layer, Qwen3
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import by_rows, placed, use_rules

GREEDY = Sampling(temperature=0.0)


def generate(
    model: Qwen3,
    tokens: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    lengths: Integer[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    max_new_tokens: SupportsIndex,
    sampling: Sampling = GREEDY,
    key: Key[Array, "..."] | None = None,
    stop_tokens: Sequence[int] | Integer[Array | np.ndarray, " S"] = (),
    thinking: ThinkingBudget | None = None,
    logprobs: SupportsIndex = 0,
    cache: Cache | None = None,
    cache_len: SupportsIndex | None = None,
    logits_hook: LogitsHook | None = None,
    samples: SupportsIndex = 1,
) -> Generated:
    """Continue prompts. One jitted program; use it inside jit and vmap as you like.

    It runs where the model lies: of a model on a mesh, rows that the mesh does not divide are padded and cut off again.

    What does not fit the cache is refused, except where its lengths are traced, within your own jit: there a row whose cache is
    full ends (finish_reason 0), and one whose prompt does not fit has length 0 and leaves its cache as it is.

    Args:
        model: any Qwen3.
        tokens: prompts, padded on the right.
        lengths: real tokens of each row, 1 to T; None is T.
        max_new_tokens: written at most, per row.
        sampling: how tokens are drawn; greedy by default.
        key: one typed PRNG key (jax.random.key), or one per row of the output; not needed where every temperature is 0. Row b
            of a single key draws with fold_in(key, b).
        stop_tokens: any of them ends its row.
        thinking: a budget for the model's thoughts.
        logprobs: how many of the most probable tokens to return at each step.
        cache: of an earlier turn; `tokens` then follow on what it holds. It is not changed. What generate returned knows its
            text: a thinking budget and the repetition penalty go on from the turns before. Any other Cache knows none: they see
            this call's tokens alone.
        cache_len: slots of a row that may be filled; by default what the given cache has, or just enough. Rounded up to a
            bucket in memory; a given cache that has fewer is made larger.
        logits_hook: `hook(logits [B, V], written [B, N], step) -> logits`, before penalties and filters; pure.
            `written[:, :step]` are the tokens so far. A jax.tree_util.Partial may carry arrays; another function makes
            another program.
        samples: answers per prompt from one prefill; answer i of prompt b is row `b * samples + i`.

    Returns:
        Tokens, how each row ended, log-probabilities and the cache.

    Raises:
        ValueError: an argument that is refused, by name.
    """
    new, samples = count("max_new_tokens", max_new_tokens, 1), count("samples", samples, 1)
    logprobs = count("logprobs", logprobs, 0, model.config.vocab_size)
    cache_len = None if cache_len is None else count("cache_len", cache_len, 1)
    with use_rules(model.rules):
        with on_mesh_of(model, by_shape=False):
            given = (tokens, lengths, sampling, key, stop_tokens, thinking, logits_hook)
            tokens, lengths, sampling, key, stop_tokens, thinking, logits_hook = beside(model, given)
            prompts, ends = checked_prompts(tokens, lengths, model.config.vocab_size)
            batch = prompts.shape[0]
            if cache is not None:
                check_cache(model, cache, batch)
            prompts, room, capacity = fitted(prompts, new, cache, cache_len)
            settings = make_settings(model, batch * samples, sampling, key, stop_tokens, thinking, logits_hook, new, room)
        slots = bucket(new)
        with on_mesh_of(model):
            layers = views(model) if on_cpu(model) else None
            unstacked = layers is None and on_cpu(model)
            out = _generate(model, layers, prompts, ends, cache, settings, slots, capacity, logprobs, samples, unstacked)
        if slots == new:
            return out
        with on_mesh_of(model, by_shape=False):
            cut = {name: getattr(out, name)[:, :new] for name in ("tokens", "logprobs", "top_tokens", "top_logprobs")}
        return dataclasses.replace(out, **cut)


def start(
    model: Qwen3,
    layers: Sequence[Layer] | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    settings: Settings,
    *,
    cache: Cache | None = None,
    capacity: int,
    slots: int,
    top: int = 0,
    samples: int = 1,
) -> Running:
    """Take the prompts in.

    Args:
        model: any Qwen3; the mesh that it lies on is set.
        layers: its layers one by one, or None to scan them.
        tokens: prompts, padded on the right.
        lengths: real tokens of each row.
        settings: for B * samples rows.
        cache: what the prompts follow on, written in place; None is an empty one.
        capacity: slots per row of the cache, at least as many as it has.
        slots: room for new tokens.
        top: how many of the most probable tokens are kept at each step.
        samples: answers per prompt.

    Returns:
        A Running with no token yet, for as many rows as the mesh divides.
    """
    with use_rules(model.rules):
        copies = early_copies(tokens.shape[0], samples)
        real, samples = tokens.shape[0] * copies, samples // copies
        rows = padded_rows(real)
        tokens, lengths = (taken(x, rows, copies) for x in whole((tokens, lengths)))
        lengths = jnp.where(jnp.arange(rows, dtype=jnp.int32) < real, lengths, 0)
        fresh = cache is None
        cache = init_cache(model, rows, capacity) if cache is None else grown(in_rows(cache, rows, copies), capacity)

        before, tokens, segments = by_rows(enter, without_keys(cache), tokens, lengths, whole=(settings.room,))
        seen = model(tokens, segment_ids=segments, cache=cache, output="hidden", fresh=fresh, layers=layers)
        run = functools.partial(begun, vocabulary=model.config.vocab_size, slots=slots, top=top, samples=samples)
        prompts = (before, without_keys(seen.cache), seen.hidden, tokens, segments, lengths)
        running, last = by_rows(run, *prompts, whole=(_shared(settings),))
        logits = by_rows(lambda logits: many(logits, samples), model.logits(last))
        running = dataclasses.replace(running, step=jnp.int32(0), logits=logits)
        return _with_keys(running, keys_of_samples(seen.cache, samples))


def advance(
    model: Qwen3, layers: Sequence[Layer] | None, running: Running, settings: Settings, until: Int[Array, ""]
) -> Running:
    """Write tokens until every row is done or has `until` of them.

    Args:
        model: any Qwen3; the mesh that it lies on is set.
        layers: its layers one by one, or None to scan them.
        running: what start or advance returned.
        settings: the same as before.
        until: at most settings.limit.

    Returns:
        The Running after them.
    """
    with use_rules(model.rules):
        rows, padded = settings.rows.budget.shape[0], running.done.shape[0]
        per_row = jax.tree.map(lambda x: placed(taken(x, padded), "batch"), whole(settings.rows))
        settings = dataclasses.replace(settings, rows=per_row)

        def goes_on(running: Running) -> Bool[Array, ""]:
            return (running.step < until) & ~jnp.all(running.done)

        def step(running: Running) -> Running:
            return _step(model, layers, running, settings, rows)

        return jax.lax.while_loop(goes_on, step, running)


def _step(model: Qwen3, layers: Sequence[Layer] | None, running: Running, settings: Settings, rows: int) -> Running:
    cache, at = running.out.cache, running.step
    logits = running.logits if settings.hook is None else _hooked(settings.hook, running, rows)
    by_row = dataclasses.replace(running, step=None, out=dataclasses.replace(running.out, cache=without_keys(cache)))
    tokens, documents, after = by_rows(draw, by_row, logits, settings.rows, whole=(at, _shared(settings)))
    seen = model(tokens, segment_ids=documents, cache=cache, output="hidden", layers=layers)
    texts = (without_keys(cache), without_keys(seen.cache), tokens, after.budget.next_forced, after.done)
    text, done = by_rows(fed, *texts, whole=(settings.room,))
    out = dataclasses.replace(after.out, cache=text)
    # Placed again, for a single row's layout is lost on the way.
    logits = placed(model.logits(seen.hidden[:, 0]), "batch", None)
    after = dataclasses.replace(after, step=at + 1, logits=logits, done=done, out=out, prompt=running.prompt)
    return _with_keys(after, KeyValues(seen.cache.k, seen.cache.v))


def _hooked(hook: LogitsHook, running: Running, rows: int) -> Float[Array, "B V"]:
    """Logits that the hook has changed: it is given the caller's rows, on a mesh whole on every device."""
    padded = running.logits.shape[0]
    logits, tokens = (x[:rows] for x in whole((running.logits, running.out.tokens)))
    changed: Any = hook(logits, tokens, running.step)
    if not isinstance(changed, jax.Array) or changed.shape != logits.shape or changed.dtype != logits.dtype:
        found = f"{changed.dtype}{list(changed.shape)}" if isinstance(changed, jax.Array) else f"a {type(changed).__name__}"
        raise ValueError(f"logits_hook returned {found}: accepted is {logits.dtype}{list(logits.shape)}, as it is given")
    return placed(taken(whole(changed), padded), "batch", None)


def _shared(settings: Settings) -> Settings:
    """What all rows share, but for the hook."""
    return dataclasses.replace(settings, rows=None, hook=None)


def _with_keys(running: Running, keys: KeyValues) -> Running:
    cache = dataclasses.replace(running.out.cache, k=keys.k, v=keys.v)
    return dataclasses.replace(running, out=dataclasses.replace(running.out, cache=cache))


def finished(model: Qwen3, out: Generated, rows: int) -> Generated:
    """What has been generated, without the mesh's padding; all but the cache whole on every device.

    Args:
        model: whose rules the arrays are split by.
        out: of a Running.
        rows: that the caller knows of.

    Returns:
        The Generated to be returned.
    """
    with use_rules(model.rules):
        seen = jax.tree.map(lambda x: x[:rows], whole(dataclasses.replace(out, cache=None)))
        return dataclasses.replace(seen, cache=out.cache)


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10))
def _generate(
    model: Qwen3,
    layers: Sequence[Layer] | None,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache | None,
    settings: Settings,
    slots: int,
    capacity: int,
    top: int,
    samples: int,
    unstacked: bool,
) -> Generated:
    if unstacked:
        layers = unstack(model)
    sizes = dict(capacity=capacity, slots=slots, top=top, samples=samples)
    running = start(model, layers, tokens, lengths, settings, cache=cache, **sizes)
    running = advance(model, layers, running, settings, settings.limit)
    return finished(model, running.out, tokens.shape[0] * samples)
