"""Learning rates: stages, each with a warm-up and a way down, one after another."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Kind = Literal["cosine", "warmup-stable-decay", "constant"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """The rate of a stretch of steps.

    Attributes:
        steps: how many.
        peak: the highest rate.
        kind: cosine falls from the warm-up's end, warmup-stable-decay in its last `decay` steps, in a line; constant never.
        start: the rate before the first step, as a share of the peak.
        warmup: steps in which the rate rises in a line; the last of them has the peak.
        decay: steps in which warmup-stable-decay falls.
        end: the last step's rate, as a share of the peak.
    """

    steps: int
    peak: float
    kind: Kind = "cosine"
    start: float = 0.0
    warmup: int = 0
    decay: int = 0
    end: float = 0.1

    def __post_init__(self) -> None:
        falling = self.decay if self.kind == "warmup-stable-decay" else 0
        if self.steps < 1 or self.warmup < 0 or self.decay < 0 or self.warmup + falling > self.steps:
            raise ValueError(
                f"a phase of {self.steps} steps with {self.warmup} of warm-up and {self.decay} of decay: accepted are at least "
                "one step, and no more of both than steps"
            )

    def rate(self, step: jax.Array) -> jax.Array:
        """The rate of a step of this phase, counted from 0."""
        done = step.astype(jnp.float32) + 1
        rising = self.start + (1 - self.start) * done / max(self.warmup, 1)
        if self.kind == "constant":
            share = jnp.float32(1)
        elif self.kind == "cosine":
            passed = jnp.clip((done - self.warmup) / max(self.steps - self.warmup, 1), 0, 1)
            share = self.end + (1 - self.end) * (1 + jnp.cos(jnp.pi * passed)) / 2
        else:
            passed = jnp.clip((done - (self.steps - self.decay)) / max(self.decay, 1), 0, 1)
            share = 1 - (1 - self.end) * passed
        return self.peak * jnp.where(done <= self.warmup, rising, share)


def schedule(phases: Sequence[Phase]) -> optax.Schedule:
    """The rate of each step of a run.

    Args:
        phases: one after another; behind the last one its last rate goes on.

    Returns:
        A function from the step, an int32 scalar counted from 0, to a float32 scalar.

    Raises:
        ValueError: no phase.
    """
    if not phases:
        raise ValueError("a schedule of no phases: accepted is at least one")

    def rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.int32)
        first, found = 0, jnp.float32(0)
        for phase in phases:
            here = phase.rate(jnp.minimum(step - first, phase.steps - 1))
            found = jnp.where(step >= first, here, found)
            first += phase.steps
        return found

    return rate
