"""Routes of mesh axes: what one device has of the chips' network."""

import numpy as np
import pytest

from qwen3_jax.planning.links import Links, Route, _route
from qwen3_jax.planning.topology import parse_topology
from tests.planning.jobs import mesh_on


def route(topology, wish, *axes, slices=1):
    mesh, parsed = mesh_on(topology, wish, slices)
    return Links(mesh, parsed).route(axes)


@pytest.mark.parametrize(
    "topology, wish, axes, bandwidth, hops",
    [
        ("v5p:2x2x1", "fsdp=4", ["fsdp"], 200e9, 2),  # two lines of 2
        ("v5p:2x2x4", "fsdp=4,expert=4", ["fsdp"], 100e9, 3),  # a line of 4: no cube, no rings
        ("v5p:2x2x4", "fsdp=4,expert=4", ["fsdp", "expert"], 300e9, 5),
        ("v5p:4x4x4", "fsdp=16,tensor=4", ["tensor"], 200e9, 2),  # a ring of 4
        ("v5p:4x4x4", "fsdp=16,tensor=4", ["fsdp"], 400e9, 4),
        ("v5p:4x4x4", "fsdp=64", ["fsdp"], 600e9, 6),
        ("v6e:4x4", "fsdp=16", ["fsdp"], 200e9, 6),  # lines: a ring is 16 long
        ("v6e:16x16", "fsdp=16,expert=16", ["expert"], 200e9, 8),
        ("v5e:2x4", "fsdp=8", ["fsdp"], 100e9, 4),
        ("tpu7x:2x2x1", "fsdp=4,tensor=2", ["tensor"], 600e9, 1),  # the two devices of a chip
        ("tpu7x:2x2x1", "fsdp=4,tensor=2", ["fsdp"], 100e9, 2),
    ],
)
def test_routes_within_a_slice(topology, wish, axes, bandwidth, hops):
    found = route(topology, wish, *axes)
    assert (found.bandwidth, found.hops) == (bandwidth, hops), found


def test_groups_that_lie_apart_share_links():
    """Two axes on one dimension of the torus: one has neighbours, the other every second chip and half of each link."""
    mesh, topology = mesh_on("v6e:16x16", "data=2,fsdp=8,expert=8,tensor=2")
    links = Links(mesh, topology)
    near, far = links.route(["tensor"]), links.route(["expert"])
    assert (near.bandwidth, near.words) == (100e9, "line of 2, 100 GB/s")
    assert far.words == "ring of 8 shared by 2, 100 GB/s" and far.one_way == 50e9 and far.hops == 8


def test_between_slices_the_slow_network_counts():
    across = route("v5p:2x2x1", "data=2,fsdp=4", "data", slices=2)
    assert across.bandwidth == 6.25e9 and "between 2 slices" in across.words
    both = route("v5p:2x2x1", "data=2,fsdp=4", "data", "fsdp", slices=2)
    assert both.bandwidth == 4 * 6.25e9
    assert route("v5p:2x2x1", "data=2,fsdp=4", "fsdp", slices=2).bandwidth == 200e9


def test_gpus_of_a_node_and_of_two():
    topology = parse_topology("h100:2x8")
    places = np.array([[node, 0, 0, 0, 8 * node + gpu] for node in (0, 1) for gpu in range(8)])
    assert _route(places[:8], topology).bandwidth == 450e9
    assert _route(places, topology).bandwidth == 8 * 50e9
    assert _route(places[[0, 8]], topology).bandwidth == 50e9


def test_seconds_of_collectives():
    """By hand: 9 GB at 90 % of 100 GB/s are 0.1 s."""
    some = Route(devices=4, bandwidth=100e9, one_way=50e9, hops=3, mean_hops=1.5, words="")
    assert some.seconds("all-gather", 9e9, 0, 1e-6, 0.9) == pytest.approx(0.1)
    assert some.seconds("collective-permute", 9e9, 0, 1e-6, 0.9) == pytest.approx(0.2)
    assert some.seconds("ragged-all-to-all", 9e9, 0, 1e-6, 0.9) == pytest.approx(0.15)
    assert some.seconds("all-reduce", 0, 1000, 1e-6, 0.9) == pytest.approx(3e-3)
    assert some.seconds("collective-permute", 0, 1000, 1e-6, 0.9) == pytest.approx(1e-3)
    assert route("v5p:2x2x1", "fsdp=4", "tensor").seconds("all-reduce", 9e9, 5, 1e-6, 0.9) == 0
