"""Calls go straight to the kernel, except where torch's dispatcher has to see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from crop import ops
from crop.geometry.pooling import PoolPlan

pytestmark = pytest.mark.fast

X = torch.arange(24.0).view(1, 6, 4)
INDEX = torch.tensor([[0, 2, 5]])
PLAN = PoolPlan.identity(6)


class Recorder(TorchDispatchMode):
    """Names of the operators that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


CALLS: dict[str, Callable[[], Any]] = {
    "attention_mass": lambda: ops.attention_mass(X[None], X[None], INDEX),
    "select": lambda: ops.select(X[0], 2),
    "compact": lambda: ops.compact([X], INDEX),
    "adaptive_pool": lambda: ops.adaptive_pool(X[0], PLAN),
}


@pytest.mark.parametrize("name", CALLS)
def test_modes_and_profilers_see_a_call(name: str) -> None:
    with Recorder() as recorder:
        seen = CALLS[name]()
    assert f"crop::{name}" in recorder.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = CALLS[name]()
    assert f"crop::{name}" in {event.key for event in profile.key_averages()}
    plain = CALLS[name]()  # and nobody's call gives the same bits
    for other in (seen, profiled):
        assert all(map(torch.equal, *((r if isinstance(r, list) else [r]) for r in (plain, other))))


def test_fake_tensors_and_tracers() -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(X)
        assert ops.select(x[0], 2).shape == (6, 2)
        assert ops.compact([x], mode.from_tensor(INDEX))[0].shape == (1, 3, 4)
    graph = make_fx(lambda x: ops.compact([x * 2], INDEX)[0])(X)
    assert "crop.compact" in graph.code
    assert torch.equal(graph(X + 1), (X + 1)[:, [0, 2, 5]] * 2)


def test_gradients() -> None:
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.compact([x], INDEX)[0].sum(), x)
    assert grad.sum() == 12 and torch.equal(grad[0, [0, 2, 5]], torch.ones(3, 4))
    with torch.no_grad():
        assert not ops.compact([x], INDEX)[0].requires_grad
    weight = torch.nn.Parameter(torch.ones(6))
    assert ops.adaptive_pool(X[0], PLAN, "weighted", weight).requires_grad


def test_transforms_are_seen() -> None:
    """A direct call would return a plain tensor and lose the transform; torch has no rule for ``grad`` and says so."""
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: ops.adaptive_pool(x, PLAN).sum())(X[0])
    pooled = torch.vmap(lambda x: ops.adaptive_pool(x, PLAN))(torch.cat([X, 2 * X]))
    assert torch.equal(pooled, torch.cat([X, 2 * X]))


def test_subclass() -> None:
    class Tagged(Tensor):
        pass

    tagged = X.as_subclass(Tagged)
    assert torch.equal(ops.compact([tagged], INDEX)[0].as_subclass(Tensor), X[:, [0, 2, 5]])
