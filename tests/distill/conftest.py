"""The implementations of the relation loss that every property is held for."""

import pytest

from tests.native_kernels import as_one_device, require_kernels


@pytest.fixture(params=["reference", "blocked", "auto"])
def implementation(request, monkeypatch):
    """`auto` as on a machine with one CPU, which takes the kernels for CPUs."""
    if request.param == "auto":
        require_kernels("relations")
        as_one_device(monkeypatch)
    return request.param
