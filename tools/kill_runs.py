"""Kill a run of training again and again, each time in the midst of something else, and hold it against a run without a stop.

    python -m tools.kill_runs [--kills 57] [--steps 200] [--folder FOLDER] [--seed 0]
    python -m tools.kill_runs --processes 2 [--export-every 10] [--adapters] [--only export]

A small MoE model is trained on prepared text: two stages, a checkpoint every few steps. Three runs of the same file: one
without a stop; one that is killed with SIGKILL and started again until it is done, at the places of tools/run_in_phases.py; and
one that is killed half way and goes on on another mesh. FOLDER/kills.jsonl has a line for each kill: its phase and place, the
step, the newest finalised checkpoint then, the step gone on from. Of the killed run the curve, each step's batch and the last
checkpoint are compared to the bit; of the other mesh the batches to the bit and the curve within 1e-5. Exit code 1 where
anything differs.

With two processes one of them is at the place, and that one is killed, or the other, or both; a survivor has to end by itself,
naming the dead. With four, two may be. The other mesh is then that of one process, and one process also makes the whole run
once: its curve within 1e-5. Exports are held against those of the run without a stop and of one process that reads the last
checkpoint, file by file.
"""

import dataclasses
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from tools.compare_runs import batches, curve, differences, last_checkpoint, losses_apart, saves
from tools.kill_checks import alone_differs, exports_differ
from tools.run_in_phases import AT_START, EXPORTS, LEADERS, PLACES
from tools.run_to_kill import EVERY, NAME, write_run
from tools.start_runs import ALONE, Aim, Fault, Start, carried_out, start


@dataclasses.dataclass
class Options:
    """What is run."""

    kills: int = 57
    """How many kills; their places are dealt by the shares in tools/run_in_phases.py, each one at least once from 16 on."""
    steps: int = 200
    """Of the run."""
    folder: Path | None = None
    """Where runs and logs go, made anew; None: a temporary one, removed at the end."""
    seed: int = 0
    """Of the order of places, and of how long a kill waits."""
    mesh: str = "data=2,expert=2"
    """The other mesh."""
    processes: int = 1
    """That carry a run out, 1, 2 or 4; of two, one is killed, or both; of four, one, two, or all."""
    export_every: int | None = None
    """Steps between exports, which are then killed too; None: none."""
    adapters: bool = False
    """Train adapters on a frozen base."""
    only: str = ""
    """Kill only at places that begin so: "export"; empty: at all."""


@dataclasses.dataclass
class Kill:
    """A line of kills.jsonl.

    Attributes:
        number: from 1.
        phase: what it counts for.
        place: of PLACES.
        step: the last step begun; -1 before the first one.
        seconds: from the start to the kill.
        thread: of the process, that was there.
        inside: whether the phase was not over when the process had ended.
        newest: the newest finalised checkpoint then; 0 for none.
        unfinished: folders of saves that were not finalised, each with its files and bytes.
        orphans: processes of its session that outlived it.
        at: the process that was at the place.
        killed: the processes that were killed.
        survived: seconds that another one lived on; None without one.
        resumed: the step that the next start which got so far went on from; 0 for the beginning.
    """

    number: int
    phase: str
    place: str
    step: int
    seconds: float
    thread: str
    inside: bool
    newest: int
    unfinished: dict[str, list[int]]
    orphans: list[int]
    at: int
    killed: tuple[int, ...]
    survived: float | None
    resumed: int | None = None


def places_of(options: Options) -> dict[str, tuple[str, int, str]]:
    """The places that there are for a run; several processes on CPUs keep no programs."""
    there = PLACES | (EXPORTS if options.export_every is not None else {})
    if options.processes > 1:
        del there["compile.cached"]
    return {place: told for place, told in there.items() if place.startswith(options.only)}


def dealt(options: Options, draw: random.Random) -> list[tuple[str, Aim]]:
    """The kills in order: first each place once, then by their shares; the first one is no start's.

    Of two processes all ways in which one can be there, and any be killed, take turns.
    """
    rounds: list[tuple[float, str]] = []
    places = places_of(options)
    for place, (_, count, _) in places.items():
        rounds += [(at / max(count - 1, 1) if at else -1.0, place) for at in range(count)]
    rounds.sort()
    chosen, turns = [], Counter(dict(zip(places, range(len(places)), strict=True)))
    for number in range(options.kills):
        place = rounds[number % len(rounds)][1]
        ways = ways_of(place, options.processes)
        chosen.append((place, ways[turns[place] % len(ways)]))
        turns[place] += 1
    draw.shuffle(chosen)
    first = next((at for at, (place, _) in enumerate(chosen) if not place.startswith(AT_START)), 0)
    return [chosen.pop(first), *chosen]


def ways_of(place: str, processes: int) -> list[Aim]:
    """Who can be at a place, and who is killed then."""
    if processes == 1:
        return [ALONE]
    there = (0,) if place.startswith(LEADERS) else (0, processes - 1)
    ways = []
    for at in there:
        others = [i for i in range(processes) if i != at]
        several = [tuple(range(processes))]
        if processes > 2:
            several = [tuple(others[:2]), (at, others[-1]), *several]
        ways += [Aim(processes, at, killed) for killed in ((others[-1],), (at,), *several)]
    return ways


