"""The published vocabulary as a tokenizer folder, made once a run from the committed ranks."""

import pytest

from tools.rebuild_vocabulary import from_fixture, write_folder


@pytest.fixture(scope="session")
def ranks():
    """The tokens in the order of their ranks; their sha256 is checked."""
    return from_fixture()


@pytest.fixture(scope="session")
def published(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_folder(folder, ranks)
    return folder
