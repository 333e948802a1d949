"""A run, carried out: everything that its file names is made, or restored, and the loop is started."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from qwen3_jax.chips import chip_of
from qwen3_jax.compilation import mend_compilation_cache, share_compilation_cache
from qwen3_jax.config import Qwen3Config
from qwen3_jax.data.loader import make_loader
from qwen3_jax.data.state import merge_states
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.batches import global_batch, process_rows
from qwen3_jax.parallel.processes import initialize
from qwen3_jax.parallel.rules import Rules
from qwen3_jax.planning.estimate import model_flops
from qwen3_jax.runs.alone import alone
from qwen3_jax.runs.dry_run import stage_job
from qwen3_jax.runs.export import Exports, check_export
from qwen3_jax.runs.look import Look
from qwen3_jax.runs.models import check_weights, check_words, model_config
from qwen3_jax.runs.parts import about, loader_config, lora_config, optimizer_of, policy_of, rules_of, stage_step
from qwen3_jax.runs.places import check_shared, check_store, checkpoint_folder, run_folder
from qwen3_jax.runs.report import write_report
from qwen3_jax.runs.schema import Run, StageSection
from qwen3_jax.runs.show import shown
from qwen3_jax.runs.starts import Starts
from qwen3_jax.runs.toml import RunError
from qwen3_jax.training.checkpoints import Checkpoints, TrainingCheckpointError
from qwen3_jax.training.journal import Journal
from qwen3_jax.training.loop import Loop, Progress, Stage, TrainingError
from qwen3_jax.training.sinks import Board, TensorBoard, Wandb, check_extras
from qwen3_jax.training.state import abstract_train_state, init_train_state
from qwen3_jax.training.stopping import Stopping
from qwen3_jax.tune.lora import attach

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        step: steps made in all.
        done: whether that is all of them; else it was told to end.
        seconds: where the time of this start went: start, compile, train, data, save, look, restore.
    """

    step: int
    done: bool
    seconds: dict[str, float]


def train(run: Run, told: Callable[[int, Mapping[str, Any]], None] | None = None, said: Callable[[str], None] = print) -> Ended:
    """Carry out a run: from its newest checkpoint if it has one, to its end or until a SIGTERM.

    Args:
        run: the run.
        told: is shown each step's figures, on process 0.
        said: is given a line for each thing worth knowing, on process 0.

    Returns:
        How it ended.

    Raises:
        RunError: another number of processes than the run names, data of more words than the model has, a checkpoint beyond
            the run's end, and what the run's parts refuse.
        MeshError: axes or slices that are none of the devices'.
        SinkError: TensorBoard or W&B is wanted and not installed.
        TrainingError: the run stopped by itself, an export cannot be written, or whatever would be a refusal at the door was
            raised once steps had been made.
        TrainingCheckpointError: a checkpoint cannot be written, or none be read.
        OSError: a file of the run cannot be written.
    """
    begun, clock = time.perf_counter(), time.time()
    check_extras(tensorboard=run.watch.tensorboard, wandb=run.watch.wandb is not None)
    check_store(run)
    processes = initialize(mesh=run.mesh.axes, slices=run.mesh.slices)
    wanted = run.mesh.processes
    if wanted is not None and wanted != processes.count:
        raise RunError(f"mesh.processes is {wanted}, and {processes.count} started: accepted is a start of {wanted}")
    mesh, leads = processes.mesh, processes.id == 0
    if leads:
        mend_compilation_cache()  # a kill of the start before this one may have cut off an entry
    if not share_compilation_cache() and leads:
        said("only process 0 would find compiled programs again, so this start keeps none")
    if mesh is None:
        raise RunError("mesh.axes is empty: accepted are sizes by axis, fsdp=-1 for all devices")
    # From here on a SIGTERM is answered before the next step, and after the last one not at all: the run ends by itself then.
    with Stopping() as stopping:
        return _carry_out(run, mesh, leads, begun, clock, told, said if leads else _quiet, stopping)


