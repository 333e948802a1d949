"""The jitted loop: what it writes is what the model says, in any batch, over any number of turns, in one program."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import Qwen3, Sampling, ThinkingBudget, generate
from qwen3_jax.generation import loop
from qwen3_jax.generation.unstack import views
from tests.model.models import CONFIGS, random_model, random_tokens

LENGTHS = [13, 5, 9]
HOT = Sampling(temperature=1.2, top_k=30)


@pytest.mark.parametrize("name", ["dense", "mixed", "sliding"])
@pytest.mark.parametrize("unstacked", [True, False], ids=["unstacked", "scanned"])
def test_greedy_rows_are_the_models_first_choices(name, unstacked, monkeypatch):
    """Both ways to run the layers, rows of different lengths, chosen and top log-probabilities of the whole text at once."""
    monkeypatch.setattr(loop, "on_cpu", lambda model: unstacked)
    model, tokens, new = random_model(name), random_tokens(3, 13), 20
    out = generate(model, tokens, lengths=LENGTHS, max_new_tokens=new, logprobs=2)
    assert list(out.lengths) == [new] * 3 and list(out.finish_reason) == [0] * 3
    for row, length in enumerate(LENGTHS):
        text = jnp.concatenate([tokens[row, :length], out.tokens[row]])
        logprobs = jax.nn.log_softmax(whole(model, text[None])[0, length - 1 : -1])
        np.testing.assert_array_equal(out.tokens[row], jnp.argmax(logprobs, axis=-1))
        np.testing.assert_allclose(out.logprobs[row], logprobs.max(-1), atol=2e-5)
        top, best = jax.lax.top_k(logprobs, 2)
        np.testing.assert_array_equal(out.top_tokens[row], best)
        np.testing.assert_allclose(out.top_logprobs[row], top, atol=2e-5)


@jax.jit
def whole(model, tokens):
    return model(tokens).logits


def test_a_row_depends_on_its_key_and_its_step_alone():
    model, tokens, keys = random_model("dense"), random_tokens(4, 9), jax.random.split(jax.random.key(1), 4)
    together = generate(model, tokens, max_new_tokens=12, sampling=HOT, key=keys)
    assert len({tuple(row) for row in np.asarray(together.tokens)}) == 4
    for row in range(4):
        alone = generate(model, tokens[row : row + 1], max_new_tokens=12, sampling=HOT, key=keys[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    turned = generate(model, tokens[::-1], max_new_tokens=12, sampling=HOT, key=keys[::-1])
    np.testing.assert_array_equal(turned.tokens[::-1], together.tokens)


def test_log_probabilities_are_of_the_raw_distribution():
    """Whatever temperature, penalties and a hook do to the draw."""
    model, tokens = random_model("dense"), random_tokens(2, 9)
    sampling = Sampling(temperature=3.0, top_p=0.9, repetition_penalty=1.5, presence_penalty=1.0)
    out = generate(model, tokens, max_new_tokens=8, sampling=sampling, key=jax.random.key(0), logits_hook=doubled)
    text = jnp.concatenate([tokens, out.tokens], axis=1)
    logprobs = jax.nn.log_softmax(whole(model, text)[:, 8:-1])
    np.testing.assert_allclose(out.logprobs, jnp.take_along_axis(logprobs, out.tokens[..., None], axis=-1)[..., 0], atol=2e-5)


def doubled(logits, written, step):
    return 2 * logits


def test_a_hook_sees_what_was_written():
    """It forbids every token that stands in the answer already."""
    model, tokens = random_model("dense"), random_tokens(2, 9)
    out = generate(model, tokens, max_new_tokens=30, logits_hook=fresh)
    assert all(len(set(row)) == 30 for row in np.asarray(out.tokens))


def fresh(logits, written, step):
    rows, columns = jnp.arange(logits.shape[0])[:, None], jnp.arange(written.shape[1])
    return logits.at[rows, jnp.where(columns < step, written, logits.shape[1])].set(-jnp.inf, mode="drop")


def test_samples_share_one_prefill():
    model, tokens, keys = random_model("dense"), random_tokens(2, 9), jax.random.split(jax.random.key(1), 6)
    shared = generate(model, tokens, lengths=[9, 4], max_new_tokens=10, sampling=HOT, key=keys, samples=3)
    apart = generate(model, jnp.repeat(tokens, 3, axis=0), lengths=[9] * 3 + [4] * 3, max_new_tokens=10, sampling=HOT, key=keys)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)

    def flops(prompts, samples):
        run = jax.jit(
            lambda model, tokens, key: generate(model, tokens, max_new_tokens=1, key=key, sampling=HOT, samples=samples)
        )
        compiled = run.lower(model, jnp.zeros((prompts, 128), jnp.int32), jax.random.key(0)).compile()
        return (compiled.cost_analysis() or {})["flops"]

    once, eight = flops(1, 1), flops(1, 8)
    assert eight < 2.5 * once < flops(8, 1)


def test_inside_jit_and_vmap():
    model, tokens, keys = random_model("mixed"), random_tokens(2, 9), jax.random.split(jax.random.key(1), 2)

    def one(row, key, temperature):
        return generate(model, row[None], max_new_tokens=6, sampling=Sampling(temperature), key=key[None]).tokens[0]

    plain = generate(model, tokens, max_new_tokens=6, sampling=Sampling([0.5, 2.0]), key=keys)
    mapped = jax.jit(jax.vmap(one))(tokens, keys, jnp.asarray([0.5, 2.0]))
    np.testing.assert_array_equal(mapped, plain.tokens)


def test_a_program_is_traced_again_only_for_another_bucket(monkeypatch):
    traces, plain = [], loop.start
    monkeypatch.setattr(loop, "start", lambda *args: traces.append(1) or plain(*args))
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


@pytest.mark.parametrize("length", range(1, 300, 7))
def test_buckets(length):
    size = loop.bucket(length)
    assert size >= length and loop.bucket(size) == size
    assert size == 16 or size <= 1.25 * length


def test_stop_tokens_end_their_row_and_the_loop():
    model, tokens = random_model("dense"), random_tokens(3, 9)
    free = np.asarray(generate(model, tokens, max_new_tokens=12).tokens)
    stops = (int(free[0, 3]), int(free[1, 6]))
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), 12) for row in free]
    assert ends[0] <= 4 and ends[1] <= 7
    out = generate(model, tokens, max_new_tokens=12, stop_tokens=stops)
    assert list(out.lengths) == ends
    assert list(out.finish_reason) == [int(free[row, end - 1] in stops) for row, end in enumerate(ends)]
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(out.tokens[row, :end], free[row, :end])
        assert not np.any(out.tokens[row, end:]) and not np.any(out.logprobs[row, end:])
        assert int(out.cache.lengths[row]) == 9 + end

    settings = loop.make_settings(model, 3, loop.GREEDY, None, [int(free[row, 2]) for row in range(3)], None, None, 12)
    cache = loop.init_cache(model, 3, 32)
    running = loop.start(model, None, tokens, jnp.full(3, 9), cache, settings, 16, 0, 1)
    assert int(jax.jit(loop.advance)(model, None, running, settings, settings.limit).step) <= 3


def test_the_last_token_allowed_may_be_a_stop_token():
    model, tokens = random_model("dense"), random_tokens(1, 9)
    last = generate(model, tokens, max_new_tokens=1).tokens[0, 0]
    out = generate(model, tokens, max_new_tokens=1, stop_tokens=[int(last)])
    assert int(out.finish_reason[0]) == 1 and int(out.lengths[0]) == 1


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


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0: accepted is an integer >= 1"),
        (dict(lengths=[9, 0]), "lengths is .* accepted are 2 integers from 1 to 9"),
        (dict(lengths=[9]), "accepted are 2 integers from 1 to 9"),
        (dict(sampling=HOT), "key is missing"),
        (dict(key=jax.random.split(jax.random.key(0), 3)), r"key has shape \[3\]: accepted is one key or \[2\]"),
        (dict(logprobs=-1), "logprobs is -1"),
        (dict(samples=0), "samples is 0"),
        (dict(cache_len=10), "cache_len is 10 slots per row: 0 in use, 9 tokens and 4 new ones need 13"),
        (dict(thinking=ThinkingBudget(-1, 3, (3,))), "thinking: tokens is -1: accepted is an integer >= 0"),
        (dict(thinking=ThinkingBudget(1, 3, ())), "thinking: early_stop_ids is empty"),
        (dict(thinking=ThinkingBudget(np.zeros(3, int), 3, (3,))), r"thinking: tokens has shape \[3\]"),
        (dict(cache="another"), "cache has 1 rows, tokens 2"),
    ],
)
def test_arguments_that_are_refused(options, words):
    model, tokens = random_model("dense"), random_tokens(2, 9)
    if options.get("cache") == "another":
        options = dict(cache=loop.init_cache(model, 1, 64))
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(loop.generate)(model, tokens, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    "key, stop, words",
    [
        (jax.random.PRNGKey(0), (), "accepted is a typed key"),
        (None, [1.5], "stop_tokens is .*accepted is a sequence of token ids"),
    ],
)
def test_keys_and_stop_tokens_that_are_refused(key, stop, words):
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(loop.make_settings)(random_model("dense"), 2, HOT, key, stop, None, None, 4)


@pytest.mark.parametrize("shape, dtype", [((2, 0), jnp.int32), ((9,), jnp.int32), ((2, 9), jnp.float32)])
def test_prompts_that_are_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"accepted are integers \[B, T\]"):
        inspect.unwrap(loop.generate)(random_model("dense"), jnp.zeros(shape, dtype), max_new_tokens=4)


def test_padding_is_the_configs_pad_token():
    model = random_model("dense")
    named = nnx.merge(*nnx.split(model))
    named.config = dataclasses.replace(CONFIGS["dense"], pad_token_id=77)
    tokens = random_tokens(1, 9)
    first = int(generate(model, tokens, max_new_tokens=1).tokens[0, 0])
    out = generate(named, tokens, max_new_tokens=4, stop_tokens=[first])
    assert list(out.tokens[0]) == [first, 77, 77, 77]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_cpu_layers_are_views_of_the_stacks_that_a_later_donation_does_not_disturb(dtype):
    model = Qwen3(CONFIGS["moe"], rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    stack = model.segments[0].blocks[0].attention.q.weight[...]
    layers = views(model)
    assert layers is not None
    for repeat, layer in enumerate(layers):
        found = layer.block.attention.q.weight[...]
        assert found.unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + repeat * found.nbytes
        np.testing.assert_array_equal(found, stack[repeat])
    kept = np.array(stack)
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(stack)
    for repeat, layer in enumerate(layers):
        np.testing.assert_array_equal(layer.block.attention.q.weight[...], kept[repeat])
    np.testing.assert_array_equal(doubled, 2 * kept)


def test_layers_that_are_stored_in_another_dtype_are_copied_and_write_the_same():
    model = Qwen3(CONFIGS["dense"], rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.bfloat16)
    assert views(model) is None
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    tokens = random_tokens(2, 5)
    first, second = (generate(each, tokens, max_new_tokens=12) for each in (model, wide))
    np.testing.assert_array_equal(first.tokens, second.tokens)
