"""What a run looks at and exports: adapters too, and what is refused before the first step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import adamw, cross_entropy, from_pretrained, generate, init_train_state, load_tokenizer, make_mesh
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from qwen3_jax.parallel.rules import TRAIN_RULES
from qwen3_jax.runs.export import check_export, export, find_words, keep_newest
from qwen3_jax.runs.look import Look, find_tokenizer, stage_at
from qwen3_jax.runs.parts import lora_config
from qwen3_jax.runs.schema import (
    CheckpointSection,
    DataSection,
    LoraSection,
    MeshSection,
    ModelSection,
    Run,
    SourceSection,
    StageSection,
    StepSection,
    WatchSection,
)
from qwen3_jax.runs.toml import RunError
from qwen3_jax.runs.train import train
from qwen3_jax.training.journal import read_lines
from qwen3_jax.training.loop import TrainingError
from qwen3_jax.tune.lora import attach, merge
from tests.chat.tiny import write_checkpoint
from tools.demo.corpus import train_tokenizer

pytestmark = pytest.mark.usefixtures("quick")

OTHER = [[{"role": "user", "content": "words of quite another kind, again and again"}]] * 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its tokenizer, a source of it, and one of another tokenizer."""
    place = tmp_path_factory.mktemp("look")
    write_checkpoint(place)
    train_tokenizer(OTHER, 300, place / "other-tokenizer")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": f"def read(path): return {at}"}) + "\n" for at in range(20)))
    for name, tokenizer in (("text", "tokenizer"), ("other", "other-tokenizer")):
        prepare([str(place / "text.jsonl")], place / name, Work(str(place / tokenizer)), workers=0)
    return place


def run_of(place, *, lora=None, source="text", **watch):
    stages = {"one": StageSection(tokens=64, batch=2, seq=16), "two": StageSection(tokens=32, batch=1, seq=16, rope_theta=2e4)}
    return Run(
        model=ModelSection(folder=str(place / "model"), compute_dtype="float32"),
        data=DataSection(sources={"text": SourceSection(folder=str(place / source))}),
        stages=stages,
        lora=lora,
        watch=WatchSection(**watch),
    )


def random_base(run):
    model = dataclasses.replace(run.model, folder=None, preset="qwen3-0.6b")
    return dataclasses.replace(run, model=model)


def test_adapters_are_looked_at_and_exported_merged(place, tmp_path):
    run = run_of(place, lora=LoraSection(rank=2), held_out=str(place / "text"), held_out_batches=1, prompts=("def",))
    mesh, adapt = make_mesh("fsdp=1", devices=jax.devices()[:1]), lora_config(run)
    assert adapt is not None
    base = from_pretrained(place / "model", mesh=mesh, dtype=jnp.float32, rules=TRAIN_RULES)
    model = attach(base, adapt, jax.random.key(0))
    pairs = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), pairs))
    state = init_train_state(model, adamw(1e-3), trainable=nnx.LoRAParam)
    look = Look(run, base.config, mesh, TRAIN_RULES)(3, state)

    export(run, base.config, run.steps, state, TRAIN_RULES, find_words(run, base.config), tmp_path / "out")
    exported = from_pretrained(tmp_path / "out", dtype=jnp.float32)
    assert exported.config.rope_theta == 2e4
    for (name, one), other in zip(
        jax.tree_util.tree_leaves_with_path(nnx.state(exported)), jax.tree.leaves(nnx.state(merge(model))), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=str(name))
    tok = load_tokenizer(tmp_path / "out")
    out = generate(exported, [tok.encode("def")], max_new_tokens=64, stop_tokens=tok.stop_token_ids)
    assert look["completions"] == {"def": tok.decode(out.tokens[0, : int(out.lengths[0])])}
    config = LoaderConfig((Source("held_out", str(place / "text")),), seed=0)
    with make_loader(config, batch=2, seq=16, process_index=0, process_count=1) as loader:
        batch = jax.tree.map(jnp.asarray, next(loader))
    loss = cross_entropy(exported(batch.tokens, segment_ids=batch.segment_ids).logits, batch.labels, batch.mask)
    np.testing.assert_allclose(look["held_out_loss"], float(loss), rtol=1e-5)
    before, after = (jax.tree.leaves(nnx.state(each)) for each in (base, exported))
    assert not all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(before, after, strict=True))


