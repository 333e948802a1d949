"""The trained model as a Hugging Face folder: of the steps in between, and of the last one."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwen3_jax.chat.tokenizer import Tokenizer
from qwen3_jax.checkpoint.pretrained import save_pretrained
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.weights import write_json
from qwen3_jax.config import Qwen3Config
from qwen3_jax.parallel.rules import Rules
from qwen3_jax.runs.look import find_tokenizer, stage_at, stop_tokens
from qwen3_jax.runs.parts import lora_config, stage_config
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.toml import RunError
from qwen3_jax.training.loop import TrainingError
from qwen3_jax.training.state import trained_model
from qwen3_jax.tune.lora import merge
from qwen3_jax.tune.peft import save_adapter

STEP, REMOVED = re.compile(r"step-(\d+)"), re.compile(r"\.step-\d+\.removed")


class ExportError(TrainingError):
    """An export that cannot be written in a run: where, and why. The run ends, and the same command goes on."""


def check_export(run: Run, first: int) -> None:
    """Refuse, before the first step, a folder that holds something: nothing is written over.

    Args:
        run: the run.
        first: the step that it begins with; after the last one the folder may stand already.

    Raises:
        RunError: checkpoint.export is a file, or a folder that is not empty.
    """
    if run.checkpoint.export is not None and first < run.steps and stands(run.checkpoint.export):
        raise RunError(f"checkpoint.export {run.checkpoint.export} holds something: accepted is a path where nothing stands")


def stands(folder: str | Path) -> bool:
    """Whether there is something at the path, be it a file or a folder that is not empty."""
    path = Path(folder)
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _stands_for_all(folder: str | Path) -> bool:
    """`stands` as process 0 finds it: others may still see a shared folder as it was, and an export waits for all of them."""
    here = stands(folder)
    return here if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(here)))


class Exports:
    """The exports of a run. Every process of the mesh makes the same calls."""

    def __init__(self, run: Run, config: Qwen3Config, first: int, rules: Rules, said: Callable[[str], None]):
        """Take a run's wishes; nothing is written yet.

        Args:
            run: the run.
            config: the model's, before any stage.
            first: the step that this start begins with.
            rules: which mesh axes split what.
            said: is given a line for each export.
        """
        self._run, self._config, self._first, self._rules, self._said = run, config, first, rules, said
        self._written = first
        # Before the first step: sources in a store that does not answer for a moment must not end the run at an export.
        wanted = run.checkpoint.export is not None or run.checkpoint.export_every is not None
        self._words = find_words(run, config) if wanted else None
        self.folder = Path(run.output) / run.name / "exports"

    def __call__(self, step: int, state: Any) -> None:
        """Write exports/step-N, in the place of one that stands there: after a restart a step may come again.

        Args:
            step: steps that have been made.
            state: the TrainState after them.

        Raises:
            ExportError: the folder cannot be written.
        """
        target = self.folder / f"step-{step}"
        self._write(step, state, target, overwrite=True)
        self._written = step
        keep = self._run.checkpoint.export_keep
        if keep is not None and jax.process_index() == 0:
            try:
                keep_newest(self.folder, step, keep)
            except OSError as error:  # the next export tries again
                self._said(f"an older export cannot be removed: {error.filename or self.folder}: {error.strerror}")

    def last(self, state: Any) -> None:
        """Write what a run that is done has not yet: exports/step-N of its last step, and checkpoint.export.

        Args:
            state: the last TrainState.

        Raises:
            ExportError: a folder cannot be written.
        """
        section, steps = self._run.checkpoint, self._run.steps
        if section.export_every is not None:
            # One that stands is of this run where no step was made since; else it may be of another curve.
            lacks = self._written < steps if self._first < steps else not _stands_for_all(self.folder / f"step-{steps}")
            if lacks:
                self(steps, state)
        # It stands where a run that is done is started again.
        if section.export is not None and not _stands_for_all(section.export):
            self._write(steps, state, section.export)

    def _write(self, step: int, state: Any, folder: str | Path, *, overwrite: bool = False) -> None:
        try:
            export(self._run, self._config, step, state, self._rules, self._words, folder, overwrite=overwrite)
        except (CheckpointError, OSError) as error:
            raise ExportError(f"{folder}: the export of step {step} cannot be written: {error}") from error
        self._said(f"exported to {folder}")


def keep_newest(folder: Path, step: int, keep: int) -> None:
    """Remove all exports up to a step but the newest; later ones are of a start that got further, and their steps come again.

    Args:
        folder: that holds step-N.
        step: the newest that counts.
        keep: how many of it and its forerunners stay.
    """
    found = {int(match[1]): path for path in folder.iterdir() if (match := STEP.fullmatch(path.name))}
    for old in sorted(number for number in found if number <= step)[:-keep]:
        # First out of sight: a kill amid many files would leave a folder that looks whole.
        os.rename(found[old], folder / f".step-{old}.removed")
    for path in folder.iterdir():
        if REMOVED.fullmatch(path.name):
            shutil.rmtree(path)


@dataclasses.dataclass(frozen=True)
class Words:
    """A run's tokenizer, whose generation_config.json, if it has one, says where this run has taught the model to stop.

    Attributes:
        tokenizer: the run's.
        stop: the tokens that end what the model writes.
    """

    tokenizer: Tokenizer
    stop: tuple[int, ...]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files.

        Args:
            folder: where.
        """
        self.tokenizer.save(folder)
        given = self.tokenizer.generation_config
        if given and self.stop:
            eos = list(self.stop) if len(self.stop) > 1 else self.stop[0]
            write_json(folder / "generation_config.json", given | {"eos_token_id": eos})


def find_words(run: Run, config: Qwen3Config) -> Words | None:
    """The tokenizer of a run and where its model stops, for `export`; None without one.

    Args:
        run: the run, whose sources are opened.
        config: the model's.

    Returns:
        Both.
    """
    found = find_tokenizer(run)
    return None if found is None else Words(found, stop_tokens(run, config, found))


def export(
    run: Run,
    config: Qwen3Config,
    step: int,
    state: Any,
    rules: Rules,
    words: Words | None,
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write the model that a run has made so far. Every process of the mesh makes the same call; the state stays as it is.

    Args:
        run: the run; adapters are merged into the weights, or written alone, by checkpoint.export_form.
        config: the model's, before any stage; the base of positions is that of the step's stage.
        step: steps that have been made.
        state: the TrainState after them.
        rules: which mesh axes split what.
        words: of the run.
        folder: where.
        overwrite: replace what stands there, once the new folder is whole.

    Raises:
        CheckpointError: the folder cannot be written, or holds something.
    """
    dtype, adapt = jnp.dtype(run.model.compute_dtype), lora_config(run)
    config = stage_config(config, stage_at(run, step - 1))
    if words is not None and words.stop:
        config = dataclasses.replace(config, eos_token_id=words.stop if len(words.stop) > 1 else words.stop[0])
    model = trained_model(config, state, dtype=dtype, rules=rules, adapt=adapt)
    if run.checkpoint.export_form == "adapter":
        save_adapter(model, folder, base=run.model.folder, overwrite=overwrite)
        return
    save_pretrained(model if adapt is None else merge(model), folder, tokenizer=words, overwrite=overwrite)
