"""What the demo shows: a curve in the terminal and as PNG, the load of each expert, what was written, and the verdicts."""

from pathlib import Path

import matplotlib
import numpy as np
from rich import box
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

BARS = " ▁▂▃▄▅▆▇█"
PANEL_LINES = 9


def terminal_curve(losses: list[float], width: int = 72, height: int = 4) -> Text:
    """The loss as a filled curve of block characters, the first and last value beside it."""
    chunks = np.array_split(np.asarray(losses), min(width, len(losses)))
    means = np.asarray([chunk.mean() for chunk in chunks])
    floor = means.min() * 0.9
    levels = (means - floor) / (means.max() - floor) * height * 8
    lines = []
    for row in reversed(range(height)):
        cells = "".join(BARS[int(np.clip(round(level - row * 8), 0, 8))] for level in levels)
        label = f" {means[0]:.2f}" if row == height - 1 else f" {means[-1]:.2f}" if row == 0 else ""
        lines.append(cells + label)
    return Text("\n".join(lines), style="cyan")


def largest_difference(losses: list[float], on_mesh: list[float]) -> float:
    """By how much of its value a loss on the mesh is off one device's at most, over the steps that both did."""
    both = min(len(losses), len(on_mesh))
    one, other = np.asarray(losses[:both]), np.asarray(on_mesh[:both])
    return float(np.max(np.abs(other - one) / one))


def mesh_line(mesh: str, losses: list[float], on_mesh: list[float]) -> str:
    """What became of the training on a mesh, beside one device's."""
    last = min(len(losses), len(on_mesh))
    off = largest_difference(losses, on_mesh)
    return f"on {mesh}: {on_mesh[0]:.3f} -> {on_mesh[last - 1]:.3f} in {last} steps, off one device's by {off:.0e}"


def load_table(load: np.ndarray, layers: list[int]) -> Table:
    """Share of each MoE layer's rows per expert, in percent, with the largest over the mean.

    Args:
        load: [L_moe, E], rows summing to 1.
        layers: the index in the network of each MoE layer.
    """
    experts = load.shape[1]
    title = f"expert load, % of rows (even: {100 / experts:.1f})"
    table = Table(title=title, title_justify="left", padding=(0, 1), box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("layer", justify="right")
    for expert in range(experts):
        table.add_column(f"e{expert}", justify="right")
    table.add_column("max/mean", justify="right")
    for layer, row in zip(layers, load, strict=True):
        table.add_row(str(layer), *(f"{100 * share:.0f}" for share in row), f"{row.max() * experts:.2f}")
    return table


def answer_panel(name: str, text: str) -> Panel:
    """What one mode wrote, its blank lines left out, as many of the rest as fit three panels beside the rest of the screen."""
    lines = "\n".join(line for line in text.splitlines() if line.strip())
    return Panel(escape(lines), title=name, title_align="left", border_style="green", height=PANEL_LINES)


def verdict_line(verdicts: dict[str, bool]) -> str:
    """Each verdict behind its yes or NO, in rich's markup."""
    return "   ".join(f"{'[green]yes' if held else '[red]NO'}[/] {name}" for name, held in verdicts.items())


def save_picture(
    losses: list[float], on_mesh: list[float], held_out: list[tuple[int, float]], load: np.ndarray, path: Path
) -> None:
    """The loss and the expert load side by side, as PNG.

    Args:
        losses: training loss of each step, nats per token.
        on_mesh: likewise, of the same training on a mesh.
        held_out: (step, loss) on text that was not trained on.
        load: [L_moe, E] share of rows.
        path: the file.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(losses, color="#9ecae1", label="training batch")
    left.plot(on_mesh, ".", color="#e6550d", markersize=4, label="the same on 8 devices")
    left.plot(*zip(*held_out, strict=True), "o-", color="#08519c", label="held out")
    left.set(xlabel="step", ylabel="loss, nats per token", title="A 10 M parameter Qwen3-MoE learns Python")
    left.legend()
    image = right.imshow(load * load.shape[1], cmap="viridis", vmin=0, vmax=2, aspect="auto")
    right.set(xticks=range(0, load.shape[1], 2), yticks=range(load.shape[0]))
    right.set(xlabel="expert", ylabel="MoE layer", title="expert load over its mean")
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
