"""A tokenizer folder's files: JSON with errors that name the file, the tokenizer, chat templates, generation settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core

from qwen3_jax.chat.vocabulary import ADDED, add_tokens, pipeline

ADDITIONAL = "additional_chat_templates"  # the folder of templates that are not the default one


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
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of too many digits
        raise TokenizerError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds a JSON {type(content).__name__}: accepted is an object")
    return content


def chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """A folder's own chat template: of its files, else of tokenizer_config.json, else of chat_template.json.

    Args:
        folder: a model's. chat_template.jinja is the default one; additional_chat_templates/NAME.jinja are others.
        config: its tokenizer_config.json; {} where there is none.

    Returns:
        jinja2; several by name; or None where the folder has none.

    Raises:
        TokenizerError: a template that is no text, by its file.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / ADDITIONAL).glob("*.jinja"))}
    found = {name: _read_text(file) for name, file in files.items() if file.is_file()}
    if found:
        return found["default"] if list(found) == ["default"] else found
    for file, holder in ((folder / "tokenizer_config.json", config), (folder / "chat_template.json", None)):
        holder = json_object(file) if holder is None else holder
        if given := holder.get("chat_template"):
            return _by_name(file, given)
    return None


def _by_name(file: Path, given: Any) -> str | dict[str, str]:
    """A template as JSON has it: text, or a list of objects with a name and a template."""
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in given]
        given = {entry.get("name"): entry.get("template") for entry in entries}
    if not isinstance(given, dict) or not all(isinstance(text, str) for pair in given.items() for text in pair):
        raise TokenizerError(f"{file}: chat_template: accepted is text, or a list of objects with a name and a template")
    return given


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is no UTF-8 text: {error}") from error


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


# What is read of a generation_config.json: what each field may be, in words too. A null is as if it were not there.
_GENERATION: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eos_token_id": (
        lambda value: _is_id(value) or (isinstance(value, list) and all(map(_is_id, value))),
        "an id or a list of ids",
    ),
    "do_sample": (lambda value: type(value) is bool, "true or false"),
    "top_k": (lambda value: type(value) is int, "an integer"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (_is_number, "a number")),
}


def generation_config(folder: Path) -> dict[str, Any]:
    """A folder's generation_config.json.

    Args:
        folder: a model's.

    Returns:
        The object; empty where there is no such file.

    Raises:
        TokenizerError: no JSON, or a field of another type, by its name.
    """
    file = folder / "generation_config.json"
    config = json_object(file)
    for name, (fits, accepted) in _GENERATION.items():
        value = config.get(name)
        if value is not None and not fits(value):
            raise TokenizerError(f"{file}: {name} is {value!r}: accepted is {accepted}")
    return config


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
    pairs = []
    for number, line in enumerate(_read_text(file).split("\n"), 1):
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
