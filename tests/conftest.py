"""What every test runs under: eight CPU devices, flax's coming defaults, exact float32 products, shapes and types checked."""

import atexit
import os
import shutil
import signal
import tempfile

import hypothesis
import pytest

# How long an example takes says what else the machine does: a stall of 0.2 s would fail a test.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices, for meshes; whatever names none runs on the first.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# No test leaves programs in the user's own cache, nor finds them there.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="qwen3-jax-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["NNX_GRAPH_MODE"] = "false"
os.environ["NNX_GRAPH_UPDATES"] = "false"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"

import jaxtyping  # noqa: E402

import tests.typecheck  # noqa: E402, F401  # the hook finds it as an attribute of `tests`

# Before anything imports the packages: their annotations are then checked on every call.
_HOOK = jaxtyping.install_import_hook(["qwen3_jax", "pallas_kernels"], "tests.typecheck.checked")

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module")
def quick():
    """Programs are compiled with less care, in three quarters of the time: for modules that compile more than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, here and in children, also where the suite was started with it ignored (nohup, &)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
