"""The jitted loop: what it writes is what the model says, in any batch, over any number of turns, in one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import Qwen3, Sampling, generate
from qwen3_jax.generation import loop
from qwen3_jax.generation.unstack import views
from tests.model.models import CONFIGS, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("quick")

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


def test_greedy_rows_do_not_see_the_settings_of_the_others():
    model, tokens = random_model("dense"), random_tokens(3, 9)
    alone = generate(model, tokens, max_new_tokens=10)
    hot = Sampling(
        temperature=jnp.asarray([0.0, 1.5, 0.0]),
        top_k=jnp.asarray([0, 3, 1]),
        top_p=jnp.asarray([1.0, 0.5, 0.1]),
        min_p=jnp.asarray([0.0, 0.3, 0.9]),
        presence_penalty=jnp.asarray([0.0, 1.0, 0.0]),
        repetition_penalty=jnp.asarray([1.0, 1.7, 1.0]),
    )
    beside = generate(model, tokens, max_new_tokens=10, sampling=hot, key=jax.random.key(3))
    np.testing.assert_array_equal(beside.tokens[::2], alone.tokens[::2])


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
    running = loop.start(model, None, tokens, jnp.full(3, 9), settings, capacity=32, slots=16)
    assert int(jax.jit(loop.advance)(model, None, running, settings, settings.limit).step) <= 3


def test_the_last_token_allowed_may_be_a_stop_token():
    model, tokens = random_model("dense"), random_tokens(1, 9)
    last = generate(model, tokens, max_new_tokens=1).tokens[0, 0]
    out = generate(model, tokens, max_new_tokens=1, stop_tokens=[int(last)])
    assert int(out.finish_reason[0]) == 1 and int(out.lengths[0]) == 1


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
