"""Tensors on their way between host and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16  # bytes at which views of any dtype may start


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on ``device``, by one copy of one buffer, which is pinned for CUDA: a pageable one would wait for the device."""
    if device.type == "cpu":
        return list(tensors)
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    starts, size = [], 0
    for content in flat:
        starts.append(size)
        size += -(-len(content) // _ALIGNED) * _ALIGNED
    buffer = torch.empty(size, dtype=torch.uint8)
    for content, start in zip(flat, starts, strict=True):
        buffer[start : start + len(content)] = content
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    buffer = buffer.to(device, non_blocking=True)
    return [
        buffer[start : start + len(content)].view(tensor.dtype).view(tensor.shape)
        for tensor, content, start in zip(tensors, flat, starts, strict=True)
    ]


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integer or bool tensors on the CPU, by one copy where they lie on one device."""
    away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if len({tensor.device for tensor in away}) != 1:
        return [tensor.cpu() for tensor in tensors]
    found = iter(
        torch.cat([tensor.reshape(-1).long() for tensor in away]).cpu().split([tensor.numel() for tensor in away])
    )
    return [
        tensor if tensor.device.type == "cpu" else next(found).view(tensor.shape).to(tensor.dtype) for tensor in tensors
    ]
