"""`qwen3-jax data prepare SOURCES --tokenizer MODEL --out FOLDER`: text and conversations to tokens; `data show FOLDER`."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

_EVERY = 60  # seconds between two lines of a log
_USAGE = """usage: qwen3-jax data prepare SOURCE ... --tokenizer MODEL --out FOLDER [options]
       qwen3-jax data show FOLDER [options]

  prepare  tokenise JSONL (.gz, .zst), Parquet, text and ArrayRecord files into a folder that training reads
  show     what such a folder holds; a document as text, what is learned of it in bold

`qwen3-jax data prepare --help` shows its options, `qwen3-jax data show --help` those of the other."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokenise files once, by several processes, into ArrayRecord. A run that was stopped goes on where it was."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or patterns: *.jsonl, .parquet, .txt, .array_record; local, or a store's (gs://, s3://, hf://)."""
    tokenizer: str
    """Folder of a model or a tokenizer, or a model's name on the hub."""
    out: Path
    """Folder to write."""
    workers: int | None = None
    """Processes; None: one a processor."""
    field: str | None = None
    """Field of a record to read; None: messages, conversations, text or content, whichever is there first."""
    text_document: Literal["file", "line"] = "file"
    """Whether a text file is one document, or each of its lines."""
    end_token: str = "<|endoftext|>"
    """Put after each text; "" puts nothing."""
    family: Literal["hybrid", "instruct_2507", "thinking_2507", "coder"] | None = None
    """Whose chat template serves a tokenizer without one of its own."""
    flags: bool = False
    """Put /think and /no_think into conversations' questions, by what their answers do."""
    flag_rate: float = 0.5
    """How often a question gets a flag that it does not need."""
    seed: int = 0
    """Of the flags."""
    max_length: int | None = None
    """Tokens of a conversation's sample at most."""
    over_long: Literal["cut", "drop"] = "cut"
    """What becomes of a longer one."""
    answers: Literal["all", "last"] = "all"
    """Which of a conversation's answers are learned."""
    max_bad_rate: float = 0.01
    """Of bad records among all; past it the run stops."""
    piece_bytes: int = 256_000_000
    """About how much of the sources goes into one file."""
    overwrite: bool = False
    """Begin anew where a run with other settings stands."""


@dataclasses.dataclass(frozen=True)
class Show:
    """What a prepared folder holds; with a tokenizer, a document of it as text, what is learned in bold."""

    folder: tyro.conf.Positional[str]
    """That `data prepare` has written; one of a store (gs://) is copied to a disk."""
    tokenizer: str | None = None
    """The one that it was prepared with."""
    document: int = 0
    """Which document."""
    cache: Path | None = None
    """Folder that one of a store is copied to; None: ~/.cache/qwen3_jax/data."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `qwen3-jax data`.

    Returns:
        Exit code.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] == "show":
        return _show(tyro.cli(Show, args=argv[1:], prog="qwen3-jax data show"))
    if argv[0] != "prepare":
        raise ValueError(f"unknown command {argv[0]!r}; commands: prepare, show")
    return _prepare(tyro.cli(Options, args=argv[1:], prog="qwen3-jax data prepare"))


def _prepare(options: Options) -> int:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from qwen3_jax.data.chat import ChatConfig
    from qwen3_jax.data.prepare import Total, prepare
    from qwen3_jax.data.worker import Work

    chat = ChatConfig(options.flags, options.flag_rate, options.max_length, options.over_long, options.answers, options.seed)
    work = Work(options.tokenizer, options.family, options.field, options.text_document, options.end_token or None, chat)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("reading the list of files", total=None)
        before: list[int] = []
        spoke = [start]

        def told(total: Total) -> None:
            figures = total.figures
            if not before:
                before.append(figures.tokens)  # of earlier runs
            rate = (figures.tokens - before[0]) / max(time.perf_counter() - start, 1e-9)
            said = (
                f"{total.done}/{total.pieces} parts  {figures.documents:,} documents  {figures.tokens:,} tokens  {rate:,.0f}/s"
            )
            bad = f"  {total.tally.bad.total():,} bad" if total.tally.bad else ""
            bar.update(task, description=said + bad, completed=total.read, total=total.size)
            if not console.is_terminal and time.perf_counter() - spoke[0] > _EVERY:  # a log shows no bar
                spoke[0] = time.perf_counter()
                console.print(f"{total.read / max(total.size, 1):.0%}  {said}{bad}")

        total = prepare(
            options.sources,
            options.out,
            work,
            workers=options.workers,
            max_bad_rate=options.max_bad_rate,
            piece_bytes=options.piece_bytes,
            overwrite=options.overwrite,
            progress=told,
        )
    figures, tally = total.figures, total.tally
    seconds = time.perf_counter() - start
    console.print(f"read       {decimal(total.size)}, {tally.records:,} records")
    console.print(f"documents  {figures.documents:,}, of them {figures.conversations:,} of conversations")
    console.print(f"tokens     {figures.tokens:,}, of them {figures.targets:,} predicted")
    if figures.cut or figures.dropped:
        console.print(f"over-long  {figures.cut:,} cut, {figures.dropped:,} dropped")
    if tally.bad:
        console.print(
            f"bad        {tally.bad.total():,}: {', '.join(f'{count:,} {kind}' for kind, count in tally.bad.most_common())}"
        )
        for fault in tally.first:
            console.print(f"           {fault}")
    console.print(f"done       {options.out}: {total.pieces} parts, {seconds:.1f} s")
    return 0


def _show(options: Show) -> int:
    import itertools

    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from qwen3_jax.chat.tokenizer import load_tokenizer
    from qwen3_jax.data.encoding import record_tokens
    from qwen3_jax.data.files import DataError
    from qwen3_jax.data.prepared import Prepared

    prepared = Prepared(options.folder, options.cache)
    index = prepared.index
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"documents  {index['documents']:,} in {prepared.parts} parts, of them {index['conversations']:,} of conversations"
    )
    console.print(f"tokens     {index['tokens']:,}, of them {index['targets']:,} predicted")
    points = np.quantile(prepared.lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
    console.print(f"lengths    {', '.join(f'{point:,}' for point in points)} (least, 10 %, half, 90 %, most)")
    if index["bad"]:
        console.print(f"bad        {', '.join(f'{count:,} {kind}' for kind, count in index['bad'].items())}")
    if options.tokenizer is None:
        return 0
    tokenizer = load_tokenizer(options.tokenizer)
    if not 0 <= options.document < len(prepared):
        raise DataError(f"document is {options.document}: accepted are 0 to {len(prepared) - 1}")
    ids, targets = record_tokens(prepared.read([options.document])[0])
    text = Text()
    for target, run in itertools.groupby(zip(ids, targets, strict=True), key=lambda pair: bool(pair[1])):
        text.append(tokenizer.decode([token for token, _ in run]), style="bold" if target else "dim")
    console.print(f"document   {options.document}, {len(ids):,} tokens")
    console.print(text)
    return 0
