"""Signal a run of training wherever it can be, and hold what goes on against a run without a stop.

    python -m tools.end_anywhere [--processes 2] [--only look] [--folder FOLDER]

SIGTERM, SIGTERM twice, SIGINT (Ctrl-C), to one process or to all, at places where a run neither steps nor saves
(tools/more_phases.py) and at some where it does: each start has to end in bounded time, with the exit code of docs/runs.md.
`--rewinds` signals and kills a run that goes back on spikes of its loss; `--stops` stops a process (SIGSTOP) and lets it go on.
The run is started again after each, until it is done. Exit code 1 where anything differs.
"""

import dataclasses
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from qwen3_jax.training.journal import read_lines
from tools.compare_runs import curve, differences, last_checkpoint, other_files, saves
from tools.run_to_kill import NAME, write_run
from tools.start_runs import Aim, Fault, Start, carried_out, name_of, start

TERM, INT, KILL = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGKILL)
LIMIT = 180.0  # seconds in which a start has to have ended: before it looks for a signal again it may have to compile
FIRST = 12  # steps of the first stage: its warmup takes ten
HOLD = (0.3, 1.6)  # seconds that a run stays at a place: jax looks for a signal once a second


@dataclasses.dataclass(frozen=True)
class Case:
    """A signal: where, which, and whether it comes twice."""

    place: str
    how: int = TERM
    twice: bool = False

    @property
    def said(self) -> str:
        """In words."""
        return f"{self.place:16} {signal.Signals(self.how).name}{' twice' if self.twice else ''}"


BETWEEN = [Case("stage.between"), Case("stage.between", INT)]
AMID = [
    Case("mesh.before"),
    Case("mesh.before", INT),
    Case("data.begun"),
    Case("data.begun", INT),
    Case("look.held_out"),
    Case("look.held_out", INT),
    Case("look.prompts"),
    Case("look.prompts", INT),
    Case("step.running", twice=True),
    Case("step.running", INT),
    Case("step.running", INT, twice=True),
    Case("save.begun"),
    Case("save.begun", INT),
    Case("finalise.merged"),
    Case("finalise.merged", INT),
    Case("export.writing", twice=True),
    Case("export.writing", INT),
    Case("prefetch.read", INT),
]
LAST = [
    Case("step.last"),
    Case("step.last", INT),
    Case("last.export"),
    Case("last.export", INT),
    Case("last.report"),
    Case("last.report", INT),
    Case("last.exit"),
    Case("last.exit", INT),
]
REWINDS = [
    Case(place, how) for place in ("rewind.begun", "rewind.read", "rewind.written", "rewind.done") for how in (KILL, TERM, INT)
]


@dataclasses.dataclass
class Options:
    """What is run."""

    processes: int = 2
    """That carry it out: 1, 2 or 4."""
    steps: int = 100
    """Of the run."""
    each: bool = False
    """Signal one process, another one, and all, at each place; else these take turns. It takes more steps."""
    only: str = ""
    """Places that begin so; empty: all."""
    watch: bool = True
    """Look at held-out documents and prompts, without which starts are shorter."""
    rewinds: bool = False
    """Signal it while it goes back on spikes, instead."""
    spike: float = 0.0105
    """`step.spike` then."""
    stops: bool = False
    """Stop a process for a while, instead."""
    straight: Path | None = None
    """The run without a stop that the same options have made before, FOLDER/straight; None: make one."""
    folder: Path | None = None
    """Where runs and logs go, made anew; None: a temporary one, removed at the end."""


def who(options: Options, turn: int, leader: bool = False) -> list[tuple[int, tuple[int, ...]]]:
    """Which process is at a place, and which are signalled: one, the one that is not there, all; in turns, or each."""
    if options.processes == 1:
        return [(0, (0,))]
    last, every = options.processes - 1, tuple(range(options.processes))
    ways = [(0 if leader else last, (last,)), (0, (0,)), (0 if leader else last, every)]
    return ways if options.each else [ways[turn % len(ways)]]


