"""`qwen3-jax plan`: a model for a pod before it is rented, which mesh, whether it fits and how fast; or a run's own steps."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.topology import COMPILE_ONLY, parse_topology

OF_A_RUN = ("stage", "layers")  # options of a run's file alone
OF_BOTH = ("topology", "time-limit", "json")
NEEDED = ("topology", "batch", "seq")  # of a model


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile a model for chips that are not there; rank meshes by what the compiler says. Or the steps of a run's file."""

    model: tyro.conf.Positional[str]
    """A preset, qwen3-30b-a3b, or a model's folder, of which config.json is read; or RUN.toml, a run's file, whose stages are
    compiled as they are, on the run's own mesh: with it --stage, --layers, --topology, --time-limit and --json."""
    topology: str | None = None
    """CHIP:SHAPE: v5e, v5p, v6e and tpu7x of any shape (v5p:4x4x4), h100:8 and whole nodes (h100:2x8). Needed for a model; of a
    run in place of its own."""
    batch: int | None = None
    """Rows of a step over the whole pod; needed for a model."""
    seq: int | None = None
    """Tokens of a row; in decode the cache's slots; needed for a model."""
    stage: str | None = None
    """Of a run this stage alone."""
    layers: int | None = None
    """Of a run's model so many layers in place of its own."""
    mode: Literal["train", "lora", "prefill", "decode"] = "train"
    """What is done with the model; lora trains adapters on every matrix of attention, MLPs and experts."""
    rank: int = 16
    """Of the adapters, in mode lora."""
    base: Literal["bfloat16", "float32", "int8", "int4", "nf4"] = "bfloat16"
    """What the frozen model is kept in, in mode lora; int8, int4 and nf4 are codes of its matrices."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of adapters, their gradients and moments, in mode lora."""
    mesh: tuple[str, ...] = ()
    """Meshes to compile, "fsdp=8,expert=2", in place of the most promising ones."""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A row of the rules, embed=fsdp+expert, in place of one of the mode's own table; may be given several times."""
    slices: int = 1
    """Groups of such chips, joined by a slower network, which `data` runs across."""
    top: int = 4
    """How many of the most promising meshes are compiled."""
    remat: str = "full"
    """What the backward pass keeps: none, full, save:NAMES, offload:NAMES."""
    workers: int = 1
    """Compilers at a time; each takes some GB of memory for a large model."""
    time_limit: float = 1800
    """Seconds for each of them."""
    efficiency: Efficiency = Efficiency()
    """Shares of the chip's figures that are taken to be reached."""
    json: Path | None = None
    """File for programs."""
    html: Path | None = None
    """File for a page with plots."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `qwen3-jax plan`.

    Returns:
        Exit code: 0 where something fits, of a run where all its stages do, else 1.
    """
    options = tyro.cli(Options, args=argv, prog="qwen3-jax plan")
    given = [word[2:].partition("=")[0].partition(".")[0].replace("_", "-") for word in argv if word.startswith("--")]
    for name, path in (("json", options.json), ("html", options.html)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{name} is {path}: accepted is a file in a folder that is there")
    if options.model.endswith(".toml") and not Path(options.model).is_dir():
        return _plan_run(options, given)
    return _plan_model(options, given)


def _plan_run(options: Options, given: Sequence[str]) -> int:
    accepted = (*OF_A_RUN, *OF_BOTH)
    if others := [name for name in given if name not in accepted]:
        raise ValueError(
            f"--{others[0]} with a run's file, which says it itself: accepted are {', '.join(f'--{name}' for name in accepted)}"
        )

    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from qwen3_jax.cli.text import table_console
    from qwen3_jax.planning.table import WIDEST
    from qwen3_jax.runs.compiled import compile_run, record, step_table
    from qwen3_jax.whole_files import write_whole

    console = table_console(WIDEST)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        compiled = compile_run(
            options.model,
            stage=options.stage,
            layers=options.layers,
            topology=options.topology,
            time_limit=options.time_limit,
            begun=lambda name: progress.update(task, description=f"compiling {name}"),
        )
    console.print(step_table(compiled))
    for step in compiled.steps:
        if step.reason is not None:
            console.print(f"{step.stage} does not compile: {step.reason}")
    if options.json is not None:
        write_whole(options.json, json.dumps(record(compiled), indent=1, allow_nan=False))
    return 0 if all(compiled.fits(step) for step in compiled.steps) else 1


def _plan_model(options: Options, given: Sequence[str]) -> int:
    if others := [name for name in given if name in OF_A_RUN]:
        raise ValueError(f"--{others[0]} is of a run's file, and {options.model} is a model: accepted is RUN.toml with it")
    topology, batch, seq = options.topology, options.batch, options.seq
    if topology is None or batch is None or seq is None:
        missing = [f"--{name}" for name in NEEDED if getattr(options, name) is None]
        raise ValueError(f"{options.model} without {', '.join(missing)}: a model's plan needs --topology, --batch and --seq")
    pod = parse_topology(topology, options.slices)
    os.environ.update(COMPILE_ONLY)  # jax is not imported yet

    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from qwen3_jax.cli.text import table_console
    from qwen3_jax.config import Qwen3Config
    from qwen3_jax.planning.job import Job
    from qwen3_jax.planning.page import page
    from qwen3_jax.planning.plan import make_plan, record
    from qwen3_jax.planning.table import WIDEST, show_estimates, show_plan
    from qwen3_jax.whole_files import write_whole

    folder = Path(options.model)
    config = Qwen3Config.from_hf(folder) if folder.is_dir() else Qwen3Config.preset(options.model)
    work = (options.mode, batch, seq, options.remat, options.rank, options.base, options.adapter_dtype)
    job = Job(config, *work)
    console = table_console(WIDEST)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=None)

        def chosen(best, considered):
            show_estimates(console, best, considered)
            progress.update(task, total=len(best))

        def done(candidate, outcome):
            said = outcome.reason or ("compiled" if outcome.program else "does not fit")
            console.print(f"{candidate.wish}: {said}, {outcome.seconds:.0f} s")
            progress.advance(task)

        plan = make_plan(
            options.model,
            job,
            pod,
            meshes=options.mesh,
            rows=options.rule,
            top=options.top,
            workers=options.workers,
            time_limit=options.time_limit,
            efficiency=options.efficiency,
            chosen=chosen,
            done=done,
        )
    show_plan(console, plan)
    if options.json is not None:
        write_whole(options.json, json.dumps(record(plan), indent=1, allow_nan=False))
    if options.html is not None:
        write_whole(options.html, page(plan))
    return 0 if any(row.fits for row in plan.rows) else 1
