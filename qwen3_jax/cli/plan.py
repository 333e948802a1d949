"""`qwen3-jax plan MODEL --topology v5p:4x4x4 ...`: which mesh, whether it fits and how fast, before a pod is rented."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.topology import COMPILE_ONLY, parse_topology


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile a model for chips that are not there; rank meshes by what the compiler says."""

    model: tyro.conf.Positional[str]
    """A preset, qwen3-30b-a3b, or a model's folder, of which config.json is read."""
    topology: str
    """CHIP:SHAPE: v5e, v5p, v6e and tpu7x of any shape (v5p:4x4x4), h100:8 and whole nodes (h100:2x8)."""
    batch: int
    """Rows of a step over the whole pod."""
    seq: int
    """Tokens of a row; in decode the cache's slots."""
    mode: Literal["train", "lora", "prefill", "decode"] = "train"
    """What is done with the model; lora trains adapters on every matrix of attention, MLPs and experts."""
    rank: int = 16
    """Of the adapters, in mode lora."""
    base: Literal["bfloat16", "int8", "int4", "nf4"] = "bfloat16"
    """What the frozen matrices are kept in, in mode lora."""
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
        Exit code: 0 where something fits, else 1.
    """
    options = tyro.cli(Options, args=argv, prog="qwen3-jax plan")
    topology = parse_topology(options.topology, options.slices)
    for name, path in (("json", options.json), ("html", options.html)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{name} is {path}: accepted is a file in a folder that is there")
    os.environ.update(COMPILE_ONLY)  # jax is not imported yet

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from qwen3_jax.config import Qwen3Config
    from qwen3_jax.planning.job import Job
    from qwen3_jax.planning.page import page
    from qwen3_jax.planning.plan import make_plan, record, write_whole
    from qwen3_jax.planning.table import WIDEST, show_estimates, show_plan

    folder = Path(options.model)
    config = Qwen3Config.from_hf(folder) if folder.is_dir() else Qwen3Config.preset(options.model)
    work = (options.mode, options.batch, options.seq, options.remat, options.rank, options.base, options.adapter_dtype)
    job = Job(config, *work)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, WIDEST)  # rows that a narrow terminal breaks are better than figures cut off
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
            topology,
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
