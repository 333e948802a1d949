"""Qwen3's tokenizer out of its vocabulary: byte-level BPE from tiktoken ranks, or from vocab.json and merges.txt.

The published vocabulary is also distributed as a tiktoken file, a line per token: its bytes in base64, and its rank. Ranks say
which pair is merged first but not which two tokens it is made of; `merges_of` recovers that.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

# Contractions, words, single digits, punctuation, line ends, spaces.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The added tokens in the order of their ids, which begin after the vocabulary's last: the special ones, then plain text.
SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
        "vision_start vision_end vision_pad image_pad video_pad"
    ).split()
)
PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
ADDED: tuple[tuple[str, bool], ...] = (*((text, True) for text in SPECIAL), *((text, False) for text in PLAIN))


class VocabularyError(ValueError):
    """A vocabulary that no byte-level BPE has; the message says which entry."""


@functools.cache
def letters() -> tuple[str, ...]:
    """The letter that stands for each of the 256 bytes in tokenizer files (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def read_ranks(content: bytes) -> list[bytes]:
    """The tokens of a tiktoken file.

    Args:
        content: lines of base64, a space, and the rank; ranks are 0, 1, 2 and so on.

    Returns:
        Each token's bytes, in the order of the ranks.

    Raises:
        VocabularyError: a line of another form.
    """
    tokens = []
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split()
            if int(rank) != number:
                raise ValueError(f"rank {int(rank)}")
            tokens.append(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error) as error:
            raise VocabularyError(f"line {number + 1}: {error}; accepted is a token in base64 and rank {number}") from error
    return tokens


def write_ranks(tokens: Sequence[bytes]) -> bytes:
    """The tiktoken file of these tokens: what read_ranks reads."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token is merged of, in the order of the ranks; the 256 single bytes have none.

    A token's pair is what byte-pair encoding leaves of its bytes when only tokens of lower rank may be merged.

    Args:
        tokens: as read_ranks gives them.

    Returns:
        One pair for each token of more than one byte.

    Raises:
        VocabularyError: a byte that is no token, a token twice, or one that no two tokens of lower rank make.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens):
        raise VocabularyError(f"{len(tokens) - len(ranks)} tokens stand twice")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise VocabularyError(f"{len(missing)} of the 256 bytes are no tokens, {missing[0]:#04x} the first")
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _encode_below(token, ranks, rank)
        if len(parts) != 2:
            raise VocabularyError(f"token {rank} ({token!r}) is no merge of two tokens of lower rank")
        merges.append((parts[0], parts[1]))
    return merges


def _encode_below(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """The token's bytes, merged by every rank below the limit."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:], strict=False)]
        best = min(found)
        if best >= limit:
            break
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def pipeline(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Qwen3's tokenizer without added tokens: NFC, the split, bytes as letters, BPE. It adds no token of its own accord.

    Args:
        vocab: ids by token, bytes written as `letters`.
        merges: pairs of tokens, the first merged first.

    Returns:
        The tokenizer.
    """
    model = BPE(vocab=dict(vocab), merges=list(merges), continuing_subword_prefix="", end_of_word_suffix="")
    core = Tokenizer(model)
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    core.decoder = decoders.ByteLevel()  # written with other flags than the published one has; decoding reads none of them
    return core


def add_tokens(core: Tokenizer, added: Sequence[tuple[str, bool]]) -> None:
    """Give a tokenizer its added tokens; each that is new takes the next id.

    Args:
        core: changed in place.
        added: text of each, and whether it is special: left out where special tokens are skipped.
    """
    # One call: the tokenizer compiles what it looks for anew at each.
    core.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])


def from_ranks(tokens: Sequence[bytes], added: Sequence[tuple[str, bool]] = ADDED) -> Tokenizer:
    """Qwen3's tokenizer of a tiktoken vocabulary.

    Args:
        tokens: as read_ranks gives them.
        added: text of each added token and whether it is special; Qwen3's 26.

    Returns:
        The tokenizer: with the published ranks it gives the ids of the published tokenizer.json.

    Raises:
        VocabularyError: tokens that no byte-level BPE has.
    """
    letter = letters()

    def written(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges = [(written(left), written(right)) for left, right in merges_of(tokens)]
    core = pipeline({written(token): rank for rank, token in enumerate(tokens)}, merges)
    add_tokens(core, added)
    return core


def tokenizer_config(core: Tokenizer, template: str | None = None) -> dict[str, Any]:
    """The tokenizer_config.json that goes with the tokenizer.

    Args:
        core: with Qwen3's added tokens.
        template: the chat template; None leaves it out.

    Returns:
        The JSON object, keys and values as published.
    """
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(number): {flag: getattr(token, flag) for flag in flags} for number, token in core.get_added_tokens_decoder().items()
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        # Of the special ones, the tokenizer's own end of text is none of the additional.
        "additional_special_tokens": [token["content"] for token in added.values() if token["special"]][1:],
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if template is None:
        del config["chat_template"]
    return config
