"""A prepared folder: its index, the length of every document, and the documents by number."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.data.fetch import fetch, fetch_index
from qwen3_jax.data.files import DataError

# Of a prepared folder: what it holds, written last; what it is being made of, written first; the layout of both.
INDEX, PLAN = "dataset.json", "plan.json"
VERSION = 1


try:
    import resource
except ImportError:  # not on Windows
    resource = None


def allow_open_files(count: int) -> None:
    """Let this process hold that many more files open than it may need otherwise: each part that is read stays open.

    Args:
        count: of parts.

    Raises:
        DataError: the system allows fewer.
    """
    if resource is None:
        return
    needed = count + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DataError(
            f"the sources are {count} files and this process may hold {hard} open: accepted is a hard limit (ulimit -Hn) of at "
            f"least {needed}, or sources prepared in larger pieces (--piece-bytes)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass(frozen=True)
class _Stretch:
    """All documents of a file, as grain's source takes it: it then need not open the file to count them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Prepared:
    """Documents that `prepare` has tokenised.

    Attributes:
        folder: where.
        index: its dataset.json.
        lengths: tokens of each document [documents] uint32.
    """

    def __init__(self, folder: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None):
        """Open a folder.

        Args:
            folder: that prepare has written, to its end; one of a store (gs://...) is copied to a disk first.
            cache: where to; None: fetch.CACHE.

        Raises:
            DataError: it is not there, not finished, of another version, or a file is missing or of another size.
        """
        address = os.fspath(folder)
        self.folder = fetch(address, INDEX, cache) if "://" in address else Path(folder)
        self.index = read_index(self.folder)
        self._parts = [part for part in self.index["parts"] if part["documents"]]
        for part in self._parts:
            file = self.folder / f"{part['name']}.array_record"
            size = file.stat().st_size if file.is_file() else None
            if size != part["bytes"]:
                raise DataError(
                    f"{file} has {size} bytes, and {INDEX} says {part['bytes']}: accepted is the folder as it was written"
                )
        self.lengths = np.concatenate([np.load(self.folder / f"{part['name']}.lengths.npy") for part in self._parts])
        if len(self.lengths) != self.index["documents"] or int(self.lengths.sum()) != self.index["tokens"]:
            raise DataError(
                f"{self.folder}: its lengths do not add up to the tokens that {INDEX} says: accepted is the folder as it was "
                "written"
            )

    @property
    def parts(self) -> int:
        """How many files hold documents."""
        return len(self._parts)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, documents: Sequence[int]) -> Sequence[bytes]:
        """Documents as they are stored (encoding.record_tokens), in the order asked for.

        Args:
            documents: their numbers.

        Returns:
            The bytes of each.

        Raises:
            DataError: a damaged file.
        """
        try:
            return (
                self._source.__getitems__(documents) if len(documents) > 1 else [self._source[number] for number in documents]
            )
        except RuntimeError as error:  # what ArrayRecord's C++ says
            raise DataError(f"{self.folder} is damaged: {error}") from error

    @functools.cached_property
    def _source(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        counts = [(str(self.folder / f"{part['name']}.array_record"), part["documents"]) for part in self._parts]
        return ArrayRecordDataSource([_Stretch(name, 0, count, count) for name, count in counts])


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder says of itself; of one in a store this alone is read.

    Args:
        folder: that prepare has written, to its end.

    Returns:
        The content of its dataset.json.

    Raises:
        DataError: it is not there, not finished, or of another version.
    """
    address = os.fspath(folder)
    if "://" in address:
        return _of_this_version(f"{address}/{INDEX}", fetch_index(address, INDEX))
    folder = Path(folder)
    file = folder / INDEX
    if not file.is_file():
        unfinished = (folder / PLAN).is_file()
        found = "holds a run of `data prepare` that has not ended: run it again" if unfinished else f"has no {INDEX}"
        raise DataError(f"{folder} {found}; accepted is a folder that `qwen3-jax data prepare` has written")
    return _of_this_version(file, file.read_bytes())


def _of_this_version(file: str | Path, content: bytes) -> dict[str, Any]:
    index = json.loads(content)
    if index.get("version") != VERSION:
        raise DataError(f"{file} is of version {index.get('version')}: accepted is {VERSION}")
    return index
