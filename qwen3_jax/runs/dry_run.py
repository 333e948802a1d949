"""What a run will need, before anything is started: its mesh, memory and tokens, by the plan's analytic model."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.table import Table

from qwen3_jax.chips import chip_of
from qwen3_jax.parallel.mesh import AXES, axis_sizes, check_slices
from qwen3_jax.planning.estimate import device_memory
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import shares
from qwen3_jax.planning.topology import parse_topology
from qwen3_jax.runs.models import model_config
from qwen3_jax.runs.parts import rules_of
from qwen3_jax.runs.schema import Run, StageSection

GB = 1e9


@dataclasses.dataclass(frozen=True)
class StageNeed:
    """A stage in figures.

    Attributes:
        name: its name.
        tokens: of the stage.
        steps: of the optimizer.
        rows: that a device works on at a time.
        memory: category -> bytes of a device.
    """

    name: str
    tokens: int
    steps: int
    rows: float
    memory: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Need:
    """A run in figures.

    Attributes:
        mesh: axis -> size, all five.
        devices: in all.
        hbm: bytes of a device; None where they are of no kind that is in the list of chips.
        parameters: of the model.
        stages: of the run.
    """

    mesh: dict[str, int]
    devices: int
    hbm: int | None
    parameters: int
    stages: tuple[StageNeed, ...]

    @property
    def bytes(self) -> float:
        """Of a device, in the stage that needs most."""
        return max(sum(stage.memory.values()) for stage in self.stages)


def stage_job(run: Run, stage: StageSection) -> Job:
    """What the planner calls the work of one accumulated part of a stage's step.

    Args:
        run: the run.
        stage: one of its stages.

    Returns:
        The job.
    """
    config = model_config(run.model)
    rows = stage.batch // stage.accumulation
    if run.lora is None:
        return Job(config, "train", rows, stage.seq, run.step.remat)
    lora = run.lora
    return Job(config, "lora", rows, stage.seq, run.step.remat, lora.rank, lora.base_dtype, lora.dtype)


def dry_run(run: Run, devices: int | None = None) -> Need:
    """Reckon a run.

    Args:
        run: the run.
        devices: how many there are, where the run names no topology; None: those that jax finds here.

    Returns:
        Its figures.

    Raises:
        RunError: a model that is none.
        TopologyError: a topology that is none.
        MeshError: a mesh that is none of these devices', a model or batch that does not fit it, with the arithmetic.
    """
    topology = None if run.mesh.topology is None else parse_topology(run.mesh.topology, run.mesh.slices)
    hbm = None if topology is None else topology.chip.hbm
    if topology is not None:
        count = topology.devices
    elif devices is not None:
        count = devices
    else:
        there = jax.devices()
        count, chip = len(there), chip_of(there[0].device_kind)
        hbm = None if chip is None else chip.hbm
    sizes = axis_sizes(run.mesh.axes, count)
    check_slices(sizes, run.mesh.slices)
    mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    rules = rules_of(run)
    found = []
    for name, stage in run.stages.items():
        job = stage_job(run, stage)
        cut = shares(job, mesh, rules)
        memory = _as_kept(run, device_memory(job, cut))
        found.append(StageNeed(name, stage.tokens, stage.steps, job.batch / cut.batch, memory))
    return Need(sizes, count, hbm, model_config(run.model).num_params(), tuple(found))


def _as_kept(run: Run, memory: dict[str, float]) -> dict[str, float]:
    """A job's memory in the run's own dtypes, and with the run's own optimizer.

    A job's training has parameters, gradients and two moments in float32; its adapters all of these in their own dtype, which
    the run's are in too. The first moment has a dtype to itself, the second that of the parameters; Muon has one of all but a
    few parameters.
    """
    optimizer, lora = run.optimizer, run.lora
    size = _bytes(run.model.param_dtype if lora is None else lora.dtype)
    reckoned = 4 if lora is None else size
    moments = _bytes(optimizer.moment_dtype) + (size if optimizer.name == "adamw" else 0)
    memory = memory | {"optimizer": 0.0 if optimizer.offload else memory["optimizer"] * moments / (2 * reckoned)}
    if lora is None:
        memory |= {name: memory[name] * size / reckoned for name in ("weights", "gradients")}
    return memory


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def need_tables(run: Run, need: Need) -> Sequence[Table]:
    """The figures of a dry run.

    Args:
        run: the run.
        need: its figures.

    Returns:
        A table of stages, and one of memory.
    """
    axes = ", ".join(f"{axis}={size}" for axis, size in need.mesh.items() if size > 1) or "one device"
    where = run.mesh.topology or f"{need.devices} device{'s' if need.devices > 1 else ''}"
    stages = Table(
        "stage", "tokens", "steps", "tokens a step", "rows a device", "tokens a row", title=f"{run.name}: {axes} on {where}"
    )
    for stage in need.stages:
        given = run.stages[stage.name]
        step = f"{given.batch * given.seq:,}" + (f" in {given.accumulation} parts" if given.accumulation > 1 else "")
        stages.add_row(stage.name, f"{stage.tokens:,}", f"{stage.steps:,}", step, f"{stage.rows:g}", f"{given.seq:,}")
    stages.add_row("in all", f"{run.tokens:,}", f"{run.steps:,}", "", "", "")
    of = "" if need.hbm is None else f" of {need.hbm / GB:.1f}"
    memory = Table("bytes a device, GB", *(stage.name for stage in need.stages), title="memory, by the analytic model")
    for kind in need.stages[0].memory:
        if any(stage.memory[kind] for stage in need.stages):
            memory.add_row(kind, *(f"{stage.memory[kind] / GB:.2f}" for stage in need.stages))
    totals = [sum(stage.memory.values()) for stage in need.stages]
    memory.add_row("in all", *(f"{total / GB:.2f}{of}{_verdict(total, need.hbm)}" for total in totals))
    return stages, memory


def _verdict(total: float, hbm: int | None) -> str:
    return "" if hbm is None or total <= hbm else f": {(total - hbm) / GB:.1f} too many"
