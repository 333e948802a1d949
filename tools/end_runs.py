"""Tell a run of several processes to end by SIGTERM to one or to all, and hold what follows against a run without a stop.

    python -m tools.end_runs [--processes 2] [--steps 96] [--folder FOLDER]

Told in a step, while it compiles, while it saves, and while it writes an export: all processes have to save at the same step
and exit with code 0. The run is started again after each, until it is done. Exit code 1 where anything differs.
"""

import dataclasses
import random
import signal
import sys
from pathlib import Path

import tyro
from rich.console import Console

from qwen3_jax.training.journal import read_lines
from tools.compare_runs import differences, saves
from tools.run_to_kill import NAME, write_run
from tools.start_runs import Aim, Fault, Start, carried_out, name_of, start

EXPORT_EVERY = 5
PLACES = ("step.running", "compile.running", "save.told", "export.told")


@dataclasses.dataclass
class Options:
    """What is run."""

    steps: int = 96
    """Of the run; it is told to end twelve times in them."""
    folder: Path | None = None
    """Where runs and logs go, made anew; None: a temporary one, removed at the end."""
    processes: int = 2
    """That carry it out: 2 or 4."""
    seed: int = 0
    """Of how long a signal waits."""


def ended_well(found: Start, folder: Path, told: str, processes: int) -> int:
    """The step that a start has saved at.

    Args:
        found: how it ended.
        folder: its output.
        told: names the start.
        processes: how many there were.

    Returns:
        The step.

    Raises:
        Fault: an exit code that is not 0, or steps that one process has made and the other not.
    """
    if any(found.codes) or found.orphans:
        raise Fault(f"{told}: ended with {found.codes}, left {found.orphans}: see {folder}/said.txt")
    made = [[line["step"] for line in read_lines(folder / name_of("batches.jsonl", i))][-1] + 1 for i in range(processes)]
    newest, unfinished = saves(folder / NAME)
    if made != [newest] * processes or unfinished:
        raise Fault(
            f"{told}: processes made steps up to {made}, and the newest checkpoint is {newest}, unfinished {unfinished}"
        )
    return newest


def run(place: Path, options: Options, console: Console) -> int:
    """All starts in a folder.

    Args:
        place: the folder.
        options: of the tool.
        console: where it is told.

    Returns:
        How many differences there are.
    """
    write_run(place, options.steps, export_every=EXPORT_EVERY)
    straight, ended, cache, draw = place / "straight", place / "ended", place / "cache", random.Random(options.seed)
    for folder in (straight, ended):
        folder.mkdir()
    team = Aim(options.processes)
    found = start(straight, cache, [], aim=team)
    if any(found.codes):
        raise Fault(f"the run without a stop ended with {found.codes}: see {straight}/said.txt")
    newest = 0
    every = tuple(range(options.processes))
    aims = [(place, killed) for place in PLACES for killed in ((0,), (every[-1],), every)]
    for number, (at, killed) in enumerate(aims):
        step = -1 if at == "compile.running" else newest + 2
        aim = Aim(options.processes, at=number % options.processes, killed=killed, how=signal.SIGTERM)
        found = start(
            ended, place / f"cache-{number}" if at == "compile.running" else cache, [], at, step, draw.uniform(0, 0.1), aim
        )
        resumed = {one["step"] for one in found.of("resumed")}
        if not found.of("at") or resumed != ({newest} if newest else set()):
            raise Fault(f"told to end at {at}: gone on from {resumed}, and the newest was {newest}: see {ended}/said.txt")
        newest = ended_well(found, ended, f"told to end at {at}", options.processes)
        if newest == options.steps:
            raise Fault(f"told to end at {at}: the run went on to its last step: see {ended}/said.txt")
        console.print(
            f"{at:16} SIGTERM to {' and '.join(map(str, killed))}: told in step {found.of('at')[0]['step']}, saved after "
            f"{newest} steps, all ended {found.survived:.2f} s after the signal with code 0"
        )
    found = start(ended, cache, [], aim=team)
    if any(found.codes):
        raise Fault(f"the last start ended with {found.codes}: see {ended}/said.txt")
    differ = differences(straight / NAME, ended / NAME)
    console.print(f"against the run without a stop: {len(differ)} differences {differ[:10] or ''}")
    return len(differ)


if __name__ == "__main__":
    sys.exit(carried_out("end_runs", run, tyro.cli(Options, description=__doc__)))
