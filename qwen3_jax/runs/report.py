"""A run as one page that needs no network: its loss, the load of its experts, its speed, and where its time went."""

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.pages import STYLE, cells, heat, lines, said
from qwen3_jax.runs.schema import Run
from qwen3_jax.training.journal import read_lines
from qwen3_jax.whole_files import write_whole

KINDS = ("start", "compile", "train", "data", "save", "look", "restore", "again")
MEANINGS = (
    "start: processes, weights or checkpoint, until the first step. compile: first step of each stage. data: waiting for "
    "batches. save: waiting for checkpoints, and the export. look: held-out loss and completions. restore: going back after a "
    "spike. again: steps that a kill or a spike took back. Of a killed start the journal's times tell: its start holds the "
    "first lines' steps, its train all that followed and was kept."
)
MOST_POINTS = 1000  # of a line
MOST_LAYERS = 8  # whose experts are shown over time


def write_report(run: Run, folder: Path) -> None:
    """Write <folder>/report.html of what metrics.jsonl and starts.jsonl there say; whole or not at all.

    Args:
        run: the run.
        folder: its folder.
    """
    journal, starts = folder / "metrics.jsonl", folder / "starts.jsonl"
    told = [list(read_lines(file)) if file.exists() else [] for file in (journal, starts)]
    write_whole(folder / "report.html", report(run, *told))


