"""`qwen3-jax plan` as a process: real compilers, a record, a page and a table; what it refuses at its door."""

import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from jax.sharding import AbstractMesh

from qwen3_jax.cli.main import main
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.planning.estimate import device_flops
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import adapters, parameters, shares
from qwen3_jax.planning.topology import COMPILE_ONLY
from tests.planning.jobs import TINY

COMMAND = [sys.executable, "-m", "qwen3_jax.cli.main", "plan"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    (place / "config.json").write_text(json.dumps(TINY.to_hf()))
    return place


def run(*words):
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run([*COMMAND, *map(str, words)], env=environment, capture_output=True, text=True, timeout=600)


def test_a_training_step_is_planned(folder, tmp_path):
    done = run(
        folder,
        "--topology",
        "v5e:2x2",
        "--batch",
        8,
        "--seq",
        128,
        "--top",
        1,
        "--json",
        tmp_path / "o.json",
        "--html",
        tmp_path / "o.html",
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "o.json").read_text())
    (best,) = content["candidates"]
    assert content["considered"] == 10 and content["chips"] == 4 and content["mode"] == "train"
    assert best["fits"] is True and set(best["mesh"]) == {"data", "fsdp", "expert", "context", "tensor"}
    kinds = dict(
        step_seconds=float, tokens_per_second_per_chip=float, mfu=float, compile_seconds=float, flops=float, hbm_bytes=float
    )
    for name, kind in kinds.items():
        assert isinstance(best[name], kind) and best[name] > 0, name
    parts = (
        "arguments",
        "temporaries",
        "output",
        "aliased",
        "code",
        "total",
        "weights",
        "optimizer",
        "gradients",
        "activations",
        "working",
    )
    assert all(isinstance(best["bytes"][part], int) for part in parts)
    mesh = AbstractMesh(tuple(best["mesh"].values()), tuple(best["mesh"]))
    work = Job(TINY, "train", 8, 128)
    weights = 4 * parameters(work, shares(work, mesh, RULES.replace(**best["rules"]))).total
    assert best["bytes"]["weights"] == weights
    assert best["bytes"]["optimizer"] == pytest.approx(2 * weights, rel=1e-5)  # and two counters
    assert best["bytes"]["arguments"] == pytest.approx(3 * weights, rel=0.05)
    # What the program does is what the model asks for and a forward pass more, and not much beside it.
    assert 0.9 < best["flops"] * 4 / content["model_flops"] < 2
    assert 0 < best["mfu"] < 1 and best["assumptions"]
    for each in best["collectives"]:
        assert set(each) >= {"kind", "axes", "bytes", "count", "overlapped", "seconds", "network"}
    split = {axis for axis, size in best["mesh"].items() if size > 1}
    assert {axis for each in best["collectives"] for axis in each["axes"]} == split
    ElementTree.parse(tmp_path / "o.html")
    assert "tokens/s/chip" in done.stdout and "fits:" in done.stdout and "assumptions" in done.stdout
    assert "Failed to find host bounds" not in done.stderr


def test_adapters_are_planned(folder, tmp_path):
    """A frozen model in bfloat16, and three float32 numbers for each parameter of its adapters."""
    done = run(
        folder,
        *("--topology", "v5e:2x2", "--mode", "lora", "--rank", 8, "--batch", 8, "--seq", 128),
        *("--mesh", "data=4", "--json", tmp_path / "o.json"),
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "o.json").read_text())
    (best,) = content["candidates"]
    assert (content["mode"], content["rank"], best["fits"]) == ("lora", 8, True)
    work = Job(TINY, "lora", 8, 128, rank=8)
    cut = shares(work, AbstractMesh(tuple(best["mesh"].values()), tuple(best["mesh"])), RULES.replace(**best["rules"]))
    pairs = sum(factors.total for factors in adapters(work, cut).values())
    assert best["bytes"]["weights"] == 2 * parameters(work, cut).total + 4 * pairs
    assert best["bytes"]["optimizer"] == pytest.approx(8 * pairs, rel=1e-3)  # and two counters
    assert best["bytes"]["arguments"] == pytest.approx(2 * parameters(work, cut).total + 12 * pairs, rel=0.05)
    assert best["bytes"]["gradients"] == 4 * pairs
    # Of frozen matrices three products with remat, where training has four.
    assert best["flops"] == pytest.approx(device_flops(work, cut), rel=0.05) and 0 < best["mfu"] < 1
    assert any("4 FLOPs per token and active frozen parameter" in line for line in best["assumptions"])


def test_decode_that_fits_on_one_mesh_and_not_on_another(folder, tmp_path):
    """A cache of 40 GB: a fourth of its rows on each device, or all of them, for two key heads cannot be cut in four."""
    done = run(
        folder,
        *("--topology", "v5e:2x2", "--mode", "decode", "--batch", 64, "--seq", 305_000, "--workers", 2),
        *("--mesh", "tensor=4", "data=4", "--json", tmp_path / "o.json"),
    )
    assert done.returncode == 0, done.stderr
    fits, full = json.loads((tmp_path / "o.json").read_text())["candidates"]
    assert (fits["mesh"]["data"], fits["fits"], full["mesh"]["tensor"], full["fits"]) == (4, True, 4, False)
    cache = 2 * 2 * 64 * 2 * 305_000 * 64 * 2
    assert fits["bytes"]["cache"] == pytest.approx(cache / 4, rel=0.02)
    assert fits["bytes"]["aliased"] >= cache / 4  # written in place
    assert full["bytes"]["cache"] == pytest.approx(cache, rel=0.02) and full["bytes"]["total"] >= cache
    assert full["step_seconds"] is None and "its arguments alone are too large" in full["verdict"]
    assert "tensor=4: does not fit" in done.stdout


@pytest.mark.parametrize(
    "change, says",
    [
        ({"--topology": "v5q:2x2"}, "topology 'v5q:2x2': accepted are v5e, v5p, v6e, tpu7x, h100"),
        ({"--mode": "lora", "--rank": "0"}, "rank is 0: accepted is a whole number from 1"),
        ({"--batch": "0"}, "batch is 0"),
        ({"--batch": "3", "--seq": "127", "--topology": "v5e:2x4"}, "no mesh of 8 devices fits 3 rows of 127 tokens in train"),
        ({"--mesh": "tensor=8"}, "tensor=8 is 8, and there are 4 devices"),
        ({"--json": "/nowhere/o.json"}, "json is /nowhere/o.json: accepted is a file in a folder that is there"),
        ({"--rule": "embed"}, "rule 'embed': accepted is LOGICAL=AXIS+AXIS"),
        ({"--remat": "some"}, "remat policy 'some': accepted are none, full"),
    ],
)
def test_what_cannot_be_planned_is_one_line(folder, change, says, monkeypatch, capsys):
    for name, value in COMPILE_ONLY.items():  # which the command sets, as it does in a process of its own
        monkeypatch.setenv(name, value)
    given = {"--topology": "v5e:2x2", "--batch": "8", "--seq": "128"} | change
    assert main(["plan", str(folder), *[word for pair in given.items() for word in pair]]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_model_that_is_neither_a_preset_nor_a_folder():
    done = run("qwen3-30b-a3", "--topology", "v5e:2x2", "--batch", 8, "--seq", 128)
    assert done.returncode == 2 and "no preset 'qwen3-30b-a3'; did you mean qwen3-30b-a3b" in done.stderr
    assert "Traceback" not in done.stderr
