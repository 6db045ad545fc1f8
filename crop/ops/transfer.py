"""Tensors on their way between host and device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16  # bytes at which views of any dtype may start


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on ``device``, by one copy of one buffer, which is pinned for CUDA: a pageable one would wait for the device."""
    if device.type == "cpu":
        return list(tensors)
    dense, starts, size = [tensor.contiguous() for tensor in tensors], [], 0
    for tensor in dense:
        starts.append(size)
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    packed = np.empty(size, dtype=np.uint8)
    for tensor, start in zip(dense, starts, strict=True):
        content = tensor.view(-1).view(torch.uint8).numpy()
        packed[start : start + content.size] = content
    buffer = torch.from_numpy(packed)
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    buffer = buffer.to(device, non_blocking=True)
    typed = {dtype: buffer.view(dtype) for dtype in {tensor.dtype for tensor in dense}}
    return [
        typed[tensor.dtype].as_strided(tensor.shape, tensor.stride(), start // tensor.element_size())
        for tensor, start in zip(dense, starts, strict=True)
    ]


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on the CPU; integers and bools by one copy where they lie on one device, fractions by one each."""
    packed = [tensor.device.type != "cpu" and not tensor.is_floating_point() for tensor in tensors]
    away = [tensor for tensor, one in zip(tensors, packed, strict=True) if one]
    if len({tensor.device for tensor in away}) != 1:
        return [tensor.cpu() for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1).long() for tensor in away]).cpu()
    found = iter(flat.split([tensor.numel() for tensor in away]))
    return [
        next(found).view(tensor.shape).to(tensor.dtype) if one else tensor.cpu()
        for tensor, one in zip(tensors, packed, strict=True)
    ]
