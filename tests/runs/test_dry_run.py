"""What a run will need, against sums made by hand; and the runs of configs/."""

import dataclasses
from pathlib import Path

import pytest

from qwen3_jax.cli.main import main
from qwen3_jax.parallel.mesh import MeshError, make_mesh
from qwen3_jax.planning.programs import device_bytes
from qwen3_jax.runs.dry_run import dry_run
from qwen3_jax.runs.models import check_weights, model_config
from qwen3_jax.runs.resolve import resolve
from qwen3_jax.runs.step_worker import abstract_state
from qwen3_jax.runs.toml import RunError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))
RUNS = {path.stem: path for path in CONFIGS}


def test_the_runs_are_there():
    expected = ("demo", "demo_sft", "pretrain_0.6b", "three_stages_30b_a3b", "three_stages_235b", "sft_8b", "lora_30b_a3b")
    assert sorted(RUNS) == sorted(expected)


@pytest.mark.parametrize("name", RUNS)
def test_each_run_fits_its_mesh_and_its_chips(name, capsys):
    """By the command as docs/runs.md has it; the demo's runs name no chips, so they are reckoned on the devices here."""
    assert main(["train", str(RUNS[name]), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "too many" not in out
    assert ("fsdp=8 on 8 devices" in out) == name.startswith("demo")


def test_memory_is_the_weights_over_the_devices():
    run = resolve(RUNS["three_stages_30b_a3b"]).run
    need = dry_run(run)
    assert need.devices == 128 and need.mesh["fsdp"] * need.mesh["expert"] == 128
    assert need.parameters == 30_532_122_624
    for stage in need.stages:
        # All but norms and router, under a thousandth, is split over all chips.
        assert stage.memory["weights"] == pytest.approx(4 * need.parameters / 128, rel=2e-3)
        assert stage.memory["optimizer"] == pytest.approx(8 * need.parameters / 128, rel=2e-3)
    assert [stage.steps for stage in need.stages] == [120_000, 20_000, 3_200]
    assert [stage.rows for stage in need.stages] == [4, 4, 1]
    assert run.tokens == 1_006_632_960_000 + 167_772_160_000 + 26_843_545_600


def test_accumulation_divides_what_activations_take():
    path = RUNS["pretrain_0.6b"]
    whole = dry_run(resolve(path).run).stages[0].memory
    parts = dry_run(resolve(path, ["--stages.general.accumulation", "4"]).run).stages[0].memory
    assert parts["activations"] == whole["activations"] / 4
    assert parts["weights"] == whole["weights"]


def test_adapters_leave_the_base_in_16_bits_without_an_optimizer():
    need = dry_run(resolve(RUNS["lora_30b_a3b"]).run)
    memory, pairs = need.stages[0].memory, 844e6  # parameters of rank 16 beside every matrix
    assert memory["weights"] == pytest.approx((2 * need.parameters + 4 * pairs) / 8, rel=0.1)
    assert memory["optimizer"] == pytest.approx(8 * pairs / 8, rel=0.2)


def test_codes_and_adapters_in_16_bits_take_less():
    words = ["--lora.base_dtype", "nf4", "--lora.dtype", "bfloat16", "--optimizer.moment_dtype", "bfloat16"]
    memory = dry_run(resolve(RUNS["lora_30b_a3b"], words).run).stages[0].memory
    pairs, words, matrices = 844e6, 622e6, 29.9e9  # experts and adapters lie on eight devices, as all else does
    assert memory["weights"] == pytest.approx((17 / 32 * matrices + 2 * words + 2 * pairs) / 8, rel=0.1)
    assert memory["optimizer"] == pytest.approx(4 * pairs / 8, rel=0.2)


@pytest.mark.parametrize(
    "words",
    [
        ["--model.param_dtype", "bfloat16"],
        ["--model.folder", "not-there", "--lora", '{ base_dtype = "float32", dtype = "bfloat16" }'],
        ["--model.folder", "not-there", "--lora", '{ base_dtype = "nf4" }', "--optimizer.moment_dtype", "bfloat16"],
    ],
    ids=["trained in 16 bits", "a base in 32", "codes"],
)
def test_memory_is_what_the_state_of_the_run_takes(words):
    """Weights and moments in the dtypes that the run gives them."""
    layers = ["--model.config.num_hidden_layers", "2", "--mesh.axes", "fsdp=4,tensor=2"]
    run = resolve(RUNS["pretrain_0.6b"], [*layers, *words]).run
    state, memory = abstract_state(run, make_mesh(run.mesh.axes)), dry_run(run).stages[0].memory
    assert memory["weights"] == device_bytes((state.params, state.frozen))
    assert memory["gradients"] == device_bytes(state.params)
    assert memory["optimizer"] == pytest.approx(device_bytes(state.opt_state), abs=8)  # and two counters


def test_a_run_that_does_not_fit_says_by_how_much(capsys):
    words = ["--mesh.topology", "v5e:2x4", "--stages.general.seq", "32768", "--stages.general.tokens", "8388608000"]
    assert main(["train", str(RUNS["pretrain_0.6b"]), "--dry-run", *words]) == 1
    assert "too many" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, kind, said",
    [
        (["--mesh.axes", "fsdp=3"], MeshError, "fsdp=3 is 3, and there are 8 devices"),
        (["--mesh.slices", "2"], MeshError, "slices=2 with data=1: accepted are slices that divide data"),
        (["--stages", "{ few = { tokens = 16384000, batch = 4 } }"], MeshError, "4 rows over fsdp=8"),
        (["--model.config.num_layers", "3"], RunError, "num_layers: did you mean model.config.num_hidden_layers"),
        (["--model.config.num_hidden_layers", "0"], RunError, "model.config: num_hidden_layers is 0"),
    ],
)
def test_what_cannot_be_is_refused(words, kind, said):
    with pytest.raises(kind, match=said):
        dry_run(resolve(RUNS["pretrain_0.6b"], words).run)


def test_a_folder_must_hold_the_preset(tmp_path):
    import json

    from qwen3_jax import Qwen3Config

    (tmp_path / "config.json").write_text(json.dumps(Qwen3Config.preset("qwen3-0.6b").to_hf()))
    words = ["--model.folder", str(tmp_path)]
    with pytest.raises(RunError, match="is no qwen3-8b: hidden_size 1024, not 4096, num_hidden_layers 28, not 36"):
        dry_run(resolve(RUNS["sft_8b"], words).run)
    # The preset with the section's own fields is what is meant too; and what weights must fit, while a shape alone need not.
    fields = [
        "--model.config",
        "{ num_hidden_layers = 28, hidden_size = 1024, intermediate_size = 3072, tie_word_embeddings = true }",
    ]
    run = resolve(RUNS["sft_8b"], [*words, *fields, "--model.config.num_attention_heads", "16"]).run
    check_weights(run.model, model_config(run.model))
    cut = resolve(RUNS["pretrain_0.6b"], [*words, "--model.config.num_hidden_layers", "3"]).run.model
    with pytest.raises(
        RunError, match="another shape than model.config says: num_hidden_layers 28, not 3; accepted is the folder"
    ):
        check_weights(cut, model_config(cut))
    check_weights(dataclasses.replace(cut, weights="random"), model_config(cut))
