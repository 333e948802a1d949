"""Fine-tuning by the commands: conversations to tokens, a run from a Hugging Face folder, adapters on it, what they answer."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import Chat, Qwen3, Qwen3Config, Sampling, cross_entropy, from_pretrained, load_tokenizer, save_pretrained
from qwen3_jax.cli.adapter import with_adapter
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from qwen3_jax.training.journal import read_lines
from qwen3_jax.tune.lora import merge
from tests.model.models import QUICK
from tests.runs.launch import PATIENCE, arrays_of, finish, signalling
from tests.runs.launch import QUICK as FLAGS
from tools.demo.corpus import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("red", "green", "blue", "black", "white", "grey")


def chats(answers):
    """A conversation a word; every other answer has a thought."""
    return [
        [
            {"role": "user", "content": f"{word} {number}?"},
            {"role": "assistant", "content": f"{answer} {number}"}
            | ({"reasoning_content": f"not {word}"} if number % 2 else {}),
        ]
        for number, (word, answer) in enumerate(zip(WORDS, answers, strict=True))
    ]


TAUGHT = {"sft": chats(WORDS[::-1]), "lora": chats(WORDS[1:] + WORDS[:1])}
RUN = """\
name = "sft"
output = "runs"

[model]
folder = "base"
compute_dtype = "float32"

[data.sources.chats]
folder = "sft-tokens"

[stages.all]
tokens = 15360
batch = 4
seq = 64
learning_rate = 1e-2
warmup = 1024

[optimizer]
weight_decay = 0.0

[step]
remat = "none"

[checkpoint]
every = 1000
export_every = 30
export_keep = 1

[watch]
every = 1
"""
LORA = """\
extends = "sft.toml"
name = "lora"

[model]
folder = "runs/sft/exports/step-60"

[data.sources.chats]
folder = "lora-tokens"

[lora]
rank = 8
alpha = 32.0
base_dtype = "float32"
"""
PREPARE = [
    ["data", "prepare", f"{name}.jsonl", "--tokenizer", "base", "--out", f"{name}-tokens", "--workers", "0"] for name in TAUGHT
]
TEXT_ENDS, TURN_ENDS = 288, 290  # so few words are in these conversations
BEGAN_FROM = {"sft": "base", "lora": "runs/sft/exports/step-60"}
ADAPTER = ["--checkpoint.export", "adapter", "--checkpoint.export_form", "adapter"]
COMMANDS = [*PREPARE, ["train", "sft.toml"], ["train", "lora.toml"], ["train", "lora.toml", *ADAPTER]]
ENVIRONMENT = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
ALL_IN_ONE = (
    "import json, sys; from qwen3_jax.cli.main import main; sys.exit(any([main(words) for words in json.loads(sys.argv[1])]))"
)


forward = jax.jit(lambda model, batch: model(batch.tokens, segment_ids=batch.segment_ids).logits, compiler_options=QUICK)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the commands have run, one after another in one process; the base knows the end of a text alone."""
    place = tmp_path_factory.mktemp("sft")
    train_tokenizer(TAUGHT["sft"], 330, place / "tokenizer")
    tok = load_tokenizer(place / "tokenizer")
    assert tok.encode("<|endoftext|><|im_end|>") == [TEXT_ENDS, TURN_ENDS]
    shape = dict(vocab_size=330, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config = Qwen3Config(**shape, **experts, intermediate_size=64, eos_token_id=TEXT_ENDS)
    make = jax.jit(lambda: Qwen3(config, rngs=nnx.Rngs(0), dtype=jnp.float32), compiler_options=QUICK)
    save_pretrained(make(), place / "base", tokenizer=tok)
    for name, text in (("sft", RUN), ("lora", LORA)):
        (place / f"{name}.toml").write_text(text)
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in TAUGHT[name] * 4))
    before = {path.name: path.read_bytes() for path in (place / "base").iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE, json.dumps(COMMANDS)],
        cwd=place,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name: path.read_bytes() for path in (place / "base").iterdir()} == before
    return place


