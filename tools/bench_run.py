"""What a run costs beside its bare steps, on this machine's CPU: packed rows, figures, looks, data, and saves.

    python -m tools.bench_run [--parts packing figures data saves]

packing and figures take the demo's model (tools/demo) and turns of a few steps, one kind after the other; a share is of turns
next to each other. data and saves are configs/demo.toml on one device: its loader, and its run with a checkpoint every 20
steps, where each ten steps that follow a save are held against the ten that follow those.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import qwen3_jax
from qwen3_jax import Batch
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from qwen3_jax.runs.resolve import resolve
from qwen3_jax.runs.train import train
from qwen3_jax.training.checkpoints import Checkpoints
from qwen3_jax.training.journal import Journal
from qwen3_jax.training.loop import Loop, Policy, Progress, Stage
from qwen3_jax.training.sinks import Board, TensorBoard
from tools.bench_data import processor_seconds, texts
from tools.demo.__main__ import demo_config
from tools.demo.corpus import conversations, train_tokenizer

EVERY = 20  # steps between saves: half of them follow a save, half do not
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    parts: tuple[Literal["packing", "figures", "data", "saves"], ...] = ("packing", "figures", "data", "saves")
    """Which tables."""
    rows: int = 8
    """Of a batch, of packing and figures."""
    length: int = 256
    """Tokens of a row, likewise."""
    rounds: int = 10
    """Turns of each kind, likewise."""
    steps: int = 4
    """Of a turn, likewise."""
    saves: int = 6
    """Of the run."""


class Turns:
    """The demo's model in training, by turns of some steps."""

    def __init__(self, options: Options):
        self.config = demo_config(1, 0)
        self.options = options
        self.optimizer = qwen3_jax.adamw(1e-4)
        model = jax.jit(lambda: qwen3_jax.Qwen3(self.config, rngs=nnx.Rngs(0), dtype=jnp.float32))()
        self.state = qwen3_jax.init_train_state(model, self.optimizer)
        self.step = qwen3_jax.make_train_step(self.config, self.optimizer, dtype=jnp.float32, remat="none")

    def batch(self, number: int, documents: int = 0) -> Batch:
        """Random words; in each row so many documents of uneven lengths, or one that has no id."""
        rows, length = self.options.rows, self.options.length
        draw = np.random.default_rng(number)
        tokens = draw.integers(0, self.config.vocab_size, (rows, length + 1), dtype=np.int32)
        if not documents:
            return Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], mask=np.ones((rows, length), np.float32))
        cuts = np.sort(draw.permuted(np.tile(np.arange(1, length), (rows, 1)), axis=1)[:, : documents - 1], axis=1)
        ids = (np.arange(length + 1)[None, :, None] >= cuts[:, None, :]).sum(-1).astype(np.int32) + 1
        mask = (ids[:, 1:] == ids[:, :-1]).astype(np.float32)
        return Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], mask=mask, segment_ids=ids[:, :-1])

    def bare(self, documents: int = 0, step: Callable[..., Any] | None = None) -> None:
        """A turn of steps, and nothing else."""
        metrics = None
        for number in range(self.options.steps):
            self.state, metrics = (step or self.step)(self.state, self.batch(number, documents))
        jax.block_until_ready((self.state, metrics))

    def interleaved(self, kinds: Mapping[str, Callable[[], None]]) -> dict[str, np.ndarray]:
        """Seconds a step of each turn, by kind."""
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(-1, self.options.rounds):  # the first one compiles
            for name in list(kinds)[:: 1 if turn % 2 else -1]:
                begin = time.perf_counter()
                kinds[name]()
                if turn >= 0:
                    found[name].append((time.perf_counter() - begin) / self.options.steps)
        return {name: np.asarray(seconds) for name, seconds in found.items()}


