"""Turns and transforms: caches that are continued, inside jit and vmap, and when a program is traced again."""

import dataclasses
import functools
import gc
import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Sampling, ThinkingBudget, generate
from qwen3_jax.generation import loop
from tests.model.models import random_model, random_tokens

pytestmark = pytest.mark.usefixtures("quick")

HOT = Sampling(temperature=1.2, top_k=30)


def counted(monkeypatch):
    """A list that grows by one each time a generation is traced."""
    traces, plain = [], loop.start
    monkeypatch.setattr(loop, "start", lambda *args, **options: traces.append(1) or plain(*args, **options))
    return traces


def test_inside_jit_and_vmap():
    model, tokens, keys = random_model("mixed"), random_tokens(2, 9), jax.random.split(jax.random.key(1), 2)

    def one(row, key, temperature):
        return generate(model, row[None], max_new_tokens=6, sampling=Sampling(temperature), key=key[None]).tokens[0]

    plain = generate(model, tokens, max_new_tokens=6, sampling=Sampling([0.5, 2.0]), key=keys)
    mapped = jax.jit(jax.vmap(one))(tokens, keys, jnp.asarray([0.5, 2.0]))
    np.testing.assert_array_equal(mapped, plain.tokens)


def test_a_program_is_traced_again_only_for_another_bucket(monkeypatch):
    traces = counted(monkeypatch)
    model, tokens = random_model("dense"), random_tokens(2, 40)
    budget = functools.partial(ThinkingBudget, end_id=3, early_stop_ids=(5, 3))

    def run(length, new, **options):
        generate(model, tokens[:, :length], max_new_tokens=new, key=jax.random.key(length), **options)

    run(9, 8)
    assert len(traces) <= 1  # another test may have run this program
    traces.clear()
    run(16, 5, sampling=HOT)
    run(3, 16, sampling=Sampling(temperature=[0.0, 1.0], top_p=0.5, min_p=jnp.asarray([0.1, 0.0])), lengths=[1, 3])
    run(12, 7, stop_tokens=(1, 2, 3), thinking=budget(2))
    run(12, 7, stop_tokens=jnp.arange(9), thinking=budget(jnp.asarray([0, 9])))
    assert not traces
    run(17, 7, cache_len=99)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["mixed", "sliding"])
def test_a_next_turn_continues_from_the_cache(name):
    """Rows end at different places; the second turn's tokens have different lengths; the first turn's cache stays usable."""
    model, tokens, more = random_model(name), random_tokens(2, 9), random_tokens(2, 7, seed=5)
    stop = int(generate(model, tokens, max_new_tokens=10).tokens[0, 4])
    first = generate(model, tokens, lengths=[9, 6], max_new_tokens=10, stop_tokens=[stop], cache_len=80)
    assert first.cache.capacity == 80
    second = generate(model, more, lengths=[7, 3], max_new_tokens=10, cache=first.cache)
    again = generate(model, more, lengths=[7, 3], max_new_tokens=10, cache=first.cache)
    np.testing.assert_array_equal(second.tokens, again.tokens)
    for row, (length, extra) in enumerate(zip([9, 6], [7, 3], strict=True)):
        text = [*tokens[row, :length], *first.tokens[row, : first.lengths[row]], *more[row, :extra]]
        fresh = generate(model, jnp.asarray([text]), max_new_tokens=10)
        np.testing.assert_array_equal(second.tokens[row], fresh.tokens[0])
        np.testing.assert_allclose(second.logprobs[row], fresh.logprobs[0], atol=3e-5)


