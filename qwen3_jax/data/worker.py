"""One worker's work: a piece of the sources tokenised into one ArrayRecord file, its lengths and its figures beside it.

The three files of part N are `part-N.array_record`, `part-N.lengths.npy` (uint32, tokens of each document) and `part-N.json`.
Each appears whole, by a rename, the last one last: a part whose JSON is there is done. No jax here, and no grain: workers start
quickly.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.checks import check_fields
from qwen3_jax.data.chat import ChatConfig, samples
from qwen3_jax.data.encoding import record_bytes
from qwen3_jax.data.files import DataError, check_choice
from qwen3_jax.data.records import BadRecord, Conversation, checked_text, document
from qwen3_jax.data.sources import Piece, TextDocument, records
from qwen3_jax.data.tally import Fault, Tally

# group_size 1 is what grain wants for random access. zstd halves what uint32 takes, at 20 M tokens/s written and 45 read.
OPTIONS = "group_size:1,zstd:1"
_REPORT = 0.2  # seconds between two reports


@dataclasses.dataclass(frozen=True)
class Work:
    """What decides every byte that is written, but for the sources.

    Attributes:
        tokenizer: folder of the tokenizer, or its model's name on the hub.
        family: whose chat template serves a folder without one of its own; see load_tokenizer.
        field: see records.document.
        text_document: see sources.records.
        end_token: put after each text; None: nothing is.
        chat: how conversations become samples.
    """

    tokenizer: str | Path
    family: str | None = None
    field: str | None = None
    text_document: TextDocument = "file"
    end_token: str | None = "<|endoftext|>"
    chat: ChatConfig = ChatConfig()

    def __post_init__(self):
        check_fields(self)
        check_choice("text_document", self.text_document, TextDocument)


@dataclasses.dataclass
class Figures:
    """What is counted.

    Attributes:
        documents: written; a conversation may become several.
        conversations: of them, those that are samples of conversations.
        tokens: of the documents.
        targets: of the tokens, those whose prediction counts.
        cut: conversations' samples that were cut at max_length.
        dropped: conversations' samples that were dropped as over-long, or had no answer left.
    """

    documents: int = 0
    conversations: int = 0
    tokens: int = 0
    targets: int = 0
    cut: int = 0
    dropped: int = 0

    def add(self, other: Figures) -> None:
        """Add another's counts to these."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a piece is: all of it so far, not what was added.

    Attributes:
        piece: its number.
        read: bytes of the sources, of parts that are done.
        figures: what was written.
        tally: what was seen.
        done: whether its files are in their places.
    """

    piece: int
    read: int
    figures: Figures
    tally: Tally
    done: bool = False


def part_files(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """The three files of a part: documents, lengths, figures."""
    stem = f"part-{number:05d}"
    return folder / f"{stem}.array_record", folder / f"{stem}.lengths.npy", folder / f"{stem}.json"


def write_part(work: Work, piece: Piece, number: int, folder: Path, tokenizer: Any, report: Callable[[Progress], None]) -> None:
    """Tokenise a piece.

    Args:
        work: how.
        piece: what.
        number: of the part.
        folder: where its files go.
        tokenizer: work's, loaded.
        report: told how far it is, now and then.

    Raises:
        DataError: a damaged file.
        OSError: what the disk refuses.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    documents, lengths_file, figures_file = part_files(folder, number)
    tally, figures, lengths = Tally(), Figures(), []
    token = secrets.token_hex(4)
    part_file = folder / f".{documents.name}.{token}.tmp"
    writer = ArrayRecordWriter(str(part_file), OPTIONS)
    try:
        last, read = time.monotonic(), 0
        for part in piece.parts:
            for at, record in records(part, work.field, work.text_document):
                tally.records += 1
                try:
                    for content, length in _documents(work, tokenizer, record, figures):
                        with _disk_errors(documents):
                            writer.write(content)
                        lengths.append(length)
                except BadRecord as error:
                    tally.take(part, at, error)
                if time.monotonic() - last > _REPORT:
                    last = time.monotonic()
                    report(Progress(number, read, copy.copy(figures), copy.deepcopy(tally)))
            read += part.size
        with _disk_errors(documents):
            writer.close()
        _into_place(part_file, documents)
    finally:
        part_file.unlink(missing_ok=True)
    _save(lengths_file, token, lambda stream: np.save(stream, np.array(lengths, np.uint32)))
    # By kind, so that the same records give the same bytes.
    told = dict(
        records=tally.records,
        bad=dict(sorted(tally.bad.items())),
        first_bad=[dataclasses.astuple(fault) for fault in tally.first],
    )
    told |= dict(bytes=documents.stat().st_size, **dataclasses.asdict(figures))
    _save(figures_file, token, lambda stream: stream.write((json.dumps(told, indent=1) + "\n").encode()))
    report(Progress(number, piece.size, figures, tally, done=True))


def read_part(folder: Path, number: int, piece: Piece) -> Progress | None:
    """What an earlier run has finished of a piece.

    Args:
        folder: where its files are.
        number: of the part.
        piece: what it was made of.

    Returns:
        Its figures; None where it is not done.
    """
    documents, lengths, figures_file = part_files(folder, number)
    try:
        told = json.loads(figures_file.read_bytes())
        if documents.stat().st_size != told.pop("bytes") or not lengths.is_file():
            return None
    except FileNotFoundError:
        return None
    first = [Fault(*fault) for fault in told.pop("first_bad")]
    tally = Tally(told.pop("records"), collections.Counter(told.pop("bad")), first)
    return Progress(number, piece.size, Figures(**told), tally, done=True)


def _documents(work: Work, tokenizer: Any, record: Any, figures: Figures) -> Iterator[tuple[bytes, int]]:
    """The stored bytes and tokens of each document that a record gives."""
    if isinstance(record, BadRecord):
        raise record
    found = checked_text(record, "the text") if isinstance(record, str) else document(record, work.field)
    if isinstance(found, Conversation):
        made, dropped = samples(tokenizer, found, work.chat)
        figures.dropped += dropped
        for sample in made:
            figures.conversations += 1
            figures.cut += sample.cut
            figures.targets += sum(sample.targets)
            figures.documents += 1
            figures.tokens += len(sample.ids)
            yield record_bytes(sample.ids, sample.targets), len(sample.ids)
        return
    ids = tokenizer.encode(found if work.end_token is None else found + work.end_token)
    figures.documents += 1
    figures.tokens += len(ids)
    figures.targets += len(ids)
    yield record_bytes(ids), len(ids)


@contextlib.contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    """What ArrayRecord's writer says of a full disk, as a DataError."""
    try:
        yield
    except RuntimeError as error:
        raise DataError(f"{file} could not be written: {error}") from error


def _save(file: Path, token: str, write: Callable[[Any], Any]) -> None:
    part = file.parent / f".{file.name}.{token}.tmp"
    try:
        with part.open("wb") as stream:
            write(stream)
        _into_place(part, file)
    finally:
        part.unlink(missing_ok=True)


def _into_place(part: Path, file: Path) -> None:
    handle = os.open(part, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(part, file)
