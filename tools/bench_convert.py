"""Speed of conversions beside `cp` and `sync` of the same bytes, in turns.

    .venv/bin/python tools/bench_convert.py --layers 5 --repeats 3

Makes a Hugging Face folder of 30B-A3B's widths with the given layers (5: 7.5 GB) and random bytes, converts it with
`qwen3-jax convert` to the native form and back, and copies it with cp and sync, in turns. Every file is dropped from the page
cache before each, so that all read from the disk. A table of MB/s, and of each round's ratio to its own cp.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from qwen3_jax.checkpoint.hf import hf_order, write_hf
from qwen3_jax.checkpoint.names import slots
from qwen3_jax.checkpoint.weights import Block
from qwen3_jax.config import Qwen3Config


def random_folder(folder: Path, config: Qwen3Config) -> int:
    """Write a folder of random bfloat16 values; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    dtype, draw = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    ordered = hf_order(slots(config))

    def blocks() -> Iterator[Block]:
        for slot in ordered:
            yield Block(slot, 0, draw.integers(0, 0x3F80, slot.shape, np.uint16).view(dtype))

    write_hf(folder, ordered, {slot.name: dtype for slot in ordered}, blocks(), 5e9)
    return sum(slot.size * dtype.itemsize for slot in ordered)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def seconds(command: list[str]) -> float:
    """Of a process and the sync after it."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the folders; a temporary one by default")
    options = parser.parse_args()
    config = dataclasses.replace(Qwen3Config.preset(options.preset), num_hidden_layers=options.layers)
    convert = [sys.executable, "-m", "qwen3_jax.cli.main", "convert"]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        total = random_folder(place / "in", config)
        cases = {
            "cp + sync": ("in", "copy", ["cp", "-r"], []),
            "to orbax": ("in", "orbax", convert, ["--to", "orbax"]),
            "to hf": ("orbax", "hf", convert, ["--to", "hf"]),
            "to orbax --verify": ("in", "verified", convert, ["--to", "orbax", "--verify"]),
        }
        rounds: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for case, (source, target, first, last) in cases.items():
                forget(place / source)
                rounds[case].append(seconds([*first, str(place / source), str(place / target), *last]))
                if target != "orbax":
                    shutil.rmtree(place / target)
            shutil.rmtree(place / "orbax")
    table = Table(
        "", "MB/s, each round", "ratio to cp, median", title=f"{total / 1e9:.2f} GB, {options.preset}, {options.layers} layers"
    )
    for case, times in rounds.items():
        ratio = statistics.median(copy / mine for copy, mine in zip(rounds["cp + sync"], times, strict=True))
        table.add_row(case, ", ".join(f"{total / value / 1e6:.0f}" for value in times), f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
