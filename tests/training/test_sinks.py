"""What boards are told: event files read back, and a stand-in for wandb."""

import subprocess
import sys
import threading
import types

import pytest

from qwen3_jax.training import sinks
from qwen3_jax.training.journal import Journal, read_lines
from qwen3_jax.training.sinks import Board, SinkError, TensorBoard, Wandb, check_extras, named_figures
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


class Service(types.ModuleType):
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
        boards = [Board("tensorboard", lambda first=first: TensorBoard(tmp_path / "board", first))]
        journal = Journal(tmp_path / "metrics.jsonl", first, boards=boards)
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
    board = Service()
    monkeypatch.setitem(sys.modules, "wandb", board)
    check_extras(tensorboard=False, wandb=True)
    for first in (0, 5):
        boards = [Board("wandb", lambda: Wandb(tmp_path / "wandb", "project", "name", {"seed": 1}))]
        journal = Journal(tmp_path / "metrics.jsonl", first, boards=boards)
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


# Files have a largest size, which the event file is above long before the journal.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from qwen3_jax.training.journal import Journal
from qwen3_jax.training.sinks import Board, TensorBoard

resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
folder = Path(sys.argv[1])
journal = Journal(folder / "metrics.jsonl", 0, boards=[Board("tensorboard", lambda: TensorBoard(folder / "board", 0))])
for step in range(100):
    journal.write({"step": step, "max_violation": [0.25] * 64})
journal.close()
print(journal.lost())
"""


def test_event_files_on_a_full_disk_neither_end_nor_hold_up_the_run(tmp_path):
    command = [sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(100))
    (file,) = (tmp_path / "board").iterdir()
    assert file.stat().st_size == 65536
    lost = f"tensorboard: {file} cannot be written: File too large"
    assert done.stdout == f"{[lost]}\n"
    assert done.stderr == f"{lost}: the run goes on without this board, and metrics.jsonl has every line\n"
    assert 9 < figures(tmp_path / "board")["max_violation/63"][-1][0] < 99  # what was whole is there to be read


class Faulty:
    """A sink that hangs, or fails where it is told to."""

    def __init__(self, fails=None, hangs=None):
        self.fails, self.hangs, self.lines = fails, hangs, []

    def write(self, line):
        self.lines.append(line["step"])
        if self.hangs is not None:
            self.hangs.wait()
        if self.fails == "write":
            raise ConnectionResetError("the service is gone\nand more")

    def close(self):
        if self.fails == "close":
            raise ZeroDivisionError


def lines_of(tmp_path, make, count=5):
    """A run whose board is at fault; what is said to be lost."""
    journal = Journal(tmp_path / "metrics.jsonl", 0, boards=[Board("watch.wandb", make)])
    for step in range(count):
        journal.write({"step": step})
    journal.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(count))
    return journal.lost()


def test_a_board_that_fails_is_given_up_and_told_of_once(tmp_path, caplog):
    def refused():
        raise TimeoutError("no answer")

    sink = Faulty("write")
    assert lines_of(tmp_path / "write", lambda: sink) == ["watch.wandb: ConnectionResetError: the service is gone"]
    assert sink.lines == [0]
    assert lines_of(tmp_path / "close", lambda: Faulty("close")) == ["watch.wandb: ZeroDivisionError: "]
    assert lines_of(tmp_path / "open", refused) == ["watch.wandb: TimeoutError: no answer"]
    assert [record.getMessage().partition(": ")[2].partition(":")[0] for record in caplog.records] == [
        "ConnectionResetError",
        "ZeroDivisionError",
        "TimeoutError",
    ]


def test_a_board_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "PATIENCE", 0.1)
    on = threading.Event()
    assert lines_of(tmp_path / "end", lambda: Faulty(hangs=on)) == ["watch.wandb: it has not ended 0 s after the run"]
    monkeypatch.setattr(sinks, "MOST_WAITING", 3)
    assert lines_of(tmp_path / "behind", lambda: Faulty(hangs=on), 9) == ["watch.wandb: it is 3 lines behind"]
    on.set()


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
