"""What each stage of a run needs by the real compiler: its own step on the run's own mesh, for chips that are not here.

A step is compiled in a process of its own, which is ended as soon as the compiler has placed all buffers: of a TPU's program
after about a tenth of the time. Its bytes are the compiler's, and machine code is never made.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from qwen3_jax.planning.buffers import dumped, read_memory
from qwen3_jax.planning.topology import COMPILE_ONLY, Topology, parse_topology
from qwen3_jax.runs.dry_run import GB, Need, dry_run
from qwen3_jax.runs.models import model_config
from qwen3_jax.runs.resolve import resolve
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.toml import RunError

WORKER = (sys.executable, "-m", "qwen3_jax.runs.step_worker")


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What became of a stage's step.

    Attributes:
        stage: its name.
        seconds: until its buffers were placed.
        arguments: bytes of one device; None where the compiler did not get so far, as `temporaries`.
        temporaries: bytes set aside for all else.
        needed: bytes that the compiler says a program would take whose buffers it did not place; else None.
        reason: why there is no figure, where it is not its size.
    """

    stage: str
    seconds: float
    arguments: int | None = None
    temporaries: int | None = None
    needed: int | None = None
    reason: str | None = None

    @property
    def total(self) -> int | None:
        """Arguments and temporaries, or what is needed; None where nothing is known."""
        return self.needed if self.arguments is None or self.temporaries is None else self.arguments + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A run with what the compiler says of its stages.

    Attributes:
        file: the run's.
        run: the run, as it was compiled.
        need: the same by the analytic model, of all stages.
        topology: the chips.
        steps: those that were compiled.
    """

    file: str
    run: Run
    need: Need
    topology: Topology
    steps: tuple[StepMemory, ...]

    def fits(self, step: StepMemory) -> bool | None:
        """Whether a stage's step fits a device; None where the compiler failed."""
        return None if step.total is None else step.total <= self.topology.chip.hbm

    def verdict(self, step: StepMemory) -> str:
        """The same in words."""
        if step.total is None:
            return "does not compile"
        over = step.total - self.topology.chip.hbm
        return "fits" if over <= 0 else f"does not fit: {over / GB:.1f} GB too many"


def compile_run(
    file: str | Path,
    *,
    stage: str | None = None,
    layers: int | None = None,
    topology: str | None = None,
    time_limit: float = 1800,
    begun: Callable[[str], None] = lambda name: None,
) -> Compiled:
    """Compile the steps of a run, one after another; stages whose steps are one program share it.

    Args:
        file: the run's.
        stage: this one alone; None is all of them.
        layers: so many in place of the model's.
        topology: chips in place of the run's.
        time_limit: seconds for each step.
        begun: called with each stage's name before it is compiled.

    Returns:
        The run and its steps.

    Raises:
        RunError: a file that is none, a stage that it lacks, no chips named.
        PlanError, MeshError, TopologyError: as of `dry_run`; a compiler that is not installed.
    """
    if not time_limit > 0:
        raise RunError(f"time_limit is {time_limit}: accepted is a number of seconds above 0")
    words = [] if layers is None else ["--model.config.num_hidden_layers", str(layers)]
    words += [] if topology is None else ["--mesh.topology", json.dumps(topology)]
    run = resolve(file, words).run
    if stage is not None and stage not in run.stages:
        raise RunError(f"{file} has no stage {stage!r}: accepted are {', '.join(run.stages)}")
    if run.mesh.topology is None:
        raise RunError(
            f"{file} names no chips: accepted are those that the run is meant for, as v5p:4x4x8, in mesh.topology or --topology"
        )
    need = dry_run(run)
    steps, known = [], {}
    for name in [stage] if stage is not None else run.stages:
        given = run.stages[name]
        program = given.batch, given.seq, given.accumulation, given.rope_theta  # all of a stage that its step is made of
        if program not in known:
            begun(name)
            known[program] = _step_memory({"file": str(file), "words": words, "stage": name}, time_limit)
        steps.append(dataclasses.replace(known[program], stage=name))
    return Compiled(str(file), run, need, parse_topology(str(run.mesh.topology), run.mesh.slices), tuple(steps))


