"""Ranking: seconds and bytes out of compiled figures, by hand; the order; the verdict in words."""

import dataclasses
import json
from xml.etree import ElementTree

import pytest
from rich.console import Console

from qwen3_jax.chips import load_chips
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.planning.candidates import Named, estimated
from qwen3_jax.planning.compile import Outcome
from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.page import chart, page
from qwen3_jax.planning.plan import Plan, record
from qwen3_jax.planning.program import Collective, Program
from qwen3_jax.planning.rank import assumptions, ranked
from qwen3_jax.planning.roofline import step_time
from qwen3_jax.planning.table import show_plan
from qwen3_jax.whole_files import write_whole
from tests.planning.jobs import job, mesh_on

SURE = Efficiency(flops=0.5, hbm=0.5, links=0.5)
PROGRAM = Program(
    flops=459e12,  # 2 s at half the peak of v5p
    grouped_flops=0.0,
    hbm_bytes=2765e9,
    timed_hbm_bytes=2765e9 / 4,  # 0.5 s
    collectives=(
        Collective("all-gather", ("fsdp",), 10**11, 0, True),  # 2 s over 100 GB/s at half
        Collective("all-reduce", ("tensor",), 5 * 10**9, 0, False),  # 0.1 s
    ),
    arguments=6 * 10**9,
    output=5 * 10**9,
    temporaries=4 * 10**9,
    aliased=5 * 10**9,
    code=10**8,
    unknown=("how often a loop runs",),
)
ARGUMENTS = {"weights": 2 * 10**9, "optimizer": 4 * 10**9, "batch": 1000}


def plan_of(*outcomes):
    mesh, topology = mesh_on("v5p:2x2x1", "fsdp=2,tensor=2")
    work = job()
    chosen = [estimated(work, mesh, topology, SURE, Named("default", RULES)) for _ in outcomes]
    rows = ranked(work, topology, SURE, chosen, list(outcomes))
    return Plan("tiny", work, topology, SURE, 10, rows)


def outcome(**changes):
    return Outcome(seconds=3.0, arguments=ARGUMENTS, program=dataclasses.replace(PROGRAM, **changes))


def test_a_step_by_hand():
    (row,) = plan_of(outcome()).rows
    assert row.time is not None and vars(row.time) == pytest.approx(dict(compute=2, hbm=0.5, waiting=0.1, overlapped=2))
    assert row.time.total == pytest.approx(2.1)  # the gather is as long as the products, and hidden
    assert row.tokens_per_second_per_chip == pytest.approx(16 * 64 / 2.1 / 4)
    work = record(plan_of(outcome()))["model_flops"]
    assert row.mfu == pytest.approx(work / (2.1 * 4 * 459e12))
    assert [(move.seconds, move.network) for move in row.moves] == [
        (2, "line of 2, 100 GB/s"),
        (pytest.approx(0.1), "line of 2, 100 GB/s"),
    ]


def test_flops_that_a_program_does_not_declare_are_the_analytic_ones():
    plan = plan_of(outcome(flops=1e6, collectives=()))
    row = plan.rows[0]
    assert row.time and row.time.compute == pytest.approx(row.candidate.flops / (459e12 / 2))
    said = assumptions(plan.job, plan.topology, plan.efficiency, row)
    share = 4 * 1e6 / record(plan)["model_flops"]
    assert any(line.startswith(f"fsdp=2,tensor=2: the compiled program counts {share:.0%} of the FLOPs") for line in said)
    assert not any(
        "products take the analytic" in line for line in assumptions(plan.job, plan.topology, SURE, plan_of(outcome()).rows[0])
    )


def test_flops_far_beyond_the_model_s_are_pointed_at():
    plan = plan_of(outcome())
    row = plan.rows[0]
    many = plan_of(outcome(flops=3 * row.candidate.flops)).rows[0]
    assert any(
        "they are 3.0 times the analytic model's FLOPs" in line for line in assumptions(plan.job, plan.topology, SURE, many)
    )
    few = plan_of(outcome(flops=1.4 * row.candidate.flops)).rows[0]
    assert not any("times the analytic" in line for line in assumptions(plan.job, plan.topology, SURE, few))


