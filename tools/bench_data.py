"""What a process makes of data: tokens tokenised, and loaded as packed batches; what packing costs, and how full rows are.

    python -m tools.bench_data [--tokenizer FOLDER] [--workers 1 2] [--seconds 5]

Text is the Python files of the standard library, each function a document, or each file. Without a folder the demo's tokenizer
is trained on them. Rates are by seconds, and by processor seconds, which other work on the machine disturbs less.
"""

import argparse
import ast
import json
import random
import resource
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import LONG, MIDDLE, Source
from qwen3_jax.data.packing import Packer, Piece
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.shards import Shard, shards_for
from qwen3_jax.data.worker import Work
from tools.demo.corpus import conversations, train_tokenizer


def texts() -> tuple[list[str], list[str]]:
    """The standard library's files, and its functions."""
    files, functions = [], []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text("utf-8", errors="replace")
        files.append(text)
        found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        lines = text.splitlines()
        functions += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in found]
    return files, functions


def processor_seconds() -> float:
    """Of this process and of children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def bench_prepare(console: Console, place: Path, tokenizer: Path, workers: list[int]) -> None:
    """Tokenise, by so many processes."""
    table = Table("prepare", "processes", "documents", "tokens", "s", "M tokens/s", "M tokens a processor second")
    for name in ("functions", "files", "chat"):
        for count in workers:
            start, used = time.perf_counter(), processor_seconds()
            out = place / f"{name}-{count}"
            total = prepare([str(place / f"{name}.jsonl")], out, Work(str(tokenizer)), workers=count, piece_bytes=2_000_000)
            seconds, used = time.perf_counter() - start, processor_seconds() - used
            tokens = total.figures.tokens
            figures = (f"{total.figures.documents:,}", f"{tokens:,}", f"{seconds:.1f}")
            table.add_row(name, str(count), *figures, f"{tokens / seconds / 1e6:.2f}", f"{tokens / used / 1e6:.2f}")
    console.print(table)


def bench_loader(console: Console, place: Path, workers: int, seconds: float) -> None:
    """Load batches in this process, and plan as many alone: what mixing and packing cost."""
    table = Table(
        "load", "rows", "seq", "M tokens/s", "M a processor second", "of it planning", "slots used", "state, bytes a shard"
    )
    for name, batch, seq in (("functions", 256, 4096), ("functions", 32, 4096), ("files", 64, 4096), ("chat", 64, 4096)):
        config = LoaderConfig((Source(name, place / f"{name}-{workers}"),))
        with make_loader(config, batch=batch, seq=seq) as loader:
            next(loader)
            start, used, count = time.perf_counter(), processor_seconds(), 0
            while time.perf_counter() - start < seconds:
                next(loader)
                count += 1
            elapsed, used = time.perf_counter() - start, processor_seconds() - used
            report, state = loader.report(), loader.state()
            views = loader._views
        shards = shards_for(batch, None)
        held = [Shard(views, number=n, seed=0, shards=shards, slots=seq, waiting=config.waiting) for n in range(shards)]
        planned = processor_seconds()
        for _ in range(count):
            for shard in held:
                shard.row()
                shard.state()
        planned = processor_seconds() - planned
        tokens = count * batch * seq
        rates = (f"{tokens / elapsed / 1e6:.1f}", f"{tokens / used / 1e6:.1f}", f"{planned / used:.0%}")
        size = len(json.dumps(state["shards"])) / shards
        table.add_row(name, str(batch), str(seq), *rates, f"{report['utilisation']:.2%}", f"{size:,.0f}")
    console.print(table)


def short_documents() -> Iterator[int]:
    """Log-normal lengths, a median of 245 and a mean of 400."""
    draw = random.Random(0)
    while True:
        yield max(1, int(draw.lognormvariate(5.5, 1.0)))


def long_documents() -> Iterator[int]:
    """The long-context stage: 75 % of tokens from 16,384 to 32,768, 25 % from 4,096 to 16,383, each even."""
    draw, long, middle = random.Random(0), 0, 0
    while True:
        if long <= 3 * middle:
            yield (length := draw.randint(*LONG))
            long += length
        else:
            yield (length := draw.randint(*MIDDLE))
            middle += length


def bench_packing(console: Console) -> None:
    """Slots used, by how many documents wait; no document is cut."""
    waits = (8, 16, 32, 64)
    table = Table("packing: slots used", "seq", *(f"{waiting} waiting" for waiting in waits))
    for name, documents, seqs in (
        ("short", short_documents, (1024, 2048, 4096)),
        ("long-context stage", long_documents, (32_768,)),
    ):
        for seq in seqs:
            used = []
            for waiting in waits:
                lengths = documents()
                packer = Packer(seq, waiting, lambda lengths=lengths, seq=seq: Piece(0, 0, 0, min(next(lengths) - 1 or 1, seq)))
                used.append(sum(piece.slots for _ in range(300) for piece in packer.row()) / (300 * seq))
            table.add_row(name, str(seq), *(f"{share:.1%}" for share in used))
    console.print(table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; else the demo's is trained")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loader")
    options = parser.parse_args()
    console = Console(width=140, highlight=False)
    bench_packing(console)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        place = Path(folder)
        files, functions = texts()
        chats = conversations()
        tokenizer = options.tokenizer
        if tokenizer is None:
            tokenizer = place / "tokenizer"
            train_tokenizer(chats, 4000, tokenizer)
        for name, documents in (("files", files), ("functions", functions)):
            lines = [json.dumps({"text": text}) + "\n" for text in documents if text.strip()]
            (place / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
        (place / "chat.jsonl").write_text("".join(lines), "utf-8")
        bench_prepare(console, place, tokenizer, options.workers)
        bench_loader(console, place, options.workers[-1], options.seconds)


if __name__ == "__main__":
    main()
