"""Several processes that read or write one checkpoint: what one cannot do, all refuse, and nobody is left waiting.

Between two agreements every process takes part in the same exchanges between devices, whatever has failed on it meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qwen3_jax.checkpoint.reading import CheckpointError

MESSAGE = 1024  # bytes that a process tells the others


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of a mesh.

    Attributes:
        size: how many.
        index: which of them this one is; the first one makes and renames folders.
    """

    size: int = 1
    index: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the first."""
        return self.index == 0

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that succeeds on every process or fails on every process.

        Raises:
            ValueError: the block's own.
            CheckpointError: another process's, by its index.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except (ValueError, OSError) as caught:  # CheckpointError, ConfigError and MeshError are ValueErrors
            error = caught
        told = self.told("" if error is None else f"{error}" or type(error).__name__)
        if error is not None:
            raise error
        for index, message in enumerate(told):
            if message:
                raise CheckpointError(f"process {index} of {self.size}: {message}")

    def told(self, message: str) -> list[str]:
        """What every process says, in their order; each waits for all.

        Args:
            message: what this one says; cut off after MESSAGE bytes.
        """
        return self.texts(message.encode()[:MESSAGE].decode(errors="ignore"))

    def texts(self, text: str) -> list[str]:
        """What every process has to say, of whatever length, in their order; each waits for all.

        Args:
            text: what this one says.
        """
        if self.size == 1:
            return [text]
        raw = np.frombuffer(text.encode(), np.uint8)
        lengths = multihost_utils.process_allgather(np.asarray(len(raw)))
        padded = np.zeros(max(1, int(lengths.max())), np.uint8)
        padded[: len(raw)] = raw
        rows = multihost_utils.process_allgather(padded)
        return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def all_processes() -> Team:
    """All processes that jax knows."""
    return Team(jax.process_count(), jax.process_index())


def team_of(mesh: Mesh | None) -> Team:
    """The processes whose devices make a mesh.

    Args:
        mesh: None for a model on one device.

    Raises:
        CheckpointError: some of the processes, but neither this one alone nor all.
    """
    if mesh is None or {device.process_index for device in mesh.devices.flat} == {jax.process_index()}:
        return Team()
    there = {device.process_index for device in mesh.devices.flat}
    if len(there) != jax.process_count():
        raise CheckpointError(
            f"a mesh over {len(there)} of {jax.process_count()} processes: accepted is one over all of them, or over this one"
        )
    return all_processes()
