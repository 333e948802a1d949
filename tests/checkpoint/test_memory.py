"""Anonymous memory, measured in processes of their own: it depends on a tensor's size, not on a model's depth."""

import json
import subprocess
import sys

import pytest

from qwen3_jax import Qwen3Config
from tools.show_convert_memory import peak_anonymous, sparse_folder

MEGABYTE = 2**20
SHAPE = dict(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
)

# Loads a model while a thread watches, after a first load has brought in whatever else a process needs.
LOAD = """
import gc, json, sys, threading, time
from pathlib import Path
import jax
import qwen3_jax
from qwen3_jax.cli.convert import _give_freed_memory_back

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done:
        seen.append(anonymous())
        time.sleep(0.002)

_give_freed_memory_back()
mesh = qwen3_jax.make_mesh(sys.argv[3]) if sys.argv[3:] else None
jax.block_until_ready(jax.tree.leaves(qwen3_jax.from_pretrained(sys.argv[1], mesh=mesh)))
gc.collect()
done, seen, before = False, [], anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = qwen3_jax.from_pretrained(sys.argv[2], mesh=mesh)
jax.block_until_ready(jax.tree.leaves(model))
done = True
thread.join()
shards = [shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards]
print(json.dumps({"peak": max(seen) - before, "model": sum(shards)}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of 2 and of 8 layers, 30 MB each: files of holes, which take no disk and read as zeros."""
    place = tmp_path_factory.mktemp("memory")
    for layers in (2, 8):
        sparse_folder(place / str(layers), Qwen3Config(**SHAPE, num_hidden_layers=layers))
    return place


@pytest.mark.parametrize("mesh", [[], ["fsdp=4,tensor=2"]], ids=["one device", "mesh"])
def test_a_model_is_loaded_in_the_memory_of_the_model_and_two_slices(folders, mesh):
    """On a mesh a layer is there once more in the layout that it is read in, and once while it changes to its own."""
    command = [sys.executable, "-c", LOAD, str(folders / "2"), str(folders / "8"), *mesh]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    slices = 2 * 2 * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    assert 240 * MEGABYTE < found["model"] < found["peak"] + MEGABYTE
    assert found["peak"] < found["model"] + slices + 24 * MEGABYTE, found


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_conversion_of_eight_layers_takes_the_memory_of_one_of_two(folders, tmp_path, to):
    peaks = []
    for layers in (2, 8):
        source = folders / str(layers)
        command = [sys.executable, "-m", "qwen3_jax.cli.main", "convert", str(source), str(tmp_path / f"{layers}"), "--to", to]
        peaks.append(peak_anonymous(command)[0])
    # Up to three tensors of 8 MB more or less are in flight; the six layers between the two have 180 MB.
    assert abs(peaks[1] - peaks[0]) < 24 * MEGABYTE, peaks
