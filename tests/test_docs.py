"""The snippets of README and docs run, page by page, against a small checkpoint in the folder `model`."""

import re
from pathlib import Path

import pytest

from tests.chat.tiny import write_checkpoint

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in page.read_text("utf-8")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("docs")
    write_checkpoint(place)
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    snippets = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, page.name, "exec"), names)
    assert names


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target