def killed_run(folder: Path, cache: Path, options: Options, console: Console) -> list[Kill]:
    """Carry the run out with kills.

    Args:
        folder: its output, made anew.
        cache: of compiled programs.
        options: of the tool.
        console: where kills are shown.

    Returns:
        The kills.

    Raises:
        Fault: a start failed, hung, left a process behind, or did not go on from the newest finalised checkpoint.
    """
    folder.mkdir()
    draw = random.Random(options.seed)
    places = dealt(options, draw)
    # At the first kill a checkpoint is whole, for the second one's save waits for it; after the last one saves are to come.
    first, last = 2 * EVERY + 1, options.steps - 3 * EVERY
    kills: list[Kill] = []
    expected: int | None = None
    with (folder.parent / "kills.jsonl").open("w", encoding="utf-8") as log:

        def resume(step: int) -> None:
            for kill in kills:
                if kill.resumed is None:
                    kill.resumed = step
                    log.write(json.dumps(dataclasses.asdict(kill)) + "\n")
            log.flush()

        for number, (place, aim) in enumerate(places, 1):
            early = place.startswith(AT_START)
            step = -1 if early else first + (last - first) * number // len(places)
            # A cut-off entry of the cache is there for the next start to find.
            anew = place.startswith("compile") or (kills and kills[-1].place == "compile.cached")
            if place.startswith("compile"):
                cache_now = folder / f"cache-{number}"
            elif anew:
                cache_now = folder / f"cache-{number - 1}"
            else:
                cache_now = cache
            found = start(folder, cache_now, [], place, step, delay_of(place, draw), aim)
            resume_checked(found, expected, resume)
            at = found.of("at")
            if not at or any(found.codes[i] != -9 for i in aim.killed):
                raise Fault(f"kill {number} at {place}: the start ended with {found.codes} before it: see {folder}/said.txt")
            survivors_checked(found, aim, f"kill {number} at {place}")
            newest, unfinished = saves(folder / NAME)
            # A survivor may come to the phase's end before it hears of the kill.
            ended = [message for message in found.of("left") if message["process"] == aim.at]
            ended = [message for message in ended if aim.at in aim.killed or not message["after"]]
            left = any(message["place"] == place for message in ended) and place.endswith("running")
            phase, survived = places_of(options)[place][0], None if found.survived is None else round(found.survived, 2)
            kill = Kill(
                number, phase, place, at[0]["step"], round(found.seconds, 1), at[0]["thread"], not left,
                newest, unfinished, found.orphans, aim.at, aim.killed, survived,
            )  # fmt: skip
            kill.inside &= standing(kill, folder, aim.processes > 1)
            kills.append(kill)
            expected = newest
            where = f"step {kill.step:4}  newest {newest:4}  {'inside' if kill.inside else 'too late'}"
            if aim.processes > 1:
                ends = "" if kill.survived is None else f", the rest ended after {kill.survived:.2f} s"
                where += f"  process {aim.at} there, killed {', '.join(map(str, aim.killed))}{ends}"
            console.print(f"{number:3}  {place:17} {where}  {found.seconds:.1f} s")
            if found.orphans:
                raise Fault(f"kill {number} at {place}: processes {found.orphans} are left")
        found = start(folder, cache, [], aim=Aim(options.processes))
        resume_checked(found, expected, resume)
        if any(found.codes):
            raise Fault(f"the last start ended with {found.codes}: see {folder}/said.txt")
    return kills


def survivors_checked(found: Start, aim: Aim, kill: str) -> None:
    """A Fault where a process that was not killed did not end with code 1 and a last line that names a dead one."""
    dead = "|".join(rf"{i} of {aim.processes} on \S+ \(pid {found.pids[i]}\)" for i in aim.killed)
    named = rf"process ({dead}) died: its connection closed without a word"
    for i in set(range(aim.processes)) - set(aim.killed):
        if found.codes[i] != 1 or not re.fullmatch(named, found.last[i]):
            raise Fault(f"{kill}: process {i} ended with {found.codes[i]} and the words {found.last[i]!r}")


def resume_checked(found: Start, expected: int | None, resume: Any) -> None:
    """Note where a start went on, if it came so far; a Fault where it was not the newest finalised checkpoint."""
    told = found.of("resumed")
    if told:
        for one in told:
            if one["step"] != expected or one["passed_over"]:
                raise Fault(f"the newest finalised checkpoint was {expected}, and the run went on with {one}")
        resume(expected)
    elif expected == 0:
        resume(0)


def delay_of(place: str, draw: random.Random) -> float:
    """Seconds between the report and the kill: within a step of milliseconds none, within compilations of seconds some."""
    if place == "step.running":
        return 0.0
    return draw.uniform(0.0, 0.5 if place == "compile.running" else 0.2)


