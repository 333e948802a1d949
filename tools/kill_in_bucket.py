"""Kill a run whose checkpoints lie in a bucket again and again, and hold it against a run without a stop on a disk.

    python -m tools.kill_in_bucket gs://BUCKET/FOLDER [--processes 2] [--kills 12] [--steps 40] [--folder FOLDER] [--seed 0]

Needs the extra `gcs`; against a stand-in of the store, STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL name it. The run is
that of tools/run_to_kill.py with a checkpoint every two steps. All its processes are killed with SIGKILL a moment after a step
has begun. Each start has to go on from the newest checkpoint that is committed, and to pass none over; at most
`checkpoint.keep` stay; the journal, each step's batch and the last checkpoint have to be those of the other run, to the bit.
Exit code 1 where anything differs. What lies at the address before is removed.
"""

import dataclasses
import random
import sys
from pathlib import Path

import fsspec
import tyro
from rich.console import Console

from tools.compare_runs import differences
from tools.run_to_kill import NAME, write_run
from tools.start_runs import Aim, Fault, carried_out, start

COMMITTED = "commit_success.txt"
KEEP = 3


@dataclasses.dataclass
class Options:
    """What is run."""

    url: tyro.conf.Positional[str]
    """Where checkpoints go; what is there is removed."""
    processes: int = 1
    """That carry the run out."""
    kills: int = 12
    """How many."""
    steps: int = 40
    """Of the run."""
    folder: Path | None = None
    """Where figures and logs go, made anew; None: a temporary one, removed at the end."""
    seed: int = 0
    """Of the steps that are killed, and of how long after their beginning."""
    moment: float = 1.0
    """Seconds after a step's beginning, at most."""


def standing(url: str) -> tuple[list[int], list[int]]:
    """The steps in a bucket that are committed, and those that are not; ascending."""
    system, root = fsspec.core.url_to_fs(f"{url}/{NAME}", use_listings_cache=False)
    found: dict[int, set[str]] = {}
    for path in system.find(root):
        step, _, rest = path.removeprefix(root).lstrip("/").partition("/")
        if step.isdigit():
            found.setdefault(int(step), set()).add(rest)
    whole = sorted(step for step, files in found.items() if COMMITTED in files)
    return whole, sorted(found.keys() - set(whole))


def run(place: Path, options: Options, console: Console) -> int:
    """All starts.

    Args:
        place: a folder for figures and logs.
        options: of the tool.
        console: where it is told.

    Returns:
        How many differences there are.
    """
    system, root = fsspec.core.url_to_fs(options.url, use_listings_cache=False)
    if system.exists(root):
        system.rm(root, recursive=True)
    write_run(place, options.steps)
    straight, killed, cache, draw = place / "straight", place / "killed", place / "cache", random.Random(options.seed)
    straight.mkdir()
    killed.mkdir()
    every = ["--checkpoint.every=2", f"--checkpoint.keep={KEEP}"]
    words = [*every, f"--checkpoint.folder={options.url}"]
    aim = Aim(options.processes, killed=tuple(range(options.processes)))
    found = start(straight, cache, every, aim=aim)
    if any(found.codes):
        raise Fault(f"the run without a stop ended with {found.codes}: see {straight}/said.txt")
    amid, number = 0, 0
    while True:
        newest = max(standing(options.url)[0], default=0)
        number += 1
        last = number > options.kills
        at = "none" if last else "step.running"
        found = start(killed, cache, words, at, newest + draw.randint(0, 3), draw.uniform(0, options.moment), aim)
        resumed = [(one["step"], one["passed_over"]) for one in found.of("resumed")]
        if any(step != newest or passed for step, passed in resumed) or (newest and not resumed):
            raise Fault(f"start {number}: the newest committed checkpoint was {newest}, gone on from {resumed}")
        whole, unfinished = standing(options.url)
        if not any(found.codes):
            break
        if last or not found.of("at"):
            raise Fault(f"start {number} ended with {found.codes}: see {killed}/said.txt")
        amid += bool(unfinished)
        console.print(f"kill {number}: in step {found.of('at')[0]['step']}, committed {whole}, not committed {unfinished}")
    if len(whole) > KEEP or unfinished or max(whole) != options.steps:
        raise Fault(f"at the end {whole} are committed, {unfinished} are not")
    system.get(f"{root}/{NAME}/{options.steps}", str(killed / NAME / "checkpoints" / str(options.steps)), recursive=True)
    differ = differences(straight / NAME, killed / NAME)
    console.print(
        f"{number - 1} kills, {amid} of them amid a save; against the run without a stop: {len(differ)} differences "
        f"{differ[:10] or ''}"
    )
    return len(differ)


if __name__ == "__main__":
    sys.exit(carried_out("kill_in_bucket", run, tyro.cli(Options, description=__doc__)))
