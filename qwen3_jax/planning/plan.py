"""A plan: the meshes of a job, the best few of them compiled, and what comes of it as a record for programs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qwen3_jax.planning.candidates import Candidate, candidates
from qwen3_jax.planning.compile import Outcome, compile_all
from qwen3_jax.planning.efficiency import ASSUMED, Efficiency
from qwen3_jax.planning.estimate import model_flops
from qwen3_jax.planning.job import Job, PlanError
from qwen3_jax.planning.rank import SOURCES, Row, assumptions, ranked
from qwen3_jax.planning.topology import Topology, devices_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What came of it.

    Attributes:
        model: as it was named.
        job: the job.
        topology: the chips.
        efficiency: shares of the chip's figures that were taken to be reached.
        considered: meshes that fit the divisibility rules; those that were named where some were.
        rows: those that were compiled, best first.
    """

    model: str
    job: Job
    topology: Topology
    efficiency: Efficiency
    considered: int
    rows: list[Row]


def make_plan(
    model: str,
    job: Job,
    topology: Topology,
    *,
    meshes: Sequence[str] = (),
    rows: Sequence[str] = (),
    top: int = 4,
    workers: int = 1,
    time_limit: float = 1800,
    efficiency: Efficiency = ASSUMED,
    chosen: Callable[[list[Candidate], int], None] = lambda best, considered: None,
    done: Callable[[Candidate, Outcome], None] = lambda candidate, outcome: None,
) -> Plan:
    """Enumerate, prune, compile and rank. The environment should be COMPILE_ONLY's before jax is imported.

    Args:
        model: the model's name, for the record.
        job: the job.
        topology: the chips.
        meshes: meshes to compile in place of the most promising ones.
        rows: of the table of rules, "embed=fsdp+expert", in place of those of the mode's own table.
        top: how many of those are compiled.
        workers: processes at a time.
        time_limit: seconds for each.
        efficiency: shares of the chip's figures that are taken to be reached.
        chosen: called with the candidates that will be compiled, and how many there were.
        done: called as each of them ends.

    Returns:
        The plan.

    Raises:
        PlanError: a number that is none, no mesh that fits.
        TopologyError: the compiler is missing or does not know the shape.
        MeshError: a mesh in `meshes` that cannot be, a row in `rows` that is none.
    """
    for name, value in (("top", top), ("workers", workers)):
        if value < 1:
            raise PlanError(f"{name} is {value}: accepted is a whole number from 1")
    if not time_limit > 0:
        raise PlanError(f"time_limit is {time_limit}: accepted is a number of seconds above 0")
    found = candidates(job, topology, devices_of(topology), efficiency, meshes, rows)
    best = found if meshes else found[:top]
    chosen(best, len(found))
    outcomes = compile_all(job, topology, best, workers=workers, time_limit=time_limit, done=done)
    return Plan(model, job, topology, efficiency, len(found), ranked(job, topology, efficiency, best, outcomes))


def record(plan: Plan) -> dict[str, Any]:
    """The plan for programs: plain JSON values. Bytes, FLOPs and collectives are of one device and one step.

    Args:
        plan: the plan.

    Returns:
        The record; `candidates` best first. What is not known is None.
    """
    job, topology = plan.job, plan.topology
    return {
        "model": plan.model,
        "mode": job.mode,
        "batch": job.batch,
        "seq": job.seq,
        "remat": job.remat if job.trains else None,
        "rank": job.rank if job.adapts else None,
        "base": job.base if job.adapts else None,
        "adapter_dtype": job.adapter_dtype if job.adapts else None,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": topology.devices,
        "chip": dataclasses.asdict(topology.chip),
        "efficiency": dataclasses.asdict(plan.efficiency),
        "model_flops": model_flops(job),
        "considered": plan.considered,
        "sources": SOURCES,
        "candidates": [_candidate(plan, row) for row in plan.rows],
    }


def _candidate(plan: Plan, row: Row) -> dict[str, Any]:
    program, time, candidate = row.outcome.program, row.time, row.candidate
    return {
        "mesh": candidate.sizes,
        "rules": {name: list(axes) for name, axes in candidate.rules.rows.items()},
        "rules_name": candidate.rules.name,
        "transport": candidate.transport,
        "fits": row.fits,
        "verdict": row.verdict,
        "reason": row.outcome.reason,
        "bytes": row.bytes,
        "flops": program.flops if program else None,
        "timed_flops": row.flops,
        "hbm_bytes": program.hbm_bytes if program else None,
        "timed_hbm_bytes": program.timed_hbm_bytes if program else None,
        "collectives": [
            {**dataclasses.asdict(move.collective), "seconds": move.seconds, "network": move.network} for move in row.moves
        ],
        "step_seconds": time.total if time else None,
        "seconds": {**dataclasses.asdict(time), "exposed": time.exposed} if time else None,
        "tokens_per_second_per_chip": row.tokens_per_second_per_chip,
        "mfu": row.mfu,
        "compile_seconds": row.outcome.seconds,
        "analytic": {
            "flops": candidate.flops,
            "hbm_bytes": candidate.hbm_bytes,
            "bytes": candidate.memory,
            "traffic": [
                {**dataclasses.asdict(part), "network": candidate.links.route(part.axes).words} for part in candidate.traffic
            ],
            "step_seconds": candidate.time.total,
        },
        "assumptions": assumptions(plan.job, plan.topology, plan.efficiency, row),
    }
