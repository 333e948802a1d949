"""`python -m tools.demo.data`: what configs/demo.toml and configs/demo_sft.toml learn, before `qwen3-jax data prepare`.

It writes text and conversations of the standard library's functions as JSON lines, a part of both held out, and a tokenizer of
2,048 words that is learned from them. One conversation in three has no thought.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from tools.demo.corpus import conversations, train_tokenizer

VOCABULARY = 2048  # of configs/demo.toml
HELD_OUT = 64  # functions


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the demo run's text, conversations and tokenizer."""

    out: Path = Path("demo_out/run")
    """Folder to write."""


def main(options: Options) -> int:
    """Write the files.

    Returns:
        0.
    """
    samples = conversations()
    train_tokenizer(samples, VOCABULARY, options.out / "tokenizer")
    texts, chats = [], []
    for number, (ask, answer) in enumerate(samples):
        texts.append({"text": f'{ask["content"]}\n"""{answer["reasoning_content"]}"""\n{answer["content"]}\n'})
        plain = {"role": "assistant", "content": answer["content"]}
        chats.append({"messages": [ask, answer if number % 3 else plain]})
    for name, records in (("text", texts), ("chats", chats)):
        _write(options.out / f"{name}.jsonl", records[HELD_OUT:])
        _write(options.out / f"{name}_held_out.jsonl", records[:HELD_OUT])
    print(f"{len(samples) - HELD_OUT:,} functions as text and as conversations, {HELD_OUT} held out, in {options.out}")
    return 0


def _write(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
