"""A conversation with a model: messages in, thought and content out as they are written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.chat.thinking import Piece, ThinkingParser, last_soft_switch, thought_is_open
from qwen3_jax.chat.tokenizer import Tokenizer
from qwen3_jax.generation.door import Settings, bucket, make_settings
from qwen3_jax.generation.loop import advance, finished, start
from qwen3_jax.generation.sample import Sampling
from qwen3_jax.generation.step import Generated, Running
from qwen3_jax.generation.unstack import on_cpu, unstack, views
from qwen3_jax.model.transformer import Layer, Qwen3
from qwen3_jax.parallel.mesh import on_mesh_of

CHUNK = 8  # tokens between two looks at what was written
_LONGEST_CHARACTER = 8  # tokens that one character may be spread over; more are bytes that are no text


@dataclass(frozen=True)
class Delta:
    """What an answer grew by; one of the two is empty."""

    thinking: str = ""
    content: str = ""


class Chat:
    """Answers conversations with a model. Keeps no history: every call is given all messages."""

    def __init__(self, model: Qwen3, tok: Tokenizer):
        """Make the session; on CPU this copies the weights that are not experts', if they are stored in another dtype.

        Args:
            model: any Qwen3.
            tok: of the same checkpoint.

        Raises:
            ValueError: a generation_config.json with a field of another type.
        """
        self.model, self.tok = model, tok
        turn = () if tok.end_of_turn_id is None else (tok.end_of_turn_id,)
        self._stop_tokens = tuple(dict.fromkeys((*tok.stop_token_ids, *turn)))
        self._layers = (views(model) or jax.jit(unstack)(model)) if on_cpu(model) else None

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | int | None = None,
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop: Sequence[str] = (),
        max_new_tokens: int = 2048,
        seed: int = 0,
    ) -> Iterator[Delta]:
        """An answer, piece by piece. Close the iterator (or leave the loop) to stop it.

        Args:
            messages: the conversation, as apply_chat_template takes it.
            thinking: True or False as the template's enable_thinking; None leaves it to the template; an integer is True with
                that budget in tokens.
            sampling: None takes the folder's generation_config, or else what the family recommends.
            tools: JSON schemas of functions.
            stop: strings that end the answer's content; they are not part of it.
            max_new_tokens: thought and content together, at least 1.
            seed: of the draw.

        Returns:
            Pieces with text in them, as they are written.

        Raises:
            ValueError: an argument that generate or the template refuses.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}: accepted is an integer >= 1")
        watch = _StopStrings(stop)
        budget = None
        if thinking is not None and not isinstance(thinking, bool):
            budget, thinking = self.tok.thinking_budget(thinking), True
        prompt = self.tok.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking, tokenize=False
        )
        if sampling is None:
            thinks = thinking is not False and last_soft_switch(messages) is not False
            sampling = default_sampling(self.tok.generation_config, thinks)
        with on_mesh_of(self.model):
            key = jax.random.key(seed)
            settings = make_settings(self.model, 1, sampling, key, self._stop_tokens, budget, None, max_new_tokens)
        written = self._tokens(self.tok.encode(prompt), settings, max_new_tokens)
        return _deltas(written, _Characters(self.tok), ThinkingParser(thought_is_open(prompt)), watch)

    def _tokens(self, ids: Sequence[int], settings: Settings, limit: int) -> Iterator[tuple[list[int], bool]]:
        """New tokens as they are written, the one that ends the turn left out, and whether the limit has cut them off."""
        padded, slots = bucket(len(ids)), bucket(limit)
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, : len(ids)] = ids
        lengths = np.asarray([len(ids)], np.int32)
        # The mesh is set for each call alone: between two of them the caller's code runs.
        with on_mesh_of(self.model):
            running = _begin(self.model, self._layers, tokens, lengths, settings, slots, padded + slots)
        seen = 0
        while True:
            until = np.int32(seen + CHUNK)
            with on_mesh_of(self.model):
                running, out, done = _more(self.model, self._layers, running, settings, until)
            count, stopped, done = int(out.lengths[0]), bool(out.finish_reason[0]), bool(done)
            yield [int(token) for token in out.tokens[0, seen : count - stopped]], done and not stopped
            if done:
                return
            seen = count


