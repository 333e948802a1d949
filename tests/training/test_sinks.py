"""What boards are told: event files read back, and a stand-in for wandb."""

import sys
import types

import pytest

from qwen3_jax.training.journal import Journal
from qwen3_jax.training.sinks import SinkError, TensorBoard, Wandb, check_extras, named_figures
from tests.training.events import events, figures

LINE = {
    "step": 4,
    "stage": "first",
    "time": 1.0,
    "loss": 2.5,
    "mfu": None,
    "grad_norm": float("nan"),
    "max_violation": [0.25, 0.5],
    "expert_load": [[0.25, 0.75], [0.5, 0.5]],
    "completions": {"a": "bc"},
}


class Board(types.ModuleType):
    """What this code uses of wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.metrics, self.logged, self.finished = [], [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, figures):
        self.logged.append(figures)

    def finish(self):
        self.finished += 1

    def Histogram(self, values):
        return ("histogram", values)


def test_event_files_hold_the_journals_lines(tmp_path):
    for first in (0, 4):
        sinks = [TensorBoard(tmp_path / "board", first)]
        journal = Journal(tmp_path / "metrics.jsonl", first, sinks=sinks)
        for step in range(first, 5):
            journal.write(LINE | {"step": step})
        journal.close()
    found = figures(tmp_path / "board")
    assert found["loss"] == [(0, 2.5), (1, 2.5), (2, 2.5), (3, 2.5), (4, 2.5), (4, 2.5)]
    assert set(found) == {"loss", "max_violation/0", "max_violation/1"}
    assert found["max_violation/1"][-1] == (4, 0.5)
    told = events(tmp_path / "board")
    # A start anew: whoever shows the files leaves out what was said of this step and of later ones before.
    assert [event.step for event in told if event.session_log.status == event.session_log.START] == [4]
    loads = [value.histo for event in told for value in event.summary.value if value.tag == "expert_load/0"]
    assert (loads[-1].num, loads[-1].sum) == (2, 1.0)
    texts = [value.tensor.string_val[0] for event in told for value in event.summary.value if "completions" in value.tag]
    assert texts[-1] == b"**a** bc"


def test_wandb_is_told_and_a_restart_goes_on_with_its_run(tmp_path, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    check_extras(tensorboard=False, wandb=True)
    for first in (0, 5):
        sinks = [Wandb(tmp_path / "wandb", "project", "name", {"seed": 1})]
        journal = Journal(tmp_path / "metrics.jsonl", first, sinks=sinks)
        journal.write(LINE)
        journal.close()
    one, other = board.inits
    assert one == other and one["resume"] == "allow" and len(one["id"]) == 12
    assert (one["project"], one["name"], one["config"]) == ("project", "name", {"seed": 1})
    assert one["dir"] == str(tmp_path)  # where wandb makes a folder of its name
    assert board.metrics == [("step", None), ("*", "step")] * 2
    assert (
        board.logged
        == [
            {
                "step": 4,
                "loss": 2.5,
                "max_violation/0": 0.25,
                "max_violation/1": 0.5,
                "expert_load/0": ("histogram", [0.25, 0.75]),
                "expert_load/1": ("histogram", [0.5, 0.5]),
                "completions/0": "**a** bc",
            }
        ]
        * 2
    )
    assert board.finished == 2


def test_other_processes_tell_nobody(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl", 0, writes=False)
    journal.write(LINE)
    journal.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_an_extra_that_is_missing_is_named(monkeypatch, extra, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SinkError, match=rf"watch.{extra} needs {module}: `pip install qwen3-jax\[{extra}\]`"):
        check_extras(**{"tensorboard": False, "wandb": False, extra: True})


def test_figures_that_are_not_finite_are_left_out():
    assert named_figures({"step": 1, "loss": "nan", "rates": ["inf", 2.0]}) == {"rates/1": 2.0}
