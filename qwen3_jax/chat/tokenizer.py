"""A folder's tokenizer: its own files, through `tokenizers` and the sandboxed template renderer."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from tokenizers import Tokenizer as Core

from qwen3_jax.chat.template import render

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt")


class TokenizerError(ValueError):
    """A tokenizer folder that is refused: which file, what was found, what is accepted."""


class Tokenizer:
    """Text to ids and back, and conversations to text by the folder's chat template.

    Made by load_tokenizer. `template` is the jinja2 source, `folder` where the files are.
    """

    def __init__(self, folder: Path, core: Core, config: Mapping[str, Any], template: str):
        self.folder = folder
        self.template = template
        self._core = core
        self._config = config

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens that stand in it are recognised, and none is added."""
        return self._core.encode(text, add_special_tokens=True).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids.

        Args:
            ids: as encode gives them; an id without a token gives nothing.
            skip_special_tokens: leave out the special ones; `<think>` and `</think>` are none.

        Returns:
            The text; bytes that are no UTF-8 become U+FFFD.
        """
        return self._core.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        tokenize: Literal[True] = True,
        **values: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        *,
        tokenize: Literal[False],
        **values: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        tokenize: bool = True,
        **values: Any,
    ) -> list[int] | str:
        """A conversation as the model reads it, byte for byte as transformers renders it.

        Args:
            messages: objects with role and content, and what else the template reads (reasoning_content, tool_calls).
            tools: JSON schemas of functions.
            add_generation_prompt: end with the opening of the assistant's turn.
            enable_thinking: None leaves it undefined in the template.
            tokenize: ids; else the text.
            **values: more names for the template.

        Returns:
            Ids, or the text.

        Raises:
            TemplateError: the template failed, or spent its budget.
        """
        if not messages:
            raise TokenizerError("messages is empty: accepted is at least one message")
        names = dict(self._special, messages=list(messages), tools=tools, add_generation_prompt=add_generation_prompt)
        if enable_thinking is not None:
            names["enable_thinking"] = enable_thinking
        text = render(self.template, names | values)
        return self.encode(text) if tokenize else text

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones too; a model's table may have more rows."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a turn."""
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows up."""
        return self._id_of("pad_token")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end generation: the generation config's eos_token_id, or the tokenizer's."""
        given = self.generation_config.get("eos_token_id", self.eos_token_id)
        return () if given is None else tuple(given) if isinstance(given, list) else (given,)

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        """The folder's generation_config.json; empty where there is none."""
        return _json_object(self.folder / "generation_config.json", {})

    def save(self, folder: str | PathLike[str]) -> None:
        """Copy the tokenizer's files into a folder that exists."""
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)

    @functools.cached_property
    def _special(self) -> dict[str, str]:
        """Names of special tokens that templates read, bos_token and the like."""
        keys = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {key: text for key in keys if (text := _text(self._config.get(key)))}

    def _id_of(self, key: str) -> int | None:
        text = _text(self._config.get(key))
        return None if text is None else self._core.token_to_id(text)


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: holds tokenizer.json; tokenizer_config.json, chat_template.jinja and generation_config.json where there are.
            The chat template is the folder's own, else the hybrid Qwen3's.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: a file that is missing or broken, by its path.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"{file} is not there: accepted is a folder with a tokenizer.json")
    try:
        core = Core.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(f"{file} is no tokenizer: {error}") from error
    config = _json_object(folder / "tokenizer_config.json", {})
    return Tokenizer(folder, core, config, _template(folder, config))


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text("utf-8")
    given = config.get("chat_template") or _json_object(folder / "chat_template.json", {}).get("chat_template")
    if isinstance(given, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    if given is None:
        return (Path(__file__).parent / "templates" / "hybrid.jinja").read_text("utf-8")
    if not isinstance(given, str):
        raise TokenizerError(f"{folder}: chat_template is {type(given).__name__}: accepted is text, or a list with a 'default'")
    return given


def _json_object(file: Path, absent: dict[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        return absent
    try:
        content = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TokenizerError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds a JSON {type(content).__name__}: accepted is an object")
    return content


def _text(token: Any) -> str | None:
    """A special token as its text: files have it plain, or as an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
