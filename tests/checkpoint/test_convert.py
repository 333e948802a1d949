"""Conversions: forms and back to the byte, Orbax as a reader and a writer, and what is refused before anything is written."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx

from qwen3_jax import Qwen3Config, from_pretrained, save_pretrained
from qwen3_jax.checkpoint import convert, names, store, weights
from qwen3_jax.checkpoint.convert import plan_conversion
from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.cli.main import main
from tests.checkpoint.folders import contents, hub_tensors, write
from tests.model.models import CONFIGS, random_model

BF16 = np.dtype(ml_dtypes.bfloat16)


def run(*words) -> int:
    return main(["convert", *map(str, words)])


def leaves(model) -> dict[str, np.ndarray]:
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)
    }


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_hub_to_native_and_back_every_byte_is_the_same(tmp_path, name, dtype):
    config = CONFIGS[name]
    write(tmp_path / "in", config, hub_tensors(config, dtype), files=3)
    (tmp_path / "in" / "tokenizer.json").write_text('{"carried": "over"}')
    (tmp_path / "in" / "generation_config.json").write_text('{"top_k": 20}')
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert run(tmp_path / "in", tmp_path / "native", "--to", "orbax", "--verify") == 0
    assert run(tmp_path / "native", tmp_path / "out", "--to", "hf", "--verify", "--max-shard-bytes", 40_000) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    for file in ("tokenizer.json", "generation_config.json", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()
    assert Qwen3Config.from_hf(tmp_path / "out", strict=True).dtype == dtype.name
    expected = leaves(from_pretrained(tmp_path / "in"))
    found = leaves(from_pretrained(tmp_path / "native"))
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_the_layout_on_disk_is_pinned(tmp_path):
    """A chunk for each layer and expert, raw little-endian bytes in a file of its own: another program could read it."""
    config = CONFIGS["moe"]
    tensors = hub_tensors(config, BF16)
    write(tmp_path / "in", config, tensors)
    run(tmp_path / "in", tmp_path / "native", "--to", "orbax")
    array = json.loads((tmp_path / "native" / "segments.0.blocks.0.moe.down" / "zarr.json").read_text())
    shape = [config.num_hidden_layers, config.num_experts, config.hidden_size, config.moe_intermediate_size]
    assert array["shape"] == shape
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [1, 1, *shape[2:]]
    assert [codec["name"] for codec in array["codecs"]] == ["bytes"]
    raw = (tmp_path / "native" / "segments.0.blocks.0.moe.down" / "c" / "2" / "5" / "0" / "0").read_bytes()
    assert raw == tensors["model.layers.2.mlp.experts.5.down_proj.weight"].tobytes()
    norm = json.loads((tmp_path / "native" / "segments.0.blocks.0.attention_norm.weight" / "zarr.json").read_text())
    assert norm["chunk_grid"]["configuration"]["chunk_shape"] == [1, config.hidden_size]


def test_an_embedding_is_held_by_blocks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "BLOCK", 1000)
    config = CONFIGS["dense"]
    write(tmp_path / "in", config, hub_tensors(config))
    sizes = []
    stream = weights.stream

    def watched(*args):
        for block in stream(*args):
            sizes.append(block.values.size)
            yield block

    monkeypatch.setattr(convert, "stream", watched)
    run(tmp_path / "in", tmp_path / "native", "--to", "orbax", "--verify")
    rows = json.loads((tmp_path / "native" / "embed.weight" / "zarr.json").read_text())["chunk_grid"]["configuration"]
    assert rows["chunk_shape"] == [24, 32]  # 96 rows of 32, halved until no more than 1000 values
    assert max(sizes) < config.vocab_size * config.hidden_size
    run(tmp_path / "native", tmp_path / "out", "--to", "hf", "--verify")
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    np.testing.assert_array_equal(
        from_pretrained(tmp_path / "native").embed.weight[...], hub_tensors(config)["model.embed_tokens.weight"]
    )


def test_orbax_s_own_readers_read_it(tmp_path):
    model = random_model("mixed")
    save_pretrained(model, tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "native", "--to", "orbax")
    expected = leaves(model)
    with ocp.PyTreeCheckpointer() as reader:
        plain = reader.restore(tmp_path / "native")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=here), plain)
    with ocp.StandardCheckpointer() as reader:
        halved = reader.restore(tmp_path / "native", wanted)
    for tree, dtype in ((plain, np.float32), (halved, jnp.bfloat16)):
        found = {
            jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)
        }
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value.astype(dtype), err_msg=path)


@pytest.mark.parametrize("ocdbt, zarr3", [(True, False), (True, True), (False, True)])
def test_what_orbax_writes_is_read(tmp_path, ocdbt, zarr3):
    model = random_model("mixed")
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as writer:
        writer.save(tmp_path / "theirs", tree)
    with pytest.raises(ValueError, match=r"config\.json"):
        from_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(model.config.to_hf()))
    found = leaves(from_pretrained(tmp_path / "theirs"))
    for path, value in leaves(model).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_other_dtypes(tmp_path):
    config = CONFIGS["moe"]
    tensors = hub_tensors(config)
    write(tmp_path / "in", config, tensors)
    run(tmp_path / "in", tmp_path / "native", "--to", "orbax", "--dtype", "bfloat16", "--verify")
    run(tmp_path / "native", tmp_path / "out", "--to", "hf", "--dtype", "float16", "--verify")
    for name, (dtype, _, raw) in contents(tmp_path / "out").items():
        assert dtype == np.float16
        assert raw == tensors[name].astype(BF16).astype(np.float16).tobytes()
    loaded = from_pretrained(tmp_path / "native", param_dtype=jnp.float32)
    np.testing.assert_array_equal(loaded.norm.weight[...], tensors["model.norm.weight"].astype(BF16).astype(np.float32))


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path, capsys):
    config = CONFIGS["dense"]
    tensors = hub_tensors(config)
    tensors["model.norm.weight"][3] = 70000.0
    write(tmp_path / "in", config, tensors)
    assert run(tmp_path / "in", tmp_path / "out", "--to", "hf", "--dtype", "float16") == 2
    assert (
        "model.norm.weight has a value of 70000, and float16 ends at 65504: accepted is bfloat16 or float32"
        in capsys.readouterr().err
    )
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_verify_sees_a_flipped_bit(tmp_path, monkeypatch, to):
    """The bit flips on the disk, after all is written and before it is read back."""
    write(tmp_path / "in", CONFIGS["moe"], hub_tensors(CONFIGS["moe"]))
    (tmp_path / "out").mkdir()
    beside = convert.write_beside

    def flip(part, *args):
        beside(part, *args)
        file = part / "model.safetensors" if to == "hf" else part / "segments.0.blocks.0.moe.up" / "c" / "1" / "3" / "0" / "0"
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 1
        file.write_bytes(raw)

    monkeypatch.setattr(convert, "write_beside", flip)
    plan = plan_conversion(tmp_path / "in", tmp_path / "out", to)
    name = "model.norm.weight" if to == "hf" else "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name}, rows .* read back, it is not what was written"):
        plan.run(verify=True)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert os.listdir(tmp_path / "out") == []
    plan.run(verify=False)  # and without, nobody notices
    assert open_weights(tmp_path / "out").form == ("Hugging Face" if to == "hf" else "Orbax")


@pytest.fixture
def native(tmp_path):
    write(tmp_path / "in", CONFIGS["moe"], hub_tensors(CONFIGS["moe"]))
    run(tmp_path / "in", tmp_path / "native", "--to", "orbax")
    return tmp_path / "native"


UP = "segments.0.blocks.0.moe.up"


def without_chunk(folder):
    (folder / UP / "c" / "2" / "1" / "0" / "0").unlink()


def cut_chunk(folder):
    os.truncate(folder / UP / "c" / "2" / "1" / "0" / "0", 100)


def without_array(folder):
    shutil.rmtree(folder / UP)


def without_entry(folder):
    content = json.loads((folder / "_METADATA").read_text())
    content["tree_metadata"] = {
        key: value for key, value in content["tree_metadata"].items() if value["key_metadata"][-1]["key"] != "up"
    }
    (folder / "_METADATA").write_text(json.dumps(content))


def other_shape(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"moe_intermediate_size": 16}))


def fewer_layers(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))


def wrong_dtype(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / 'norm.weight'}/"}}
    tensorstore.open(spec, create=True, delete_existing=True, dtype=tensorstore.int32, shape=[32]).result().write(1).result()


def broken_metadata(folder):
    (folder / "_METADATA").write_text('{"tree_metadata": 3}')


def broken_array(folder):
    (folder / UP / "zarr.json").write_text("{")


@pytest.mark.parametrize(
    "change, says",
    [
        (without_chunk, f"{UP}/c/2/1/0/0: a chunk of {UP} is not there; it needs"),
        (cut_chunk, f"{UP}/c/2/1/0/0: a chunk of {UP} has 100 bytes; it needs"),
        (without_array, f"native: {UP}: "),
        (without_entry, f"1 parameters are missing: {UP}"),
        (other_shape, r"moe\.\w+ has shape .*; the config makes it"),
        (fewer_layers, "1 parameters belong to no layer of this config: lm_head.weight"),
        (wrong_dtype, "norm.weight is int32; accepted are"),
        (broken_metadata, "_METADATA: no metadata of an Orbax tree"),
        (broken_array, f"native: {UP}: "),
    ],
)
def test_a_broken_native_checkpoint_is_refused_by_name(native, change, says):
    change(native)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(native)
    with pytest.raises(CheckpointError, match=says):
        plan_conversion(native, native.parent / "out", "hf")
    assert sorted(os.listdir(native.parent)) == ["in", "native"]


def test_what_does_not_fit_is_refused_with_the_figures(tmp_path, monkeypatch, capsys):
    write(tmp_path / "in", CONFIGS["moe"], hub_tensors(CONFIGS["moe"]))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"out needs [\d.]+ [kMG]?B and its disk has 1\.0 kB free"):
        plan_conversion(tmp_path / "in", tmp_path / "out", "orbax")
    monkeypatch.undo()
    monkeypatch.setattr(weights, "available_memory", lambda: 2000)
    with pytest.raises(CheckpointError, match=r"in needs [\d.]+ [kMG]?B of memory and 2\.0 kB are available"):
        plan_conversion(tmp_path / "in", tmp_path / "out", "orbax")
    with pytest.raises(CheckpointError, match=r"in needs [\d.]+ [kMG]?B of memory and 2\.0 kB are available"):
        from_pretrained(tmp_path / "in")
    assert os.listdir(tmp_path) == ["in"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    """Our own writer finds the disk full in the middle, TensorStore a file where its chunks should go."""
    write(tmp_path / "in", CONFIGS["moe"], hub_tensors(CONFIGS["moe"]))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "shard")

    monkeypatch.setattr("qwen3_jax.checkpoint.safetensors.write_all", full)
    with pytest.raises(CheckpointError, match="shard: No space left on device"):
        plan_conversion(tmp_path / "in", tmp_path / "out", "hf").run()
    create = store._create

    def unwritable(part, slot, *rest):
        array = create(part, slot, *rest)
        if slot.path == UP:
            (part / UP / "c").write_text("a file where a folder must be")
        return array

    monkeypatch.setattr(store, "_create", unwritable)
    with pytest.raises(CheckpointError, match=f"{UP}: "):
        plan_conversion(tmp_path / "in", tmp_path / "out", "orbax").run()
    assert os.listdir(tmp_path) == ["in"]


def test_destinations_that_are_refused_and_overwriting(tmp_path, capsys):
    write(tmp_path / "in", CONFIGS["dense"], hub_tensors(CONFIGS["dense"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert run(tmp_path / "in", tmp_path / "out", "--to", "orbax") == 2
    assert re.search(r"out is not empty: .*--overwrite", capsys.readouterr().err)
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert run(tmp_path / "in", tmp_path / "out", "--to", "orbax", "--overwrite") == 0
    assert store.is_store(tmp_path / "out") and not (tmp_path / "out" / "mine").exists()
    assert run(tmp_path / "in", tmp_path, "--to", "orbax", "--overwrite") == 2
    assert "holds the source" in capsys.readouterr().err
    assert run(tmp_path / "gone", tmp_path / "new", "--to", "hf") == 2
    assert "gone is no folder" in capsys.readouterr().err
    before = contents(tmp_path / "in")  # onto itself: the source is read before it is replaced
    assert run(tmp_path / "in", tmp_path / "in", "--to", "orbax", "--overwrite") == 0
    assert run(tmp_path / "in", tmp_path / "in", "--to", "hf", "--overwrite") == 0
    assert contents(tmp_path / "in") == before
    os.symlink("in", tmp_path / "link")
    assert run(tmp_path / "out", tmp_path / "link", "--to", "hf", "--overwrite") == 0
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "in") == before
    assert sorted(os.listdir(tmp_path)) == ["in", "link", "out"]


def test_bytes_are_said_before_reading_and_inspect_reads_headers_only(tmp_path, capsys):
    config = CONFIGS["mixed"]
    write(tmp_path / "in", config, hub_tensors(config, BF16))
    run(tmp_path / "in", tmp_path / "native", "--to", "orbax")
    said = capsys.readouterr().out
    nbytes = 2 * config.num_params()
    assert f"reads   {nbytes / 1000:.1f} kB" in said and f"writes  {nbytes / 1000:.1f} kB" in said
    for folder, form in (("in", "Hugging Face, 1 file"), ("native", "Orbax, 38 array")):
        assert main(["inspect", str(tmp_path / folder)]) == 0
        said = capsys.readouterr().out
        assert form in said
        assert f"{config.num_params():,}, {config.num_active_params():,} active per token" in said
        experts = next(line for line in said.splitlines() if "experts" in line and "│" in line)
        assert [cell.strip() for cell in experts.split("│")[1:-1]] == ["experts", "72", "55,296", "bfloat16", "110.6 kB"]
    (tmp_path / "in" / "model.safetensors").write_bytes(b"x" * 100)
    assert main(["inspect", str(tmp_path / "in")]) == 2
    assert "model.safetensors" in capsys.readouterr().err
