"""Where a run keeps its checkpoints: named after the run, and a bucket only where its library is there."""

import dataclasses
import sys

import pytest
from etils.epath import backend

from qwen3_jax.checkpoint.together import Team
from qwen3_jax.runs import places
from qwen3_jax.runs.places import check_shared, check_store, checkpoint_folder
from qwen3_jax.runs.schema import CheckpointSection, Run
from qwen3_jax.runs.toml import RunError

RUN = Run(name="small", output="runs")
BUCKET = dataclasses.replace(RUN, checkpoint=CheckpointSection(folder="gs://bucket/runs"))


def test_checkpoints_of_two_runs_never_meet():
    assert str(checkpoint_folder(RUN)) == "runs/small/checkpoints"
    assert str(checkpoint_folder(BUCKET)) == "gs://bucket/runs/small"
    assert str(checkpoint_folder(dataclasses.replace(BUCKET, name="other"))) == "gs://bucket/runs/other"


def test_a_bucket_without_its_library_is_refused(monkeypatch):
    check_store(RUN)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RunError, match=r"gs://bucket/runs needs gcsfs: `pip install qwen3-jax\[gcs\]`"):
        check_store(BUCKET)


class Denied(Exception):
    """As the libraries of a store raise them: of no common base."""


def test_a_bucket_that_refuses_is_one_refusal(monkeypatch):
    def refuse(*given, **options):
        raise Denied("no right to write\nto this bucket")

    monkeypatch.setattr(backend._FileSystemSpecBackend, "makedirs", refuse)
    with pytest.raises(RunError, match=r"^gs://bucket/runs/small cannot be written: Denied: no right to write: accepted as"):
        check_shared(BUCKET)


def test_a_folder_that_is_not_shared_is_named_by_its_own_key(monkeypatch, tmp_path):
    """Two processes, of which the other one sees the folder of checkpoints, and not the run's own."""
    said = iter([""] * 6 + ["far", ""])  # by the other one: of each folder, that it went well three times, and who is blind

    class Two(Team):
        def told(self, message):
            return [message, message or next(said)]

    monkeypatch.setattr(places, "all_processes", lambda: Two(2, 0))
    section = CheckpointSection(folder=str(tmp_path / "shared"), export_every=5)
    run = dataclasses.replace(RUN, output=str(tmp_path / "own"), checkpoint=section)
    with pytest.raises(RunError, match=r"own/small: what process 0 .* process 1 on far: accepted as output is"):
        check_shared(run)
