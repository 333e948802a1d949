"""Runs as processes of their own: a curve, kills that leave no trace in it, an end when told, and starts that are refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx

from qwen3_jax import cross_entropy, from_pretrained, generate, load_tokenizer
from qwen3_jax.checkpoint.pretrained import nested, parameters
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from qwen3_jax.training.journal import read_lines
from tests.chat.tiny import SAMPLE
from tests.model.models import QUICK as COMPILE_QUICKLY
from tests.parallel.launch import free_port, together
from tests.training.events import figures
from tools.compare_runs import saves
from tools.demo.corpus import train_tokenizer
from tools.start_runs import start

# Compilers take most of a start's time, and these programs run for a second.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ROOT = Path(__file__).resolve().parents[2]
RUN = """\
name = "tiny"
output = "{place}/runs"

[model]
preset = "qwen3-30b-a3b"
compute_dtype = "float32"

[model.config]
vocab_size = 400
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
intermediate_size = 48
moe_intermediate_size = 24
num_experts = 4
num_experts_per_tok = 2
max_position_embeddings = 128
bos_token_id = 0
eos_token_id = 1

[mesh]
axes = "fsdp=2,expert=2"

[data.sources.text]
folder = "{place}/text"

[data.sources.more]
folder = "{place}/more"

[stages.first]
tokens = 3072
batch = 8
seq = 64
accumulation = 2
learning_rate = 1e-2
warmup = 1024
mixture = {{ text = 0.75, more = 0.25 }}

[stages.second]
tokens = 4096
batch = 4
seq = 128
rope_theta = 50000.0
learning_rate = 3e-3
mixture = {{ text = 0.5, more = 0.5 }}

[checkpoint]
every = 3

[watch]
every = 1
held_out = "{place}/more"
held_out_every = 7
held_out_batches = 2
"""
WATCHED = [*("--watch.tensorboard", "true", "--watch.prompts", '["def read(", "path"]'), "--checkpoint.export"]
EXPORTS = ["--checkpoint.export_every", "4", "--checkpoint.export_keep", "2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two sources and a tokenizer, and a cache of compiled programs that all starts share."""
    place = tmp_path_factory.mktemp("prepared")
    train_tokenizer([SAMPLE] * 20, 400, place / "tokenizer")
    draw = np.random.default_rng(0)
    for name, count in (("text", 60), ("more", 30)):
        texts = ["def read(path): return open(path)" * int(draw.integers(1, 5)) + str(at) for at in range(count)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([str(place / f"{name}.jsonl")], place / name, Work(str(place / "tokenizer")), workers=0)
    return place


@pytest.fixture
def place(prepared, tmp_path):
    (tmp_path / "run.toml").write_text(RUN.format(place=tmp_path))
    for name in ("text", "more"):
        (tmp_path / name).symlink_to(prepared / name)
    return tmp_path


def environ_of(prepared):
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICK}",
        "JAX_COMPILATION_CACHE_DIR": str(prepared / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def command_of(place, *words):
    return [sys.executable, "-m", "qwen3_jax.cli.main", "train", str(place / "run.toml"), *words]


def begin(prepared, place, *words):
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command_of(place, *words), cwd=ROOT, env=environ_of(prepared), **options)


def finish(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def at_step(process, step, number):
    """Send a signal once a step has been told; what was said so far."""
    said = []
    for line in process.stdout:
        said.append(line)
        if re.match(rf"step {step}\b", line):
            process.send_signal(number)
            break
    return "".join(said)


def curve(place, runs="runs"):
    """What a run's lines say of its steps, and of its held-out loss."""
    told = ("step", "stage", "loss", "grad_norm", "expert_load", "tokens_seen", "held_out_loss")
    return [{name: line[name] for name in told if name in line} for line in read_lines(place / runs / "tiny/metrics.jsonl")]


def arrays_of(place, step=14, runs="runs"):
    """What a checkpoint holds, by its names there."""
    folder = place / runs / f"tiny/checkpoints/{step}/state"
    names = json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()
    found = {}
    for entry in names:
        name = ".".join(key["key"] for key in entry["key_metadata"])
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}", "path": f"{name}/"}}
        found[name] = ts.open(spec, open=True).result().read().result()
    return found


