"""Which meshes there are for a job, under which rules, and which of them the analytic model finds worth compiling."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from qwen3_jax.parallel.mesh import AXES, MeshError, make_mesh
from qwen3_jax.parallel.rules import RULES, TRAIN_RULES, WHOLE, Rules
from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.estimate import Traffic, device_flops, device_memory, device_traffic
from qwen3_jax.planning.job import Job, PlanError
from qwen3_jax.planning.links import Links
from qwen3_jax.planning.roofline import StepTime, step_time
from qwen3_jax.planning.shares import shares
from qwen3_jax.planning.topology import Topology
from qwen3_jax.planning.traffic import device_hbm_bytes

NEAR = 1.05  # times that the analytic model does not tell from each other


@dataclasses.dataclass(frozen=True)
class Named:
    """A table of rules by the name that a plan says.

    Attributes:
        name: "train" or "default" for the library's own tables, else the rows that were given.
        rules: the table.
    """

    name: str
    rules: Rules

    @property
    def rows(self) -> dict[str, tuple[str, ...]]:
        """Logical axis -> mesh axes, those that are never split left out: `RULES.replace(**rows)` is the table again."""
        return {name: axes for name, axes in self.rules.rows if name not in WHOLE}


def tables(job: Job, rows: Sequence[str] = ()) -> list[Named]:
    """The tables that a job is tried with.

    Args:
        job: the job.
        rows: as `Rules.replace_rows` reads them, in place of rows of the mode's own table.

    Returns:
        The mode's own table, TRAIN_RULES where there are gradients, with the rows given; without any, in training RULES too.

    Raises:
        MeshError: a row that is none.
    """
    own = Named("train", TRAIN_RULES) if job.trains else Named("default", RULES)
    if rows:
        return [Named(" ".join(rows), own.rules.replace_rows(rows))]
    return [own, Named("default", RULES)] if job.trains else [own]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, and what the analytic model says of it (qwen3_jax.planning.estimate).

    Attributes:
        sizes: mesh axis -> size, all five.
        rules: the table.
        transport: how tokens travel to experts; None where they do not.
        filled: share of the rows of the experts' buffers that evenly used experts fill.
        links: its axes on the chips' network.
        flops: of one device.
        hbm_bytes: of one device.
        traffic: what one device sends.
        memory: category -> bytes of one device.
        time: of a step.
    """

    sizes: dict[str, int]
    rules: Named
    transport: str | None
    filled: float
    links: Links
    flops: float
    hbm_bytes: float
    traffic: tuple[Traffic, ...]
    memory: dict[str, float]
    time: StepTime

    @property
    def bytes(self) -> float:
        """What a device needs by the analytic model."""
        return sum(self.memory.values())

    @property
    def wish(self) -> str:
        """The mesh as `make_mesh` reads it: axes larger than 1."""
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "data=1"


def mesh_sizes(job: Job, devices: int, slices: int = 1, rules: Rules = RULES) -> tuple[list[dict[str, int]], MeshError | None]:
    """Every mesh of so many devices that fits a job.

    Axes that the job has no use for stay 1: expert in a dense model, context where a cache keeps sequences whole.

    Args:
        job: the job.
        devices: how many there are.
        slices: groups that a slower network joins; data is a multiple of them.
        rules: which axes split what.

    Returns:
        Sizes by axis; and why the last mesh that does not fit was refused, None where all fit.
    """
    kinds = {kind.mlp for kind in job.config.block_kinds()}
    idle = ({"expert"} if "moe" not in kinds else set()) | ({"context"} if not job.trains else set())
    found, refused = [], None
    for factors in _factorings(devices, len(AXES)):
        sizes = dict(zip(AXES, factors, strict=True))
        if sizes["data"] % slices or any(sizes[axis] > 1 for axis in idle):
            continue
        try:
            shares(job, AbstractMesh(factors, AXES), rules)
        except MeshError as error:
            refused = error
            continue
        found.append(sizes)
    return found, refused


def _factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many, the order counting."""
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorings(number // first, parts - 1):
                yield (first, *rest)


def estimated(job: Job, mesh: Mesh, topology: Topology, efficiency: Efficiency, rules: Named) -> Candidate:
    """A mesh with what the analytic model says of it.

    Args:
        job: the job.
        mesh: of the topology's devices.
        topology: the chips.
        efficiency: shares of the chip's figures that are reached.
        rules: which axes split what.

    Returns:
        The candidate.

    Raises:
        MeshError: the job does not fit the mesh, with the arithmetic.
    """
    cut, links, chip = shares(job, mesh, rules.rules), Links(mesh, topology), topology.chip
    flops, hbm_bytes, traffic = device_flops(job, cut), device_hbm_bytes(job, cut), device_traffic(job, cut)

    def seconds(part: Traffic) -> float:
        route = links.route(part.axes)
        return route.seconds(part.kind, part.bytes, part.count, chip.hop_seconds, efficiency.links, part.ways)

    time = step_time(flops, hbm_bytes, [(seconds(part), part.overlapped) for part in traffic], chip, efficiency)
    transport = cut.choice.transport if cut.choice is not None else None
    memory = device_memory(job, cut)
    return Candidate(dict(mesh.shape), rules, transport, cut.filled(job), links, flops, hbm_bytes, traffic, memory, time)


def candidates(
    job: Job,
    topology: Topology,
    devices: Sequence[Any],
    efficiency: Efficiency,
    wishes: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> list[Candidate]:
    """All candidates, the most promising first: those that should fit by their predicted time, then the rest by their bytes.

    Each mesh is there once, with whichever table of rules promises more: of those that fit and take no more than NEAR times
    what the fastest takes, the one of the fewest bytes.

    Args:
        job: the job.
        topology: the chips.
        devices: its devices.
        efficiency: shares of the chip's figures that are reached.
        wishes: meshes to look at in place of all, as `make_mesh` reads them.
        rows: of the rules (`tables`).

    Returns:
        The candidates.

    Raises:
        MeshError: a wish that fits under no table, with the first one's arithmetic; a row that is none.
        PlanError: no mesh fits.
    """
    known, hbm = tables(job, rows), topology.chip.hbm

    def promise(each: Candidate) -> tuple[bool, float]:
        return each.bytes > hbm, each.time.total if each.bytes <= hbm else each.bytes

    def best(wish: str, tried: Iterable[Named]) -> Candidate:
        mesh, under, refused = make_mesh(wish, slices=topology.slices, devices=devices), [], None
        for rules in tried:
            try:
                under.append(estimated(job, mesh, topology, efficiency, rules))
            except MeshError as error:
                refused = refused or error
        if refused is not None and not under:
            raise refused
        near = NEAR * min(under, key=promise).time.total
        return min(under, key=lambda each: (each.bytes > hbm, each.time.total > near, each.bytes))

    if wishes:
        found = [best(wish, known) for wish in wishes]
    else:
        fitting: dict[str, list[Named]] = {}
        refused = None
        for rules in known:
            sizes, why = mesh_sizes(job, len(devices), topology.slices, rules.rules)
            refused = refused or why
            for each in sizes:
                fitting.setdefault(",".join(f"{axis}={size}" for axis, size in each.items()), []).append(rules)
        if not fitting:
            why = f"; of the last one tried: {refused}" if refused else ""
            raise PlanError(
                f"no mesh of {len(devices)} devices fits {job.batch} rows of {job.seq} tokens in {job.mode}: accepted is "
                f"a batch and a topology that share more factors{why}"
            )
        found = [best(wish, rules) for wish, rules in fitting.items()]
    return sorted(found, key=promise)
