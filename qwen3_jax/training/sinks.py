"""Where a run's lines go beside metrics.jsonl: TensorBoard's event files, and Weights & Biases. Both are extras.

Neither may end a run or hold it up: each is written to by a thread of its own, and is left alone from its first fault on.
"""

import importlib
import logging
import queue
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qwen3_jax.checks import ConfigError
from qwen3_jax.whole_files import named, write_all, write_whole

logger = logging.getLogger(__name__)

MOST_WAITING = 1000  # lines that a board may be behind
PATIENCE = 60.0  # seconds that the end of a run waits for a board


class SinkError(ConfigError):
    """A sink whose extra is not installed."""


def check_extras(*, tensorboard: bool, wandb: bool) -> None:
    """Refuse a run whose sinks are not installed, on every process and before anything is started.

    Args:
        tensorboard: whether event files are wanted.
        wandb: whether W&B is.

    Raises:
        SinkError: the library is not there, with the extra that brings it.
    """
    wanted = dict(tensorboard=("tensorboardX", tensorboard), wandb=("wandb", wandb))
    for extra, (module, needed) in wanted.items():
        if needed:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise SinkError(f"watch.{extra} needs {module}: `pip install qwen3-jax[{extra}]`") from error


@runtime_checkable
class Sink(Protocol):
    """Takes the lines of a journal."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Take a line.

        Args:
            line: JSON, as the journal has it: a `step`, numbers, lists by layer, words.
        """

    def close(self) -> None:
        """Write what is left."""