def _carry_out(
    run: Run,
    mesh: Mesh,
    leads: bool,
    begun: float,
    clock: float,
    told: Callable[[int, Mapping[str, Any]], None] | None,
    said: Callable[[str], None],
    stopping: Stopping,
) -> Ended:
    config, rules = model_config(run.model), rules_of(run)
    check_weights(run.model, config)
    optimizer = optimizer_of(run)
    folder = run_folder(run)
    check_shared(run)
    watched = run.watch.held_out is not None or run.watch.prompts
    look = Look(run, config, mesh, rules) if watched else None  # before weights are read, for it may refuse
    kept = run.checkpoint
    with contextlib.ExitStack() as held:
        if leads:
            held.enter_context(alone(folder, clock))
        checkpoints = held.enter_context(Checkpoints(checkpoint_folder(run), keep=kept.keep, keep_every=kept.keep_every))
        _check_stages_ahead(run, config, checkpoints)
        state, progress = _begin(run, config, mesh, rules, optimizer, checkpoints, said)
        first = int(state.step)
        check_export(run, first)
        starts = Starts(folder, first, clock, writes=leads)
        boards = _boards(run, folder, first) if leads else ()
        journal = Journal(folder / "metrics.jsonl", first, writes=leads, boards=boards)
        stages = [_stage(run, name, stage, config, mesh, rules, optimizer) for name, stage in run.stages.items()]
        exports = Exports(run, config, first, rules, said)
        loop = Loop(
            stages,
            policy_of(run),
            checkpoints,
            journal,
            about=about(run),
            look=look,
            export=exports,
            told=told if leads else None,
            said=said,
            trace=str(folder / "trace"),
            peak=peak_of(mesh),
        )
        start, step, came_to = time.perf_counter() - begun, first, "failed"
        try:
            with _no_refusals(lambda: loop.reached - first):
                early = stopping.asked(first)
                state, done = (state, False) if early else loop.run(state, progress, stopping)
                if done:
                    begun = time.perf_counter()
                    exports.last(state)
                    loop.seconds["save"] += time.perf_counter() - begun
            step, came_to = int(state.step), "done" if done else "told to end"
        finally:
            # Also of a run that stops by itself: what led to it is what one wants to see.
            seconds = dict(start=start, **loop.seconds)
            try:
                try:
                    lost = journal.lost()
                    starts.end(max(first, loop.reached) if came_to == "failed" else step, came_to, seconds, lost)
                    if leads:
                        _report(run, folder)
                finally:
                    journal.close()  # last, for boards may be slow, and whoever told the run to end may kill it meanwhile
            except OSError as error:  # a disk that is full has ended the run already, and that is what is to be told
                said(f"the figures' end, the report, or this start's line in it, cannot be written: {error}")
        how = "told to end before this start's first step, with nothing to save," if early else "told to end: saved"
        said(f"{'done' if done else how} at step {step:,} of {loop.steps:,}")
    said(f"seconds of this start: {'  '.join(f'{name} {value:.1f}' for name, value in seconds.items())}")
    return Ended(step, done, seconds)


def _report(run: Run, folder: Path) -> None:
    """The report; what fails in making it must not stand in the place of how the run ended."""
    try:
        write_report(run, folder)
    except OSError:
        raise
    except Exception:
        logger.exception("the report cannot be made")


@contextlib.contextmanager
def _no_refusals(made: Callable[[], int]) -> Iterator[None]:
    """Once steps have been made nothing is bad input any more: what is raised as such is a fault of this run."""
    try:
        yield
    except TrainingCheckpointError:
        raise
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        if made() <= 0:
            raise
        raise TrainingError(f"after {made():,} steps of this start: {error}") from error


def _boards(run: Run, folder: Path, first: int) -> list[Board]:
    """What the run's lines go to beside metrics.jsonl."""
    boards: list[Board] = []
    if run.watch.tensorboard:
        boards.append(Board("watch.tensorboard", lambda: TensorBoard(folder / "tensorboard", first)))
    project = run.watch.wandb
    if project is not None:
        boards.append(Board("watch.wandb", lambda: Wandb(folder / "wandb", project, run.name, about(run)["config"])))
    return boards


