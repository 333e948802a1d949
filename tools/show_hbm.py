r"""Which instructions of a compiled program move its HBM bytes, from the text that tools/compile_for_pod.py writes.

    .venv/bin/python tools/compile_for_pod.py qwen3-30b-a3b --mesh fsdp=16 --text step.txt
    .venv/bin/python tools/show_hbm.py step.txt --top 20

Two figures for each: by the compiler's rules, where a gathered row counts whole tiles, and by the lines that it lies in.
"""

import argparse
import collections
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen3_jax.planning.costs import bytes_moved, is_kernel, kernel_name, matrix_flops  # noqa: E402
from qwen3_jax.planning.hlo import Instruction, Module, parse  # noqa: E402
from qwen3_jax.planning.loops import executions  # noqa: E402


def main() -> int:
    """Print one table by kind of instruction, and one of the largest instructions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="of `compiled.as_text()`")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also list the N instructions that move most")
    given = parser.parse_args()
    module = parse(given.text.read_text())
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    single = []
    for each in executions(module, [], lambda computation, instruction: matrix_flops(module, computation, instruction)):
        sizes = [each.times * bytes_moved(module, each.computation, each.instruction, lines=lines) for lines in (False, True)]
        if not sizes[0]:
            continue
        row = kinds[kind_of(module, each.instruction)]
        for at, value in enumerate((each.times, *sizes)):
            row[at] += value
        single.append((sizes, each.times, each.instruction))
    console = Console()
    table = Table("instructions", title="HBM bytes of a run on one chip, GB")
    for name in ("executions", "whole tiles", "lines"):
        table.add_column(name, justify="right")
    for kind, (times, *sizes) in sorted(kinds.items(), key=lambda pair: -pair[1][1]):
        table.add_row(kind, f"{times:,.0f}", *(f"{size / 1e9:,.1f}" for size in sizes))
    table.add_row("all", "", *(f"{sum(row[at] for row in kinds.values()) / 1e9:,.1f}" for at in (1, 2)))
    console.print(table)
    for sizes, times, instruction in sorted(single, key=lambda row: -row[0][0])[: given.top]:
        origin = re.search(r'op_name="([^"]*)"', instruction.rest)
        shapes = " ".join(f"{array.dtype}{list(array.dims)}" for array in instruction.arrays[:3])
        tiles, lines = (f"{size / 1e9:.1f}" for size in sizes)
        text = f"{tiles} / {lines} GB, {times} x {instruction.name} {shapes} {origin.group(1)[-110:] if origin else ''}"
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    return 0


def kind_of(module: Module, instruction: Instruction) -> str:
    """Its opcode; of a kernel its name, of a fusion what it holds that moves bytes in a way of its own."""
    if is_kernel(instruction):
        return f"kernel {kernel_name(instruction)}"
    if instruction.opcode != "fusion":
        return instruction.opcode
    inside = inner_opcodes(module, instruction)
    held = [name for name in ("gather", "scatter", "convolution", "dynamic-update-slice", "dynamic-slice") if name in inside]
    return f"fusion with {', '.join(held)}" if held else "fusion"


def inner_opcodes(module: Module, fusion: Instruction) -> set[str]:
    """Opcodes of a fusion and of those in it."""
    found = set()
    for each in module[fusion.called[0]]:
        found |= inner_opcodes(module, each) if each.opcode == "fusion" else {each.opcode}
    return found


if __name__ == "__main__":
    sys.exit(main())
