"""A tokenizer folder's files: JSON with errors that name the file, and the tokenizer from tokenizer.json or its older form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core

from qwen3_jax.chat.vocabulary import ADDED, add_tokens, pipeline


class TokenizerError(ValueError):
    """A tokenizer folder that is refused: which file, what was found, what is accepted."""


def json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file.

    Args:
        file: UTF-8.

    Returns:
        The object.

    Raises:
        TokenizerError: no JSON, or no object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TokenizerError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds a JSON {type(content).__name__}: accepted is an object")
    return content


def load_core(folder: Path, config: Mapping[str, Any]) -> Core:
    """The tokenizer of a folder's tokenizer.json, else of its vocab.json and merges.txt.

    Args:
        folder: a model's.
        config: its tokenizer_config.json; {} where there is none.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: a file that is missing or broken.
    """
    file, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if file.is_file():
        try:
            return Core.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(f"{file} is no tokenizer: {error}") from error
    if vocab.is_file() and merges.is_file():
        return _older_form(folder, config)
    raise TokenizerError(f"{file} is not there: accepted is a folder with a tokenizer.json, or with vocab.json and merges.txt")


def _older_form(folder: Path, config: Mapping[str, Any]) -> Core:
    """Qwen3's pipeline over vocab.json and merges.txt, with the folder's added tokens."""
    vocab, merges = json_object(folder / "vocab.json"), _merges(folder / "merges.txt")
    if wrong := next((token for token, number in vocab.items() if type(number) is not int), None):
        raise TokenizerError(f"{folder / 'vocab.json'}: {wrong!r} is {vocab[wrong]!r}: accepted is an id")
    try:
        core = pipeline(vocab, merges)
    except Exception as error:  # tokenizers raises plain Exception: a merge of what is no token
        raise TokenizerError(f"{folder / 'merges.txt'} and vocab.json do not fit: {error}") from error
    added = _added(folder, config)
    if added is None:
        add_tokens(core, ADDED)
        return core
    add_tokens(core, [(text, special) for _, text, special in added])
    for number, text, _ in added:
        if (found := core.token_to_id(text)) != number:
            raise TokenizerError(f"{folder}: the added token {text!r} gets id {found}, and the folder says {number}")
    return core


def _merges(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is no UTF-8 text: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line and not (number == 1 and line.startswith("#version")):
            left, _, right = line.partition(" ")
            if not left or not right or " " in right:
                raise TokenizerError(f"{file}, line {number}: {line!r}: accepted are two tokens and a space between them")
            pairs.append((left, right))
    return pairs


def _added(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, str, bool]] | None:
    """Id, text and flag of each added token, by id; None where the folder says nothing of them."""
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        file = folder / "tokenizer_config.json"
        try:
            found = [(int(number), entry["content"], bool(entry.get("special"))) for number, entry in listed.items()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"{file}: added_tokens_decoder: accepted are ids, each with a content: {error!r}") from error
        return sorted(found)
    file = folder / "added_tokens.json"
    if not file.is_file():
        return None
    special = {text for text, is_special in ADDED if is_special}
    ids = json_object(file)
    if wrong := next((text for text, number in ids.items() if type(number) is not int), None):
        raise TokenizerError(f"{file}: {wrong!r} is {ids[wrong]!r}: accepted is an id")
    return sorted((number, text, text in special) for text, number in ids.items())
