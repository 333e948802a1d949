"""The loop around a step: stage after stage, saved as it goes, ended when told, every second accounted for.

What a step gives is looked at while the next one runs, so that nothing waits for the host; only a save, a stage's end and the
run's end wait for the last step.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from qwen3_jax.training.checkpoints import Checkpoints
from qwen3_jax.training.journal import Journal, plain

logger = logging.getLogger(__name__)

RUNNING_MEAN = 0.98  # share of the past in the mean that a spike is measured against


class TrainingError(RuntimeError):
    """A run that stops by itself: at which step, and why."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of steps.

    Attributes:
        name: its name.
        steps: how many.
        tokens: of a step, padding counted.
        flops: of a step, that the model asks for (qwen3_jax.planning.estimate.model_flops).
        step: state and batch to state and metrics; it takes the state (qwen3_jax.training.step).
        open_data: makes the stage's data: anew; where a state of it says; or, told True, going on after another stage's.
    """

    name: str
    steps: int
    tokens: int
    flops: float
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    open_data: Callable[[Mapping[str, Any] | None, bool], Any]


@runtime_checkable
class Data(Protocol):
    """Batches of a stage on the mesh, and where they stand: what a loop needs of a loader."""

    def __next__(self) -> Any:
        """The next batch."""

    def state(self) -> dict[str, Any]:
        """What the next batch depends on, of all processes together, as JSON."""

    def report(self) -> dict[str, Any]:
        """Utilisation and epochs so far."""

    def close(self) -> None:
        """Stop reading ahead."""


@runtime_checkable
class Ends(Protocol):
    """Whether a run has been told to end: qwen3_jax.training.stopping.Stopping."""

    def asked(self, step: int) -> bool:
        """Whether to end before this step."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """When things happen; counts are of steps.

    Attributes:
        save_every: between saves.
        write_every: between lines of the journal.
        look_every: between calls of `look`, which also sees the last step.
        export_every: between calls of `export`; None: never.
        not_finite: whether a step that is not finite is left out, or ends the run.
        max_skipped: steps left out in a row that end the run.
        spike: nats above the running mean of the loss at which the run goes back to its last checkpoint; None: never.
        max_rewinds: times that it goes back with no newer checkpoint in between; the next one ends the run.
        profile: first and last step of a trace.
    """

    save_every: int = 500
    write_every: int = 10
    look_every: int = 500
    export_every: int | None = None
    not_finite: Literal["skip", "stop"] = "skip"
    max_skipped: int = 100
    spike: float | None = None
    max_rewinds: int = 5
    profile: tuple[int, int] | None = None


@dataclasses.dataclass
class Progress:
    """Where a run stands beside its state; JSON, saved with it.

    Attributes:
        stage: the stage that the data is of; at a stage's end that stage still.
        data: the data's state; None before the first step.
        mean: running mean of the loss; None before the first step.
        rewound: steps that the run went back from, each with the one it went back to.
    """

    stage: str | None = None
    data: dict[str, Any] | None = None
    mean: float | None = None
    rewound: list[list[int]] = dataclasses.field(default_factory=list)


class Loop:
    """A run in motion."""

    def __init__(
        self,
        stages: Sequence[Stage],
        policy: Policy,
        checkpoints: Checkpoints,
        journal: Journal,
        *,
        about: Mapping[str, Any],
        look: Callable[[int, Any], Mapping[str, Any]] | None = None,
        export: Callable[[int, Any], None] | None = None,
        told: Callable[[int, Mapping[str, Any]], None] | None = None,
        said: Callable[[str], None] | None = None,
        trace: str | None = None,
        peak: float | None = None,
    ):
        """Put a run together.

        Args:
            stages: in order.
            policy: when things happen.
            checkpoints: where it is saved.
            journal: where its figures are written.
            about: JSON that each checkpoint carries: config, versions.
            look: measures the state every so often: held-out loss, completions; its figures go to the journal.
            export: writes a state's model, for use elsewhere; it leaves the state as it is.
            told: is shown each step's figures.
            said: is given a line for each rewind, and for each checkpoint that one passes over.
            trace: folder of the profiler's trace.
            peak: FLOP/s of all chips, for the MFU; None where it is not known.
        """
        self._stages = stages
        self._policy = policy
        self._checkpoints = checkpoints
        self._journal = journal
        self._about = dict(about)
        self._look = look
        self._export = export
        self._told = told
        self._said = said
        self._trace = trace
        self._tracing = False
        self._peak = peak
        self._seen = time.perf_counter()
        self.reached = 0  # steps whose figures have been looked at, counted from the run's first
        self.seconds: dict[str, float] = dict(train=0.0, compile=0.0, save=0.0, look=0.0, restore=0.0, data=0.0)
        self._trained: dict[int, float] = {}  # of each checkpoint of this start, the seconds of steps until it

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self._stages)

    def run(self, state: Any, progress: Progress, stopping: Ends) -> tuple[Any, bool]:
        """Train to the end, or until told to end.

        Args:
            state: where it begins, or what was restored.
            progress: likewise.
            stopping: whether it has been told.

        Returns:
            The last state, which is saved; and whether the run is done.

        Raises:
            TrainingError: too many steps that were not finite, or too many rewinds.
        """
        at = int(state.step)
        while at < self.steps:
            stage, first = self._stage_at(at)
            data = stage.open_data(progress.data, progress.stage not in (None, stage.name))
            progress.stage = stage.name
            try:
                state, at, ended = self._run_stage(stage, first, state, progress, data, stopping)
            finally:
                data.close()
            if ended:
                self._end_trace()
                return state, False
        self._end_trace()
        self._save(at, state, progress)
        self._checkpoints.wait()
        return state, True

    def _stage_at(self, step: int) -> tuple[Stage, int]:
        first = 0
        for stage in self._stages:
            if step < first + stage.steps:
                return stage, first
            first += stage.steps
        raise ValueError(f"step {step} of {self.steps}: accepted is one before the last")

    def _run_stage(
        self, stage: Stage, first: int, state: Any, progress: Progress, data: Data, stopping: Ends
    ) -> tuple[Any, int, bool]:
        at, fresh, waiting = int(state.step), True, None
        while at < first + stage.steps:
            if stopping.asked(at):
                if spike := self._settle(waiting, progress):
                    # What is gone back to is saved; the state of the spike must not be what is gone on from.
                    state, at = self._rewound(spike, first, state, at, progress, data)
                    return state, at, True
                progress.data = data.state()
                self._save(at, state, progress)
                self._checkpoints.wait()
                return state, at, True
            self._profile(at)
            begun = time.perf_counter()
            batch = next(data)
            fetched = time.perf_counter()
            state, metrics = stage.step(state, batch)
            if fresh:
                jax.block_until_ready(metrics)
            done = time.perf_counter()
            self.seconds["data"] += fetched - begun
            self.seconds["compile" if fresh else "train"] += done - fetched
            fresh = False
            spike = self._settle(waiting, progress)
            waiting = (at, stage, metrics)
            at += 1
            due = at % self._policy.save_every == 0 or at == first + stage.steps
            looking = self._look is not None and (at % self._policy.look_every == 0 or at == self.steps)
            exporting = self._policy.export_every is not None and at % self._policy.export_every == 0
            if due or looking or exporting:
                spike = self._settle(waiting, progress) or spike
                waiting = None
            if spike:
                state, at = self._rewound(spike, first, state, at, progress, data)
                if at < first:
                    return state, at, False  # a step of an earlier stage's comes next, with that one's step and data
                waiting = None
                continue
            if looking and self._look is not None:
                begun = time.perf_counter()
                found = self._look(at, state)
                self._journal.write(dict(step=at - 1, stage=stage.name, tokens_seen=self._tokens(at), **found))
                took = time.perf_counter() - begun
                self.seconds["look"] += took
                self._seen += took  # no time of the next step's
            if exporting and self._export is not None:
                # Before the save of the same step: whoever goes on from a checkpoint has every export up to it.
                begun = self._reached(state)
                self._export(at, state)
                self._saved(begun)
            if due:
                progress.data = data.state()
                self._save(at, state, progress)
        self._settle(waiting, progress)
        return state, at, False

    def _settle(self, waiting: tuple[int, Stage, dict[str, Any]] | None, progress: Progress) -> str:
        """Look at what a step gave, which waits for it; the spike of its loss in words, or nothing."""
        if waiting is None:
            return ""
        step, stage, metrics = waiting
        begun = time.perf_counter()
        small = {name: value.item() for name, value in jax.device_get({k: v for k, v in metrics.items() if not v.ndim}).items()}
        self.seconds["train"] += time.perf_counter() - begun
        self.reached = step + 1
        loss, in_a_row = small["loss"], small["skipped_in_a_row"]
        if in_a_row and self._policy.not_finite == "stop":
            raise TrainingError(f"step {step}: loss {loss}, gradient {small['grad_norm']}: the run stops by step.not_finite")
        if in_a_row >= self._policy.max_skipped:
            raise TrainingError(f"step {step}: {in_a_row} steps in a row were not finite: the run stops by step.max_skipped")
        figures = dict(step=step, stage=stage.name, tokens_seen=self._tokens(step + 1), **self._speed(stage), **small)
        figures["time"] = time.time()
        if self._told is not None:
            self._told(step, figures)
        if (step + 1) % self._policy.write_every == 0 or in_a_row:
            self._journal.write(figures | {name: plain(value) for name, value in metrics.items() if value.ndim})
        mean, spike = progress.mean, self._policy.spike
        if spike is not None and mean is not None and loss > mean + spike:
            return f"step {step:,}: loss {loss:.4f}, more than step.spike {spike:g} above its running mean {mean:.4f}"
        if not in_a_row:
            progress.mean = loss if mean is None else RUNNING_MEAN * mean + (1 - RUNNING_MEAN) * loss
        return ""

    def _speed(self, stage: Stage) -> dict[str, float | None]:
        """Tokens a second since the last step that was looked at, and the share of the chips' peak that they are."""
        now = time.perf_counter()
        seconds, self._seen = now - self._seen, now
        mfu = stage.flops / seconds / self._peak if self._peak else None
        return dict(tokens_per_second=stage.tokens / seconds, mfu=mfu)

    def _tokens(self, steps: int) -> int:
        total = 0
        for stage in self._stages:
            made = min(steps, stage.steps)
            total, steps = total + made * stage.tokens, steps - made
        return total

    def _rewound(self, spike: str, first: int, state: Any, at: int, progress: Progress, data: Data) -> tuple[Any, int]:
        """The last checkpoint's state; the data stays where it is, past what the loss rose on, whatever ends this start.

        A checkpoint from before the stage, where newer ones cannot be read, is gone on from as it is, with its own data.
        """
        begun = time.perf_counter()
        self._checkpoints.wait()
        if not self._checkpoints.steps():
            raise TrainingError(f"{spike}; there is no checkpoint yet to go back to")
        found = self._checkpoints.restore(_given_up(state))
        assert found is not None  # there are some
        before = Progress(**found.run["progress"])
        rewound = [*progress.rewound, [at, found.step]]
        times = len(list(itertools.takewhile(lambda pair: pair[1] >= found.step, reversed(rewound))))
        if times > self._policy.max_rewinds:
            went = f"the run went back {times - 1} times to step {found.step:,} without a newer checkpoint since"
            raise TrainingError(f"{spike}; {went}: it stops by step.max_rewinds")
        progress.rewound, progress.mean = rewound, before.mean
        if found.step >= first:
            progress.data = data.state()
        else:
            progress.stage, progress.data = before.stage, before.data
        # At once: a start that ends before its next save must not begin the same again.
        self._checkpoints.rewrite(found.step, found.run | dict(progress=dataclasses.asdict(progress)))
        self._journal.write(dict(step=found.step, rewound_from=at))
        kept = self._trained.get(found.step, 0.0)
        self.seconds["again"] = self.seconds.get("again", 0.0) + self.seconds["train"] - kept
        self.seconds["train"] = kept
        took = time.perf_counter() - begun
        self.seconds["restore"] += took
        self._seen += took
        if self._said is not None:
            for step, reason in found.passed_over.items():
                self._said(f"checkpoint {step} cannot be read: {reason}")
            where = "past the data since" if found.step >= first else "before this stage, whose data begins again"
            self._said(f"{spike}: back to step {found.step:,}, {where} ({times} of {self._policy.max_rewinds} times)")
        return found.state, found.step

    def _save(self, step: int, state: Any, progress: Progress) -> None:
        begun = self._reached(state)
        self._trained[step] = self.seconds["train"]
        self._checkpoints.save(step, state, self._about | dict(progress=dataclasses.asdict(progress)))
        self._saved(begun)

    def _reached(self, state: Any) -> float:
        """When a state's step has ended, which is waited for."""
        begun = time.perf_counter()
        jax.block_until_ready(state.step)
        now = time.perf_counter()
        self.seconds["train"] += now - begun
        return now

    def _saved(self, begun: float) -> None:
        """Count the time since then as a save's, and as none of the next step."""
        took = time.perf_counter() - begun
        self.seconds["save"] += took
        self._seen += took

    def _profile(self, step: int) -> None:
        if self._policy.profile is None or self._trace is None:
            return
        begin, end = self._policy.profile
        if not self._tracing and begin <= step <= end:
            jax.profiler.start_trace(self._trace)
            self._tracing = True
        elif step > end:
            self._end_trace()

    def _end_trace(self) -> None:
        """Write the trace; what hinders that, a full disk say, is told, and the run goes on."""
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:  # the profiler's kind for what the file system refuses
            logger.warning("the trace of watch.profile cannot be written: %s", error)


def _given_up(state: Any) -> Any:
    """The shapes of a state whose arrays are let go of, so that there is room for another one; what is frozen stays."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        form = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        leaf.delete()
        return form

    held = jax.tree.map(shape, dataclasses.replace(state, frozen=None))
    return dataclasses.replace(held, frozen=state.frozen)
