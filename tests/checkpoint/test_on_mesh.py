"""Models between folders and meshes on eight devices of one process: the values, layouts, bytes and files of one device."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from qwen3_jax import Qwen3Config, abstract_model, from_pretrained, make_mesh, save_pretrained
from qwen3_jax.checkpoint import names, sharded, tensor
from qwen3_jax.checkpoint.layout import disk_route
from qwen3_jax.checkpoint.pretrained import parameters
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.tensor import Place, Tensor
from qwen3_jax.parallel.mesh import AXES, MeshError
from qwen3_jax.parallel.rules import RULES
from tests.checkpoint.folders import files, hub_tensors, write
from tests.model.models import CONFIGS

pytestmark = pytest.mark.usefixtures("quick")

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
ODD = dataclasses.replace(CONFIGS["tied"], vocab_size=97)


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes of tensors that have been read from files so far, in a list."""
    counted, fill = [], tensor._fill

    def noted(handle, view):
        counted.append(len(view))
        return fill(handle, view)

    monkeypatch.setattr(tensor, "_fill", noted)
    return counted


def assert_equal(found, wanted):
    """Every parameter, to the bit; rows that pad the vocabulary are zero."""
    for (path, value), expected in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert value.dtype == expected.dtype
        padded = np.zeros(value.shape, value.dtype)
        padded[tuple(map(slice, expected.shape))] = expected
        np.testing.assert_array_equal(np.asarray(value), padded, err_msg=jax.tree_util.keystr(path))


GATE, QUERY, KEY = (
    "segments.0.blocks.0.moe.gate",
    "segments.0.blocks.0.attention.q.weight",
    "segments.0.blocks.0.attention.k.weight",
)


@pytest.mark.parametrize(
    "config, wish, row, specs",
    [
        (
            CONFIGS["moe"],
            "fsdp=2,expert=2,tensor=2",
            {},
            {GATE: P(None, "expert", "tensor", "fsdp"), "embed.weight": P(("fsdp", "tensor"), None)},
        ),
        (
            CONFIGS["moe"],
            "fsdp=4,expert=2",
            {"experts": ("fsdp", "expert")},
            {GATE: P(None, ("fsdp", "expert"), "tensor", None)},
        ),
        # Two key heads, whole on every shard.
        (CONFIGS["bias"], "fsdp=2,tensor=4", {}, {QUERY: P(None, "tensor", None, "fsdp"), KEY: P(None, None, None, "fsdp")}),
        (ODD, "fsdp=8", {}, {"embed.weight": P(("fsdp", "tensor"), None), QUERY: P(None, "tensor", None, "fsdp")}),
        (CONFIGS["alternating"], "expert=2,context=2,tensor=2", {}, {QUERY: P(None, "tensor", None, "fsdp")}),
    ],
    ids=["moe", "product", "key heads", "odd vocabulary", "context"],
)
def test_a_mesh_reads_and_writes_what_one_device_does(tmp_path, bytes_read, config, wish, row, specs):
    write(tmp_path / "in", config, hub_tensors(config, BF16), files=3)
    alone, rules, mesh = from_pretrained(tmp_path / "in"), RULES.replace(**row), make_mesh(wish)
    del bytes_read[:]
    model = from_pretrained(tmp_path / "in", mesh=mesh, rules=rules)
    assert sum(bytes_read) == config.num_params() * BF16.itemsize  # what several devices hold is read once
    assert_equal(model, alone)
    wanted = abstract_model(config, mesh, rules=rules)
    assert model.rules == wanted.rules and model.dtype == jnp.float32
    found, shapes = (parameters(nnx.state(tree)) for tree in (model, wanted))
    assert {path: leaf.sharding for path, leaf in found.items()} == {path: leaf.sharding for path, leaf in shapes.items()}
    assert {path: found[path].sharding.spec for path in specs} == specs
    for to in ("hf", "orbax"):
        save_pretrained(alone, tmp_path / f"alone-{to}", to=to, max_shard_bytes=40_000)
        with jax.set_mesh(mesh):  # whether one is set makes no difference
            save_pretrained(model, tmp_path / f"mesh-{to}", to=to, max_shard_bytes=40_000)
        assert files(tmp_path / f"mesh-{to}") == files(tmp_path / f"alone-{to}")
    del bytes_read[:]
    assert_equal(from_pretrained(tmp_path / "mesh-orbax", mesh=mesh, rules=rules), alone)
    assert sum(bytes_read) == config.num_params() * BF16.itemsize


