"""A folder's tokenizer: its own files, through `tokenizers` and the sandboxed template renderer."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import numpy as np
from tokenizers import Tokenizer as Core

from qwen3_jax.chat.family import family_of, family_template
from qwen3_jax.chat.files import ADDITIONAL, TokenizerError, chat_template, generation_config, json_object, load_core
from qwen3_jax.chat.template import normal_form, render
from qwen3_jax.checkpoint.hub import local_folder

__all__ = ["Tokenizer", "TokenizerError", "load_tokenizer"]

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
# What ends a thought whose budget is spent: the form of words in the Qwen documentation's page on the thinking budget.
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


class Tokenizer:
    """Text to ids and back, and conversations to text by the folder's chat template.

    Made by load_tokenizer. `template` is the jinja2 source, or several by name; `folder` is where the files are.
    """

    def __init__(
        self,
        folder: Path,
        core: Core,
        config: Mapping[str, Any],
        template: str | dict[str, str],
        own_template: bool = True,
    ):
        self.folder = folder
        self.template = template
        self._own_template = own_template
        self._core = core
        self._config = config

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Args:
            text: special tokens in it are recognised.

        Returns:
            Its ids. The embedding folders' end of text is added, nothing else is.

        Raises:
            TokenizerError: half of a surrogate pair, which is no text: what bytes that are no UTF-8 are often read as.
        """
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            return self._core.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what tokenizers says of a surrogate: that it must be a str
            at = next((at for at, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            if at is None:
                raise
            raise TokenizerError(f"the text has {text[at]!r} at {at}: accepted is Unicode without surrogates") from error

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False) -> str:
        """The text of ids.

        Args:
            ids: as encode gives them, or a row of an array; an id without a token gives nothing.
            skip_special_tokens: leave out the special ones; `<think>` and `</think>` are none.

        Returns:
            The text; bytes that are no UTF-8 become U+FFFD.
        """
        return self._core.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=skip_special_tokens)

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
            TemplateError: the template failed, or took more time, memory or text than it may.
            TokenizerError: no messages, or no template for them.
        """
        if not messages:
            raise TokenizerError("messages is empty: accepted is at least one message")
        # `documents` is always defined in transformers, and templates ask.
        names: dict[str, Any] = {**self._special, "messages": normal_form(messages), "tools": tools, "documents": None}
        names["add_generation_prompt"] = add_generation_prompt
        if enable_thinking is not None:
            names["enable_thinking"] = enable_thinking
        text = render(self._template(tools), names | values)
        # What the template wrote is the whole text: nothing is added to it.
        return self._encode(text) if tokenize else text

    def _template(self, tools: Any) -> str:
        """The template of a conversation, chosen as transformers does."""
        if isinstance(self.template, str):
            return self.template
        name = "tool_use" if tools is not None and "tool_use" in self.template else "default"
        if name not in self.template:
            names = ", ".join(sorted(self.template))
            accepted = "accepted is one named default, or tok.template set to one of these"
            raise TokenizerError(f"{self.folder}: its chat templates are {names}: {accepted}")
        return self.template[name]

    def thinking_budget(self, tokens: Any) -> Any:
        """A limit on thinking for `generate`, with the ids that it needs.

        Args:
            tokens: how many tokens a thought may take: a number >= 0, or one per row [B].

        Returns:
            A qwen3_jax.generation.budget.ThinkingBudget.

        Raises:
            TokenizerError: the vocabulary has no </think> token.
        """
        # Text needs no jax until it is asked for this.
        from qwen3_jax.generation.budget import ThinkingBudget

        end = self._core.token_to_id("</think>")
        if end is None:
            raise TokenizerError(f"{self.folder}: the vocabulary has no token </think>: accepted is one of a model that thinks")
        think, turn = self._core.token_to_id("<think>"), self._core.token_to_id("<|im_start|>")
        return ThinkingBudget(
            tokens=tokens,
            end_id=end,
            early_stop_ids=self._ids(EARLY_STOP),
            open_ids=() if think is None else self._ids("<think>\n"),
            think_id=-1 if think is None else think,
            turn_id=-1 if turn is None else turn,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones too; a model's table may have more rows."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a turn."""
        return self._id_of("eos_token")

    @property
    def end_of_turn_id(self) -> int | None:
        """The token that ends a message in every template of the family; a base model's own configs do not name it."""
        return self._core.token_to_id("<|im_end|>")

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
        return generation_config(self.folder)

    def save(self, folder: str | PathLike[str]) -> None:
        """Copy the tokenizer's files into a folder that exists; the family's chat template where they hold none.

        Args:
            folder: may be the tokenizer's own.
        """
        folder = Path(folder)
        for name in (*FILES, *(f"{ADDITIONAL}/{file.name}" for file in (self.folder / ADDITIONAL).glob("*.jinja"))):
            source, copy = self.folder / name, folder / name
            if source.is_file() and source.resolve() != copy.resolve():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, copy)
        if not self._own_template and isinstance(self.template, str):
            (folder / "chat_template.jinja").write_text(self.template, "utf-8")

    @functools.cached_property
    def _special(self) -> dict[str, str]:
        """Names of special tokens that templates read, bos_token and the like."""
        keys = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {key: text for key in keys if (text := _text(self._config.get(key)))}

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(text))

    def _id_of(self, key: str) -> int | None:
        text = _text(self._config.get(key))
        return None if text is None else self._core.token_to_id(text)


def load_tokenizer(folder: str | PathLike[str], family: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder, of the folder's own files alone.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json, a chat template and
            generation_config.json where there are.
        family: whose chat template serves a folder that has none of its own: hybrid, instruct_2507, thinking_2507, coder or
            embedding. None: what the folder says it was made from, else hybrid. The folder's own template goes before both.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: a file that is missing or broken, by its path, or an unknown family.
    """
    folder = local_folder(folder)
    given = None if family is None else family_template(family)  # an unknown one is refused whatever the folder holds
    config = json_object(folder / "tokenizer_config.json")
    core = load_core(folder, config)
    own = chat_template(folder, config)
    if own is not None:
        return Tokenizer(folder, core, config, own)
    return Tokenizer(folder, core, config, given or family_template(family_of(folder)), own_template=False)


def _text(token: Any) -> str | None:
    """A special token as its text: files have it plain, or as an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