def peak_of(mesh: Mesh) -> float | None:
    """FLOP/s in bfloat16 of a mesh's devices; None of a kind that is not in the list of chips."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return None if chip is None else chip.bf16_flops * mesh.size


def _quiet(line: str) -> None:
    del line


def _check_stages_ahead(run: Run, config: Qwen3Config, checkpoints: Checkpoints) -> None:
    """Refuse what would end the run days from now, or is nothing to go on with: the data of all stages that are not over."""
    newest = max(checkpoints.steps(), default=0)
    if newest > run.steps:
        raise RunError(
            f"{checkpoints.folder} has a checkpoint of step {newest:,}, and the run's stages end at step {run.steps:,}: "
            f"accepted are stages of at least {newest:,} steps (stages.NAME.tokens), or another name"
        )
    end, names = 0, {}
    for stage in run.stages.values():
        end += stage.steps
        if end > newest:
            names |= dict.fromkeys(stage.mixture or run.data.sources)
    for name in names:
        check_words(f"data.sources.{name}.folder", run.data.sources[name].folder, config)


def _begin(
    run: Run,
    config: Qwen3Config,
    mesh: Mesh,
    rules: Rules,
    optimizer: Any,
    checkpoints: Checkpoints,
    said: Callable[[str], None],
) -> tuple[Any, Progress]:
    """The newest checkpoint that can be read, or a new state."""
    param_dtype = jnp.dtype(run.model.param_dtype if run.lora is None else run.lora.float_dtype)
    if checkpoints.steps():
        options: dict[str, Any] = dict(rules=rules, param_dtype=param_dtype, adapt=lora_config(run))
        if run.lora is not None:
            options["adapter_dtype"] = run.lora.dtype
        like = abstract_train_state(config, optimizer, mesh, offload=run.optimizer.offload, **options)
        found = checkpoints.restore(like)
        if found is not None:
            for step, reason in found.passed_over.items():
                said(f"checkpoint {step} cannot be read, so step {found.step} is gone on from: {reason}")
            said(f"goes on at step {found.step:,}, from {checkpoints.folder}")
            say_changes(run, found.run, said)
            state = found.state
            if run.lora is not None:  # the base is not saved again and again: it is where it was
                frozen = nnx.state(_model(run, config, mesh, rules), nnx.LoRAParam, nnx.Param)[1]
                state = dataclasses.replace(state, frozen=frozen)
            return state, Progress(**found.run["progress"])
    model = _model(run, config, mesh, rules)
    trainable = nnx.Param if run.lora is None else nnx.LoRAParam
    state = init_train_state(
        model, optimizer, trainable=trainable, loss_scale=run.step.loss_scale, offload=run.optimizer.offload
    )
    return state, Progress()


def say_changes(run: Run, saved: Mapping[str, Any], said: Callable[[str], None]) -> None:
    """Say what of a run, and of the code and its libraries, is another than in a checkpoint.

    Args:
        run: the run.
        saved: what the checkpoint says of itself (parts.about).
        said: is given a line for each value.
    """
    here = about(run)

    def differing(one: Any, other: Any, at: str) -> None:
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for name in {**one, **other}:
                differing(one.get(name), other.get(name), f"{at}.{name}" if at else name)
        elif one != other:
            said(f"changed since it was saved: {at} {shown(one)} -> {shown(other)}")

    differing(saved["config"], here["config"], "")
    differing(saved.get("versions", {}), here["versions"], "versions")


def _model(run: Run, config: Qwen3Config, mesh: Mesh, rules: Rules) -> Qwen3:
    """The model before the first step, on the mesh."""
    section, lora = run.model, run.lora
    dtype, param_dtype = jnp.dtype(section.compute_dtype), jnp.dtype(section.param_dtype if lora is None else lora.float_dtype)
    if section.folder is not None and section.weights == "folder":
        options: dict[str, Any] = dict(mesh=mesh, dtype=dtype, param_dtype=param_dtype, rules=rules)
        if lora is not None and lora.codes is not None:
            from qwen3_jax.tune.pretrained import from_pretrained_in_codes

            model = from_pretrained_in_codes(section.folder, lora.codes, **options)
        else:
            from qwen3_jax.checkpoint.pretrained import from_pretrained

            model = from_pretrained(section.folder, **options)
    else:
        with jax.set_mesh(mesh):
            model = jax.jit(
                lambda key: Qwen3(config, rngs=nnx.Rngs(params=key), dtype=dtype, param_dtype=param_dtype, rules=rules)
            )(jax.random.key(run.seed))
    adapt = lora_config(run)
    if adapt is None or lora is None:
        return model
    return attach(model, adapt, jax.random.key(run.seed), param_dtype=jnp.dtype(lora.dtype))


def _stage(run: Run, name: str, stage: StageSection, config: Qwen3Config, mesh: Mesh, rules: Rules, optimizer: Any) -> Stage:
    step = stage_step(run, stage, config, rules, optimizer)
    return Stage(
        name=name,
        steps=stage.steps,
        tokens=stage.batch * stage.seq,
        flops=model_flops(stage_job(run, dataclasses.replace(stage, accumulation=1))),
        step=step,
        open_data=lambda at, carried: _StageData(run, stage, mesh, rules, at, carried),
    )


class _StageData:
    """A stage's loader, its batches put on the mesh."""

    def __init__(
        self,
        run: Run,
        stage: StageSection,
        mesh: Mesh,
        rules: Rules,
        at: Mapping[str, Any] | None,
        carried: bool,
    ):
        self._mesh, self._rules, self._rows = mesh, rules, stage.batch
        rows = process_rows(mesh, stage.batch, rules)
        self._loader = make_loader(
            loader_config(run, stage), batch=stage.batch, seq=stage.seq, rows=rows, prefetch=run.data.prefetch
        )
        if at is not None:
            (self._loader.carry_on if carried else self._loader.restore)(at)

    def __next__(self) -> Any:
        return global_batch(next(self._loader), self._mesh, self._rows, self._rules)

    def state(self) -> dict[str, Any]:
        return merge_states(_everybodys(self._loader.state()))

    def report(self) -> dict[str, Any]:
        return self._loader.report()

    def close(self) -> None:
        self._loader.close()


def _everybodys(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process says, as JSON."""
    if jax.process_count() == 1:
        return [state]
    from qwen3_jax.checkpoint.together import all_processes

    return [json.loads(text) for text in all_processes().texts(json.dumps(state))]
