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
        self._asked = 0
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
        """Whether to end before this step; every process asks before every step, and as often as the others.

        Args:
            step: about to be made.

        Returns:
            The same on all processes.
        """
        if jax.process_count() == 1:
            return self._told.is_set()
        # jax's service agrees on the number after the highest that any process has given, and waits for that very one. Steps
        # would not do: of a signal before the first ask it would be 1, which a run that goes on at step 60 never comes to.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)
