"""`qwen3-jax chat MODEL`: talk to a model; thoughts are dim, Ctrl-C stops an answer and not the program."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from qwen3_jax.chat.session import Chat

HELP = "/think and /no_think alone on a line switch thinking; /clear forgets the conversation; /exit or Ctrl-D ends it"


@dataclasses.dataclass(frozen=True)
class Options:
    """Talk to a model."""

    model: tyro.conf.Positional[str]
    """Folder of the model."""
    adapter: str | None = None
    """Folder of LoRA adapters for it, as PEFT or `qwen3-jax train` writes them."""
    system: str | None = None
    """System prompt."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Think or not; auto is the model's own way."""
    thinking_budget: int | None = None
    """Tokens that a thought may take."""
    temperature: float | None = None
    """Instead of the checkpoint's sampling."""
    max_new_tokens: int = 2048
    """Thought and content of one answer."""
    seed: int = 0
    """Of the first answer's draw; each next one counts up."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of computation; float32 on CPU, else bfloat16."""
    compilation_cache: bool = True
    """Keep compiled programs for the next start, in $XDG_CACHE_HOME or ~/.cache."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `qwen3-jax chat`.

    Returns:
        Exit code.
    """
    options = tyro.cli(Options, args=argv, prog="qwen3-jax chat")
    if options.thinking_budget is not None and options.thinking == "off":
        raise ValueError("thinking_budget and no thinking contradict each other: accepted is one of them")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}: accepted is an integer >= 1")

    from qwen3_jax import Chat, Sampling, from_pretrained, load_tokenizer
    from qwen3_jax.cli.adapter import with_adapter
    from qwen3_jax.cli.programs import keep_programs
    from qwen3_jax.cli.text import is_text, make_console

    if options.system is not None and not is_text(options.system):
        raise ValueError(f"system: {options.system!r} holds bytes that are no UTF-8: accepted is text")
    keep_programs(options.compilation_cache)
    console = make_console()
    tok = load_tokenizer(options.model)
    chat = Chat(with_adapter(from_pretrained(options.model, dtype=options.dtype), options.adapter), tok)
    thinking, sampling = {"auto": None, "on": True, "off": False}[options.thinking], None
    if options.temperature is not None:
        sampling = Sampling(temperature=options.temperature)
    opening = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages: list[dict[str, Any]] = list(opening)
    console.print(f"[dim]{HELP}[/]")
    seed = options.seed
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            console.print("[dim]/exit or Ctrl-D ends the program[/]")
            continue
        if line == "/exit":
            return 0
        if line == "/clear":
            messages = list(opening)
        elif not is_text(line):
            console.print("[dim]that line holds bytes that are no UTF-8: accepted is text[/]")
        elif line in ("/think", "/no_think"):
            thinking = line == "/think"
            console.print(f"[dim]thinking {'on' if thinking else 'off'}[/]")
        elif line:
            mode = options.thinking_budget if options.thinking_budget is not None and thinking is not False else thinking
            said = [*messages, {"role": "user", "content": line}]
            answer = _answer(chat, said, console, thinking=mode, sampling=sampling, limit=options.max_new_tokens, seed=seed)
            messages, seed = [*said, {"role": "assistant", "content": answer}], seed + 1


def _answer(
    chat: "Chat", messages: list[dict[str, Any]], console: "Console", *, thinking: Any, sampling: Any, limit: int, seed: int
) -> str:
    """Print an answer as it comes.

    Returns:
        Its content, as far as it came.
    """
    from qwen3_jax.cli.text import write

    content, thought = [], False
    stream = chat.stream(messages, thinking, sampling, max_new_tokens=limit, seed=seed)
    try:
        for delta in stream:
            if delta.thinking:
                thought = True
                write(console, delta.thinking, dim=True)
            else:
                if thought:
                    console.print("\n")
                    thought = False
                content.append(delta.content)
                write(console, delta.content)
    except KeyboardInterrupt:
        console.print("\n[dim]stopped[/]", end="")
    console.print()
    return "".join(content)