@pytest.mark.parametrize("name", TAUGHT)
def test_the_loss_is_of_the_assistants_tokens_and_falls(place, name):
    """The first step's is what the model it began from makes of what the assistant says, and of nothing else."""
    folder = place / BEGAN_FROM[name]
    tok, model = load_tokenizer(folder), from_pretrained(folder, dtype=jnp.float32)
    config = LoaderConfig((Source("chats", str(place / f"{name}-tokens")),), seed=0, shards=4)
    with make_loader(config, batch=4, seq=64, process_index=0, process_count=1) as loader:
        batch = jax.tree.map(jnp.asarray, next(loader))
    learned = "".join(tok.decode(row[weights > 0]) for row, weights in zip(batch.labels, batch.mask, strict=True))
    taught = [
        f"<think>\n{answer.get('reasoning_content', '')}\n</think>\n\n{answer['content']}<|im_end|>"
        for _, answer in TAUGHT[name]
    ]
    for answer in taught:
        learned = learned.replace(answer, "")
    assert learned == "", learned
    logits = forward(model, batch)
    found = [line["loss"] for line in read_lines(place / f"runs/{name}/metrics.jsonl")]
    np.testing.assert_allclose(found[0], cross_entropy(logits, batch.labels, batch.mask), rtol=1e-5)
    of_all = cross_entropy(logits, batch.labels, jnp.asarray(batch.segment_ids > 0, jnp.float32))
    assert abs(found[0] - float(of_all)) > 1e-3
    assert np.mean(found[-3:]) < found[0] / 3


@pytest.mark.parametrize("name", TAUGHT)
def test_it_answers_as_it_was_taught_and_stops(place, name):
    """With a thought or without, as each answer has one; the first base's tokenizer does not know that a turn's end is one."""
    folder = place / f"runs/{name}/exports/step-60"
    assert [path.name for path in folder.parent.iterdir()] == ["step-60"]  # the newest alone is kept
    assert load_tokenizer(folder).stop_token_ids == (TURN_ENDS, TEXT_ENDS)
    tok = load_tokenizer(place / "base")
    assert tok.stop_token_ids == (TEXT_ENDS,)
    chat = Chat(from_pretrained(folder, dtype=jnp.float32), tok)
    for ask, answer in TAUGHT[name]:
        deltas = list(chat.stream([ask], sampling=Sampling(0.0), max_new_tokens=40))
        assert "".join(delta.thinking for delta in deltas).strip() == answer.get("reasoning_content", "")
        assert "".join(delta.content for delta in deltas) == answer["content"]


def test_adapters_leave_the_base_as_it_was(place):
    """What the run merged into the weights that it held is the adapter folder merged into the base, to the bit."""
    base = from_pretrained(place / BEGAN_FROM["lora"], dtype=jnp.float32)
    merged = merge(with_adapter(base, str(place / "adapter")))
    exported = from_pretrained(place / "runs/lora/exports/step-60", dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(merged), nnx.state(exported))
    same = jax.tree.map(np.array_equal, nnx.state(base), nnx.state(exported))
    changed = {jax.tree_util.keystr(path) for path, equal in jax.tree.leaves_with_path(same) if not equal}
    assert changed and all("attention" in name or "moe" in name for name in changed)
    told = json.loads((place / "adapter/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == BEGAN_FROM["lora"]


def test_adapters_that_were_killed_midway_are_the_same_to_the_bit(place):
    """The base is read again, the adapters and their optimizer go on where they were."""
    # Its steps were compiled for the run that it is held against, and kept.
    kept = sorted(Path(ENVIRONMENT["XDG_CACHE_HOME"]).glob("qwen3-jax/*/jit_step-*-cache"))
    words = ["lora.toml", "--name", "killed", "--checkpoint.every", "10"]
    whole = [sys.executable, "-m", "qwen3_jax.cli.main", "train", *words]
    for command, ends in ((signalling(35, signal.SIGKILL, *words), -signal.SIGKILL), (whole, 0)):
        process = subprocess.Popen(
            command, cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        code, out = finish(process)
        assert code == ends, out
    assert kept and kept == sorted(Path(ENVIRONMENT["XDG_CACHE_HOME"]).glob("qwen3-jax/*/jit_step-*-cache"))
    found = re.search(r"goes on at step (\d+)", out)
    assert found is not None and int(found[1]) in (20, 30), out  # the save of step 30 may not have ended
    one, other = (arrays_of(place, 60, name=name) for name in ("killed", "lora"))
    assert one.keys() == other.keys() and any("lora" in name.lower() for name in one), sorted(one)[:9]
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    curves = [list(read_lines(place / f"runs/{name}/metrics.jsonl")) for name in ("killed", "lora")]
    assert len(curves[0]) == 60
    assert [(line["step"], line["loss"]) for line in curves[0]] == [(line["step"], line["loss"]) for line in curves[1]]
