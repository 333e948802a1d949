"""256 greedy tokens are transformers' own, token for token; the fixtures hold by how much the closest choice was won."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import generate
from tests.parity import cases
from tests.parity.build import model_of
from tests.parity.test_parity import LIMIT, kept


@pytest.mark.parametrize("name", cases.PADDED)
def test_greedy_tokens(name):
    wanted = kept(name)
    assert wanted["greedy"].shape == (256,) and wanted["greedy_margin"] > LIMIT
    out = generate(model_of(name), jnp.asarray(cases.tokens())[:, :24], max_new_tokens=256)
    np.testing.assert_array_equal(out.tokens[0], wanted["greedy"])
