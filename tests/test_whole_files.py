"""Files of a run on a disk that is full: here a largest size of files, past which the system refuses what is written."""

import subprocess
import sys

from qwen3_jax.training.journal import read_lines

PROGRAM = """
import resource, sys
from pathlib import Path
from qwen3_jax.whole_files import write_whole
from qwen3_jax.training.journal import Journal

place = Path(sys.argv[1])
write_whole(place / "page", "old")
journal = Journal(place / "metrics.jsonl", 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

def lines():
    for step in range(9):
        journal.write({"step": step, "words": "y" * 300})

for write in (lambda: write_whole(place / "page", "x" * 2000), lines):
    try:
        write()
    except OSError as error:
        print(error.filename, error.strerror)
journal.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again = Journal(place / "metrics.jsonl", 3)
again.write({"step": 3})
again.close()
"""


def test_what_does_not_fit_leaves_the_file_as_it_was_and_is_told_with_its_name(tmp_path):
    out = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [f"{tmp_path}/page.part File too large", f"{tmp_path}/metrics.jsonl File too large"]
    assert (tmp_path / "page").read_text() == "old" and not (tmp_path / "page.part").exists()
    # The line that was cut off is gone, and the next one is whole.
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
