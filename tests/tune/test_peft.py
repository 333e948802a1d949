"""Adapter folders: PEFT's own read to its logits, ours the same to the bit after any way round, all else refused by name."""

import errno
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import abstract_model, make_mesh
from qwen3_jax.checkpoint.names import slots
from qwen3_jax.checkpoint.pretrained import parameters
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.safetensors import Plan, read_header, write_file
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.tune import peft
from qwen3_jax.tune.lora import LoraConfig, attach, config_of
from qwen3_jax.tune.peft import load_adapter, misread, save_adapter
from qwen3_jax.tune.peft_config import Told, from_peft, to_peft
from qwen3_jax.tune.peft_names import adapter_slots, modules
from tests.checkpoint.folders import files
from tests.model.models import CONFIGS, random_model
from tests.parity.build import filled_model
from tests.tune import peft_cases
from tests.tune.test_lora import LORA, adapted, on_mesh

pytestmark = pytest.mark.usefixtures("quick")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def contents(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_header(folder / WEIGHTS).items()}


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    (folder / WEIGHTS).unlink()
    write_file(Plan(folder / WEIGHTS, {name: (t.dtype, t.shape) for name, t in tensors.items()}), iter(tensors.values()))


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=jax.tree_util.keystr(path))


@pytest.mark.filterwarnings("ignore:.* on transformers 5 PEFT does not read")
@pytest.mark.parametrize("name", peft_cases.WRITTEN_BY_PEFT)
def test_what_peft_writes_has_pefts_logits_and_goes_back_to_the_bit(name, tmp_path):
    content, told, major = peft_cases.WRITTEN_BY_PEFT[name]
    base = filled_model(content)
    model = load_adapter(base, FIXTURES / name)
    assert config_of(model).rank == told["r"]
    expected = np.load(FIXTURES / name / "expected.npz")
    assert str(expected["versions"]).startswith(f"transformers {major}.")
    run = jax.jit(lambda model: model(jnp.asarray(peft_cases.words())).logits[0])
    logits = run(model)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    assert float(jnp.abs(logits - run(base)).max()) > 1
    save_adapter(model, tmp_path / "again")
    if "target_parameters" in told:  # of experts together: written one by one
        assert_same(load_adapter(base, tmp_path / "again"), model)
        return
    found, wanted = contents(tmp_path / "again"), contents(FIXTURES / name)
    assert found.keys() == wanted.keys()
    for tensor, values in wanted.items():
        np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)


@pytest.mark.parametrize("config", [CONFIGS["bias"], CONFIGS["alternating"]])
def test_the_table_is_a_bijection_between_names_and_places(config):
    """Every element of every factor is in one tensor, and each name leads back to its matrix in the table of weights."""
    found = adapter_slots(config, LORA)
    model = abstract_model(config, adapt=LORA)
    shapes = {path: leaf.shape for path, leaf in parameters(nnx.state(model, nnx.LoRAParam)).items()}
    by_name = {slot.name: (slot.path, slot.index) for slot in found}
    by_place = {place: name for name, place in by_name.items()}
    assert len(by_name) == len(by_place) == len(found)
    assert {path for path, _ in by_place} == shapes.keys()
    for path, shape in shapes.items():
        parts = [slot for slot in found if slot.path == path]
        assert {(*slot.index, *slot.part) for slot in parts} == {
            (*index, *shape[len(index) :]) for index in np.ndindex(shape[: len(parts[0].index)])
        }
    weights = {slot.name: slot for slot in slots(config)}
    for slot in found:
        assert slot.name.startswith("base_model.model.model.layers.")
        factor = slot.name.split(".")[-2]
        weight = weights[slot.name.removeprefix("base_model.model.").replace(f".{factor}.weight", ".weight")]
        assert weight.index == slot.index
        assert slot.shape == {"lora_A": (4, weight.shape[1]), "lora_B": (weight.shape[0], 4)}[factor]


