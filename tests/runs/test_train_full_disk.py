"""A run whose disk is full: one error, an exit code that says so, and with room it goes on."""

import os
import re
import shutil
import subprocess

import numpy as np

from qwen3_jax.training.journal import read_lines
from tests.runs.launch import PATIENCE, arrays_of, as_at_step_9, command_of, curve, environ_of

BOARD = ["--watch.tensorboard", "true"]

# A file system of its own where this user may mount one: it is full but for what lines of the journal take. Elsewhere files
# have a largest size, which checkpoints are above.
FULL = """
if unshare -Urm true 2>/dev/null; then exec unshare -Urm sh -c '
    mount -t tmpfs -o size=16m none "$1" && cp -r "$2"/. "$1" && { head -c 16m /dev/zero > "$1/ballast" || true; }
    truncate -s -64k "$1/ballast"; shift 2; "$@"; echo "code $?"
    rm runs/ballast && "$@" && cp -r runs kept' sh "$@"
fi
cp -r "$2"/. "$1"; shift 2; (ulimit -f 64; "$@"); echo "code $?"
"$@" && cp -r runs kept
"""


def test_a_full_disk_ends_the_run_with_one_error_and_with_room_it_goes_on(straight, watched, prepared, place):
    (place / "was").mkdir()
    as_at_step_9(watched, place).rename(place / "was/runs")
    (place / "runs").mkdir()
    command = ["sh", "-c", FULL, "sh", str(place / "runs"), str(place / "was/runs"), *command_of(place), *BOARD]
    out = subprocess.run(command, cwd=place, env=environ_of(prepared), capture_output=True, text=True, timeout=PATIENCE)
    lines = (out.stdout + out.stderr).splitlines()
    assert "code 1" in lines and "Traceback" not in out.stderr, lines
    (error,) = [line for line in lines if line.startswith("qwen3-jax train: ")]
    assert re.search(
        r"runs/tiny/checkpoints: checkpoint 12 cannot be written: .*(No space left|File too large).*whole ones there: 9$", error
    ), error
    assert "goes on at step 9" in out.stdout and out.returncode == 0, lines
    assert curve(place, "kept") == straight[0]
    for name, array in arrays_of(place, runs="kept").items():
        np.testing.assert_array_equal(array, straight[1][name], err_msg=name)


# "$1" is full to its last byte where this user may mount something; elsewhere no file grows beyond 1 KiB.
FULL_FOLDER = """
if unshare -Urm true 2>/dev/null; then exec unshare -Urm sh -c '
    mount -t tmpfs -o size=64k none "$1" && { head -c 64k /dev/zero > "$1/ballast" || true; }; shift; exec "$@"' sh "$@"
fi
shift; ulimit -f 0; exec "$@"
"""


def test_an_export_that_finds_no_room_ends_the_run_as_a_save_does_and_a_board_does_not(watched, prepared, place):
    """A run that is done lacks both; its boards and its export, and what it prints, go to disks that are full."""
    full, folder = place / "full", place / "runs/tiny"
    full.mkdir()
    shutil.copytree(watched / "runs/tiny/checkpoints/14", folder / "checkpoints/14")
    shutil.copy(watched / "runs/tiny/metrics.jsonl", folder)
    (folder / "tensorboard").symlink_to(full)
    command = ["sh", "-c", FULL_FOLDER, "sh", str(full), *command_of(place), *BOARD, "--checkpoint.export", str(full / "out")]
    with open("/dev/full", "w") as nowhere:
        options = dict(stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
        out = subprocess.run(command, cwd=place, env=environ_of(prepared), **options)
    assert out.returncode == 1 and "Traceback" not in out.stderr, out.stderr
    assert out.stderr.count("the standard output takes no more lines, and the run goes on without: [Errno 28]") == 1
    board, error = [line for line in out.stderr.splitlines() if str(full) in line or "tensorboard" in line]
    assert re.search(
        r"watch.tensorboard: .*tensorboard/events.* cannot be written: No space left on device: the run goes on", board
    )
    said = rf"^qwen3-jax train: {full}/out: the export of step 14 cannot be written: .*(free|No space left on device)$"
    assert re.search(said, error), error
    (start,) = read_lines(folder / "starts.jsonl")
    assert start["came_to"] == "failed" and [lost in board for lost in start["lost"]] == [True]
    assert "start 1 went on without a board: watch.tensorboard" in (folder / "report.html").read_text("utf-8")
    assert os.listdir(full) == []  # as it is outside
