"""Meshes: all that fit and no other, in the order that the analytic model gives."""

import contextlib
import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from qwen3_jax import Qwen3Config, make_mesh
from qwen3_jax.checks import ConfigError
from qwen3_jax.model.abstract import abstract_model
from qwen3_jax.parallel.fit import check_batch, fitted
from qwen3_jax.parallel.mesh import AXES, MeshError
from qwen3_jax.parallel.rules import RULES, TRAIN_RULES
from qwen3_jax.planning.candidates import Named, candidates, mesh_sizes, tables
from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.job import Job, PlanError
from qwen3_jax.planning.shares import shares
from qwen3_jax.planning.topology import devices_of, parse_topology
from qwen3_jax.tune.lora import LoraConfig
from tests.model.models import CONFIGS
from tests.planning.jobs import job


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    mode=st.sampled_from(["train", "prefill", "decode"]),
    devices=st.sampled_from([1, 2, 4, 6, 8, 12, 16, 32]),
    batch=st.integers(1, 48),
    slices=st.sampled_from([1, 2]),
)
def test_every_mesh_is_of_all_devices_and_fits(name, mode, devices, batch, slices):
    work = job(name, mode, batch, 64)
    found, refused = mesh_sizes(work, devices, slices)
    for sizes in found:
        assert list(sizes) == list(AXES) and math.prod(sizes.values()) == devices and sizes["data"] % slices == 0
        mesh = AbstractMesh(tuple(sizes.values()), AXES)
        rules = fitted(RULES, work.config, mesh)  # raises where it does not fit
        check_batch(rules, mesh, batch, 64 if mode == "train" else None)
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)
    assert found or refused is not None or devices % slices


def test_no_mesh_that_fits_is_left_out():
    """16 devices are shared out to five axes in 70 ways (four twos, repeated), which all fit this model."""
    work = Job(Qwen3Config.preset("qwen3-30b-a3b"), "train", 64, 4096)
    found, refused = mesh_sizes(work, 16)
    assert len(found) == math.comb(4 + 4, 4) and refused is None
    found, _ = mesh_sizes(Job(work.config, "decode", 64, 4096), 16)
    assert len(found) == math.comb(4 + 3, 3)  # no context
    found, _ = mesh_sizes(Job(Qwen3Config.preset("qwen3-8b"), "decode", 64, 4096), 16)
    assert len(found) == math.comb(4 + 2, 2)  # nor experts


def listed(work, name, wishes=(), rows=()):
    topology = parse_topology(name)
    return candidates(work, topology, devices_of(topology), Efficiency(), wishes, rows)


def test_those_that_should_fit_come_first_the_fastest_of_them_ahead():
    work = Job(Qwen3Config.preset("qwen3-30b-a3b"), "train", 64, 4096)
    found = listed(work, "v5p:2x2x4")
    hbm = parse_topology("v5p:2x2x4").chip.hbm
    fitting = [each for each in found if each.bytes <= hbm]
    assert found[: len(fitting)] == fitting and 0 < len(fitting) < len(found) == 70
    assert [each.time.total for each in fitting] == sorted(each.time.total for each in fitting)
    others = [each.bytes for each in found[len(fitting) :]]
    assert others == sorted(others) and found[-1].sizes["fsdp"] == 1


def test_training_is_tried_under_two_tables_and_shown_under_the_better():
    work = Job(Qwen3Config.preset("qwen3-30b-a3b"), "train", 64, 4096)
    assert [each.name for each in tables(work)] == ["train", "default"]
    assert tables(work)[0].rules == TRAIN_RULES and tables(job(mode="decode"))[0].rules == RULES
    (best,) = listed(work, "v5p:2x2x4", ["fsdp=4,expert=4"])
    (other,) = listed(work, "v5p:2x2x4", ["fsdp=4,expert=4"], ["embed=fsdp", "vocab=fsdp+tensor"])
    assert best.rules.name == "train" and other.rules.rules == RULES and other.rules.name == "embed=fsdp vocab=fsdp+tensor"
    assert best.bytes < other.bytes - 4e9 and best.time.total < 1.05 * other.time.total
    (served,) = listed(job(mode="decode"), "v5p:2x2x1", ["expert=4"])
    assert served.rules == Named("default", RULES) and served.rules.rows["embed"] == ("fsdp",)
    assert (best.transport, served.transport) == ("ring", "gather")


