"""Hugging Face folders in and out: every layout that is read, bytes that come back, and folders refused by name."""

import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen3_jax import Qwen3Config, from_pretrained, save_pretrained
from qwen3_jax.checkpoint.safetensors import CheckpointError, Plan, read_header, write_file
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


@pytest.mark.parametrize("scale_dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
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


def mutated_index(draw: random.Random, good: dict):
    """A changed index, and a pattern for what is said of it; None where it is still valid."""
    names, files = sorted(good["weight_map"]), sorted(set(good["weight_map"].values()))
    name = draw.choice(names)
    changed = json.loads(json.dumps(good))
    where = changed["weight_map"]
    kind = draw.choice(
        ["order", "metadata", "more keys", "other file", "gone", "outside", "no string", "drop", "add", "no map"]
    )
    if kind == "order":
        draw.shuffle(names)
        changed["weight_map"] = {key: where[key] for key in names}
        return changed, None
    if kind == "metadata":
        changed["metadata"] = draw.choice([{"total_size": 7}, {"total_parameters": 1, "x": []}])
        return changed, None
    if kind == "more keys":
        changed["comment"] = draw.choice(["hello", 1, None])
        return changed, None
    if kind == "other file":
        where[name] = draw.choice([file for file in files if file != where[name]])
        return changed, f"disagree about {re.escape(name)}"
    if kind == "gone":
        where[name] = f"model-{draw.randrange(100, 1000)}.safetensors"
        return changed, "is not there"
    if kind == "outside":
        where[name] = draw.choice(["../", "/tmp/", "sub/", "./"]) + where[name]
        return changed, "outside the folder"
    if kind == "no string":
        where[name] = draw.choice([3, None, [], {}])
        return changed, "index.json: "
    if kind == "drop":
        del where[name]
        return changed, f"disagree about {re.escape(name)}"
    if kind == "add":
        where[f"{name}.more"] = where[name]
        return changed, f"disagree about {re.escape(name)}.more"
    return draw.choice([{}, {"weight_map": {}}, {"weight_map": []}, [], 7, None]), "weight_map|JSON object"


def test_a_thousand_changed_indexes_are_read_rightly_or_refused(tmp_path):
    config, draw, valid = CONFIGS["dense"], random.Random(6), 0
    tensors = hub_tensors(config)
    write(tmp_path, config, tensors, files=3)
    expected = contents(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good, text = json.loads(index.read_text()), index.read_text()
    for _ in range(1000):
        changed, says = mutated_index(draw, good)
        index.write_text(json.dumps(changed, indent=draw.choice([None, 1])))
        if says is None:
            valid += 1
            assert {name: (t.dtype, t.shape) for name, t in folder_tensors(tmp_path).items()} == {
                name: value[:2] for name, value in expected.items()
            }
            if valid % 50 == 0:
                assert contents(tmp_path) == expected
        else:
            with pytest.raises(CheckpointError, match=says):
                folder_tensors(tmp_path)
    assert valid > 250
    for _ in range(100):  # not JSON at all
        cut = text[: draw.randrange(len(text) - 1)]
        index.write_text(cut)
        with pytest.raises(CheckpointError, match="index.json"):
            folder_tensors(tmp_path)


def test_a_full_destination_is_left_alone_and_overwriting_is_a_choice(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(random_model("dense"), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    save_pretrained(random_model("dense"), tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(CheckpointError, match="written as int8"):
        save_pretrained(random_model("dense"), tmp_path / "other", dtype=jnp.int8)
    assert os.listdir(tmp_path) == ["out"]


def test_kill_at_any_moment_leaves_a_whole_old_or_new_folder(tmp_path):
    """A child overwrites one folder for ever with models of two seeds; it is killed, and what is there is one of them."""
    program = """
import sys
from pathlib import Path
import numpy as np
from qwen3_jax.checkpoint.folder import whole_folder
from qwen3_jax.checkpoint.safetensors import Plan, write_file
print("ready", flush=True)
number = 0
while True:
    number += 1
    values = [np.full((64, 1024), number, np.float32) for _ in range(8)]
    with whole_folder(Path(sys.argv[1])) as part:
        for file in ("a", "b"):
            plan = Plan(part / f"{file}.safetensors", {f"t{i}": (v.dtype, v.shape) for i, v in enumerate(values)})
            write_file(plan, iter(values))
"""
    draw, folder = random.Random(0), tmp_path / "out"
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        while not folder.exists():
            assert child.poll() is None
        time.sleep(draw.random() / 5)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        numbers = {
            float(value)
            for file in ("a", "b")
            for tensor in read_header(folder / f"{file}.safetensors").values()
            for value in np.unique(tensor.read())
        }
        assert len(numbers) == 1
    from qwen3_jax.checkpoint.folder import whole_folder

    with whole_folder(folder) as part:
        (part / "last").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(folder) == ["last"]


def mutated_header(draw: random.Random, header: dict, data: int):
    """A changed header, and the name at fault; None where it is still valid."""
    names = list(header)
    name = draw.choice(names)
    kind = draw.choice(["order", "space", "metadata", "dtype", "shape", "begin", "end", "swap", "drop", "field"])
    changed = {key: dict(value) for key, value in header.items()}
    if kind == "order":
        draw.shuffle(names)
        return {key: changed[key] for key in names}, None
    if kind == "space":
        return changed, None
    if kind == "metadata":
        return {"__metadata__": {"format": "np"}, **changed}, None
    if kind == "dtype":
        changed[name]["dtype"] = draw.choice(["F12", 4, None, "F64"])
    elif kind == "shape":
        changed[name]["shape"] = draw.choice([[-1], [3.5], "4", [10**9, 10**9], [True]])
    elif kind in ("begin", "end"):
        offsets = list(changed[name]["data_offsets"])
        offsets[kind == "end"] += draw.choice([-4, 4, 10**15])
        changed[name]["data_offsets"] = offsets
    elif kind == "swap":
        changed[name]["data_offsets"] = changed[name]["data_offsets"][::-1]
    elif kind == "drop":
        del changed[name]
    else:
        del changed[name][draw.choice(list(changed[name]))]
    return changed, name


def test_two_thousand_changed_headers_are_read_rightly_or_refused(tmp_path):
    draw, valid = random.Random(5), 0
    arrays = {f"t{i}": np.arange(i * 3 + 2, dtype=np.float32).reshape(-1, 1) for i in range(5)}
    plan = Plan(tmp_path / "good.safetensors", {name: (value.dtype, value.shape) for name, value in arrays.items()})
    write_file(plan, iter(arrays.values()))
    raw = plan.file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    data = raw[8 + length :]
    file = tmp_path / "changed.safetensors"
    for _ in range(2000):
        changed, fault = mutated_header(draw, header, len(data))
        text = json.dumps(changed, indent=draw.choice([None, 1])).encode()
        cut = draw.random() < 0.1
        file.write_bytes(struct.pack("<Q", len(text)) + text + (data[:-1] if cut else data))
        if fault is None and not cut:
            valid += 1
            found = read_header(file)
            assert set(found) == set(arrays)
            for name, tensor in found.items():
                np.testing.assert_array_equal(tensor.read(), arrays[name])
        else:
            with pytest.raises(CheckpointError, match="changed.safetensors: "):
                read_header(file)
    assert valid > 450
    for broken in (b"", b"12345", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{x"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="changed.safetensors"):
            read_header(file)
