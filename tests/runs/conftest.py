"""The small run of tests/runs/launch.py, prepared and carried out once for all files that ask for it."""

import fcntl
import json
import os

import numpy as np
import pytest

from qwen3_jax import from_pretrained
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from tests.chat.tiny import SAMPLE
from tests.runs.launch import EXPORTS, RUN, WATCHED, arrays_of, begin, curve, finish
from tools.demo.corpus import train_tokenizer


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Two sources and a tokenizer, and a cache of compiled programs that all starts share."""
    place = tmp_path_factory.mktemp("prepared")
    train_tokenizer([SAMPLE] * 20, 400, place / "tokenizer")
    draw = np.random.default_rng(0)
    for name, count in (("text", 60), ("more", 30)):
        texts = ["def read(path): return open(path)" * int(draw.integers(1, 5)) + str(at) for at in range(count)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([str(place / f"{name}.jsonl")], place / name, Work(str(place / "tokenizer")), workers=0)
    return place


@pytest.fixture
def place(prepared, tmp_path):
    (tmp_path / "run.toml").write_text(RUN.format(place=tmp_path))
    for name in ("text", "more"):
        (tmp_path / name).symlink_to(prepared / name)
    return tmp_path


@pytest.fixture(scope="session")
def watched(prepared, tmp_path_factory):
    """A run without a stop, watched in all ways and exported as it goes; its folder, the same for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "straight"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():  # one that has failed is made again by the next worker, to fail there too
            _carry_out(prepared, place)
    return place


def _carry_out(prepared, place):
    place.mkdir()
    (place / "run.toml").write_text(RUN.format(place=place))
    for name in ("text", "more"):
        (place / name).symlink_to(prepared / name)
    code, out = finish(begin(prepared, place, *EXPORTS, *WATCHED, str(place / "exported")))
    if code:
        place.rename(place.with_name(f"failed-{os.getpid()}"))
    assert code == 0, out
    assert "done at step 14 of 14" in out


@pytest.fixture(scope="session")
def straight(watched):
    return curve(watched), arrays_of(watched)


@pytest.fixture(scope="session")
def exported(watched):
    return from_pretrained(watched / "exported", dtype=np.float32)
