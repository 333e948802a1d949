"""The loop around a step: restarts change no bit, stages are exact, bad steps and spikes end or rewind a run."""

import dataclasses
import functools
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Batch, adamw, init_train_state, make_train_step
from qwen3_jax.training.checkpoints import Checkpoints
from qwen3_jax.training.journal import Journal, read_lines
from qwen3_jax.training.loop import Loop, Policy, Progress, Stage, TrainingError
from qwen3_jax.training.schedule import Phase, schedule
from tests.model.models import CONFIGS, random_model

pytestmark = pytest.mark.usefixtures("quick")

OPTIMIZER = adamw(schedule([Phase(5, 1e-2), Phase(6, 3e-3, start=1.0)]))


class Numbers:
    """Batch n is drawn with n as seed; a stage of its own has other rows."""

    def __init__(self, rows, at, spoiled=()):
        self.rows, self.at, self.spoiled = rows, 0 if at is None else at["at"], spoiled
        self.given = []

    def __next__(self):
        tokens = np.random.default_rng(self.at).integers(0, 96, (self.rows, 12), np.int32)
        mask = np.ones(tokens.shape, np.float32)
        if self.at in self.spoiled:
            mask[0, 0] = np.nan
        self.given.append(self.at)
        self.at += 1
        return Batch(tokens, np.roll(tokens, -1, 1), mask)

    def state(self):
        return {"at": self.at, "rows": self.rows}

    def report(self):
        return {}

    def close(self):
        self.given.append("closed")


@functools.cache
def step_of(theta):
    config = dataclasses.replace(CONFIGS["moe"], rope_theta=theta)
    return make_train_step(config, OPTIMIZER, dtype=jnp.float32)


class Asked:
    """Told to end before these steps."""

    def __init__(self, *steps, times=1):
        self.steps, self.times, self.seen = steps, times, []

    def asked(self, step):
        """Told before one of the steps, when it comes for the so many-th time."""
        self.seen.append(step)
        return step in self.steps and self.seen.count(step) == self.times


def start():
    return init_train_state(jax.tree.map(jnp.copy, random_model("moe")), OPTIMIZER)


def run(folder, *stops, policy=None, spoiled=(), step=step_of, said=None, trace=None, seconds=None, times=1):
    """One start of the run; its last state, whether it is done, and the data that it opened."""
    opened = []

    def open_data(rows):
        def make(at, carried):
            assert carried == (rows == 3 and (at is None or at["rows"] == 2))
            opened.append(Numbers(rows, None if carried else at, spoiled))
            return opened[-1]

        return make

    stages = [Stage("first", 5, 24, 1e6, step(1e4), open_data(2)), Stage("second", 6, 36, 1e6, step(1e6), open_data(3))]
    with Checkpoints(folder / "checkpoints", keep=9) as checkpoints:
        state, progress = start(), Progress()
        found = checkpoints.restore(state)
        if found is not None:
            state, progress = found.state, Progress(**found.run["progress"])
        journal = Journal(folder / "metrics.jsonl", int(state.step))
        policy = policy or Policy(save_every=4, write_every=1)
        loop = Loop(stages, policy, checkpoints, journal, about={"name": "test"}, said=said, trace=trace)
        try:
            state, done = loop.run(state, progress, Asked(*stops, times=times))
        finally:
            journal.close()
            if seconds is not None:
                seconds.update(loop.seconds)
    return state, done, opened


def curve(folder):
    told = ("step", "stage", "loss", "tokens_seen", "rewound_from")
    return [tuple(line[name] for name in told if name in line) for line in read_lines(folder / "metrics.jsonl")]


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    state, done, opened = run(folder)
    assert done
    return bits(state), curve(folder), [numbers.given for numbers in opened]


def test_stages_follow_one_another_to_the_step(straight):
    _, lines, given = straight
    assert [(step, stage) for step, stage, *_ in lines] == [(n, "first" if n < 5 else "second") for n in range(11)]
    assert [tokens for *_, tokens in lines] == [24 * n for n in range(1, 6)] + [120 + 36 * n for n in range(1, 7)]
    assert given == [[*range(5), "closed"], [*range(6), "closed"]]


@pytest.mark.parametrize("stops", [(1,), (4,), (5,), (3, 7, 10)])
def test_restarts_change_no_bit(straight, tmp_path, stops):
    """Within a stage, at a save, at a stage's end; the journal is that of a run without a stop."""
    for at in range(len(stops)):
        _, done, _ = run(tmp_path, *stops[at : at + 1])
        assert not done
    state, done, _ = run(tmp_path)
    assert done
    assert bits(state) == straight[0]
    assert curve(tmp_path) == straight[1]


def test_a_run_that_lost_its_last_steps_makes_them_again(straight, tmp_path):
    """As after a kill: the journal is ahead of the newest checkpoint, and its last line is cut off."""

    class Killed(Exception):
        pass

    def dies(theta):
        def step(state, batch):
            if int(state.step) == 6:
                raise Killed
            return step_of(theta)(state, batch)

        return step

    with pytest.raises(Killed):
        run(tmp_path, step=dies)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    state, done, opened = run(tmp_path)
    assert done and opened[0].given[0] == 0  # the save at the first stage's end, step 5
    assert bits(state) == straight[0] and curve(tmp_path) == straight[1]


def test_a_trace_is_of_the_steps_that_were_asked_for(tmp_path):
    run(tmp_path, 4, policy=Policy(profile=(1, 2)), trace=str(tmp_path / "trace"))
    (file,) = (tmp_path / "trace").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert "PjitFunction(step)" in names
    # One for each step's batch.
    assert len([name for name in names if name.startswith("$test_loop.py:") and name.endswith(" __next__")]) == 2