def test_round_trip_on_one_device_and_on_a_mesh(tmp_path):
    """Bits of the factors, bytes of the files, and layouts as `attach` makes them."""
    name, wish = "alternating", "fsdp=2,expert=2,tensor=2"
    model = adapted(name)
    with pytest.warns(UserWarning, match="one: on transformers 5 PEFT does not read adapters of mlp.gate, .* merge them"):
        save_adapter(model, tmp_path / "one", base=Path("models/base"))
    warnings.filterwarnings("ignore", message=".* on transformers 5 PEFT does not read")
    read = load_adapter(random_model(name), tmp_path / "one")
    assert_same(read, model)
    assert config_of(read) == LORA
    save_adapter(read, tmp_path / "two", "models/base")
    spread = on_mesh(model, make_mesh(wish), RULES)
    save_adapter(spread, tmp_path / "mesh", "models/base")
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "mesh")
    assert files(tmp_path / "one").keys() == {WEIGHTS, CONFIG}
    again = load_adapter(on_mesh(random_model(name), make_mesh(wish), RULES, adapt=None), tmp_path / "one")
    assert_same(again, spread)
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(spread), strict=True):
        assert leaf.sharding == other.sharding


@pytest.mark.parametrize(
    "name, targets, says",
    [
        ("dense", ("attention", "mlp.up"), None),
        ("moe", ("attention", "moe"), None),
        ("moe", ("moe.down",), None),
        ("moe", ("moe.gate", "moe.up"), "moe.gate, moe.up without the other matrices of experts"),
        ("moe", ("moe.gate",), "moe.gate without the other matrices of experts"),
        ("alternating", ("attention",), None),
        ("alternating", ("attention", "mlp.up"), "mlp.up in a model of dense and MoE layers"),
        ("alternating", ("moe",), "moe.gate, moe.up, moe.down in a model of dense and MoE layers"),
    ],
)
def test_what_transformers_5_misreads_is_known(name, targets, says):
    """The cases of docs/lora.md, measured by tools/make_peft_fixtures.py."""
    assert misread(CONFIGS[name], LoraConfig(rank=4, targets=targets)) == says


def test_dtypes_are_kept_or_chosen(tmp_path):
    graph, factors, base = nnx.split(adapted("dense"), nnx.LoRAParam, ...)
    factors = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), factors)
    model = nnx.merge(graph, factors, base)
    save_adapter(model, tmp_path / "out")
    assert {values.dtype for values in contents(tmp_path / "out").values()} == {np.dtype(jnp.bfloat16)}
    assert_same(load_adapter(random_model("dense"), tmp_path / "out"), model)
    wide = load_adapter(random_model("dense"), tmp_path / "out", param_dtype=jnp.float32)
    assert_same(wide, nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), factors), base))


def test_config_of_tells_alpha_to_the_bit():
    model = attach(random_model("dense"), LoraConfig(rank=1, targets=("attention.q",)), jax.random.key(0))
    pair = model.segments[0].blocks[0].attention.q.lora
    alphas = [*np.random.default_rng(0).uniform(0.01, 100, 40), 0.1, 1 / 3, 16.0, 1e-3]
    for rank, alpha in itertools.product((1, 3, 7, 16, 48, 100), map(float, alphas)):
        for wanted in (LoraConfig(rank, alpha), LoraConfig(rank, alpha * rank**0.5)):
            pair.scale = wanted.scale
            pair.b.set_value(jax.ShapeDtypeStruct((4, 4, 16, rank), jnp.float32))
            assert config_of(model).scale == wanted.scale
    assert config_of(model).targets == ("attention.q",)
    pair.scale = LoraConfig(48, 16.0).scale
    pair.b.set_value(jax.ShapeDtypeStruct((4, 4, 16, 48), jnp.float32))
    assert config_of(model).alpha == 16


def put(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=6) | fields))
    return folder


SINGLE = [f"{module}.{name}" for module, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))) for name in names]


@pytest.mark.parametrize("name", ["dense", "moe", "alternating"])
def test_targets_are_told_as_peft_matches_names(name, tmp_path):
    """Whatever is wanted: what is written means those modules and no other, and reads back as the same targets."""
    config, found = CONFIGS[name], modules(CONFIGS[name])
    singles = [
        *SINGLE[:4],
        *(["moe.gate", "moe.up", "moe.down"] if name != "dense" else []),
        *(SINGLE[4:] if name != "moe" else []),
    ]
    wholes = ["attention", *(["mlp"] if name != "moe" else []), *(["moe"] if name != "dense" else [])]
    for wanted in [
        *((target,) for target in singles),
        *itertools.combinations(wholes, 2),
        tuple(wholes),
        ("attention.q", singles[-1]),
    ]:
        lora = LoraConfig(rank=4, alpha=6.0, targets=wanted)
        told = to_peft(config, lora, None)
        assert set(from_peft(put(tmp_path, **told), config).lora.targets) == set(wanted)
        meant = {module for module in found if _matches(told["target_modules"], module)}
        assert meant == {module for module, matrix in found.items() if matrix is not None and lora.wants(*matrix)}