def _step_memory(request: Mapping[str, Any], time_limit: float) -> StepMemory:
    """A stage's step, of a compiler that is ended once it has placed all buffers."""
    start, late = time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="qwen3-jax-plan-") as name:
        folder, dump = Path(name), Path(name, "dump")
        taken, given, said = folder / "request.json", folder / "result.json", folder / "log"
        dump.mkdir()
        taken.write_text(json.dumps(request))
        # Flags of our own alone: others may say what is dumped, and are of this machine's devices.
        environment = {**os.environ, **COMPILE_ONLY, "XLA_FLAGS": f"--xla_dump_to={dump}"}
        with said.open("wb") as log:
            # A session of its own, so that what it starts (ptxas) ends with it.
            child = subprocess.Popen(
                [*WORKER, str(taken), str(given)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        try:
            while (path := dumped(dump)) is None and child.poll() is None and not late:
                time.sleep(0.2)
                late = time.monotonic() - start > time_limit
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        seconds = time.monotonic() - start
        result: dict[str, Any] = json.loads(given.read_text()) if child.returncode == 0 else {}
        if "refused" in result:
            raise RunError(f"{request['file']}, stage {request['stage']}: {result['refused']}")
        if path is None and child.returncode == 0 and "reason" not in result:
            path = dumped(dump, ended=True)
        if path is not None:
            memory = read_memory(path)
            return StepMemory(request["stage"], seconds, memory.arguments, memory.temporaries)
        if child.returncode != 0:
            result["reason"] = f"stopped after its time limit of {time_limit:g} s" if late else _last_words(child, said)
        return StepMemory(request["stage"], seconds, None, None, result.get("needed"), result.get("reason"))


def _last_words(child: subprocess.Popen, log: Path) -> str:
    words = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"code {child.returncode}"
    return f"its process ended with {how}; its last words: {words[-1][:300] if words else 'none'}"


def step_table(compiled: Compiled) -> Table:
    """The steps for the terminal.

    Args:
        compiled: of `compile_run`.

    Returns:
        A row a stage: GB of one device.
    """
    run, topology = compiled.run, compiled.topology
    axes = ", ".join(f"{axis}={size}" for axis, size in compiled.need.mesh.items() if size > 1) or "one device"
    layers = model_config(run.model).num_hidden_layers
    title = f"{run.name}, {layers} layers: {axes} on {topology.name}; GB a device, by the compiler"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "tokens a step", "arguments", "temporaries", "in all", "dry run says", "verdict"):
        table.add_column(name, justify="left" if name in ("stage", "verdict") else "right", no_wrap=True)
    said = {stage.name: sum(stage.memory.values()) for stage in compiled.need.stages}
    for step in compiled.steps:
        stage = run.stages[step.stage]
        parts = f" in {stage.accumulation} parts" if stage.accumulation > 1 else ""
        table.add_row(
            step.stage,
            f"{stage.batch * stage.seq:,}{parts}",
            _gigabytes(step.arguments),
            _gigabytes(step.temporaries),
            f"{_gigabytes(step.total)} of {topology.chip.hbm / GB:.1f}",
            _gigabytes(said[step.stage]),
            compiled.verdict(step),
        )
    return table


def _gigabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / GB:.2f}"


def record(compiled: Compiled) -> dict[str, Any]:
    """The steps for programs: plain JSON values. Bytes are of one device.

    Args:
        compiled: of `compile_run`.

    Returns:
        The record; what is not known is None.
    """
    run, topology = compiled.run, compiled.topology
    analytic = {stage.name: stage.memory for stage in compiled.need.stages}

    def stage_of(step: StepMemory) -> dict[str, Any]:
        stage = run.stages[step.stage]
        return {
            "stage": step.stage,
            "batch": stage.batch,
            "seq": stage.seq,
            "accumulation": stage.accumulation,
            "fits": compiled.fits(step),
            "verdict": compiled.verdict(step),
            "reason": step.reason,
            "bytes": {"arguments": step.arguments, "temporaries": step.temporaries, "total": step.total},
            "analytic": {"bytes": analytic[step.stage]},
            "compile_seconds": step.seconds,
        }

    return {
        "run": compiled.file,
        "name": run.name,
        "layers": model_config(run.model).num_hidden_layers,
        "mesh": compiled.need.mesh,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": topology.devices,
        "chip": dataclasses.asdict(topology.chip),
        "stages": [stage_of(step) for step in compiled.steps],
    }
