"""A Ctrl-C that falls into a callback whose errors Python ignores."""

import gc
import signal
import sys
import time

import pytest

from qwen3_jax.cli.interrupts import keep_interrupts


@pytest.fixture
def heard():
    """Pytest's workers ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_python_ignores_comes_again(monkeypatch, heard):
    def interrupted(phase, info):
        gc.callbacks.remove(interrupted)
        raise KeyboardInterrupt

    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    keep_interrupts()
    gc.callbacks.append(interrupted)
    gc.collect()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(60)
    assert time.monotonic() - begun < 50
    assert interrupted not in gc.callbacks and not ignored


def test_other_errors_are_told_as_ever(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    keep_interrupts()
    gc.callbacks.append(fails)
    gc.collect()
    assert [type(one.exc_value) for one in told] == [OSError]


def fails(phase, info):
    gc.callbacks.remove(fails)
    raise OSError
