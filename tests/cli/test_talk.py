"""`qwen3-jax generate` and `chat` as processes: what a person types and sees."""

import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from qwen3_jax import from_pretrained, generate, load_tokenizer
from tests.chat.tiny import write_checkpoint

COMMAND = [sys.executable, "-m", "qwen3_jax.cli.main"]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return folder / "model"


def run(*words, **options):
    return subprocess.run([*COMMAND, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options)


def test_generate_continues_each_prompt(model):
    done = run("generate", str(model), "def read(", "return", "--max-new-tokens", "9")
    assert done.returncode == 0, done.stderr
    tok = load_tokenizer(model)
    for prompt in ("def read(", "return"):
        out = generate(
            from_pretrained(model), jnp.asarray([tok.encode(prompt)]), max_new_tokens=9, stop_tokens=tok.stop_token_ids
        )
        wanted = prompt + tok.decode(out.tokens[0, : out.lengths[0]], skip_special_tokens=True)
        assert "".join(wanted.split()) in "".join(done.stdout.split())


@pytest.mark.parametrize(
    "words, says",
    [
        (["generate", "{model}", "a", "--temperature", "-1"], "temperature is -1.0: accepted is a number >= 0"),
        (["generate", "{model}", ""], "prompts: accepted is at least one"),
        (["generate", "{model}/nowhere", "a"], "nowhere"),
        (["chat", "{model}", "--thinking-budget", "3", "--thinking", "off"], "contradict each other"),
        (["serve"], "unknown command 'serve'"),
    ],
)
def test_bad_input_is_one_line(model, words, says):
    done = run(*[word.format(model=model) for word in words])
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_chat_thinks_by_budget_and_switches(model):
    lines = "read\n/no_think\nread\n/clear\n/exit\n"
    done = run("chat", str(model), "--thinking-budget", "4", "--max-new-tokens", "60", "--temperature", "0", input=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Considering the limited time by the user") == 1
    assert "thinking off" in done.stdout


def test_an_interrupt_stops_the_answer_and_not_the_program(model):
    command = [*COMMAND, "chat", str(model), "--max-new-tokens", "20000", "--temperature", "3", "--thinking", "off"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"read\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        seen, give_up = b"", time.monotonic() + 120
        # The answer has begun once more than the greeting is there.
        while len(seen) < 600 and time.monotonic() < give_up:
            seen += process.stdout.read() or b""
            time.sleep(0.1)
        assert len(seen) >= 600
        process.send_signal(signal.SIGINT)
        os.set_blocking(process.stdout.fileno(), True)
        out, err = process.communicate(b"/think\n/exit\n", timeout=120)
    assert process.returncode == 0, err
    assert b"stopped" in out and b"thinking on" in out
