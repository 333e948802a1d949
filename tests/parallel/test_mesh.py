"""Meshes and rules: what is made, and what is refused with the arithmetic."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from qwen3_jax import Qwen3Config, abstract_model, make_mesh
from qwen3_jax.parallel.fit import check_batch, fitted
from qwen3_jax.parallel.mesh import AXES, MeshError, mesh_of
from qwen3_jax.parallel.rules import RULES, spec, use_rules
from tests.model.models import CONFIGS

GOLDEN = Path(__file__).parents[1] / "fixtures" / "shardings"


@settings(max_examples=30, deadline=None)
@given(doubled=st.lists(st.sampled_from(AXES), min_size=3, max_size=3), data=st.data())
def test_every_product_of_the_devices_is_a_mesh(doubled, data):
    sizes = {axis: 2 ** doubled.count(axis) for axis in AXES}
    order = data.draw(st.permutations(AXES))
    mesh = make_mesh(",".join(f"{axis}={sizes[axis]}" for axis in order))
    assert dict(mesh.shape) == sizes and mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Explicit,) * 5
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    left = data.draw(st.sampled_from(AXES))
    said = ",".join(f"{axis}={size}" for axis, size in sizes.items() if axis != left)
    assert make_mesh(f"{said},{left}=-1") == mesh


@pytest.mark.parametrize(
    "wish, says",
    [
        ("fsdp=3", "fsdp=3 is 3, and there are 8 devices"),
        ("", "nothing is 1, and there are 8 devices"),
        ("fsdp=2,tensor=2", "fsdp=2 x tensor=2 is 4, and there are 8 devices"),
        ("fsdp=3,data=-1", "fsdp=3 is 3, which does not divide the 8 devices: nothing is left for data"),
        ("fsdp=-1,data=-1", "mesh axes fsdp and data are both -1"),
        ("stage=8", "mesh axis 'stage': accepted are data, fsdp, expert, context, tensor"),
        ("fsdp=two", "mesh axis fsdp=two: accepted is a whole number"),
        ("fsdp", "mesh axis fsdp=: accepted is a whole number"),
        ("fsdp=0", "mesh axis fsdp=0: accepted is a whole number from 1"),
        ("fsdp=8,fsdp=8", "mesh axis fsdp is given twice"),
    ],
)
def test_wishes_that_are_no_mesh(wish, says):
    with pytest.raises(MeshError, match=says):
        make_mesh(wish)


def test_data_runs_across_slices():
    devices = topologies.get_topology_desc("v5p:2x2x1", "tpu", num_slices=2).devices
    mesh = make_mesh("data=2,fsdp=4", slices=2, devices=devices)
    found = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(2, 4)
    np.testing.assert_array_equal(found[0], [found[0, 0]] * 4)
    np.testing.assert_array_equal(found[1], [1 - found[0, 0]] * 4)
    with pytest.raises(MeshError, match="slices=2 with data=1"):
        make_mesh("fsdp=8", slices=2)
    halves = make_mesh("data=4,tensor=2", slices=2).devices.reshape(2, -1)  # devices that know of no slices
    assert [{device.id // 4 for device in half} for half in halves] == [{0}, {1}]


def test_rules_answer_in_the_mesh_s_order_and_split_one_axis_once():
    mesh = make_mesh("fsdp=4,expert=2")
    rules = RULES.replace(experts=("expert", "fsdp"), heads=None)
    assert rules.axes("experts", mesh) == ("fsdp", "expert")
    assert rules.spec("experts", "mlp", "embed", mesh=mesh) == PartitionSpec(("fsdp", "expert"), "tensor", None)
    assert rules.shards("experts", mesh) == 8
    assert spec("batch") is None
    with jax.set_mesh(mesh), use_rules(rules):
        assert spec("batch", "seq", "heads") == PartitionSpec(("data", "fsdp", "expert"), "context", None)
        with pytest.raises(MeshError, match="no sharding rule for the logical axis 'depth'"):
            spec("depth")
    for row, says in ((dict(depth="fsdp"), "rule for 'depth'"), (dict(heads="stage"), "rule heads -> 'stage'")):
        with pytest.raises(MeshError, match=says):
            RULES.replace(**row)


@pytest.mark.parametrize(
    "change, wish, says",
    [
        (dict(num_attention_heads=48), "tensor=5", "48 query heads over tensor=5: 48 / 5 leaves 3"),
        (dict(num_key_value_heads=6, num_attention_heads=24), "tensor=4", "6 key-value heads over tensor=4: accepted is a"),
        (dict(hidden_size=30), "fsdp=4", "30 hidden_size over fsdp=4: 30 / 4 leaves 2"),
        (dict(intermediate_size=50), "tensor=4", "50 intermediate_size over tensor=4"),
        (dict(num_experts=6), "expert=4", "6 experts over expert=4: 6 / 4 leaves 2"),
        (dict(num_experts=8, moe_intermediate_size=25), "tensor=2", "25 moe_intermediate_size over tensor=2"),
    ],
)
def test_models_that_do_not_fit(change, wish, says):
    config = dataclasses.replace(CONFIGS["mixed" if "num_experts" in change else "dense"], **change)
    axis, size = wish.split("=")
    mesh = jax.sharding.AbstractMesh(tuple(int(size) if name == axis else 1 for name in AXES), AXES)
    with pytest.raises(MeshError, match=says):
        fitted(RULES, config, mesh)


@pytest.mark.parametrize(
    "rows, wish, says",
    [
        (dict(batch=("data", "context")), "context=8", "batch and seq are both over context"),
        (dict(seq=("tensor",)), "tensor=2,data=4", "heads over tensor, which splits seq"),
        (dict(mlp=("fsdp", "tensor"), embed=None), "fsdp=4,tensor=2", "mlp over fsdp, which splits batch"),
        (dict(experts=None, mlp=("expert", "tensor")), "expert=4,tensor=2", "mlp over expert, which splits batch"),
        (dict(embed=("fsdp", "tensor")), "fsdp=4,tensor=2", "embed and mlp are both over tensor"),
        (dict(heads=("fsdp", "tensor")), "fsdp=4,tensor=2", "heads over fsdp, which splits batch"),
    ],
)
def test_one_axis_does_not_split_two_things(rows, wish, says):
    with pytest.raises(MeshError, match=f"rules: {says}.*accepted"):
        fitted(RULES.replace(**rows), CONFIGS["moe"], make_mesh(wish))


def test_axes_that_nothing_splits_have_no_rule_to_override():
    with pytest.raises(MeshError, match="rule for 'layers': is never split; accepted are vocab, embed"):
        RULES.replace(layers="data")


@pytest.mark.parametrize("asked", [dict(kv_heads=None), dict(heads=("fsdp", "tensor"), batch=("data",))])
def test_key_heads_are_whole_wherever_query_heads_are_split_otherwise(asked):
    config = dataclasses.replace(CONFIGS["dense"], num_attention_heads=8, num_key_value_heads=4)
    assert fitted(RULES.replace(**asked), config, make_mesh("fsdp=4,tensor=2")).table["kv_heads"] == ()
    odd = dataclasses.replace(config, num_attention_heads=24, num_key_value_heads=6)
    with pytest.raises(MeshError, match="6 key-value heads over tensor=4: accepted is a divisor of 6"):
        fitted(RULES.replace(kv_heads=None), odd, make_mesh("data=2,tensor=4"))


def test_rows_that_do_not_fit_and_experts_where_no_tokens_are():
    mesh = make_mesh("data=2,fsdp=2,context=2")
    with pytest.raises(MeshError, match="6 rows over data=2 x fsdp=2 = 4 shards: 6 / 4 leaves 2"):
        check_batch(RULES, mesh, 6, 64)
    with pytest.raises(MeshError, match="6 tokens per row over context=2: accepted is a multiple of 4"):
        check_batch(RULES, mesh, 8, 6)
    with pytest.raises(MeshError, match="experts over tensor: accepted are axes that tokens are split over"):
        fitted(RULES.replace(experts="tensor", mlp=None), CONFIGS["moe"], make_mesh("data=4,tensor=2"))


def test_key_heads_fewer_than_shards_are_whole_everywhere():
    config = CONFIGS["dense"]  # four query heads, two key heads
    mesh = make_mesh("fsdp=2,tensor=4")
    rules = fitted(RULES, config, mesh)
    assert rules.axes("kv_heads", mesh) == () and rules.axes("heads", mesh) == ("tensor",)
    attention = abstract_model(config, mesh).segments[0].blocks[0].attention
    assert attention.k.weight.get_value().sharding.spec == PartitionSpec(None, None, None, "fsdp")
    assert attention.q.weight.get_value().sharding.spec == PartitionSpec(None, "tensor", None, "fsdp")


def test_the_vocabulary_is_padded_in_memory():
    config = dataclasses.replace(CONFIGS["tied"], vocab_size=93)
    model = abstract_model(config, make_mesh("fsdp=4,tensor=2"))
    assert model.embed.weight.shape == (96, 32)
    assert abstract_model(config).embed.weight.shape == (93, 32)


def table(name: str, wish: str) -> str:
    """Path, shape and spec of every parameter."""
    devices = topologies.get_topology_desc("v5p:4x4x4", "tpu").devices
    state = nnx.state(abstract_model(Qwen3Config.preset(name), make_mesh(wish, devices=devices)), nnx.Param)
    rows = [
        f"{'.'.join(map(str, path)):44} {'x'.join(map(str, leaf.shape)):22} {leaf.get_value().sharding.spec}"
        for path, leaf in nnx.to_flat_state(state)
    ]
    return f"{name}, {wish}\n" + "\n".join(sorted(rows)) + "\n"


@pytest.mark.parametrize("name, wish", [("qwen3-30b-a3b", "fsdp=16,expert=4"), ("qwen3-235b-a22b", "fsdp=4,expert=2,tensor=8")])
def test_shardings_of_published_models_are_pinned(name, wish):
    """A change of the rules shows as a change of these files."""
    assert table(name, wish) == (GOLDEN / f"{name}.txt").read_text()


def test_the_mesh_of_a_model():
    mesh = make_mesh("fsdp=8")
    assert mesh_of(abstract_model(CONFIGS["dense"], mesh)) == mesh
    assert mesh_of(abstract_model(CONFIGS["dense"])) is None
    assert math.prod(mesh.shape.values()) == 8
