"""The demo's verdicts, its learning rate for short runs, and its one screen; the demo itself is `make demo`."""

import io
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qwen3_jax import ThinkingBudget
from tools.demo.__main__ import PEAK_RATE, WARMUP, cut_row, schedule, text_after_cut
from tools.demo.report import answer_panel, largest_difference, load_table, mesh_line, terminal_curve, verdict_line


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 59, 60, 61, 240, 400])
def test_the_rate_rises_and_falls_in_a_run_of_any_length(steps):
    rates = np.asarray(schedule(steps)(jnp.arange(steps + 1)))
    assert np.isfinite(rates).all() and rates.max() <= PEAK_RATE * 1.001
    assert rates[min(WARMUP, steps // 4)] == pytest.approx(PEAK_RATE)
    assert rates[-1] == pytest.approx(PEAK_RATE / 10)


THINK, END, STOP = 8, 9, 1
BUDGET = ThinkingBudget(tokens=3, end_id=END, early_stop_ids=(5, END, 6), open_ids=(THINK, 7), think_id=THINK)
TOK = SimpleNamespace(stop_token_ids=(STOP,), decode=lambda ids: " ".join(map(str, ids)))


@pytest.mark.parametrize(
    "written, follows",
    [
        ([THINK, 7, 20, 5, END, 6, 30, 31, STOP], "30 31"),
        ([20, 21, 22, THINK, 7, 5, END, 6, 30], "30"),  # no thought was opened, so one was
        ([THINK, 7, 20, 5, END, 6, STOP], ""),  # cut, and nothing said
        ([THINK, 7, 20, 5, END, 6], ""),
        ([THINK, 7, 20, 21, 5, END, 6, 30], None),  # a token too late
        ([THINK, 7, 20, 21, 22, END, 30], None),  # ended by itself
        ([THINK, 20, END, 5, END, 6, 30], None),  # ended by itself within the budget
        ([20, 21, 22, 5, END, 6, 30], None),  # without the opening that was due
        ([STOP], None),
        ([], None),
    ],
)
def test_a_cut_is_one_only_where_the_words_stand_and_text_follows(written, follows):
    assert text_after_cut(written, BUDGET, TOK) == follows


CUT, OWN, LATE = [THINK, 7, 20, 5, END, 6, 30], [THINK, 20, END, 30, STOP], [THINK, 7, 20, 21, 5, END, 6, 30]


@pytest.mark.parametrize("rows, row", [([OWN, CUT], 1), ([CUT[:-1], CUT], 1), ([OWN, OWN], None), ([CUT, LATE], None)])
def test_of_some_answers_one_is_cut_and_none_thinks_on(rows, row):
    assert cut_row(rows, BUDGET, TOK) == row


def test_all_that_the_demo_shows_fits_one_screen():
    screen = io.StringIO()
    console = Console(file=screen, width=80)
    # The lines of __main__: two of title, speed, held-out loss, mesh, export, picture.
    for _ in range(7):
        console.print("x")
    console.print(terminal_curve(list(np.linspace(8, 2, 400))))
    console.print(load_table(np.full((4, 8), 1 / 8), [1, 2, 4, 5]))
    for name in ("thinking", "not thinking", "cut after 3 tokens of thought"):
        console.print(answer_panel(name, "<think>\n\n[red]words" + " of a long thought" * 60 + "\n\n</think>\n\nx = [1]\n" * 5))
    verdicts = {"loss fell": True, "mesh as one device": True, "round trip": False, "three modes": True}
    console.print(verdict_line(verdicts))
    lines = screen.getvalue().splitlines()
    assert len(lines) <= 47  # beside the command, what make says, and the next prompt
    assert max(map(len, lines)) <= 80
    assert "[red]words" in screen.getvalue()


def test_a_mesh_s_losses_are_held_to_one_device_s():
    assert largest_difference([8.0, 4.0, 2.0], [8.0, 4.0]) == 0
    assert largest_difference([8.0, 4.0], [8.0, 4.4, 9.0]) == pytest.approx(0.1)
    assert "8.000 -> 4.400 in 2 steps, off one device's by 1e-01" in mesh_line("fsdp=8", [8.0, 4.0], [8.0, 4.4, 9.0])


def test_a_run_of_no_steps_is_refused_by_name():
    command = [sys.executable, "-m", "tools.demo", "--steps", "0", "--length", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "--steps is 0: accepted is at least 1, --length is 1: accepted is at least 2"
