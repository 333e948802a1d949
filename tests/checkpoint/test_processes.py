"""Real processes over one mesh: what two have written, one and four read; what fails on one, fails on all; kill -9."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from qwen3_jax import adamw, from_pretrained, init_train_state, make_mesh, save_pretrained
from qwen3_jax.checkpoint.safetensors import Plan, write_file
from qwen3_jax.checkpoint.weights import write_json
from qwen3_jax.tune.lora import LoraConfig
from qwen3_jax.tune.peft_config import to_peft
from qwen3_jax.tune.peft_names import adapter_slots
from tests.checkpoint.folders import files, hub_tensors, write
from tests.checkpoint.state import flat, loaded, stepped
from tests.model.models import CONFIGS
from tests.parallel.launch import free_port

CONFIG = dataclasses.replace(CONFIGS["moe"], num_hidden_layers=2, vocab_size=97)


def start(count: int, devices: int, place: Path, duty: str) -> list[subprocess.Popen]:
    """Start the processes of a mesh."""
    port = free_port()
    words = [sys.executable, "-m", "tests.checkpoint.process"]
    return [
        subprocess.Popen(
            [*words, *map(str, (index, count, port, devices, place, duty))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for index in range(count)
    ]


def run(count: int, devices: int, place: Path, duty: str) -> list[dict]:
    """What the processes of a mesh have seen."""
    found = []
    for process in start(count, devices, place, duty):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        found.append(json.loads(next(line for line in out.splitlines() if line.startswith("{"))))
    return found


def write_adapter(folder: Path) -> None:
    """Adapters with random values, as `save_adapter` lays them out."""
    lora, draw = LoraConfig(rank=4, alpha=6.0, targets=("attention", "moe.down")), np.random.default_rng(1)
    tensors = {slot.name: draw.standard_normal(slot.shape, np.float32) for slot in adapter_slots(CONFIG, lora)}
    folder.mkdir()
    plan = Plan(folder / "adapter_model.safetensors", {name: (values.dtype, values.shape) for name, values in tensors.items()})
    write_file(plan, iter(tensors.values()))
    write_json(folder / "adapter_config.json", to_peft(CONFIG, lora, None))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder, what one device makes of it, and what two processes have."""
    place = tmp_path_factory.mktemp("processes")
    write(place / "in", CONFIG, hub_tensors(CONFIG), files=2)
    alone = from_pretrained(place / "in")
    save_pretrained(alone, place / "by1-hf", max_shard_bytes=40_000)
    save_pretrained(alone, place / "by1-orbax", to="orbax")
    write_adapter(place / "by1-adapter")
    (place / "seen.json").write_text(json.dumps(run(2, 2, place, "first")))
    return place


def test_two_processes_write_what_one_does(place):
    for form in ("hf", "orbax", "adapter"):
        assert files(place / f"by2-{form}") == files(place / f"by1-{form}")
    alone = from_pretrained(place / "in")
    for path, leaf in jax.tree.leaves_with_path(from_pretrained(place / "by2-orbax")):
        np.testing.assert_array_equal(leaf, dict(jax.tree.leaves_with_path(alone))[path])
    whole = CONFIG.num_params() * 4
    for seen in json.loads((place / "seen.json").read_text()):
        assert 0.4 * whole < seen["read"] <= seen["held"] < 0.6 * whole


def test_what_fails_on_one_fails_on_all_and_leaves_nothing_behind(place):
    first, second = json.loads((place / "seen.json").read_text())
    assert second["save"] == "file: No space left on device"
    assert first["save"] == "process 1 of 2: file: No space left on device"
    assert "model.embed_tokens.weight ends after" in second["load"]
    assert first["load"] == f"process 1 of 2: {second['load']}"
    assert second["missing"].startswith(f"{place}/nowhere is no folder")
    assert first["missing"] == f"process 1 of 2: {second['missing']}"
    assert second["adapter"].startswith(f"{place}/nowhere: adapter_config.json is not there")
    assert first["adapter"] == f"process 1 of 2: {second['adapter']}"
    assert "by2-hf is not empty" in first["occupied"] and "by2-hf is not empty" in second["occupied"]
    # Each of two disks of one's own: the second does not see the first's folder.
    assert second["apart"].endswith("is not there: several processes write one folder on a file system of them all")
    assert first["apart"] == f"process 1 of 2: {second['apart']}"
    assert os.listdir(place / "mine-0") == os.listdir(place / "mine-1") == []
    assert not any("failed" in name or name.endswith(".part") for name in os.listdir(place))


def test_four_processes_read_what_two_have_written(place):
    like = init_train_state(from_pretrained(place / "in", mesh=make_mesh("fsdp=4", devices=jax.devices()[:4])), adamw(1e-2))
    state = loaded(place / "state", like)
    alone = flat(stepped(init_train_state(from_pretrained(place / "in"), adamw(1e-2))))
    for path, leaf in flat(state).items():
        rows = tuple(map(slice, alone[path].shape))  # without the vocabulary's padding
        np.testing.assert_array_equal(np.asarray(leaf)[rows], alone[path], err_msg=path)
        assert leaf.shape == () or isinstance(leaf.sharding, NamedSharding)
    np.savez(place / "state.npz", allow_pickle=False, **{path: np.asarray(leaf) for path, leaf in flat(state).items()})
    whole = CONFIG.num_params() * 4
    for seen in run(4, 1, place, "second"):
        assert seen["equal"] and seen["parts"] == len(alone) and seen["left"] == []
        assert 0.2 * whole < seen["read"] <= seen["held"] < 0.35 * whole
    assert files(place / "by4-hf") == files(place / "by1-hf")


def test_kill_9_of_one_leaves_no_finished_folder(place):
    save_pretrained(from_pretrained(place / "in"), place / "killed")
    before = files(place / "killed")
    first, second = start(2, 1, place, "killed")
    second.communicate(timeout=120)
    assert second.returncode == -signal.SIGKILL
    try:
        out, _ = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode != 0 and "ended" not in out
    assert files(place / "killed") == before
    save_pretrained(from_pretrained(place / "in"), place / "killed", overwrite=True)  # what is left beside goes
    assert not any(name.endswith(".part") for name in os.listdir(place))
