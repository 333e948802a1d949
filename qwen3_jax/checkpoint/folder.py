"""A folder that appears whole or not at all: written beside its place, fsynced, renamed into it.

It grows as `.NAME.<8 hex digits>.part`, and its writer holds a lock on it (flock) for as long as it lives: whoever writes there
next removes what nobody holds. Where the system has no such locks, what is left over stays.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from qwen3_jax.checkpoint.reading import CheckpointError, system_errors
from qwen3_jax.checkpoint.together import Team

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_EXCHANGE, _AT_FDCWD = 2, -100  # Linux: renameat2's RENAME_EXCHANGE, and "relative to the working folder"
_FULL = (errno.ENOTEMPTY, errno.EEXIST)  # what a rename onto a folder that holds something says


def resolved(folder: Path) -> Path:
    """Where a path leads, links followed.

    Args:
        folder: need not be there.

    Returns:
        An absolute path without links.

    Raises:
        CheckpointError: links that lead round in a circle, a name too long, a file in the place of a folder.
    """
    with system_errors(folder):
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)
        return Path(os.path.realpath(folder))


def check_destination(folder: Path, overwrite: bool, needed: int) -> None:
    """Refuse a destination before anything is read or written.

    Args:
        folder: where the new folder will stand.
        overwrite: whether what stands there may be replaced.
        needed: bytes that will be written.

    Raises:
        CheckpointError: it is a file, holds something and may not be replaced, is a mount point or the working folder, which
            cannot be replaced, or its disk is too small.
    """
    place = resolved(folder)
    with system_errors(folder):
        if place.exists() and not place.is_dir():
            raise CheckpointError(f"{folder} is a file: accepted is a folder, or a path where nothing stands")
        if os.path.ismount(place):
            raise CheckpointError(f"{folder} is a mount point, which cannot be replaced: accepted is a folder inside it")
        if _working_folder().is_relative_to(place):
            raise CheckpointError(
                f"{folder} is or holds the folder that this process works in, which cannot be replaced: accepted is another, "
                "or to work elsewhere"
            )
        if not overwrite:
            _check_empty(place, folder)
        parent = place.parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(f"{folder} needs {decimal(needed)} and its disk has {decimal(free)} free")


def _check_empty(place: Path, named: Path) -> None:
    if place.is_dir() and any(place.iterdir()):
        raise _not_empty(named)


def _not_empty(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not empty: accepted is an empty or new folder, or overwriting (overwrite=True, --overwrite)"
    )


def _working_folder() -> Path:
    try:
        return Path(os.path.realpath(os.getcwd()))
    except FileNotFoundError:  # it was removed: nothing holds it
        return Path("/")


@contextlib.contextmanager
def whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into; it takes `folder`'s place at the end, all at once, or is removed if an error ends the block.

    At every instant `folder` is what it was or what it will be. A killed process leaves at most a part beside it, for the next
    one to remove. Where the system cannot exchange two folders, a kill between two renames leaves the old one beside its place,
    for the next one to put back.

    Args:
        folder: where it will stand; parents are made.
        overwrite: replace what stands there at the end; otherwise whatever has come to stand there meanwhile stays.

    Yields:
        The folder to write into, on the same disk.

    Raises:
        CheckpointError: what the system refuses, in the block too; a folder that is not empty and may not be replaced.
    """
    with system_errors(folder):
        place = resolved(folder)  # of a link, what it points to is replaced
        oldest = place.parent
        while not oldest.exists():
            oldest = oldest.parent
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(place)
        if not overwrite:
            _check_empty(place, folder)
        part, lock = _new_part(place)
        try:
            yield part
            _sync(part)
            try:
                os.rename(part, place)  # onto nothing or an empty folder; never onto one that holds something
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not overwrite:
                    raise _not_empty(folder) from error
                _swap(part, place)
            for parent in place.parents:
                _fsync(parent)
                if parent == oldest:
                    break
        finally:
            # After a swap this is the old folder; after an error, the unfinished new one. What resists is the next run's.
            shutil.rmtree(part, ignore_errors=True)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def shared_folder(folder: Path, overwrite: bool, team: Team) -> Iterator[Path]:
    """`whole_folder` for several processes on one file system: it appears once the block has succeeded on every one of them.

    Args:
        folder: where it will stand.
        overwrite: replace what stands there at the end.
        team: the processes, every one of which calls this.

    Yields:
        The folder to write into, the same for all.

    Raises:
        CheckpointError: as of `whole_folder`, of this or another process.
    """
    if team.size == 1:
        with whole_folder(folder, overwrite) as part:
            yield part
        return
    with team.agreed(), contextlib.ExitStack() as until_done:
        # Within the last agreement, for the first process puts the folder in its place at the end of the stack.
        with team.agreed():
            part = until_done.enter_context(whole_folder(folder, overwrite)) if team.leads else None
        name = team.told("" if part is None else part.name)[0]
        part = resolved(folder).parent / name
        with team.agreed(), system_errors(folder):
            if not part.is_dir():
                raise CheckpointError(f"{part} is not there: several processes write one folder on a file system of them all")
        with team.agreed(), system_errors(folder):
            yield part
            _sync(part)


def _new_part(place: Path) -> tuple[Path, int | None]:
    """A new folder beside a place, and the handle of its lock; None where the system has no locks."""
    while True:
        part = place.parent / f".{place.name}.{secrets.token_hex(4)}.part"
        try:
            part.mkdir()
            return part, _lock(part)
        except (FileExistsError, BlockingIOError):
            continue
        except FileNotFoundError:
            place.parent.stat()  # that it is gone is an error
            continue  # the part is: somebody has taken it for a leftover before it was locked
        except OSError:
            if not part.is_dir():
                raise
            return part, None


def _lock(folder: Path) -> int:
    """A handle that holds a folder's lock.

    Raises:
        BlockingIOError: another holds it.
        FileNotFoundError: it is gone.
        OSError: the system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _clear_leftovers(place: Path) -> None:
    """Remove what killed writers of a place have left beside it; a folder that one had moved away is put back."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.(part|old)")
    try:
        names = os.listdir(place.parent)
    except OSError:
        return
    for name in sorted(filter(pattern.fullmatch, names)):  # .old before its .part
        left = place.parent / name
        lock = None
        try:
            lock = _lock(left.with_suffix(".part"))
        except FileNotFoundError:
            pass  # an .old whose .part has taken its place already
        except OSError:
            continue
        if left.suffix == ".old" and not place.exists():
            with contextlib.suppress(OSError):
                os.rename(left, place)
        else:
            shutil.rmtree(left, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _swap(part: Path, folder: Path) -> None:
    """Exchange two folders, in one step where the system can."""
    if _exchange(part, folder):
        return
    old = part.with_suffix(".old")
    try:
        os.rename(folder, old)
        os.rename(part, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0


def _sync(folder: Path) -> None:
    """Let what a folder holds reach the disk, as far as this process has written it."""
    _sync_disk(folder)
    for file in [*folder.rglob("*"), folder]:
        _fsync(file)


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