def shares(title: str, found: dict[str, np.ndarray], tokens: int) -> Table:
    """Each kind beside the first one."""
    table = Table("", "s a step", "tokens/s", "more than the first", "its quarters", title=title, title_justify="left")
    base = next(iter(found.values()))
    for name, seconds in found.items():
        low, middle, high = np.quantile(seconds / base - 1, (0.25, 0.5, 0.75))
        more = ("", "") if seconds is base else (f"{middle:+.1%}", f"{low:+.1%} to {high:+.1%}")
        table.add_row(name, f"{np.median(seconds):.3f}", f"{tokens / np.median(seconds):,.0f}", *more)
    return table


def bench_packing(options: Options, console: Console) -> None:
    """Rows of one document without ids, of one with, of four and of sixteen."""
    turns = Turns(options)
    kinds: dict[str, Callable[[], None]] = {
        "one document, no ids": lambda: turns.bare(),
        "one document, ids": lambda: turns.bare(1),
        "4 documents": lambda: turns.bare(4),
        "16 documents": lambda: turns.bare(16),
    }
    title = f"packed rows, {options.rows} x {options.length}, load {os.getloadavg()[0]:.1f}"
    console.print(shares(title, turns.interleaved(kinds), options.rows * options.length))


class Nowhere(Checkpoints):
    """Saves nothing: what is timed is the loop."""

    def save(self, step: int, state: Any, run: Mapping[str, Any]) -> None:
        """Leave it."""


@dataclasses.dataclass
class Given:
    """A loop's data: batches that are made as a bare turn's are."""

    turns: Turns
    number: int = 0

    def __next__(self) -> Batch:
        self.number += 1
        return self.turns.batch(self.number - 1)

    def state(self) -> dict[str, Any]:
        """None to speak of."""
        return {}

    def report(self) -> dict[str, Any]:
        """Likewise."""
        return {}

    def close(self) -> None:
        """Nothing is read ahead."""


class Never:
    """Nobody tells the run to end."""

    def asked(self, step: int) -> bool:
        """No."""
        return False


def bench_figures(options: Options, console: Console) -> None:
    """Steps that give their loss alone, those that give all figures, and the loop that writes every one of them down."""
    turns = Turns(options)

    @functools.partial(jax.jit, donate_argnums=0)
    def lean(state: Any, batch: Batch) -> tuple[Any, Any]:
        following, metrics = turns.step.jitted(state, None, batch, turns.step.graph((state.params,)))
        return following, metrics["loss"]

    with tempfile.TemporaryDirectory(prefix="bench-run-") as place, Nowhere(Path(place) / "checkpoints") as nowhere:

        def loop(every: int, *boards: Board) -> Callable[[], None]:
            journal = Journal(Path(place) / f"{every}.jsonl", 0, boards=boards)

            def turn() -> None:
                steps = int(turns.state.step) + options.steps
                stage = Stage("all", steps, options.rows * options.length, 1.0, turns.step, lambda at, on: Given(turns))
                policy = Policy(save_every=10**9, write_every=every, look_every=10**9)
                turns.state, _ = Loop([stage], policy, nowhere, journal, about={}).run(turns.state, Progress(), Never())
                jax.block_until_ready(turns.state)

            return turn

        kinds = {
            "steps that give the loss alone": lambda: turns.bare(step=lean),
            "steps that give all figures": lambda: turns.bare(),
            "the loop, a line of metrics.jsonl every 10": loop(10),
            "a line every step, and TensorBoard": loop(1, Board("tensorboard", lambda: TensorBoard(Path(place) / "board", 0))),
        }
        found = turns.interleaved(kinds)
    title = f"figures, {options.rows} x {options.length}, load {os.getloadavg()[0]:.1f}"
    console.print(shares(title, found, options.rows * options.length))


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """A folder with the standard library's functions tokenised, for training and held out."""
    with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
        place = Path(folder)
        train_tokenizer(conversations(), 2048, place / "tokenizer")
        functions = [text for text in texts()[1] if text.strip()]
        for name, documents in (("taught", functions[200:]), ("held", functions[:200])):
            lines = [json.dumps({"text": text}) + "\n" for text in documents]
            (place / f"{name}.jsonl").write_text("".join(lines), "utf-8")
            prepare([str(place / f"{name}.jsonl")], place / name, Work(str(place / "tokenizer")), workers=0)
        yield place


