"""The text of a compiled program (HLO) as computations and instructions: taken apart here, interpreted elsewhere.

The form is that of `compiled.as_text()`: computations in braces, one instruction a line, in the order of the schedule where the
header says `is_scheduled=true`. A TPU's arrays carry their layout: the order of the dimensions in memory, tiles that they are
padded to, and the memory they lie in (`S(1)` is VMEM; none is HBM).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([^)]*)\)((?:\([^)]*\))*)")
_MEMORY = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r'\}(?:, execution_thread="[^"]*")?')
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations|body|condition)=(?:\{([^}]*)\}|%?([\w.\-]+))")

HBM = 0
LINE = 512  # bytes of 128 lanes of 32 bits: a piece of a TPU's tile that is not scattered over it


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type and place.

    Attributes:
        dtype: as HLO names it, "bf16".
        dims: sizes.
        order: dimensions from the fastest to the slowest in memory; () where the text has no layout.
        tile: sizes that the fastest dimensions are padded to multiples of, slowest first; () for none.
        packed: rows of a tile that lie interleaved in its 32-bit words: 2 of bfloat16 in T(8,128)(2,1).
        memory: where it lies; HBM is 0, VMEM 1, others hold scalars and flags.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    packed: int = 1
    memory: int = HBM

    @property
    def size(self) -> int:
        """Elements, without padding."""
        return math.prod(self.dims)

    @functools.cached_property
    def bits(self) -> int:
        """Of one element: 8 for pred, 0 for what is no number (tokens)."""
        digits = re.search(r"\d+", self.dtype)
        return 8 if self.dtype == "pred" else int(digits.group()) if digits else 0

    @functools.cached_property
    def bytes(self) -> int:
        """In memory, padded to whole tiles."""
        sizes = self._in_memory(self.dims)
        for at, tile in enumerate(reversed(self.tile), start=1):
            sizes[-at] = -(-sizes[-at] // tile) * tile
        return math.prod(sizes) * self.bits // 8

    def _in_memory(self, sizes: tuple[int, ...]) -> list[int]:
        """Sizes of the dimensions from the slowest to the fastest, no fewer than the tile's."""
        ordered = [sizes[axis] for axis in reversed(self.order)] if self.order else list(sizes)
        return [1] * (len(self.tile) - len(ordered)) + ordered

    def line_bytes(self, window: tuple[int, ...]) -> int:
        """Bytes of the lines that a window of the array lies in, if it begins where a line does.

        A tile of 8 x 128 is eight lines of 512 bytes one behind another: each one row of float32, or two of bfloat16 word by
        word (https://openxla.org/xla/tiled_layout). A row of the array is one line of each tile that it passes through.

        Args:
            window: sizes along each dimension.

        Returns:
            Bytes; never more than those of the whole tiles. Without tiles those of the elements.
        """
        whole = dataclasses.replace(self, dims=window).bytes
        if not self.tile:
            return whole
        *outer, lanes = self._in_memory(window)
        if len(self.tile) > 1:
            outer[-1] = -(-outer[-1] // self.packed)
            run = self.tile[-1] * self.packed * self.bits // 8  # one row of a tile, with those in the same words
            lines = -(-lanes // self.tile[-1]) * -(-run // LINE)
        else:
            lines = -(-lanes * self.bits // (8 * LINE))
        return min(whole, math.prod(outer) * lines * LINE)


Tree = Shape | tuple["Tree", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in the program.
        opcode: "fusion", "all-gather-start".
        shape: of the result; tuples nest.
        operands: names of instructions of the same computation.
        literal: what stands between the parentheses, which for constants and parameters are no names.
        rest: what follows them: attributes, metadata, backend_config.
    """

    name: str
    opcode: str
    shape: Tree
    operands: tuple[str, ...]
    literal: str
    rest: str

    @functools.cached_property
    def arrays(self) -> tuple[Shape, ...]:
        """The result's arrays, tuples flattened."""
        return tuple(leaves(self.shape))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it names, of a loop the condition and the body."""
        return tuple(name for group, one in _CALLED.findall(self.rest) for name in (_NAME.findall(group) or [one]) if name)

    def attribute(self, name: str) -> str:
        """The text of an attribute, "" where there is none; a value ends at the comma outside of its brackets and quotes."""
        found = re.search(rf", {re.escape(name)}=", self.rest)
        if found is None:
            return ""
        depth, quoted, at = 0, False, found.end()
        while at < len(self.rest):
            char = self.rest[at]
            if char == "\\":
                at += 1
            elif char == '"':
                quoted = not quoted
            elif not quoted:
                if char == "," and depth == 0:
                    break
                depth += (char in "([{") - (char in ")]}")
            at += 1
        return self.rest[found.end() : at]

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of integers, () where there is none."""
        return tuple(int(digits) for digits in re.findall(r"-?\d+", self.attribute(name)))


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions that each use earlier ones.

    Attributes:
        name: unique in the program.
        instructions: by name, in the text's order.
        root: the one whose result is the computation's.
    """

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By their number."""
        return {int(each.literal): each for each in self if each.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions whose results it reads."""
        return tuple(self.instructions[name] for name in instruction.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
        computations: by name.
        entry: where it begins.
    """

    computations: dict[str, Computation]
    entry: Computation

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def leaves(shape: Tree) -> Iterator[Shape]:
    """The arrays of a shape, in order.

    Args:
        shape: an array or a tuple of them.

    Yields:
        Arrays.
    """
    if isinstance(shape, Shape):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


def parse(text: str) -> Module:
    """Take a program's text apart.

    Args:
        text: of `compiled.as_text()`.

    Returns:
        The program.

    Raises:
        ValueError: there is no entry computation, or a line that is none of HLO's.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and name is None:
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif name is not None and _END.fullmatch(line):
            computations[name] = _computation(name, lines)
            name = None
        elif name is not None and _INSTRUCTION.match(line):
            lines.append(line)
        elif name is not None and lines:
            lines[-1] += line  # a kernel's metadata may have lines of its own
    if entry is None or entry not in computations:
        raise ValueError("the text of a compiled program has a computation that begins with ENTRY; this one has none")
    return Module(computations, computations[entry])


def _computation(name: str, lines: list[str]) -> Computation:
    instructions: dict[str, Instruction] = {}
    root = None
    for line in lines:
        instruction, is_root = _instruction(line)
        instructions[instruction.name] = instruction
        root = instruction if is_root else root
    if root is None:
        raise ValueError(f"computation {name} has no line with ROOT")
    return Computation(name, instructions, root)


def _instruction(line: str) -> tuple[Instruction, bool]:
    found = _INSTRUCTION.match(line)
    if found is None:
        raise ValueError(f"no instruction: {line[:200]!r}")
    shape, at = _shape(line, found.end())
    opcode = _OPCODE.match(line, at)
    if opcode is None:
        raise ValueError(f"no opcode after the shape: {line[:200]!r}")
    end = _closing(line, opcode.end() - 1)
    inside, kind = line[opcode.end() : end], opcode.group(1)
    names = () if kind in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(found.group(2), kind, shape, names, inside, line[end + 1 :]), bool(found.group(1))


def _closing(text: str, at: int) -> int:
    """Where the bracket at `at` closes."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        char = text[i]
        if char == '"':
            quoted = not quoted
        elif not quoted:
            depth += (char == "(") - (char == ")")
            if depth == 0:
                return i
    raise ValueError(f"a bracket that does not close: {text[:200]!r}")


def _shape(text: str, at: int) -> tuple[Tree, int]:
    """The shape that begins at `at`, and where it ends."""
    if text[at] != "(":
        found = _ARRAY.match(text, at)
        if found is None:
            raise ValueError(f"no shape at {text[at : at + 80]!r}")
        return _array(found.group()), found.end()
    parts, at = [], at + 1
    while text[at] != ")":
        if text.startswith("/*", at):
            at = text.index("*/", at) + 2
        elif text[at] in ", ":
            at += 1
        else:
            part, at = _shape(text, at)
            parts.append(part)
    return tuple(parts), at + 1


@functools.cache
def _array(text: str) -> Shape:
    found = _ARRAY.match(text)
    assert found is not None  # the caller matched it
    dtype, sizes, layout = found.groups()
    dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    order, _, places = (layout or "").partition(":")
    tile, memory = _TILE.search(places), _MEMORY.search(places)
    packed = re.search(r"\((\d+),1\)$", tile.group(2)) if tile else None
    return Shape(
        dtype,
        dims,
        tuple(int(axis) for axis in order.split(",") if axis),
        tuple(int(size) for size in tile.group(1).split(",")) if tile else (),
        int(packed.group(1)) if packed else 1,
        int(memory.group(1)) if memory else HBM,
    )
