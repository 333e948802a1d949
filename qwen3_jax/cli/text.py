"""Text in and out of the command line: what a model wrote reaches standard output as it is, byte for byte."""

import io
import sys

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style


def make_console() -> Console:
    """The console of a command that talks.

    Bytes on standard input that are no UTF-8 come in as surrogates, for `is_text` to find, instead of an error that loses what
    was read with them; letters that standard output's encoding lacks go out as question marks.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    return Console(highlight=False)


def table_console(widest: int) -> Console:
    """The console of a command that prints tables: rows that a narrow terminal breaks are better than figures cut off.

    Args:
        widest: letters in a row of the widest table.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, widest)
    return console


def write(console: Console, text: str, dim: bool = False) -> None:
    """Write a text as it is. rich would read markup and emoji in it, spread its tabs and drop its control characters.

    Args:
        console: where to.
        text: anything.
        dim: in a terminal, between the codes for it.
    """
    if dim and console.color_system is not None:
        text = Style(dim=True).render(text, color_system=ColorSystem.STANDARD)
    console.file.write(text)
    console.file.flush()


def is_text(words: str) -> bool:
    """Whether what was typed is text: bytes that are no UTF-8 arrive as halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in words)
