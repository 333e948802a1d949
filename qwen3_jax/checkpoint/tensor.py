"""A tensor in a file: read and written whole, by rows, or by boxes that cut along any axis."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen3_jax.checkpoint.reading import CheckpointError, system_errors

# Bytes: what lies in shorter runs is read as whole rows and cut, where that does not read more than twice as much.
LONG_RUN = 2**16

Box = tuple[slice, ...]  # one slice an axis, with its start and its stop


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is all of an array."""
    return tuple(slice(0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    """The shape of what a box holds."""
    return tuple(side.stop - side.start for side in box)


def last_cut(box: Box, shape: tuple[int, ...]) -> int:
    """The last axis along which a box is less than the array; 0 where it is all of it. What lies behind is contiguous."""
    return max((axis for axis, size in enumerate(shape) if extents(box)[axis] != size), default=0)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: where it lies and what it is."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, first: int, last: int) -> Tensor:
        """Rows first..last of the leading axis, as a tensor of its own; nothing is read.

        Args:
            first: first row.
            last: past the last row, at most shape[0].
        """
        row = self.nbytes // self.shape[0]
        name = f"{self.name}[{first}:{last}]"
        shape = (last - first, *self.shape[1:])
        return dataclasses.replace(self, name=name, shape=shape, begin=self.begin + first * row)

    def reshaped(self, *shape: int) -> Tensor:
        """The same bytes in another shape."""
        return dataclasses.replace(self, shape=shape)

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        return self.read_box(whole(self.shape))

    def read_box(self, box: Box) -> np.ndarray:
        """What a box holds, in memory of its own; at most twice its bytes are read.

        Args:
            box: within the tensor's shape.

        Raises:
            CheckpointError: the file ends before the box does.
        """
        wide = self._widened(box)
        out = np.empty(extents(wide), self.dtype)
        view = memoryview(out.reshape(-1).view(np.uint8))
        with system_errors(self.file), open(self.file, "rb", buffering=0) as handle:
            at = 0
            for begin, nbytes in self._runs(wide):
                handle.seek(self.begin + begin)
                got = _fill(handle, view[at : at + nbytes])
                if got < nbytes:
                    raise CheckpointError(f"{self.file}: {self.name} ends after {begin + got} of its {self.nbytes} bytes")
                at += nbytes
        if wide == box:
            return out
        cut = tuple(slice(side.start - at.start, side.stop - at.start) for side, at in zip(box, wide, strict=True))
        return out[cut].copy()

    def write_box(self, box: Box, values: np.ndarray) -> None:
        """Put values where a box lies in the file, which has its full size already.

        Args:
            box: within the tensor's shape.
            values: in the tensor's dtype and of the box's shape.

        Raises:
            CheckpointError: other values than the box takes, or the disk refuses.
        """
        if values.dtype != self.dtype or values.shape != extents(box):
            raise CheckpointError(
                f"{self.file}: {self.name} is {values.dtype}{list(values.shape)}, planned {self.dtype}{list(extents(box))}"
            )
        view = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        with system_errors(self.file), open(self.file, "r+b", buffering=0) as handle:
            at = 0
            for begin, nbytes in self._runs(box):
                handle.seek(self.begin + begin)
                write_all(handle, view[at : at + nbytes])
                at += nbytes
            start_writeback(handle)

    def _runs(self, box: Box) -> Iterator[tuple[int, int]]:
        """Offset and length, in bytes, of each contiguous run of a box, in order."""
        axis = last_cut(box, self.shape)
        sides = extents(box)
        nbytes = math.prod(sides[axis:]) * self.dtype.itemsize
        strides = [math.prod(self.shape[i + 1 :]) * self.dtype.itemsize for i in range(len(self.shape))]
        first = sum(side.start * stride for side, stride in zip(box, strides, strict=True))
        for index in np.ndindex(sides[:axis]):
            yield first + sum(i * stride for i, stride in zip(index, strides, strict=False)), nbytes

    def _widened(self, box: Box) -> Box:
        """The box with short runs made whole rows."""
        most, wide = 2 * math.prod(extents(box)), box
        while True:
            axis = last_cut(wide, self.shape)
            sides = extents(wide)
            if math.prod(sides[:axis]) <= 1 or math.prod(sides[axis:]) * self.dtype.itemsize >= LONG_RUN:
                return wide
            wider = (*wide[:axis], slice(0, self.shape[axis]), *wide[axis + 1 :])
            if math.prod(extents(wider)) > most:
                return wide
            wide = wider


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: in one file, or by runs of its rows in several, the last of which may be longer than is needed."""

    tensors: tuple[Tensor, ...]

    def read_box(self, box: Box) -> np.ndarray:
        """As of `Tensor`."""
        found = [tensor.read_box(part) for tensor, part, _ in self._split(box)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def write_box(self, box: Box, values: np.ndarray) -> None:
        """As of `Tensor`."""
        for tensor, part, rows in self._split(box):
            tensor.write_box(part, values[rows])

    def _split(self, box: Box) -> Iterator[tuple[Tensor, Box, slice]]:
        """The part of a box that lies in each file, within that file's tensor and as rows of the box."""
        first = 0
        for tensor in self.tensors:
            last = first + tensor.shape[0]
            start, stop = max(box[0].start, first), min(box[0].stop, last)
            if start < stop:
                rows = slice(start - box[0].start, stop - box[0].start)
                yield tensor, (slice(start - first, stop - first), *box[1:]), rows
            first = last


def _fill(handle: io.RawIOBase, view: memoryview) -> int:
    """Read until a view is full or the file ends; bytes read."""
    got = 0
    while got < len(view):
        count = handle.readinto(view[got:])
        if not count:
            break
        got += count
    return got


def write_all(handle: io.RawIOBase, data: bytes | memoryview) -> None:
    """Write all of it: one call of an unbuffered file may write less."""
    view = memoryview(data)
    while len(view):
        view = view[handle.write(view) :]


def start_writeback(handle: io.RawIOBase) -> None:
    """Let the disk begin now, while the next tensor is read, instead of at the fsync.

    Linux starts to write dirty pages when it is told that they are no longer wanted in memory.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
