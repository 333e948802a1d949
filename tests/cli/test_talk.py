"""`qwen3-jax generate` and `chat` as processes: what a person types and sees."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import pytest
from rich.console import Console

from qwen3_jax import from_pretrained, generate, load_tokenizer
from qwen3_jax.chat.session import Delta
from qwen3_jax.cli.chat import _answer
from tests.chat.tiny import write_checkpoint

COMMAND = [sys.executable, "-m", "qwen3_jax.cli.main"]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """A folder for compiled programs in place of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return folder / "model"


def run(*words, **options):
    return subprocess.run([*COMMAND, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options)


def test_generate_continues_each_prompt_and_keeps_its_programs(model, programs):
    kept = "qwen3-jax/jax_*/jit__generate-*-cache"
    before = set(programs.glob(kept))  # of tests that one of pytest's workers may have run earlier
    done = run("generate", str(model), "def read(", "return", "--max-new-tokens", "9")
    assert done.returncode == 0, done.stderr
    assert len(set(programs.glob(kept)) - before) == 1
    tok = load_tokenizer(model)
    for prompt in ("def read(", "return"):
        out = generate(
            from_pretrained(model), jnp.asarray([tok.encode(prompt)]), max_new_tokens=9, stop_tokens=tok.stop_token_ids
        )
        wanted = prompt + tok.decode(out.tokens[0, : out.lengths[0]], skip_special_tokens=True)
        assert wanted in done.stdout


@pytest.mark.parametrize(
    "words, says",
    [
        (["generate", "{model}", "a", "--temperature", "-1"], "temperature is -1.0: accepted is a number >= 0"),
        (["generate", "{model}", ""], "prompts: accepted is at least one"),
        (["generate", "{model}/nowhere", "a"], "nowhere"),
        (["chat", "{model}", "--thinking-budget", "3", "--thinking", "off"], "contradict each other"),
        (["generate", "{model}", "a", "--max-new-tokens", "0"], "max_new_tokens is 0: accepted is an integer >= 1"),
        (["chat", "{model}", "--max-new-tokens", "-5"], "max_new_tokens is -5: accepted is an integer >= 1"),
        (["generate", "{model}", "a\udcff"], r"prompts: 'a\udcff' holds bytes that are no UTF-8: accepted is text"),
        (["chat", "{model}", "--system", "\udcff"], r"system: '\udcff' holds bytes that are no UTF-8: accepted is text"),
        (["serve"], "unknown command 'serve'"),
    ],
)
def test_bad_input_is_one_line(model, words, says):
    done = run(*[word.format(model=model) for word in words])
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_settings_of_a_wrong_type_are_one_line(model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": "x"}')
    for words in (["generate", str(copy), "a"], ["chat", str(copy)]):
        done = run(*words, input="")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "generation_config.json: eos_token_id is 'x': accepted is an id or a list of ids" in done.stderr


def test_a_cache_that_cannot_be_written_is_one_line_and_none_without_it(model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "file"))
    for words, lines in (([], 1), (["--no-compilation-cache"], 0)):
        done = run("generate", str(model), "a", "--max-new-tokens", "2", *words)
        assert done.returncode == 0 and done.stderr.count("\n") == lines, done.stderr
        assert not lines or "Not a directory: accepted is a folder that can be made" in done.stderr


# All that a console might take for its own: emoji, markup, tabs, control characters, backslashes, line ends of both kinds.
ODD = "a\tb :x: [:x:1] [bold]c[/] [/] \\[d] e\\ \r\n\x07\x1b[31m é🙂\u2028 " + "long " * 100 + "\\"


@pytest.mark.parametrize("color", [False, True])
def test_a_model_s_text_reaches_standard_output_byte_for_byte(monkeypatch, color):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    content = io.BytesIO()
    console = Console(file=io.TextIOWrapper(content, "utf-8", newline=""), force_terminal=color, color_system="standard")
    if not color:
        console = Console(file=console.file)

    class Says:
        def stream(self, *args, **options):
            yield Delta(thinking=ODD[:20])
            yield Delta(thinking=ODD[20:])
            yield from (Delta(content=letter) for letter in ODD)

    chat: Any = Says()
    said = _answer(chat, [], console, thinking=None, sampling=None, limit=9, seed=0)
    assert said == ODD
    thought = f"\x1b[2m{ODD[:20]}\x1b[0m\x1b[2m{ODD[20:]}\x1b[0m" if color else ODD
    assert content.getvalue() == f"{thought}\n\n{ODD}\n".encode()


def test_generate_writes_prompt_and_text_byte_for_byte(model):
    done = subprocess.run(
        [*COMMAND, "generate", str(model), ODD, "--max-new-tokens", "5"], env=ENVIRONMENT, capture_output=True, timeout=300
    )
    tok = load_tokenizer(model)
    out = generate(from_pretrained(model), jnp.asarray([tok.encode(ODD)]), max_new_tokens=5, stop_tokens=tok.stop_token_ids)
    text = tok.decode(out.tokens[0, : out.lengths[0]], skip_special_tokens=True)
    assert done.stdout == f"{ODD}{text}\n".encode()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii:surrogateescape"])
def test_a_line_that_is_no_text_is_refused_and_the_chat_goes_on(model, encoding):
    command = [*COMMAND, "chat", str(model), "--max-new-tokens", "3"]
    lines = b"re\xffad\n/no_think\n/exit\n"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=environment, input=lines, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"that line holds bytes that are no UTF-8: accepted is text" in done.stdout and b"thinking off" in done.stdout


def test_chat_thinks_by_budget_and_switches(model):
    lines = "read\n/no_think\nread\n/clear\n/exit\n"
    done = run("chat", str(model), "--thinking-budget", "4", "--max-new-tokens", "60", "--temperature", "0", input=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Considering the limited time by the user") == 1
    assert "thinking off" in done.stdout


def test_an_interrupt_stops_the_answer_and_not_the_program(model, interruptible):
    command = [*COMMAND, "chat", str(model), "--max-new-tokens", "20000", "--temperature", "3", "--thinking", "off"]
    command += ["--seed", "4"]  # an answer of 1,700 bytes, two seconds of writing
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"read\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        seen, give_up = b"", time.monotonic() + 120
        # The answer has begun once more than the greeting is there.
        while len(seen) < 150 and time.monotonic() < give_up:
            seen += process.stdout.read() or b""
            time.sleep(0.02)
        assert len(seen) >= 150
        process.send_signal(signal.SIGINT)
        os.set_blocking(process.stdout.fileno(), True)
        out, err = process.communicate(b"/think\n/exit\n", timeout=120)
    assert process.returncode == 0, err
    assert b"stopped" in out and b"thinking on" in out
