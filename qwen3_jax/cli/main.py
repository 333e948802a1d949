"""The command line: `qwen3-jax COMMAND ...`. Each command is a file beside this one, imported only when it is called."""

import importlib
import sys
from collections.abc import Sequence

from qwen3_jax import __version__
from qwen3_jax.cli.interrupts import keep_interrupts

COMMANDS = {
    "generate": "complete prompts",
    "chat": "talk to a model, thinking or not",
    "train": "a run of training by a TOML file; or show what it would be",
    "data": "tokenise text and conversations once, for training",
    "convert": "a model from Hugging Face's form to the native one, back, or to another dtype",
    "plan": "compile a model for a pod that is not there: which mesh, does it fit, how fast",
    "inspect": "a model's shape, tensors and bytes, without reading its weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; the process's own when None.

    Returns:
        Exit code: 0, 1 for a failure, 2 for bad input.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"qwen3-jax {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"qwen3-jax: unknown command {words[0]!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    keep_interrupts()
    command = importlib.import_module(f"qwen3_jax.cli.{words[0]}")
    reason = ""
    try:
        code = command.main(words[1:])
    except KeyboardInterrupt:
        code = 130
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        # What the API refuses at its door; anything else is a fault of ours and keeps its traceback.
        reason = f"qwen3-jax {words[0]}: {error}"
        print(reason, file=sys.stderr)
        code = 2
    if code:
        # Of several processes the others may be waiting for this one.
        from qwen3_jax.parallel.watchdog import leave

        leave(code, reason)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return f"usage: qwen3-jax COMMAND ...\n\ncommands:\n{rows}\n\n`qwen3-jax COMMAND --help` shows its options."


if __name__ == "__main__":
    sys.exit(main())
