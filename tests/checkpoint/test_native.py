"""The native form's own care: dtypes that differ within a parameter, odd vocabularies, writes in flight, paths and messages."""

import dataclasses
import json
import os
import random
import shutil
import types

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx

from qwen3_jax import Qwen3Config, from_pretrained, save_pretrained
from qwen3_jax.checkpoint import names, store
from qwen3_jax.checkpoint.convert import plan_conversion
from qwen3_jax.checkpoint.names import slots
from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.weights import stream
from tests.checkpoint.folders import contents, hub_tensors, write
from tests.model.models import CONFIGS, random_model

BF16, F16, F32, FP8 = (np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn))


def mixed_dtypes() -> dict[str, np.ndarray]:
    """Layers of one parameter in bfloat16, float16 and float32."""
    draw = random.Random(1)
    return {name: value.astype(draw.choice((BF16, F16, F32))) for name, value in hub_tensors(CONFIGS["moe"], BF16).items()}


def test_each_tensor_keeps_its_dtype_where_the_layers_of_a_parameter_differ(tmp_path):
    write(tmp_path / "in", CONFIGS["moe"], mixed_dtypes())
    plan_conversion(tmp_path / "in", tmp_path / "native", "orbax").run(verify=True)
    told = json.loads((tmp_path / "native" / "_METADATA").read_text())["custom_metadata"]["hub_dtypes"]
    kept = {name: dtype.name for name, (dtype, _, _) in contents(tmp_path / "in").items()}
    wide = {name: dtype.name for name, dtype in plan_conversion(tmp_path / "in", tmp_path / "x", "orbax").dtypes.items()}
    assert told == {name: dtype for name, dtype in kept.items() if dtype != wide[name]} and len(told) > 50
    plan_conversion(tmp_path / "native", tmp_path / "out", "hf").run(verify=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    plan_conversion(tmp_path / "native", tmp_path / "again", "orbax").run(verify=True)
    plan_conversion(tmp_path / "again", tmp_path / "out2", "hf").run()
    assert contents(tmp_path / "out2") == contents(tmp_path / "in")
    # In one dtype there is nothing to keep.
    plan_conversion(tmp_path / "in", tmp_path / "wide", "orbax", "float32").run()
    assert json.loads((tmp_path / "wide" / "_METADATA").read_text())["custom_metadata"] is None
    # A model in memory has one dtype a parameter, from either form; Orbax's reader sees the same values.
    first, second = from_pretrained(tmp_path / "in"), from_pretrained(tmp_path / "native")
    with ocp.PyTreeCheckpointer() as reader:
        plain = reader.restore(tmp_path / "native")
    down = plain["segments"]["0"]["blocks"]["0"]["moe"]["down"]
    state = nnx.to_pure_dict(nnx.state(first, nnx.Param))
    np.testing.assert_array_equal(down, state["segments"][0]["blocks"][0]["moe"]["down"])
    assert str(nnx.state(first)) == str(nnx.state(second))
    save_pretrained(second, tmp_path / "widened")
    stacked = open_weights(tmp_path / "in").stacked_dtypes()
    widened = contents(tmp_path / "widened")
    assert {name: widened[name][0] for name in widened} == {slot.name: stacked[slot.path] for slot in slots(CONFIGS["moe"])}


@pytest.mark.parametrize(
    "told, says",
    [
        (7, "hub_dtypes is 7; accepted is an object"),
        ({"model.norm.weight": "float8"}, "hub_dtypes has model.norm.weight: 'float8'"),
        ({"model.norm.weight": 3}, "hub_dtypes has model.norm.weight: 3"),
        ({"model.norms.weight": "bfloat16"}, "hub_dtypes has model.norms.weight: 'bfloat16'"),
        ({"model.norm.weight": "float32"}, "hub_dtypes has model.norm.weight: 'float32'; accepted are"),
    ],
)
def test_dtypes_that_an_array_cannot_hold_are_refused_by_name(tmp_path, told, says):
    write(tmp_path / "in", CONFIGS["moe"], hub_tensors(CONFIGS["moe"], BF16))
    plan_conversion(tmp_path / "in", tmp_path / "native", "orbax").run()
    file = tmp_path / "native" / "_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {"hub_dtypes": told}}))
    with pytest.raises(CheckpointError, match=f"_METADATA: {says}"):
        open_weights(tmp_path / "native")


@pytest.mark.parametrize("vocab", [97, 151669 % 1000, 94])
@pytest.mark.parametrize("fp8", [False, True])
def test_an_odd_vocabulary_is_held_by_blocks_with_a_short_last_one(tmp_path, monkeypatch, vocab, fp8):
    monkeypatch.setattr(names, "BLOCK", 1000)
    content = dataclasses.replace(CONFIGS["dense"], vocab_size=vocab).to_hf()
    if fp8:
        content["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 20]}
    config = Qwen3Config.from_hf(content)
    tensors = hub_tensors(config, BF16)
    expected = tensors["lm_head.weight"]
    if fp8:
        draw = np.random.default_rng(3)
        scale = draw.uniform(0.5, 2, (-(-vocab // 16), 2)).astype(F32)
        tensors["lm_head.weight"] = expected.astype(FP8)
        tensors["lm_head.weight_scale_inv"] = scale
        spread = np.repeat(np.repeat(scale, 16, 0), 20, 1)[:vocab, :32]
        expected = np.multiply(tensors["lm_head.weight"].astype(F32), spread).astype(BF16)
    write(tmp_path / "in", config, tensors)
    plan_conversion(tmp_path / "in", tmp_path / "native", "orbax").run(verify=True)
    array = json.loads((tmp_path / "native" / "lm_head.weight" / "zarr.json").read_text())
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [31, 32]
    assert len(os.listdir(tmp_path / "native" / "lm_head.weight" / "c")) == -(-vocab // 31)
    plan_conversion(tmp_path / "native", tmp_path / "out", "hf").run(verify=True)
    for folder in ("in", "native", "out"):
        head = from_pretrained(tmp_path / folder).lm_head
        assert head is not None
        np.testing.assert_array_equal(head.weight[...], expected, err_msg=folder)
    last = tmp_path / "native" / "lm_head.weight" / "c" / str(vocab // 31) / "0"
    os.truncate(last, last.stat().st_size - 2)
    with pytest.raises(CheckpointError, match=f"c/{vocab // 31}/0: a chunk of lm_head.weight has"):
        open_weights(tmp_path / "native")


def test_blocks_of_the_family_s_vocabularies_stay_small():
    for vocab, width in ((151936, 4096), (151669, 4096), (151665, 8192), (151669, 1024), (7, 2**26)):
        slot = names.Slot("x", (vocab, width), "embed.weight", (), (vocab, width))
        assert 1 <= slot.block_rows and slot.block_rows * width <= max(names.BLOCK, width)
        assert slot.block_rows * width > names.BLOCK // 2 - 1 or vocab * width <= names.BLOCK
    layer = names.Slot("x", (151669, 4096), "x", (0,), (151669, 4096))
    assert layer.block_rows == 151669


@pytest.mark.parametrize("where", ["blocks", "commit"])
def test_no_write_is_in_flight_when_an_error_leaves(tmp_path, monkeypatch, where):
    config = CONFIGS["moe"]
    write(tmp_path / "in", config, hub_tensors(config))
    weights, waited, begun = open_weights(tmp_path / "in"), [], []
    create = store._create

    class Slow:
        """An array whose writes end only when somebody waits for them; the third fails."""

        def __init__(self, array):
            self.array = array

        def __getitem__(self, index):
            return Slow(self.array)

        def write(self, values, **kwargs):
            number = len(begun)
            begun.append(number)

            def exception():
                waited.append(number)

            def result():
                waited.append(number)
                if where == "commit" and number == 2:
                    raise ValueError("the disk is gone [source locations='x']")

            return types.SimpleNamespace(commit=types.SimpleNamespace(exception=exception, result=result))

    monkeypatch.setattr(store, "_create", lambda *args: Slow(create(*args)))

    def blocks():
        for number, block in enumerate(stream(weights, weights.slots(), weights.dtypes, "")):
            if where == "blocks" and number == 3:
                raise ZeroDivisionError
            yield block

    (tmp_path / "part").mkdir()
    with pytest.raises((ZeroDivisionError, CheckpointError)) as caught:
        store.write_store(tmp_path / "part", config, weights.dtypes, blocks(), {})
    assert len(begun) >= 3 and waited == begun
    if where == "commit":
        assert str(caught.value).endswith(": the disk is gone")


@pytest.mark.parametrize("name", ["a#b", "a?b=c", "a%20b", "a b"])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_folder_s_name_is_no_url(tmp_path, name, ocdbt):
    model = random_model("dense")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=True)) as writer:
        writer.save(tmp_path / "plain", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    shutil.move(tmp_path / "plain", tmp_path / name)
    (tmp_path / name / "config.json").write_text(json.dumps(model.config.to_hf()))
    np.testing.assert_array_equal(from_pretrained(tmp_path / name).norm.weight[...], model.norm.weight[...])


def test_what_tensorstore_says_is_one_line_without_its_insides(tmp_path, monkeypatch):
    write(tmp_path / "in", CONFIGS["dense"], hub_tensors(CONFIGS["dense"]))
    plan_conversion(tmp_path / "in", tmp_path / "native", "orbax").run()
    (tmp_path / "native" / "norm.weight" / "zarr.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"native: norm\.weight: .*zarr\.json") as caught:
        open_weights(tmp_path / "native")
    assert not any(word in str(caught.value) for word in ("\n", "tensorstore_spec", "source locations"))

    def refuse(*args, **kwargs):
        raise ValueError("a spec that it does not understand")

    monkeypatch.setattr(tensorstore, "open", refuse)
    with pytest.raises(CheckpointError, match=r"native: \S+: a spec that it does not understand"):
        open_weights(tmp_path / "native")


def test_metadata_cannot_lead_out_of_the_folder(tmp_path, monkeypatch):
    write(tmp_path / "in", CONFIGS["dense"], hub_tensors(CONFIGS["dense"]))
    plan_conversion(tmp_path / "in", tmp_path / "native", "orbax").run()
    file = tmp_path / "native" / "_METADATA"
    content = json.loads(file.read_text())
    content["tree_metadata"]["x"] = {"key_metadata": [{"key": "../in"}, {"key": "x"}]}
    file.write_text(json.dumps(content))
    opened, opener = [], store._open
    monkeypatch.setattr(store, "_open", lambda folder, path, *rest: opened.append(path) or opener(folder, path, *rest))
    with pytest.raises(CheckpointError, match=r"1 parameters belong to no layer of this config: \.\./in\.x"):
        open_weights(tmp_path / "native")
    assert set(opened) == {slot.path for slot in slots(CONFIGS["dense"])}