@pytest.fixture(scope="module")
def watched(prepared, tmp_path_factory):
    """A run without a stop, watched in all ways and exported as it goes; its folder."""
    place = tmp_path_factory.mktemp("straight")
    (place / "run.toml").write_text(RUN.format(place=place))
    for name in ("text", "more"):
        (place / name).symlink_to(prepared / name)
    code, out = finish(begin(prepared, place, *EXPORTS, *WATCHED, str(place / "exported")))
    assert code == 0, out
    assert "done at step 14 of 14" in out
    return place


@pytest.fixture(scope="module")
def straight(watched):
    return curve(watched), arrays_of(watched)


def test_a_run_learns_in_its_stages(straight):
    found, arrays = straight
    lines = [line for line in found if "loss" in line]
    assert [line["stage"] for line in lines] == ["first"] * 6 + ["second"] * 8
    assert [line["tokens_seen"] for line in lines] == [512 * n for n in range(1, 15)]
    assert np.mean([line["loss"] for line in lines[-3:]]) < 0.8 * lines[0]["loss"]
    assert int(arrays["step"]) == 14 and int(arrays["guard.skipped"]) == 0


@pytest.fixture(scope="module")
def exported(watched):
    return from_pretrained(watched / "exported", dtype=np.float32)


def test_the_export_is_the_last_checkpoint(straight, exported):
    _, arrays = straight
    found = parameters(nnx.state(exported, nnx.Param))
    assert {f"params.{name}" for name in found} == {name for name in arrays if name.startswith("params.")}
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[f"params.{name}"], err_msg=name)
    assert exported.config.rope_theta == 50000.0  # the last stage's


def test_exports_on_the_way_are_the_checkpoints_of_their_steps(watched, exported):
    """The newest two are left; the one on the way gives the logits of its own step's parameters, in its stage's positions."""
    folder = watched / "runs/tiny/exports"
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-14"]
    found, arrays = from_pretrained(folder / "step-12", dtype=np.float32), arrays_of(watched, 12)
    graph, params = nnx.split(exported)
    named = parameters(params)
    nnx.replace_by_pure_dict(params, nested({name: jnp.asarray(arrays[f"params.{name}"]) for name in named}))
    logits = jax.jit(lambda model: model(jnp.arange(24).reshape(2, 12)).logits, compiler_options=COMPILE_QUICKLY)
    one, other, last = logits(found), logits(nnx.merge(graph, params)), logits(exported)
    np.testing.assert_array_equal(one, other)
    assert np.abs(np.asarray(one - last)).max() > 1e-3  # two steps more are to be seen
    for file in (watched / "exported").iterdir():
        assert (folder / "step-14" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_is_looked_at(watched, exported):
    """What its last line says is what one device makes of the exported model and the same documents."""
    looks = [line for line in read_lines(watched / "runs/tiny/metrics.jsonl") if "held_out_loss" in line]
    assert [line["step"] for line in looks] == [6, 13]
    assert looks[1]["held_out_loss"] < looks[0]["held_out_loss"]
    tok = load_tokenizer(watched / "exported")
    config = LoaderConfig((Source("held_out", str(watched / "more")),), seed=0)
    losses, weights = 0.0, 0.0
    with make_loader(config, batch=4, seq=64, process_index=0, process_count=1) as loader:
        for _ in range(2):
            batch = jax.tree.map(jnp.asarray, next(loader))
            out = exported(batch.tokens, segment_ids=batch.segment_ids)
            weight = float(batch.mask.sum())
            losses, weights = losses + weight * float(cross_entropy(out.logits, batch.labels, batch.mask)), weights + weight
    np.testing.assert_allclose(looks[1]["held_out_loss"], losses / weights, rtol=1e-5)
    for prompt, text in looks[1]["completions"].items():
        out = generate(exported, [tok.encode(prompt)], max_new_tokens=64, stop_tokens=tok.stop_token_ids)
        assert text == tok.decode(out.tokens[0, : int(out.lengths[0])]) and len(text) > 8
    assert list(looks[1]["completions"]) == ["def read(", "path"]


def test_a_run_is_told_to_boards_and_reported(watched):
    folder = watched / "runs/tiny"
    lines = list(read_lines(folder / "metrics.jsonl"))
    found = figures(folder / "tensorboard")
    assert [step for step, _ in found["loss"]] == list(range(14))
    np.testing.assert_allclose(
        [loss for _, loss in found["loss"]], [line["loss"] for line in lines if "loss" in line], rtol=1e-6
    )
    assert [step for step, _ in found["held_out_loss"]] == [6, 13]
    (only,) = read_lines(folder / "starts.jsonl")
    kinds = {"start", "compile", "train", "data", "save", "look", "restore"}
    assert only["came_to"] == "done" and set(only["seconds"]) == kinds
    assert sum(only["seconds"].values()) <= only["ended"] - only["begun"]
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<svg") == 3 and page.count("<img") == 3 and "<td>14 of 14</td>" in page
    assert not (folder / "under_way.json").exists()


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
    code, out = finish(begin(prepared, place))
    assert code == 0, out
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
    process = begin(prepared, place)
    at_step(process, 3, signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    found = re.search(r"told to end: saved at step (\d+) of 14", out)
    assert found is not None, out
    stopped = int(found[1])
    assert 4 <= stopped <= 6
    code, out = finish(begin(prepared, place))
    assert code == 0 and f"goes on at step {stopped}" in out
    assert curve(place) == straight[0]


def test_two_processes_and_one_make_the_same_run(straight, prepared, place):
    """Two are told to end, by a signal to each at its own moment, and one goes on: the same data, the curve within 1e-5."""
    variables = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    exports = ["--checkpoint.export_every", "2", "--checkpoint.export_keep", "1"]
    command = ["-m", "qwen3_jax.cli.main", "train", str(place / "run.toml"), "--mesh.processes", "2", *exports]
    with together([command] * 2, [variables | {"JAX_PROCESS_ID": str(at)} for at in range(2)]) as processes:
        processes[0].read_until("step 2 ")
        for process in processes:
            process.signal(signal.SIGTERM)
        codes = [process.end() for process in processes]
        said = "\n".join(processes[0].printed)
        assert codes == [0, 0], processes[0].errors()[-2000:] + processes[1].errors()[-2000:]
        assert not any(line.startswith("step ") for line in processes[1].printed)
    found = re.search(r"told to end: saved at step (\d+) of 14", said)
    assert found is not None, said
    assert 3 <= int(found[1]) < 14
    ((folder, saved),) = [(path, path.name) for path in (place / "runs/tiny/exports").iterdir()]
    assert saved == f"step-{int(found[1]) // 2 * 2}"  # written by both, and counted by one
    assert from_pretrained(folder).config.num_experts == 4
    code, out = finish(begin(prepared, place))
    assert code == 0 and f"goes on at step {found[1]}" in out, out
    for one, other in zip(curve(place), straight[0], strict=True):
        for name, value in other.items():
            if name in ("step", "stage", "tokens_seen"):
                assert one[name] == value
            else:
                np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} of step {one['step']}")
    found_arrays = arrays_of(place)
    for name, array in straight[1].items():
        np.testing.assert_allclose(
            found_arrays[name], array, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(array).max()), err_msg=name
        )


