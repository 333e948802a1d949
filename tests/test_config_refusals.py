"""Bad config.json files are refused by name: each key, each kind of wrong value, in a file and in a call."""

import copy
import dataclasses
import json
import random
import subprocess
import sys
import warnings

import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.config import ConfigError
from qwen3_jax.hf_config import SPELLINGS
from tests.test_config import CHUNKED, DENSE, FP8, MOE, YARN, newer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.0,
    "short_factor": [1.0] * 64,
    "long_factor": [2.0] * 64,
}
WHOLE_YARN = {
    **YARN,
    "attention_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "truncate": True,
}
FP8_5 = {**FP8, "modules_to_convert": None, "dequantize": False, "scale_fmt": "float", "expert_dtype": "fp8"}
SPARSE = {
    **CHUNKED,
    "sparse_attention_enabled": True,
    "sparse_attention_config": {"0": [1]},
    "sparse_attention_threshold": 32768,
    "sparse_attention_last_q": 64,
}
NAN, INF = float("nan"), float("inf")


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
        (dict(quantization_config={"quant_method": "awq", "bits": 4}), "'awq', a method that isn't read: accepted is 'fp8'"),
        (dict(quantization_config={"bits": 4, "quant_method": "gptq", "sym": True}), "'gptq', a method that isn't read"),
        (dict(quantization_config={}), "quant_method is None"),
        (dict(quantization_config={"fmt": "e4m3"}), "quant_method is None"),
        (dict(quantization_config={**FP8, "modules_to_not_convert": ""}), "modules_to_not_convert is '': accepted is a list"),
        (dict(quantization_config={**FP8, "weight_block_size": None}), "weight_block_size is None"),
        (dict(quantization_config={**FP8_5, "modules_to_convert": ["lm_head"]}), "modules_to_convert is .*accepted is null"),
        (dict(quantization_config={**FP8_5, "dequantize": True}), "dequantize is True: accepted is False"),
        (dict(quantization_config={**FP8_5, "dequantize": 0}), "dequantize is 0: accepted is False"),
        (dict(quantization_config={**FP8_5, "scale_fmt": "ue8m0"}), "scale_fmt is 'ue8m0': accepted is 'float'"),
        (dict(quantization_config={**FP8_5, "expert_dtype": "fp4"}), "expert_dtype is 'fp4': accepted is 'fp8'"),
        (dict(dual_chunk_attention_config={**CHUNKED, "chunks": 1}), "unknown key 'chunks'"),
        (dict(dual_chunk_attention_config={**CHUNKED, "local_size": 262144}), "0 < local_size < chunk_size"),
        (dict(dual_chunk_attention_config={**CHUNKED, "original_max_position_embeddings": 0}), "original.* is 0.*at least 1"),
        (dict(dual_chunk_attention_config={**SPARSE, "sparse_attention_threshold": -5}), "sparse_attention_threshold is -5"),
        (dict(dual_chunk_attention_config={**SPARSE, "sparse_attention_last_q": -1}), "sparse_attention_last_q is -1"),
        (dict(dual_chunk_attention_config=CHUNKED, rope_scaling=YARN), "dual_chunk_attention_config and rope_scaling .*'yarn'"),
        (dict(use_sliding_window=True), "needs a sliding_window"),
        (dict(model_type=["qwen3"]), r"model_type is \['qwen3'\]: read are"),
        (dict(model_type={}), "model_type is {}: read are"),
        (dict(rope_theta=10**400), "rope_theta is 1000.*accepted is a finite number"),
        (dict(rope_theta=10**5000), "rope_theta is a int too long to print"),
        (dict(rope_theta=1.0), "rope_theta is 1.0: accepted is a number above 1"),
        (dict(rms_norm_eps=10**400), "rms_norm_eps is 1000"),
        (dict(hidden_size=2**31), "hidden_size is 2147483648: accepted is at most 2147483647"),
        (dict(num_hidden_layers=10**8), "num_hidden_layers is 100000000: accepted is at most 100000"),
        (dict(model_type="qwen3_moe", num_experts=10**6), "num_experts is 1000000: accepted is at most 100000"),
        (dict(model_type="qwen3_moe", num_key_value_heads=None), "num_key_value_heads is null: accepted is int"),
        ({3: 4}, "has a key 3: accepted are strings"),
        (dict(rope_scaling={**YARN, 3: 4}), "unknown key 3"),
        (dict(rope_scaling={**YARN, "factor": NAN}), "factor is nan"),
        (dict(rope_scaling={**WHOLE_YARN, "attention_factor": INF}), "attention_factor is inf"),
        (dict(rope_scaling={**WHOLE_YARN, "mscale": -1.0}), "mscale is -1.0"),
        (dict(rope_scaling={**LLAMA3, "high_freq_factor": INF}), "high_freq_factor is inf"),
        (dict(rope_scaling={**LONGROPE, "long_factor": [1.0] * 63 + [NAN]}), r"long_factor\[63\] is nan"),
        (dict(rope_scaling={**LONGROPE, "short_factor": [1.0] * 63 + [INF]}), r"short_factor\[63\] is inf"),
        (dict(rope_scaling={**LONGROPE, "original_max_position_embeddings": 1}), "original_max_position_embeddings is 1"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, head_dim=2), "head_dim is 2"),
        (dict(eos_token_id=[]), "eos_token_id is an empty list"),
        (dict(eos_token_id=-7), "eos_token_id is -7"),
        (dict(eos_token_id=[0, 151936]), "eos_token_id is 151936: accepted is None, or 0 to vocab_size - 1 = 151935"),
        (dict(bos_token_id=151936), "bos_token_id is 151936"),
        (dict(pad_token_id=-1), "pad_token_id is -1"),
        (dict(sliding_window="x"), "sliding_window is 'x'"),
        (dict(layer_types=["sliding_attention"] * 28), "layer_types disagrees"),
        (dict(num_experts=8), "model_type is 'qwen3'"),
        (dict(mlp_only_layers=[99]), "mlp_only_layers"),
    ],
)
def test_a_bad_value_is_refused_by_name(change, says):
    with pytest.raises(ConfigError, match=says):
        Qwen3Config.from_hf({**DENSE, **change})


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "config.json"),
        ("[]", "JSON list"),
        ("7", "JSON int"),
        ("null", "JSON NoneType"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"model_type": "qwen3", "hidden_size": ' + "1" * 5000 + "}", "4300 digits"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_broken_file_is_refused_by_its_path(tmp_path, text, says):
    with pytest.raises(ConfigError, match=f"{tmp_path}.*config.json"):
        Qwen3Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}.*config.json.*{says}" if says != "config.json" else says):
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
        values |= {"vocab_size": draw.randrange(151646, 2**18), "num_hidden_layers": draw.randrange(1, 2**10)}
        values |= {
            "head_dim": 2 * draw.randrange(1, 200),
            "rms_norm_eps": draw.random() + 1e-9,
            "rope_theta": draw.uniform(1.1, 1e8),
        }
        values |= {"tie_word_embeddings": draw.random() < 0.5, "attention_bias": draw.random() < 0.5}
        changes = {name: values[name] for name in draw.sample(sorted(values), draw.randrange(1, 4))}
        return {**content, **changes}, (content, changes), None
    numbers = [k for k, v in content.items() if isinstance(v, int) and not isinstance(v, bool) and "token" not in k]
    key = draw.choice([k for k in numbers if k != "max_window_layers"])
    if kind == "type":
        wrong = ["7", [7], {"x": 1}, True, [], {}, "", 7.0, NAN, INF, -INF, 10**10, 10**400, -(10**400), 10**5000]
        return {**content, key: draw.choice(wrong)}, None, key
    if kind == "sign":
        return {**content, key: -content[key] - 1}, None, key
    if kind == "table":
        table = draw.choice(["rope_scaling", "quantization_config", "dual_chunk_attention_config"])
        return {**content, table: draw.choice([7, "x", [1], True, NAN, 10**400, "", 0, False, []])}, None, table
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


