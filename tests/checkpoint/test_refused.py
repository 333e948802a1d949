"""What is refused at the door, each in one line that names the file, the tensor or the argument."""

import builtins
import errno
import inspect
import io
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import Qwen3, Qwen3Config, from_pretrained, save_pretrained
from qwen3_jax.checkpoint import casting
from qwen3_jax.checkpoint.convert import plan_conversion
from qwen3_jax.checkpoint.hub import local_folder
from qwen3_jax.checkpoint.opening import open_weights
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.cli.main import main
from tests.checkpoint.folders import contents, hub_tensors, write
from tests.model.models import CONFIGS, random_model

BF16, FP8, F32 = (np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32))


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "in", CONFIGS["dense"], hub_tensors(CONFIGS["dense"]), files=2)
    return tmp_path / "in"


@pytest.fixture
def native(folder) -> Path:
    plan_conversion(folder, folder.parent / "native", "orbax").run()
    return folder.parent / "native"


def unreadable(monkeypatch, name: str) -> None:
    """Root reads everything: the system's answer to others."""
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    def opener(path, mode="r", *args, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return unpatched(path, mode, *args, **kwargs)

    unpatched = builtins.open
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(builtins, "open", opener)
    monkeypatch.setattr(io, "open", opener)


@pytest.mark.parametrize(
    "form, name",
    [
        ("hf", "config.json"),
        ("hf", "model.safetensors.index.json"),
        ("hf", "model-00002-of-00002.safetensors"),
        ("orbax", "config.json"),
        ("orbax", "_METADATA"),
    ],
)
def test_an_unreadable_file_is_one_line(folder, native, monkeypatch, capsys, form, name):
    source = folder if form == "hf" else native
    unreadable(monkeypatch, name)
    says = f"^{source / name}: Permission denied$"
    for use in (
        lambda: open_weights(source),
        lambda: from_pretrained(source),
        lambda: plan_conversion(source, folder.parent / "out", "hf"),
    ):
        with pytest.raises(CheckpointError, match=says):
            use()
    assert main(["convert", str(source), str(folder.parent / "out"), "--to", "hf"]) == 2
    assert capsys.readouterr().err.endswith(f"{name}: Permission denied\n")


def test_a_shard_that_goes_or_fails_while_it_is_read_is_one_line(folder, monkeypatch):
    plan = plan_conversion(folder, folder.parent / "out", "hf")
    unreadable(monkeypatch, "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=f"^{folder}/model-00001-of-00002.safetensors: Permission denied$"):
        plan.run()
    assert sorted(os.listdir(folder.parent)) == ["in"]


def test_paths_that_the_system_refuses_are_one_line(tmp_path, folder):
    os.symlink("loop", tmp_path / "loop")
    for path, says in (
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "gone", "is no folder"),
        (folder / "config.json", "is no folder"),
    ):
        for use in (
            lambda path=path: from_pretrained(path),
            lambda path=path: from_pretrained(str(path)),
            lambda path=path: plan_conversion(path, tmp_path / "out", "hf"),
        ):
            with pytest.raises(CheckpointError, match=f"{path}:? {says}") as caught:
                use()
            assert "\n" not in str(caught.value)
    for path, says in (
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
    ):
        with pytest.raises(CheckpointError, match=f"^{path}: {says}"):
            save_pretrained(random_model("dense"), path)
        with pytest.raises(CheckpointError, match=f"^{path}: {says}"):
            plan_conversion(folder, path, "hf")
    with pytest.raises(CheckpointError, match=r"^gone is no folder: accepted is"):
        local_folder("gone")
    with pytest.raises(CheckpointError, match=r"^n{300}: File name too long"):
        local_folder("n" * 300)
    # A name that the part beside the place cannot have.
    with pytest.raises(CheckpointError, match="File name too long"):
        save_pretrained(random_model("dense"), tmp_path / ("n" * 250))
    assert sorted(os.listdir(tmp_path)) == ["in", "loop"]


def quantised(shape: str = "moe") -> tuple[Qwen3Config, dict[str, np.ndarray]]:
    """An FP8 folder's config and tensors."""
    content = CONFIGS[shape].to_hf() | {
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 20]}
    }
    tensors = {}
    for name, value in hub_tensors(CONFIGS[shape], BF16).items():
        if name.endswith("_proj.weight"):
            tensors[f"{name}_scale_inv"] = np.full((-(-value.shape[0] // 16), -(-value.shape[1] // 20)), 0.5, F32)
            value = value.astype(FP8)
        tensors[name] = value
    return Qwen3Config.from_hf(content), tensors


def test_what_is_written_is_plain_whatever_the_config_was_read_from(tmp_path):
    config, _ = quantised()
    model = jax.jit(lambda: Qwen3(config, rngs=nnx.Rngs(0)))()
    save_pretrained(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert leaves_equal(from_pretrained(tmp_path / "out"), model)


def leaves_equal(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_fp8_of_one_axis_is_refused_by_name(tmp_path):
    config, tensors = quantised()
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name].astype(FP8)
    tensors[f"{name}_scale_inv"] = np.ones((2,), F32)
    write(tmp_path / "in", config, tensors)
    with pytest.raises(CheckpointError, match=rf"{name} is float8 of shape \[32\]; float8 is read in 2 dimensions"):
        open_weights(tmp_path / "in")


def test_fp8_scales_beyond_a_float_are_refused_by_name(tmp_path):
    config, tensors = quantised("dense")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.full(tensors[name].shape, 448, FP8)
    for largest, says in (
        (1e37, f"{name} times its scales of up to 1e\\+37"),
        (1e300, f"{name}_scale_inv has a value of 1e\\+300"),
    ):
        scale = np.full(tensors[f"{name}_scale_inv"].shape, largest, np.float64)
        write(tmp_path / str(largest), config, tensors | {f"{name}_scale_inv": scale})
        with pytest.raises(CheckpointError, match=says):
            from_pretrained(tmp_path / str(largest))


def test_a_tied_model_s_redundant_head_is_checked_and_left_out_with_its_scale(tmp_path):
    config, tensors = quantised("tied")
    shape = tensors["model.embed_tokens.weight"].shape
    scale = np.ones((6, 2), F32)
    head = {"lm_head.weight": np.ones(shape, FP8), "lm_head.weight_scale_inv": scale}
    write(tmp_path / "with", config, tensors | head)
    save_pretrained(from_pretrained(tmp_path / "with"), tmp_path / "out")
    assert not any(name.startswith("lm_head") for name in contents(tmp_path / "out"))
    for wrong, says in (
        ({"lm_head.weight": np.ones(shape, np.int32)}, "lm_head.weight is int32; accepted are"),
        ({"lm_head.weight": np.ones((96, 31), BF16)}, r"lm_head.weight has shape \[96, 31\]; the config makes it \[96, 32\]"),
        ({"lm_head.weight": np.ones(shape, FP8)}, "lm_head.weight_scale_inv is missing"),
        ({"lm_head.weight_scale_inv": scale}, "belong to no layer of this config: lm_head.weight_scale_inv"),
    ):
        write(tmp_path / says[:40].replace("/", ""), config, tensors | wrong)
        with pytest.raises(CheckpointError, match=says):
            open_weights(tmp_path / says[:40].replace("/", ""))


def test_experts_both_fused_and_single_are_refused_by_name(tmp_path):
    config = CONFIGS["moe"]
    tensors = hub_tensors(config)
    fused = "model.layers.2.mlp.experts.down_proj"
    tensors[fused] = np.stack([tensors[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] for e in range(8)])
    write(tmp_path / "in", config, tensors)
    says = rf"model\.layers\.2\.mlp\.experts\.\d\.\w+\.weight is of one expert, and {fused} of all in that layer"
    with pytest.raises(CheckpointError, match=says):
        open_weights(tmp_path / "in")


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
@pytest.mark.parametrize("given", [jnp.int8, np.float64, "float8_e4m3fn", "nonsense"])
def test_a_dtype_that_weights_cannot_have_is_refused_by_its_argument(folder, argument, given):
    with pytest.raises(ValueError, match=f"^{argument} is .*: accepted are bfloat16, float16 and float32"):
        from_pretrained(folder, **{argument: given})
    if argument == "dtype":
        with pytest.raises(ValueError, match="^dtype is .*: accepted are bfloat16, float16 and float32"):
            save_pretrained(random_model("dense"), folder.parent / "out", dtype=given)
    assert os.listdir(folder.parent) == ["in"]


def test_arguments_of_a_conversion_are_refused_by_name(folder):
    for given in (float("nan"), -1, 0, -0.5):
        with pytest.raises(CheckpointError, match=f"max_shard_bytes is {given}: accepted is a number above 0"):
            plan_conversion(folder, folder.parent / "out", "hf", max_shard_bytes=given)
        with pytest.raises(CheckpointError, match=f"max_shard_bytes is {given}: accepted is a number above 0"):
            save_pretrained(random_model("dense"), folder.parent / "out", max_shard_bytes=given)
    unchecked = inspect.unwrap(plan_conversion)  # without the tests' own checks of types
    with pytest.raises(CheckpointError, match="to is 'torch': accepted are 'hf' and 'orbax'"):
        unchecked(folder, folder.parent / "out", "torch")
    with pytest.raises(CheckpointError, match="dtype is int8: accepted are"):
        plan_conversion(folder, folder.parent / "out", "hf", "int8")
    assert os.listdir(folder.parent) == ["in"]


def test_a_value_that_bfloat16_cannot_hold_is_refused(tmp_path):
    tensors = hub_tensors(CONFIGS["dense"])
    tensors["model.norm.weight"][3] = -3.4e38
    write(tmp_path / "in", CONFIGS["dense"], tensors)
    with pytest.raises(CheckpointError, match=r"model.norm.weight has a value of 3.4e\+38, and bfloat16 ends at 3.38953e\+38"):
        plan_conversion(tmp_path / "in", tmp_path / "out", "hf", "bfloat16").run()
    with pytest.raises(CheckpointError, match="model.norm.weight has a value of 3.4e"):
        from_pretrained(tmp_path / "in", param_dtype=jnp.bfloat16)
    tensors["model.norm.weight"][3:6] = np.inf, -np.inf, np.nan  # what is infinite stays so
    write(tmp_path / "infinite", CONFIGS["dense"], tensors)
    found = np.asarray(from_pretrained(tmp_path / "infinite", param_dtype=jnp.bfloat16).norm.weight[...], np.float32)
    np.testing.assert_array_equal(found[3:6], [np.inf, -np.inf, np.nan])


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), F32], ids=str)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_infinities_are_found_by_their_bits(dtype, value):
    values = np.linspace(-1e4, 1e4, 999).astype(dtype)
    values[:2] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
    assert not casting.any_infinite(values)
    values[77] = value
    assert casting.any_infinite(values)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "_METADATA"])
