"""Checkpoints of a run: to the bit, onto any mesh, the newest that is whole, and nothing of another model."""

import dataclasses
import functools
import gc
import json
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from qwen3_jax import adamw, init_train_state, make_mesh
from qwen3_jax.training import checkpoints as checkpoints_module
from qwen3_jax.training.checkpoints import Checkpoints, OtherRunError, TrainingCheckpointError, named_arrays
from qwen3_jax.training.state import abstract_train_state
from tests.parallel.test_on_mesh import on_mesh, skewed

OPTIMIZER = adamw(1e-2)
# Of a restore that fails, Orbax leaves reads behind, whose ends find the event loop closed: in a moment, on other threads.
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@functools.cache
def state_of(name="alternating", wish="fsdp=2,expert=2,tensor=2"):
    """A state whose every number is its own."""
    state = init_train_state(on_mesh(jax.tree.map(jnp.copy, skewed(name)), make_mesh(wish)), OPTIMIZER)
    leaves, tree = jax.tree.flatten(state)
    leaves = [
        jax.device_put(np.arange(leaf.size).reshape(leaf.shape).astype(leaf.dtype) + at, leaf.sharding)
        for at, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, leaves)


def like_of(name="alternating", wish="fsdp=2,expert=2,tensor=2"):
    return abstract_train_state(skewed(name).config, OPTIMIZER, make_mesh(wish))


def assert_equal(found, wanted):
    for (name, one), other in zip(named_arrays(found).items(), named_arrays(wanted).values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints, told apart by their step."""
    state = state_of()
    with Checkpoints(tmp_path / "run", keep=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step)), {"data": {"at": step}})
    return tmp_path / "run"


@pytest.mark.parametrize("wish", ["fsdp=2,expert=2,tensor=2", "expert=8", "data=2,context=4"])
def test_the_newest_is_restored_to_the_bit_on_any_mesh(saved, wish):
    like = like_of(wish=wish)
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.restore(like)
    assert found is not None and found.passed_over == {}
    assert (found.step, found.run) == (30, {"data": {"at": 30}})
    assert_equal(found.state, dataclasses.replace(state_of(), step=jnp.int32(30)))
    for one, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(like), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_arrays_are_named_by_their_place_in_the_tree():
    names = list(named_arrays(like_of("dense")))
    block = "segments.0.blocks.0"
    assert names[:2] == ["step", "params.embed.weight"]
    assert f"params.{block}.attention.q.weight" in names and f"opt_state.1.mu.{block}.mlp.down.weight" in names
    assert names[-4:] == ["guard.skipped", "guard.in_a_row", "guard.good", "guard.scale"]
    assert [name for name in names if name.startswith("opt_state") and "mu." not in name and "nu." not in name] == [
        "opt_state.1.count",
        "opt_state.3.count",
    ]


def files_of(folder, step):
    """The files that hold a checkpoint's arrays, the largest first."""
    return sorted(
        (saved for saved in (folder / str(step) / "state").rglob("*") if saved.is_file()), key=lambda f: -f.stat().st_size
    )


@pytest.fixture
def settled():
    """What a failed restore has left behind ends before another test begins."""
    yield
    time.sleep(1)
    gc.collect()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("harm", ["truncated", "deleted", "folder deleted"])
def test_a_damaged_newest_is_passed_over_and_said(saved, harm, caplog):
    if harm == "folder deleted":
        shutil.rmtree(saved / "30" / "state")
    else:  # all that hold arrays, for of some there is an older copy that nobody reads
        for victim in [file for file in files_of(saved, 30) if file.parent.name == "d"]:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2]) if harm == "truncated" else victim.unlink()
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.restore(like_of())
        assert found is not None and found.step == 20
        assert list(found.passed_over) == [30] and 10 < len(found.passed_over[30]) <= 400
        for tail in ("tensorstore_spec", "TensorStore details", "<bound method", "\n"):
            assert tail not in found.passed_over[30]
        assert not [record for record in caplog.records if record.name.startswith("qwen3_jax")]  # whoever asked says it, once
        assert_equal(found.state, dataclasses.replace(state_of(), step=jnp.int32(20)))
        # When the run comes there again it is written anew; one that is whole is left alone.
        for step in (20, 30):
            checkpoints.save(step, found.state, {"again": step})
        checkpoints.wait()
    with Checkpoints(saved) as checkpoints:
        again = checkpoints.restore(like_of())
    assert again is not None and (again.step, again.run) == (30, {"again": 30})
    assert_equal(again.state, found.state)