def _matches(told: list[str] | str, module: str) -> bool:
    """PEFT's rule, as its LoraConfig documents it."""
    if isinstance(told, str):
        return re.fullmatch(told, module) is not None
    return any(module == end or module.endswith("." + end) for end in told)


def test_fields_are_read_as_what_they_mean_or_refused_by_name(tmp_path):
    config = CONFIGS["alternating"]
    whole = dict(target_modules=["q_proj", "v_proj"])
    read: list[tuple[dict[str, Any], LoraConfig]] = [
        (whole, LoraConfig(4, 6, ("attention.q", "attention.v"))),
        (dict(whole, use_rslora=True), LoraConfig(4, 12, ("attention.q", "attention.v"))),
        (
            dict(whole, lora_dropout=0.1, peft_version="9", init_lora_weights="gaussian"),
            LoraConfig(4, 6, ("attention.q", "attention.v")),
        ),
        (
            dict(whole, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 6}),
            LoraConfig(4, 6, ("attention.q", "attention.v")),
        ),
        (dict(whole, layers_to_transform=[0, 1, 2, 3]), LoraConfig(4, 6, ("attention.q", "attention.v"))),
        (dict(target_modules=r".*\.(q|k|v|o)_proj"), LoraConfig(4, 6, ("attention",))),
        (dict(target_modules=["up_proj"], exclude_modules=r".*experts.*"), LoraConfig(4, 6, ("mlp.up",))),
        (dict(target_modules=["mlp.up_proj"]), LoraConfig(4, 6, ("mlp.up",))),
    ]
    for fields, wanted in read:
        assert from_peft(put(tmp_path, **fields), config) == Told(wanted)
    refused: list[tuple[dict[str, Any], str]] = [
        (dict(whole, peft_type="IA3"), "peft_type is 'IA3'; accepted is 'LORA'"),
        (dict(whole, task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'; accepted is null or 'CAUSAL_LM'"),
        (dict(whole, use_dora=True), "use_dora is True; accepted is nothing"),
        (dict(whole, bias="all"), "bias is 'all'; accepted is null or 'none'"),
        (dict(whole, modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]; accepted is nothing"),
        (dict(whole, rank_pattern={"q_proj": 8}), r"rank_pattern is \{'q_proj': 8\}; accepted is 4 for all matrices"),
        (dict(whole, alpha_pattern={"q_proj": 8}), r"alpha_pattern is \{'q_proj': 8\}; accepted is 6 for all matrices"),
        (dict(whole, layers_to_transform=[0, 1]), r"layers_to_transform is \[0, 1\]; accepted is null, or all of the 4 layers"),
        (dict(whole, fan_in_fan_out=True), "fan_in_fan_out is True; accepted is nothing"),
        (dict(whole, lora_bias=True), "lora_bias is True; accepted is nothing"),
        (
            dict(whole, target_parameters=["mlp.gate.weight"]),
            "target_parameters is .*; accepted is mlp.experts.gate_up_proj and",
        ),
        (dict(whole, target_parameters=["1.mlp.experts.down_proj"]), "accepted is .* in every layer with experts"),
        (dict(whole, target_parameters="down_proj"), "target_parameters is 'down_proj'; accepted is a list of names"),
        (
            dict(target_modules=["up_proj"], target_parameters=["gate_up_proj"]),
            "accepted is without model.layers.1.mlp.experts.0.up_proj, which target_parameters mean too",
        ),
        (
            dict(target_parameters=["gate_up_proj"], rank_pattern={".*[.]gate_up_proj": 8}),
            "rank_pattern is .*; accepted is 4 for all matrices",
        ),
        (dict(whole, not_yet_known={"x": 1}), "not_yet_known is .*; accepted is nothing"),
        (dict(whole, init_lora_weights="pissa"), "init_lora_weights is 'pissa'; accepted is null or True"),
        (dict(whole, use_rslora="yes"), "use_rslora is 'yes'; accepted is null or False or True"),
        (dict(whole, r=0), "r is 0; accepted is a whole number above 0"),
        (dict(whole, r=2.5), "r is 2.5; accepted is a whole number above 0"),
        (dict(whole, r=None), "r is None; accepted is a whole number above 0"),
        (dict(whole, lora_alpha="6"), "lora_alpha is '6'; accepted is a number above 0"),
        (dict(), "target_modules is None; accepted is names of this model's modules"),
        (dict(target_modules=7), "target_modules is 7; accepted is a list of names or a regular expression"),
        (
            dict(target_modules="("),
            r"target_modules is '\('; accepted is a list of names or a regular expression, and this one is none",
        ),
        (dict(target_modules=["gate"]), "accepted is without model.layers.1.mlp.gate: adapters stand beside"),
        (dict(target_modules=["q_proj", "lm_head"]), "accepted is without lm_head"),
        (
            dict(target_modules=["0.self_attn.q_proj"]),
            "means model.layers.0.self_attn.q_proj and leaves out model.layers.1.self_attn",
        ),
        (
            dict(target_modules=["experts.0.up_proj"]),
            "means model.layers.1.mlp.experts.0.up_proj and leaves out .*experts.1.up_proj",
        ),
    ]
    for fields, says in refused:
        with pytest.raises(CheckpointError, match=says) as error:
            from_peft(put(tmp_path, **fields), config)
        assert str(error.value).startswith(str(tmp_path / CONFIG))


def test_tensors_are_all_there_none_left_over_each_of_its_shape(tmp_path):
    model, base = adapted("dense"), random_model("dense")
    save_adapter(model, tmp_path / "good")
    good = contents(tmp_path / "good")
    prefix = "base_model.model.model.layers.2.self_attn.q_proj"
    changes: list[tuple[dict[str, Any], str]] = [
        ({f"{prefix}.lora_A.weight": None}, f"tensors are 1 missing: {prefix}.lora_A.weight$"),
        ({f"{prefix}.magnitude": np.zeros(3, np.float32)}, f"tensors are 1 left over: {prefix}.magnitude$"),
        (
            {f"{prefix}.lora_A.weight": np.zeros((2, 32), np.float32)},
            rf"1 of another shape: {prefix}.lora_A.weight \[2, 32\], accepted is \[4, 32\]$",
        ),
        (
            {f"{prefix}.lora_B.weight": np.zeros((64, 4), np.int32)},
            f"1 of a dtype other than .*: {prefix}.lora_B.weight int32$",
        ),
        ({**dict.fromkeys(list(good)[:6]), "x": np.zeros(1, np.float32)}, "6 missing: .*; ...[.] 1 left over: x$"),
    ]
    for change, says in changes:
        rewrite(tmp_path / "good", {name: values for name, values in (good | change).items() if values is not None})
        with pytest.raises(CheckpointError, match=says):
            load_adapter(base, tmp_path / "good")
    rewrite(tmp_path / "good", good)
    assert_same(load_adapter(base, tmp_path / "good"), model)


def test_what_is_refused(tmp_path, monkeypatch):
    model = adapted("dense")
    with pytest.raises(ValueError, match="the model has no adapters: accepted is one that `attach` gave them"):
        save_adapter(random_model("dense"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="out is not empty: accepted is an empty or new folder"):
        save_adapter(model, tmp_path / "out")
    before = files(tmp_path / "out")

    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(peft, "write_json", full)  # the last file of the folder
        with pytest.raises(CheckpointError, match="adapter_config.json: No space left on device"):
            save_adapter(model, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    save_adapter(model, tmp_path / "out", "Qwen/Qwen3-0.6B", overwrite=True)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    with pytest.raises(ValueError, match="the model has adapters already"):
        load_adapter(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="param_dtype is int8: accepted are bfloat16, float16 and float32"):
        load_adapter(random_model("dense"), tmp_path / "out", param_dtype=jnp.int8)
    (tmp_path / "out" / WEIGHTS).rename(tmp_path / "out" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="out: adapter_model.safetensors is not there; accepted is a folder with"):
        load_adapter(random_model("dense"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere: adapter_config.json is not there; accepted is a folder with"):
        load_adapter(random_model("dense"), tmp_path / "nowhere")