# A value of every kind that JSON or a careless caller can hold.
VALUES = [None, True, "x", "", 0, -1, 1.5, NAN, INF, -INF, 1e308, 10**20, 10**400, -(10**400), 10**5000]
VALUES += [[], [1], ["a"], [[1]], [None], {}, {"a": 1}, {1: 2}]


def everywhere():
    """Every value in the place of every key, top-level and inside each table: (key, content)."""
    more = dict(pad_token_id=0, layer_types=None, rope_parameters=None, num_local_experts=None, dtype=None, qkv_bias=False)
    more |= dict(original_max_position_embeddings=None, rope_theta=1e6, sliding_window=None, attention_bias=False)
    scalings = [WHOLE_YARN, LONGROPE, LLAMA3, {"rope_type": "dynamic", "factor": 2.0}]
    tables = [("rope_scaling", table) for table in scalings]
    tables += [("quantization_config", FP8_5), ("dual_chunk_attention_config", SPARSE)]
    for base in (DENSE, MOE):
        for value in VALUES:
            for key in {**base, **more}:
                yield key, {**base, key: value}
            for table, content in tables:
                for key in content:
                    yield key, {**base, table: {**content, key: value}}
            yield "key", {**base, table: {**content, str(value)[:9] if not isinstance(value, int) else value: 1}}


