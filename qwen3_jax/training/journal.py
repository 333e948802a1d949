"""metrics.jsonl: a line of figures for each step that is written down; a restart takes back those that will come again.

Other forms of the same lines (qwen3_jax.training.sinks) are written beside it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.training.sinks import Board
from qwen3_jax.whole_files import named, write_all, write_whole


class Journal:
    """The lines of a run, appended by process 0 alone."""

    def __init__(self, path: Path, first: int, *, writes: bool = True, boards: Sequence[Board] = ()):
        """Open it for a run that goes on at a step.

        Args:
            path: the file.
            first: the next step; lines of it and of later ones, and a line that was cut off, are taken out, but not what a
                rewind to it or to an earlier one has taken back already.
            writes: whether this process writes; on others nothing happens.
            boards: take each line too; given on the process that writes, and closed with the journal.
        """
        self._file, self._path = None, path
        self._boards = boards
        if not writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = list(read_lines(path))
            marks = [at for at, line in enumerate(lines) if "rewound_from" in line and line["step"] <= first]
            settled = marks[-1] + 1 if marks else 0
            kept = lines[:settled] + [line for line in lines[settled:] if line.get("step", -1) < first]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        # Unbuffered: what a full disk has refused must not be tried again by whatever is written or closed next.
        self._file = path.open("ab", buffering=0)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite are written as null beside a word that says which.

        Args:
            line: JSON, its arrays and numpy scalars as lists and numbers.

        Raises:
            OSError: no room, no rights; a part of the line may be there, which a restart takes out.
        """
        if self._file is not None:
            told = {name: plain(value) for name, value in line.items()}
            with named(self._path):
                write_all(self._file, (json.dumps(told, allow_nan=False) + "\n").encode())
            for board in self._boards:
                board.write(told)

    def lost(self) -> list[str]:
        """Boards that have been given up, each with the reason."""
        return [board.lost for board in self._boards if board.lost is not None]

    def close(self) -> None:
        """Close the file, and the boards, each of which may take its time (qwen3_jax.training.sinks.PATIENCE)."""
        try:
            if self._file is not None:
                self._file.close()
        finally:
            for board in self._boards:
                board.close()


def plain(value: Any) -> Any:
    """A value as JSON has it.

    Args:
        value: a number, an array, or JSON.

    Returns:
        The same with numbers that are not finite as the words "nan", "inf" and "-inf".
    """
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a last one that a kill has cut off is left out.

    Args:
        path: the file.

    Yields:
        Each line's figures.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
