"""A name on the hub, from the hub's own cache in offline mode; and what stands beside exported weights."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from qwen3_jax import Qwen3Config, from_pretrained, load_tokenizer, save_pretrained
from qwen3_jax.checkpoint.reading import CheckpointError
from tests.chat.tiny import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import jax, qwen3_jax
model, tok = qwen3_jax.from_pretrained("owner/tiny"), qwen3_jax.load_tokenizer("owner/tiny")
print(model.config.num_params(), tok.vocab_size)
try:
    qwen3_jax.from_pretrained("owner/other")
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return folder / "model"


def test_a_hub_name_is_read_from_its_cache_without_a_network(model, tmp_path):
    cached = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config, tok = Qwen3Config.from_hf(model), load_tokenizer(model)
    assert done.stdout.splitlines()[0] == f"{config.num_params()} {tok.vocab_size}"
    assert "CheckpointError owner/other is no folder, and the hub has not given it" in done.stdout


def test_without_the_extra_a_hub_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"owner/tiny is no folder; .*pip install qwen3-jax\[hub\]"):
        from_pretrained("owner/tiny")


def test_an_export_has_a_card_and_a_generation_config(model, tmp_path):
    config = Qwen3Config.from_hf(model)
    told = json.loads((model / "generation_config.json").read_text())
    assert told["eos_token_id"] == config.eos_token_id and told["pad_token_id"] == config.pad_token_id
    card = (model / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and f"{config.num_params():,}" in card
    # A checkpoint's own generation config goes with it.
    copy = shutil.copytree(model, tmp_path / "own")
    own = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2]}
    (copy / "generation_config.json").write_text(json.dumps(own))
    save_pretrained(from_pretrained(copy), tmp_path / "out", tokenizer=load_tokenizer(copy))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == own
