"""Small files that commands write: whole or not at all, and with their names in what is said of a full disk."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all, whenever this process or its machine stops: beside it first, then in its place.

    Args:
        path: the file; one that is there is replaced.
        text: all that it holds from then on.

    Raises:
        OSError: no room, no rights; the file is as it was.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with named(part):
            part.write_text(text, encoding="utf-8")
            handle = os.open(part, os.O_RDWR)
            try:
                os.fsync(handle)  # else a machine that stops may have kept the new name and not what it is of
            finally:
                os.close(handle)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """A write's failure with the file that it is of, which Python does not say.

    Args:
        path: the file.

    Raises:
        OSError: the one that was raised within, with the file.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@runtime_checkable
class Unbuffered(Protocol):
    """A file that takes as much of what it is given as it can at once."""

    def write(self, data: bytes, /) -> int | None:
        """Write; how many bytes were taken."""


def write_all(file: Unbuffered, data: bytes) -> None:
    """Write all of something to an unbuffered file.

    Args:
        file: the file.
        data: what is written.

    Raises:
        OSError: no room, no rights; a part of it may be there.
    """
    while data:
        data = data[file.write(data) or 0 :]