class Board:
    """A sink on a thread of its own, which can neither end a run nor hold it up.

    What it raises, and that it is too far behind, is told once, as a warning; from then on it is given no lines.
    """

    def __init__(self, name: str, make: Callable[[], Sink]):
        """Open the sink here, and start its thread.

        Args:
            name: of the board, for messages.
            make: opens the sink; what it raises counts as a fault of the board.
        """
        self.lost: str | None = None
        self._name = name
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None
        try:
            sink = make()
        except Exception as error:  # whatever a library of others raises
            self._lose(error)
            return
        # A daemon: one that hangs must not hold up the end of the process.
        self._thread = threading.Thread(target=self._write_on, args=(sink,), name=f"board {name}", daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Hand over a line, at once.

        Args:
            line: as of Sink; it must not change any more.
        """
        if self.lost is None:
            self._put(line)

    def close(self) -> None:
        """Let the board write what is left, for at most PATIENCE seconds."""
        if self._thread is None:
            return
        self._put(None)
        self._thread.join(PATIENCE if self.lost is None else 1.0)
        if self._thread.is_alive():
            self._lose(f"it has not ended {PATIENCE:.0f} s after the run")

    def _put(self, line: Mapping[str, Any] | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lose(f"it is {MOST_WAITING} lines behind")

    def _write_on(self, sink: Sink) -> None:
        try:
            while (line := self._lines.get()) is not None and self.lost is None:
                sink.write(line)
        except Exception as error:
            self._lose(error)
        try:
            sink.close()  # one that has failed, too
        except Exception as error:
            self._lose(error)

    def _lose(self, reason: Exception | str) -> None:
        """Give the board up, and say so the first time."""
        with self._one_at_a_time:
            if self.lost is not None:
                return
            if isinstance(reason, OSError) and reason.filename is not None:
                reason = f"{reason.filename} cannot be written: {reason.strerror}"
            elif isinstance(reason, Exception):
                reason = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"
            self.lost = f"{self._name}: {reason}"
        logger.warning("%s: the run goes on without this board, and metrics.jsonl has every line", self.lost)


class TensorBoard:
    """Event files: a scalar for each number, one a layer for lists by layer, a histogram a layer for loads of experts.

    tensorboardX makes the messages; its own writer is not used, for it writes in a thread that a full disk ends, behind a
    queue that then blocks whoever writes, or the end of the process.
    """

    def __init__(self, folder: Path, first: int):
        """Open a new event file.

        Args:
            folder: of the event files.
            first: the next step; TensorBoard takes what older files say of it and of later ones to be undone.

        Raises:
            OSError: no room, no rights.
        """
        self._summary: Any = importlib.import_module("tensorboardX.summary")
        self._protos: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._checksum: Any = importlib.import_module("tensorboardX.record_writer").masked_crc32c
        above = 1e-12 * 1.1 ** np.arange(774)  # TensorBoard's own bins, up to 1e20
        self._bins = [*(-above[::-1]).tolist(), 0.0, *above.tolist()]
        folder.mkdir(parents=True, exist_ok=True)
        # A file's name has but the second of its start.
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.from_{first}"
        # Unbuffered: a kill loses nothing that was written, and what a full disk has refused is not tried again.
        self._file = self._path.open("ab", buffering=0)
        events: list[dict[str, Any]] = [dict(file_version="brain.Event:2")]
        if first:
            events.append(dict(step=first, session_log=self._protos.SessionLog(status=self._protos.SessionLog.START)))
        self._write(events)

    def write(self, line: Mapping[str, Any]) -> None:
        """Take a line.

        Args:
            line: as of Sink.

        Raises:
            OSError: no room, no rights, with the file; a part of the line may be there, which readers stop at.
        """
        events = []
        for name, value in named_figures(line).items():
            if isinstance(value, list):
                summary = self._summary.histogram(name, np.asarray(value, np.float32), self._bins)
            elif isinstance(value, str):
                summary = self._summary.text(name, value)
            else:
                summary = self._summary.scalar(name, value)
            events.append(dict(step=line["step"], summary=summary))
        self._write(events)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, events: list[dict[str, Any]]) -> None:
        """Append events in the form of TFRecord: length, its checksum, message, its checksum."""
        found, now = b"", time.time()
        for event in events:
            message = self._protos.Event(wall_time=now, **event).SerializeToString()
            length = struct.pack("<Q", len(message))
            found += length + struct.pack("<I", self._checksum(length))
            found += message + struct.pack("<I", self._checksum(message))
        with named(self._path):
            write_all(self._file, found)


class Wandb:
    """A run on Weights & Biases, which a restart goes on with; its x axis is `step`, for steps may come again."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]):
        """Open the run.

        Args:
            folder: of the run's id, and of wandb's own files: named wandb, for so it names the folder that it makes.
            project: of W&B.
            name: of the run.
            config: JSON that the run is shown with.
        """
        wandb = importlib.import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "wandb_id"
        if not kept.exists():
            write_whole(kept, uuid.uuid4().hex[:12] + "\n")
        self._wandb = wandb
        id_ = kept.read_text(encoding="utf-8").strip()
        self._run: Any = wandb.init(
            project=project, name=name, id=id_, resume="allow", dir=str(folder.parent), config=dict(config)
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, Any]) -> None:
        """Take a line.

        Args:
            line: as of Sink.
        """
        figures = {
            name: self._wandb.Histogram(value) if isinstance(value, list) else value
            for name, value in named_figures(line).items()
        }
        self._run.log({"step": line["step"], **figures})

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def named_figures(line: Mapping[str, Any]) -> dict[str, float | str | list[float]]:
    """A line as the figures of a board.

    Args:
        line: as of Sink.

    Returns:
        Name -> a number, words, or a list of numbers to be shown as a histogram; `max_violation/3` is that of the fourth MoE
        layer. Numbers that are not finite are left out, for boards have no place for them: `skipped` tells of them.
    """
    found: dict[str, float | str | list[float]] = {}
    for name, value in line.items():
        if name in ("step", "time", "stage") or value is None or value in ("nan", "inf", "-inf"):
            continue
        if isinstance(value, Mapping):
            value = [f"**{prompt}** {text}" for prompt, text in value.items()]
        if isinstance(value, list):
            found |= {f"{name}/{at}": item for at, item in enumerate(value) if item not in ("nan", "inf", "-inf")}
        else:
            found[name] = value
    return found