class Campaign:
    """Starts of one run, each signalled, held against one without a stop."""

    def __init__(self, place: Path, words: list[str], options: Options, console: Console):
        self.place, self.words, self.options, self.console = place, words, options, console
        self.cache, self.straight = place / "cache", place / "straight"
        self.wrong: list[str] = []
        self.done = 0
        if options.straight is not None:
            self.straight = options.straight.absolute()
            self.cache = self.straight.with_name("cache")
            return
        self.straight.mkdir()
        self.start_well(self.straight)

    def start_well(self, folder: Path) -> Start:
        """A start that comes to the end of the run."""
        found = start(folder, self.cache, self.words_of(folder), aim=Aim(self.options.processes))
        if any(found.codes) or saves(folder / NAME)[0] != self.options.steps:
            raise Fault(f"a start without a signal ended with {found.codes}: see {folder}/said.txt")
        return found

    def words_of(self, folder: Path) -> list[str]:
        """Of the command line: each folder has an export of its own at the end."""
        return [*self.words, "--checkpoint.export", str(folder / "exported")]

    def signalled(self, folder: Path, case: Case, at: int, killed: tuple[int, ...]) -> int:
        """One start with its signal; the newest checkpoint then. What is not as it should be is noted."""
        count = self.options.processes
        newest, _ = saves(folder / NAME)
        step = -1 if case.place.startswith(("mesh", "data", "stage", "last", "rewind")) else newest + 2
        if case.place.startswith("look"):
            step = newest + 4  # the second look of a start: the first one compiles
        step = step if case.place != "step.last" else self.options.steps - 1
        hold = HOLD[self.done % 2] if case.how == TERM else 0.3
        self.done += 1
        place = case.place if case.how == KILL or case.place == "step.running" else f"{case.place}+{hold}"
        if case.place.startswith("mesh"):
            killed = tuple(range(count))  # one alone would let the others wait, for five minutes, for it to call
        aim = Aim(count, at, killed, case.how, then=((0.5, case.how),) if case.twice else (), survive=LIMIT)
        told = f"{case.said} to {','.join(map(str, killed))} of {count}, at {at}"
        try:
            for _ in range(3):
                found = start(folder, self.cache, self.words_of(folder), place, step, 0.0, aim)
                if found.of("at") or not any("Gloo context initialization failed" in line for line in found.last):
                    break
                # On CPUs no process may come to the first step 30 s after another, which a busy machine does not heed.
                self.console.print(f"{told}: started again, for Gloo gave up before the place was reached")
        except Fault as fault:
            self.console.print(f"{told}: WRONG: {fault}")
            self.wrong.append(f"{told}: {fault}")
            return saves(folder / NAME)[0]
        after, unfinished = saves(folder / NAME)
        lived = "" if found.survived is None else f", ended after {found.survived:.1f} s"
        where = found.of("at")[0]["step"] if found.of("at") else None
        self.console.print(f"{told}: in step {where}, codes {found.codes}, newest {newest} -> {after}{lived}")
        resumed = {one["step"] for one in found.of("resumed")}
        bad = []
        if where is None:
            bad.append("the place was never reached")
        # Told before its first step, a run that begins saves step 0, or nothing.
        if resumed - {0} != ({newest} if newest else set()) and not case.place.startswith("mesh"):
            bad.append(f"gone on from {resumed}")
        if found.orphans:
            bad.append(f"left {found.orphans}")
        if not self.codes_fit(case, found, killed):
            bad.append(f"codes {found.codes}")
        if case.how == TERM and not case.place.startswith("mesh") and found.codes == [0] * count:
            bad += self.saved_well(case, folder, after, unfinished)
        if after and (self.straight / NAME / "checkpoints" / str(after)).exists():
            bad += [f"checkpoint {after}: {name}" for name in self.checkpoint_differs(folder, after)]
        for one in bad:
            self.console.print(f"    WRONG: {one}; last words {found.last}")
        self.wrong += [f"{told}: {one}" for one in bad]
        return after

    def codes_fit(self, case: Case, found: Start, killed: tuple[int, ...]) -> bool:
        """Whether the exit codes are those of docs/runs.md and docs/pods.md."""
        late = case.place == "last.exit"
        for i, code in enumerate(found.codes):
            mine = i in killed
            if case.how == KILL:
                fits = code == (-KILL if mine else 1)
            elif case.place == "mesh.before":
                # Python's own way to end by a signal, and the others are told; who comes first ends the rest.
                fits = code in ((-TERM, 1) if case.how == TERM else (130, 1, -INT)) if mine else code == 1
            elif case.how == TERM:
                fits = code == 0
            else:
                fits = code in ((130, 1) if len(found.codes) > 1 else (130,)) if mine else code == 1
                # The second one may fall into the interpreter's end; a shell says 130 then, too.
                fits = fits or mine and case.twice and code == -INT
                fits = fits or late and code in (0, 1, 130, -INT)
            if not fits:
                return False
        return True

    def saved_well(self, case: Case, folder: Path, after: int, unfinished: dict[str, list[int]]) -> list[str]:
        """What is wrong after a SIGTERM: all processes have made the same steps, and these are saved."""
        if case.place.startswith("last") or case.place.startswith("step.last"):
            return [] if after == self.options.steps else ["the run did not come to its end"]
        if unfinished:
            return [f"unfinished {unfinished}"]
        if after == self.options.steps:
            return ["the run went on to its last step"]
        if case.place.startswith("rewind"):
            return []
        files = [folder / name_of("batches.jsonl", i) for i in range(self.options.processes)]
        made = [[line["step"] for line in read_lines(file)][-1] + 1 if file.exists() else 0 for file in files]
        return [] if made == [after] * len(made) or case.place == "data.begun" else [f"steps made {made}, saved {after}"]

    def checkpoint_differs(self, folder: Path, step: int) -> list[str]:
        """What of the newest checkpoint is not that of the run without a stop, to the bit."""
        only = folder.parent / "one"
        shutil.rmtree(only, ignore_errors=True)
        (only / "checkpoints").mkdir(parents=True)
        (only / "checkpoints" / str(step)).symlink_to(self.straight / NAME / "checkpoints" / str(step))
        (_, one, stands), (_, other, stands2) = last_checkpoint(only), last_checkpoint(folder / NAME)
        differ = [name for name in one.keys() | other.keys() if not np.array_equal(one[name], other[name], equal_nan=True)]
        return differ + ([f"stands {stands} and {stands2}"] if stands != stands2 and not self.options.rewinds else [])

    def ends_the_same(self, folder: Path, told: str) -> None:
        """Start it again until it is done; note what differs then."""
        self.start_well(folder)
        differ = differences(self.straight / NAME, folder / NAME)
        differ += [f"exported/{name}" for name in other_files(self.straight / "exported", folder / "exported")]
        self.console.print(f"{told}: {len(differ)} differences {differ[:5] or ''}")
        self.wrong += [f"{told}: {one}" for one in differ]


