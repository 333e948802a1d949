import json

import numpy as np
import pytest

from qwen3_jax import load_tokenizer
from qwen3_jax.data.loader import LoaderConfig
from qwen3_jax.data.mixture import Source
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from tests.chat.tiny import SAMPLE
from tests.data.batches import digits
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


@pytest.fixture(scope="session")
def web(made):
    draw = np.random.default_rng(0)
    return made([digits(number, int(length)) for number, length in enumerate(draw.integers(8, 60, 300))], piece_bytes=4000)


@pytest.fixture(scope="session")
def books(made):
    draw = np.random.default_rng(1)
    return made([digits(1000 + number, int(length)) for number, length in enumerate(draw.integers(50, 200, 40))])


@pytest.fixture(scope="session")
def config(web, books):
    return LoaderConfig((Source("web", web, 3.0), Source("books", books, 1.0)), seed=5, waiting=4)
