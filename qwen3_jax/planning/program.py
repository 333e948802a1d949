"""What a compiled program needs and does on one chip, read from the compiler's own output."""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from qwen3_jax.planning.collectives import Overlap, axes_of, transfers
from qwen3_jax.planning.collectives import overlaps as module_overlaps
from qwen3_jax.planning.costs import bytes_moved, counts_kernel, is_kernel, kernel_name, matrix_flops
from qwen3_jax.planning.hlo import HBM, Computation, Instruction, parse
from qwen3_jax.planning.loops import executions

# Kernels of jax's megablox, whose work depends on how many of their rows belong to a group; their estimates take all.
GROUPED = ("gmm", "tgmm")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of a kind of collective over the same mesh axes.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute or ragged-all-to-all.
        axes: mesh axes that its groups run along; () if they are those of none.
        bytes: that a chip sends over links in one run of the program, by the ring's arithmetic (collectives.transfers).
        count: executions, those in loops multiplied.
        overlapped: work is scheduled between its start and its end.
        ways: of permutes that are overlapped, into how many directions they go: bytes over those of the busiest direction.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    overlapped: bool
    ways: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What one run of a program does on one chip, by its text.

    Attributes:
        flops: of matrix products and kernels, every loop multiplied by its rounds.
        grouped_flops: those of them that kernels of experts declare: for all rows of their buffers, filled or not.
        hbm_bytes: read from and written to HBM, likewise, by the compiler's rules; what it placed in VMEM does not count.
        timed_hbm_bytes: the same with gathered and scattered rows counted by the lines that they lie in (Shape.line_bytes).
        collectives: merged by kind, axes and overlap, those that send most first.
        unknown: what could not be counted, in words.
    """

    flops: float
    grouped_flops: float
    hbm_bytes: float
    timed_hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(Counts):
    """One run of a compiled program on one chip: what it does, and what it needs.

    Attributes:
        arguments: bytes.
        output: bytes.
        temporaries: bytes.
        aliased: bytes of output that lie where arguments did.
        code: bytes.
    """

    arguments: int
    output: int
    temporaries: int
    aliased: int
    code: int


class DoesNotFit(Exception):
    """A program that needs more memory than a chip has.

    Attributes:
        needed: bytes.
        available: bytes.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"the program needs {needed / 2**30:.2f} GiB of memory, a chip has {available / 2**30:.2f}")
        self.needed = needed
        self.available = available


def read_program(compiled: jax.stages.Compiled, mesh: Mesh) -> Program:
    """Count what a program does.

    Args:
        compiled: the program, of a TPU's compiler.
        mesh: what it was compiled for; its devices in their order are the program's.

    Returns:
        The counts.

    Raises:
        ValueError: the compiler gives no text or no memory analysis for this platform.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise ValueError(
            "the compiled program has no text or no memory analysis: accepted are those that a TPU's compiler makes"
        )
    return Program(
        **vars(counted(text, dict(mesh.shape))),
        arguments=memory.argument_size_in_bytes,
        output=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def counted(text: str, shape: dict[str, int], memory: int | None = HBM) -> Counts:
    """Count what a program's text does.

    Args:
        text: of `compiled.as_text()`.
        shape: name -> size of the mesh's axes.
        memory: which memory's bytes count; None for all.

    Returns:
        The counts.
    """
    module = parse(text)
    devices = math.prod(shape.values())
    unknown: list[str] = []
    flops = moved = timed = 0.0
    sums: dict[tuple[str, tuple[str, ...], bool], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    ways: dict[tuple[str, tuple[str, ...], bool], dict[Any, float]] = collections.defaultdict(
        lambda: collections.defaultdict(float)
    )
    kernels: dict[tuple[str, bool], list[float]] = collections.defaultdict(lambda: [0, 0.0])

    def weight(computation: Computation, instruction: Instruction) -> float:
        return matrix_flops(module, computation, instruction)

    for each in executions(module, unknown, weight):
        work = each.times * weight(each.computation, each.instruction)
        flops += work
        moved += each.times * bytes_moved(module, each.computation, each.instruction, memory)
        timed += each.times * bytes_moved(module, each.computation, each.instruction, memory, lines=True)
        if is_kernel(each.instruction):
            row = kernels[kernel_name(each.instruction), counts_kernel(each.computation, each.instruction)]
            row[0] += each.times
            row[1] += work
        for transfer in transfers(module, each.computation, each.instruction, devices):
            axes = axes_of(transfer, shape)
            if transfer.groups is None:
                unknown.append(f"{transfer.kind} {each.instruction.name}: its groups are written in a form that is not known")
            key = (transfer.kind, axes, transfer.overlapped)
            ways[key][transfer.way] += each.times * transfer.sent
            total = sums[key]
            total[0] += each.times * transfer.sent
            total[1] += each.times
    for (name, known), (times, work) in kernels.items():
        if not known:
            unknown.append(f"{times:.0f} calls of the kernel {name}: it carries no estimate of its FLOPs")
        elif name in GROUPED:
            unknown.append(
                f"{times:.0f} calls of the kernel {name}, {work:.3g} FLOPs: rows of no group are counted like the others"
            )
    merged = [
        # Permutes that nothing waits for run side by side.
        Collective(
            kind, axes, round(total), round(count), hidden, total / max(ways[kind, axes, hidden].values()) if hidden else 1
        )
        for (kind, axes, hidden), (total, count) in sums.items()
    ]
    return Counts(
        flops=flops,
        grouped_flops=sum(work for (name, _), (_, work) in kernels.items() if name in GROUPED),
        hbm_bytes=moved,
        timed_hbm_bytes=timed,
        collectives=tuple(sorted(merged, key=lambda collective: -collective.bytes)),
        unknown=tuple(dict.fromkeys(unknown)),
    )


def overlaps(text: str) -> list[Overlap]:
    """The collectives of a program that come in two halves, and the work that is scheduled between them.

    Args:
        text: of `compiled.as_text()`.

    Returns:
        One for each start, in the order of the text.
    """
    return module_overlaps(parse(text))


def memory_of_failure(error: Exception) -> DoesNotFit | None:
    """What a program would have needed that failed to compile for want of memory.

    Args:
        error: what the compiler raised.

    Returns:
        None for any other error.
    """
    text = str(error)
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text) or re.search(
        r"([\d.]+)([KMGT]?)B?\)? exceeds (?:the )?(?:available )?(?:HBM )?\(?([\d.]+)([KMGT]?)", text
    )
    if found is None:
        return None
    needed, needed_unit, available, available_unit = found.groups()
    return DoesNotFit(int(float(needed) * UNITS[needed_unit]), int(float(available) * UNITS[available_unit]))
