"""`qwen3-jax plan` compiles every run of configs/ for the chips it names, its widths whole and its depth cut to two layers."""

import json
from pathlib import Path

import pytest

from qwen3_jax.cli.main import main
from qwen3_jax.runs.dry_run import dry_run
from qwen3_jax.runs.models import model_config
from qwen3_jax.runs.resolve import resolve

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The file, its stage that needs most, and where it is not its own, a topology: CUDA's compiler is not in the tests.
STEPS = {
    "demo": ("all", "v5p:2x2x2"),
    "pretrain_0.6b": ("general", None),
    "three_stages_30b_a3b": ("long_context", None),
    "three_stages_235b": ("long_context", None),
    "sft_8b": ("sft", None),
    "lora_30b_a3b": ("sft", "v5p:2x2x2"),
}


SAME_STEP = {"demo_sft": "demo"}


def test_all_runs_are_here():
    assert sorted([*STEPS, *SAME_STEP]) == sorted(path.stem for path in CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("name, other", SAME_STEP.items())
def test_some_runs_have_the_program_of_another(name, other):
    """But for its rate, mixture and weights: nothing that shapes a step differs."""
    one, same = (resolve(CONFIGS / f"{each}.toml").run for each in (name, other))
    assert model_config(one.model) == model_config(same.model) and (one.mesh, one.step) == (same.mesh, same.step)
    shapes = [[(stage.batch, stage.seq, stage.accumulation) for stage in run.stages.values()] for run in (one, same)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", STEPS)
def test_a_run_compiles_for_its_chips(name, tmp_path):
    """Its arguments are what a dry run says; all of it fits a chip with much to spare, for most of the layers are left out."""
    (stage, topology), file, told = STEPS[name], CONFIGS / f"{name}.toml", tmp_path / "plan.json"
    words = ["--stage", stage, "--layers", "2", *(["--topology", topology] if topology else [])]
    assert main(["plan", str(file), *words, "--json", str(told)]) == 0
    plan = json.loads(told.read_text())
    words = ["--model.config.num_hidden_layers", "2", *(["--mesh.topology", topology] if topology else [])]
    run = resolve(file, words).run
    need = dry_run(run)
    (said,) = [each.memory for each in need.stages if each.name == stage]
    (found,) = plan["stages"]
    assert (plan["layers"], plan["mesh"], plan["topology"]) == (2, need.mesh, run.mesh.topology)
    assert (found["stage"], found["fits"], found["analytic"]["bytes"]) == (stage, True, said)
    # The demo's arrays are smaller than the tiles that they are padded to.
    arguments, hbm = found["bytes"]["arguments"], plan["chip"]["hbm"]
    assert arguments == pytest.approx(said["weights"] + said["optimizer"], rel=0.3 if name == "demo" else 0.06)
    assert arguments + found["bytes"]["temporaries"] == found["bytes"]["total"] < hbm == need.hbm
