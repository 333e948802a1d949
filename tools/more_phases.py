"""More places of tools/run_in_phases.py: where a run neither steps nor saves. tools/end_anywhere.py says what is done there."""

import functools
import os
from typing import Any

MORE = {
    "mesh.before": "before the mesh is told",
    "data.begun": "before a stage's loader is made, or its thread begins to read",
    "stage.between": "between two stages, before the second one's loader is made",
    "look.held_out": "in the held-out loss, one batch read",
    "look.prompts": "before the completions of prompts",
    "rewind.begun": "a spike is found, nothing is read",
    "rewind.read": "the state of the last checkpoint is read, nothing is written",
    "rewind.written": "the checkpoint says of the rewind, the journal does not",
    "rewind.done": "the journal says of it, no step is made",
    "step.last": "before the last step",
    "last.export": "the last step is saved, the export at the end is not written",
    "last.report": "all is written but the report",
    "last.exit": "all is written, the process is about to end",
}
"""Places, and what a run is in the midst of."""


def install_more(phases: Any) -> None:
    """Replace what a run goes through.

    Args:
        phases: of tools/run_in_phases.py.
    """
    from qwen3_jax.runs import export, look, train
    from qwen3_jax.training.checkpoints import Checkpoints
    from qwen3_jax.training.loop import Loop

    begins, init = train.initialize, train._StageData.__init__
    given = os.environ.get("TOOLS_HEARTBEAT")
    silence: dict[str, Any] = {} if given is None else dict(heartbeat=float(given))

    def initialize(*args: Any, **options: Any) -> Any:
        phases.stop("mesh.before")
        return begins(*args, **options, **silence)

    def stage_data(self: Any, run: Any, stage: Any, mesh: Any, rules: Any, at: Any, carried: bool) -> None:
        phases.stop("data.begun")
        if carried:
            phases.stop("stage.between")
        init(self, run, stage, mesh, rules, at, carried)

    def run(self: Any, *args: Any, **options: Any) -> Any:
        phases.last = self.steps - 1
        return runs(self, *args, **options)

    runs, Loop.run = Loop.run, run
    train.initialize = initialize
    train._StageData.__init__ = stage_data
    _before(look.Look, "_completions", phases, "look.prompts")
    _before(look, "_sums", phases, "look.held_out")
    _before(export.Exports, "last", phases, "last.export")
    _before(train, "write_report", phases, "last.report")
    _before(Checkpoints, "rewrite", phases, "rewind.read", "rewind.written")
    _before(Loop, "_rewound", phases, "rewind.begun", "rewind.done")


def _before(owner: Any, name: str, phases: Any, place: str, after: str = "") -> None:
    real = getattr(owner, name)

    @functools.wraps(real)
    def in_phases(*args: Any, **options: Any) -> Any:
        phases.stop(place)
        found = real(*args, **options)
        phases.stop(after)
        return found

    setattr(owner, name, in_phases)
