"""The kernels for CPUs in tests: a machine without a C++ compiler has none."""

import jax
import pytest

from minilm_jax import native

CALL = "minilm_jax."
"""What a program says where it calls a kernel."""


def require_kernels(source):
    """Skips the test where the kernels of a file cannot be compiled."""
    if not native.load(source):
        pytest.skip("kernels for CPUs need a C++ compiler")


def as_one_device(monkeypatch):
    """Lets what no mesh tells of be one device's, as on a machine with one: kernels run there."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def calls(function, *arguments):
    """Returns how many kernels for CPUs the function calls, compiled for such arguments."""

    def traced_anew(*arguments):  # and not taken from where it counted as another device's
        return function(*arguments)

    return jax.jit(traced_anew).lower(*arguments).as_text().count(f"@{CALL}")
