"""What a generation holds, and what one step of it does with each row by itself: all of it but the calls of the model.

On a mesh these functions see one shard's rows (qwen3_jax.parallel.rules.by_rows), and of a cache all but keys and values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen3_jax.generation.budget import begin, enforce
from qwen3_jax.generation.cache import TextCache, with_text, written
from qwen3_jax.generation.door import RowSettings, Settings
from qwen3_jax.generation.sample import penalised, sample
from qwen3_jax.model.cache import Cache

LENGTH, STOP = 0, 1  # finish_reason


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What generate returns. A pytree; N is max_new_tokens, and B counts samples as rows.

    On a mesh every array is whole on every device, but for the cache: it is split as the model is, and may have more than B
    rows, of which the last ones are padding.

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
    """A generation under way. N is a bucket, not max_new_tokens; on a mesh B counts rows of padding, which are done.

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


def enter(
    cache: Cache, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], room: Int[Array, ""]
) -> tuple[TextCache, Int[Array, "B T"], Int[Array, "B T"]]:
    """What the model is given of the prompts.

    Args:
        cache: what they follow on.
        tokens: prompts, padded on the right.
        lengths: real tokens of each row; 0 is a row of padding.
        room: slots of a row of the cache that may be filled.

    Returns:
        The cache with its text; the tokens; their documents, all 0 for a row that does not fit.
    """
    before = with_text(cache)
    fits = before.lengths + lengths <= jnp.minimum(room, before.capacity)
    real = (jnp.arange(tokens.shape[1], dtype=jnp.int32) < lengths[:, None]) & fits[:, None]
    # A row goes on with the document that its cache ended with.
    document = jnp.take_along_axis(cache.segments, jnp.maximum(cache.lengths - 1, 0)[:, None], axis=1)
    segments = jnp.where(real, jnp.where(cache.lengths[:, None] > 0, jnp.maximum(document, 1), 1), 0).astype(jnp.int32)
    return before, jnp.where(real, tokens, 0), segments  # padding may be any number


def begun(
    before: TextCache,
    after: Cache,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    settings: Settings,
    *,
    vocabulary: int,
    slots: int,
    top: int,
    samples: int,
) -> tuple[Running, Float[Array, "B D"]]:
    """Where rows stand after their prompts.

    Args:
        before: the cache before the model's call.
        after: the cache after it.
        hidden: what the model made of the prompts.
        tokens: of `enter`.
        segments: of `enter`.
        lengths: real tokens of each row.
        settings: without those of rows.
        vocabulary: how many tokens there are.
        slots: room for new tokens.
        top: how many of the most probable tokens are kept at each step.
        samples: rows that each becomes.

    Returns:
        A Running without step, logits, keys and values; and, of the rows given, the hidden state of the last token.
    """
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    kept = written(before, after, tokens, False, before.next_forced)
    slot = jnp.arange(kept.capacity, dtype=jnp.int32)
    given = (slot >= before.lengths[:, None]) & (slot < kept.lengths[:, None])
    state = begin(settings.budget, kept.tokens, kept.generated, given, kept.next_forced)
    done = ~jnp.any(segments != 0, axis=1) | (kept.lengths >= jnp.minimum(settings.room, kept.capacity))
    kept, state, done = jax.tree.map(lambda x: many(x, samples), (kept, state, done))
    rows = done.shape[0]
    out = Generated(
        tokens=jnp.full((rows, slots), settings.pad, jnp.int32),
        lengths=jnp.zeros((rows,), jnp.int32),
        finish_reason=jnp.full((rows,), LENGTH, jnp.int32),
        logprobs=jnp.zeros((rows, slots), jnp.float32),
        top_tokens=jnp.zeros((rows, slots, top), jnp.int32),
        top_logprobs=jnp.zeros((rows, slots, top), jnp.float32),
        cache=kept,
    )
    counts, prompt = jnp.zeros((rows, vocabulary), jnp.int32), _words(kept.tokens, vocabulary)
    return Running(step=None, logits=None, done=done, out=out, budget=state, counts=counts, prompt=prompt), last


