"""The same text gives the same logits however it is laid out: whole, in chunks, token by token, padded, packed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax import init_cache
from qwen3_jax.config import RopeScaling
from tests.model.models import CONFIGS, QUICK, random_model, random_tokens

NAMES = sorted(CONFIGS)
CLOSE = dict(rtol=0, atol=2e-5)


def called(model, tokens, options):
    return model(tokens, **options)


jitted = jax.jit(called, compiler_options=QUICK)


def run(model, tokens, **options):
    return jitted(model, tokens, options)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_single_tokens_equal_the_whole(name):
    model, tokens = random_model(name), random_tokens(2, 24)
    whole = run(model, tokens)
    for sizes in ([24], [9, 9, 6], [9, *[1] * 15]):
        cache, at, logits, router = init_cache(model, 2, 32), 0, [], []
        for size in sizes:
            out = run(model, tokens[:, at : at + size], cache=cache)
            cache, at = out.cache, at + size
            logits.append(out.logits)
            router.append(out.router)
        np.testing.assert_allclose(jnp.concatenate(logits, 1), whole.logits, **CLOSE)
        np.testing.assert_allclose(jnp.concatenate(router, 2), whole.router, **CLOSE)
        np.testing.assert_array_equal(cache.lengths, [24, 24])
        np.testing.assert_array_equal(cache.positions, [24, 24])


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_changes_nothing(name):
    model, text = random_model(name), random_tokens(1, 10)
    alone = run(model, text).logits[0]
    rows = jnp.zeros((3, 16), jnp.int32)
    rows = rows.at[0, 6:].set(text[0]).at[1, :10].set(text[0]).at[2].set(random_tokens(1, 16, 5)[0])
    real = jnp.stack([jnp.arange(16) >= 6, jnp.arange(16) < 10, jnp.ones(16, bool)]).astype(jnp.int32)
    logits = run(model, rows, segment_ids=real).logits
    np.testing.assert_allclose(logits[0, 6:], alone, **CLOSE)
    np.testing.assert_allclose(logits[1, :10], alone, **CLOSE)


@pytest.mark.parametrize("name", ["moe", "sliding"])
def test_a_padded_prompt_continues_where_its_text_ended(name):
    model, text = random_model(name), random_tokens(1, 14)
    whole = run(model, text).logits[0]
    # Row 0 has 4 real tokens and trailing padding; row 1 the same behind leading padding; then 10 more in two calls.
    rows = jnp.zeros((2, 8), jnp.int32).at[0, :4].set(text[0, :4]).at[1, 4:].set(text[0, :4])
    real = jnp.stack([jnp.arange(8) < 4, jnp.arange(8) >= 4]).astype(jnp.int32)
    out = run(model, rows, segment_ids=real, cache=init_cache(model, 2, 24))
    np.testing.assert_array_equal(out.cache.lengths, [4, 8])
    np.testing.assert_array_equal(out.cache.positions, [4, 4])
    for at, size in ((4, 3), (7, 7)):
        out = run(model, jnp.repeat(text[:, at : at + size], 2, 0), cache=out.cache)
        np.testing.assert_allclose(out.logits[0], whole[at : at + size], **CLOSE)
        np.testing.assert_allclose(out.logits[1], whole[at : at + size], **CLOSE)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 3), pad=st.integers(0, 3))
def test_packed_documents_do_not_see_each_other(lengths, seed, pad):
    model = random_model("mixed")
    width = 40
    rows, segments = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    places, at = [], pad
    for number, size in enumerate(lengths, 1):
        rows[0, at : at + size] = random_tokens(1, 9, seed + number)[0, :size]
        segments[0, at : at + size] = number
        places.append((at, size))
        at += size
    out = run(model, jnp.asarray(rows), segment_ids=jnp.asarray(segments))
    for number, (at, size) in enumerate(places, 1):
        text = jnp.zeros((1, width), jnp.int32).at[0, :9].set(random_tokens(1, 9, seed + number)[0])
        alone = run(model, text, segment_ids=(jnp.arange(width)[None] < 9).astype(jnp.int32))
        np.testing.assert_allclose(out.logits[0, at : at + size], alone.logits[0, :size], **CLOSE)


@pytest.mark.parametrize("name", ["moe", "sliding"])
def test_padding_within_a_document_is_passed_over(name):
    """A ragged batch's next turn comes padded on the left: positions go on, whatever lies between."""
    model, text = random_model(name), random_tokens(1, 14)
    whole = run(model, text).logits[0]
    if name != "sliding":  # a window is measured in slots, padding among them
        gaps = jnp.zeros((1, 20), jnp.int32).at[0, 2:7].set(text[0, :5]).at[0, 10:19].set(text[0, 5:])
        real = np.zeros((1, 20), np.int32)
        real[0, 2:7] = real[0, 10:19] = 1
        out = run(model, gaps, segment_ids=jnp.asarray(real), cache=init_cache(model, 1, 32))
        np.testing.assert_allclose(out.logits[0, real[0] > 0], whole, **CLOSE)
        np.testing.assert_array_equal(out.cache.positions, [14])
    first = run(model, text[:, :5], cache=init_cache(model, 1, 32))
    padded = jnp.pad(text[:, 5:], ((0, 0), (3, 0)))
    real = (jnp.arange(12) >= 3).astype(jnp.int32)[None]
    rest = run(model, padded, segment_ids=real, cache=first.cache)
    if name != "sliding":
        np.testing.assert_allclose(rest.logits[0, 3:], whole[5:], **CLOSE)
    np.testing.assert_array_equal(rest.cache.lengths, [17])
    np.testing.assert_array_equal(rest.cache.positions, [14])