def test_a_cache_may_be_filled_to_its_last_slot_and_be_made_larger():
    model, tokens = random_model("dense"), random_tokens(2, 9)
    first = generate(model, tokens, max_new_tokens=7, cache_len=16)
    assert list(first.cache.lengths) == [16, 16]
    with pytest.raises(ValueError, match="the cache has 16 slots per row: 16 in use, 4 tokens and 5 new ones need 25"):
        generate(model, tokens[:, :4], max_new_tokens=5, cache=first.cache)
    second = generate(model, tokens[:, :4], max_new_tokens=5, cache=first.cache, cache_len=25)
    text = jnp.concatenate([tokens, first.tokens, tokens[:, :4]], axis=1)
    np.testing.assert_array_equal(second.tokens, generate(model, text, max_new_tokens=5).tokens)


def test_turns_within_one_bucket_are_one_program(monkeypatch):
    """However full the cache is, and however its cache_len grows."""
    traces = counted(monkeypatch)
    model, tokens = random_model("dense"), random_tokens(2, 9)
    first = generate(model, tokens, max_new_tokens=41, cache_len=64)
    assert list(first.cache.lengths) == [50, 50]
    traces.clear()
    for length in (1, 2, 3, 4):
        generate(model, tokens[:, :length], max_new_tokens=4, cache=first.cache)
    assert len(traces) == 1
    for length in (1, 2, 3, 4):
        generate(model, tokens[:, :length], max_new_tokens=4, cache=first.cache, samples=2, key=jax.random.key(0), sampling=HOT)
    assert len(traces) == 2
    traces.clear()
    out = None
    for turn in range(5):
        cache = None if out is None else out.cache
        out = generate(model, tokens[:, : turn + 1], max_new_tokens=4 + turn, cache=cache, cache_len=85 + 2 * turn)
    assert len(traces) == 2  # a new cache and a given one
    assert out is not None and int(out.cache.lengths[0]) == 15 + 30


@pytest.mark.parametrize("used", [10, 12, 13])
def test_padding_past_the_end_of_the_cache_is_dropped(used):
    """A prompt of two in a bucket of 16, and few slots left."""
    model, tokens = random_model("dense"), random_tokens(2, 13)
    bare = loop.init_cache(model, 2, 18)
    first = generate(model, tokens[:, : used - 2], max_new_tokens=2, cache=bare)
    out = generate(model, tokens[:, :2], max_new_tokens=3, cache=first.cache)
    text = jnp.concatenate([tokens[:, : used - 2], first.tokens, tokens[:, :2]], axis=1)
    np.testing.assert_array_equal(out.tokens, generate(model, text, max_new_tokens=3).tokens)


def test_a_cache_of_fewer_slots_than_a_bucket():
    model, tokens = random_model("dense"), random_tokens(1, 4)
    out = generate(model, tokens, max_new_tokens=3, cache=loop.init_cache(model, 1, 7))
    np.testing.assert_array_equal(out.tokens, generate(model, tokens, max_new_tokens=3).tokens)
    assert out.cache.capacity == 7


def test_a_row_whose_cache_is_full_ends_inside_a_jit():
    """Where lengths are traced, so that nothing can be refused. Rows: one full, one cut, one whole; a prompt too long."""
    model, tokens, more = random_model("dense"), random_tokens(4, 9), random_tokens(4, 4, seed=5)
    first = generate(model, tokens, lengths=[9, 5, 2, 9], max_new_tokens=7, cache_len=20)
    assert list(first.cache.lengths) == [16, 12, 9, 16]
    # cache_len is the bound, 20, though the cache has more slots in memory.
    options = dict(max_new_tokens=7, cache_len=20)

    @jax.jit
    def turn(cache, more, lengths):
        return generate(model, more, lengths=lengths, cache=cache, **options)

    lengths = [4, 4, 3, 2]
    full = dataclasses.replace(first.cache, lengths=first.cache.lengths.at[3].set(19))
    out = turn(full, more, jnp.asarray(lengths))
    free = generate(model, more, lengths=lengths, max_new_tokens=7, cache=first.cache, cache_len=40)
    assert list(out.lengths) == [0, 4, 7, 0] and list(out.finish_reason) == [0] * 4
    assert list(out.cache.lengths) == [20, 20, 19, 19]
    for row in range(3):
        length = int(out.lengths[row])
        np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_allclose(out.logprobs[row, :length], free.logprobs[row, :length], atol=2e-5)
        assert not np.any(out.tokens[row, length:]) and not np.any(out.logprobs[row, length:])
    # What a row held is as it was: with room, the turns after it say the same.
    np.testing.assert_array_equal(out.cache.k[:, 3, :, :19], full.k[:, 3, :, :19])
    third = generate(model, more, max_new_tokens=4, cache=out.cache, cache_len=40)
    text = [*tokens[1, :5], *first.tokens[1], *more[1], *out.tokens[1, :4], *more[1]]
    np.testing.assert_array_equal(third.tokens[1], generate(model, jnp.asarray([text]), max_new_tokens=4).tokens[0])


