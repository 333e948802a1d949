"""Where a run keeps what it writes, and whether all of its processes see the same folders there."""

import contextlib
import importlib
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from qwen3_jax.checkpoint.together import all_processes
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.toml import RunError

STORES = {"gs": ("gcsfs", "google.cloud.storage")}  # what epath and Orbax reach them through: the extra `gcs`
PATIENCE = 5.0  # seconds that a file may take to be seen on another host


def run_folder(run: Run) -> Path:
    """The folder of a run's figures, starts, report and exports."""
    return Path(run.output) / run.name


def checkpoint_folder(run: Run) -> epath.Path:
    """The folder of a run's checkpoints, of a file system or of a bucket."""
    folder = run.checkpoint.folder
    return epath.Path(run_folder(run) / "checkpoints") if folder is None else epath.Path(folder) / run.name


def check_store(run: Run) -> None:
    """Refuse a bucket whose library is not installed.

    Args:
        run: the run.

    Raises:
        RunError: a module is not there, with the extra that brings it.
    """
    scheme = (run.checkpoint.folder or "").partition("://")[0]
    for module in STORES.get(scheme, ()):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise RunError(
                f"checkpoint.folder {run.checkpoint.folder} needs {module}: `pip install qwen3-jax[gcs]`, or a mounted folder"
            ) from error


def check_shared(run: Run) -> None:
    """Refuse a bucket that cannot be written, and folders that several processes write to and do not share.

    Process 0 writes a small file of a name that nobody has looked for, all look for it, and it is removed. Every process calls
    this, once jax knows them.

    Args:
        run: the run.

    Raises:
        RunError: the bucket does not answer, or not to this host; a process does not see the file: the folder, and the host of
            each such process.
        OSError: process 0 cannot write to a folder.
        ValueError: the same of another process, by its index.
    """
    team, folder = all_processes(), checkpoint_folder(run)
    folders = []  # each with the key that names it
    if team.size > 1 or "://" in str(folder):
        folders.append((folder, "output" if run.checkpoint.folder is None else "checkpoint.folder"))
    if team.size > 1 and run.checkpoint.export_every is not None:
        folders.append((epath.Path(run_folder(run)), "output"))
    for folder, key in folders:
        file = folder / f".seen-by-all-{secrets.token_hex(8)}"
        with team.agreed(), _store_errors(folder):
            if team.leads:
                folder.mkdir(parents=True, exist_ok=True)
                file.write_text(file.name)
        file = folder / team.told(file.name)[0]
        with team.agreed(), _store_errors(folder):
            seen = _seen(file)
        blind = team.told("" if seen else socket.gethostname())
        with team.agreed(), _store_errors(folder):
            if team.leads:
                file.unlink()
        found = [f"process {index} on {host}" for index, host in enumerate(blind) if host]
        if found:
            raise RunError(
                f"{folder}: what process 0 writes there is not seen by {', '.join(found[:8])}"
                f"{f' and {len(found) - 8} more' if len(found) > 8 else ''}: accepted as {key} is a folder that all hosts share"
            )


def _seen(file: epath.Path) -> bool:
    until = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def _store_errors(folder: epath.Path) -> Iterator[None]:
    """What a bucket refuses: the libraries that reach it have no common base of their errors."""
    try:
        yield
    except Exception as error:
        if "://" not in str(folder):
            raise
        reason = (str(error).splitlines() or [""])[0][:300]
        raise RunError(
            f"{folder} cannot be written: {type(error).__name__}: {reason}: accepted as checkpoint.folder is a bucket that "
            "this host reaches and may write to"
        ) from error
