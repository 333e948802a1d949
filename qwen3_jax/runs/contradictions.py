"""What a run's values must not say about each other. Each rule names the keys it read, so that their lines can be shown."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen3_jax.checks import ConfigError
from qwen3_jax.model.remat import check_policy
from qwen3_jax.runs.models import model_config
from qwen3_jax.runs.schema import Run, StageSection

Key = tuple[str, ...]
TAKEN = (1, 2, 130, 137)  # exit codes: failed, refused, Ctrl-C, killed


class Contradiction(ValueError):
    """Values that are each accepted, and not together.

    Attributes:
        keys: of the values.
    """

    def __init__(self, message: str, *keys: str):
        super().__init__(message)
        self.keys: Sequence[Key] = [tuple(key.split(".")) for key in keys]


def check_run(run: Run) -> None:
    """Refuse a run whose values contradict each other.

    Args:
        run: the run.

    Raises:
        Contradiction: the first that is found, with its keys.
    """
    for found in _all(run):
        raise found


def _all(run: Run) -> Iterator[Contradiction]:
    yield from _model(run)
    yield from _places(run)
    yield from _numbers(run)
    if not run.data.sources:
        yield Contradiction("the run has no data: accepted is at least one source, [data.sources.NAME]")
    if not run.stages:
        yield Contradiction("the run has no stages: accepted is at least one, [stages.NAME]", "stages")
    for name, stage in run.stages.items():
        yield from _stage(run, f"stages.{name}", stage)
    for name, source in run.data.sources.items():
        if not source.folder:
            yield Contradiction(f"data.sources.{name} has no folder: accepted is one that data prepare has written")


def _model(run: Run) -> Iterator[Contradiction]:
    model = run.model
    if model.preset is None and model.folder is None:
        yield Contradiction("neither model.preset nor model.folder is given: accepted is one, or both")
    elif model.preset is not None or Path(str(model.folder)).exists():
        try:
            model_config(model)
        except ConfigError as error:
            bases = [f"model.{name}" for name in ("preset", "folder") if getattr(model, name) is not None]
            named = [name for name in model.config if re.search(rf"\b{re.escape(name)}\b", str(error))]
            yield Contradiction(str(error), *bases, *(f"model.config.{name}" for name in named))
    if run.lora is not None and (model.folder is None or model.weights == "random"):
        yield Contradiction(
            "lora on random weights: accepted is a base that is trained, model.folder with model.weights = 'folder'",
            "lora.rank",
            "model.preset",
            "model.weights",
        )
    if run.lora is not None and run.optimizer.name == "muon":
        yield Contradiction("muon for the thin matrices of lora: accepted is adamw", "optimizer.name", "lora.rank")
    if run.checkpoint.export_form == "adapter" and run.lora is None:
        yield Contradiction(
            "checkpoint.export_form is adapter and the run has no adapters: accepted is merged, or a section [lora]",
            "checkpoint.export_form",
        )
    for name, stage in run.stages.items():
        if run.checkpoint.export_form == "adapter" and stage.rope_theta is not None:
            yield Contradiction(
                f"checkpoint.export_form is adapter and stages.{name}.rope_theta is given, which PEFT's folders have no place "
                "for: accepted is merged, or the base's own rope_theta",
                "checkpoint.export_form",
                f"stages.{name}.rope_theta",
            )
    if run.checkpoint.export_keep is not None and run.checkpoint.export_every is None:
        yield Contradiction(
            "checkpoint.export_keep without checkpoint.export_every: accepted are both, or neither", "checkpoint.export_keep"
        )
    if model.param_dtype == "float16":
        yield Contradiction("model.param_dtype is float16: accepted are float32 and bfloat16", "model.param_dtype")
    try:
        check_policy(run.step.remat, on_mesh=True)
    except ValueError as error:
        yield Contradiction(f"step.remat: {error}", "step.remat")
    profile = run.watch.profile
    if profile is not None and not 0 <= profile[0] <= profile[1] < run.steps:
        yield Contradiction(
            f"watch.profile is steps {profile[0]} to {profile[1]} of {run.steps}: accepted are two in order from 0 to "
            f"{run.steps - 1}",
            "watch.profile",
        )


def _places(run: Run) -> Iterator[Contradiction]:
    places = {"output": run.output, "checkpoint.export": run.checkpoint.export}
    for key, place in places.items():
        if place is not None and "://" in place:
            told = "; of a bucket checkpoints alone are kept, in checkpoint.folder" if key == "output" else ""
            yield Contradiction(f"{key} is {place}: accepted is a folder of a file system, or of a mount{told}", key)
    folder = run.checkpoint.folder
    if folder is not None and "://" in folder and not re.fullmatch(r"gs://[^/]+(/.*)?", folder):
        yield Contradiction(
            f"checkpoint.folder is {folder}: accepted is a folder of a file system, or of a mount, or gs://BUCKET/...: Orbax "
            "writes to no other store",
            "checkpoint.folder",
        )
    code = run.checkpoint.told_to_end
    if code in TAKEN or not 0 <= code <= 255:
        yield Contradiction(
            f"checkpoint.told_to_end is {code}: accepted is 0, or from 3 to 255 but 130 and 137, which say other ends",
            "checkpoint.told_to_end",
        )


def _numbers(run: Run) -> Iterator[Contradiction]:
    positive = {
        "data.shards": run.data.shards,
        "data.waiting": run.data.waiting,
        "watch.held_out_batches": run.watch.held_out_batches,
        "checkpoint.every": run.checkpoint.every,
        "checkpoint.keep": run.checkpoint.keep,
        "checkpoint.keep_every": run.checkpoint.keep_every,
        "checkpoint.export_every": run.checkpoint.export_every,
        "checkpoint.export_keep": run.checkpoint.export_keep,
        "watch.every": run.watch.every,
        "watch.held_out_every": run.watch.held_out_every,
        "mesh.slices": run.mesh.slices,
        "mesh.processes": run.mesh.processes,
        "step.max_skipped": run.step.max_skipped,
        "step.loss_scale": run.step.loss_scale,
        "step.spike": run.step.spike,
        "step.max_rewinds": run.step.max_rewinds,
        "optimizer.eps": run.optimizer.eps,
        "optimizer.max_grad_norm": run.optimizer.max_grad_norm,
        "lora.rank": None if run.lora is None else run.lora.rank,
        "lora.alpha": None if run.lora is None else run.lora.alpha,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            yield Contradiction(f"{key} is {value}: accepted is a number above 0", key)
    shares = {"optimizer.b1": run.optimizer.b1, "optimizer.b2": run.optimizer.b2}
    for key, value in shares.items():
        if not 0 <= value < 1:
            yield Contradiction(f"{key} is {value}: accepted is from 0 to below 1", key)
    weights = {
        "optimizer.weight_decay": run.optimizer.weight_decay,
        "step.z_loss": run.step.z_loss,
        "step.router_z_loss": run.step.router_z_loss,
        "step.balance": run.step.balance,
    }
    for key, value in weights.items():
        if value is not None and value < 0:
            yield Contradiction(f"{key} is {value}: accepted is a number of at least 0", key)


def _stage(run: Run, at: str, stage: StageSection) -> Iterator[Contradiction]:
    for name in ("tokens", "batch", "seq", "accumulation", "learning_rate"):
        if getattr(stage, name) <= 0:
            yield Contradiction(f"{at}.{name} is {getattr(stage, name)}: accepted is a number above 0", f"{at}.{name}")
    if stage.rope_theta is not None and stage.rope_theta <= 1:
        yield Contradiction(f"{at}.rope_theta is {stage.rope_theta}: accepted is a number above 1", f"{at}.rope_theta")
    step = stage.batch * stage.seq
    if stage.tokens % step:
        low = stage.tokens // step * step
        yield Contradiction(
            f"{at}.tokens is {stage.tokens}, {stage.tokens / step:.2f} steps of {stage.batch} x {stage.seq} tokens: accepted "
            f"is a multiple of {step}, as {f'{low} or ' if low else ''}{low + step}",
            *(f"{at}.{name}" for name in ("tokens", "batch", "seq")),
        )
    if run.data.shards is not None and stage.batch % run.data.shards:
        yield Contradiction(
            f"{at}.batch is {stage.batch} rows of {run.data.shards} shards: accepted is a multiple of them",
            f"{at}.batch",
            "data.shards",
        )
    if stage.batch % stage.accumulation:
        yield Contradiction(
            f"{at}.batch is {stage.batch} rows in {stage.accumulation} parts: {stage.batch} / {stage.accumulation} leaves "
            f"{stage.batch % stage.accumulation}",
            f"{at}.batch",
            f"{at}.accumulation",
        )
    for name in ("start", "end"):
        if not 0 <= getattr(stage, name) <= 1:
            yield Contradiction(f"{at}.{name} is {getattr(stage, name)}: accepted is from 0 to 1", f"{at}.{name}")
    for name in ("warmup", "decay"):
        if getattr(stage, name) < 0:
            yield Contradiction(f"{at}.{name} is {getattr(stage, name)}: accepted is at least 0", f"{at}.{name}")
    if stage.warmup + stage.decay > stage.tokens:
        yield Contradiction(
            f"{at}: warmup and decay are {stage.warmup + stage.decay} tokens of a stage of {stage.tokens}: accepted is at most "
            "all of it",
            *(f"{at}.{name}" for name in ("warmup", "decay", "tokens")),
        )
    if stage.decay and stage.schedule != "warmup-stable-decay":
        yield Contradiction(
            f"{at}.decay with schedule {stage.schedule}: accepted is warmup-stable-decay", f"{at}.decay", f"{at}.schedule"
        )
    for source, weight in stage.mixture.items():
        if source not in run.data.sources:
            known = ", ".join(run.data.sources) or "none"
            yield Contradiction(
                f"{at}.mixture names {source}, which is no source: accepted are {known}", f"{at}.mixture.{source}"
            )
        if not weight > 0:
            yield Contradiction(f"{at}.mixture.{source} is {weight}: accepted is a weight above 0", f"{at}.mixture.{source}")
