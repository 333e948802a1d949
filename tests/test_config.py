"""config.json of both transformers generations in and out, segments, and bad files refused by name."""

import copy
import dataclasses
import json
import math
import random
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.config import BlockKind, ConfigError, RopeScaling, Segment
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


def test_other_tables_are_parsed_and_kept():
    config = Qwen3Config.from_hf({**MOE, "quantization_config": FP8, "dual_chunk_attention_config": CHUNKED})
    assert config.quantization_config is not None and config.dual_chunk_attention_config is not None
    assert config.quantization_config.weight_block_size == (128, 128)
    assert config.quantization_config.modules_to_not_convert == ("lm_head",)
    assert config.dual_chunk_attention_config.local_size == 8192
    assert Qwen3Config.from_hf(config.to_hf(), strict=True) == config


def kinds(text):
    return tuple(BlockKind("moe" if letter == "m" else "dense") for letter in text)


@pytest.mark.parametrize(
    "values, expected",
    [
        (dict(num_hidden_layers=94), [("m", 94)]),
        (dict(num_hidden_layers=94, decoder_sparse_step=2), [("dm", 47)]),
        (dict(num_hidden_layers=5, mlp_only_layers=(0,)), [("d", 1), ("m", 4)]),
        (dict(num_hidden_layers=6, mlp_only_layers=(0, 1, 2, 3, 4, 5)), [("d", 6)]),
        (dict(num_hidden_layers=9, decoder_sparse_step=3), [("ddm", 3)]),
    ],
)
def test_segments(values, expected):
    config = Qwen3Config(num_experts=8, num_experts_per_tok=2, **values)
    assert config.segments() == tuple(Segment(kinds(unit), repeats) for unit, repeats in expected)


def test_segments_are_the_layers_in_order_for_any_choice():
    draw = random.Random(0)
    for _ in range(60):
        layers = draw.randrange(1, 20)
        config = Qwen3Config(
            num_hidden_layers=layers,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=draw.randrange(1, 4),
            mlp_only_layers=tuple(sorted(draw.sample(range(layers), draw.randrange(layers)))),
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=draw.randrange(layers + 1),
        )
        told = [kind for segment in config.segments() for _ in range(segment.repeats) for kind in segment.unit]
        assert told == [config.block_kind(layer) for layer in range(layers)]


def test_an_unknown_key_is_one_warning_or_an_error():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Qwen3Config.from_hf({**DENSE, "hiden_size": 3})
    assert [str(warning.message) for warning in caught] == [
        "config.json has an unknown key 'hiden_size'; did you mean 'hidden_size'?; it is ignored"
    ]
    with pytest.raises(ConfigError, match="hiden_size"):
        Qwen3Config.from_hf({**DENSE, "hiden_size": 3}, strict=True)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(model_type="llama"), "'llama': read are qwen3 and qwen3_moe"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu': accepted is 'silu'"),
        (dict(hidden_size="1024"), "hidden_size is '1024': accepted is int"),
        (dict(hidden_size=True), "hidden_size is True"),
        (dict(hidden_size=-4), "hidden_size is -4"),
        (dict(rope_theta=float("nan")), "rope_theta is nan"),
        (dict(num_attention_heads=15), "no multiple of num_key_value_heads"),
        (dict(qkv_bias=True), "qkv_bias is True: accepted is False"),
        (dict(use_qk_norm=False), "use_qk_norm"),
        (dict(shared_expert_intermediate_size=64), "shared_expert_intermediate_size"),
        (dict(rope_scaling={**YARN, "factr": 2}), "unknown key 'factr'"),
        (dict(rope_scaling={"rope_type": "cubic", "factor": 2}), "'cubic'; accepted are default, linear"),
        (dict(rope_scaling={"rope_type": "linear"}), "needs factor"),
        (dict(rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), "head_dim / 2 = 64"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 5e6}), "rope_theta is 1000000.0 but"),
        (dict(rope_scaling=YARN, rope_parameters={**YARN, "factor": 2.0}), "disagree"),
        (dict(dtype="float32"), "they name one thing"),
        (dict(torch_dtype="int8"), "dtype is 'int8'"),
        (dict(quantization_config={**FP8, "bits": 4}), "unknown key 'bits'"),
        (dict(quantization_config={"quant_method": "awq"}), "'awq'; accepted is fp8"),
        (dict(dual_chunk_attention_config={**CHUNKED, "chunks": 1}), "unknown key 'chunks'"),
        (dict(dual_chunk_attention_config={**CHUNKED, "local_size": 262144}), "0 < local_size < chunk_size"),
        (dict(use_sliding_window=True), "needs a sliding_window"),
        (dict(layer_types=["sliding_attention"] * 28), "layer_types disagrees"),
        (dict(num_experts=8), "model_type is 'qwen3'"),
        (dict(mlp_only_layers=[99]), "mlp_only_layers"),
    ],
)
def test_a_bad_value_is_refused_by_name(change, says):
    with pytest.raises(ConfigError, match=says):
        Qwen3Config.from_hf({**DENSE, **change})


