"""A run that is killed, or told to end, and started again: no trace of it in the curve or the weights."""

import signal

import numpy as np

from qwen3_jax.training.journal import read_lines
from tests.runs.launch import arrays_of, begin, curve, finish
from tools.compare_runs import saves
from tools.start_runs import start


def test_kills_leave_no_trace_in_curve_or_weights(straight, prepared, place):
    """Inside a save, between write and rename, and in the second stage while data is read ahead."""
    (place / "runs").mkdir()
    newest, steps = 0, []
    for at, step in (("save.writing", 2), ("finalise.merged", 8), ("prefetch.read", 11)):
        found = start(place / "runs", prepared / "cache", [], at, step)
        assert found.code == -signal.SIGKILL and found.of("at")[0]["place"] == at
        assert found.orphans == []
        assert [told["step"] for told in found.of("resumed")] == ([newest] if newest else [])
        newest = saves(place / "runs/tiny")[0]
        steps.append(found.of("at")[0]["step"])
    entry = min((prepared / "cache").glob("*-cache"), key=lambda path: path.stat().st_size)
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])  # as by a kill while it was written
    code, out = finish(begin(prepared, place))
    assert code == 0, out
    assert f"{entry} was cut off" in out
    assert f"goes on at step {newest}" in out and newest >= 6
    assert curve(place) == straight[0]
    starts = list(read_lines(place / "runs/tiny/starts.jsonl"))
    assert [line["came_to"] for line in starts] == ["killed"] * 3 + ["done"]
    for line, step in zip(starts, steps, strict=False):
        assert line["step"] >= step - 1, starts  # lines of the last two steps need not have been written
    assert "killed at step" in (place / "runs/tiny/report.html").read_text("utf-8")
    found = arrays_of(place)
    assert found.keys() == straight[1].keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, straight[1][name], err_msg=name)


def test_a_sigterm_saves_and_ends_well(straight, prepared, place):
    words = ["--checkpoint.folder", str(place / "kept")]
    code, out = finish(begin(prepared, place, *words, told=(4, signal.SIGTERM)))
    assert code == 0, out
    assert "told to end: saved at step 5 of 14" in out  # the step that was under way is the last one
    code, out = finish(begin(prepared, place, *words))
    assert code == 0 and f"goes on at step 5, from {place / 'kept/tiny'}" in out
    assert curve(place) == straight[0]
    assert not (place / "runs/tiny/checkpoints").exists()