def test_ids_that_come_back_are_refused():
    for ids in ([1, 1, 2, 2, 1, 0], [1, 0, 2, 0, 0, 1], [-1, 1, 1, 1, 1, 1]):
        with pytest.raises(ValueError, match=r"an id comes back|segment_ids has -1"):
            random_model("dense")(random_tokens(1, 6), segment_ids=jnp.asarray([ids], jnp.int32))


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_cache_is_not_read(name):
    model, text = random_model(name), random_tokens(2, 9)
    real = jnp.asarray([[1] * 9, [0] * 2 + [1] * 5 + [0] * 2], jnp.int32)
    plain = run(model, text, segment_ids=real, cache=init_cache(model, 2, 64))

    @jax.jit
    def fresh(model, text, cache):
        return model(text, segment_ids=real, cache=cache, fresh=True)

    found = fresh(model, text, init_cache(model, 2, 64))
    np.testing.assert_allclose(found.logits, plain.logits, **CLOSE)
    for one, other in zip(jax.tree.leaves(found.cache), jax.tree.leaves(plain.cache), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)
    scores = r"f32\[2,2,2,9,64\]"  # B, K, N/K, T, S
    text_of = str(jax.make_jaxpr(fresh)(model, text, init_cache(model, 2, 64)))
    assert not re.search(scores, text_of)
    assert re.search(scores, str(jax.make_jaxpr(called)(model, text, dict(cache=init_cache(model, 2, 64)))))


def test_what_does_not_fit_is_dropped_under_jit():
    """Where lengths are not known, a full row keeps what it has, and other rows what they get."""
    model, text = random_model("moe"), random_tokens(2, 12)
    full = run(
        model, text[:, :8], segment_ids=jnp.asarray([[1] * 8, [1] * 5 + [0] * 3], jnp.int32), cache=init_cache(model, 2, 8)
    )
    idle = run(model, text[:, 8:10], segment_ids=jnp.asarray([[0, 0], [1, 1]], jnp.int32), cache=full.cache)
    np.testing.assert_array_equal(idle.cache.segments, [[1] * 8, [1] * 7 + [0]])
    np.testing.assert_array_equal(idle.cache.lengths, [8, 7])
    np.testing.assert_array_equal(idle.cache.k[:, 0], full.cache.k[:, 0])
    np.testing.assert_array_equal(idle.cache.k[:, 1, :, :5], full.cache.k[:, 1, :, :5])
    over = run(model, text[:, 8:10], cache=idle.cache)
    np.testing.assert_array_equal(over.cache.k[:, 0], full.cache.k[:, 0])
    np.testing.assert_array_equal(over.cache.k[:, 1, :, :7], idle.cache.k[:, 1, :, :7])
    assert not np.array_equal(over.cache.k[:, 1, :, 7], idle.cache.k[:, 1, :, 7])  # the first of the two found room


SCALED = {
    "linear": RopeScaling(kind="linear", factor=3.0),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=8),
    "llama3": RopeScaling(
        kind="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8
    ),
    "dynamic": RopeScaling(kind="dynamic", factor=2.0),
}


