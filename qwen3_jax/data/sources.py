"""Any file as records, each with its number in the file; large files in parts that workers read on their own."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen3_jax.data.files import DataError, File, blocks, file_system, open_file, store_errors
from qwen3_jax.data.records import CHAT_FIELDS, TEXT_FIELDS, BadRecord, parsed, text_of

TextDocument = Literal["file", "line"]
_ROWS = 256  # of a Parquet file, at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """A file, or a stretch of an uncompressed JSONL file: the lines that begin in it.

    Attributes:
        file: the file.
        start: first byte.
        stop: byte past the last one; None: the file's end.
    """

    file: File
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes as they lie on disk."""
        return (self.file.size if self.stop is None else self.stop) - self.start


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one worker tokenises into one output file."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes as they lie on disk."""
        return sum(part.size for part in self.parts)


def pieces(files: Sequence[File], piece_bytes: int) -> list[Piece]:
    """Files cut and grouped into pieces, the same for the same files whatever else holds.

    Args:
        files: in order.
        piece_bytes: about how large a piece is. An uncompressed JSONL file is cut at that; others stay whole.

    Returns:
        Pieces, in the files' order.
    """
    found: list[Piece] = []
    group: list[Part] = []
    size = 0
    for file in files:
        cuts = range(0, max(file.size, 1), piece_bytes) if file.format == "jsonl" and file.compression is None else range(1)
        for start in cuts:
            stop = min(start + piece_bytes, file.size) if len(cuts) > 1 else None
            part = Part(file, start, stop)
            if group and size + part.size > piece_bytes:
                found.append(Piece(tuple(group)))
                group, size = [], 0
            group.append(part)
            size += part.size
    return [*found, Piece(tuple(group))] if group else found


def records(part: Part, field: str | None = None, text_document: TextDocument = "file") -> Iterator[tuple[int, Any]]:
    """The records of a part.

    Args:
        part: what to read.
        field: the one field that is wanted; None: any of the known ones.
        text_document: whether a text file is one document, or each of its lines.

    Yields:
        Number in the part, from 0, and a JSON object, a row by column, a text, or the BadRecord that was found there.

    Raises:
        DataError: the file is damaged, or its library is not installed.
    """
    if part.file.format == "jsonl":
        yield from _parsed(_lines(part))
    elif part.file.format == "text":
        texts = _lines(part) if text_document == "line" else [(0, b"".join(blocks(part.file)).removeprefix(b"\xef\xbb\xbf"))]
        for number, line in texts:
            yield number, _or_bad(text_of, line)
    elif part.file.format == "parquet":
        yield from _rows(part, field)
    else:
        yield from _parsed(_array_records(part))


def _or_bad(read: Any, content: bytes) -> Any:
    try:
        return read(content)
    except BadRecord as error:
        return error


def _parsed(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        yield number, _or_bad(parsed, line)


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within a part; the one that its end cuts is read to its own end."""
    # One byte earlier, so that a line that begins right at the start is told from one that goes on there.
    at = max(part.start - 1, 0)
    held: list[bytes] = []
    skipping, number = part.start > 0, 0
    for block in blocks(part.file, at):
        begin = 0
        if number == 0 and not held and not skipping and at == 0:
            begin = 3 if block.startswith(b"\xef\xbb\xbf") else 0
        while (end := block.find(b"\n", begin)) >= 0:
            line = b"".join([*held, block[begin:end]])
            held = []
            if not skipping:
                yield number, line.removesuffix(b"\r")
                number += 1
            skipping, begin = False, end + 1
            if part.stop is not None and at + begin >= part.stop:
                return
        held.append(block[begin:])
        at += len(block)
    line = b"".join(held)
    if line and not skipping:
        yield number, line.removesuffix(b"\r")


def _rows(part: Part, field: str | None) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{part.file.path} needs pyarrow, which is not installed: pip install 'qwen3-jax[data]'") from error
    wanted = (*CHAT_FIELDS, *TEXT_FIELDS, "tools") if field is None else (field, "tools")
    number = 0
    try:
        with open_file(part.file.path) as stream, parquet.ParquetFile(stream) as file:
            # A list<struct> has columns of its own below its name: what is asked for are top names.
            columns = [name for name in file.schema_arrow.names if name in wanted]
            if not columns:
                names = ", ".join(file.schema_arrow.names[:10])
                known = " or ".join(name for name in wanted if name != "tools")
                raise DataError(f"{part.file.path} has columns {names}: accepted is one with {known}")
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for row in _plain_rows(batch):
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{part.file.path} is no Parquet file, or damaged, at row {number + 1}: {error}") from error


def _plain_rows(batch: Any) -> Iterator[Any]:
    """Rows as objects; one whose strings are no UTF-8 is bad, and its neighbours are not."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRecord("not UTF-8", str(error))


def _array_records(part: Part) -> Iterator[tuple[int, bytes]]:
    from array_record.python.array_record_module import ArrayRecordReader

    with local_copy(part.file) as path:
        reader = ArrayRecordReader(str(path))
        # What is no ArrayRecord opens without a word, as if it held nothing; reading says what is wrong.
        for number in range(reader.num_records() if reader.ok() else 1):
            try:
                record = reader.read()
            except RuntimeError as error:
                found = f"{part.file.path} is no ArrayRecord, or damaged, at record {number + 1}: {error}"
                raise DataError(found) from error
            yield number, record
        reader.close()  # one that has failed says so again if it is closed


@contextlib.contextmanager
def local_copy(file: File) -> Iterator[Path]:
    """A file's path on a disk: ArrayRecord's reader opens no other. What lies in a store is copied for the while.

    Args:
        file: anywhere.

    Yields:
        The path.
    """
    system, inside = file_system(file.path)
    if Path(inside).is_absolute() and Path(inside).is_file() and "://" not in file.path:
        yield Path(inside)
        return
    with tempfile.TemporaryDirectory(prefix="qwen3-jax-data-") as folder, store_errors(file.path):
        copy = Path(folder) / file.name
        system.get_file(inside, str(copy))
        yield copy