def test_rows_of_the_rules_may_be_given():
    assert tables(job(), ["experts=fsdp+expert"])[0].rules == TRAIN_RULES.replace(experts=("fsdp", "expert"))
    assert tables(job(mode="decode"), ["vocab="])[0].rules == RULES.replace(vocab=None)
    with pytest.raises(MeshError, match="rule 'embed': accepted is LOGICAL=AXIS"):
        tables(job(), ["embed"])
    with pytest.raises(MeshError, match="rule embed -> 'stage': no such mesh axis"):
        tables(job(), ["embed=stage"])


def test_meshes_may_be_named():
    found = listed(job(), "v5p:2x2x1", ["fsdp=2,tensor=-1", "data=4"])
    assert {each.wish for each in found} == {"fsdp=2,tensor=2", "data=4"}
    with pytest.raises(MeshError, match="fsdp=3 is 3, and there are 4 devices"):
        listed(job(), "v5p:2x2x1", ["fsdp=3"])
    with pytest.raises(MeshError, match="16 rows over data=32"):
        listed(job(), "v5p:4x4x2", ["data=32"])


def test_where_nothing_fits_the_last_reason_is_told():
    with pytest.raises(PlanError, match="no mesh of 32 devices fits 3 rows of 64 tokens in prefill: .* 3 / 32 leaves 3"):
        listed(job("dense", "prefill", 3), "v5p:2x4x4")


def test_a_mesh_that_cuts_a_block_of_codes_is_no_candidate():
    """Two heads of 64 and an MLP of 128: of blocks of 64 that lie along them tensor=4 leaves half to a device."""
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=128,
    )
    whole = Job(config, "lora", 8, 64)
    codes = dataclasses.replace(whole, base="int4")
    meshes = {base: {each.wish for each in listed(work, "v5e:2x2")} for base, work in (("floats", whole), ("codes", codes))}
    assert meshes["codes"] < meshes["floats"] and meshes["floats"] - meshes["codes"] == {"tensor=4"}
    with pytest.raises(MeshError, match=r"attention.o has 128 columns in blocks of 64, over tensor=4: 2 / 4 leaves 2"):
        listed(codes, "v5e:2x2", ["tensor=4"])
    with pytest.raises(ConfigError, match=r"attention.q has 96 columns in blocks of 64: 96 / 64 leaves 32; accepted is"):
        Job(dataclasses.replace(config, hidden_size=96), "lora", 8, 64, base="int4")


@pytest.mark.parametrize(
    "rules, wish, whole",
    [(RULES, "fsdp=2,expert=4", True), (TRAIN_RULES, "fsdp=2,expert=4", False), (RULES, "expert=2,tensor=4", False)],
    ids=["embed in two", "embed in eight", "width in four"],
)
def test_blocks_are_cut_where_the_model_itself_says_so(rules, wish, whole):
    """D is 256, an expert's width 128; what is refused here is what quantising on that mesh refuses."""
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
    )
    work, mesh = Job(config, "lora", 8, 64, base="nf4"), make_mesh(wish)
    for look in (
        lambda: shares(work, mesh, rules),
        lambda: abstract_model(config, mesh, rules=rules, adapt=LoraConfig(base="nf4")),
    ):
        with contextlib.nullcontext() if whole else pytest.raises(MeshError, match="in blocks of 64"):
            look()


def test_a_mesh_that_fits_under_one_table_is_tried_under_that_one():
    """Sixteen rows over eight devices: the tables differ in the embed axis, of which 320 numbers are blocks of 64 in five."""
    config = dataclasses.replace(CONFIGS["moe"], hidden_size=320, num_attention_heads=4, head_dim=64, moe_intermediate_size=64)
    work = Job(config, "lora", 16, 64, base="int8")
    (found,) = listed(work, "v5e:2x4", ["data=2,expert=4"])
    assert found.rules.name == "default"
    with pytest.raises(MeshError, match=r"attention.q has 320 columns in blocks of 64, over expert=4"):
        listed(work, "v5e:2x4", ["data=2,expert=4"], ["embed=expert"])
