"""The published vocabulary, rebuilt from its ranks: sizes, ids that are known, transformers' ids, and broken ranks."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax import load_tokenizer
from qwen3_jax.chat.files import TokenizerError
from qwen3_jax.chat.vocabulary import ADDED, VocabularyError, letters, merges_of, read_ranks, write_ranks

HYBRID = json.loads((Path(__file__).parents[1] / "fixtures" / "chat" / "hybrid.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tok(published):
    return load_tokenizer(published)


def test_sizes(ranks, published):
    model = json.loads((published / "tokenizer.json").read_text("utf-8"))["model"]
    assert (len(ranks), len(model["vocab"]), len(model["merges"]), len(ADDED)) == (151_643, 151_643, 151_387, 26)
    assert load_tokenizer(published).vocab_size == 151_669
    assert len(set(letters())) == 256 and letters()[ord(" ")] == "Ġ"


# Ids that the published tokenizer gives.
@pytest.mark.parametrize(
    "text, ids",
    [
        ("yes", [9693]),
        ("no", [2152]),
        ("\n\n", [271]),
        ("user", [872]),
        ("assistant", [77091]),
        ("system", [8948]),
        ("Hello  world 123\n\n x", [9707, 220, 1879, 220, 16, 17, 18, 271, 856]),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", [151644, 77091, 198, 151667, 271, 151668, 271]),
        ("e\u0301", [963]),
        ("<|endoftext|><|video_pad|><tool_call><|file_sep|></tool_response>", [151643, 151656, 151657, 151664, 151666]),
        ("", []),
    ],
)
def test_known_ids(tok, text, ids):
    assert tok.encode(text) == ids
    assert tok.decode(ids) == unicodedata.normalize("NFC", text)


def test_conversations_and_plain_texts_have_transformers_ids(tok):
    with_ids = [case for case in HYBRID["cases"] if case["ids"] is not None]
    assert (len(with_ids), len(HYBRID["plain"])) == (60, 40)
    for case in with_ids:
        assert tok.apply_chat_template(case["messages"], **case["options"]) == case["ids"]
    for plain in HYBRID["plain"]:
        assert tok.encode(plain["text"]) == plain["ids"]


def test_special_tokens_are_skipped_and_thoughts_and_calls_stay(tok):
    assert (tok.eos_token_id, tok.pad_token_id, tok.stop_token_ids) == (151645, 151643, (151645,))
    every = "".join(text for text, _ in ADDED)
    assert tok.encode(every) == list(range(151_643, 151_669))
    assert tok.decode(tok.encode(every), skip_special_tokens=True) == "".join(text for text, special in ADDED if not special)
    assert tok.decode([151_669, 151_935]) == ""  # rows of the embedding that no token has


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back_but_for_its_normal_form(tok, text):
    normal = unicodedata.normalize("NFC", text)
    assert tok.decode(tok.encode(text)) == normal
    assert tok.encode(text) == tok.encode(normal)


def test_the_budget_s_ids(tok):
    budget = tok.thinking_budget(100)
    stop = [82796, 279, 7199, 882, 553, 279, 1196, 11, 358, 614, 311, 2968, 279, 6291, 3118, 389, 279, 7274, 5961, 1431, 624]
    assert (budget.tokens, budget.end_id, budget.think_id, budget.turn_id) == (100, 151668, 151667, 151644)
    assert budget.early_stop_ids == (271, *stop, 151668, 271)
    assert budget.open_ids == (151667, 198)


def older_form(folder, place, **config):
    """The folder's tokenizer as vocab.json and merges.txt."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    (place / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (place / "merges.txt").write_text("#version: 0.2\n" + lines, "utf-8")
    if config:
        (place / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize("named_in", ["tokenizer_config.json", "added_tokens.json", "nowhere"])
def test_vocab_json_and_merges_txt_give_the_same_ids(published, tmp_path, named_in):
    config = json.loads((published / "tokenizer_config.json").read_text("utf-8"))
    if named_in == "tokenizer_config.json":
        older_form(published, tmp_path, **config)
    else:
        older_form(published, tmp_path)
    if named_in == "added_tokens.json":
        added = {text: 151_643 + at for at, (text, _) in reversed(list(enumerate(ADDED)))}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added), "utf-8")
    tok = load_tokenizer(tmp_path)
    assert tok.vocab_size == 151_669
    for plain in HYBRID["plain"]:
        assert tok.encode(plain["text"]) == plain["ids"]
    every = tok.encode("".join(text for text, _ in ADDED))
    assert every == list(range(151_643, 151_669))
    assert tok.decode(every, skip_special_tokens=True) == "".join(text for text, special in ADDED if not special)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("vocab.json", '{"a": "x"}', "vocab.json: 'a' is 'x': accepted is an id"),
        ("merges.txt", "a\n", r"merges.txt, line 1: 'a': accepted are two tokens"),
        ("merges.txt", "a b\nx y\n", "merges.txt and vocab.json do not fit"),
        ("merges.txt", b"\xff\xfe", "merges.txt is no UTF-8"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"7": {"content": "<x>"}}}',
            "'<x>' gets id 3, and the folder says 7",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "accepted are ids, each with a content"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "accepted are ids, each with a content"),
        ("added_tokens.json", '{"<x>": null}', "added_tokens.json: '<x>' is None: accepted is an id"),
    ],
)
def test_a_broken_older_form_is_refused_by_path(tmp_path, name, content, says):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TokenizerError, match=says):
        load_tokenizer(tmp_path)


BYTES = [bytes([byte]) for byte in range(256)]


def test_ranks_are_written_and_read(ranks):
    assert read_ranks(write_ranks(ranks[:1000])) == ranks[:1000]
    assert merges_of([*BYTES, b"ab", b"bc", b"abc"]) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]


@pytest.mark.parametrize(
    "content, says",
    [(b"IQ== 0\nIg== 2\n", "line 2: rank 2"), (b"!!! 0\n", "line 1"), (b"IQ==\n", "line 1"), (b"IQ== x\n", "line 1")],
)
def test_a_file_that_is_no_tiktoken_file_is_refused_by_line(content, says):
    with pytest.raises(VocabularyError, match=says):
        read_ranks(content)


@pytest.mark.parametrize(
    "tokens, says",
    [
        ([*BYTES, b"ab", b"ab"], "1 tokens stand twice"),
        (BYTES[1:], "0x00 the first"),
        ([*BYTES, b"abc"], "token 256 .* is no merge"),
        ([*BYTES, b""], "token 256 .* is no merge"),
    ],
)
def test_tokens_that_no_bpe_makes_are_refused(tokens, says):
    with pytest.raises(VocabularyError, match=says):
        merges_of(tokens)
