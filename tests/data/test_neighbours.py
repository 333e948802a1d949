"""No document's loss depends on what it is packed with: on the network itself, through the loader's batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import Qwen3Config, abstract_model
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from tests.data.conftest import digits

SHAPE: dict[str, Any] = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
HEADS: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=(1,))


@pytest.fixture(scope="module")
def batch(made):
    folder = made([digits(number, int(length)) for number, length in enumerate(np.random.default_rng(0).integers(8, 30, 100))])
    with make_loader(LoaderConfig((Source("web", folder),)), batch=4, seq=64) as loader:
        return next(loader)


def test_no_loss_of_a_document_depends_on_its_neighbours(batch):
    """One layer of experts, and a dense one."""
    graph, params = nnx.split(abstract_model(Qwen3Config(**SHAPE, **HEADS, **EXPERTS), dtype=jnp.float32), nnx.Param)
    draw = np.random.default_rng(0)  # compiling the model's own initialisers takes longer than all the rest
    filled = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(scale=0.3, size=leaf.shape), jnp.float32), params)
    model = nnx.merge(graph, filled)

    @jax.jit
    def jitted(tokens, labels, segments):
        return model(tokens, segment_ids=segments, labels=labels, output="hidden").losses

    def losses(*arrays):
        return np.asarray(jitted(*arrays))

    packed = losses(batch.tokens, batch.labels, batch.segment_ids)
    other_tokens, other_labels = np.array(batch.tokens), np.array(batch.labels)
    row, segments = 0, batch.segment_ids[0]
    assert segments.max() >= 3
    for number in range(1, segments.max() + 1):
        inside = segments == number
        # Its neighbours are other words: not one bit of its losses changes.
        other_tokens[row] = np.where(inside, batch.tokens[row], (batch.tokens[row] + 7) % 400)
        other_labels[row] = np.where(inside, batch.labels[row], (batch.labels[row] + 7) % 400)
        changed = losses(other_tokens, other_labels, batch.segment_ids)
        np.testing.assert_array_equal(changed[row][inside], packed[row][inside])
        assert not np.array_equal(changed[row][~inside & (segments > 0)], packed[row][~inside & (segments > 0)])
        # Alone at a row's beginning it has the same ones.
        alone = np.zeros((3, *batch.tokens.shape), np.int32)
        size = int(inside.sum())
        alone[:, 0, :size] = batch.tokens[row][inside], batch.labels[row][inside], np.ones(size)
        np.testing.assert_allclose(losses(*alone)[0, :size], packed[row][inside], rtol=2e-5, atol=2e-5)
