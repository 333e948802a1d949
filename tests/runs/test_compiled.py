"""`qwen3-jax plan RUN.toml`: a stage that does not fit, what is refused, and what becomes of a compiler that dies."""

import json
import sys

import pytest

from qwen3_jax.cli.main import main
from qwen3_jax.runs import compiled
from qwen3_jax.runs.dry_run import dry_run
from qwen3_jax.runs.resolve import resolve

# Adapters beside a base in float32 on four chips, of which each gets two million tokens in the second stage.
RUN = """
name = "adapters"
[model]
preset = "qwen3-0.6b"
folder = "not-there"
config = { num_hidden_layers = 2, vocab_size = 8192, bos_token_id = 1, eos_token_id = 2 }
[mesh]
axes = "fsdp=2,tensor=2"
topology = "v5e:2x2"
[data.sources.text]
folder = "not-there"
[lora]
base_dtype = "float32"
[stages.short]
tokens = 4096
batch = 8
seq = 512
[stages.long]
tokens = 4194304
batch = 64
seq = 65536
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def test_a_base_in_float32_in_a_stage_that_is_too_large(file, tmp_path, capsys):
    """The compiler refuses it, and has placed its buffers before: arguments are what a dry run says, and the batch."""
    assert main(["plan", str(file), "--stage", "long", "--json", str(tmp_path / "plan.json")]) == 1
    plan, memory = json.loads((tmp_path / "plan.json").read_text()), dry_run(resolve(file).run).stages[1].memory
    (found,) = plan["stages"]
    batch = 4 * 4 * 64 * 65536 / 2  # four arrays of four bytes
    assert found["bytes"]["arguments"] == pytest.approx(memory["weights"] + memory["optimizer"] + batch, rel=0.02)
    # Two layers of 15.7 M parameters, and the words.
    assert memory["weights"] == pytest.approx(4 * (2 * 15.7e6 + 8192 * 1024) / 4, rel=0.05)
    over = found["bytes"]["total"] - plan["chip"]["hbm"]
    assert over > 0 and found["fits"] is False and found["verdict"] == f"does not fit: {over / 1e9:.1f} GB too many"
    assert found["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["--mesh", "fsdp=4"], "--mesh with a run's file, which says it itself: accepted are --stage, --layers, --topology"),
        (["--adapter_dtype", "float32"], "--adapter-dtype with a run's file"),
        (["--efficiency.flops=0.5"], "--efficiency with a run's file"),
        (["--stage", "middle"], "run.toml has no stage 'middle': accepted are short, long"),
        (["--topology", "v5q:2x2"], "topology 'v5q:2x2': accepted are v5e"),
        (["--topology", "v5e:2x4"], "fsdp=2 x tensor=2 is 4, and there are 8 devices"),
        (["--layers", "0"], "model.config: num_hidden_layers is 0"),
        (["--time-limit", "0"], "time_limit is 0.0: accepted is a number of seconds above 0"),
    ],
)
def test_what_a_run_is_not_planned_with(file, words, says, capsys):
    assert main(["plan", str(file), *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_run_without_chips_is_not_planned(file, capsys):
    file.write_text(file.read_text().replace('topology = "v5e:2x2"', ""))
    assert main(["plan", str(file)]) == 2
    assert "run.toml names no chips: accepted are those that the run is meant for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model, words, says",
    [
        ("gone.toml", [], "gone.toml: No such file or directory: accepted is a run's TOML file"),
        ("qwen3-8b", ["--topology", "v5e:2x2"], "qwen3-8b without --batch, --seq: a model's plan needs --topology, --batch"),
        ("qwen3-8b", ["--layers", "2"], "--layers is of a run's file, and qwen3-8b is a model"),
    ],
)
def test_a_run_and_a_model_are_told_apart(model, words, says, capsys):
    assert main(["plan", model, *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "does, code, says",
    [
        ("raise SystemExit('no room on earth')", 1, "its process ended with code 1; its last words: no room on earth"),
        ("os.kill(os.getpid(), 9)", 1, "its process ended with SIGKILL; its last words: none"),
        ("time.sleep(60)", 1, "stopped after its time limit of 0.5 s"),
        (
            "open(sys.argv[2], 'w').write('{\"reason\": \"the compiler refused: it\"}')",
            1,
            "short does not compile: the compiler refused: it",
        ),
        ("open(sys.argv[2], 'w').write('{\"needed\": 20000000000}')", 1, "does not fit: 3.1 GB too many"),
        ("open(sys.argv[2], 'w').write('{\"refused\": \"no chips\"}')", 2, "run.toml, stage short: no chips"),
    ],
)
def test_a_compiler_that_does_not_compile(does, code, says, file, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "WORKER", (sys.executable, "-c", f"import os, sys, time; {does}"))
    limit = "0.5" if "sleep" in does else "60"
    assert main(["plan", str(file), "--stage", "short", "--time-limit", limit]) == code
    told = capsys.readouterr()
    assert says in told.out + told.err
