"""Collectives of a compiled program: over which mesh axes they run, what a chip sends, and whether work hides them."""

import dataclasses
import functools
import itertools
import math
import re

from qwen3_jax.planning.costs import bytes_moved, chain_of, is_async_half, is_kernel, matrix_flops
from qwen3_jax.planning.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective, executed once.

    Attributes:
        kind: one of KINDS.
        groups: devices that exchange among each other, by position in the mesh; for collective-permute the pairs; None where
            the text names them in a form that is not known.
        sent: bytes that a chip sends over links.
        overlapped: work is scheduled between its start and its end.
        way: of a collective-permute who sends to whom: sender and receiver by turns.
    """

    kind: str
    groups: Groups | None
    sent: float
    overlapped: bool
    way: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A collective in two halves, and what is scheduled between them.

    Attributes:
        kind: one of KINDS.
        computation: where it stands; of a loop the body.
        start: name of the first half.
        work: names of instructions between, that multiply matrices or move at least as many bytes as the collective.
    """

    kind: str
    computation: str
    start: str
    work: tuple[str, ...]


def transfers(module: Module, computation: Computation, instruction: Instruction, devices: int) -> list[Transfer]:
    """The collectives that one instruction is or, as a fusion, holds.

    Bytes are those of a ring over n chips, for an operand of s bytes: all-gather (n - 1) * s, reduce-scatter and all-to-all
    (n - 1) / n * s, all-reduce both of these, 2 * (n - 1) / n * s; collective-permute s. A ragged all-to-all is taken to be
    full and even.

    Args:
        module: the program.
        computation: where the instruction stands.
        instruction: the instruction.
        devices: of the mesh.

    Returns:
        None for most instructions; a group of one chip exchanges nothing and is left out.
    """
    if instruction.opcode == "fusion":
        fused = module[instruction.called[0]]
        first = any(is_async_half(each, "Start") for each in fused)
        # One that goes on inside of several fusions is counted where it begins.
        pieces = [each for each in fused if first or chain_of(fused, each) is None]
        found = [each for piece in pieces for each in transfers(module, fused, piece, devices)]
        if first:
            hidden = bool(_between(module, computation, instruction))
        else:
            hidden = matrix_flops(module, computation, instruction) > 0
        return [dataclasses.replace(each, overlapped=hidden) for each in found]
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return []
    groups = _pairs(instruction) if kind == "collective-permute" else _groups(instruction, devices)
    size = float(sum(array.size * array.bits // 8 for each in computation.operands(instruction) for array in each.arrays))
    if kind == "all-reduce" and _keeps_a_slice(computation, instruction):
        kind = "reduce-scatter"
    n = max(map(len, groups), default=1) if groups is not None else devices
    if n < 2:
        return []
    share = (n - 1) / n
    sent = size * {"all-gather": n - 1, "all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    overlapped = instruction.opcode.endswith("-start") and bool(_between(module, computation, instruction))
    way = instruction.numbers("source_target_pairs") if kind == "collective-permute" else ()
    return [Transfer(kind, groups, sent, overlapped, tuple(way))]


def _keeps_a_slice(computation: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce is half of a reduce-scatter: a TPU's compiler writes that as a fusion of both."""
    return computation.root.opcode == "dynamic-slice" and computation.root.operands[0] == instruction.name


def overlaps(module: Module) -> list[Overlap]:
    """All collectives of a program that come in two halves, with the work between these.

    Args:
        module: the program, scheduled.

    Returns:
        In the order of the text.
    """
    found = []
    for computation in module.computations.values():
        for instruction in computation:
            kind = instruction.opcode.removesuffix("-start")
            chained = _chain(module, instruction)
            if chained is not None and chained[1] == "Start":
                kind = chained[2]
            elif kind not in KINDS or kind == instruction.opcode:
                continue
            found.append(Overlap(kind, computation.name, instruction.name, _between(module, computation, instruction)))
    return found


def _chain(module: Module, instruction: Instruction) -> tuple[tuple[str, str], str, str] | None:
    """Of a fusion that begins or ends a collective: which one, "Start" or "Done", and the kind."""
    if instruction.opcode != "fusion":
        return None
    fused = module[instruction.called[0]]
    halves = [half for half in ("Start", "Done") if any(is_async_half(each, half) for each in fused)]
    chains = [(chain, each.opcode) for each in fused if each.opcode in KINDS and (chain := chain_of(fused, each)) is not None]
    return (chains[0][0], halves[0], chains[0][1]) if halves and chains else None


def _between(module: Module, computation: Computation, start: Instruction) -> tuple[str, ...]:
    """Names of the instructions that work while a transfer is on its way."""
    moved = sum(array.bytes for each in computation.operands(start) for array in each.arrays)
    names = list(computation.instructions)
    first, chain = names.index(start.name) + 1, _chain(module, start)

    def ends(instruction: Instruction) -> bool:
        if chain is None:
            return instruction.opcode.endswith("-done") and start.name in instruction.operands
        return (_chain(module, instruction) or ())[:2] == (chain[0], "Done")

    last = next((at for at in range(first, len(names)) if ends(computation[names[at]])), first)
    between = names[first:last]
    return tuple(name for name in between if _works(module, computation, computation[name], moved))


def _works(module: Module, computation: Computation, instruction: Instruction, moved: float) -> bool:
    if is_kernel(instruction) or matrix_flops(module, computation, instruction) > 0:
        return True
    if instruction.opcode in ("while", "call", "conditional"):
        parts = [module[name] for name in instruction.called]
        return any(_works(module, part, each, moved) for part in parts for each in part)
    return instruction.opcode == "fusion" and bytes_moved(module, computation, instruction, None) >= moved


def _pairs(instruction: Instruction) -> Groups:
    numbers = instruction.numbers("source_target_pairs")
    return frozenset(frozenset(pair) for pair in itertools.batched(numbers, 2) if pair[0] != pair[1])


def _groups(instruction: Instruction, devices: int) -> Groups | None:
    """Groups in any of the forms that HLO writes them in: named axes, an iota with transposes, or lists."""
    found = re.search(
        r", replica_groups=(mesh\[.*?\](?:,? ?device_ids=\(.*?\))? ?\{[^}]*\}|[^ ]*?(?:T\([\d,]*\))?)(?:, |$)", instruction.rest
    )
    text = found.group(1) if found else ""
    named = re.fullmatch(r"mesh\[(.*?)\](?:,? ?device_ids=\((.*?)\))? ?\{(.*)\}", text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named.group(1))}
        ids = list(range(math.prod(sizes.values()))) if named.group(2) is None else _listed(named.group(2))
        return _along(list(sizes.values()), ids, _split_axes(sizes, named.group(3))) if ids else None
    if text.startswith("["):
        count, _ = (int(size) for size in text[1 : text.index("]")].split(","))
        ids = _listed(text[text.index("<=") :])
        size = len(ids) // count
        return frozenset(frozenset(ids[at : at + size]) for at in range(0, len(ids), size))
    if text in ("", "{}"):
        return frozenset([frozenset(range(devices))])
    return frozenset(frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))


def _split_axes(sizes: dict[str, int], text: str) -> list[tuple[int, int, int]]:
    """Axes that a group runs along: (axis, elements before a part of it, the part's size); all of it where no part is named."""
    names = list(sizes)
    axes = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", text)
    return [(names.index(name), int(before or 1), int(size or sizes[name])) for name, before, size in axes]


def _along(shape: list[int], ids: list[int], axes: list[tuple[int, int, int]]) -> Groups:
    """Ids in row-major order, those together that differ along the axes alone."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for place, device in zip(itertools.product(*map(range, shape)), ids, strict=True):
        rest = list(place)
        for axis, before, size in axes:
            after = shape[axis] // (before * size)
            rest[axis] -= (place[axis] // after % size) * after
        groups.setdefault(tuple(rest), set()).add(device)
    return frozenset(frozenset(group) for group in groups.values())


def _listed(text: str) -> list[int]:
    """`<=[4,2]T(1,0)`, the numbers from 0 laid out as [4, 2], transposed and read out again; or the numbers themselves."""
    found = re.search(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return [int(number) for number in re.findall(r"\d+", text)]
    shape = [int(size) for size in found.group(1).split(",")]
    order = [int(axis) for axis in found.group(2).split(",")] if found.group(2) else list(range(len(shape)))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = itertools.product(*(range(shape[axis]) for axis in order))
    return [sum(at * strides[axis] for at, axis in zip(place, order, strict=True)) for place in places]


@functools.cache
def _axis_groups(shape: tuple[tuple[str, int], ...]) -> dict[Groups, tuple[str, ...]]:
    sizes = [size for _, size in shape]
    ids = list(range(math.prod(sizes)))
    wide = [at for at, size in enumerate(sizes) if size > 1]
    return {
        _along(sizes, ids, [(axis, 1, sizes[axis]) for axis in axes]): tuple(shape[axis][0] for axis in axes)
        for count in range(1, len(wide) + 1)
        for axes in itertools.combinations(wide, count)
    }


def axes_of(transfer: Transfer, shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes that a collective's groups run along.

    Args:
        transfer: the collective.
        shape: name -> size of the mesh's axes, in order; devices are numbered row-major.

    Returns:
        Names in the mesh's order, axes of size 1 left out; of a collective-permute the fewest chips that hold all pairs; ()
        where the groups are those of no axes.
    """
    if transfer.groups is None:
        return ()
    known = _axis_groups(tuple(shape.items()))
    if transfer.kind != "collective-permute":
        return known.get(transfer.groups, ())
    for groups, axes in sorted(known.items(), key=lambda item: len(next(iter(item[0])))):
        home = {device: group for group in groups for device in group}
        if all(pair <= home[next(iter(pair))] for pair in transfer.groups):
            return axes
    return ()
