"""Where a run's lines go beside metrics.jsonl: TensorBoard's event files, and Weights & Biases. Both are extras."""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qwen3_jax.checks import ConfigError
from qwen3_jax.training.files import write_whole


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


class TensorBoard:
    """Event files: a scalar for each number, one a layer for lists by layer, a histogram a layer for loads of experts."""

    def __init__(self, folder: Path, first: int):
        """Open a new event file.

        Args:
            folder: of the event files.
            first: the next step; TensorBoard takes what older files say of it and of later ones to be undone.
        """
        board = importlib.import_module("tensorboardX")
        # A file's name has but the second of its start; a kill loses what has not been flushed.
        options = dict(purge_step=first or None, filename_suffix=f".from_{first}", flush_secs=5)
        self._writer = board.SummaryWriter(str(folder), **options)

    def write(self, line: Mapping[str, Any]) -> None:
        """Take a line.

        Args:
            line: as of Sink.
        """
        step = line["step"]
        for name, value in named_figures(line).items():
            if isinstance(value, list):
                self._writer.add_histogram(name, np.asarray(value, np.float32), step)
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


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
