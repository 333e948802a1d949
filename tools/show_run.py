"""A run's report as one picture, for a page that shows pictures alone: `python -m tools.show_run RUN_FOLDER PICTURE.png`.

The same figures as in report.html: the loss and the held-out loss over tokens, tokens a second, each expert's load in one layer
over time, and the seconds of every start by kind. A dashed line is where the run was begun again.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro

from qwen3_jax.runs.report import KINDS, without_rewound
from qwen3_jax.training.journal import read_lines

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw a run's report."""

    folder: tyro.conf.Positional[Path]
    """Of the run: it holds metrics.jsonl and starts.jsonl."""
    picture: tyro.conf.Positional[Path]
    """PNG to write."""
    layer: int = 0
    """The MoE layer whose experts are shown."""


def main(options: Options) -> int:
    """Draw the picture.

    Returns:
        0, or 2 where there is nothing to draw.
    """
    journal, told = options.folder / "metrics.jsonl", options.folder / "starts.jsonl"
    for file in (journal, told):
        if not file.is_file():
            print(f"{file} is not there: accepted is the folder of a run that has ended at least once", file=sys.stderr)
            return 2
    lines, starts = without_rewound(list(read_lines(journal)))[0], list(read_lines(told))
    steps = [line for line in lines if isinstance(line.get("loss"), float)]
    looks = [line for line in lines if isinstance(line.get("held_out_loss"), float)]
    if not steps:
        print(f"{journal} has no step yet: accepted is one with at least one", file=sys.stderr)
        return 2
    again = [tokens_before(start["first"], lines) / 1e3 for start in starts[1:]]
    figure, ((loss, load), (rate, time)) = pyplot.subplots(2, 2, figsize=(11, 6.2), layout="constrained")
    loss.plot(*_points(steps, "loss"), color="#9ecae1", label="loss")
    if looks:
        loss.plot(*_points(looks, "held_out_loss"), "o-", color="#08519c", markersize=4, label="held-out loss")
    loss.set(title="loss", xlabel="thousand tokens", ylabel="nats per token")
    rate.plot(*_points(steps, "tokens_per_second"), color="#3ca951", linewidth=1)
    rate.set(title="speed", xlabel="thousand tokens", ylabel="tokens a second", ylim=(0, None))
    for axes in (loss, rate):
        for number, tokens in enumerate(again):
            axes.axvline(tokens, color="#b3261e", linestyle="--", linewidth=1, label=None if number else "begun again")
    loss.legend()
    _experts(load, steps, options.layer)
    _seconds(time, starts)
    figure.savefig(options.picture, dpi=90)
    return 0


def tokens_before(step: int, lines: Sequence[Mapping[str, Any]]) -> float:
    """Tokens that a run had seen before a step, as far as its journal tells: stages differ in the tokens of their steps.

    Args:
        step: counted from the run's first.
        lines: of its journal; at least one.

    Returns:
        What the line of the step before says, else what lies between the lines around, or as far behind the last two.
    """
    seen = {0: 0} | {line["step"] + 1: line["tokens_seen"] for line in lines if "tokens_seen" in line}
    steps = sorted(seen)
    after = min(max(1, int(np.searchsorted(steps, step))), len(steps) - 1)
    low, high = steps[after - 1], steps[after]
    return seen[low] + (step - low) * (seen[high] - seen[low]) / (high - low)


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [line["tokens_seen"] / 1e3 for line in lines], [line[name] for line in lines]


def _experts(axes: Any, steps: Sequence[Mapping[str, Any]], layer: int) -> None:
    """Load of each expert over its even share: blue none, white the share, red twice that."""
    found = [line for line in steps if line.get("expert_load")]
    if not found:
        axes.text(0.5, 0.5, "the model has no experts", ha="center")
        axes.set_axis_off()
        return
    loads = np.asarray([line["expert_load"][layer] for line in found]).T  # [expert, time]
    extent = (found[0]["tokens_seen"] / 1e3, found[-1]["tokens_seen"] / 1e3, len(loads) - 0.5, -0.5)
    image = axes.imshow(
        loads * len(loads), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.set(title=f"load of experts over their even share, MoE layer {layer}", xlabel="thousand tokens", ylabel="expert")
    axes.figure.colorbar(image)


def _seconds(axes: Any, starts: Sequence[Mapping[str, Any]]) -> None:
    """A bar a start, of the kinds of time that it took."""
    names = [f"{number}: {start['came_to']}" for number, start in enumerate(starts, 1)]
    left = np.zeros(len(starts))
    for kind in KINDS:
        values = np.asarray([start["seconds"].get(kind, 0.0) for start in starts])
        if values.max() > 0.01 * sum(sum(start["seconds"].values()) for start in starts):
            axes.barh(names, values, left=left, label=kind)
            left += values
    axes.invert_yaxis()
    axes.set(title="where the time of each start went", xlabel="seconds")
    axes.legend(ncols=2, fontsize="small")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