def test_an_integer_of_too_many_digits_is_refused_by_the_file(folder, native, file):
    source = native if file == "_METADATA" else folder
    content = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps(content | {"metadata": 7})[:-1] + f', "initializer_range": {"9" * 5000}}}')
    with pytest.raises(ValueError, match=f"{source / file}.*4300 digits"):
        open_weights(source)


@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_hidden_layers": 10**5}, r"config.json makes 100,000 layers; the weights hold \d+ tensors"),
        ({"num_experts": 10**5, "num_experts_per_tok": 2}, r"config.json makes [\d,]+ parameters; the weights hold [\d,]+$"),
        ({"vocab_size": 2**31 - 1}, r"config.json makes 137,[\d,]+ parameters; the weights hold [\d,]+$"),
    ],
)
def test_a_config_that_the_weights_cannot_fill_is_refused_at_once(tmp_path, form, changes, says):
    write(tmp_path / "in", CONFIGS["moe"], hub_tensors(CONFIGS["moe"]))
    if form == "orbax":
        plan_conversion(tmp_path / "in", tmp_path / "native", "orbax").run()
    source = tmp_path / ("in" if form == "hf" else "native")
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | changes))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=says):
        open_weights(source)
    assert time.perf_counter() - start < 10
    # Somewhat too large, and what is missing is said by name.
    (source / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="model.layers.4.input_layernorm.weight|the config makes it"):
        open_weights(source)
