"""A plan as one page that needs no network: a table, two plots, every collective and every assumption."""

from collections.abc import Sequence
from html import escape

from qwen3_jax.pages import STYLE, cells, svg
from qwen3_jax.planning.plan import Plan
from qwen3_jax.planning.rank import SOURCES, Row, assumptions
from qwen3_jax.planning.table import PARTS, gigabytes, milliseconds

COLORS = {
    "weights": "#4269d0",
    "optimizer": "#97bbf5",
    "cache": "#6cc5b0",
    "gradients": "#efb118",
    "activations": "#ff8ab7",
    "working": "#9c6b4e",
    "output": "#9498a0",
    "products": "#4269d0",
    "memory": "#3ca951",
    "overlapped": "#efb118",
    "waited for": "#ff725c",
}
WIDTH, LEFT, BAR = 900, 260, 18  # pixels


def page(plan: Plan) -> str:
    """The page.

    Args:
        plan: the plan.

    Returns:
        HTML with its styles and plots in it.
    """
    job, topology = plan.job, plan.topology
    title = f"{plan.model}, {job.mode}, {job.batch} x {job.seq} on {topology.name}"
    slices = f" in {topology.slices} slices" if topology.slices > 1 else ""
    verdicts = "".join(
        f"<tr><td>{escape(row.candidate.wish)}</td><td class='words{'' if row.fits else ' no'}'>{escape(row.verdict)}</td></tr>"
        for row in plan.rows
    )
    said = dict.fromkeys(line for row in plan.rows for line in assumptions(job, topology, plan.efficiency, row))
    said[f"{topology.chip.name}: {topology.chip.source}"] = None
    sources = "".join(
        f"<tr><td>{escape(name)}</td><td class='words'>{escape(where)}</td></tr>" for name, where in SOURCES.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p>{topology.chips} chips{slices}, {topology.devices} devices; {plan.considered} meshes fit, {len(plan.rows)} were compiled.
Bytes, FLOPs and times are of one device and one step.</p>
<div class="scroll">{_table(plan.rows)}</div>
<table>{verdicts}</table>
<h2>Bytes of a device</h2>
{_memory(plan)}
<h2>Time of a step</h2>
{_time(plan)}
<h2>Collectives</h2>
<div class="scroll">{_collectives(plan.rows)}</div>
<h2>Assumptions</h2>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in said)}</ul>
<h2>Where each figure is from</h2>
<table>{sources}</table>
</body>
</html>
"""


def _table(rows: list[Row]) -> str:
    head = [
        "mesh",
        "rules",
        "total GB",
        *PARTS,
        "TFLOP",
        "HBM GB",
        "timed GB",
        "step ms",
        "tokens/s/chip",
        "MFU",
        "compiled in s",
    ]
    body = []
    for row in rows:
        program, rate = row.outcome.program, row.tokens_per_second_per_chip
        body.append(
            [
                row.candidate.wish,
                row.candidate.rules.name,
                gigabytes(row, "total"),
                *(gigabytes(row, part) for part in PARTS),
                f"{program.flops / 1e12:.4g}" if program else "-",
                f"{program.hbm_bytes / 1e9:,.1f}" if program else "-",
                f"{program.timed_hbm_bytes / 1e9:,.1f}" if program else "-",
                milliseconds(row.time.total if row.time else None),
                "-" if rate is None else f"{rate:,.0f}",
                "-" if row.mfu is None else f"{row.mfu:.1%}",
                f"{row.outcome.seconds:.0f}",
            ]
        )
    return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in body)}</table>"


def _collectives(rows: list[Row]) -> str:
    head = ["mesh", "collective", "axes", "GB sent", "executions", "ms", "beside computation", "network"]
    body = [
        [
            row.candidate.wish,
            move.collective.kind,
            " x ".join(move.collective.axes) or "?",
            f"{move.collective.bytes / 1e9:.4g}",
            f"{move.collective.count:,}",
            milliseconds(move.seconds),
            "yes" if move.collective.overlapped else "no",
            move.network,
        ]
        for row in rows
        for move in sorted(row.moves, key=lambda move: -move.seconds)
    ]
    return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in body)}</table>"


def _memory(plan: Plan) -> str:
    bars = []
    for row in plan.rows:
        parts = [(part, row.bytes.get(part, 0) / 1e9) for part in PARTS]
        if "output" in row.bytes:
            parts.append(("output", (row.bytes["output"] - row.bytes["aliased"]) / 1e9))
        if "total" in row.bytes:
            bars.append((row.candidate.wish, [parts]))
    return chart(bars, "GB", line=(plan.topology.chip.hbm / 1e9, "HBM"))


def _time(plan: Plan) -> str:
    bars = []
    for row in plan.rows:
        if row.time is not None:
            moves = [("overlapped", row.time.overlapped * 1e3), ("waited for", row.time.waiting * 1e3)]
            split = [[("products", row.time.compute * 1e3)], [("memory", row.time.hbm * 1e3)], moves]
            bars.append((f"{row.candidate.wish}: {milliseconds(row.time.total)} ms", split))
    return chart(bars, "ms")


def chart(
    bars: Sequence[tuple[str, Sequence[Sequence[tuple[str, float]]]]], unit: str, line: tuple[float, str] | None = None
) -> str:
    """Horizontal stacked bars as an SVG.

    Args:
        bars: label, and one or more bars under it, each the parts that are stacked: name (a key of COLORS) and length.
        unit: of the lengths.
        line: a length that is marked across all bars, and its name.

    Returns:
        The SVG element; a sentence where there are no bars.
    """
    if not bars:
        return "<p>Nothing was compiled.</p>"
    lengths = [sum(length for _, length in parts) for _, stacks in bars for parts in stacks]
    most = max([*lengths, line[0] if line else 0.0]) * 1.05 or 1.0
    scale = (WIDTH - LEFT) / most
    drawn, top = [], 30
    for label, stacks in bars:
        drawn.append(f'<text x="{LEFT - 8}" y="{top + BAR * len(stacks) / 2 + 4:g}" text-anchor="end">{escape(label)}</text>')
        for parts in stacks:
            at = float(LEFT)
            for name, length in parts:
                said = f"{name}: {length:,.2f} {unit}"
                drawn.append(
                    f'<rect x="{at:.1f}" y="{top}" width="{length * scale:.1f}" height="{BAR - 3}" fill="{COLORS[name]}">'
                    f"<title>{escape(said)}</title></rect>"
                )
                at += length * scale
            drawn.append(f'<text x="{at + 4:.1f}" y="{top + BAR - 6}">{sum(length for _, length in parts):,.1f}</text>')
            top += BAR
        top += 10
    if line is not None:
        x = LEFT + line[0] * scale
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="22" y2="{top}" stroke="#b3261e" stroke-dasharray="4 3"/>')
        drawn.append(f'<text x="{x:.1f}" y="16" text-anchor="end">{escape(line[1])} {line[0]:.1f} {unit}</text>')
    names = dict.fromkeys(name for _, stacks in bars for parts in stacks for name, length in parts if length)
    x = float(LEFT)
    for name in names:
        drawn.append(f'<rect x="{x:g}" y="{top + 8}" width="12" height="12" fill="{COLORS[name]}"/>')
        drawn.append(f'<text x="{x + 16:g}" y="{top + 18}">{escape(name)}</text>')
        x += 34 + 7 * len(name)
    return f"{svg(WIDTH + 70, top + 30)}{''.join(drawn)}</svg>"