def test_rows_that_stay_empty_are_counted_and_not_timed():
    """A fifth of the experts' buffers: of 400 TFLOP in their kernels 80, and 2 s become 379 / 459 of it."""
    plan = plan_of(outcome(grouped_flops=400e12))
    chosen = dataclasses.replace(plan.rows[0].candidate, filled=0.8)
    (row,) = ranked(plan.job, plan.topology, SURE, [chosen], [outcome(grouped_flops=400e12)])
    assert row.flops == pytest.approx(379e12) and row.time and row.time.compute == pytest.approx(2 * 379 / 459)
    said = "\n".join(assumptions(plan.job, plan.topology, SURE, row))
    assert "without the 20% of the experts' buffers that stay empty" in said
    content = record(dataclasses.replace(plan, rows=[row]))["candidates"][0]
    assert (content["flops"], content["timed_flops"]) == (459e12, pytest.approx(379e12))


def test_time_is_of_lines_and_the_compiler_s_count_is_kept():
    """2,765 GB by whole tiles, a quarter of it by lines: half a second at half of v5p's bandwidth."""
    plan = plan_of(outcome())
    (row,) = plan.rows
    content = record(plan)["candidates"][0]
    assert (content["hbm_bytes"], content["timed_hbm_bytes"]) == (2765e9, 2765e9 / 4)
    assert content["seconds"]["hbm"] == pytest.approx(0.5)
    said = "\n".join(assumptions(plan.job, plan.topology, SURE, row))
    assert "fsdp=2,tensor=2: 691 GB of HBM traffic are timed of the compiler's 2,765" in said
    assert "512-byte lines of its tiles" in said and "not measured on a chip" in said
    # Where nothing is gathered, or there are no tiles, there is nothing to say.
    same = plan_of(outcome(hbm_bytes=2765e9 / 4)).rows[0]
    assert "512-byte" not in "\n".join(assumptions(plan.job, plan.topology, SURE, same))


def test_permutes_in_two_directions_take_half_as_long():
    permutes = Collective("collective-permute", ("fsdp",), 10**11, 0, True)
    both = dataclasses.replace(permutes, ways=2.0)
    times = [plan_of(outcome(collectives=(each,))).rows[0].moves[0].seconds for each in (permutes, both)]
    assert times == pytest.approx([2, 1])


def test_what_overlaps_is_hidden_up_to_the_work_beside_it():
    chip = load_chips()["v5p"]
    time = step_time(0, 2765e9 / 2, [(3.0, True), (0.25, False)], chip, SURE)
    assert (time.hbm, time.exposed, time.total) == (1, 2.25, 3.25)
    assert step_time(0, 2765e9 / 2, [(0.5, True)], chip, SURE).exposed == 0


def test_bytes_by_category():
    (row,) = plan_of(outcome()).rows
    assert row.bytes["total"] == 10_100_000_000  # what is given away is not there twice
    assert row.fits and row.verdict == "fits: 10.1 of 102.8 GB"
    assert sum(row.bytes[part] for part in ("gradients", "activations", "working")) == PROGRAM.temporaries
    assert row.bytes["gradients"] == round(row.candidate.memory["gradients"]) > 0
    small = plan_of(outcome(temporaries=10)).rows[0].bytes  # never more than there is
    assert (small["gradients"], small["activations"], small["working"]) == (10, 0, 0)


