import json

import pytest

from qwen3_jax import load_tokenizer
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from tests.chat.tiny import SAMPLE
from tools.demo.corpus import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([SAMPLE] * 20, 400, folder)
    return folder


@pytest.fixture(scope="session")
def tok(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def made(tokenizer_folder, tmp_path_factory):
    """A prepared folder of texts, made in this process."""

    def make(texts, **settings):
        place = tmp_path_factory.mktemp("made")
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (place / "texts.jsonl").write_text("".join(lines))
        prepare([str(place / "texts.jsonl")], place / "out", Work(str(tokenizer_folder)), workers=0, **settings)
        return place / "out"

    return make


def digits(number, length):
    """A text of `length` tokens, end of text included: a digit is a token, and the first ones are the number."""
    text = str(number).rjust(6, "0")
    return (text * (length // 6 + 1))[: length - 1]
