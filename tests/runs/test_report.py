"""The page about a run, the marks of its plots, and what is known of starts."""

import base64
import json
import re
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from qwen3_jax.pages import heat, lines, said, ticks
from qwen3_jax.runs.report import highest, lost_share, means, report, without_rewound, write_report
from qwen3_jax.runs.schema import ModelSection, Run, StageSection
from qwen3_jax.runs.starts import Starts
from qwen3_jax.training.journal import Journal, read_lines
from tools.show_run import tokens_before

RUN = Run(name="<one>", model=ModelSection(preset="qwen3-0.6b"), stages={"all": StageSection(tokens=80, batch=1, seq=10)})


def line(step, loss, **more):
    figures = dict(step=step, stage="all", tokens_seen=10 * (step + 1), loss=loss, tokens_per_second=100.0 + step, mfu=0.5)
    return figures | dict(time=1000.0 + step, skipped=0, dropped_rows=0) | more


def start(begun, ended, first, step, came_to, **seconds):
    return dict(begun=begun, ended=ended, first=first, step=step, came_to=came_to, seconds=seconds)


JOURNAL = [
    line(0, 9.0),
    line(1, 8.0),
    line(2, 30.0),
    line(3, 31.0),
    {"step": 2, "rewound_from": 4},
    line(2, "nan"),
    line(3, 7.0),
    {"step": 3, "stage": "all", "tokens_seen": 40, "held_out_loss": 7.5, "completions": {"<p>": "x\n  y"}},
]
STARTS = [
    start(0.0, 100.0, 0, 4, "killed", start=10.0, train=60.0, again=30.0),
    start(150.0, 250.0, 2, 4, "done", start=20.0, compile=30.0, train=40.0),
]


def test_the_report_shows_what_counted():
    page = report(RUN, JOURNAL, STARTS)
    assert ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>")).tag == "html"  # all that is opened is closed
    assert "Run &lt;one&gt;" in page and "<td>4 of 8</td>" in page and "<td>50.0%</td>" in page
    assert "The model has no experts." in page and '<td class="text">&lt;p&gt;</td><td class="text">x\n  y</td>' in page
    assert "killed at step 4, begun again at step 2, 50 s later; 2 steps were made again" in page
    assert "the loss rose: back from step 4 to step 2, 1.0 s of steps" in page
    assert "that was lost, for it made no step: 50.0%" in page
    # The first plot's loss has three points: those taken back and the one that was not finite are not in it.
    loss = re.search(r'<polyline points="([^"]*)"[^>]*><title>loss</title>', page)
    assert loss is not None and len(loss[1].split()) == 3
    totals = re.findall(r"<td>([\d.,]*)</td>", page[page.index("<td>all starts</td>") :])
    assert totals[2:12] == ["30.0", "30.0", "100.0", "0.0", "0.0", "0.0", "0.0", "30.0", "10.0", "200.0"]


def test_loads_of_experts_are_pictures():
    loads = [[[0.5, 0.25, 0.25, 0.0]] * 12] * 3
    page = report(RUN, [line(at, 2.0, expert_load=loads[at], max_violation=[1.0] * 12) for at in range(3)], [])
    assert [int(n) for n in re.findall(r"<p>MoE layer (\d+)</p>", page)] == [0, 2, 3, 5, 6, 8, 9, 11]
    sizes = [struct.unpack(">II", base64.b64decode(data)[16:24]) for data in re.findall(r"base64,([^\"]*)", page)]
    assert sizes == [(3, 4)] * 8 + [(4, 12)]  # experts over time, then layers by experts
    assert "has not ended yet" in page


def test_a_heat_map_is_blue_white_red():
    data = base64.b64decode(heat(np.array([[0.0, 1.0, 2.0, 5.0]]), "loads", 10, 10).split("base64,")[1].split('"')[0])
    at, kinds, pixels = 8, [], b""
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        kinds.append(kind)
        pixels += zlib.decompress(body) if kind == b"IDAT" else b""
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    assert list(pixels) == [0, 33, 102, 172, 247, 247, 247, 178, 24, 43, 178, 24, 43]


