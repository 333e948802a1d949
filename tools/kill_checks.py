"""What else the runs of tools/kill_runs.py are held against: exports of one process, and the whole run made by one."""

import os
from pathlib import Path

from rich.console import Console

from tools.compare_runs import apart, exports_apart, losses_apart, other_files
from tools.run_to_kill import NAME
from tools.start_runs import Aim, Fault, start


def _number(name: str) -> int:
    return int(name.rpartition("-")[2]) if name.startswith("step-") else -1


def exports_differ(straight: Path, killed: Path, cache: Path, processes: int, adapters: bool, console: Console) -> int:
    """Hold the exports of the killed run against the other's, and the last against one process's of the same checkpoint."""
    names = [sorted(os.listdir(folder / NAME / "exports"), key=_number) for folder in (straight, killed)]
    found = [f"exports {names[1]} and {names[0]} without a stop"] if names[0] != names[1] else []
    for name in set(names[0]) & set(names[1]):
        found += [
            f"{name}/{file}" for file in other_files(*(folder / NAME / "exports" / name for folder in (straight, killed)))
        ]
    forms = ("merged", "adapter") if adapters else ("merged",)
    for form in forms:
        made = []
        for count in sorted({1, processes}):
            made.append(killed.parent / f"{form}-of-{count}")
            words = ["--checkpoint.export", str(made[-1]), "--checkpoint.export_form", form]
            if count == processes:
                kill_export(killed, cache, words, made[-1], count)
            ended = start(killed, cache, words, aim=Aim(count))
            if any(ended.codes):
                raise Fault(f"the export of {count} processes ended with {ended.codes}: see {killed}/said.txt")
            if left := sorted(killed.parent.glob(f".{made[-1].name}.*")):
                raise Fault(f"after the export of {count} processes {left} are left")
        found += [f"{form}/{file}" for file in other_files(made[0], made[-1])]
        if form == "merged":
            found += [f"last/{file}" for file in other_files(made[0], killed / NAME / "exports" / names[1][-1])]
    console.print(
        f"exports {', '.join(names[1])}; {' and '.join(forms)} at the end, each killed twice, and by one process: "
        f"{len(found)} files differ"
    )
    for line in found[:10]:
        console.print(f"  {line}")
    return len(found)


def kill_export(killed: Path, cache: Path, words: list[str], target: Path, processes: int) -> None:
    """Kill the export at a run's end, amid its files and before it is renamed; a Fault where something has its name then."""
    for place, at in (("export.writing", processes - 1), ("export.written", 0)):
        dead = (processes - 1 - at,)
        found = start(killed, cache, words, place, aim=Aim(processes, at, dead))
        if not found.of("at") or found.orphans or target.exists():
            raise Fault(f"the export at the end, killed at {place}: {found.codes}, {found.last}: see {killed}/said.txt")


def alone_differs(straight: Path, cache: Path, console: Console) -> int:
    """Make the whole run in one process on the same mesh, and hold its curve and its last checkpoint against the other's."""
    alone = straight.parent / "alone"
    alone.mkdir()
    found = start(alone, cache, [])
    if found.code:
        raise Fault(f"the run of one process ended with {found.code}: see {alone}/said.txt")
    losses, arrays = losses_apart(straight / NAME, alone / NAME), apart(straight / NAME, alone / NAME)
    written = exports_apart(straight / NAME, alone / NAME)
    other = sum(by > 0 for by in arrays.values())
    console.print(
        f"against one process on the same mesh: losses differ by up to {max(losses):.1e}, {other} of "
        f"{len(arrays)} arrays of the last checkpoint by up to {max(arrays.values()):.1e} of their largest value"
        + (f", {len(written)} tensors of exports by up to {max(written.values()):.1e}" if written else "")
    )
    return (max(losses) > 1e-5) + sum(by > 1e-4 for by in arrays.values()) + sum(by > 1e-5 for by in written.values())
