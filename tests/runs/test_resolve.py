"""A run out of files and the command line: values, where they are from, and what is refused with file and line."""

import pytest

from qwen3_jax.cli.main import main
from qwen3_jax.runs.resolve import resolve
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.show import keys
from qwen3_jax.runs.toml import RunError

BASE = """\
name = "base"

[model]
preset = "qwen3-0.6b"

[data.sources.web]
folder = "prepared/web"
max_tokens = 4096

[watch]
prompts = [
  "a",
  "b",
]

[stages.first]
tokens = 1_048_576
batch = 8
seq = 4096

[stages.second]
tokens = 32768
batch = 8
seq = 4096
"""
RUN = """\
extends = "base.toml"

[optimizer]
b2 = 0.99

[stages.first]
learning_rate = 1e-3
mixture = { web = 2 }
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def changed(run, old, new, name="run.toml"):
    path = run.parent / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_values_are_the_last_given_and_keep_their_origin(run):
    found = resolve(run, ["--optimizer.b1", "0.8", "--stages.second.seq=2048", "--mesh.axes", "fsdp=8"])
    assert found.run.name == "base"
    assert list(found.run.stages) == ["first", "second"]
    first, second = found.run.stages.values()
    assert (first.tokens, first.learning_rate, dict(first.mixture)) == (1048576, 1e-3, {"web": 2.0})
    assert (second.seq, second.learning_rate, second.steps) == (2048, 3e-4, 2)
    assert found.run.watch.prompts == ("a", "b")
    assert (found.run.optimizer.b1, found.run.optimizer.b2, found.run.mesh.axes) == (0.8, 0.99, "fsdp=8")
    base, own = run.parent / "base.toml", run
    origins = {".".join(key): origin for key, origin in found.origins.items()}
    assert origins["name"] == f"{base}:1"
    assert origins["watch.prompts"] == f"{base}:11"
    assert origins["stages.first.tokens"] == f"{base}:17"
    assert origins["optimizer.b2"] == f"{own}:4"
    assert origins["stages.first.mixture.web"] == f"{own}:8"
    assert origins["stages.second.seq"] == origins["optimizer.b1"] == "command line"
    assert origins["checkpoint.every"] == "default"


def test_every_origin_names_a_value_and_the_other_way_around(run):
    found = resolve(run)
    for key in found.origins:
        found.value(key)
    plain = {key for key, _, _ in keys(Run) if "NAME" not in key and not key.startswith("lora")}
    assert plain <= {".".join(key) for key in found.origins}


@pytest.mark.parametrize("line", ["rank = 8", ""])
def test_an_optional_section_is_there_once_it_is_named(run, line):
    assert resolve(run).run.lora is None
    changed(run, "[optimizer]", f"[lora]\n{line}\n[optimizer]")
    changed(run, 'preset = "qwen3-0.6b"', 'preset = "qwen3-0.6b"\nfolder = "there"', "base.toml")
    lora = resolve(run).run.lora
    assert lora is not None and lora.rank == (8 if line else 16)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("[optimizer]\nb2", "[optimiser]\nb2", r"run.toml:4: unknown key optimiser: did you mean optimizer\?"),
        ("b2 = 0.99", "beta2 = 0.99", r"run.toml:4: unknown key optimizer.beta2: .*accepted are name, b1, b2"),
        (
            "learning_rate",
            "learning_rat",
            r"run.toml:7: unknown key stages.first.learning_rat: did you mean stages.first.learning_rate\?",
        ),
        ("b2 = 0.99", 'b2 = "0.99"', r"run.toml:4: optimizer.b2 is '0.99': accepted is float"),
        ("b2 = 0.99", "b2 = true", r"run.toml:4: optimizer.b2 is True: accepted is float"),
        ("b2 = 0.99", "b2 = 1.0", r"optimizer.b2 is 1.0: accepted is from 0 to below 1; optimizer.b2 is from .*run.toml:4"),
        ("b2 = 0.99", 'name = "sgd"', r"run.toml:4: optimizer.name is 'sgd': accepted are adamw, muon"),
        ("[optimizer]\nb2 = 0.99", "optimizer = 3", r"run.toml:3: optimizer is 3: accepted is a section, \[optimizer\]"),
        ("b2 = 0.99", "b2 = { x = 1 }", r"run.toml:4: optimizer.b2 is a table: accepted is a value"),
        ("b2 = 0.99", "b2 = ", r"run.toml: Invalid value \(at line 4"),
        (
            "mixture = { web = 2 }",
            "mixture = { wbe = 2 }",
            r"mixture names wbe, which is no source: accepted are web; .*run.toml:8",
        ),
        ("mixture = { web = 2 }", "mixture = { web = 0 }", r"stages.first.mixture.web is 0.0: accepted is a weight above 0"),
        (
            "mixture = { web = 2 }",
            "batch = 7",
            r"1048576, 36.57 steps of 7 x 4096 .*as 1032192 or 1060864; .*base.toml:17; .*run.toml:8",
        ),
        (
            "mixture = { web = 2 }",
            "accumulation = 3",
            r"batch is 8 rows in 3 parts: 8 / 3 leaves 2; stages.first.batch is from .*:18",
        ),
        ("mixture = { web = 2 }", "warmup = 1048577", r"warmup and decay are 1048577 tokens of a stage of 1048576"),
        ("mixture = { web = 2 }", "decay = 4096", r"decay with schedule cosine: accepted is warmup-stable-decay"),
        ('extends = "base.toml"', 'extends = "none.toml"', r"none.toml: No such file"),
        ('extends = "base.toml"', 'extends = "run.toml"', r"extends itself, by way of run.toml -> run.toml"),
        ('extends = "base.toml"', "extends = 3", r"run.toml:1: extends is 3"),
        ("[optimizer]\nb2 = 0.99", "[lora]", r"lora on random weights: accepted is a base that is trained"),
        (
            "[optimizer]\nb2 = 0.99",
            '[checkpoint]\nexport_form = "adapter"',
            r"export_form is adapter and the run has no adapters: accepted is merged, or a section \[lora\]; .*run.toml:4",
        ),
        (
            "[optimizer]\nb2 = 0.99",
            "[checkpoint]\nexport_keep = 2",
            r"export_keep without checkpoint.export_every: .*run.toml:4",
        ),
        ("[optimizer]\nb2 = 0.99", "[watch]\nprofile = [3, 999]", r"watch.profile is steps 3 to 999 of 33"),
        ("[optimizer]\nb2 = 0.99", '[step]\nremat = "some"', r"step.remat: remat policy 'some'.*run.toml:4"),
        (
            "[optimizer]\nb2 = 0.99",
            "[model.config]\nnum_expert = 4",
            r"run.toml:4: unknown key model.config.num_expert: did you mean model.config.num_experts\?",
        ),
        (
            "[optimizer]\nb2",
            '[model]\nconfig.hidden_size = "big"\n[optimizer]\nb2',
            r":4: model.config.hidden_size is 'big': .* int",
        ),
        (
            "[optimizer]\nb2 = 0.99",
            "[model.config]\nnum_experts = 4\n\nnum_experts_per_tok = 99",
            r"num_experts_per_tok 99 is above num_experts 4; model.preset is from .*base.toml:4; model.config.num_experts is "
            r"from .*run.toml:4; model.config.num_experts_per_tok is from .*run.toml:6",
        ),
        (
            "[optimizer]\nb2 = 0.99",
            "[model.config.rope_scaling]\nfactor = 4",
            r"run.toml:4: model.config.rope_scaling is a table",
        ),
        ("[optimizer]\nb2 = 0.99", '[model]\npreset = "qwen3-9b"', r"qwen3-9b.*; model.preset is from .*run.toml:4"),
        ("mixture = { web = 2 }", "rope_theta = 0.5", r"rope_theta is 0.5: accepted is a number above 1; .*run.toml:8"),
        (
            "mixture = { web = 2 }",
            "tokens = 3072",
            r"tokens is 3072, 0.09 steps of 8 x 4096 tokens: accepted is a multiple of 32768, as 32768; ",
        ),
    ],
)
def test_bad_runs_are_refused_with_file_line_and_key(run, old, new, said):
    changed(run, old, new)
    with pytest.raises(RunError, match=said):
        resolve(run)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--optimizer.b3", "1"], "command line: unknown key optimizer.b3: did you mean optimizer.b[12]"),
        (["--optimizer.b1"], "--optimizer.b1 on the command line has no value"),
        (["b1=3"], "'b1=3' on the command line: accepted are --section.key value"),
        (["--optimizer.b1", "fast"], "command line: optimizer.b1 is 'fast': accepted is float"),
        (["--stages", "{}"], "the run has no stages"),
        (["--data", "{}"], r"the run has no data: accepted is at least one source, \[data.sources.NAME\]"),
        (["--model.config.num_expert", "4"], "command line: unknown key model.config.num_expert: did you mean"),
        (["--model.config.head_dim", "3"], "head_dim is 3: .*model.config.head_dim is from command line"),
    ],
)
def test_bad_words_are_refused(run, words, said):
    with pytest.raises(RunError, match=said):
        resolve(run, words)


@pytest.mark.parametrize("word", ["nan", "7", "true", "2026-01-31", "[1]", "plain"])
def test_a_word_stays_a_word_where_a_string_is_wanted(run, word):
    found = resolve(run, ["--name", word, "--watch.wandb", word, "--watch.prompts", '["a"]', "--data.cache", "'7'"]).run
    assert (found.name, found.watch.wandb, found.watch.prompts, found.data.cache) == (word, word, ("a",), "7")


def test_print_config_shows_values_and_origins(run, capsys):
    assert main(["train", str(run), "--print-config", "--seed", "7"]) == 0
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.count("│") >= 4}
    assert "7" in lines["seed"] and "command line" in lines["seed"]
    assert "0.99" in lines["optimizer.b2"] and f"{run}:4" in lines["optimizer.b2"]


def test_every_key_says_what_it_is():
    found = list(keys(Run))
    assert len(found) > 60
    assert [key for key, _, what in found if len(what) < 5] == []