def test_other_forms_and_dtypes_on_a_mesh(tmp_path):
    """FP8, whose scales belong to blocks; layers of one parameter in several dtypes; a store of Orbax's own; casts."""
    content = CONFIGS["moe"].to_hf() | {
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 20]}
    }
    tensors: dict[str, np.ndarray] = {}
    for i, (name, value) in enumerate(hub_tensors(CONFIGS["moe"], BF16).items()):
        if name.endswith("_proj.weight"):
            blocks = (-(-value.shape[0] // 16), -(-value.shape[1] // 20))
            tensors[f"{name}_scale_inv"] = np.random.default_rng(i).uniform(0.5, 2, blocks).astype(np.float32)
            value = value.astype(FP8)
        elif i % 2:
            value = value.astype(np.float32)
        tensors[name] = value
    write(tmp_path / "in", Qwen3Config.from_hf(content), tensors)
    mesh = make_mesh("fsdp=4,tensor=2")
    alone = from_pretrained(tmp_path / "in")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(alone)} == {"bfloat16", "float32"}
    assert_equal(from_pretrained(tmp_path / "in", mesh=mesh), alone)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(tmp_path / "theirs", nnx.to_pure_dict(nnx.state(alone, nnx.Param)))
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(CONFIGS["moe"].to_hf()))
    model = from_pretrained(tmp_path / "theirs", mesh=mesh, param_dtype=jnp.float32)
    wide = from_pretrained(tmp_path / "in", param_dtype=jnp.float32)
    assert_equal(model, wide)
    for one, place in ((wide, "alone"), (model, "mesh")):
        save_pretrained(one, tmp_path / place, dtype=jnp.bfloat16)
    assert files(tmp_path / "mesh") == files(tmp_path / "alone")


def test_a_store_whose_words_lie_in_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "BLOCK", 320)
    monkeypatch.setattr(sharded, "BLOCK", 320)
    write(tmp_path / "in", ODD, hub_tensors(ODD, BF16))
    alone = from_pretrained(tmp_path / "in")
    save_pretrained(alone, tmp_path / "alone", to="orbax")
    assert len(os.listdir(tmp_path / "alone" / "embed.weight" / "c")) == 10
    model = from_pretrained(tmp_path / "alone", mesh=make_mesh("fsdp=4,tensor=2"))
    assert_equal(model, alone)
    save_pretrained(model, tmp_path / "mesh", to="orbax")
    assert files(tmp_path / "mesh") == files(tmp_path / "alone")


