"""What importing starts (nothing), and what the package offers."""

import subprocess
import sys

import pytest

import qwen3_jax


def loaded(statement):
    """Names of the modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import qwen3_jax",
        "from qwen3_jax.cli.main import main; main(['--help'])",
        "import qwen3_jax.cli.chat",
        "import qwen3_jax.cli.plan",
        "from qwen3_jax.cli.main import main; main(['data', '--help'])",
    ],
)
def test_neither_import_nor_help_loads_jax(statement):
    assert not loaded(statement) & {"jax", "flax", "tokenizers", "torch", "transformers"}


def test_no_module_starts_a_backend_or_needs_another_framework():
    """jax.distributed must still be able to start when everything is imported."""
    statement = (
        "import pkgutil, importlib, qwen3_jax, pallas_kernels;"
        "[importlib.import_module(m.name) for p in (qwen3_jax, pallas_kernels)"
        " for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.')];"
        "import jax._src.xla_bridge as bridge; assert not bridge.backends_are_initialized()"
    )
    modules = loaded(statement)
    assert "qwen3_jax.generation.loop" in modules
    assert not modules & {"torch", "transformers", "tensorflow"}


@pytest.mark.parametrize("name", qwen3_jax.__all__)
def test_public_names_are_there_and_documented(name):
    assert getattr(qwen3_jax, name).__doc__
    assert name in dir(qwen3_jax)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'Qwen4'; it has .*Qwen3Config"):
        qwen3_jax.__getattr__("Qwen4")
