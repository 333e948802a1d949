"""Topologies: what their names mean, and what is refused before a compiler sees it."""

import dataclasses

import pytest

from qwen3_jax.chips import load_chips
from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.topology import TopologyError, devices_of, parse_topology


@pytest.mark.parametrize(
    "name, slices, chips, devices",
    [
        ("v5e:4x4", 1, 16, 16),
        ("v5p:2x2x4", 1, 16, 16),
        ("v6e:2x4", 2, 16, 16),
        ("tpu7x:2x2x1", 1, 4, 8),
    ],
)
def test_devices_are_as_many_as_said(name, slices, chips, devices):
    topology = parse_topology(name, slices)
    found = devices_of(topology)
    assert (topology.chips, topology.devices, len(found)) == (chips, devices, devices)
    assert len({getattr(device, "slice_index", 0) for device in found}) == slices


def test_nodes_of_gpus():
    assert parse_topology("h100:8").shape == (1, 8)
    assert (parse_topology("h100:4x8").shape, parse_topology("h100:4x8").chips) == ((4, 8), 32)


@pytest.mark.parametrize(
    "name, slices, says",
    [
        ("v4:2x2x1", 1, "accepted are v5e, v5p, v6e, tpu7x, h100, then a shape"),
        ("v5p", 1, "accepted is a shape of whole numbers from 1"),
        ("v5p:0x2x2", 1, "accepted is a shape of whole numbers from 1"),
        ("v5p:2x2x", 1, "accepted is a shape of whole numbers from 1"),
        ("v5e:2x2x2", 1, "v5e is a torus of 2 dimensions, accepted are 2 to 2"),
        ("v5e:4", 1, "v5e is a torus of 2 dimensions"),
        ("v6e:16x32", 1, "v6e:16x32' is 512 chips: the largest slice of v6e has 256"),
        ("v5p:2x2x1", 0, "slices is 0: accepted is a whole number from 1"),
        ("h100:16", 1, "up to 8 devices of one node, or whole nodes, NODESx8"),
        ("h100:2x4", 1, "up to 8 devices of one node"),
        ("h100:8", 2, "up to 8 devices of one node"),
    ],
)
def test_names_that_are_no_topology(name, slices, says):
    with pytest.raises(TopologyError, match=says):
        parse_topology(name, slices)


def test_a_shape_that_libtpu_refuses_is_told_in_its_words():
    with pytest.raises(TopologyError, match="v5p:3x3x3': libtpu says: .*not divisible.*; accepted are shapes as v5e:4x4"):
        devices_of(parse_topology("v5p:3x3x3"))


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    def missing(*args, **options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(TopologyError, match=r"needs jax's CUDA plugin, .* pip install 'qwen3-jax\[cuda13\]'"):
        devices_of(parse_topology("h100:8"))
    with pytest.raises(TopologyError, match=r"needs libtpu, .* pip install 'qwen3-jax\[tpu\]'"):
        devices_of(parse_topology("v5p:2x2x1"))


def test_chips_have_sources_and_what_they_can_do():
    chips = load_chips()
    assert list(chips) == ["v5e", "v5p", "v6e", "tpu7x", "h100"]
    for chip in chips.values():
        assert chip.source and chip.uncertain
        assert chip.hbm > 15e9 and chip.bf16_flops > 1e14
        assert (chip.wrap is None) == (chip.torus == 0)
    # A chip of tpu7x is two devices, each with half of it.
    assert chips["tpu7x"].bf16_flops * 2 == 2307e12 and chips["tpu7x"].hbm_bandwidth * 2 == 7380e9
    # Links in all directions: the figure that the vendor gives for a chip.
    for name, both_ways in (("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9)):
        assert chips[name].torus * 4 * chips[name].link == both_ways


def test_efficiencies_are_shares():
    for name in ("flops", "hbm", "links"):
        for value in (0, -0.5, 1.5, float("nan")):
            with pytest.raises(ValueError, match=f"efficiency.{name} is .*: accepted is a share above 0"):
                dataclasses.replace(Efficiency(), **{name: value})
