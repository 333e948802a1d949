"""A run that is told to end where no step is being made, and one that is started twice."""

import os
import signal
import subprocess
import sys

import pytest

from qwen3_jax.runs import alone as alone_module
from qwen3_jax.runs.alone import LOCK, alone
from qwen3_jax.runs.toml import RunError
from qwen3_jax.training.journal import read_lines
from tests.runs.launch import PATIENCE, ROOT, as_at_step_9, begin, environ_of, finish

# The run tells itself, at the very beginning of one of its parts.
TOLD = """
import os, signal, sys
from qwen3_jax.runs import export, train

module, name = {"weights": (train, "_begin"), "export": (export, "save_pretrained")}[sys.argv[1]]
real = getattr(module, name)

def tells(*given, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*given, **options)

setattr(module, name, tells)
from qwen3_jax.cli.main import main

sys.exit(main(["train", *sys.argv[2:]]))
"""


def told_in(prepared, place, part, *words):
    """The lines of a run that ends well."""
    command = [sys.executable, "-c", TOLD, part, str(place / "run.toml"), *words]
    done = subprocess.run(command, cwd=ROOT, env=environ_of(prepared), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_told_while_weights_are_read_it_makes_no_step(watched, prepared, place):
    as_at_step_9(watched, place)
    said = told_in(prepared, place, "weights")
    assert "told to end before this start's first step, with nothing to save, at step 9 of 14" in said
    assert not any(line.startswith("step ") for line in said)
    assert [path.name for path in (place / "runs/tiny/checkpoints").iterdir()] == ["9"]
    (only,) = read_lines(place / "runs/tiny/starts.jsonl")
    assert (only["came_to"], only["step"]) == ("told to end", 9)


def test_told_while_the_last_export_is_written_it_is_written(watched, prepared, place):
    (place / "runs/tiny/checkpoints").mkdir(parents=True)
    (place / "runs/tiny/checkpoints/14").symlink_to(watched / "runs/tiny/checkpoints/14")
    said = told_in(prepared, place, "export", "--checkpoint.export", str(place / "exported"))
    assert "done at step 14 of 14" in said
    written = {file.name: file.read_bytes() for file in (place / "exported").iterdir()}
    assert written == {file.name: file.read_bytes() for file in (watched / "exported").iterdir()}


def test_a_second_start_is_refused_and_harms_nothing(watched, prepared, place):
    """The first one is in the midst of a save, in a folder that a start after a kill would remove."""
    as_at_step_9(watched, place)
    saving = place / "runs/tiny/checkpoints/12.orbax-checkpoint-tmp"
    saving.mkdir()
    before = (place / "runs/tiny/metrics.jsonl").read_bytes()
    with alone(place / "runs/tiny", 86400.0):
        code, out = finish(begin(prepared, place))
    assert code == 2, out
    assert f"a start is under way since 1970-01-02 00:00:00 UTC, pid {os.getpid()} on " in out.splitlines()[-1]
    assert saving.exists() and (place / "runs/tiny/metrics.jsonl").read_bytes() == before


def test_a_killed_start_holds_nothing(tmp_path, monkeypatch):
    holds = (
        "import sys, time; from pathlib import Path; from qwen3_jax.runs.alone import alone\n"
        "with alone(Path(sys.argv[1]), 0.0): print('held', flush=True); time.sleep(60)"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", holds, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with monkeypatch.context() as patch:
        patch.setattr(alone_module, "PATIENCE", 0.0)
        with pytest.raises(
            RunError, match=rf"since 1970-01-01 00:00:00 UTC, pid {process.pid} on .*: accepted is one at a time"
        ):
            with alone(tmp_path, 1.0):
                pass
        # One that has not said yet who it is.
        (tmp_path / LOCK).write_text("")
        with pytest.raises(RunError, match="a start is under way: accepted"), alone(tmp_path, 1.0):
            pass
    process.send_signal(signal.SIGKILL)  # not waited for: what it holds is let go of as it dies
    with alone(tmp_path, 1.0):
        pass
    process.wait()
    process.stdout.close()
