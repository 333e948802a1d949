"""What fills a compiled program's memory when it is fullest, read from XLA's dump of its buffers.

XLA writes the dump where XLA_FLAGS=--xla_dump_to=FOLDER is set before jax starts its compiler; buffers are placed long before
machine code is made, so they can be read while the rest of the compilation goes on.
"""

import dataclasses
import re
from pathlib import Path

SMALL = 2**20  # bytes of a buffer that is not worth a row
_SUFFIX = "after_optimizations-buffer-assignment.txt"
_LATER = "after_optimizations_after_buffer_assignment.txt"


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One place in memory that is in use.

    Attributes:
        bytes: its size.
        shape: of the largest value that lies there.
        operation: where in the program it comes from, jax's name of it; "" where XLA made it up.
    """

    bytes: int
    shape: str
    operation: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """A program's memory on a device.

    Attributes:
        arguments: bytes.
        temporaries: bytes set aside for all else, gaps included.
        live: bytes of them that are in use when most are.
        peak: the operation that then runs.
        buffers: those in use then, the largest first.
    """

    arguments: int
    temporaries: int
    live: int
    peak: str
    buffers: tuple[Buffer, ...]


def dumped(folder: Path, *, ended: bool = False) -> Path | None:
    """The dump of the largest program in a folder, once it is whole.

    XLA writes the files that are read here side by side, and for a TPU the text of what it does next (`_LATER`) after them.

    Args:
        folder: that XLA writes to.
        ended: the compiler has ended, so that all it wrote is whole.

    Returns:
        The file with the program's buffers; None where there is none yet.
    """
    found = [path for path in folder.glob(f"*{_SUFFIX}") if ended or Path(str(path).replace(_SUFFIX, _LATER)).exists()]
    whole = [path for path in found if ended or program_text(path).endswith("}\n\n")]
    return max(whole, key=lambda path: path.stat().st_size, default=None)


def read_memory(path: Path) -> Memory:
    """Read a dump.

    Args:
        path: what `dumped` gave.

    Returns:
        The memory.
    """
    arguments, temporaries, values = _allocations(path)
    ranges, order = _live_ranges(Path(str(path).replace("buffer-assignment", "live-range")))
    names = _operations(Path(str(path).replace(_SUFFIX, "after_optimizations.txt")))
    alive = [(*value, *ranges[value[0]]) for value in values if value[0] in ranges and value[1] >= SMALL]
    best, at = 0, 0
    for moment in {first for *_, first, _ in alive}:
        used = _union([(offset, size) for _, size, offset, _, first, last in alive if first <= moment <= last])
        if used > best:
            best, at = used, moment
    places: dict[int, list[tuple]] = {}
    for name, size, offset, shape, first, last in alive:
        if first <= at <= last:
            places.setdefault(offset, []).append((size, shape, names.get(name.partition("{")[0], "")))
    buffers = []
    for there in places.values():
        size, shape, _ = max(there)
        buffers.append(Buffer(size, shape, next((operation for _, _, operation in there if operation), "")))
    peak = names.get(order.get(at, ""), order.get(at, ""))
    return Memory(arguments, temporaries, best, peak, tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)))


def _union(pieces: list[tuple[int, int]]) -> int:
    """Bytes covered by (offset, size) pieces that may overlap."""
    total, end = 0, 0
    for offset, size in sorted(pieces):
        total += max(0, offset + size - max(offset, end))
        end = max(end, offset + size)
    return total


def _allocations(path: Path) -> tuple[int, int, list[tuple[str, int, int, str]]]:
    """Bytes of arguments, bytes of temporaries, and the values (name, size, offset, shape) of the latter."""
    head = re.compile(r"allocation \d+: size (\d+), (.*)")
    line_of_value = re.compile(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (\S+?\])")
    arguments, temporaries, values = 0, 0, []
    reading = None
    for line in path.read_text().splitlines():
        if found := head.match(line):
            size, what = int(found[1]), found[2]
            there = "color" not in what  # in the chip's memory: others are of VMEM, of the host, of semaphores
            arguments += size if there and " parameter " in f" {what}" else 0
            reading = [] if there and "preallocated-temp" in what and size > temporaries else None
            if reading is not None:
                temporaries, values = size, reading
        elif reading is not None and (found := line_of_value.match(line)):
            reading.append((found[1].removesuffix("{}"), int(found[2]), int(found[3]), found[4]))
    return arguments, temporaries, values


def _live_ranges(path: Path) -> tuple[dict[str, tuple[int, int]], dict[int, str]]:
    """When each value is needed, and which instruction runs at each moment."""
    ranges, order = {}, {}
    for line in path.read_text().splitlines():
        if found := re.match(r"\s+(\S+?)(\{[\d,]*\}):(\d+)-(\d+)$", line):
            ranges[found[1] + found[2].removeprefix("{}")] = (int(found[3]), int(found[4]))
        elif found := re.match(r"\s+(\d+):(\S+)$", line):
            order[int(found[1])] = found[2]
    return ranges, order


def _operations(path: Path) -> dict[str, str]:
    """Jax's name of each instruction."""
    pattern = re.compile(r"\s*(?:ROOT )?%?(\S+) = .*?op_name=\"([^\"]*)\"")
    return {found[1]: found[2] for line in path.read_text().splitlines() if (found := pattern.match(line))}


def program_text(path: Path) -> str:
    """The optimised program of a dump, as text.

    Args:
        path: what `dumped` gave.

    Returns:
        XLA's HLO.
    """
    return Path(str(path).replace(_SUFFIX, "after_optimizations.txt")).read_text()