@pytest.mark.parametrize("kind", SCALED)
def test_chunks_with_scaled_rope(kind):
    """Past the original length too; "dynamic" alone rotates by the length so far, and what is cached keeps its rotation."""
    config = dataclasses.replace(CONFIGS["dense"], rope_scaling=SCALED[kind], max_position_embeddings=8)
    graph, params = nnx.split(random_model("dense"), nnx.Param)
    model = nnx.merge(graph, params)
    model.config = config
    tokens = random_tokens(1, 12)
    whole = run(model, tokens)
    first = run(model, tokens[:, :6], cache=init_cache(model, 1, 16))
    rest = run(model, tokens[:, 6:], cache=first.cache)
    if kind == "dynamic":
        assert np.abs(rest.logits - whole.logits[:, 6:]).max() > 1e-3
    else:
        np.testing.assert_allclose(rest.logits, whole.logits[:, 6:], **CLOSE)


def test_segments_carry_over_chunks():
    """A document cut by a chunk's edge goes on; the next begins at position 0 and sees nothing of it."""
    model, first, second = random_model("moe"), random_tokens(1, 7, 1), random_tokens(1, 6, 2)
    tokens = jnp.concatenate([first, second], 1)
    segments = jnp.asarray([[1] * 7 + [2] * 6], jnp.int32)
    out = run(model, tokens[:, :4], segment_ids=segments[:, :4], cache=init_cache(model, 1, 16))
    rest = run(model, tokens[:, 4:], segment_ids=segments[:, 4:], cache=out.cache)
    np.testing.assert_allclose(rest.logits[0, :3], run(model, first).logits[0, 4:], **CLOSE)
    np.testing.assert_allclose(rest.logits[0, 3:], run(model, second).logits[0], **CLOSE)
    np.testing.assert_array_equal(rest.cache.positions, [6])


def test_a_row_of_padding_alone_moves_nothing():
    model = random_model("dense")
    text = random_tokens(2, 5)
    out = run(model, text, cache=init_cache(model, 2, 12))
    idle = run(model, text[:, :2], segment_ids=jnp.asarray([[1, 1], [0, 0]], jnp.int32), cache=out.cache)
    np.testing.assert_array_equal(idle.cache.lengths, [7, 5])
    np.testing.assert_array_equal(idle.cache.positions, [7, 5])


@pytest.mark.parametrize(
    "tokens, options, says",
    [
        (jnp.zeros((2,), jnp.int32), {}, "tokens must be integers"),
        (jnp.zeros((2, 3)), {}, "tokens must be integers"),
        (jnp.zeros((2, 3), jnp.int32), dict(segment_ids=jnp.ones((2, 4), jnp.int32)), "segment_ids is"),
        (jnp.zeros((2, 3), jnp.int32), dict(output="words"), "output='words'"),
        (jnp.zeros((2, 3), jnp.int32), dict(remat="half"), "remat policy 'half'"),
        (jnp.zeros((2, 3), jnp.int32), dict(remat="save:mlp"), "unknown: mlp"),
        (jnp.zeros((2, 0), jnp.int32), {}, "no columns"),
        (jnp.zeros((2, 3), jnp.int32), dict(weights=jnp.ones((2, 3))), "weights without labels"),
        (jnp.zeros((2, 3), jnp.int32), dict(labels=jnp.zeros((2, 3), jnp.int32), z_loss=0.1), "z_loss=0.1 without weights"),
        (
            jnp.zeros((2, 3), jnp.int32),
            dict(labels=jnp.zeros((2, 3), jnp.int32), weights=jnp.ones((2, 4))),
            r"weights is \[2, 4\], labels are \[2, 3\]",
        ),
        (
            jnp.zeros((2, 3), jnp.int32),
            dict(labels=jnp.zeros((2, 3), jnp.int32), weights=jnp.ones((2, 3), jnp.int32)),
            "weights must be an array of floats .* found int32",
        ),
    ],
)
def test_bad_inputs_are_refused_by_name(tokens, options, says):
    call = type(random_model("dense")).__call__
    unchecked = getattr(call, "__wrapped__", call)
    with pytest.raises(ValueError, match=says):
        unchecked(random_model("dense"), tokens, **options)


def test_a_cache_without_room_is_refused():
    model = random_model("dense")
    out = run(model, random_tokens(2, 5), cache=init_cache(model, 2, 6))
    with pytest.raises(ValueError, match="row 0 of the tokens does not fit the cache: 1 more than the 1 of its 6 slots"):
        model(random_tokens(2, 2), cache=out.cache)
    with pytest.raises(ValueError, match="7 tokens do not fit the cache: it has 6 slots"):
        model(random_tokens(2, 7), cache=out.cache)
    with pytest.raises(ValueError, match=r"fresh=True and the cache's rows hold \[5, 5\] tokens"):
        model(random_tokens(2, 1), cache=out.cache, fresh=True)
    with pytest.raises(ValueError, match="the cache has 2 rows, tokens 3"):
        model(random_tokens(3, 1), cache=out.cache)
