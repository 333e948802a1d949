"""score() against log-probabilities read off the model's own logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_jax.parallel.word_losses as home
from qwen3_jax import score
from tests.model.models import random_model, random_tokens

pytestmark = pytest.mark.usefixtures("quick")


@jax.jit
def expected(model, tokens, segments=None):
    logits = jax.nn.log_softmax(model(tokens, segment_ids=segments).logits)
    chosen = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    return jnp.pad(chosen, ((0, 0), (1, 0)))


@pytest.mark.parametrize("length", [1, 2, 16, 17, 40])
def test_scores_are_the_log_probabilities_whatever_the_block(length, monkeypatch):
    monkeypatch.setattr(home, "LOGITS", 16 * 96)
    jax.clear_caches()
    model, tokens = random_model("moe"), random_tokens(2, length)
    np.testing.assert_allclose(score(model, tokens), expected(model, tokens), atol=1e-5)


def test_first_tokens_and_padding_score_zero():
    model, tokens = random_model("dense"), random_tokens(1, 9)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0, 0]], jnp.int32)
    found = score(model, tokens, segment_ids=segments)
    wanted = expected(model, tokens, segments) * jnp.asarray([[0, 1, 1, 0, 1, 1, 0, 0, 0]])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
