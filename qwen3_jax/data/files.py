"""Files, local or in an object store: found, named, opened.

Paths go through fsspec: its protocols are what datasets, pandas and pyarrow users have installed already (gs:// through gcsfs,
s3:// through s3fs, hf:// through huggingface-hub), it opens a file at any byte, which pieces of one large file need, and
`memory://` lets tests run the very same code. etils.epath, Orbax's choice, reaches other stores than Google's through fsspec
only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

Format = Literal["jsonl", "parquet", "text", "array_record"]

_ENDINGS: dict[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md"),
    "array_record": (".array_record", ".arrayrecord"),
}
FORMATS: dict[str, Format] = {ending: kind for kind, endings in _ENDINGS.items() for ending in endings}
# What data sets have beside their data: dataset_infos.json, README.md.
_NAMED_ONLY = (".json", ".md")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 1 << 20  # bytes of one read


class DataError(ValueError):
    """Data or a data config that is refused: which file or field, what was found, what is accepted."""


def check_choice(name: str, given: str | None, choices: Any) -> None:
    """Refuse a word that is none of a Literal's; None is left alone.

    Args:
        name: the field, for the message.
        given: what stands there.
        choices: the Literal.

    Raises:
        DataError: another word.
    """
    if given is not None and given not in get_args(choices):
        raise DataError(f"{name} is {given!r}: accepted is {' or '.join(get_args(choices))}")


@dataclasses.dataclass(frozen=True)
class File:
    """A file to read.

    Attributes:
        path: as fsspec takes it; a local one is absolute.
        size: bytes as they lie there; 0 where a store does not say.
        format: what is in it.
        compression: gzip, zstd or None.
    """

    path: str
    size: int
    format: Format
    compression: str | None = None

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]


def kind_of(path: str) -> tuple[Format, str | None] | None:
    """Format and compression that a file's name says; None where it says nothing that is read."""
    stem, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending)
    if compression is not None:
        ending = os.path.splitext(stem)[1]
    found = FORMATS.get(ending)
    if found is None or (compression is not None and found not in ("jsonl", "text")):
        return None
    return found, compression


def find_files(sources: Iterable[str]) -> list[File]:
    """The files that sources name.

    Args:
        sources: paths of files and of folders, and patterns (`data/*.jsonl.zst`, `gs://bucket/**/*.parquet`). Of a folder
            all files are taken, at any depth, whose names say a format; hidden ones are passed over, and .json and .md, which
            must be named or matched.

    Returns:
        Each source's, sorted by path.

    Raises:
        DataError: no source, one without files, a file of no known format, one named twice, a store whose library is not
            installed.
    """
    found: list[File] = []
    sources = list(sources)
    if not sources:
        raise DataError("sources is empty: accepted is at least one file, folder or pattern")
    for source in sources:
        files = _of_source(source)
        if not files:
            raise DataError(f"{source} has no file to read: accepted are names that end in {_accepted()}")
        found += files
    seen: set[str] = set()
    for file in found:
        if file.path in seen:
            raise DataError(f"{file.path} is named twice: accepted is each file once")
        seen.add(file.path)
    return found


def _accepted() -> str:
    return f"{', '.join(FORMATS)}; with .gz or .zst after them where they are JSON lines or text"


def _of_source(source: str) -> list[File]:
    system, path = file_system(source)
    with store_errors(source):
        # Sizes come with the list: asking for each is a request a file.
        if any(letter in path for letter in "*?["):
            infos = _matching(system, path, source)
        elif system.isdir(path):
            below = len(path.rstrip("/")) + 1
            infos = {name: info for name, info in system.find(path, detail=True).items() if _is_data(name[below:])}
        elif system.exists(path):
            infos = {path: system.info(path)}
        else:
            raise DataError(f"{source} is not there: accepted are files, folders and patterns that match some")
        files = []
        for name, info in sorted(infos.items()):
            # A link is neither in a list, as caches of the hub have them: ask.
            if info["type"] == "directory" or (info["type"] != "file" and not system.isfile(name)):
                continue
            kind = kind_of(name)
            if kind is None:
                raise DataError(f"{name} has an unknown format: accepted are names that end in {_accepted()}")
            files.append(File(named(system, name), int(info.get("size") or 0), *kind))
        return files


def _matching(system: Any, path: str, source: str) -> dict[str, Any]:
    """What a pattern matches."""
    try:
        return system.glob(path, detail=True)
    except ValueError as error:  # fsspec's, of a pattern that is none
        raise DataError(f"{source}: {error}; accepted are patterns as *.jsonl and **/*.jsonl") from error


def _is_data(path: str) -> bool:
    """Whether a file within a folder is taken without being named."""
    hidden = any(name.startswith((".", "_")) for name in path.split("/"))
    return not hidden and not path.lower().endswith(_NAMED_ONLY) and kind_of(path) is not None


def file_system(path: str) -> tuple[Any, str]:
    """The file system of a path, and the path there.

    Args:
        path: a local path, or a URL of any protocol that fsspec knows.

    Returns:
        fsspec's file system, and the path as it takes it.

    Raises:
        DataError: an unknown protocol, or one whose library is not installed.
    """
    import fsspec.core

    try:
        return fsspec.core.url_to_fs(os.path.expanduser(path))
    except ImportError as error:
        raise DataError(f"{path} needs a library that is not installed: {error}") from error
    except ValueError as error:
        raise DataError(f"{path} is of no known protocol: {error}") from error


def named(system: Any, path: str) -> str:
    """A path of a file system under the name that `file_system` takes; local ones are plain."""
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return path if "file" in protocols else system.unstrip_protocol(path)


@contextlib.contextmanager
def store_errors(path: str) -> Iterator[None]:
    """What a disk or a store refuses, as a DataError that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error}") from error


def open_file(path: str) -> Any:
    """A file's bytes as they lie there, as a binary stream that can seek."""
    system, inside = file_system(path)
    with store_errors(path):
        return system.open(inside, "rb")


def blocks(file: File, start: int = 0) -> Iterator[bytes]:
    """A file's content, decompressed, block by block.

    Args:
        file: the file.
        start: byte to begin at; of an uncompressed file alone.

    Yields:
        Bytes.

    Raises:
        DataError: the file is damaged or cut off, or its decompressor is not installed.
    """
    with store_errors(file.path), open_file(file.path) as stream:
        if file.compression is None:
            stream.seek(start)
            while block := stream.read(_BLOCK):
                yield block
            return
        inflate = _inflater(file)
        whole = True  # an empty file, and whatever ends where a member or frame does
        while block := stream.read(_BLOCK):
            while block:
                try:
                    content = inflate.decompress(block)
                except _broken_stream(file) as error:
                    raise DataError(f"{file.path} is no {file.compression} file, or damaged: {error}") from error
                whole, block = inflate.eof, b""
                if content:
                    yield content
                if whole:
                    block, inflate = inflate.unused_data, _inflater(file)
        if not whole:
            raise DataError(f"{file.path} is cut off: its {file.compression} stream has no end")


def _inflater(file: File) -> Any:
    if file.compression == "gzip":
        return zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{file.path} needs zstandard, which is not installed: pip install 'qwen3-jax[data]'") from error
    # Large dumps are written with windows (`zstd --long=31`) that it refuses unless told.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _broken_stream(file: File) -> type[Exception]:
    if file.compression == "gzip":
        return zlib.error
    import zstandard

    return zstandard.ZstdError