def test_a_trace_that_cannot_be_written_does_not_end_the_run(straight, tmp_path, caplog):
    state, done, _ = run(tmp_path, policy=Policy(save_every=4, write_every=1, profile=(1, 2)), trace="/proc/none")
    assert done and bits(state) == straight[0]
    (said,) = [record.getMessage() for record in caplog.records if record.name == "qwen3_jax.training.loop"]
    assert said.startswith("the trace of watch.profile cannot be written: ") and "/proc/none" in said


def test_a_step_that_is_not_finite_is_left_out_and_told(tmp_path):
    state, done, _ = run(tmp_path, spoiled=(2,))
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert done and int(state.guard.skipped) == 2  # of each stage the third
    assert [line["loss"] for line in lines if line["skipped_in_a_row"]] == ["nan", "nan"]


@pytest.mark.parametrize(
    "policy, said",
    [
        (Policy(not_finite="stop"), "step 2: loss nan, gradient nan: the run stops by step.not_finite"),
        (Policy(max_skipped=2), "step 3: 2 steps in a row were not finite: the run stops by step.max_skipped"),
    ],
)
def test_a_run_stops_by_itself(tmp_path, policy, said):
    with pytest.raises(TrainingError, match=said):
        run(tmp_path, policy=policy, spoiled=(2, 3))


def poisoned(*places, rows=3):
    """Steps that raise their loss by 9 on these batches of the second stage, or of the one with so many rows."""
    bad = [Numbers(rows, {"at": at}).__next__().tokens for at in places]

    def of(theta):
        def step(state, batch):
            state, metrics = step_of(theta)(state, batch)
            hit = any(batch.tokens.shape == tokens.shape and (batch.tokens == tokens).all() for tokens in bad)
            return state, metrics | ({"loss": metrics["loss"] + 9} if hit else {})

        return step

    return of


SPIKE = Policy(save_every=100, write_every=1, spike=5.0, max_rewinds=2)


def test_a_spike_rewinds_the_state_and_not_the_data(tmp_path):
    """Batch 3 of the second stage raises the loss, as if it were poisoned: the run goes back to the stage's beginning."""
    said, seconds = [], {}
    state, done, opened = run(tmp_path, policy=SPIKE, step=poisoned(3), said=said.append, seconds=seconds)
    assert done and int(state.step) == 11
    # Step 8 had the bad batch, which was seen once batch 4 was under way; steps 5 to 10 were then made of batches 5 to 10.
    assert opened[1].given == [*range(11), "closed"]
    marks = [line for line in read_lines(tmp_path / "metrics.jsonl") if "rewound_from" in line]
    assert marks == [{"step": 5, "rewound_from": 10}]
    (line,) = said
    assert line.startswith("step 8: loss ") and "more than step.spike 5 above its running mean" in line
    assert line.endswith("back to step 5, past the data since (1 of 2 times)")
    assert seconds["again"] > 0 and seconds["train"] > 0


def test_a_run_that_only_rewinds_ends(tmp_path):
    said = []
    with pytest.raises(TrainingError, match="went back 2 times to step 5 without a newer .* it stops by step.max_rewinds"):
        run(tmp_path, policy=SPIKE, step=poisoned(*range(20)), said=said.append)
    assert len(said) == 2
    # Another start knows of them, and of the data that they went past: it does not begin the same again.
    with pytest.raises(TrainingError, match="step.max_rewinds"):
        run(tmp_path, policy=SPIKE, step=poisoned(*range(20)), said=said.append)
    assert len(said) == 2
    # With their reason gone it goes on, past that data.
    _, done, opened = run(tmp_path, policy=SPIKE)
    assert done and opened[0].given[0] == 4


@pytest.mark.parametrize("stop, times", [(5, 2), (8, 2), (9, 1)])
def test_a_start_after_a_rewind_goes_on_beyond(tmp_path, stop, times):
    """Told to end at the very step it went back to, on the way from there, and while the spike has not been looked at yet."""
    _, done, first = run(tmp_path, stop, times=times, policy=SPIKE, step=poisoned(3))
    assert not done
    state, done, second = run(tmp_path, policy=SPIKE, step=poisoned(3))
    assert done and int(state.step) == 11
    made = 11 if times == 2 else 10  # the one that was told early has not made batch 4 for nothing
    assert [batch for batch in (*first[1].given, *second[0].given) if batch != "closed"] == list(range(made))
    # The same again without a stop: to the bit, and its lines too.
    straight, done, _ = run(tmp_path / "straight", policy=SPIKE, step=poisoned(3))
    if times == 2:
        assert bits(state) == bits(straight) and curve(tmp_path) == curve(tmp_path / "straight")


def test_a_rewind_past_a_stage_s_beginning_makes_that_stage_s_steps_again(tmp_path, straight):
    """The newest checkpoint, of the second stage's beginning, cannot be read when the loss rises: step 4's is gone back to."""

    def damages(theta):
        bad = poisoned(0)(theta)

        def step(state, batch):
            if int(state.step) == 5 and not said:
                while not (saved := tmp_path / "checkpoints/5/state").exists():  # it is written meanwhile
                    time.sleep(0.01)
                shutil.rmtree(saved)
            return bad(state, batch)

        return step

    said = []
    policy = dataclasses.replace(SPIKE, save_every=4)
    state, done, opened = run(tmp_path, policy=policy, step=damages, said=said.append)
    assert done and int(state.step) == 11
    assert [line.partition(":")[0] for line in said] == ["checkpoint 5 cannot be read", "step 5", "step 5"]
    assert [numbers.given[0] for numbers in opened] == [0, 0, 4, 0]
