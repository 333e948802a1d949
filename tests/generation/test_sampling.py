"""The distribution that the jitted `generate` draws from is the one that transformers' processors leave."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax import Qwen3, Qwen3Config, Sampling, generate
from qwen3_jax.generation.sample import broadcast, filtered, sample

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "generation" / "sampling.json").read_text("utf-8"))
DRAWS = 3000  # of each row


@functools.cache
def smallest_model():
    """Its logits are replaced by the hook: what counts is that thousands of rows are quick."""
    shape = dict(vocab_size=96, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=8)
    config = Qwen3Config(**shape, num_attention_heads=1, num_key_value_heads=1)
    return Qwen3(config, rngs=nnx.Rngs(0), dtype=jnp.float32)


def replay(written, logits, shape, _, step):
    """A hook: the written tokens first, whatever the settings, then these logits."""
    forced = jnp.where(jnp.arange(logits.shape[0]) == written[jnp.minimum(step, written.shape[0] - 1)], 1e4, -1e4)
    return jnp.broadcast_to(jnp.where(step < written.shape[0], forced, logits), shape.shape)


def fields(rows):
    """Rows of settings as one Sampling, a value per drawn row."""
    neutral = Sampling()
    names = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    values = {name: [row["settings"].get(name, getattr(neutral, name)) for row in rows] for name in names}
    return Sampling(**{name: jnp.repeat(jnp.asarray(value), DRAWS) for name, value in values.items()})


@pytest.mark.parametrize("case", FIXTURE["cases"])
def test_four_rows_with_settings_of_their_own(case):
    rows, written = FIXTURE["cases"][case], FIXTURE["written"]
    hook = jax.tree_util.Partial(replay, jnp.asarray(written), jnp.asarray(FIXTURE["logits"], jnp.float32))
    out = generate(
        smallest_model(),
        jnp.asarray([FIXTURE["prompt"]] * 4),
        max_new_tokens=len(written) + 1,
        sampling=fields(rows),
        key=jax.random.key(7),
        logits_hook=hook,
        samples=DRAWS,
    )
    np.testing.assert_array_equal(out.tokens[:, : len(written)], np.tile(written, (4 * DRAWS, 1)))
    drawn = np.asarray(out.tokens[:, len(written)]).reshape(4, DRAWS)
    for row, tokens in zip(rows, drawn, strict=True):
        expected = np.asarray(row["probabilities"], np.float64)
        expected *= DRAWS / expected.sum()
        observed = np.bincount(tokens, minlength=len(expected))
        assert observed[expected == 0].sum() == 0, row["settings"]
        # Cells of fewer than five expected draws are one cell.
        common = expected >= 5
        cells = [np.append(counts[common], counts[~common].sum()) for counts in (observed, expected)]
        if cells[1][-1] < 5:
            cells = [np.append(counts[:-2], counts[-2:].sum()) for counts in cells]
        if len(cells[1]) > 1:
            assert scipy.stats.chisquare(*cells).pvalue > 1e-3, row["settings"]


def plain_filter(logits, temperature, top_k, top_p, min_p):
    """The filters by sorting, in float64."""
    logits = logits.astype(np.float64) / temperature
    ranked = np.argsort(-logits, kind="stable")
    keep = np.zeros(len(logits), bool)
    keep[ranked[: top_k or len(logits)]] = True
    logits = np.where(keep, logits, -np.inf)
    weights = np.exp(logits - logits.max())
    before = np.cumsum(weights[ranked]) - weights[ranked]
    keep[ranked] &= (before < top_p * weights.sum()) | (top_p >= 1)
    return keep & (weights >= min_p)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 120),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_by_bisection_equal_filters_by_sorting(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 3, 96).astype(np.float32)
    kept = np.asarray(filter_one(logits, broadcast(Sampling(temperature, top_k, top_p, min_p), 1)))
    wanted = plain_filter(logits, temperature, top_k, top_p, min_p)
    # A token exactly at a bound may fall on either side of it by rounding: at most one does.
    assert np.sum(kept != wanted) <= 1
    assert kept[np.argmax(logits)]


@jax.jit
def filter_one(logits, sampling):
    return jnp.isfinite(filtered(logits[None], sampling)[0])


def test_what_ties_with_the_last_token_kept_is_kept():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0, 3.0]])
    kept = filtered(logits, broadcast(Sampling(top_k=2), 1))
    np.testing.assert_array_equal(jnp.isfinite(kept[0]), [False, True, True, False, True])


def test_temperature_zero_is_greedy_beside_rows_that_draw():
    logits = jnp.tile(jnp.asarray([0.0, 5.0, 4.9, -1.0]), (2, 1))
    draw = functools.partial(sample, logits, broadcast(Sampling(temperature=[0.0, 3.0]), 2))
    tokens = np.stack([draw(jax.random.split(jax.random.key(seed), 2)) for seed in range(40)])
    assert set(tokens[:, 0]) == {1}
    assert len(set(tokens[:, 1])) > 2


@pytest.mark.parametrize(
    "sampling, words",
    [
        (Sampling(temperature=-1), "temperature is -1: accepted is a number >= 0"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(top_k=2.5), "top_k is 2.5: accepted is an integer >= 0"),
        (Sampling(top_p=0.0), r"top_p is 0.0: accepted is a number in \(0, 1\]"),
        (Sampling(min_p=1.5), "min_p is 1.5"),
        (Sampling(repetition_penalty=0), "repetition_penalty is 0: accepted is a number > 0"),
        (Sampling(presence_penalty=float("inf")), "presence_penalty is inf: accepted is a finite number"),
        (Sampling(temperature=[1.0, 1.0, 1.0]), r"temperature has shape \[3\]: accepted is a number or \[2\]"),
    ],
)
def test_settings_that_are_refused(sampling, words):
    with pytest.raises(ValueError, match=words):
        broadcast(sampling, 2)
