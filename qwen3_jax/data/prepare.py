"""`prepare`: sources tokenised once, by worker processes, into a folder of ArrayRecord files with an index.

A run that ends in whatever way goes on where it was: a part that is done stays, and the index is written once all are. The same
sources and settings give the same bytes, whatever the workers and however often it was killed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.chat.tokenizer import Tokenizer, load_tokenizer
from qwen3_jax.data.files import DataError, File, find_files, store_errors
from qwen3_jax.data.prepared import INDEX, PLAN, VERSION
from qwen3_jax.data.processes import run_pieces
from qwen3_jax.data.sources import Piece, pieces
from qwen3_jax.data.tally import Fault, Tally
from qwen3_jax.data.worker import Figures, Progress, Work, part_files, read_part, write_part

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Total:
    """A run so far.

    Attributes:
        pieces: how many there are.
        done: of them.
        size: bytes of the sources.
        read: of them.
        figures: what was written.
        tally: what was seen.
    """

    pieces: int
    done: int
    size: int
    read: int
    figures: Figures
    tally: Tally


def prepare(
    sources: Sequence[str],
    folder: str | os.PathLike[str],
    work: Work,
    *,
    workers: int | None = None,
    max_bad_rate: float = 0.01,
    piece_bytes: int = 256_000_000,
    overwrite: bool = False,
    progress: Callable[[Total], None] | None = None,
) -> Total:
    """Tokenise sources into a folder, or go on with a run that has not ended.

    Args:
        sources: see files.find_files.
        folder: on a disk, or a mount of a store; parents are made.
        work: the tokenizer and what is done with records.
        workers: processes; None: one a processor; 0: none, all is done in this one.
        max_bad_rate: of bad records among all; past it the run stops, as soon as 1000 were seen.
        piece_bytes: about how much of the sources goes into one file.
        overwrite: begin anew where a run with other settings or sources stands.
        progress: told now and then, and at the end.

    Returns:
        The whole run's figures, earlier parts included.

    Raises:
        DataError: sources, tokenizer or settings that are refused, a folder that holds something else or another run, a damaged
            file, a worker that died.
        TooManyBadRecords: with the first ones by file and line.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    for name, value, fits, accepted in (
        ("workers", workers, workers >= 0, "at least 0"),
        ("max_bad_rate", max_bad_rate, 0 <= max_bad_rate <= 1, "0 to 1"),
        ("piece_bytes", piece_bytes, piece_bytes >= 1, "at least 1"),
    ):
        if not fits:
            raise DataError(f"{name} is {value}: accepted is {accepted}")
    place = Path(folder)
    if "://" in os.fspath(folder):
        raise DataError(
            f"{folder} is in a store: accepted is a folder on a disk or a mount, for ArrayRecord's writer takes no other"
        )
    tokenizer = load_tokenizer(work.tokenizer, work.family)
    _check_end_token(tokenizer, work)
    files = find_files(sources)
    _check_outside(place, sources, files)
    parts = pieces(files, piece_bytes)
    plan = _plan(work, tokenizer, files, piece_bytes)
    with store_errors(str(folder)):
        place.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        _check_folder(place, plan, overwrite)
        state = _State(parts, max_bad_rate, progress)
        for number, piece in enumerate(parts):
            if found := read_part(place, number, piece):
                state.take(found, quiet=True)
        left = [number for number in range(len(parts)) if number not in state.done]
        state.tell()
        if workers == 0:
            for number in left:
                write_part(work, parts[number], number, place, tokenizer, state.take)
        elif left:
            run_pieces(work, place, parts, left, min(workers, len(left)), state.take)
        total = state.total()
        total.tally.check(max_bad_rate, least=1)
        if not total.figures.documents:
            raise DataError(f"{', '.join(sources)}: no document came of {total.tally.records} records")
        _write(place / INDEX, _index(place, plan, work, tokenizer, total, len(parts)))
        return total


class _State:
    """What is known of every piece; sums of those that are done are kept, for there may be very many."""

    def __init__(self, parts: Sequence[Piece], rate: float, tell: Callable[[Total], None] | None):
        self.done: set[int] = set()
        self._count = len(parts)
        self._size = sum(piece.size for piece in parts)
        self._rate = rate
        self._tell = tell
        self._read, self._figures, self._tally = 0, Figures(), Tally()
        self._going: dict[int, Progress] = {}
        self._first: dict[int, list[Fault]] = {}  # bad records by piece

    def take(self, progress: Progress, quiet: bool = False) -> None:
        if progress.tally.first:
            self._first[progress.piece] = progress.tally.first
        if progress.done:
            self._going.pop(progress.piece, None)
            self.done.add(progress.piece)
            _add(progress, self._figures, self._tally)
            self._read += progress.read
        else:
            self._going[progress.piece] = progress
        if not quiet:
            self.tell().tally.check(self._rate)

    def tell(self) -> Total:
        total = self.total()
        if self._tell is not None:
            self._tell(total)
        return total

    def total(self) -> Total:
        figures, tally, read = copy.copy(self._figures), copy.deepcopy(self._tally), self._read
        for progress in self._going.values():
            _add(progress, figures, tally)
            read += progress.read
        # In the sources' order, whichever worker came first.
        named = itertools.chain.from_iterable(first for _, first in sorted(self._first.items()))
        tally.first = list(itertools.islice(named, tally.named))
        return Total(self._count, len(self.done), self._size, read, figures, tally)


