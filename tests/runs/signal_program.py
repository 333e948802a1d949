"""What tests of stops start: `qwen3-jax train` that sends itself a signal just before it makes a step.

    python -m tests.runs.signal_program STEP NUMBER RUN.toml [--section.key value ...]

A signal from outside, sent when a line of the step has been read, comes some steps later on a busy machine. Of several
processes it is heard within seconds, however many steps these are: so steps after it take longer and longer.
"""

import itertools
import os
import sys
import time
from typing import Any

import jax

from qwen3_jax.cli.main import main
from qwen3_jax.runs import train

PAUSE = 0.1  # seconds, times the steps since the signal


def install(at: int, number: int) -> None:
    """Put the signal before a step."""
    stage_step = train.stage_step

    def stage_step_with_signal(*given: Any, **options: Any) -> Any:
        step = stage_step(*given, **options)
        numbers: Any = None

        def step_with_signal(state: Any, batch: Any) -> Any:
            nonlocal numbers
            numbers = itertools.count(int(state.step)) if numbers is None else numbers
            since = next(numbers) - at
            if since == 0:
                os.kill(os.getpid(), number)
            if since > 0 and jax.process_count() > 1:
                time.sleep(PAUSE * since)
            return step(state, batch)

        return step_with_signal

    train.stage_step = stage_step_with_signal


if __name__ == "__main__":
    step, number, *words = sys.argv[1:]
    install(int(step), int(number))
    sys.exit(main(["train", *words]))
