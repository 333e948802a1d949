"""Peak anonymous memory of converting 235B-A22B's shapes, at two depths, both ways: it must not grow with depth.

    .venv/bin/python tools/show_convert_memory.py

Makes a sparse Hugging Face folder (its holes read as zeros, take no disk) of the given layers in a temporary folder, converts
it with `qwen3-jax convert` in a process of its own, whose RssAnon is sampled every few milliseconds, and prints a table.
RssAnon leaves out pages of mapped files, which the system takes back at will.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from qwen3_jax.checkpoint.names import slots
from qwen3_jax.checkpoint.safetensors import header_bytes
from qwen3_jax.config import Qwen3Config


def sparse_folder(folder: Path, config: Qwen3Config) -> tuple[int, int]:
    """Write a folder of zeros that takes no disk.

    Returns:
        Bytes of all tensors, and of the largest.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = {slot.name: (dtype, slot.shape) for slot in slots(config)}
    text = header_bytes(tensors)
    sizes = [slot.size * dtype.itemsize for slot in slots(config)]
    with open(folder / "model.safetensors", "wb") as handle:
        handle.write(text)
        handle.truncate(len(text) + sum(sizes))
    return sum(sizes), max(sizes)


def _hollow(folder: Path) -> None:
    """Turn a native checkpoint's chunks, zeros all, into holes: the disk need not hold both forms."""
    for file in folder.glob("*/c/**/*"):
        if file.is_file():
            size = file.stat().st_size
            os.truncate(file, 0)
            os.truncate(file, size)


def peak_anonymous(command: list[str]) -> tuple[int, float]:
    """Bytes of RssAnon at most, and seconds, of a process."""
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except FileNotFoundError:
            break
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.004)
    if child.wait():
        raise SystemExit(f"{' '.join(command)} exited {child.returncode}")
    return peak, time.perf_counter() - start


def main() -> None:
    """Convert and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3-235b-a22b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--folder", type=Path, help="where to make the folders; a temporary one by default")
    options = parser.parse_args()
    table = Table("layers", "to", "tensors", "largest", "peak RssAnon", "/ largest", "seconds", title=options.preset)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        for layers in options.layers:
            config = dataclasses.replace(Qwen3Config.preset(options.preset), num_hidden_layers=layers)
            total, largest = sparse_folder(place / "in", config)
            for source, to in (("in", "orbax"), ("orbax", "hf")):
                command = [
                    sys.executable,
                    "-m",
                    "qwen3_jax.cli.main",
                    "convert",
                    str(place / source),
                    str(place / to),
                    "--to",
                    to,
                ]
                peak, seconds = peak_anonymous(command)
                row = (f"{total / 1e9:.2f} GB", f"{largest / 1e9:.2f} GB", f"{peak / 1e9:.3f} GB", f"{peak / largest:.2f}")
                if to == "orbax":
                    _hollow(place / to)
                table.add_row(str(layers), to, *row, f"{seconds:.0f}")
            for made in ("in", "orbax", "hf"):
                shutil.rmtree(place / made)
    Console().print(table)


if __name__ == "__main__":
    main()