def bench_data(options: Options, console: Console) -> None:
    """The demo run's loader, and one of long rows, in one process."""
    table = Table("rows", "seq", "tokens/s a process", "tokens/s a processor second", title="loader", title_justify="left")
    with prepared() as place:
        for rows, seq in ((16, 128), (64, 4096)):
            with make_loader(LoaderConfig((Source("text", place / "taught"),)), batch=rows, seq=seq) as loader:
                next(loader)
                start, used, count = time.perf_counter(), processor_seconds(), 0
                while time.perf_counter() - start < 5:
                    next(loader)
                    count += 1
                elapsed, used = time.perf_counter() - start, processor_seconds() - used
            tokens = count * rows * seq
            table.add_row(str(rows), str(seq), f"{tokens / elapsed:,.0f}", f"{tokens / used:,.0f}")
    console.print(table)


def bench_saves(options: Options, console: Console) -> None:
    """configs/demo.toml, saved every EVERY steps, looked at twice."""
    steps = EVERY * (options.saves + 2)
    times: dict[int, float] = {}
    with prepared() as place:
        words = [f"--output={place}/runs", "--mesh.axes=fsdp=1", f"--data.sources.text.folder={place}/taught"]
        words += [f"--stages.all.tokens={steps * 16 * 128}", f"--checkpoint.every={EVERY}", "--watch.tensorboard=true"]
        words += [f"--watch.held_out={place}/held", f"--watch.held_out_every={steps // 2 + EVERY // 2 - 1}"]
        run = resolve(ROOT / "configs/demo.toml", words).run

        def told(step: int, figures: Mapping[str, Any]) -> None:
            times[step + 1] = time.perf_counter()

        ended = train(run, told, lambda line: None)
        newest = Path(run.output) / run.name / "checkpoints" / str(steps)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    half, apart, after, without = EVERY // 2, [], [], []
    for at in range(EVERY, steps - EVERY + 1, EVERY):
        with_save, rest = times[at + half] - times[at], times[at + EVERY] - times[at + half]
        apart.append(with_save - rest)
        after.append(with_save / half)
        without.append(rest / half)
    step = float(np.median(without))
    seconds = ended.seconds
    low, middle, high = np.quantile(np.asarray(apart), (0.25, 0.5, 0.75))
    saves = steps // EVERY
    table = Table("", "", title=f"{steps} steps of the demo's run, load {os.getloadavg()[0]:.1f}", title_justify="left")
    table.add_row("a step, of those no save is near", f"{step:.3f} s, {16 * 128 / step:,.0f} tokens/s")
    table.add_row("a checkpoint", f"{size / 1e6:,.0f} MB, {saves} of them")
    table.add_row("the loop waits for a save", f"{seconds['save'] / saves:.3f} s, the last one's end among it")
    share = seconds["save"] / saves / (100 * step)
    table.add_row("that, of the time at one save in 100 steps", f"{share:.2%}")
    table.add_row("ten steps after a save take more", f"{middle:+.3f} s ({low:+.3f} to {high:+.3f})")
    table.add_row("that, of the time at one save in 100 steps", f"{middle / (100 * step):+.2%}")
    table.add_row("the step waits for data", f"{seconds['data'] / (seconds['train'] + seconds['data']):.2%} of the time")
    table.add_row("a look, 8 batches held out", f"{seconds['look'] / 2:.2f} s, the first one's compiling among it")
    console.print(table)


def main(options: Options) -> None:
    """Print the tables."""
    console = Console(width=120, highlight=False)
    measures = dict(packing=bench_packing, figures=bench_figures, data=bench_data, saves=bench_saves)
    for part in options.parts:
        measures[part](options, console)


if __name__ == "__main__":
    main(tyro.cli(Options))
