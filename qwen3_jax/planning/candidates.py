"""Which meshes there are for a job, and which of them the analytic model finds worth compiling."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from qwen3_jax.parallel.mesh import AXES, MeshError, make_mesh
from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.estimate import Traffic, device_flops, device_hbm_bytes, device_memory, device_traffic
from qwen3_jax.planning.job import Job, PlanError
from qwen3_jax.planning.links import Links
from qwen3_jax.planning.roofline import StepTime, step_time
from qwen3_jax.planning.shares import shares
from qwen3_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, and what the analytic model says of it (qwen3_jax.planning.estimate).

    Attributes:
        sizes: mesh axis -> size, all five.
        links: its axes on the chips' network.
        flops: of one device.
        hbm_bytes: of one device.
        traffic: what one device sends.
        memory: category -> bytes of one device.
        time: of a step.
    """

    sizes: dict[str, int]
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


def mesh_sizes(job: Job, devices: int, slices: int = 1) -> tuple[list[dict[str, int]], MeshError | None]:
    """Every mesh of so many devices that fits a job.

    Axes that the job has no use for stay 1: expert in a dense model, context where a cache keeps sequences whole.

    Args:
        job: the job.
        devices: how many there are.
        slices: groups that a slower network joins; data is a multiple of them.

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
            shares(job, AbstractMesh(factors, AXES))
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


def estimated(job: Job, mesh: Mesh, topology: Topology, efficiency: Efficiency) -> Candidate:
    """A mesh with what the analytic model says of it.

    Args:
        job: the job.
        mesh: of the topology's devices.
        topology: the chips.
        efficiency: shares of the chip's figures that are reached.

    Returns:
        The candidate.

    Raises:
        MeshError: the job does not fit the mesh, with the arithmetic.
    """
    cut, links, chip = shares(job, mesh), Links(mesh, topology), topology.chip
    flops, hbm_bytes, traffic = device_flops(job, cut), device_hbm_bytes(job, cut), device_traffic(job, cut)
    moves = [
        (links.route(part.axes).seconds(part.kind, part.bytes, part.count, chip.hop_seconds, efficiency.links), part.overlapped)
        for part in traffic
    ]
    time = step_time(flops, hbm_bytes, moves, chip, efficiency)
    return Candidate(dict(mesh.shape), links, flops, hbm_bytes, traffic, device_memory(job, cut), time)


def candidates(
    job: Job, topology: Topology, devices: Sequence[Any], efficiency: Efficiency, wishes: Sequence[str] = ()
) -> list[Candidate]:
    """All candidates, the most promising first: those that should fit by their predicted time, then the rest by their bytes.

    Args:
        job: the job.
        topology: the chips.
        devices: its devices.
        efficiency: shares of the chip's figures that are reached.
        wishes: meshes to look at in place of all, as `make_mesh` reads them.

    Returns:
        The candidates.

    Raises:
        MeshError: a wish that cannot be.
        PlanError: no mesh fits.
    """

    def made(wish: str) -> Candidate:
        return estimated(job, make_mesh(wish, slices=topology.slices, devices=devices), topology, efficiency)

    if wishes:
        found = [made(wish) for wish in wishes]
    else:
        sizes, refused = mesh_sizes(job, len(devices), topology.slices)
        if not sizes:
            why = f"; of the last one tried: {refused}" if refused else ""
            raise PlanError(
                f"no mesh of {len(devices)} devices fits {job.batch} rows of {job.seq} tokens in {job.mode}: accepted is "
                f"a batch and a topology that share more factors{why}"
            )
        found = [made(",".join(f"{axis}={size}" for axis, size in each.items())) for each in sizes]
    hbm = topology.chip.hbm
    return sorted(found, key=lambda each: (each.bytes > hbm, each.time.total if each.bytes <= hbm else each.bytes, math.inf))
