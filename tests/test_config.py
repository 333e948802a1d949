"""config.json of both transformers generations in and out, and what each means by silence."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.config import ConfigError, RopeScaling
from qwen3_jax.model.rope import rope_tables

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MOE = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
CHUNKED = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def newer(content):
    """The same file as transformers 5 spells it."""
    content = dict(content)
    theta, scaling = content.pop("rope_theta"), content.pop("rope_scaling")
    content["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    content["dtype"] = content.pop("torch_dtype")
    if "num_experts" in content:
        content["num_local_experts"] = content.pop("num_experts")
    return content


def test_the_published_file_reads_to_the_preset():
    assert Qwen3Config.from_hf(DENSE, strict=True) == Qwen3Config.preset("qwen3-0.6b")


@pytest.mark.parametrize("base", [DENSE, MOE])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        YARN,
        {"type": "linear", "factor": 2},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
    ],
)
def test_both_spellings_read_alike_and_come_back(base, scaling):
    content = {**base, "rope_scaling": scaling}
    config = Qwen3Config.from_hf(content, strict=True)
    assert Qwen3Config.from_hf(newer(content), strict=True) == config
    written = json.loads(json.dumps(config.to_hf()))
    assert Qwen3Config.from_hf(written, strict=True) == config
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    if scaling:
        kind = scaling.get("rope_type") or scaling["type"]
        assert config.rope_scaling is not None
        assert config.rope_scaling.kind == written["rope_scaling"]["rope_type"] == kind
        assert written["rope_parameters"]["rope_type"] == kind


def test_the_whole_yarn_table_is_kept():
    given = {**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 0.5, "mscale_all_dim": 1.0, "truncate": False}
    assert Qwen3Config.from_hf({**DENSE, "rope_scaling": given}).rope_scaling == RopeScaling(
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=32768,
        beta_fast=16.0,
        beta_slow=2.0,
        mscale=0.5,
        mscale_all_dim=1.0,
        truncate=False,
    )


def test_silent_files_get_transformers_defaults():
    bare = {key: value for key, value in MOE.items() if key not in ("norm_topk_prob", "rope_theta", "head_dim")}
    config = Qwen3Config.from_hf(bare)
    assert (config.norm_topk_prob, config.rope_theta, config.head_dim) == (False, 1e4, 64)
    assert Qwen3Config.from_hf({k: v for k, v in DENSE.items() if k != "head_dim"}).head_dim == 128


@pytest.mark.parametrize("base", [DENSE, MOE])
def test_a_silent_file_names_no_tokens(base):
    config = Qwen3Config.from_hf({key: value for key, value in base.items() if not key.endswith("token_id")})
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert Qwen3Config.from_hf(config.to_hf(), strict=True) == config


@pytest.mark.parametrize("base", [DENSE, MOE])
def test_a_window_of_unknown_width_is_4096(base):
    content = {key: value for key, value in base.items() if key != "sliding_window"}
    assert Qwen3Config.from_hf(content | {"use_sliding_window": True}).sliding_window == 4096
    assert Qwen3Config.from_hf(content).sliding_window is None


def test_null_key_and_value_heads_are_as_many_as_query_heads():
    assert Qwen3Config.from_hf(DENSE | {"num_key_value_heads": None}).num_key_value_heads == 16
    bare = {"model_type": "qwen3", "num_key_value_heads": None}
    assert Qwen3Config.from_hf(bare).num_key_value_heads == 32


def test_other_tables_are_parsed_and_kept():
    config = Qwen3Config.from_hf({**MOE, "quantization_config": FP8, "dual_chunk_attention_config": CHUNKED})
    assert config.quantization_config is not None and config.dual_chunk_attention_config is not None
    assert config.quantization_config.weight_block_size == (128, 128)
    assert config.quantization_config.modules_to_not_convert == ("lm_head",)
    assert config.dual_chunk_attention_config.local_size == 8192
    assert Qwen3Config.from_hf(config.to_hf(), strict=True) == config


def test_the_keys_that_transformers_5_adds_to_fp8_are_read_where_they_change_nothing():
    more = {"modules_to_convert": None, "dequantize": False, "scale_fmt": "float", "expert_dtype": "fp8"}
    config = Qwen3Config.from_hf({**MOE, "quantization_config": FP8 | more}, strict=True)
    assert config == Qwen3Config.from_hf({**MOE, "quantization_config": FP8}, strict=True)
    silent = Qwen3Config.from_hf({**MOE, "quantization_config": FP8 | {"modules_to_not_convert": None}})
    assert silent.quantization_config is not None and silent.quantization_config.modules_to_not_convert == ()


def test_longropes_original_length_stands_where_either_transformers_looks():
    """4.x reads it beside rope_scaling (and falls back to max_position_embeddings), 5.x inside."""
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    inside = {"rope_type": "longrope", "original_max_position_embeddings": 256, **factors}
    config = Qwen3Config.from_hf({"model_type": "qwen3", "max_position_embeddings": 1024, "rope_scaling": inside})
    written = config.to_hf()
    assert written["original_max_position_embeddings"] == 256
    assert written["rope_parameters"]["original_max_position_embeddings"] == 256
    assert Qwen3Config.from_hf(written) == config
    beside = {"model_type": "qwen3", "max_position_embeddings": 1024, "rope_scaling": {"rope_type": "longrope", **factors}}
    assert Qwen3Config.from_hf(beside | {"original_max_position_embeddings": 256}) == config
    with pytest.raises(ConfigError, match="original_max_position_embeddings is 512 but longrope's own is 256"):
        Qwen3Config.from_hf(written | {"original_max_position_embeddings": 512})
    with pytest.raises(ConfigError, match="original_max_position_embeddings is 512: accepted is it beside rope_scaling"):
        Qwen3Config.from_hf({"model_type": "qwen3", "original_max_position_embeddings": 512})


def test_a_longrope_factor_unlike_the_ratio_is_written_as_what_it_means():
    """transformers 4 takes max_position_embeddings / original in spite of the factor, unless attention_factor is given."""
    scaling = RopeScaling(
        "longrope", factor=4.0, original_max_position_embeddings=600, short_factor=(1.0,) * 64, long_factor=(2.0,) * 64
    )
    config = Qwen3Config(max_position_embeddings=1024, rope_scaling=scaling)
    wanted = math.sqrt(1 + math.log(4.0) / math.log(600))
    for key in ("rope_scaling", "rope_parameters"):
        assert config.to_hf()[key]["attention_factor"] == pytest.approx(wanted)
    positions = jnp.asarray([[0, 3, 700]])
    plain, again = (rope_tables(each, positions, positions + 1) for each in (config, Qwen3Config.from_hf(config.to_hf())))
    np.testing.assert_allclose(plain, again, rtol=1e-6)
