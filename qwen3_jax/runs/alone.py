"""One start of a run at a time: the folder's lock, which the kernel lets go of, whatever the process that holds it dies of."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from qwen3_jax.runs.toml import RunError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE = 3.0  # seconds: a process that was killed a moment ago may still be giving its memory back


@contextlib.contextmanager
def alone(folder: Path, begun: float) -> Iterator[None]:
    """Hold a run's folder for one start; process 0 of it does. Where the file system has no locks, a warning says so.

    Args:
        folder: of the run; made if it is not there.
        begun: when the start began, in seconds since 1970; with pid and host it is what another start is told.

    Raises:
        RunError: another start is under way there: since when, and where.
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        _take(folder, file.fileno())
        # Read by whoever comes too late.
        file.truncate(0)
        file.write(json.dumps(dict(begun=begun, pid=os.getpid(), host=socket.gethostname())))
        file.flush()
        yield


def _take(folder: Path, handle: int) -> None:
    if fcntl is None:
        return
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise RunError(
                    f"{folder}: a start is under way{_who(folder / LOCK)}: accepted is one at a time, or another name or output"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            logger.warning("%s: the file system has no locks, so nothing hinders a second start there: %s", folder, error)
            return


def _who(file: Path) -> str:
    try:
        found = json.loads(file.read_text("utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found["begun"]))
        return f" since {since} UTC, pid {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError):  # it has not said so yet
        return ""
