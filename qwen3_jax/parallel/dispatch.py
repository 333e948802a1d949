"""Which transport takes tokens to their experts, and how large its buffers are: a small model of what each would cost.

The model knows one layer's forward pass on a torus: products at the chip's peak, each touched expert's weights read once a
visit, bytes over the busiest link. It is there to rank, not to predict.
"""

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh

from qwen3_jax.chips import load_chips

TRANSPORTS = ("ring", "all_to_all", "gather")
HOP = 1e-6  # seconds that a message takes however short
GATHERED = 2**26  # bytes of everybody's tokens that a shard may hold: 64 MiB
FEW = 2048  # rows of a buffer that is not worth bounding


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What a run may say about how tokens travel; hashable, a part of a model's rules.

    Attributes:
        transport: "ring", "all_to_all" or "gather" (qwen3_jax.parallel.transports); "auto" is the cheapest by `choose`.
        slack: size of buffers in multiples of what evenly used experts would fill.
        rounds: how many times a buffer may be filled, the rest being dropped and counted; None: as often as it takes.
    """

    transport: str = "auto"
    slack: float = 1.25
    rounds: int | None = None

    def __post_init__(self) -> None:
        accepted = ("auto", *TRANSPORTS)
        if self.transport not in accepted:
            raise ValueError(f"dispatch: transport is {self.transport!r}; accepted are {', '.join(accepted)}")
        if not self.slack > 0:
            raise ValueError(f"dispatch: slack is {self.slack}; accepted is a positive number")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"dispatch: rounds is {self.rounds}; accepted is a positive number, or None")


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What the model wants to know of the devices.

    Attributes:
        flops: products in bfloat16, FLOP/s.
        memory: bandwidth of a device's memory, bytes/s.
        link: bandwidth of one link to a neighbour in one direction, bytes/s.
        ragged: whether blocks that are not full travel as what is in them.
    """

    flops: float
    memory: float
    link: float
    ragged: bool


def speeds_of(mesh: Mesh | AbstractMesh) -> Speeds:
    """Those of a mesh's devices: a v5p's for a TPU that is not known, an H100's for what is none.

    On one GPU node published figures have a ring at four times a ragged all-to-all; elsewhere whole blocks would travel. So
    all_to_all is left to TPUs, unless a run asks for it.
    """
    device = mesh.abstract_mesh.abstract_device if isinstance(mesh, Mesh) else mesh.abstract_device
    platform, kind = (device.platform, device.device_kind) if device is not None else ("", "")
    chips = load_chips()
    chip = next((chip for chip in chips.values() if chip.device_kind == kind), chips["v5p" if platform == "tpu" else "h100"])
    return Speeds(chip.bf16_flops, chip.hbm_bandwidth, chip.link, ragged=platform == "tpu")


@dataclasses.dataclass(frozen=True)
class Work:
    """One shard's part of one layer.

    Attributes:
        shards: of the experts.
        tokens: of this shard.
        top_k: experts of a token.
        embed: D.
        width: F, this shard's part of it.
        experts: of this shard.
        itemsize: bytes of a number in the compute dtype.
    """

    shards: int
    tokens: int
    top_k: int
    embed: int
    width: int
    experts: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """How tokens travel: static, a part of the compiled program.

    Attributes:
        transport: the way; None where experts are not split.
        capacity: rows that a shard works on at a time.
        quota: tokens from one shard to another in one round of all_to_all.
        rounds: how many times buffers may be filled, or None.
        seconds: what each transport would cost by the model, by name.
    """

    transport: str | None
    capacity: int
    quota: int
    rounds: int | None
    seconds: tuple[tuple[str, float], ...]


def choose(dispatch: Dispatch, work: Work, speeds: Speeds) -> Choice:
    """The transport and its buffers.

    Args:
        dispatch: what the run says.
        work: one shard's part.
        speeds: of the devices.

    Returns:
        The choice.
    """
    rows = work.tokens * work.top_k
    if work.shards == 1:
        return Choice(None, rows, 0, dispatch.rounds, ())
    costs = transport_seconds(work, speeds)
    transport = dispatch.transport if dispatch.transport != "auto" else min(costs, key=lambda name: costs[name])
    quota = min(work.tokens, _rounded(dispatch.slack * work.tokens * share_sent(work)))
    # Rows that tokens could have on a shard, and those that they have where experts are used evenly.
    tokens = {"ring": work.tokens, "gather": work.shards * work.tokens, "all_to_all": work.shards * quota}[transport]
    possible = tokens * min(work.top_k, work.experts) if transport == "ring" else tokens * work.top_k
    likely = rows / work.shards if transport == "ring" else rows
    capacity = min(tokens * work.top_k, _rounded(dispatch.slack * likely))
    if possible <= FEW and dispatch.slack >= 1:
        capacity = tokens * work.top_k
    return Choice(transport, capacity, quota, dispatch.rounds, tuple(costs.items()))


def share_sent(work: Work) -> float:
    """Of a shard's tokens the part that has work on another given shard, where experts are chosen evenly."""
    return 1 - (1 - 1 / work.shards) ** work.top_k


def transport_seconds(work: Work, speeds: Speeds) -> dict[str, float]:
    """What each transport would take, by a model that ranks.

    Both directions of a ring of n are in use. ring: n steps of work and of a hop, side by side, each as long as the longer of
    the two. all_to_all: a link carries n^2/8 of what a shard sends to one other; nothing hides it. gather: n - 1 shards' tokens
    come, and their sums go back.

    Args:
        work: one shard's part.
        speeds: of the devices.

    Returns:
        Seconds by name, those left out that cannot be: gather of more than GATHERED bytes, all_to_all where blocks that are
        not full cannot travel.
    """
    n, tokens = work.shards, work.tokens
    token = work.embed * work.itemsize + 8 * work.top_k  # bytes of its state, its experts and their weights
    back = work.embed * work.itemsize

    def products(rows: float) -> float:
        flops = 6 * rows * work.embed * work.width / speeds.flops
        weights = min(work.experts, rows) * 3 * work.embed * work.width * work.itemsize / speeds.memory
        return max(flops, weights)

    rows = tokens * work.top_k
    hop = tokens * (token + back) / (2 * speeds.link) + HOP
    step = products(rows / n)
    costs: dict[str, float] = {"ring": n * max(step, hop) + hop}
    if speeds.ragged:
        busiest = tokens * share_sent(work) * n**2 / 8
        costs["all_to_all"] = products(rows) + busiest * (token + back) / speeds.link + 2 * n * HOP
    if n * tokens * token <= GATHERED:
        costs["gather"] = products(rows) + (n - 1) * hop
    return costs


def _rounded(rows: float) -> int:
    """Up to a multiple of 8: the rows of a tile."""
    return max(8, math.ceil(rows / 8) * 8)