def test_two_turns_inside_one_jit():
    model, tokens, keys = random_model("mixed"), random_tokens(2, 9), jax.random.split(jax.random.key(3), 2)

    def turns(tokens, lengths, more, extra, temperature):
        options = dict(max_new_tokens=5, sampling=Sampling(temperature, repetition_penalty=1.3), key=keys)
        first = generate(model, tokens, lengths=lengths, cache_len=40, **options)
        return first.tokens, generate(model, more, lengths=extra, cache=first.cache, **options).tokens

    arguments = tokens, jnp.asarray([9, 4]), tokens[:, :3], jnp.asarray([2, 3]), jnp.asarray([0.0, 1.0])
    for inside, outside in zip(jax.jit(turns)(*arguments), turns(*arguments), strict=True):
        np.testing.assert_array_equal(inside, outside)


def test_the_repetition_penalty_knows_the_turns_before():
    model, tokens, more = random_model("dense"), random_tokens(2, 9), random_tokens(2, 3, seed=5)
    penalty = Sampling(0.0, repetition_penalty=3.0)
    first = generate(model, tokens, lengths=[9, 4], max_new_tokens=10, sampling=penalty, cache_len=48)
    second = generate(model, more, max_new_tokens=10, sampling=penalty, cache=first.cache)
    for row, length in enumerate([9, 4]):
        text = jnp.concatenate([tokens[row, :length], first.tokens[row], more[row]])
        fresh = generate(model, text[None], max_new_tokens=10, sampling=penalty)
        np.testing.assert_array_equal(second.tokens[row], fresh.tokens[0])


def test_samples_of_a_given_cache():
    model, tokens, keys = random_model("dense"), random_tokens(2, 9), jax.random.split(jax.random.key(1), 6)
    first = generate(model, tokens, lengths=[9, 5], max_new_tokens=3, cache_len=64)
    thinking = ThinkingBudget(jnp.asarray([0, 1, 9, 9, 4, 0]), 3, (7, 3))
    options = dict(max_new_tokens=6, sampling=HOT, key=keys, thinking=thinking)
    shared = generate(model, tokens[:, :4], lengths=[4, 2], cache=first.cache, samples=3, **options)
    apart = {name: jnp.repeat(array, 3, axis=1 if name in "kv" else 0) for name, array in vars(first.cache).items()}
    rows = jnp.repeat(tokens[:, :4], 3, axis=0)
    wanted = generate(model, rows, lengths=[4] * 3 + [2] * 3, cache=type(first.cache)(**apart), **options)
    np.testing.assert_array_equal(shared.tokens, wanted.tokens)
    jax.tree.map(np.testing.assert_array_equal, shared.cache.tokens, wanted.cache.tokens)
    third = generate(model, rows, cache=shared.cache, **options)
    np.testing.assert_array_equal(third.tokens, generate(model, rows, cache=wanted.cache, **options).tokens)


