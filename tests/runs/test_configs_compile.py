"""Every run of configs/ compiles for the chips it names, its widths whole and its depth cut down to two layers."""

from pathlib import Path

import pytest
from tools.compile_run import placed

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
def test_a_run_compiles_for_its_chips(name):
    """Its arguments are what a dry run says; all of it fits a chip with much to spare, for most of the layers are left out."""
    stage, topology = STEPS[name]
    memory = placed(CONFIGS / f"{name}.toml", stage, 2, topology)
    words = ["--model.config.num_hidden_layers", "2", *(["--mesh.topology", topology] if topology else [])]
    need = dry_run(resolve(CONFIGS / f"{name}.toml", words).run)
    (said,) = [each.memory for each in need.stages if each.name == stage]
    # The demo's arrays are smaller than the tiles that they are padded to.
    assert memory.arguments == pytest.approx(said["weights"] + said["optimizer"], rel=0.3 if name == "demo" else 0.06)
    assert need.hbm is not None and memory.arguments + memory.temporaries < need.hbm
