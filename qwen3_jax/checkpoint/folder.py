"""A folder that appears whole or not at all: written beside its place, fsynced, renamed into it."""

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from qwen3_jax.checkpoint.safetensors import CheckpointError

_EXCHANGE, _AT_FDCWD = 2, -100  # Linux: renameat2's RENAME_EXCHANGE, and "relative to the working folder"


def check_destination(folder: Path, overwrite: bool, needed: int) -> None:
    """Refuse a destination before anything is read or written.

    Args:
        folder: where the new folder will stand.
        overwrite: whether what stands there may be replaced.
        needed: bytes that will be written.

    Raises:
        CheckpointError: it is a file, holds something and may not be replaced, or its disk is too small.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: accepted is a folder, or a path where nothing stands")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{folder} is not empty: accepted is an empty or new folder, or overwriting (overwrite=True, --overwrite)"
        )
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(f"{folder} needs {decimal(needed)} and its disk has {decimal(free)} free")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into; it takes `folder`'s place at the end, all at once, or is removed if an error ends the block.

    At every instant `folder` is what it was or what it will be. A killed process leaves at most a `.NAME.PID.part` beside it.

    Args:
        folder: where it will stand; parents are made.

    Yields:
        The folder to write into, on the same disk.
    """
    folder = folder.resolve()  # of a link, what it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*.part"):
        if not _alive(left.name.split(".")[-2]):
            shutil.rmtree(left)
    part = folder.parent / f".{folder.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        yield part
        _sync_disk(part)
        for file in [*part.rglob("*"), part]:
            _fsync(file)
        if folder.exists():
            _swap(part, folder)
        else:
            os.rename(part, folder)
        _fsync(folder.parent)
    finally:
        # After the swap this is the old folder; after an error, the unfinished new one.
        if part.exists():
            shutil.rmtree(part)


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(part: Path, folder: Path) -> None:
    """Exchange two folders, in one step where the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(_AT_FDCWD, os.fsencode(part), _AT_FDCWD, os.fsencode(folder), _EXCHANGE) == 0:
        return
    old = part.with_suffix(".old")
    os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old)


def _sync_disk(path: Path) -> None:
    """Flush the file system of a path in one go where the system can: a sync of each of 36,000 small files alone is slow."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is not None:
        handle = os.open(path, os.O_RDONLY)
        try:
            syncfs(handle)  # best effort: each file's own fsync, which follows, reports what failed
        finally:
            os.close(handle)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