def test_any_value_anywhere_is_read_or_refused_by_name():
    read = refused = 0
    for key, content in everywhere():
        try:
            config = Qwen3Config.from_hf(content, strict=True)
        except ConfigError as error:
            assert SPELLINGS.get(key, key) in str(error), (key, str(error))
            assert len(str(error)) < 1000
            refused += 1
            continue
        read += 1
        written = json.loads(json.dumps(config.to_hf(), allow_nan=False))
        again = Qwen3Config.from_hf(written, strict=True)
        assert json.loads(json.dumps(again.to_hf())) == written
        assert hash(config) == hash(dataclasses.replace(config)) and config.num_params() > 0 and config.segments()
    assert read > 150 and refused > 1500


def test_a_call_is_held_to_the_same_types_as_a_file():
    """In an interpreter of its own: the tests' type checker would answer first."""
    code = """
from qwen3_jax.config import ConfigError, DualChunkAttention, Quantization, Qwen3Config, RopeScaling
calls = [
    lambda: Qwen3Config(hidden_size="1024"), lambda: Qwen3Config(hidden_size=32.5), lambda: Qwen3Config(hidden_size=None),
    lambda: Qwen3Config(rope_scaling={"rope_type": "yarn"}), lambda: Qwen3Config(tie_word_embeddings=1),
    lambda: Qwen3Config(mlp_only_layers=[1.5]), lambda: Qwen3Config(rope_theta="1e6"), lambda: Qwen3Config(rope_theta=10**400),
    lambda: RopeScaling("yarn", factor="4"), lambda: Quantization(weight_block_size=128), lambda: DualChunkAttention("8"),
    lambda: Qwen3Config.from_hf(["qwen3"]), lambda: RopeScaling("longrope", long_factor=[float("nan")], short_factor=[1.0]),
]
for call in calls:
    try:
        print("accepted", call())
    except ConfigError as error:
        print(error)
listed = Qwen3Config(mlp_only_layers=[1], num_experts=8, eos_token_id=[1, 2], rope_theta=10)
print(listed.mlp_only_layers, listed.eos_token_id, listed.rope_theta, hash(listed) == hash(Qwen3Config.from_hf(listed.to_hf())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "hidden_size is '1024': accepted is int",
        "hidden_size is 32.5: accepted is int",
        "hidden_size is None: accepted is int",
        "rope_scaling is {'rope_type': 'yarn'}: accepted is RopeScaling or None",
        "tie_word_embeddings is 1: accepted is bool",
        "mlp_only_layers[0] is 1.5: accepted is int",
        "rope_theta is '1e6': accepted is float",
        f"rope_theta is {10**119}...: accepted is a finite number of at most 3.4e+38",
        "factor is '4': accepted is float or None",
        "weight_block_size is 128: accepted is a list of 2 int",
        "chunk_size is '8': accepted is int",
        "config is ['qwen3']: accepted is a folder, or the object that its config.json holds",
        "long_factor[0] is nan: accepted is a finite number of at most 3.4e+38",
        "(1,) (1, 2) 10.0 True",
    ]
