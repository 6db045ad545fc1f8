"""Shared fixtures. Tiny CPU models: one thread is fastest and leaves the machine to others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.flash import FlashCalls, flash_on_cpu
from tests.support.operators import BACKENDS, Backend

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # nothing fails for being slow

FAST = ("twin", "avx2")  # of the operators' implementations, for `pytest -m fast`


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a module's tests on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flash() -> Iterator[FlashCalls]:
    """CPU kernels behind transformers' flash integration, with a record of their calls."""
    with flash_on_cpu() as record:
        yield record


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.fast) if name in FAST else name for name in BACKENDS])
def backend(request: Any) -> Backend:
    """Every implementation of the operators that can run here."""
    return _available(BACKENDS[request.param])


@pytest.fixture(params=[name for name in BACKENDS if name != "twin"])
def native(request: Any) -> Backend:
    """Every compiled implementation of the operators that can run here."""
    return _available(BACKENDS[request.param])


def _available(backend: Backend) -> Backend:
    reason = backend.missing()
    if reason:
        pytest.skip(reason)
    return backend
