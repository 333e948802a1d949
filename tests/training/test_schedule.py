"""Learning rates by their definition, over stages."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.training.schedule import Phase, schedule


def by_hand(phase, step):
    """The rate in plain Python, another way around than the module's."""
    if step < phase.warmup:
        return phase.peak * (phase.start + (1 - phase.start) * (step + 1) / phase.warmup)
    left = phase.steps - 1 - step
    if phase.kind == "constant":
        return phase.peak
    if phase.kind == "cosine":
        return phase.peak * (phase.end + (1 - phase.end) * (1 - math.cos(math.pi * left / (phase.steps - phase.warmup))) / 2)
    if left >= phase.decay:
        return phase.peak
    return phase.peak * (phase.end + (1 - phase.end) * left / phase.decay)


@st.composite
def phases(draw):
    steps = draw(st.integers(1, 40))
    warmup = draw(st.integers(0, steps))
    kind = draw(st.sampled_from(["cosine", "warmup-stable-decay", "constant"]))
    decay = draw(st.integers(0, steps - warmup)) if kind == "warmup-stable-decay" else 0
    shares = st.floats(0, 1, width=32)
    return Phase(steps, draw(st.sampled_from([1e-3, 3e-4])), kind, draw(shares), warmup, decay, draw(shares))


@settings(deadline=None, max_examples=50)
@given(st.lists(phases(), min_size=1, max_size=3))
def test_each_step_of_each_stage_has_its_rate(given_phases):
    total = sum(phase.steps for phase in given_phases)
    found = jax.vmap(schedule(given_phases))(jnp.arange(total + 3))
    expected = [by_hand(phase, step) for phase in given_phases for step in range(phase.steps)]
    np.testing.assert_allclose(found, expected + [expected[-1]] * 3, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    "words", [dict(steps=0), dict(steps=3, warmup=4), dict(steps=5, warmup=3, decay=3, kind="warmup-stable-decay")]
)
def test_phases_that_do_not_fit_are_refused(words: dict[str, Any]):
    with pytest.raises(ValueError, match="accepted are at least one step"):
        Phase(peak=1e-3, **words)


def test_no_phase_is_refused():
    with pytest.raises(ValueError, match="accepted is at least one"):
        schedule([])
