"""When a run is told to end: SIGTERM is remembered, and answered between two steps, by all processes at the same one."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopping:
    """Whether the run has been told to end. A context, within which SIGTERM kills nothing."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._before: Any = None

    def __enter__(self) -> "Stopping":
        # Of several processes each is told in its own moment: jax's own service agrees on a step that none has reached yet.
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._told.set()

    def asked(self, step: int) -> bool:
        """Whether to end before this step; every process asks at every step.

        Args:
            step: about to be made.

        Returns:
            The same on all processes.
        """
        if jax.process_count() == 1:
            return self._told.is_set()
        return multihost_utils.reached_preemption_sync_point(step)