def test_what_does_not_fit_the_mesh_is_refused_before_a_value_is_read(tmp_path, bytes_read):
    config = dataclasses.replace(CONFIGS["moe"], num_experts=6)
    write(tmp_path, config, hub_tensors(config))
    with pytest.raises(MeshError, match="6 experts over expert=4: 6 / 4 leaves 2"):
        from_pretrained(tmp_path, mesh=make_mesh("expert=4,data=2"))
    assert bytes_read == []


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path, monkeypatch, to):
    write(tmp_path / "in", CONFIGS["dense"], hub_tensors(CONFIGS["dense"]))
    model, writes = from_pretrained(tmp_path / "in", mesh=make_mesh("fsdp=8")), []

    def full(handle, data):
        writes.append(len(data))
        if len(writes) > 40:
            raise OSError(28, "No space left on device", "file")
        handle.write(data)

    monkeypatch.setattr(tensor, "write_all", full)
    with pytest.raises(CheckpointError, match="file: No space left on device"):
        save_pretrained(model, tmp_path / "out", to=to)
    assert len(writes) == 41 and os.listdir(tmp_path) == ["in"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_boxes_of_a_tensor_in_a_file(tmp_path_factory, data):
    """Whatever is cut, at most twice its bytes are read, what is short as whole rows; and writing one is reading backwards."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    bounds = [
        sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda t: t[0] < t[1]))) for n in shape
    ]
    box, long = tuple(slice(*pair) for pair in bounds), data.draw(st.sampled_from([1, 8, 40, 2**16]))
    values = np.random.default_rng(0).integers(0, 2**15, shape, np.uint16).view(np.float16)
    file, counted = tmp_path_factory.mktemp("box") / "file", []
    file.write_bytes(b"before" + values.tobytes() + b"after")
    fill, lying = tensor._fill, Tensor(file, "x", values.dtype, shape, 6)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tensor, "LONG_RUN", long)
        patched.setattr(tensor, "_fill", lambda handle, view: counted.append(len(view)) or fill(handle, view))
        found = lying.read_box(box)
    assert found.tobytes() == values[box].tobytes() and found.shape == values[box].shape
    assert found.nbytes <= sum(counted) <= 2 * found.nbytes
    if long == 1:
        assert sum(counted) == found.nbytes
    changed = values.copy()
    changed[box] = 1
    lying.write_box(box, changed[box])
    assert file.read_bytes() == b"before" + changed.tobytes() + b"after"
    rows = -(-shape[0] // 2)  # the last of two files may be longer than is needed
    place = Place(tuple(Tensor(file.with_name(name), "x", values.dtype, (rows, *shape[1:]), 0) for name in "ab"))
    for i, part in enumerate(place.tensors):
        part.file.write_bytes(values[i * rows : (i + 1) * rows].tobytes().ljust(part.nbytes, b"\0"))
    assert place.read_box(box).tobytes() == values[box].tobytes()
    place.write_box(box, changed[box])
    assert b"".join(part.file.read_bytes() for part in place.tensors)[: values.nbytes] == changed.tobytes()


@pytest.mark.parametrize(
    "shape, spec, sizes, route",
    [
        # 30B-A3B's experts on 16 x 2 x 4: only what cuts the last axis moves.
        (
            (128, 768, 2048),
            P("expert", "tensor", "fsdp"),
            dict(fsdp=16, expert=2, tensor=4),
            [P(("expert", "fsdp"), "tensor", None)],
        ),
        (
            (128, 2048, 768),
            P("expert", "fsdp", "tensor"),
            dict(fsdp=16, expert=2, tensor=4),
            [P(("expert", "tensor"), "fsdp", None)],
        ),
        # Rows are long runs already; a layer that is not split; heads, of which there are too few, then rows of heads.
        ((128, 768, 2048), P("expert", "tensor", None), dict(expert=4, tensor=4), []),
        ((2048,), P(None), dict(fsdp=16), []),
        ((32, 128, 2048), P("tensor", None, "fsdp"), dict(fsdp=64, tensor=8), [P("tensor", "fsdp", None)]),
        # One axis after the other, and what divides nothing stays.
        (
            (8, 24, 32),
            P("expert", "tensor", "fsdp"),
            dict(fsdp=2, expert=2, tensor=2),
            [P(("expert", "fsdp"), "tensor", None), P(("expert", "fsdp", "tensor"), None, None)],
        ),
        ((3, 5, 32), P(None, None, "fsdp"), dict(fsdp=4), []),
    ],
)
def test_the_way_to_the_disk(shape, spec, sizes, route):
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    assert list(disk_route(shape, spec, mesh, 2)) == [spec, *route]
