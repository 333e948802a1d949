"""What `qwen3-jax train` makes of a fault: an exit code that tells bad input from a fault of the run, and one line."""

import asyncio
import errno
import logging
import os
import signal
from pathlib import Path

import orbax.checkpoint
import pytest

from qwen3_jax.cli import programs
from qwen3_jax.cli.main import main
from qwen3_jax.cli.train import _one_error
from qwen3_jax.data.files import DataError
from qwen3_jax.runs import train
from qwen3_jax.runs.export import ExportError
from qwen3_jax.runs.toml import RunError
from qwen3_jax.runs.train import Ended
from qwen3_jax.training.checkpoints import OtherRunError, TrainingCheckpointError
from qwen3_jax.training.loop import TrainingError

DEMO = Path(__file__).resolve().parents[2] / "configs/demo.toml"


@pytest.fixture(autouse=True)
def own_signals():
    """A command's process ends with it, and this one goes on."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def no_space():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/demo/metrics.jsonl")


@pytest.mark.parametrize(
    "steps, error, code, traced",
    [
        (0, RunError("mesh.processes is 2"), 2, False),
        (0, DataError("no such folder"), 2, False),
        (0, OtherRunError("checkpoint of another model"), 2, False),
        (0, TrainingCheckpointError("none can be read"), 1, False),
        (0, ExportError("no room for the export"), 1, False),
        (3, ExportError("no room for the export"), 1, False),
        (3, TrainingCheckpointError("no room for the checkpoint"), 1, False),
        (3, no_space(), 1, False),
        (3, DataError("a damaged file"), 1, False),
        (3, FileNotFoundError(errno.ENOENT, "No such file or directory", "text/part-0"), 1, False),
        (3, TrainingError("steps in a row were not finite"), 1, False),
        (3, ValueError("a fault of the code"), 1, True),
    ],
)
def test_an_exit_code_says_whose_fault_it_was(monkeypatch, capsys, steps, error, code, traced):
    """2 is a refusal at the door; 1 is what happens to a run, and the same command goes on."""

    def fails(*given):
        with train._no_refusals(lambda: steps):
            raise error

    monkeypatch.setattr(train, "train", fails)
    assert main(["train", str(DEMO), "--no-compilation-cache"]) == code
    said = capsys.readouterr().err
    assert ("Traceback" in said) == traced
    last = said.splitlines()[-1]
    assert last.startswith("qwen3-jax train: ") and (error.filename if isinstance(error, OSError) else str(error)) in last


def raised_in(module):
    """An error that went through a module's function."""
    names = {"__name__": module}
    exec(compile("def fail(): raise OSError('no room')", "/home/orbax/code.py", "exec"), names)
    try:
        names["fail"]()
    except OSError as error:
        return error


@pytest.mark.parametrize("at, kept", [("orbax.checkpoint._src.futures", False), ("orbax.checkpointing", True), ("mine", True)])
def test_only_orbax_s_own_tracebacks_are_left_out(caplog, at, kept):
    error = raised_in(at)
    assert error is not None
    file = Path(orbax.checkpoint.__file__).parent / "x.py" if not kept else Path(f"/home/orbax/checkpoint/{at}.py")
    trace = (type(error), error, error.__traceback__)
    with _one_error():
        for logger, name in ((logging.getLogger("absl"), str(file)), (logging.getLogger("asyncio"), asyncio.__file__)):
            logger.handle(logger.makeRecord(logger.name, logging.ERROR, name, 1, "told with a traceback", (), trace))
            logger.handle(logger.makeRecord(logger.name, logging.ERROR, name, 1, "told without", (), None))
    said = ["told with a traceback", "told without"] if kept else ["told without"]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        (name, line) for name in ("absl", "asyncio") for line in said
    ]


def test_steps_that_are_left_out_are_said(monkeypatch, capsys):
    """Of a float16 run its first twelve, whatever watch.every is; of one that leaves out every other step not all."""

    def figures(step, row, skipped, **more):
        small = dict(stage="all", loss=float("nan") if row else 2.0, grad_norm=float("inf") if row else 1.0, mfu=None)
        return small | dict(step=step, tokens_per_second=1.0, skipped=skipped, skipped_in_a_row=row) | more

    def overflows(run, told, said):
        for step in range(12):
            told(step, figures(step, step + 1, step + 1, loss_scale=2.0 ** (30 - step - 1)))
        told(12, figures(12, 0, 12, loss_scale=2.0**18))
        return Ended(13, True, {})

    def every_other(run, told, said):
        for step in range(2000):
            told(step, figures(step, step % 2, (step + 1) // 2))
        return Ended(2000, True, {})

    words = ["train", str(DEMO), "--no-compilation-cache", "--watch.every", "100000"]
    monkeypatch.setattr(train, "train", overflows)
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step 0 was left out: loss nan, gradient inf, 1 in all; loss scale 1.07374e+09 -> 5.36871e+08",
        "steps 0 to 11 were left out, 12 in a row, 12 in all; loss scale 1.07374e+09 -> 262,144",
    ]
    monkeypatch.setattr(train, "train", every_other)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1 was left out: loss nan, gradient inf, 1 in all"
    assert lines[-1] == "step 1,023 was left out: loss nan, gradient inf, 512 in all"
    assert len(lines) == 16 + 5


@pytest.mark.parametrize("ended", [Ended(1, True, {}), Ended(1, False, {})])
def test_a_sigterm_after_the_run_does_not_end_its_process(monkeypatch, ended):
    """A second one, or one that comes late: all is written, and the exit code must not be that of a kill."""
    heard = []
    signal.signal(signal.SIGTERM, lambda *given: heard.append(given))
    monkeypatch.setattr(train, "train", lambda *given: ended)
    assert main(["train", str(DEMO), "--no-compilation-cache"]) == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert not heard and callable(signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("words, kept", [([], True), (["--no-compilation-cache"], False)])
def test_programs_are_kept_unless_the_user_says_no(monkeypatch, words, kept):
    told = []
    monkeypatch.setattr(programs, "keep_programs", told.append)
    monkeypatch.setattr(train, "train", lambda *given: Ended(1, True, {}))
    assert main(["train", str(DEMO), *words]) == 0
    assert told == [kept]