def standing(kill: Kill, folder: Path, several: bool) -> bool:
    """Whether what lies on the disk is what the phase of a kill says."""
    if kill.phase not in ("save", "finalise"):
        return True
    if len(kill.unfinished) != 1:
        return False
    (name,) = kill.unfinished
    inside = folder / NAME / "checkpoints" / name
    files = [file.relative_to(inside) for file in inside.rglob("*") if file.is_file()]
    data = any(file.parent.name == "d" for file in files)
    joined = any(file.name == "_METADATA" for file in files)  # written once all arrays of process 0 are
    if several and kill.phase == "save":  # the others have gone on
        merged = any(file.name == "manifest.ocdbt" and "process" not in file.parent.name for file in files)
        own = any(f"ocdbt.process_{kill.at}" in file.parts and file.parent.name == "d" for file in files)
        return not merged and (data if kill.place == "save.writing" else not own)
    if kill.phase == "save":
        return not joined and data == (kill.place == "save.writing")
    item = any("tmp" in str(file) for file in files)
    return joined and item == (kill.place == "finalise.written")


def summary(kills: list[Kill], options: Options, console: Console) -> None:
    """The kills by place."""
    table = Table("phase", "killed while", "kills", "inside", "steps", title=f"{len(kills)} kills")
    several = options.processes > 1
    if several:
        table.add_column("process there > killed: seconds that the rest lived on")
    for place, (phase, _, meaning) in places_of(options).items():
        here = [kill for kill in kills if kill.place == place]
        row = [
            phase,
            meaning,
            str(len(here)),
            str(sum(kill.inside for kill in here)),
            ", ".join(str(kill.step) for kill in here),
        ]
        if several:
            row.append("; ".join(_told(kill) for kill in here))
        table.add_row(*row)
    console.print(table)
    lived = [kill.survived for kill in kills if kill.survived is not None]
    if lived:
        console.print(f"after {len(lived)} kills the rest lived on for {min(lived):.2f} to {max(lived):.2f} s")


def _told(kill: Kill) -> str:
    lived = "" if kill.survived is None else f": {kill.survived:.2f}"
    return f"{kill.at} > {'+'.join(map(str, kill.killed))}{lived}"


def run(place: Path, options: Options, console: Console) -> int:
    """All runs in a folder.

    Args:
        place: the folder.
        options: of the tool.
        console: where it is told.

    Returns:
        How many differences there are.
    """
    begun = time.monotonic()
    write_run(place, options.steps, adapters=options.adapters, export_every=options.export_every)
    half, team = options.steps // 2, Aim(options.processes)
    straight, killed, moved, cache = (place / name for name in ("straight", "killed", "moved", "cache"))
    straight.mkdir()
    found = start(straight, cache, [], aim=team)
    if any(found.codes):
        raise Fault(f"the run without a stop ended with {found.codes}: see {straight}/said.txt")
    console.print(f"{options.steps} steps without a stop: {found.seconds:.1f} s")
    kills = killed_run(killed, cache, options, console)
    summary(kills, options, console)
    differ = differences(straight / NAME, killed / NAME)
    losses = [line["loss"] for line in curve(straight / NAME)]
    console.print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last of {len(losses)}")
    arrays = last_checkpoint(killed / NAME)[1]
    console.print(
        f"against the run without a stop: {len(differ)} differences among {len(losses)} lines of the journal, "
        f"{len(batches(killed / NAME))} batches and {len(arrays)} arrays"
    )
    for line in differ[:10]:
        console.print(f"  {line}")
    not_inside = [kill.number for kill in kills if not kill.inside]
    console.print(f"kills whose phase was over when the process had ended: {not_inside or 'none'}")
    wrong = len(differ)
    if options.export_every is not None:
        wrong += exports_differ(straight, killed, cache, options.processes, options.adapters, console)
    if options.processes > 1:
        wrong += alone_differs(straight, cache, console)

    moved.mkdir()
    found = start(moved, cache, [], "step.running", half, aim=Aim(options.processes, killed=tuple(range(options.processes))))
    rest = start(moved, cache, ["--mesh.axes", options.mesh])
    if any(code != -9 for code in found.codes) or rest.code:
        raise Fault(f"the run on two meshes ended with {found.codes} and {rest.code}: see {moved}/said.txt")
    first = rest.of("resumed")[0]["step"]
    apart_by = losses_apart(straight / NAME, moved / NAME)
    same = options.processes > 1 or batches(straight / NAME) == batches(moved / NAME)
    console.print(
        f"killed at step {found.of('at')[0]['step']} and gone on from {first} on {options.mesh}: losses differ by up to "
        f"{max(apart_by):.1e} (up to {max(apart_by[first : first + 10]):.1e} in the next ten steps), batches are "
        f"{'of other processes' if options.processes > 1 else 'the same' if same else 'not the same'}"
    )
    console.print(f"{time.monotonic() - begun:.0f} s in all")
    return wrong + (not same) + (max(apart_by) > 1e-5)


if __name__ == "__main__":
    sys.exit(carried_out("kill_runs", run, tyro.cli(Options, description=__doc__)))
