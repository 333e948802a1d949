"""config.json files as `to_hf` writes them, which transformers 4 and 5 read to our model, and those that they save themselves.

What they read and saved was written down by tools/make_config_fixtures.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.config import Quantization, RopeScaling
from qwen3_jax.model.rope import rope_tables
from tests.parity.cases import CASES

FOLDER = Path(__file__).parent / "fixtures" / "config"
WRITTEN = json.loads((FOLDER / "written.json").read_text())
SAVED = {version: json.loads((FOLDER / f"saved-{version}.json").read_text()) for version in (4, 5)}
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
    for layer, (kind, found) in enumerate(zip(config.block_kinds(), read["layers"], strict=True)):
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


SMALL = Qwen3Config(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rope_theta=1e4,
)
EXPERTS = replace(SMALL, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False, head_dim=8)
SHORT, LONG = (1.0, 1.5) * 32, (2.0, 4.0) * 32
# What the two versions' classes were given (tools/make_config_fixtures.py) means here.
MEANT = {
    "silent": Qwen3Config(
        intermediate_size=22016,
        num_hidden_layers=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        rope_theta=1e4,
    ),
    "dense": replace(SMALL, head_dim=32, attention_bias=True, tie_word_embeddings=True, dtype="float16"),
    "heads": replace(SMALL, num_key_value_heads=8),
    "words": replace(SMALL, bos_token_id=1, eos_token_id=(2, 3), pad_token_id=0),
    "sliding": replace(SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "silent_window": replace(SMALL, use_sliding_window=True, sliding_window=4096, max_window_layers=3),
    "linear": replace(SMALL, rope_theta=1e6, rope_scaling=RopeScaling("linear", factor=2.0)),
    "dynamic": replace(SMALL, rope_theta=1e6, rope_scaling=RopeScaling("dynamic", factor=2.0)),
    "yarn": replace(
        SMALL,
        rope_theta=1e6,
        rope_scaling=RopeScaling("yarn", factor=4.0, original_max_position_embeddings=8192, beta_fast=16.0, beta_slow=2.0),
    ),
    "llama3": replace(
        SMALL,
        rope_theta=5e5,
        rope_scaling=RopeScaling(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=4096
        ),
    ),
    "longrope": replace(
        SMALL,
        rope_theta=1e6,
        rope_scaling=RopeScaling(
            "longrope", factor=4.0, original_max_position_embeddings=8192, short_factor=SHORT, long_factor=LONG
        ),
    ),
    "fp8": replace(SMALL, quantization_config=Quantization(modules_to_not_convert=("lm_head",))),
    "fp8_silent": replace(SMALL, quantization_config=Quantization()),
    "moe_silent": Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=32768,
        rope_theta=1e4,
        num_experts=128,
        norm_topk_prob=False,
    ),
    "moe": replace(EXPERTS, head_dim=32, norm_topk_prob=True),
    "moe_head_dim_of_width": EXPERTS,
    "moe_mixed": replace(EXPERTS, head_dim=32, decoder_sparse_step=2, mlp_only_layers=(3,)),
    "moe_sliding": replace(EXPERTS, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "moe_yarn": replace(
        EXPERTS,
        rope_theta=1e7,
        rope_scaling=RopeScaling("yarn", factor=2.0, original_max_position_embeddings=16384, attention_factor=0.9),
    ),
}


def test_the_files_saved_are_those_named():
    for version, start in ((4, "4.57.6"), (5, "5.23.0")):
        assert {content["transformers_version"] for content in SAVED[version].values()} == {start}
        assert list(SAVED[version]) == list(MEANT)


@pytest.mark.parametrize("version", SAVED)
@pytest.mark.parametrize("name", MEANT)
def test_what_they_save_is_read_to_what_was_meant(name, version):
    config = Qwen3Config.from_hf(SAVED[version][name], strict=True)
    assert config == MEANT[name]
    if name == "moe_sliding":
        assert all(kind.sliding for kind in config.block_kinds())
