"""Workers: what becomes of one that is too slow, fails, dies or is refused, and that none is left behind."""

import os
import sys
import textwrap
import time

import pytest

from qwen3_jax.parallel.rules import TRAIN_RULES
from qwen3_jax.planning.candidates import Named, estimated
from qwen3_jax.planning.compile import compile_all
from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.plan import PlanError, make_plan
from qwen3_jax.planning.worker import compiled_figures
from tests.planning.jobs import TINY, job, mesh_on

# Stands for a worker: what it does is said by the mesh that it is asked for.
PROGRAM = textwrap.dedent(
    """
    import json, os, sys, time
    request = json.load(open(sys.argv[1]))
    assert os.environ["JAX_PLATFORMS"] == "cpu" and request["mode"] == "train" and request["config"]["hidden_size"] == 32
    if request["mesh"] == "data=4":
        open(os.environ["PLAN_PID"] + ".part", "w").write(str(os.getpid()))
        os.rename(os.environ["PLAN_PID"] + ".part", os.environ["PLAN_PID"])  # whoever waits for it is not to find it empty
        time.sleep(600)
    if request["mesh"] == "fsdp=4":
        print("what came before", file=sys.stderr)
        raise SystemExit("no: a reason of its own")
    if request["mesh"] == "expert=4":
        os.kill(os.getpid(), 9)
    json.dump({"seconds": 1.5, "arguments": {"weights": 7}, "needed": 9, "available": 8}, open(sys.argv[2], "w"))
    """
)
WISHES = ["data=4", "fsdp=4", "expert=4", "tensor=4"]


def run(folder, monkeypatch, wishes=WISHES, **options):
    worker = folder / "worker.py"
    worker.write_text(PROGRAM)
    monkeypatch.setenv("PLAN_PID", str(folder / "pid"))
    work = job()
    pairs = [mesh_on("v5p:2x2x1", wish) for wish in wishes]
    chosen = [estimated(work, mesh, topology, Efficiency(), Named("train", TRAIN_RULES)) for mesh, topology in pairs]
    return compile_all(work, pairs[0][1], chosen, command=[sys.executable, str(worker)], **options)


def is_gone(folder):
    """Whether the process that wrote its number there has ended."""
    number = int((folder / "pid").read_text())
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


def test_each_outcome_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    ended = []
    found = run(tmp_path, monkeypatch, workers=2, time_limit=6.0, done=lambda candidate, outcome: ended.append(candidate.wish))
    slow, failed, killed, full = found
    assert slow.reason == "stopped after its time limit of 6 s" and slow.seconds >= 6 and slow.program is None
    assert failed.reason == "the worker failed: no: a reason of its own"
    assert killed.reason and killed.reason.startswith(
        "the worker was ended by SIGKILL, as the system does when memory runs out"
    )
    assert (full.needed, full.available, full.arguments, full.seconds, full.reason) == (9, 8, {"weights": 7}, 1.5, None)
    assert sorted(ended) == sorted(WISHES) and ended[-1] == "data=4"
    assert is_gone(tmp_path)


def test_an_interrupt_leaves_no_worker(tmp_path, monkeypatch):
    def interrupted(candidate, outcome):
        give_up = time.monotonic() + 60
        while not (tmp_path / "pid").exists() and time.monotonic() < give_up:
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, monkeypatch, ["data=4", "tensor=4"], workers=2, time_limit=100.0, done=interrupted)
    assert is_gone(tmp_path)


def request(**changes):
    given = dict(config=TINY.to_hf(), mode="decode", batch=8, seq=64, remat="full", rank=16, topology="v5e:2x2", slices=1)
    given |= dict(mesh="data=4", rules={}, base="bfloat16", adapter_dtype="float32")
    return given | changes


def test_a_worker_reads_what_it_compiles():
    found = compiled_figures(request())
    assert set(found) == {"arguments", "seconds", "program"} and found["seconds"] > 0
    program = found["program"]
    # Weights in bfloat16 are whole on each device, the cache is split: two layers, two rows, K 2, S 64, H 64.
    assert found["arguments"]["weights"] == 2 * TINY.num_params()
    assert found["arguments"]["cache"] == 2 * 2 * 2 * 2 * 2 * 64 * 64 + 4 * 2 * (64 + 1 + 1)
    # The compiler pads some arrays and leaves out what is not used.
    assert program["arguments"] == pytest.approx(sum(found["arguments"].values()), rel=0.05)
    assert program["flops"] > 0 and program["temporaries"] < program["arguments"]


def test_a_worker_compiles_under_the_rules_that_it_is_given():
    whole, split = (compiled_figures(request(rules=rules))["arguments"]["weights"] for rules in ({}, {"embed": ["data"]}))
    words = 2 * 512 * 256  # and norms stay whole
    norms = TINY.num_hidden_layers * 2 * (256 + 64) + 256
    assert whole == 2 * TINY.num_params() and split == 2 * ((TINY.num_params() - words - norms) // 4 + words + norms)


def test_a_worker_tells_what_is_refused_and_what_does_not_fit():
    assert compiled_figures(request(mesh="data=16"))["reason"].startswith("data=16 is 16, and there are 4 devices")
    full = compiled_figures(request(batch=64, seq=2**21))  # a cache of 34 GB a device
    assert full["needed"] > full["arguments"]["cache"] > 34e9 and 15e9 < full["available"] < 17e9 and "program" not in full


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(top=0), "top is 0: accepted is a whole number from 1"),
        (dict(workers=0), "workers is 0: accepted is a whole number from 1"),
        (dict(time_limit=0), "time_limit is 0: accepted is a number of seconds above 0"),
    ],
)
def test_numbers_that_are_none(options, says):
    _, topology = mesh_on("v5p:2x2x1", "data=4")
    with pytest.raises(PlanError, match=says):
        make_plan("tiny", job(), topology, **options)