@pytest.mark.parametrize(
    "values, marks",
    [
        ([0, 10], [0, 2, 4, 6, 8, 10]),
        ([3.1, 7.9], [3, 4, 5, 6, 7, 8]),
        ([5], [2, 3, 4, 5, 6, 7, 8]),
        ([0], [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_marks_are_round(values, marks):
    np.testing.assert_allclose(ticks(values), marks, atol=1e-12)


def test_lines_lie_where_their_values_say():
    drawn = lines({"a": [(0, 0), (10, 10)], "none": []}, "x", "y")
    assert 'points="80.0,220.0 880.0,12.0"' in drawn and ">none<" not in drawn
    assert lines({"a": []}, "x", "loss") == "<p>There is no loss yet.</p>"
    assert [said(value) for value in (0.5, 1500, 2e6, 3.25e9, 1e12)] == ["0.5", "1.5k", "2M", "3.25G", "1T"]


def test_many_points_are_means_and_the_highest_is_kept():
    points = [(float(at), float(at % 4)) for at in range(8)]
    assert means(points, 2) == [(1.5, 1.5), (5.5, 1.5)]
    assert highest(points, 2) == [(3.0, 3.0), (7.0, 3.0)]
    assert means(points, 8) == points and means([], 8) == []


def test_rewinds_take_lines_back():
    kept, rewinds = without_rewound(JOURNAL)
    assert [(old["step"], old.get("loss")) for old in kept] == [(0, 9.0), (1, 8.0), (2, "nan"), (3, 7.0), (3, None)]
    assert rewinds == [{"rewound_from": 4, "step": 2, "seconds": 1.0}]


def test_a_killed_start_is_told_by_the_next(tmp_path):
    """Begun at 900 with step 0, it wrote steps 0 to 3 from 1000 on; the next one has the checkpoint of step 2."""
    Starts(tmp_path, 0, 900.0)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step, 1.0)) + "\n" for step in range(4)) + '{"step')
    starts = Starts(tmp_path, 2, 2000.0)
    starts.end(4, "done", {"train": 5.0})
    first, second = read_lines(tmp_path / "starts.jsonl")
    assert first == start(900.0, 1003.0, 0, 4, "killed", start=100.0, train=1.0, again=2.0)
    assert (second["begun"], second["first"], second["step"], second["came_to"]) == (2000.0, 2, 4, "done")
    Starts(tmp_path, 4, 3000.0)  # killed before its first line
    Starts(tmp_path, 4, 4000.0)
    assert list(read_lines(tmp_path / "starts.jsonl"))[2:] == [start(3000.0, None, 4, 4, "killed")]
    write_report(RUN, tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8").count("begun again at step") == 2
    assert not (tmp_path / "report.html.part").exists()


def test_a_killed_start_s_rewinds_are_lost_too(tmp_path):
    """Begun at 900, it went back from step 4 to step 2, whose lines are of 1002 and 1003, and was killed after step 5."""
    Starts(tmp_path, 0, 900.0)
    steps = [line(at, 1.0) for at in range(4)] + [{"step": 2, "rewound_from": 4}]
    steps += [line(at, 1.0, time=1010.0 + at) for at in (2, 3, 4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    Starts(tmp_path, 4, 2000.0)
    (first,) = read_lines(tmp_path / "starts.jsonl")
    assert first == start(900.0, 1015.0, 0, 6, "killed", start=100.0, train=12.0, again=3.0)
    # The next start's journal keeps what the rewind has settled, and takes back what comes again.
    Journal(tmp_path / "metrics.jsonl", 4).close()
    assert list(read_lines(tmp_path / "metrics.jsonl")) == steps[:7]
    Journal(tmp_path / "metrics.jsonl", 2).close()
    assert list(read_lines(tmp_path / "metrics.jsonl")) == steps[:5]
    Journal(tmp_path / "metrics.jsonl", 1).close()
    assert list(read_lines(tmp_path / "metrics.jsonl")) == steps[:1]


def test_a_kill_within_a_note_leaves_the_notes_that_were_there(tmp_path, monkeypatch):
    """Half is written, and then nothing more: of the note that a start is under way, and of the line at its end."""
    whole = Path.write_text

    def half(self, text, **options):
        whole(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", half)
        Starts(tmp_path, 0, 1.0)
    starts = Starts(tmp_path, 0, 2.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", half)
        starts.end(3, "done", {})
    Starts(tmp_path, 3, 3.0).end(4, "done", {})
    assert [line["came_to"] for line in read_lines(tmp_path / "starts.jsonl")] == ["killed", "done"]


def test_another_process_writes_no_starts(tmp_path):
    Starts(tmp_path, 0, 1.0, writes=False).end(1, "done", {})
    assert list(tmp_path.iterdir()) == []


def test_the_share_lost_is_of_what_is_known():
    assert lost_share([]) is None
    assert lost_share([start(0.0, None, 0, 0, "killed")]) is None
    assert lost_share(STARTS) == 0.5


def test_a_start_is_drawn_where_its_first_step_is():
    """Three steps of 10 tokens, then a stage of 40: the line of the step before, what lies between two, and behind the last."""
    lines = [dict(step=0, tokens_seen=10), dict(step=2, tokens_seen=30), dict(step=4, tokens_seen=110)]
    assert [tokens_before(step, lines) for step in (0, 1, 2, 3, 4, 5, 6)] == [0, 10, 20, 30, 70, 110, 150]
