"""What two runs of one file have made, held against each other: their journals, their batches, their last checkpoints.

A run is named by its folder, which holds the metrics.jsonl and the checkpoints of `qwen3-jax train`, and by the batches.jsonl
that tools/run_in_phases.py has written in the folder above, one file for each process.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from qwen3_jax.checkpoint.safetensors import read_header
from qwen3_jax.training.journal import read_lines

TIMES = ("time", "tokens_per_second", "mfu")  # figures of the journal that no two runs share


def saves(run: Path) -> tuple[int, dict[str, list[int]]]:
    """The newest finalised checkpoint, and the saves that are not finalised."""
    inside = sorted(path for path in (run / "checkpoints").glob("*") if path.is_dir())
    newest = max((int(path.name) for path in inside if path.name.isdigit()), default=0)
    unfinished = {}
    for path in inside:
        if not path.name.isdigit():
            files = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
            unfinished[path.name] = [len(files), sum(files)]
    return newest, unfinished


def curve(run: Path) -> list[dict[str, Any]]:
    """What the journal says of each step, but for times."""
    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def batches(run: Path) -> dict[int, set[str]]:
    """The digests of the batches that each step was given, in all starts; of several processes, what each has of a batch."""
    found: dict[int, set[str]] = {}
    for file in sorted(run.parent.glob("batches*.jsonl")):
        for line in read_lines(file):
            found.setdefault(line["step"], set()).add(f"{file.stem} {line['digest']}")
    return found


def last_checkpoint(run: Path) -> tuple[int, dict[str, np.ndarray], Any]:
    """The newest checkpoint: its step, its arrays by name, and where the run stands."""
    step, _ = saves(run)
    place = run / "checkpoints" / str(step)
    state, arrays = place / "state", {}
    for entry in json.loads((state / "_METADATA").read_text())["tree_metadata"].values():
        name = ".".join(key["key"] for key in entry["key_metadata"])
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{state}", "path": f"{name}/"}}
        arrays[name] = ts.open(spec, open=True).result().read().result()
    return step, arrays, json.loads((place / "run" / "metadata").read_text())["progress"]


def differences(one: Path, other: Path) -> list[str]:
    """What of two runs is not the same to the bit."""
    found = []
    lines, others = curve(one), curve(other)
    if [line["step"] for line in lines] != [line["step"] for line in others]:
        found.append(f"steps of the journal: {len(lines)} and {len(others)} lines")
    found += [f"journal, step {a['step']}" for a, b in zip(lines, others, strict=False) if a != b]
    given, givens = batches(one), batches(other)
    found += [f"batch of step {step}" for step in sorted(given.keys() | givens.keys()) if given.get(step) != givens.get(step)]
    (step, arrays, stands), (step2, arrays2, stands2) = last_checkpoint(one), last_checkpoint(other)
    if step != step2 or stands != stands2:
        found.append(f"where the last checkpoint stands: step {step} and {step2}")
    for name in sorted(arrays.keys() | arrays2.keys()):
        a, b = arrays.get(name), arrays2.get(name)
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            found.append(f"array {name}")
    return found


def apart(one: Path, other: Path) -> dict[str, float]:
    """By how much each array of two runs' last checkpoints differs: the largest difference, by the array's largest value."""
    arrays, others = last_checkpoint(one)[1], last_checkpoint(other)[1]
    found = {}
    for name in arrays.keys() | others.keys():
        a, b = (np.asarray(there[name], np.float64) for there in (arrays, others))
        found[name] = float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30))
    return found


def exports_apart(one: Path, other: Path) -> dict[str, float]:
    """By how much each tensor of two runs' exports on the way differs."""
    found = {}
    for file in sorted((one / "exports").glob("*/*.safetensors")):
        name = file.relative_to(one)
        there, others = read_header(file), read_header(other / name)
        for tensor in there.keys() | others.keys():
            a, b = (np.asarray(held[tensor].read(), np.float64) for held in (there, others))
            found[f"{name} {tensor}"] = float(np.abs(a - b).max(initial=0.0))
    return found


def other_files(one: Path, other: Path) -> list[str]:
    """The files of two folders that are not the same to the byte, or in one of them only."""
    held = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (one, other)
    ]
    return sorted(name for name in held[0].keys() | held[1].keys() if held[0].get(name) != held[1].get(name))


def losses_apart(one: Path, other: Path) -> list[float]:
    """By how much the losses of two runs differ, step by step."""
    lines, others = ([line["loss"] for line in curve(run)] for run in (one, other))
    return [abs(a - b) for a, b in zip(lines, others, strict=True)]