def report(run: Run, journal: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        run: the run.
        journal: lines of metrics.jsonl.
        starts: lines of starts.jsonl.

    Returns:
        HTML with its styles and plots in it.
    """
    kept, rewinds = without_rewound(journal)
    steps = [line for line in kept if "loss" in line]
    held_out = [line for line in kept if "held_out_loss" in line]
    loss, rate = _points(steps, "loss"), _points(steps, "tokens_per_second")
    losses = {"loss": means(loss)}
    if len(loss) > MOST_POINTS:
        losses["highest of the steps around"] = highest(loss)
    losses["held-out loss"] = means(_points(held_out, "held_out_loss"))
    written = [line for line in kept if "completions" in line]
    title = f"Run {run.name}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<table>{_summary(run, steps, held_out, starts)}</table>
<h2>Loss, nats per token</h2>
{lines(losses, "tokens", "loss")}
<h2>Load of experts</h2>
{_load(steps)}
<h2>Tokens a second</h2>
{lines({"tokens/s": means(rate)}, "tokens", "tokens/s")}
<h2>Where the time went, in seconds</h2>
<div class="scroll">{_goodput(starts)}</div>
<p>{escape(MEANINGS)}</p>
<h2>Restarts, rewinds and boards lost</h2>
{_interruptions(starts, rewinds)}
{_completions(written)}
</body>
</html>
"""


def without_rewound(journal: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
    """The lines of steps that counted, and each time that the run went back.

    Args:
        journal: lines of metrics.jsonl.

    Returns:
        The lines; and of each rewind `rewound_from`, `step`, that it went back to, and `seconds` of the steps taken back, as
        far as lines tell.
    """
    kept: list[Mapping[str, Any]] = []
    rewinds = []
    for line in journal:
        if "rewound_from" not in line:
            kept.append(line)
            continue
        times = [old["time"] for old in kept if old["step"] >= line["step"] and "time" in old]
        kept = [old for old in kept if old["step"] < line["step"]]
        rewinds.append(
            {"rewound_from": line["rewound_from"], "step": line["step"], "seconds": times[-1] - times[0] if times else 0}
        )
    return kept, rewinds


def means(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Points in at most so many groups of neighbours: the mean of each."""
    return [tuple(np.mean(group, axis=0).tolist()) for group in _groups(points, most)]


def highest(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Points in at most so many groups of neighbours: the highest of each."""
    return [max(group, key=lambda point: point[1]) for group in _groups(points, most)]


def _groups(points: Sequence[tuple[float, float]], most: int) -> list[Sequence[tuple[float, float]]]:
    size = math.ceil(len(points) / most) or 1
    return [points[at : at + size] for at in range(0, len(points), size)]


def _points(found: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A figure over tokens; the words that stand for numbers that are not finite are left out."""
    return [(line["tokens_seen"], line[name]) for line in found if isinstance(line[name], int | float)]


def _summary(
    run: Run, steps: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> str:
    rows = [("it", starts[-1]["came_to"] if starts else "has not ended yet")]
    if steps:
        last = steps[-1]
        rows += [
            ("steps", f"{last['step'] + 1:,} of {run.steps:,}"),
            ("tokens", f"{said(last['tokens_seen'])} of {said(run.tokens)}"),
        ]
        rows += [("loss", _figure(last["loss"])), ("tokens/s", _figure(last["tokens_per_second"]))]
        if last.get("mfu") is not None:
            rows.append(("MFU", f"{last['mfu']:.1%}"))
        rows.append(("steps that were not finite", f"{last['skipped']}"))
        rows.append(("rows that experts dropped", f"{sum(line['dropped_rows'] for line in steps):g}"))
    if held_out:
        rows.append(("held-out loss", _figure(held_out[-1]["held_out_loss"])))
    return "".join(cells("td", row) for row in rows)


def _figure(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, int | float) else str(value)


def _load(steps: Sequence[Mapping[str, Any]]) -> str:
    """Of some layers each expert over time; and of the last line all experts of all layers."""
    found = [line for line in steps if line.get("expert_load")]
    if not found:
        return "<p>The model has no experts.</p>"
    every = math.ceil(len(found) / MOST_POINTS)
    loads = np.asarray([line["expert_load"] for line in found[::every]], np.float64)  # [time, layer, expert]
    times, layers, experts = loads.shape
    loads *= experts
    shown = sorted({round(at) for at in np.linspace(0, layers - 1, min(layers, MOST_LAYERS))})
    tall = min(160, max(32, 8 * experts))
    pictures = [
        f"<p>MoE layer {layer}</p>{heat(loads[:, layer].T, f'experts of MoE layer {layer} over time', 900, tall)}"
        for layer in shown
    ]
    last = heat(loads[-1], "load of each expert at the last line, a row a layer", 900, min(600, max(32, 8 * layers)))
    violation = [(line["tokens_seen"], max(line["max_violation"])) for line in found]
    return (
        "<p>Blue an expert without rows, white its even share, red twice that or more; a row is an expert, and time runs to "
        f"the right over {times} lines.</p>{''.join(pictures)}<p>The last line: a row is a layer, a column an expert.</p>{last}"
        "<p>How much more than its even share the busiest expert of any layer got:</p>"
        f"{lines({'busiest layer': means(violation)}, 'tokens', 'max_violation')}"
    )


def _goodput(starts: Sequence[Mapping[str, Any]]) -> str:
    """The table of starts, other being what no kind holds, and the share of all seconds that were not spent on steps."""
    head = ["start", "steps", "came to", *KINDS, "other", "all"]
    rows, sums = [], dict.fromkeys((*KINDS, "other", "all"), 0.0)
    for number, start in enumerate(starts, 1):
        seconds = {kind: start["seconds"].get(kind, 0.0) for kind in KINDS}
        whole = sum(seconds.values()) if start["ended"] is None else start["ended"] - start["begun"]
        seconds |= {"other": max(whole - sum(seconds.values()), 0.0), "all": whole}
        sums = {kind: sums[kind] + value for kind, value in seconds.items()}
        what = [f"{number}: {_when(start['begun'])}", f"{start['first']:,} to {start['step']:,}", start["came_to"]]
        rows.append([*what, *(f"{value:,.1f}" for value in seconds.values())])
    rows.append(["all starts", "", "", *(f"{value:,.1f}" for value in sums.values())])
    lost = lost_share(starts)
    sentence = "" if lost is None else f"<p>Share of the time of all starts that was lost, for it made no step: {lost:.1%}.</p>"
    return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table>{sentence}"


def lost_share(starts: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the seconds of all starts that went to anything but steps which counted.

    Args:
        starts: lines of starts.jsonl.

    Returns:
        From 0 to 1; None where no seconds are known.
    """
    known = [start for start in starts if start["ended"] is not None]
    whole = sum(start["ended"] - start["begun"] for start in known)
    trained = sum(start["seconds"].get("train", 0.0) for start in known)
    return 1 - trained / whole if whole > 0 else None


def _interruptions(starts: Sequence[Mapping[str, Any]], rewinds: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for before, start in zip(starts, starts[1:], strict=False):
        paused = "" if before["ended"] is None else f", {start['begun'] - before['ended']:,.0f} s later"
        again = before["step"] - start["first"]
        twice = f"; {again:,} steps were made again" if again > 0 else ""
        told.append(f"{before['came_to']} at step {before['step']:,}, begun again at step {start['first']:,}{paused}{twice}")
    for number, start in enumerate(starts, 1):
        told += [f"start {number} went on without a board: {reason}" for reason in start.get("lost", ())]
    for rewind in rewinds:
        went = f"back from step {rewind['rewound_from']:,} to step {rewind['step']:,}"
        told.append(f"the loss rose: {went}, {rewind['seconds']:,.1f} s of steps")
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in told)}</ul>" if told else "<p>None.</p>"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + " UTC"


def _completions(written: Sequence[Mapping[str, Any]]) -> str:
    if not written:
        return ""
    last = written[-1]
    rows = "".join(cells("td", pair, "text") for pair in last["completions"].items())
    return f"<h2>Completions after step {last['step']:,}</h2><table>{rows}</table>"
