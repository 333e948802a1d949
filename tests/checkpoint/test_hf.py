"""Hugging Face folders in and out: every layout that is read, bytes that come back, and folders refused by name."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen3_jax import Qwen3Config, from_pretrained, save_pretrained
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.source import folder_tensors
from tests.checkpoint.folders import contents, hub_tensors, write
from tests.model.models import CONFIGS, random_model, random_tokens

BF16, FP8, F32 = (np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32))


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_there_and_back_every_byte_is_the_same(tmp_path, name, dtype):
    config = CONFIGS[name]
    write(tmp_path / "in", config, hub_tensors(config, dtype), files=3)
    model = from_pretrained(tmp_path / "in")
    assert model.dtype == jnp.float32  # on CPU
    save_pretrained(model, tmp_path / "out", max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == config.num_params() * dtype.itemsize
    written = Qwen3Config.from_hf(tmp_path / "out", strict=True)
    assert written.dtype == dtype.name


def test_a_model_comes_back_with_its_logits_to_the_bit(tmp_path):
    model, tokens = random_model("mixed"), random_tokens(1, 12)
    save_pretrained(model, tmp_path / "m")
    run = jax.jit(lambda model, tokens: model(tokens).logits)
    np.testing.assert_array_equal(run(from_pretrained(tmp_path / "m"), tokens), run(model, tokens))
    halved = from_pretrained(tmp_path / "m", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert halved.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype(jnp.bfloat16)}


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_other_layouts_read_to_the_same_model(tmp_path):
    config = CONFIGS["moe"]
    tensors = hub_tensors(config)
    write(tmp_path / "plain", config, tensors)
    plain = from_pretrained(tmp_path / "plain")
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        part = {kind: [tensors[f"{prefix}{e}.{kind}_proj.weight"] for e in range(8)] for kind in ("gate", "up", "down")}
        pairs = zip(part["gate"], part["up"], strict=True)
        fused[f"{prefix}gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
        fused[f"{prefix}down_proj"] = np.stack(part["down"])
    write(tmp_path / "fused", config, fused)
    assert same(from_pretrained(tmp_path / "fused"), plain)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    write(tmp_path / "bare", config, bare)
    assert same(from_pretrained(tmp_path / "bare"), plain)


def test_a_tied_model_s_redundant_head_is_read_past_and_not_written(tmp_path):
    config = CONFIGS["tied"]
    tensors = hub_tensors(config)
    write(tmp_path / "with", config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    save_pretrained(from_pretrained(tmp_path / "with"), tmp_path / "out")
    assert set(folder_tensors(tmp_path / "out")) == set(tensors)


@pytest.mark.parametrize("scale_dtype", [BF16, *map(np.dtype, (np.float16, np.float32, np.float64))], ids=str)
def test_fp8_is_weight_times_scale(tmp_path, scale_dtype):
    content = CONFIGS["moe"].to_hf() | {
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 20]}
    }
    config = Qwen3Config.from_hf(content)
    draw, tensors, expected = np.random.default_rng(1), {}, {}
    for name, value in hub_tensors(config, BF16).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = expected[name] = value
            continue
        rows, columns = value.shape
        quantised = (draw.standard_normal(value.shape) * 50).astype(FP8)
        scale = draw.uniform(0.01, 0.1, (-(-rows // 16), -(-columns // 20))).astype(scale_dtype)
        tensors |= {name: quantised, f"{name}_scale_inv": scale}
        spread = np.repeat(np.repeat(scale.astype(np.float32), 16, 0), 20, 1)[:rows, :columns]
        expected[name] = (quantised.astype(np.float32) * spread).astype(BF16)
    write(tmp_path / "fp8", config, tensors)
    save_pretrained(from_pretrained(tmp_path / "fp8"), tmp_path / "out")
    found = {name: tensor.read() for name, tensor in folder_tensors(tmp_path / "out").items()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def break_shape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


def break_missing(tensors):
    del tensors["model.layers.2.self_attn.q_norm.weight"]


def break_extra(tensors):
    tensors["model.layers.9.input_layernorm.weight"] = np.zeros(32, np.float32)


def break_dtype(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)


def break_fp8(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(FP8)


@pytest.mark.parametrize(
    "change, says",
    [
        (break_shape, r"model.norm.weight has shape \[31\]; the config makes it \[32\]"),
        (break_missing, "1 tensors are missing: model.layers.2.self_attn.q_norm.weight"),
        (break_extra, "belong to no layer of this config: model.layers.9.input_layernorm.weight"),
        (break_dtype, "model.norm.weight is int32; accepted are"),
        (break_fp8, "model.norm.weight is float8_e4m3fn; accepted are"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, change, says):
    tensors = hub_tensors(CONFIGS["dense"])
    change(tensors)
    write(tmp_path, CONFIGS["dense"], tensors)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(tmp_path)


def test_an_index_that_points_nowhere_or_outside_is_refused(tmp_path):
    config = CONFIGS["dense"]
    write(tmp_path, config, hub_tensors(config), files=2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for file, says in (("gone.safetensors", "is not there"), ("../x.safetensors", "outside the folder"), ("", "outside")):
        changed = {"weight_map": good["weight_map"] | {"model.norm.weight": file}}
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=says):
            from_pretrained(tmp_path)
    moved = dict(good["weight_map"])
    moved["model.norm.weight"] = next(file for file in moved.values() if file != moved["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match="disagree about model.norm.weight"):
        from_pretrained(tmp_path)


def test_a_full_destination_is_left_alone_and_overwriting_is_a_choice(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(random_model("dense"), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    save_pretrained(random_model("dense"), tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(CheckpointError, match="dtype is int8: accepted are bfloat16"):
        save_pretrained(random_model("dense"), tmp_path / "other", dtype=jnp.int8)
    assert os.listdir(tmp_path) == ["out"]