def test_a_tokenizer_is_found_where_the_run_says(place, tmp_path):
    run = run_of(place)
    found = find_tokenizer(run)
    assert found is not None and found.folder == place / "model"
    found = find_tokenizer(random_base(run))
    assert found is not None and found.folder == place / "tokenizer"
    train_tokenizer(OTHER, 300, tmp_path / "moved")
    prepare([str(place / "text.jsonl")], tmp_path / "tokens", Work(str(tmp_path / "moved")), workers=0)
    (tmp_path / "moved/tokenizer.json").write_bytes((place / "tokenizer/tokenizer.json").read_bytes())
    source = {"text": SourceSection(folder=str(tmp_path / "tokens"))}
    changed = dataclasses.replace(random_base(run), data=DataSection(sources=source))
    assert find_tokenizer(changed) is None  # there is one, and not the one that made the tokens
    mesh = make_mesh("fsdp=1", devices=jax.devices()[:1])
    asked = dataclasses.replace(changed, watch=WatchSection(prompts=("a",)))
    with pytest.raises(RunError, match="watch.prompts needs a tokenizer"):
        Look(asked, from_pretrained(place / "model").config, mesh, TRAIN_RULES)


@pytest.mark.parametrize(
    "watch, said",
    [
        ({"prompts": ("a", "")}, "watch.prompts has '', which has no tokens: accepted is text"),
        ({"held_out": "other"}, "other has been tokenised otherwise than data.sources.text: accepted is one tokenizer"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(place, watch, said):
    if "held_out" in watch:
        watch = {"held_out": str(place / watch["held_out"])}
    mesh = make_mesh("fsdp=1", devices=jax.devices()[:1])
    with pytest.raises(RunError, match=said):
        Look(run_of(place, **watch), from_pretrained(place / "model").config, mesh, TRAIN_RULES)


def test_an_export_writes_over_nothing(place, tmp_path):
    def check(folder, first):
        check_export(dataclasses.replace(run_of(place), checkpoint=CheckpointSection(export=str(folder))), first)

    check(tmp_path / "new", 0)
    check(tmp_path, 0)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunError, match="checkpoint.export .* holds something: accepted is a path where nothing stands"):
            check(folder, 3)
        check(folder, 4)  # the run is done: what stands there is its own


def test_the_newest_exports_stay_and_later_ones_do_not_count(tmp_path):
    """Step 90 is of a start that got further, before a kill; what a killed removal has left goes too."""
    for name in ("step-10", "step-20", "step-30", "step-90", ".step-5.removed", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    keep_newest(tmp_path, 30, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step-20", "step-30", "step-90"]


def test_a_run_that_stops_by_itself_is_reported(place, tmp_path):
    run = dataclasses.replace(
        run_of(place),
        output=str(tmp_path),
        mesh=MeshSection(axes="fsdp=-1"),
        stages={"one": StageSection(tokens=512, batch=8, seq=16, learning_rate=1e30)},
        step=StepSection(not_finite="stop", remat="none"),
        watch=WatchSection(every=1),
    )
    with pytest.raises(TrainingError, match="step 1: loss .*, gradient nan: the run stops by step.not_finite"):
        train(run)
    (start,) = read_lines(tmp_path / "run/starts.jsonl")
    assert (start["first"], start["step"], start["came_to"]) == (0, 2, "failed")
    assert "<td>failed</td>" in (tmp_path / "run/report.html").read_text("utf-8")


def test_a_step_is_of_its_stage(place):
    run = run_of(place)
    assert [stage_at(run, step).batch for step in range(5)] == [2, 2, 1, 1, 1]