def test_the_order_is_of_compiled_figures():
    full = Outcome(seconds=1.0, arguments=ARGUMENTS, needed=120 * 10**9, available=102 * 10**9)
    fuller = dataclasses.replace(full, needed=130 * 10**9)
    failed = Outcome(seconds=9.0, reason="stopped after its time limit of 9 s")
    too_large = outcome(temporaries=200 * 10**9)  # a compiler that does not refuse it
    rows = plan_of(failed, fuller, outcome(flops=900e12), full, too_large, outcome()).rows
    assert [row.fits for row in rows] == [True, True, False, False, False, None]
    assert [row.bytes.get("total", 0) // 10**9 for row in rows[2:]] == [120, 130, 206, 0]
    assert rows[0].time and rows[1].time and rows[0].time.total < rows[1].time.total
    assert rows[5].verdict == "not compiled: stopped after its time limit of 9 s"


def test_what_does_not_fit_is_told_by_category():
    needed = Outcome(seconds=1.0, arguments=ARGUMENTS, needed=120 * 10**9, available=102 * 10**9)
    (row,) = plan_of(needed).rows
    assert row.bytes["temporaries"] == 120 * 10**9 - sum(ARGUMENTS.values()) and row.time is None
    assert row.verdict == (
        "does not fit: 120.0 GB, 17.2 too many (working 114.0, optimizer 4.0, weights 2.0); beside its arguments there is "
        "room for 96.8 GB of temporaries"
    )
    huge = Outcome(seconds=1.0, arguments={"weights": 200 * 10**9}, needed=210 * 10**9, available=102 * 10**9)
    assert plan_of(huge).rows[0].verdict.endswith("its arguments alone are too large")


def test_each_assumption_is_said():
    plan = plan_of(outcome())
    said = "\n".join(assumptions(plan.job, plan.topology, plan.efficiency, plan.rows[0]))
    for words in (
        "products run at 50% of 459 TFLOP/s",
        "memory runs at 50% of 2765 GB/s",
        "links run at 50% of their bandwidth",
        "over tensor: line of 2, 100 GB/s",
        "analytic model's shares",
        "MFU counts 6 FLOPs",
        "chip fact not certain: hop_seconds",
        "not known of the program: how often a loop runs",
    ):
        assert words in said


def test_the_record_the_table_and_the_page_hold_the_same(tmp_path):
    failed = Outcome(seconds=9.0, reason="stopped <after> 9 s & more")
    plan = plan_of(outcome(), failed, Outcome(1.0, ARGUMENTS, None, 120 * 10**9, 102 * 10**9))
    content = json.loads(json.dumps(record(plan), allow_nan=False))
    best, full, none = content["candidates"]
    assert best["mesh"] == {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert best["rules_name"] == "default" and RULES.replace(**best["rules"]) == RULES and best["transport"] is None
    assert best["step_seconds"] == pytest.approx(2.1) and best["compile_seconds"] == 3.0
    assert best["collectives"][1]["kind"] == "all-reduce" and best["collectives"][1]["overlapped"] is False
    assert (full["fits"], full["flops"], none["fits"], none["reason"]) == (False, None, None, "stopped <after> 9 s & more")
    console = Console(width=200, record=True)
    show_plan(console, plan)
    table = console.export_text()
    drawn = page(plan)
    tree = ElementTree.fromstring(drawn.removeprefix("<!DOCTYPE html>\n"))
    text = " ".join(tree.itertext())
    for words in (
        "10.10",
        "2,765.0",
        "691.2",
        "2,100",
        "fits: 10.1 of 102.8 GB",
        "not compiled: stopped <after> 9 s & more",
        "products run at 50%",
    ):
        assert words in table and words in text
    assert len(tree.findall(".//svg")) == 2 and "http" not in drawn.replace("http://www.w3.org", "")
    write_whole(tmp_path / "page.html", drawn)
    write_whole(tmp_path / "page.html", drawn + "more")
    assert (tmp_path / "page.html").read_text() == drawn + "more" and len(list(tmp_path.iterdir())) == 1


def test_bars_are_as_long_as_their_figures():
    tree = ElementTree.fromstring(chart([("a", [[("weights", 10.0), ("cache", 20.0)]]), ("b", [[("cache", 40.0)]])], "GB"))
    widths = [float(rect.attrib["width"]) for rect in tree.findall("rect") if rect.find("title") is not None]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-3) and widths[2] == pytest.approx(4 * widths[0], rel=1e-3)