def test_vmap_over_everything_that_may_differ_by_row():
    model, tokens, keys = random_model("dense"), random_tokens(3, 9), jax.random.split(jax.random.key(3), 3)
    lengths, budgets, temperature = jnp.asarray([9, 5, 7]), jnp.asarray([0, 2, 50]), jnp.asarray([0.5, 1.0, 0.0])
    free = generate(model, tokens, lengths=lengths, max_new_tokens=12)
    stops = jnp.asarray([free.tokens[2, 4], 11])

    def run(tokens, lengths, keys, budgets, temperature, stops):
        sampling = Sampling(temperature, 20, 0.9, 0.01, 0.3, 0.1, 1.0)
        thinking = ThinkingBudget(budgets, 3, (7, 8, 3), (1, 5), 1, 2)
        options = dict(sampling=sampling, key=keys, thinking=thinking, stop_tokens=stops, logprobs=2)
        return generate(model, tokens, lengths=lengths, max_new_tokens=12, **options)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, 0, None))
    def mapped(tokens, lengths, key, budgets, temperature, stops):
        return run(tokens[None], lengths[None], key[None], budgets, temperature, stops)

    one = mapped(tokens, lengths, keys, budgets, temperature, stops)
    together = run(tokens, lengths, keys, budgets, temperature, stops)
    for name in ("tokens", "lengths", "finish_reason", "top_tokens"):
        np.testing.assert_array_equal(getattr(one, name)[:, 0], getattr(together, name))
    np.testing.assert_allclose(one.logprobs[:, 0], together.logprobs, atol=2e-5)


def doubled(logits, written, step):
    return 2 * logits


def test_a_hook_is_traced_once_and_not_kept_for_ever(monkeypatch):
    traces = counted(monkeypatch)
    model, tokens = random_model("dense"), random_tokens(1, 3)

    def run(hook):
        return generate(model, tokens, max_new_tokens=2, logits_hook=hook)

    shift = jnp.arange(96.0)
    local = lambda logits, written, step: logits + shift  # noqa: E731
    for hook in (doubled, local):
        traces.clear()
        run(hook)
        run(hook)
        assert len(traces) == 1
    gone = weakref.ref(local)
    del local, hook
    jax.clear_caches()  # jax's own hold it too: as many programs as they are made for
    gc.collect()
    assert gone() is None


@dataclasses.dataclass  # with an __eq__ and without a hash
class Shift:
    by: jax.Array

    def __call__(self, logits, written, step):
        return logits + self.by


def test_a_hook_may_have_no_hash(monkeypatch):
    traces = counted(monkeypatch)
    model, tokens = random_model("dense"), random_tokens(1, 3)
    hooks = [Shift(1e4 * jax.nn.one_hot(word, 96)) for word in (7, 8)]
    for hook, word in zip(hooks * 2, (7, 8) * 2, strict=True):
        assert list(generate(model, tokens, max_new_tokens=2, logits_hook=hook).tokens[0]) == [word, word]
    assert len(traces) == 2


WIDE = """
import sys, jax
if sys.argv[1] == "64":
    jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of what the test takes
from qwen3_jax import Sampling, ThinkingBudget, abstract_model, generate
from tests.model.models import CONFIGS
draw = np.random.default_rng(0)  # jax's own draws depend on the setting
shapes = abstract_model(CONFIGS["dense"], dtype=jnp.float32)
model = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
options = dict(sampling=Sampling(1.0, 20, 0.9, 0.01, 0.1, 0.1, 1.1), key=jax.random.key(0), stop_tokens=[3], logprobs=2)
options |= dict(thinking=ThinkingBudget(6, 3, (3,)), logits_hook=lambda logits, written, step: logits + 1)
first = generate(model, [[5, 6, 7], [8, 9, 0]], lengths=[3, 2], max_new_tokens=9, cache_len=64, **options)
second = generate(model, [[5], [6]], max_new_tokens=9, cache=first.cache, samples=1, **options)
print(first.tokens.tolist(), second.tokens.tolist(), first.tokens.dtype, second.logprobs.dtype)
"""


def test_with_64_bits_the_tokens_are_the_same():
    def run(bits):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run([sys.executable, "-c", WIDE, bits], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("64") == run("32")
