"""What a run is refused for at the door, before weights are read: its data's words, its mesh, a checkpoint beyond its end."""

import dataclasses
import json
import subprocess

import fsspec
import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.parallel.mesh import MeshError
from qwen3_jax.runs import parts
from qwen3_jax.runs.models import check_words
from qwen3_jax.runs.parts import about, commit, loader_config
from qwen3_jax.runs.resolve import resolve
from qwen3_jax.runs.toml import RunError
from qwen3_jax.runs.train import say_changes, train

RUN = """
output = "{place}/runs"
[model]
preset = "qwen3-0.6b"
[data.sources.small]
folder = "{place}/small"
[data.sources.large]
folder = "{place}/large"
[stages.one]
tokens = 1024
batch = 8
seq = 64
mixture = {{ small = 1 }}
[stages.two]
tokens = 1024
batch = 8
seq = 64
mixture = {{ large = 1 }}
"""


@pytest.fixture
def file(tmp_path):
    """A run whose second stage reads tokens of one word more than its model has; of the folders only the index is there."""
    for name, words in (("small", 151_936), ("large", 151_937)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(json.dumps({"version": 1, "vocab_size": words}))
    (tmp_path / "run.toml").write_text(RUN.format(place=tmp_path))
    return tmp_path / "run.toml"


def test_data_of_more_words_than_the_model_has_is_refused(file):
    said = r"data.sources.large.folder .*/large has tokens of 151,937 words, and the model's vocab_size is 151,936: accepted"
    with pytest.raises(RunError, match=said):
        train(resolve(file).run)
    held_out = ["--watch.held_out", str(file.parent / "large")]
    with pytest.raises(RunError, match=r"watch.held_out .*/large has tokens of 151,937 words"):
        train(resolve(file, held_out).run)


def test_the_index_of_a_store_is_enough():
    system = fsspec.filesystem("memory")
    system.pipe_file("/words/dataset.json", json.dumps({"version": 1, "vocab_size": 9}).encode())
    try:
        config = Qwen3Config.preset("qwen3-0.6b")
        check_words("watch.held_out", "memory://words", config)
        with pytest.raises(RunError, match="memory://words has tokens of 9 words, and the model's vocab_size is 8"):
            check_words(
                "watch.held_out", "memory://words", dataclasses.replace(config, vocab_size=8, bos_token_id=0, eos_token_id=1)
            )
    finally:
        system.rm("/words", recursive=True)


def test_slices_that_do_not_divide_the_mesh_are_refused(file):
    with pytest.raises(MeshError, match="slices=2 with data=1: accepted are slices that divide data"):
        train(resolve(file, ["--mesh.slices", "2"]).run)


def test_a_checkpoint_beyond_the_end_is_refused(file):
    (file.parent / "runs/run/checkpoints/5").mkdir(parents=True)
    said = "has a checkpoint of step 5, and the run's stages end at step 4: accepted are stages of at least 5 steps"
    with pytest.raises(RunError, match=said):
        train(resolve(file).run)


def test_copies_of_a_store_go_where_the_run_says(file):
    run = resolve(file, ["--data.cache", "/disk"]).run
    assert loader_config(run, run.stages["one"]).cache == "/disk"


def test_a_checkpoint_names_the_commit_and_a_restart_what_has_changed(file, tmp_path, monkeypatch):
    place, told = tmp_path / "checkout", []
    package = place / "package"
    package.mkdir(parents=True)

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(("git", *identity, *words), cwd=place, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def found():
        commit.cache_clear()
        return commit()

    monkeypatch.setattr(parts, "PACKAGE", package)
    try:
        (package / "__init__.py").write_text("")
        assert found() is None
        git("init", "-q")
        git("commit", "-q", "--allow-empty", "-m", "another project's")
        assert found() is None  # the package only lies there
        git("add", ".")
        git("commit", "-q", "-m", "one")
        assert found() == git("rev-parse", "HEAD")
        run = resolve(file).run
        saved = about(run)
        (package / "__init__.py").write_text("changed = True")
        assert found() == git("rev-parse", "HEAD") + ", with changes"
        say_changes(dataclasses.replace(run, seed=1), saved, told.append)
        head = saved["versions"]["commit"]
        assert told == [
            "changed since it was saved: seed 0 -> 1",
            f'changed since it was saved: versions.commit "{head}" -> "{head}, with changes"',
        ]
    finally:
        commit.cache_clear()
