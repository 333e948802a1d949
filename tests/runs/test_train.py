"""A run as a process of its own: its curve, its exports, what it is told to and looked at by, and starts that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import cross_entropy, from_pretrained, generate, load_tokenizer
from qwen3_jax.checkpoint.pretrained import nested, parameters
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from qwen3_jax.training.journal import read_lines
from tests.model.models import QUICK
from tests.runs.launch import arrays_of, begin, finish
from tests.training.events import figures


def test_a_run_learns_in_its_stages(straight):
    found, arrays = straight
    lines = [line for line in found if "loss" in line]
    assert [line["stage"] for line in lines] == ["first"] * 6 + ["second"] * 8
    assert [line["tokens_seen"] for line in lines] == [512 * n for n in range(1, 15)]
    assert np.mean([line["loss"] for line in lines[-3:]]) < 0.8 * lines[0]["loss"]
    assert int(arrays["step"]) == 14 and int(arrays["guard.skipped"]) == 0


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
    logits = jax.jit(lambda model: model(jnp.arange(24).reshape(2, 12)).logits, compiler_options=QUICK)
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
