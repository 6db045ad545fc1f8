"""Tensors of any type and shape come over in one copy, as they are; on a pretended device."""

from __future__ import annotations

import pytest
import torch

from crop.ops.transfer import download, upload
from tests.support.pretend_cuda import DEVICE, Log, OnDevice, pretended

pytestmark = pytest.mark.fast
TENSORS = (
    torch.tensor([True, False, True]),
    torch.arange(7, dtype=torch.int8).view(7, 1),
    torch.arange(6).view(2, 3).T,
    torch.empty(0, 4, dtype=torch.int32),
    torch.tensor(5),
    torch.tensor([[1.5]], dtype=torch.bfloat16).expand(3, 2),
)


def test_one_copy_up() -> None:
    log = Log()
    with pretended(log):
        found = upload(TENSORS, DEVICE)
    assert [event.kind for event in log] == ["to device, pinned"]
    for one, other in zip(found, TENSORS, strict=True):
        assert one.device == DEVICE and one.dtype == other.dtype and torch.equal(one.inner, other)
    assert all(one is other for one, other in zip(upload(TENSORS, torch.device("cpu")), TENSORS, strict=True))


def test_one_copy_down() -> None:
    """Fractions are not packed with whole numbers: they come by a copy of their own, and stay fractions."""
    log, given = Log(), TENSORS[:-1]
    with pretended(log):
        found = download([given[0], *(OnDevice(tensor, log) for tensor in given[1:])])
    assert [event.kind for event in log if event.kind != "kernel"] == ["to host"]
    log, given = Log(), TENSORS
    with pretended(log):
        found = download([given[0], *(OnDevice(tensor, log) for tensor in given[1:])])
    assert [event.kind for event in log if event.kind != "kernel"] == ["to host"] * 2
    for one, other in zip(found, given, strict=True):
        assert type(one) is torch.Tensor and one.dtype == other.dtype and torch.equal(one, other)
