"""starts.jsonl: for each start of a run when it was, what it came to, and where its time went; process 0 writes it.

A start that is killed writes nothing. The next one does it in its place, by the times in the journal, before the journal's
lines of steps that will come again are taken out.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.runs.report import without_rewound
from qwen3_jax.training.journal import read_lines
from qwen3_jax.whole_files import write_whole


class Starts:
    """The starts of a run."""

    def __init__(self, folder: Path, first: int, begun: float, *, writes: bool = True):
        """Note a start, and the one before it if that has been killed.

        Args:
            folder: of the run, its metrics.jsonl as the start before has left it.
            first: the step that this start begins with.
            begun: when, in seconds since 1970.
            writes: whether this process does.
        """
        self._file, self._under_way = folder / "starts.jsonl", folder / "under_way.json"
        self._first, self._begun, self._writes = first, begun, writes
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self._under_way.exists():
            self._append(_killed(json.loads(self._under_way.read_text("utf-8")), folder / "metrics.jsonl", first))
        write_whole(self._under_way, json.dumps(dict(begun=begun, first=first)))

    def end(self, step: int, came_to: str, seconds: Mapping[str, float], lost: Sequence[str] = ()) -> None:
        """Note the end of this start.

        Args:
            step: steps made in all.
            came_to: "done", "told to end" or "failed".
            seconds: of each kind.
            lost: boards that were given up, each with the reason.
        """
        if not self._writes:
            return
        line = dict(begun=self._begun, ended=time.time(), first=self._first, step=step, came_to=came_to, seconds=dict(seconds))
        self._append(line | (dict(lost=list(lost)) if lost else {}))
        self._under_way.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        there = self._file.read_text("utf-8") if self._file.exists() else ""
        if f'"begun": {json.dumps(line["begun"])},' in there:
            return  # a kill came between this line and the end of under_way.json
        write_whole(self._file, there + json.dumps(line) + "\n")


def _killed(start: Mapping[str, Any], journal: Path, first: int) -> dict[str, Any]:
    """What is known of a start that was killed, once the next one begins with step `first`: `again` is of steps made twice."""
    lines = list(read_lines(journal)) if journal.exists() else []
    begins = next((at for at, line in enumerate(lines) if line.get("time", 0) > start["begun"]), len(lines))
    lines = lines[begins:]
    found = [line for line in lines if "time" in line]
    line = dict(begun=start["begun"], ended=None, first=start["first"], step=start["first"], came_to="killed", seconds={})
    if not found:
        return line
    kept = [at for at, line in enumerate(lines) if "time" in line and line["step"] < first]
    begun, ended = found[0]["time"], found[-1]["time"]
    saved = lines[kept[-1]]["time"] if kept else begun
    back = sum(rewind["seconds"] for rewind in without_rewound(lines[: kept[-1] + 1])[1]) if kept else 0.0
    seconds = dict(start=begun - start["begun"], train=saved - begun - back, again=ended - saved + back)
    return line | dict(ended=ended, step=found[-1]["step"] + 1, seconds=seconds)
