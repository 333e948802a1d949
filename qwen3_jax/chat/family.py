"""Qwen3's families, whose chat templates differ, and which of them a folder belongs to.

A folder's own template goes before all this: it serves folders that have none, as one that was written by a training run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from qwen3_jax.chat.files import TokenizerError, json_object

# The template file of each. The embedding folders carry the hybrid template: embedding itself reads no chat, only text.
TEMPLATES = {
    "hybrid": "hybrid.jinja",
    "instruct_2507": "instruct_2507.jinja",
    "thinking_2507": "thinking_2507.jinja",
    "coder": "coder.jinja",
    "embedding": "hybrid.jinja",
}

# How the published names tell them apart: Qwen3-4B-Instruct-2507, Qwen3-Coder-30B-A3B-Instruct, Qwen3-8B, ...
_NAMES = {
    "coder": re.compile(r"qwen3-coder(?!-next)\b", re.I),
    "embedding": re.compile(r"qwen3-embedding\b", re.I),
    "instruct_2507": re.compile(r"qwen3-[\w.-]*instruct-2507\b", re.I),
    "thinking_2507": re.compile(r"qwen3-[\w.-]*thinking-2507\b", re.I),
    "hybrid": re.compile(r"qwen3-\d[\d.]*b\b", re.I),
}
_BASE_MODEL = re.compile(r"^base_model:[ \t]*(?:\n\s*-\s*)?(\S+)", re.M)


@functools.cache
def family_template(family: str) -> str:
    """The chat template of a family, in jinja2.

    Args:
        family: one of TEMPLATES.

    Returns:
        The source; it renders what the published one does.

    Raises:
        TokenizerError: an unknown family.
    """
    if family not in TEMPLATES:
        raise TokenizerError(f"family is {family!r}: accepted are {', '.join(TEMPLATES)}")
    return (Path(__file__).parent / "templates" / TEMPLATES[family]).read_text("utf-8")


def family_of(folder: Path) -> str:
    """The family that a folder says it is of.

    Args:
        folder: a model's. Read are the name that its config.json was made from, the base model in its README.md's front matter,
            and then its own name, or its repository's in a cache of the Hugging Face hub. The first that is one of Qwen3's
            published names settles it.

    Returns:
        One of TEMPLATES; hybrid where nothing is said.
    """
    for name in _told(folder):
        for family, pattern in _NAMES.items():
            if pattern.search(name):
                return family
    return "hybrid"


def _told(folder: Path) -> Iterator[str]:
    made_from = json_object(folder / "config.json").get("_name_or_path")
    if isinstance(made_from, str):
        yield made_from
    card = folder / "README.md"
    if card.is_file():
        # A model card's YAML stands between two lines of dashes, at the top.
        before, _, rest = card.read_text("utf-8", errors="replace")[:20_000].partition("---\n")
        matter, closed, _ = rest.partition("\n---")
        if not before and closed and (found := _BASE_MODEL.search(matter)):
            yield found[1]
    place = folder.resolve()
    if place.parent.name == "snapshots":  # models--Qwen--Qwen3-8B/snapshots/REVISION
        place = place.parent.parent
    yield place.name
