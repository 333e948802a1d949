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

from qwen3_jax.generation.budget import BudgetState, ThinkingBudget, begin, enforce
from qwen3_jax.generation.cache import TextCache, grown, init_cache, repeated, with_text, written
from qwen3_jax.generation.door import LogitsHook, Settings, bucket, check_cache, checked_prompts, fitted, make_settings
from qwen3_jax.generation.sample import Sampling, penalised, sample
from qwen3_jax.generation.unstack import on_cpu, unstack, views
from qwen3_jax.generation.values import count
from qwen3_jax.model.cache import Cache
from qwen3_jax.model.transformer import Layer, Qwen3

LENGTH, STOP = 0, 1  # finish_reason
GREEDY = Sampling(temperature=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What generate returns. A pytree; N is max_new_tokens, and B counts samples as rows.

    Attributes:
        tokens: [B, N] int32 without the prompt; a stop token is the row's last; then the config's pad_token_id (0 if none).
        lengths: [B] int32, tokens of each row.
        finish_reason: [B] int32: 0 max_new_tokens were written (or the row's cache is full, see generate), 1 a stop token was.
        logprobs: [B, N] float32, log-probability of each token in the model's own distribution; 0 after the end.
        top_tokens: [B, N, n] int32, the n most probable tokens of each step; n = 0 unless asked for.
        top_logprobs: [B, N, n] float32, their log-probabilities.
        cache: a TextCache that holds prompt and answer of every row, for a next turn.
    """

    tokens: Any
    lengths: Any
    finish_reason: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any
    cache: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
    """A generation under way. N is a bucket, not max_new_tokens.

    Attributes:
        step: int32, tokens that every row still running has.
        logits: [B, V] float32 of the next token.
        done: [B] bool.
        out: a Generated so far.
        budget: a BudgetState.
        counts: [B, V] int32, how often each token was generated.
        prompt: [B, V] bool, tokens of the prompt.
    """

    step: Any
    logits: Any
    done: Any
    out: Any
    budget: Any
    counts: Any
    prompt: Any


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
    prompts, ends = checked_prompts(tokens, lengths, model.config.vocab_size)
    batch = prompts.shape[0]
    if cache is not None:
        check_cache(model.config, cache, batch)
    prompts, room, capacity = fitted(prompts, new, cache, cache_len)
    settings = make_settings(model, batch * samples, sampling, key, stop_tokens, thinking, logits_hook, new, room)
    slots = bucket(new)
    layers = views(model) if on_cpu(model) else None
    unstacked = layers is None and on_cpu(model)
    out = _generate(model, layers, prompts, ends, cache, settings, slots, capacity, logprobs, samples, unstacked)
    if slots == new:
        return out
    cut = {name: getattr(out, name)[:, :new] for name in ("tokens", "logprobs", "top_tokens", "top_logprobs")}
    return dataclasses.replace(out, **cut)


def start(
    model: Qwen3,
    layers: Sequence[Layer] | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Cache,
    settings: Settings,
    slots: int,
    top: int,
    samples: int,
    *,
    fresh: bool = False,
) -> Running:
    """Take the prompts in.

    Args:
        model: any Qwen3.
        layers: its layers one by one, or None to scan them.
        tokens: prompts, padded on the right.
        lengths: real tokens of each row.
        cache: what the prompts follow on; written in place.
        settings: for B * samples rows.
        slots: room for new tokens.
        top: how many of the most probable tokens are kept at each step.
        samples: answers per prompt.
        fresh: the cache is empty, and need not be read.

    Returns:
        A Running with no token yet.
    """
    vocabulary = model.config.vocab_size
    before = with_text(cache)
    fits = before.lengths + lengths <= _room(before, settings)
    real = (jnp.arange(tokens.shape[1], dtype=jnp.int32) < lengths[:, None]) & fits[:, None]
    tokens = jnp.where(real, tokens, 0)  # padding may be any number
    # A row goes on with the document that its cache ended with.
    document = jnp.take_along_axis(cache.segments, jnp.maximum(cache.lengths - 1, 0)[:, None], axis=1)
    segments = jnp.where(real, jnp.where(cache.lengths[:, None] > 0, jnp.maximum(document, 1), 1), 0).astype(jnp.int32)
    seen = model(tokens, segment_ids=segments, cache=cache, output="hidden", fresh=fresh, layers=layers)
    last = jnp.take_along_axis(seen.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    kept = written(before, seen.cache, tokens, False, before.next_forced)
    slot = jnp.arange(kept.capacity, dtype=jnp.int32)
    given = (slot >= before.lengths[:, None]) & (slot < kept.lengths[:, None])
    state = begin(settings.budget, kept.tokens, kept.generated, given, kept.next_forced)
    prompt = _words(jnp.where(real, tokens, -1), vocabulary)
    if isinstance(cache, TextCache):
        prompt |= _words(before.tokens, vocabulary)

    def spread(x: jax.Array) -> jax.Array:
        return x if samples == 1 else jnp.repeat(x, samples, axis=0)

    rows = tokens.shape[0] * samples
    out = Generated(
        tokens=jnp.full((rows, slots), settings.pad, jnp.int32),
        lengths=jnp.zeros((rows,), jnp.int32),
        finish_reason=jnp.zeros((rows,), jnp.int32),
        logprobs=jnp.zeros((rows, slots), jnp.float32),
        top_tokens=jnp.zeros((rows, slots, top), jnp.int32),
        top_logprobs=jnp.zeros((rows, slots, top), jnp.float32),
        cache=repeated(kept, samples),
    )
    return Running(
        step=jnp.int32(0),
        logits=spread(model.logits(last)),
        done=spread(~fits | (kept.lengths >= _room(kept, settings))),
        out=out,
        budget=jax.tree.map(spread, state),
        counts=jnp.zeros((rows, vocabulary), jnp.int32),
        prompt=spread(prompt),
    )


def advance(
    model: Qwen3, layers: Sequence[Layer] | None, running: Running, settings: Settings, until: Int[Array, ""]
) -> Running:
    """Write tokens until every row is done or has `until` of them.

    Args:
        model: any Qwen3.
        layers: its layers one by one, or None to scan them.
        running: what start or advance returned.
        settings: the same as before.
        until: at most settings.limit.

    Returns:
        The Running after them.
    """

    def goes_on(running: Running) -> Bool[Array, ""]:
        return (running.step < until) & ~jnp.all(running.done)

    def step(running: Running) -> Running:
        return _step(model, layers, running, settings)

    return jax.lax.while_loop(goes_on, step, running)


def _step(model: Qwen3, layers: Sequence[Layer] | None, running: Running, settings: Settings) -> Running:
    out, at, alive = running.out, running.step, ~running.done
    rows = jnp.arange(out.lengths.shape[0], dtype=jnp.int32)
    token, forced, budget = _next_tokens(running, settings)
    budget = jax.tree.map(lambda new, old: jnp.where(alive, new, old), budget, running.budget)
    token = jnp.where(alive, token, settings.pad)
    stopped = alive & ~forced & jnp.any(token[:, None] == settings.stop, axis=1)

    raw = running.logits
    normaliser = jax.nn.logsumexp(raw, axis=-1)
    chosen = jnp.take_along_axis(raw, token[:, None], axis=1)[:, 0] - normaliser
    top_logits, top_tokens = jax.lax.top_k(raw, out.top_tokens.shape[-1])
    fed = model(
        token[:, None],
        segment_ids=_documents(out.cache, alive),
        cache=out.cache,
        output="hidden",
        layers=layers,
    )
    cache = written(out.cache, fed.cache, token[:, None], True, budget.next_forced)

    def kept(array: jax.Array, value: jax.Array) -> jax.Array:
        value = jnp.where(alive.reshape(-1, *[1] * (value.ndim - 1)), value, array[:, at])
        return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), at, axis=1)

    return Running(
        step=at + 1,
        logits=model.logits(fed.hidden[:, 0]),
        done=running.done | stopped | (cache.lengths >= _room(cache, settings)) | (at + 1 >= settings.limit),
        out=Generated(
            tokens=kept(out.tokens, token),
            lengths=out.lengths + alive,
            finish_reason=jnp.where(stopped, STOP, out.finish_reason),
            logprobs=kept(out.logprobs, chosen),
            top_tokens=kept(out.top_tokens, top_tokens),
            top_logprobs=kept(out.top_logprobs, top_logits - normaliser[:, None]),
            cache=cache,
        ),
        budget=budget,
        counts=running.counts.at[rows, token].add(alive.astype(jnp.int32)),
        prompt=running.prompt,
    )


def _next_tokens(running: Running, settings: Settings) -> tuple[Int[Array, " B"], Bool[Array, " B"], BudgetState]:
    logits, sampling = running.logits, settings.sampling
    if settings.hook is not None:
        logits = _hooked(settings.hook, logits, running)
    logits = penalised(logits, sampling, running.counts, running.prompt)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(settings.keys, running.step)
    return enforce(settings.budget, running.budget, running.step, sample(logits, sampling, keys))


def _documents(cache: Cache, alive: Bool[Array, " B"]) -> Int[Array, "B 1"]:
    """The document that each row goes on with; padding for rows that are done, which leaves their cache as it is."""
    document = jnp.take_along_axis(cache.segments, (cache.lengths - 1)[:, None], axis=1)
    return jnp.where(alive[:, None], document, 0)


def _hooked(hook: LogitsHook, logits: Float[Array, "B V"], running: Running) -> Float[Array, "B V"]:
    changed: Any = hook(logits, running.out.tokens, running.step)
    if not isinstance(changed, jax.Array) or changed.shape != logits.shape or changed.dtype != logits.dtype:
        found = f"{changed.dtype}{list(changed.shape)}" if isinstance(changed, jax.Array) else f"a {type(changed).__name__}"
        raise ValueError(f"logits_hook returned {found}: accepted is {logits.dtype}{list(logits.shape)}, as it is given")
    return changed


def _room(cache: Cache, settings: Settings) -> Int[Array, ""]:
    """Slots of a row that may be filled."""
    return jnp.minimum(settings.room, cache.capacity)


def _words(tokens: Int[Array, "B S"], vocabulary: int) -> Bool[Array, "B V"]:
    """Which words each row holds; -1 is none."""
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    where = jnp.where(tokens < 0, vocabulary, tokens)  # out of bounds is dropped
    return jnp.zeros((tokens.shape[0], vocabulary), bool).at[rows, where].set(True, mode="drop")


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
    fresh = cache is None
    cache = init_cache(model, tokens.shape[0], capacity) if cache is None else grown(cache, capacity)
    running = start(model, layers, tokens, lengths, cache, settings, slots, top, samples, fresh=fresh)
    return advance(model, layers, running, settings, settings.limit).out