@pytest.mark.usefixtures("settled")
def test_with_all_damaged_the_run_is_refused(saved):
    for step in (10, 20, 30):
        for file in [file for file in files_of(saved, step) if file.parent.name == "d"]:
            file.unlink()
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(TrainingCheckpointError, match="none of its checkpoints can be read: 30: "),
    ):
        checkpoints.restore(like_of())


def test_a_save_that_fails_is_told_with_those_that_stand_and_hides_nothing(saved, monkeypatch, caplog):
    def full():
        raise OSError(28, "No space left on device")

    said = "a checkpoint cannot be written: .*No space left on device; whole ones there: 10, 20, 30"
    for error, expected in ((None, TrainingCheckpointError), (ZeroDivisionError, ZeroDivisionError)):
        with pytest.raises(expected) as raised, Checkpoints(saved) as checkpoints:
            monkeypatch.setattr(checkpoints._manager, "close", full)
            if error is not None:
                raise error
        assert re.search(said, caplog.text if error else str(raised.value))


def test_what_is_not_whole_does_not_count(saved):
    """A save that was killed leaves a folder under another name, which the next start removes."""
    left = saved / "40.orbax-checkpoint-tmp"
    shutil.copytree(saved / "30", left)
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]
        found = checkpoints.restore(like_of())
    assert found is not None and found.step == 30
    assert not left.exists()


@pytest.mark.parametrize(
    "name, said",
    [
        ("dense", r"run/30 has opt_state.1.mu.segments.0.blocks.1.*accepted is a checkpoint of this run's model"),
        ("moe", "run/30 "),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, name, said):
    with Checkpoints(saved) as checkpoints, pytest.raises(OtherRunError, match=said):
        checkpoints.restore(like_of(name))


def test_the_newest_are_kept_and_some_for_good(tmp_path):
    state = state_of("dense", "fsdp=8")
    with Checkpoints(tmp_path / "run", keep=2, keep_every=20) as checkpoints:
        for step in (10, 20, 30, 40, 50, 60):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 40, 50, 60]
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.restore(like_of("dense", "fsdp=8")) is None


def test_chunks_are_a_layer_and_an_expert(tmp_path, monkeypatch):
    """So that whoever restores reads the layers and experts that it wants, and no others."""
    monkeypatch.setattr(checkpoints_module, "LEAST_CHUNK", 1)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(30, state_of(), {})
    saved, found = tmp_path / "run", {}
    for name in ("params.segments.0.blocks.1.moe.gate", "params.segments.0.blocks.0.attention.q.weight"):
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{saved}/30/state", "path": f"{name}/"},
        }
        store = ts.open(spec, open=True).result()
        found[name] = (store.shape, store.chunk_layout.read_chunk.shape)
    shape, chunk = found["params.segments.0.blocks.1.moe.gate"]
    assert shape[:2] == (2, 8) and chunk[:2] == (1, 1)
    shape, chunk = found["params.segments.0.blocks.0.attention.q.weight"]
    assert shape[0] == 2 and chunk[0] == 1


def test_json_beside_the_arrays_is_plain(saved):
    text = next((saved / "30" / "run").rglob("metadata"), None)
    assert text is not None and json.loads(text.read_text()) == {"data": {"at": 30}}


def test_a_bucket_that_fails_is_told_as_the_checkpoints(saved, monkeypatch):
    """The libraries that reach one have no common base of their errors; without one, another error is a fault of the code."""

    class Lost(Exception):
        pass

    def fails(*given):
        raise Lost("no answer")

    with Checkpoints(saved) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "wait_until_finished", fails)
            with pytest.raises(Lost):
                checkpoints.wait()
            patch.setattr(checkpoints, "_in_bucket", True)
            with pytest.raises(TrainingCheckpointError, match="cannot be written: no answer; whole ones there: 10, 20, 30$"):
                checkpoints.wait()
            patch.setattr(checkpoints._manager, "reload", fails)
            with pytest.raises(TrainingCheckpointError, match="no answer; whole ones there: it does not say$"):
                checkpoints.wait()
