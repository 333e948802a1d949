"""kill -9: before every call that changes the disk's names, and ever nearer to the moment where folders change places."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.cli.main import main
from tests.checkpoint.folders import hub_tensors, write
from tests.model.models import CONFIGS

# Writes a folder again and again, in a fork that kills itself before its n-th call; prints what is there after each.
EVERY_CALL = """
import json, os, shutil, signal, sys
from pathlib import Path
from qwen3_jax.checkpoint import folder

place, how = Path(sys.argv[1]), sys.argv[2]
if how == "renames":
    folder._exchange = lambda first, second: False
if how == "broken":
    def swap(part, place):
        shutil.rmtree(place)
        os.rename(part, place)
    folder._swap = swap
calls = 0

def count(module, name, last):
    real = getattr(module, name)
    def counted(*args, **kwargs):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, counted)

def put(number):
    with folder.whole_folder(place, True) as part:
        for name in "abc":
            (part / name).write_text(str(number))

def held():
    return {file.name: file.read_text() for file in place.iterdir()} if place.is_dir() else None

status, number = 1, 0
while status:
    number += 1
    put(-number)
    before = held()
    pid = os.fork()
    if not pid:
        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            count(os, name, number)
        count(folder, "_exchange", number)
        put(number)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    after = held()
    try:
        with folder.whole_folder(place, True):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    print(json.dumps([number, before, after, held(), sorted(os.listdir(place.parent))]))
"""


@pytest.mark.parametrize("how", ["exchange", "renames", "broken"])
def test_a_kill_before_any_call_leaves_the_old_or_the_new(tmp_path, how):
    command = [sys.executable, "-c", EVERY_CALL, str(tmp_path / "out"), how]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) > 10
    seen = []
    for number, before, after, recovered, names in map(json.loads, lines):
        new = dict.fromkeys("abc", str(number))
        if how == "exchange":
            assert after in (before, new), number
        seen.append("old" if recovered == before else "new" if recovered == new else "neither")
        seen.append("gone" if after is None else "there")
        assert names == ([] if recovered is None else ["out"])
    # A swap that is none is found out: with nothing there, or with half.
    assert ("neither" in seen) == (how == "broken")
    assert {"old", "new"} <= set(seen)
    assert ("gone" in seen) == (how != "exchange")  # for a moment, where folders cannot be exchanged


CONVERT = (
    "import sys; from qwen3_jax.cli.main import main; import qwen3_jax.checkpoint.convert; print('go', flush=True); "
    "code = main(sys.argv[1:]); print('done', flush=True); sys.stdin.read(); sys.exit(code)"
)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_kill_9_at_any_moment_leaves_the_old_or_the_new(tmp_path, to):
    """Conversions of two models onto one folder, in turns; each kill is nearer to the moment where the old becomes the new."""
    config = CONFIGS["moe"]
    for seed in (0, 1):
        write(tmp_path / f"in{seed}", config, hub_tensors(config, seed=seed))
    models = [open_values(tmp_path / f"in{seed}") for seed in (0, 1)]
    assert main(["convert", str(tmp_path / "in0"), str(tmp_path / "out"), "--to", to]) == 0
    now, early, late, outcomes = 0, 0.0, 0.0, []
    for turn in range(10):
        words = ["convert", str(tmp_path / f"in{1 - now}"), str(tmp_path / "out"), "--to", to, "--overwrite"]
        child = subprocess.Popen(
            [sys.executable, "-c", CONVERT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "go\n"
        start = time.perf_counter()
        if turn == 0:
            while child.stdout.readline() != "done\n":
                assert child.poll() is None
            late = time.perf_counter() - start
        else:
            time.sleep((early + late) / 2 if turn > 1 else 0)
        child.send_signal(signal.SIGKILL)
        child.stdin.close()
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
        found = open_values(tmp_path / "out")
        assert found in models
        outcomes.append(models.index(found) != now)
        now = models.index(found)
        if turn > 1:
            early, late = (early, (early + late) / 2) if outcomes[-1] else ((early + late) / 2, late)
    # Killed after the last word, and before the new was there: at the second turn, but where this process was kept waiting.
    assert outcomes[0] and not all(outcomes)
    assert main(["convert", str(tmp_path / "in0"), str(tmp_path / "out"), "--to", to, "--overwrite"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["in0", "in1", "out"]  # what the killed left is gone


def open_values(folder) -> dict[str, bytes]:
    found = open_weights(folder)
    return {slot.name: found.read_rows(slot, 0, slot.shape[0]).tobytes() for slot in found.slots()}