def _add(progress: Progress, figures: Figures, tally: Tally) -> None:
    figures.add(progress.figures)
    tally.records += progress.tally.records
    tally.bad.update(progress.tally.bad)


def _check_outside(folder: Path, sources: Sequence[str], files: Sequence[File]) -> None:
    """Refuse a folder among the sources: what is written there would be read by the next run."""
    place = folder.resolve()
    for path in [*sources, *(file.path for file in files)]:
        local = Path(path).expanduser().resolve()
        if place.is_relative_to(local) or local.is_relative_to(place):
            raise DataError(
                f"{folder} lies within the source {path}, or that in it: accepted is a folder apart from all sources"
            )


def _check_end_token(tokenizer: Tokenizer, work: Work) -> None:
    if work.end_token is not None and len(ids := tokenizer.encode(work.end_token)) != 1:
        raise DataError(
            f"end_token is {work.end_token!r}, which is {len(ids)} tokens: accepted is one of the vocabulary, or None"
        )


def _plan(work: Work, tokenizer: Tokenizer, files: Sequence[File], piece_bytes: int) -> dict[str, Any]:
    """What decides the bytes of a folder, as JSON has it."""
    settings = dataclasses.asdict(work) | {
        "tokenizer": tokenizer_hash(tokenizer),
        "template": hashlib.sha256(json.dumps(tokenizer.template, sort_keys=True).encode()).hexdigest(),
        "piece_bytes": piece_bytes,
    }
    del settings["family"]  # says where the template came from
    return {"version": VERSION, "settings": settings, "files": [[file.path, file.size] for file in files]}


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """What tells tokenizers apart: their files' sha256. Chat templates are not in it, for texts do not depend on them."""
    told = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        file = tokenizer.folder / name
        told.update(file.read_bytes() if file.is_file() else b"")
    return told.hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it whatever this process dies of."""
    with (folder / LOCK).open("w") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{folder}: another run writes there: accepted is one at a time") from error
        yield


def _check_folder(folder: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Make sure that what stands there is of this very plan, and clear what a killed run has left."""
    file = folder / PLAN
    names = [entry.name for entry in folder.iterdir() if entry.name != LOCK]
    if names and not file.is_file() and any(not name.endswith(".tmp") for name in names):
        raise DataError(f"{folder} holds {sorted(names)[0]}, which is of no such run: accepted is a new or empty folder")
    if file.is_file():
        found = json.loads(file.read_bytes())
        if found != plan and not overwrite:
            what, was, now = _difference(found, plan)
            raise DataError(
                f"{folder} holds a run with another {what}: {was} there, {now} here: accepted is the same, or to begin anew "
                "(--overwrite)"
            )
        if found != plan:
            # The index first: the folder is nobody's data set from here on.
            for name in sorted(names, key=lambda name: (name != INDEX, name != PLAN, name)):
                if name in (INDEX, PLAN) or name.startswith("part-"):
                    (folder / name).unlink()
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    _write(file, plan)


def _difference(found: Any, plan: dict[str, Any]) -> tuple[str, Any, Any]:
    for key, now in plan["settings"].items():
        if (was := found.get("settings", {}).get(key)) != now:
            return key, was, now
    was, now = ([tuple(file) for file in told.get("files", [])] for told in (found, plan))
    changed = next(
        (pair for pair in zip(was, now, strict=False) if pair[0] != pair[1]), (f"{len(was)} files", f"{len(now)} files")
    )
    return "set of files", changed[0], changed[1]


def _index(folder: Path, plan: dict[str, Any], work: Work, tokenizer: Tokenizer, total: Total, count: int) -> dict[str, Any]:
    parts = []
    for number in range(count):
        documents, _, figures = part_files(folder, number)
        told = json.loads(figures.read_bytes())
        parts.append({"name": documents.stem, "documents": told["documents"], "tokens": told["tokens"], "bytes": told["bytes"]})
    return {
        "version": VERSION,
        "tokenizer": plan["settings"]["tokenizer"],
        # Where it was, for whoever wants text of the ids; the hash says whether it is still the same one.
        "tokenizer_folder": str(Path(work.tokenizer).resolve() if Path(work.tokenizer).exists() else work.tokenizer),
        "vocab_size": tokenizer.vocab_size,
        **dataclasses.asdict(total.figures),
        "records": total.tally.records,
        "bad": dict(sorted(total.tally.bad.items())),
        "first_bad": list(map(str, total.tally.first)),
        "parts": parts,
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    part = file.parent / f".{file.name}.tmp"
    with part.open("w") as stream:
        stream.write(json.dumps(content, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