@functools.partial(jax.jit, static_argnums=(5, 6))
def _begin(
    model: Qwen3,
    layers: Sequence[Layer] | None,
    tokens: jax.Array,
    lengths: jax.Array,
    settings: Settings,
    slots: int,
    capacity: int,
) -> Running:
    return start(model, layers, tokens, lengths, settings, capacity=capacity, slots=slots)


@functools.partial(jax.jit, donate_argnums=2)
def _more(
    model: Qwen3, layers: Sequence[Layer] | None, running: Running, settings: Settings, until: jax.Array
) -> tuple[Running, Generated, jax.Array]:
    """The Running after `until` tokens; what its one row has written; whether that is all."""
    running = advance(model, layers, running, settings, jnp.minimum(until, settings.limit))
    return running, finished(model, dataclasses.replace(running.out, cache=None), 1), jnp.all(running.done)


def _deltas(
    written: Iterator[tuple[list[int], bool]], characters: _Characters, parser: ThinkingParser, watch: _StopStrings
) -> Iterator[Delta]:
    """Tokens as pieces of thought and content, up to a stop string in the content."""

    def shown(pieces: Iterable[Piece]) -> Iterator[Delta]:
        for piece in pieces:
            if piece.kind == "thinking":
                yield Delta(thinking=piece.text)
            elif text := watch.feed(piece.text):
                yield Delta(content=text)

    cut = False
    for tokens, at_limit in written:
        cut = at_limit
        for text in characters.feed(tokens):
            yield from shown(parser.feed(text))
            if watch.found:
                return
    yield from shown([*parser.feed(characters.close()), *parser.close(cut)])
    if rest := watch.close():
        yield Delta(content=rest)


def default_sampling(config: Mapping[str, Any], thinking: bool | None) -> Sampling:
    """How a checkpoint wants its tokens drawn.

    Args:
        config: its generation_config; empty where it has none.
        thinking: whether the answer thinks; None is yes.

    Returns:
        The file's own settings. Without a file, what the model cards recommend: temperature 0.6, top-p 0.95, top-k 20 for
        thinking, 0.7, 0.8 and 20 else.
    """
    if not config:
        return Sampling(temperature=0.7, top_p=0.8, top_k=20) if thinking is False else Sampling(0.6, top_p=0.95, top_k=20)
    if not config.get("do_sample", False):
        return Sampling(temperature=0.0, repetition_penalty=config.get("repetition_penalty") or 1.0)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Sampling(**{name: config[name] for name in names if config.get(name) is not None})


class _Characters:
    """The text of tokens, cut between characters."""

    def __init__(self, tok: Tokenizer):
        self._tok, self._held = tok, list[int]()

    def feed(self, tokens: Sequence[int]) -> Iterator[str]:
        for token in tokens:
            self._held.append(token)
            text = self._tok.decode(self._held, skip_special_tokens=True)
            # A character whose bytes are not all there yet decodes as U+FFFD.
            if not text.endswith("\ufffd") or len(self._held) >= _LONGEST_CHARACTER:
                self._held = []
                yield text

    def close(self) -> str:
        return self._tok.decode(self._held, skip_special_tokens=True) if self._held else ""


class _StopStrings:
    """Passes text on until a stop string stands in it; what may be the beginning of one is held back.

    The one that ends first stops the text, and of those that end together the longest: as if the text came letter by letter.
    """

    def __init__(self, stop: Sequence[str]):
        if isinstance(stop, str) or not all(isinstance(word, str) and word for word in stop):
            raise ValueError(f"stop is {stop!r}: accepted is a sequence of strings that are not empty")
        self._stop, self._held, self.found = tuple(stop), "", False

    def feed(self, text: str) -> str:
        self._held += text
        found = [(at + len(word), at) for word in self._stop if (at := self._held.find(word)) >= 0]
        if found:
            self.found = True
            return self._held[: min(found)[1]]
        most = max((len(word) for word in self._stop), default=1) - 1
        keep = next((n for n in range(min(most, len(self._held)), 0, -1) if self._may_begin(self._held[-n:])), 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _may_begin(self, text: str) -> bool:
        return any(word.startswith(text) for word in self._stop)

    def close(self) -> str:
        return "" if self.found else self._held