def copied(folder: Path, name: str) -> Path:
    """A copy of a run's folder."""
    return Path(shutil.copytree(folder, folder.with_name(name)))


def anywhere(campaign: Campaign, options: Options) -> None:
    """All cases but rewinds: each at its part of the run."""

    def wanted(cases: list[Case]) -> list[Case]:
        return [
            case
            for case in cases
            if case.place.startswith(options.only) and (options.watch or not case.place.startswith("look"))
        ]

    fresh = campaign.place / "fresh"
    for turn, case in enumerate(wanted(BETWEEN)):
        for at, killed in who(options, turn):
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            campaign.signalled(fresh, case, at, killed)
    chain = campaign.place / "chain"
    chain.mkdir()
    for turn, case in enumerate(wanted(AMID)):
        leader = case.place.startswith("finalise")
        for at, killed in who(options, turn, leader):
            campaign.signalled(chain, case, at, killed)
    campaign.ends_the_same(chain, "all of these, and then on to the end")
    # As it was shortly before its end.
    near = campaign.place / "near"
    shutil.copytree(campaign.straight, near, ignore=shutil.ignore_patterns("exported"))
    for checkpoint in list((near / NAME / "checkpoints").iterdir()):
        if int(checkpoint.name) > options.steps - 4:
            shutil.rmtree(checkpoint)
    for number, case in enumerate(wanted(LAST)):
        for at, killed in who(options, number, leader=case.place == "last.report"):
            folder = copied(near, f"last-{number}-{at}-{len(killed)}")
            campaign.signalled(folder, case, at, killed)
            campaign.ends_the_same(folder, f"  {case.said}, started again")


