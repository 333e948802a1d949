"""Inverse frequencies of every kind: values of the published formulas, worked out in float64, and of the specification."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.config import RopeScaling
from qwen3_jax.model.rope import inverse_frequencies, rope_tables

DIM = 128


def config(scaling=None, theta=1e6, max_positions=40960):
    return Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=DIM,
        max_position_embeddings=max_positions,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def plain(theta):
    return theta ** (-np.arange(0, DIM, 2) / DIM)


@pytest.mark.parametrize("theta, original, low, high", [(1e6, 32768, 23, 40), (5e6, 262144, 29, 45), (1e7, 262144, 28, 43)])
def test_yarn_blends_between_the_published_bounds(theta, original, low, high):
    scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=original)
    frequencies, attention = inverse_frequencies(config(scaling, theta), jnp.zeros((1,), jnp.int32))
    ramp = np.clip((np.arange(64) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(frequencies, plain(theta) * (ramp / 4 + 1 - ramp), rtol=1e-6)
    assert attention == pytest.approx(1.138629436, abs=1e-9)


def test_yarn_attention_factor_is_the_given_one_or_made_of_both_scales():
    given = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32768, attention_factor=0.7)
    assert inverse_frequencies(config(given), jnp.zeros((1,), jnp.int32))[1] == 0.7
    both = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32768, mscale=0.5, mscale_all_dim=2.0)
    expected = (0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1)
    assert inverse_frequencies(config(both), jnp.zeros((1,), jnp.int32))[1] == pytest.approx(expected)


def test_linear_divides():
    frequencies, _ = inverse_frequencies(config(RopeScaling(kind="linear", factor=3.0)), jnp.zeros((1,), jnp.int32))
    np.testing.assert_allclose(frequencies, plain(1e6) / 3, rtol=1e-6)


def test_dynamic_grows_the_base_with_each_document():
    scaled = config(RopeScaling(kind="dynamic", factor=2.0), max_positions=100)
    frequencies, _ = inverse_frequencies(scaled, jnp.asarray([[50, 100, 300]]))
    np.testing.assert_allclose(frequencies[0, 0], plain(1e6), rtol=2e-6)
    np.testing.assert_allclose(frequencies[0, 1], plain(1e6), rtol=2e-6)
    np.testing.assert_allclose(frequencies[0, 2], plain(1e6 * (2 * 300 / 100 - 1) ** (DIM / (DIM - 2))), rtol=2e-6)


def test_llama3_leaves_short_waves_and_divides_long_ones():
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    frequencies, _ = inverse_frequencies(config(scaling, 5e5), jnp.zeros((1,), jnp.int32))
    base = plain(5e5)
    wave = 2 * math.pi / base
    smooth = (8192 / wave - 1) / 3
    expected = np.where(wave > 8192, base / 8, np.where(wave < 2048, base, (1 - smooth) * base / 8 + smooth * base))
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)


def test_longrope_changes_lists_at_the_original_length():
    short, long = tuple(1 + i / 64 for i in range(64)), tuple(2 + i / 8 for i in range(64))
    scaling = RopeScaling(
        kind="longrope", factor=4.0, original_max_position_embeddings=64, short_factor=short, long_factor=long
    )
    frequencies, attention = inverse_frequencies(config(scaling, 1e4), jnp.asarray([64, 65]))
    np.testing.assert_allclose(frequencies[0], plain(1e4) / np.asarray(short), rtol=2e-6)
    np.testing.assert_allclose(frequencies[1], plain(1e4) / np.asarray(long), rtol=2e-6)
    assert attention == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_tables_hold_each_angle_twice():
    positions = jnp.asarray([[0, 1, 77]])
    cos, sin = rope_tables(config(), positions, positions + 1)
    angles = np.concatenate([77 * plain(1e6)] * 2)
    np.testing.assert_allclose(cos[0, 2], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin[0, 2], np.sin(angles), atol=1e-5)
    np.testing.assert_array_equal(cos[0, 0], np.ones(DIM))