@pytest.mark.parametrize("text, says", [("{", "config.json"), ("[]", "JSON list"), ('{"a": 1, "a": 2}', "stands twice")])
def test_a_broken_file_is_refused_by_its_path(tmp_path, text, says):
    with pytest.raises(ConfigError, match=f"{tmp_path}.*config.json"):
        Qwen3Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        Qwen3Config.from_hf(tmp_path)


def mutated(draw):
    """A changed file, and what becomes of it: the file and the fields that it must read as, or the key at fault."""
    content = copy.deepcopy(draw.choice([DENSE, MOE]))
    content["rope_scaling"] = draw.choice([None, dict(YARN)])
    kind = draw.choice(["order", "spelling", "inert", "value", "value", "type", "sign", "table", "unknown in table"])
    if kind == "order":
        items = list(content.items())
        draw.shuffle(items)
        return dict(items), (content, {}), None
    if kind == "spelling":
        return newer(content), (content, {}), None
    if kind == "inert":
        return {**content, "id2label": {"0": "a"}, "use_cache": False, "qkv_bias": False}, (content, {}), None
    if kind == "value":
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        values = {name: draw.randrange(1, 2**18) for name in sizes}
        values |= {
            "head_dim": 2 * draw.randrange(1, 200),
            "rms_norm_eps": draw.random() + 1e-9,
            "rope_theta": draw.uniform(1, 1e8),
        }
        values |= {"tie_word_embeddings": draw.random() < 0.5, "attention_bias": draw.random() < 0.5}
        changes = {name: values[name] for name in draw.sample(sorted(values), draw.randrange(1, 4))}
        return {**content, **changes}, (content, changes), None
    numbers = [k for k, v in content.items() if isinstance(v, int) and not isinstance(v, bool) and "token" not in k]
    key = draw.choice([k for k in numbers if k != "max_window_layers"])
    if kind == "type":
        return {**content, key: draw.choice(["7", [7], {"x": 1}, True])}, None, key
    if kind == "sign":
        return {**content, key: -content[key] - 1}, None, key
    if kind == "table":
        table = draw.choice(["rope_scaling", "quantization_config", "dual_chunk_attention_config"])
        return {**content, table: draw.choice([7, "x", [1], True])}, None, table
    table, given = draw.choice([("rope_scaling", YARN), ("quantization_config", FP8), ("dual_chunk_attention_config", CHUNKED)])
    name = "".join(draw.choices("abcdefgh_", k=6))
    return {**content, table: {**given, name: 1}}, None, name


def test_a_thousand_mutations_are_read_rightly_or_refused_by_name():
    draw, valid = random.Random(20), 0
    for _ in range(1500):
        content, expected, fault = mutated(draw)
        if expected is not None:
            valid += 1
            original, changes = expected
            wanted = dataclasses.replace(Qwen3Config.from_hf(original, strict=True), **changes)
            assert Qwen3Config.from_hf(content, strict=True) == wanted
        else:
            with pytest.raises(ConfigError, match=fault.replace("[", r"\[")):
                Qwen3Config.from_hf(content, strict=True)
    assert valid > 500


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
