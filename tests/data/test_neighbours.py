"""No document's loss depends on what it is packed with: on the network itself, through the loader's batches."""

import functools

import jax
import numpy as np
import pytest

from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from tests.data.batches import digits
from tests.model.models import QUICK, SHAPE, random_model


@pytest.fixture(scope="module")
def batch(made):
    folder = made([digits(number, int(length)) for number, length in enumerate(np.random.default_rng(0).integers(8, 30, 100))])
    with make_loader(LoaderConfig((Source("web", folder),)), batch=4, seq=64) as loader:
        return next(loader)


def test_no_loss_of_a_document_depends_on_its_neighbours(batch):
    """Dense layers and layers of experts."""
    model = random_model("alternating")
    words = SHAPE["vocab_size"]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def jitted(tokens, labels, segments):
        return model(tokens, segment_ids=segments, labels=labels, output="hidden").losses

    def losses(*arrays):
        return np.asarray(jitted(*arrays))

    tokens, labels = batch.tokens % words, batch.labels % words
    packed = losses(tokens, labels, batch.segment_ids)
    other_tokens, other_labels = tokens.copy(), labels.copy()
    row, segments = 0, batch.segment_ids[0]
    assert segments.max() >= 3
    for number in range(1, segments.max() + 1):
        inside = segments == number
        # Its neighbours are other words: not one bit of its losses changes.
        other_tokens[row] = np.where(inside, tokens[row], (tokens[row] + 7) % words)
        other_labels[row] = np.where(inside, labels[row], (labels[row] + 7) % words)
        changed = losses(other_tokens, other_labels, batch.segment_ids)
        np.testing.assert_array_equal(changed[row][inside], packed[row][inside])
        assert not np.array_equal(changed[row][~inside & (segments > 0)], packed[row][~inside & (segments > 0)])
        # Alone at a row's beginning it has the same ones.
        alone = np.zeros((3, *tokens.shape), np.int32)
        size = int(inside.sum())
        alone[:, 0, :size] = tokens[row][inside], labels[row][inside], np.ones(size)
        np.testing.assert_allclose(losses(*alone)[0, :size], packed[row][inside], rtol=2e-5, atol=2e-5)