def as_at_step_9(watched, place):
    """The run as it was then, with lines of steps that come again; its newest checkpoint is step 9's."""
    shutil.copytree(watched / "runs/tiny/checkpoints/9", place / "runs/tiny/checkpoints/9")
    shutil.copy(watched / "runs/tiny/metrics.jsonl", place / "runs/tiny")
    return place / "runs"


def test_on_another_mesh_the_run_is_the_same(straight, watched, prepared, place):
    """The data to its last document, the curve within 1e-5."""
    as_at_step_9(watched, place)
    code, out = finish(begin(prepared, place, "--mesh.axes", "data=4"))
    assert code == 0, out
    assert "goes on at step 9" in out and "changed since it was saved: mesh.axes" in out
    for one, other in zip(curve(place), straight[0], strict=True):
        (name,) = {"loss", "held_out_loss"} & other.keys()
        assert one[name] == pytest.approx(other[name], rel=1e-5), other["step"]
    stands = [json.loads((at / "runs/tiny/checkpoints/14/run/metadata").read_text())["progress"] for at in (watched, place)]
    assert stands[0]["data"] == stands[1]["data"]


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
    command = ["sh", "-c", FULL, "sh", str(place / "runs"), str(place / "was/runs"), *command_of(place)]
    out = subprocess.run(command, cwd=place, env=environ_of(prepared), capture_output=True, text=True, timeout=300)
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


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mesh.processes", "2"], "mesh.processes is 2, and 1 started: accepted is a start of 2"),
        (["--mesh.axes", "fsdp=3"], "fsdp=3 is 3, and there are 4 devices"),
        (["--data.sources.text.folder", "/none"], "/none"),
    ],
)
def test_starts_that_cannot_be_are_refused(prepared, place, words, said):
    code, out = finish(begin(prepared, place, *words))
    assert code == 2, out
    assert said in out.splitlines()[-1]