def rewinds(campaign: Campaign, options: Options) -> None:
    """Signals and kills at rewinds; in the end nothing differs from the run without a stop but lines that were taken back."""
    marks = [line for line in read_lines(campaign.straight / NAME / "metrics.jsonl") if "rewound_from" in line]
    campaign.console.print(f"rewinds of the run without a stop: {[(line['rewound_from'], line['step']) for line in marks]}")
    chain = campaign.place / "chain"
    chain.mkdir()
    for turn, case in enumerate(REWINDS):
        if case.place.startswith(options.only):
            leader = case.place in ("rewind.read", "rewind.written")  # process 0 alone writes
            for at, killed in who(options, turn // 3 + turn, leader):
                campaign.signalled(chain, case, at, killed)
    campaign.start_well(chain)
    differ = rewound_differences(campaign.straight / NAME, chain / NAME)
    campaign.console.print(f"all of these, and then on to the end: {len(differ)} differences {differ[:5] or ''}")
    campaign.wrong += differ


def in_force(run: Path) -> list[dict[str, object]]:
    """The lines of a journal that no rewind has taken back."""
    kept: list[dict[str, object]] = []
    for line in curve(run):
        if "rewound_from" in line:
            kept = [old for old in kept if old["step"] < line["step"]]
        else:
            kept.append(line)
    return kept


def rewound_differences(one: Path, other: Path) -> list[str]:
    """What of two runs that went back is not the same: lines in force, rewinds, batches, the last checkpoint."""
    lines, others = in_force(one), in_force(other)
    found = [] if lines == others else [f"lines in force: {len(lines)} and {len(others)}"]
    steps = [line["step"] for line in others if "loss" in line]
    if steps != list(range(len(steps))):
        found.append(f"steps in force {steps}")
    return found + [text for text in differences(one, other) if not text.startswith(("journal", "steps of the journal"))]


def stops(campaign: Campaign, options: Options) -> None:
    """Stop one process: for less than the heartbeat the run goes on; for longer it ends, and the last line names it."""
    count = options.processes
    for stopped, beat, wait in ((0, 60.0, 20.0), (count - 1, 60.0, 20.0), (0, 6.0, 25.0), (count - 1, 6.0, 25.0)):
        folder = campaign.place / f"stop-{stopped}-{beat:g}"
        folder.mkdir()
        then = ((wait, int(signal.SIGCONT)),)
        aim = Aim(count, 0, (stopped,), int(signal.SIGSTOP), then, heartbeat=beat)
        found = start(folder, campaign.cache, campaign.words_of(folder), "step.running", 20, 0.0, aim)
        told = f"process {stopped} of {count} stopped for {wait:g} s, heartbeat {beat:g} s"
        campaign.console.print(f"{told}: codes {found.codes}, last words {found.last}")
        if wait < beat:
            fits = not any(found.codes)
        else:
            named = f"process {stopped} of {count} "
            fits = all(found.codes) and all(
                line.startswith(named) and line.endswith(f"has not been heard of for {beat:g} s")
                for i, line in enumerate(found.last)
                if i != stopped
            )
        if not fits:
            campaign.wrong.append(told)
        campaign.ends_the_same(folder, f"  {told}, started again")


def run(place: Path, options: Options, console: Console) -> int:
    """All starts in a folder.

    Args:
        place: the folder.
        options: of the tool.
        console: where it is told.

    Returns:
        How many things were wrong.
    """
    # A shell lets what it starts in the background ignore Ctrl-C, and so would the run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write_run(place, options.steps)
    words = ["--stages.short.tokens", str(FIRST * 512), "--stages.long.tokens", str((options.steps - FIRST) * 512)]
    words += ["--checkpoint.keep", "1000"]
    if options.rewinds:
        words += ["--step.spike", str(options.spike), "--step.max_rewinds", "100", "--checkpoint.every", "2"]
        # A loss that falls is never above its running mean: so it hardly does, and spikes are the data's noise.
        words += ["--stages.short.learning_rate", "1e-5", "--stages.long.learning_rate", "1e-5"]
    else:
        words += ["--checkpoint.export_every", "10", "--checkpoint.export_keep", "2"]
    if options.watch and not options.rewinds:
        words += ["--watch.held_out", str(place / "files"), "--watch.held_out_every", "3", "--watch.held_out_batches", "2"]
        words += ["--watch.prompts", '["def read(", "import os"]']
    campaign = Campaign(place, words, options, console)
    (rewinds if options.rewinds else stops if options.stops else anywhere)(campaign, options)
    console.print(f"{campaign.done} signals, {len(campaign.wrong)} things wrong")
    for line in campaign.wrong:
        console.print(f"  {line}")
    return len(campaign.wrong)


if __name__ == "__main__":
    sys.exit(carried_out("end_anywhere", run, tyro.cli(Options, description=__doc__)))
