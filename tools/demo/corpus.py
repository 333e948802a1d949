"""Text that every machine has: the functions of Python's standard library, told as conversations.

The user gives a signature, the assistant thinks the docstring's first sentence and writes the body. A third of the samples
have the empty think block of `enable_thinking=False`, so that the model learns both modes of the family's template.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer

from qwen3_jax import Batch
from qwen3_jax.chat.vocabulary import add_tokens, pipeline

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
MODULES = ("collections", "concurrent", "email", "http", "json", "logging", "unittest", "urllib", "xml")


def conversations() -> list[list[dict[str, str]]]:
    """One conversation per documented function: user, assistant with `reasoning_content`."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py")) + sorted(path for name in MODULES for path in (root / name).glob("*.py"))
    found = []
    for file in files:
        text = file.read_text("utf-8", errors="replace")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # lib2to3's and others' test data: no Python of this version
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (sample := _sample(node)):
                found.append(sample)
    random.Random(0).shuffle(found)
    return found


def _sample(node: ast.FunctionDef) -> list[dict[str, str]] | None:
    doc = ast.get_docstring(node)
    body = node.body[1:]
    if not doc or not body:
        return None
    code = "\n".join(ast.unparse(line) for line in body)
    thought = " ".join(doc.split("\n\n")[0].split())
    if not 10 < len(thought) < 200 or not 10 < len(code) < 1200:
        return None
    ask = {"role": "user", "content": f"def {node.name}({ast.unparse(node.args)}):"}
    return [ask, {"role": "assistant", "reasoning_content": thought, "content": code}]


def train_tokenizer(samples: list[list[dict[str, str]]], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE in Qwen3's pipeline, written as tokenizer.json and tokenizer_config.json.

    Args:
        samples: the text to learn from.
        vocab_size: words, special ones included.
        folder: where the two files go; made if missing.
    """
    tokenizer = pipeline({}, [])
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(PLAIN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (part for sample in samples for message in sample for part in message.values())
    tokenizer.train_from_iterator(texts, trainer)
    add_tokens(tokenizer, [*((token, True) for token in SPECIAL), *((token, False) for token in PLAIN)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def batches(documents: list[list[int]], rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Endless packed batches: documents in random order, several to a row, none cut but by the row's end.

    Args:
        documents: token ids of each conversation.
        rows: B.
        length: T.
        seed: of the order.

    Yields:
        Batches whose segment ids keep documents apart, with labels within a document only.
    """
    draw = random.Random(seed)
    queue: list[list[int]] = []
    while True:
        tokens = np.zeros((rows, length + 1), np.int32)
        segments = np.zeros((rows, length + 1), np.int32)
        for row in range(rows):
            at, number = 0, 0
            while at < length + 1:
                if not queue:
                    queue = draw.sample(documents, len(documents))
                piece = queue.pop()[: length + 1 - at]
                number += 1
                tokens[row, at : at + len(piece)] = piece
                segments[row, at : at + len(piece)] = number
                at += len(piece)
        yield Batch(
            tokens=jnp.asarray(tokens[:, :-1]),
            labels=jnp.asarray(tokens[:, 1:]),
            mask=jnp.asarray(segments[:, 1:] == segments[:, :-1], jnp.float32),
            segment_ids=jnp.asarray(segments[:, :-1]),
        )
