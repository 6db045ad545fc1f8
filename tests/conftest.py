"""Shared fixtures. Tiny CPU models: one thread is fastest and leaves the machine to others."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import tiny_models
from tests.support.operators import BACKENDS, Backend
from tests.support.oracle import Oracle


@functools.cache
def _model(family: str, attention: str) -> Any:
    model = tiny_models.build_model(family, attention)
    with tiny_models.flash_on_cpu():  # the first forward installs transformers' own recording hooks
        model(**tiny_models.standard_batch(family, "single", 1).inputs)
    return model


@functools.cache
def _oracle(family: str) -> Oracle:
    return Oracle(tiny_models.build_model(family, "eager"))


@pytest.fixture(scope="session")
def get_model() -> Any:
    """get_model(family, attention): the tiny model, built once per session."""
    return _model


@pytest.fixture(scope="session")
def get_oracle() -> Any:
    """get_oracle(family): the reference on a second model of the same weights."""
    return _oracle


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a module's tests on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flash() -> Iterator[tiny_models.FlashCalls]:
    """CPU kernels behind transformers' flash integration, with a record of their calls."""
    with tiny_models.flash_on_cpu() as record:
        yield record


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> Backend:
    reason = BACKENDS[request.param].missing()
    if reason:
        pytest.skip(reason)
    return BACKENDS[request.param]


@pytest.fixture(params=[name for name in BACKENDS if name != "twin"])
def native(request: Any) -> Backend:
    reason = BACKENDS[request.param].missing()
    if reason:
        pytest.skip(reason)
    return BACKENDS[request.param]
