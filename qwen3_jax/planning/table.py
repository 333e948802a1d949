"""A plan in the terminal."""

from rich.console import Console
from rich.table import Table

from qwen3_jax.parallel.rules import RULES
from qwen3_jax.planning.candidates import Candidate
from qwen3_jax.planning.plan import Plan
from qwen3_jax.planning.rank import Row, assumptions

WIDEST = 130  # letters in a row of the widest table
PARTS = ("weights", "optimizer", "cache", "gradients", "activations", "working")


def gigabytes(row: Row, name: str) -> str:
    """A category in GB, or what stands for none."""
    return f"{row.bytes[name] / 1e9:.2f}" if row.bytes.get(name) else "-"


def milliseconds(value: float | None) -> str:
    """Seconds as ms."""
    return "-" if value is None else f"{value * 1e3:,.2f}" if value < 0.1 else f"{value * 1e3:,.0f}"


def show_estimates(console: Console, best: list[Candidate], considered: int) -> None:
    """Say what will be compiled, and what the analytic model says of it.

    Args:
        console: where to.
        best: the candidates that will be compiled.
        considered: how many there were, or were named.
    """
    console.print(f"{considered} meshes fit the divisibility rules, {len(best)} will be compiled")
    rows = [
        (each.wish, [each.rules.name, each.transport or "-", f"{each.bytes / 1e9:.1f}", milliseconds(each.time.total)])
        for each in best
    ]
    _print(console, "analytic, before compiling", ("rules", "experts by", "GB a device", "step ms"), rows)


def show_plan(console: Console, plan: Plan) -> None:
    """Print the ranked rows, what each one's collectives send, and all assumptions.

    Args:
        console: where to.
        plan: the plan.
    """
    chip = plan.topology.chip
    named = f"{plan.model}, {plan.job.mode}, {plan.job.batch} x {plan.job.seq} on {plan.topology.name}"
    parts = ("total", *PARTS)
    sizes = [(row.candidate.wish, [row.candidate.rules.name, *(gigabytes(row, part) for part in parts)]) for row in plan.rows]
    _print(console, f"{named}: GB of a device, of {chip.hbm / 1e9:.1f}", ("rules", *parts), sizes)
    console.print(
        "total is compiled; weights, optimizer and cache are from the arguments' shapes; gradients and activations are "
        "analytic, working is the rest of the compiled temporaries"
    )
    _print(console, "a step of a device", TIMES, [(row.candidate.wish, _times(row)) for row in plan.rows])
    console.print("TFLOP and GB are compiled; milliseconds are those over the chip's facts, by the assumptions below")
    for table in dict.fromkeys(row.candidate.rules for row in plan.rows):
        rows = (f"{name}={'+'.join(axes)}" for name, axes in table.rows.items() if axes != RULES.table[name])
        console.print(f"rules {table.name}: {' '.join(rows) or 'those of a model'}")
    for row in plan.rows:
        console.print(f"\n{row.candidate.wish}: {row.verdict}; compiled in {row.outcome.seconds:.0f} s")
        for move in sorted(row.moves, key=lambda move: -move.seconds):
            each = move.collective
            console.print(
                f"    {each.kind} over {' x '.join(each.axes) or '?'}: {each.bytes / 1e9:.3g} GB sent in {each.count:,}, "
                f"{milliseconds(move.seconds)} ms, {'overlapped' if each.overlapped else 'waited for'} ({move.network})"
            )
    console.print("\nassumptions")
    said = dict.fromkeys(line for row in plan.rows for line in assumptions(plan.job, plan.topology, plan.efficiency, row))
    for line in said:
        console.print(f"    {line}")
    console.print(f"    {chip.name}: {chip.source}")


TIMES = ("TFLOP", "HBM GB", "timed GB", "products", "memory", "exposed", "step ms", "tokens/s/chip", "MFU")


def _times(row: Row) -> list[str]:
    program, time = row.outcome.program, row.time
    if program is None or time is None:
        return ["-"] * len(TIMES)
    return [
        f"{program.flops / 1e12:.4g}",
        f"{program.hbm_bytes / 1e9:,.1f}",
        f"{program.timed_hbm_bytes / 1e9:,.1f}",
        *(milliseconds(value) for value in (time.compute, time.hbm, time.exposed, time.total)),
        "-" if row.tokens_per_second_per_chip is None else f"{row.tokens_per_second_per_chip:,.0f}",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
    ]


def _print(console: Console, title: str, names: tuple[str, ...], rows: list[tuple[str, list[str]]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("mesh", *names):
        table.add_column(name, justify="left" if name in ("mesh", "rules") else "right", no_wrap=True)
    for mesh, cells in rows:
        table.add_row(mesh, *cells)
    console.print(table)
