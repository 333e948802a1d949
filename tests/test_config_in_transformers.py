"""config.json files as `to_hf` writes them: transformers 4 and 5 read them to the same model, and it is ours.

What they read was written down by tools/make_config_fixtures.py.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.model.rope import rope_tables
from tests.parity.cases import CASES

FOLDER = Path(__file__).parent / "fixtures" / "config"
WRITTEN = json.loads((FOLDER / "written.json").read_text())
READ = {version: json.loads((FOLDER / f"transformers-{version}.json").read_text()) for version in (4, 5)}


def ours(name) -> Qwen3Config:
    return Qwen3Config.from_hf(CASES[name]) if name in CASES else Qwen3Config.preset(name)


def test_the_versions_are_those_named():
    assert READ[4]["transformers"].startswith("4.57.") and READ[5]["transformers"].startswith("5.")
    assert set(CASES) <= set(WRITTEN) == set(READ[4]["models"]) == set(READ[5]["models"])


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_today_is_what_they_read(name):
    assert json.loads(json.dumps(ours(name).to_hf())) == WRITTEN[name]
    # longrope's attention factor has become explicit, so the file is compared and not the config.
    assert json.loads(json.dumps(Qwen3Config.from_hf(WRITTEN[name], strict=True).to_hf())) == WRITTEN[name]


@pytest.mark.parametrize("version", READ)
@pytest.mark.parametrize("name", WRITTEN)
def test_they_read_our_model(name, version):
    config, read = ours(name), READ[version]["models"][name]
    assert read["parameters"] == config.num_params()
    assert read["dtype"] == config.dtype
    assert len(read["layers"]) == config.num_hidden_layers
    for layer, found in enumerate(read["layers"]):
        kind = config.block_kind(layer)
        window = config.sliding_window if kind.sliding else None
        assert found == {"moe": kind.mlp == "moe", "window": window, "biases": config.attention_bias}, layer
    for key, value in read["keys"].items():
        if key != "model_type":
            mine = getattr(config, key)
            assert value == (list(mine) if isinstance(mine, tuple) else mine), key
    positions = jnp.asarray([READ[version]["positions"]])
    longest = jnp.full(positions.shape, positions.max() + 1)  # transformers takes the longest position of the call
    every = max(1, config.head_dim // 16)
    for name_of, found in zip(("cos", "sin"), rope_tables(config, positions, longest), strict=True):
        np.testing.assert_allclose(found[0, :, ::every], read[name_of], atol=5e-6, err_msg=name_of)