def many(x: Array, samples: int) -> Array:
    """Each row of an array so many times."""
    return x if samples == 1 else jnp.repeat(x, samples, axis=0)


def draw(
    running: Running, logits: Float[Array, "B V"], rows: RowSettings, step: Int[Array, ""], settings: Settings
) -> tuple[Int[Array, "B 1"], Int[Array, "B 1"], Running]:
    """The next token of every row, and all that follows from it before the model sees it.

    Args:
        running: without step, keys and values.
        logits: that tokens are drawn by; `running.logits` unless a hook has changed them.
        rows: settings of each row.
        step: tokens that every row still running has.
        settings: without those of rows.

    Returns:
        The tokens; the document that each goes on with, 0 for rows that are done, which leaves their cache as it is; the
        Running after them, without the cache and what does not change.
    """
    out, alive = running.out, ~running.done
    token, forced, budget = _next_tokens(running, logits, rows, step, settings)
    budget = jax.tree.map(lambda new, old: jnp.where(alive, new, old), budget, running.budget)
    token = jnp.where(alive, token, settings.pad)
    stopped = alive & ~forced & jnp.any(token[:, None] == settings.stop, axis=1)

    raw = running.logits
    normaliser = jax.nn.logsumexp(raw, axis=-1)
    chosen = jnp.take_along_axis(raw, token[:, None], axis=1)[:, 0] - normaliser
    top_logits, top_tokens = jax.lax.top_k(raw, out.top_tokens.shape[-1])

    def kept(array: jax.Array, value: jax.Array) -> jax.Array:
        value = jnp.where(alive.reshape(-1, *[1] * (value.ndim - 1)), value, array[:, step])
        return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), step, axis=1)

    following = Running(
        step=None,
        logits=None,
        done=running.done | stopped | (step + 1 >= settings.limit),
        out=Generated(
            tokens=kept(out.tokens, token),
            lengths=out.lengths + alive,
            finish_reason=jnp.where(stopped, STOP, out.finish_reason),
            logprobs=kept(out.logprobs, chosen),
            top_tokens=kept(out.top_tokens, top_tokens),
            top_logprobs=kept(out.top_logprobs, top_logits - normaliser[:, None]),
            cache=None,
        ),
        budget=budget,
        counts=running.counts.at[jnp.arange(token.shape[0], dtype=jnp.int32), token].add(alive.astype(jnp.int32)),
        prompt=None,
    )
    document = jnp.take_along_axis(out.cache.segments, (out.cache.lengths - 1)[:, None], axis=1)
    return token[:, None], jnp.where(alive[:, None], document, 0), following


def _next_tokens(
    running: Running, logits: Float[Array, "B V"], rows: RowSettings, step: Int[Array, ""], settings: Settings
) -> tuple[Int[Array, " B"], Bool[Array, " B"], Any]:
    logits = penalised(logits, rows.sampling, running.counts, running.prompt)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows.keys, step)
    return enforce(settings.budget, rows.budget, running.budget, step, sample(logits, rows.sampling, keys))


def fed(
    before: TextCache,
    after: Cache,
    tokens: Int[Array, "B 1"],
    next_forced: Int[Array, " B"],
    done: Bool[Array, " B"],
    room: Int[Array, ""],
) -> tuple[TextCache, Bool[Array, " B"]]:
    """The cache after the model has seen the tokens, and which rows are done: those whose cache is full too.

    Args:
        before: the cache before the model's call.
        after: the cache after it.
        tokens: of `draw`.
        next_forced: of the budget's state.
        done: of `draw`.
        room: slots of a row that may be filled.

    Returns:
        Both, the cache with its text.
    """
    cache = written(before, after, tokens, True, next_forced)
    return cache, done | (cache.lengths >= jnp.minimum(room, cache.capacity))


def _words(tokens: Int[Array, "B S"], vocabulary: int) -> Bool[Array, "B V"]:
    """Which words each row holds; -1 is none."""
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    where = jnp.where(tokens < 0, vocabulary, tokens)  # out of bounds is dropped
    return jnp.zeros((tokens.shape[0], vocabulary), bool).at[rows, where].set(True, mode="drop")
