"""How fast the chips' network carries what a mesh axis sends: links in a torus, a switch, or the network between slices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qwen3_jax.chips import Chip
from qwen3_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Route:
    """What one device has for a collective over some mesh axes while every group of the mesh runs it too.

    Attributes:
        devices: of the group.
        bandwidth: bytes per second that a device sends when it uses all its links of the group: gathers and reductions.
        one_way: bytes per second to one neighbour: permutes.
        hops: chips that the last piece of a gather passes.
        mean_hops: chips that a piece of an all-to-all passes, on average over the group.
        words: the same for a reader.
    """

    devices: int
    bandwidth: float
    one_way: float
    hops: float
    mean_hops: float
    words: str

    def seconds(self, kind: str, sent: float, count: int, hop_seconds: float, efficiency: float, ways: float = 1) -> float:
        """Time of a collective.

        A gather, scatter or reduction: sent / bandwidth. A permute: sent / ways / one_way. An all-to-all: what is sent passes
        mean_hops links, so sent * max(1, mean_hops) / bandwidth. To each execution the latency of its hops is added (a
        permute's: one).

        Args:
            kind: the collective, by XLA's name.
            sent: bytes that a device sends, over all executions.
            count: executions.
            hop_seconds: latency of a hop.
            efficiency: share of a link's bandwidth that is reached.
            ways: directions that permutes go at the same time; each has links of its own.

        Returns:
            Seconds, of all executions one after the other.
        """
        if self.devices == 1:
            return 0.0
        if "permute" in kind:
            return sent / (ways * self.one_way * efficiency) + count * hop_seconds / ways
        through = sent * max(1.0, self.mean_hops) if "all-to-all" in kind else sent
        return through / (self.bandwidth * efficiency) + count * self.hops * hop_seconds


class Links:
    """Where the devices of a mesh lie, asked by mesh axes."""

    def __init__(self, mesh: Mesh, topology: Topology):
        self.axes = mesh.axis_names
        self.topology = topology
        self.places = np.vectorize(_place, signature="()->(n)")(mesh.devices)
        self._routes: dict[tuple[str, ...], Route] = {}

    def route(self, axes: Sequence[str]) -> Route:
        """The route of a collective over these axes.

        Along each dimension of the torus the group's devices lie `stride` chips apart, and as many groups share each link.
        Where they go once around a dimension that closes to a ring, a device uses two links of it, else one (the ends of a
        line have no more). Dimensions add up; where the group is no box of chips, a step goes along each of them, and they do
        not. A group that a slower network cuts into parts of m devices has at most m times what that network gives one
        device.

        Args:
            axes: mesh axes; none is no group.

        Returns:
            The route of the mesh's first such group, taken for all.
        """
        key = tuple(axis for axis in self.axes if axis in axes)
        if key not in self._routes:
            first = tuple(slice(None) if axis in key else 0 for axis in self.axes)
            self._routes[key] = _route(self.places[first].reshape(-1, self.places.shape[-1]), self.topology)
        return self._routes[key]


def _place(device: Any) -> np.ndarray:
    """Slice or node, coordinates of the chip, device on the chip."""
    if device.platform == "tpu":
        return np.array([getattr(device, "slice_index", 0) or 0, *device.coords, device.core_on_chip])
    return np.array([device.process_index, 0, 0, 0, device.id])


def _route(places: np.ndarray, topology: Topology) -> Route:
    chip, count = topology.chip, len(places)
    if count == 1:
        return Route(1, math.inf, math.inf, 0, 0, "one device")
    groups = len(np.unique(places[:, 0]))
    inside = places[places[:, 0] == places[0, 0]]
    inner = _inside(inside, topology)
    if groups == 1:
        return inner
    shared = min(inner.bandwidth, chip.dcn * len(inside))
    network = f"{len(inside)} x {chip.dcn / 1e9:g} GB/s between {groups} {'nodes' if chip.platform == 'cuda' else 'slices'}"
    return Route(count, shared, chip.dcn, inner.hops + groups - 1, max(1.0, inner.mean_hops), network)


def _inside(places: np.ndarray, topology: Topology) -> Route:
    chip, count = topology.chip, len(places)
    if count == 1:
        return Route(1, math.inf, math.inf, 0, 0, "one device")
    if chip.torus == 0:
        return Route(count, chip.link, chip.link, 1, 1, f"switch, {chip.link / 1e9:g} GB/s")
    chips = np.unique(places[:, 1:4], axis=0)
    if len(chips) == 1:
        link = chip.die_link or chip.link
        return Route(count, link, link, 1, 1, f"within a chip, {link / 1e9:g} GB/s")
    bandwidth = hops = mean = 0.0
    strides, words, box = [], [], 1
    for dimension, length in enumerate(topology.shape):
        values = np.unique(chips[:, dimension])
        if len(values) == 1:
            continue
        stride = int(np.diff(values).min())
        closes = _wraps(chip, topology.shape, length) and len(values) * stride == length and length > 2
        bandwidth += (2 if closes else 1) * chip.link / stride
        hops += (len(values) / 2 if closes else len(values) - 1) * stride
        mean += len(values) / (4 if closes else 3) * stride
        strides.append(stride)
        box *= len(values)
        shared = f" shared by {stride}" if stride > 1 else ""
        words.append(f"{'ring' if closes else 'line'} of {len(values)}{shared}")
    one_way = chip.link / min(strides)
    if box != len(chips):  # across the torus rather than along it: each step takes links of all dimensions
        bandwidth, one_way = bandwidth / len(words), one_way / len(words)
        words.append("crosswise")
    return Route(count, bandwidth, one_way, hops, mean, f"{' x '.join(words)}, {bandwidth / 1e9:.4g} GB/s")


def _wraps(chip: Chip, shape: tuple[int, ...], length: int) -> bool:
    if chip.wrap == "cube":
        return len(shape) == chip.torus and all(size % 4 == 0 for size in shape)
    return length == 16
