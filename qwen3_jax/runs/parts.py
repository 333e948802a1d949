"""What the sections of a run make: optimizer, policy, mixtures, adapters, and what a checkpoint says of it all."""

import dataclasses
import functools
import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from qwen3_jax import __version__
from qwen3_jax.config import Qwen3Config
from qwen3_jax.data.loader import LoaderConfig
from qwen3_jax.data.mixture import Source
from qwen3_jax.parallel.rules import TRAIN_RULES, Rules
from qwen3_jax.runs.schema import Run, StageSection
from qwen3_jax.training.loop import Policy
from qwen3_jax.training.optimizer import adamw, muon
from qwen3_jax.training.schedule import Phase, schedule
from qwen3_jax.training.step import TrainStep, make_train_step
from qwen3_jax.tune.lora import LoraConfig

MOST_SHARDS = 256
PACKAGE = Path(__file__).resolve().parents[1]


def optimizer_of(run: Run) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run, its rate that of all stages one after another.

    Args:
        run: the run.

    Returns:
        An optax transformation.
    """
    section = run.optimizer
    options: dict[str, Any] = dict(
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        mu_dtype=jnp.dtype(section.moment_dtype),
    )
    rate = schedule([phase_of(stage) for stage in run.stages.values()])
    return muon(rate, **options) if section.name == "muon" else adamw(rate, **options)


def phase_of(stage: StageSection) -> Phase:
    """A stage's learning rate, in steps: tokens of warm-up and decay are rounded up to whole ones."""
    step = stage.batch * stage.seq
    return Phase(
        steps=stage.steps,
        peak=stage.learning_rate,
        kind=stage.schedule,
        start=stage.start,
        warmup=-(-stage.warmup // step),
        decay=min(-(-stage.decay // step), stage.steps - -(-stage.warmup // step)),
        end=stage.end,
    )


def policy_of(run: Run) -> Policy:
    """When things happen in a run."""
    return Policy(
        save_every=run.checkpoint.every,
        write_every=run.watch.every,
        look_every=run.watch.held_out_every,
        export_every=run.checkpoint.export_every,
        not_finite=run.step.not_finite,
        max_skipped=run.step.max_skipped,
        spike=run.step.spike,
        max_rewinds=run.step.max_rewinds,
        profile=run.watch.profile,
    )


def about(run: Run) -> dict[str, Any]:
    """What a checkpoint says of the run and of the code that wrote it."""
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {"qwen3-jax": __version__, "commit": commit(), "python": platform.python_version()}
    versions |= {name: version(name) for name in libraries}
    return dict(config=json.loads(json.dumps(dataclasses.asdict(run), default=dict)), versions=versions)


@functools.cache
def commit() -> str | None:
    """The git commit of this package's code, and whether files are changed since; None where it is in no checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(("git", *words), cwd=PACKAGE, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):  # no git, or one that waits for something
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie within the checkout of another project, whose commit says nothing of it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None or (head := git("rev-parse", "HEAD")) is None:
        return None
    return f"{head}, with changes" if git("status", "--porcelain", "--", ".", "../pallas_kernels") else head


def rules_of(run: Run) -> Rules:
    """Which mesh axes split what in a run, and how its tokens travel to experts."""
    rules = TRAIN_RULES.replace_rows(run.mesh.rules)
    return dataclasses.replace(rules, dispatch=dataclasses.replace(rules.dispatch, transport=run.mesh.transport))


def lora_config(run: Run) -> LoraConfig | None:
    """The adapters of a run; None where all parameters are trained."""
    return None if run.lora is None else LoraConfig(rank=run.lora.rank, alpha=run.lora.alpha, base=run.lora.codes)


def stage_config(config: Qwen3Config, stage: StageSection) -> Qwen3Config:
    """The model's config in a stage: positions turn by the stage's own base."""
    return config if stage.rope_theta is None else dataclasses.replace(config, rope_theta=stage.rope_theta)


def stage_step(run: Run, stage: StageSection, config: Qwen3Config, rules: Rules, optimizer: Any) -> TrainStep:
    """The step of a stage.

    Args:
        run: the run.
        stage: one of its stages.
        config: the model's.
        rules: which mesh axes split what.
        optimizer: the run's.

    Returns:
        What trains, or is lowered for devices that are not there.
    """
    return make_train_step(
        stage_config(config, stage),
        optimizer,
        dtype=jnp.dtype(run.model.compute_dtype),
        remat=run.step.remat,
        z_loss=run.step.z_loss,
        rules=rules,
        adapt=lora_config(run),
        parts=stage.accumulation,
        balance=run.step.balance,
        balance_over=run.step.balance_over,
        router_z_loss=run.step.router_z_loss,
    )


def loader_config(run: Run, stage: StageSection) -> LoaderConfig:
    """The mixture of a stage. Its logical shards are those of all stages, so that each goes on where the last one was.

    Args:
        run: the run.
        stage: one of its stages.

    Returns:
        What makes a loader.
    """
    shards = run.data.shards
    if shards is None:
        rows = math.gcd(*(other.batch for other in run.stages.values()))
        shards = max(count for count in range(1, MOST_SHARDS + 1) if rows % count == 0)
    sources = []
    for name, weight in (stage.mixture or dict.fromkeys(run.data.sources, 1.0)).items():
        given = run.data.sources[name]
        sources.append(
            Source(
                name=name,
                folder=given.folder,
                weight=weight,
                min_tokens=given.min_tokens,
                max_tokens=given.max_tokens,
                over_long=given.over_long,
            )
        )
    return LoaderConfig(tuple(sources), seed=run.seed, shards=shards, waiting=run.data.waiting, cache=run.data.cache)
