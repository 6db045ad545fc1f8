"""A layer whose weights are packed, as libraries for quantised models have them."""

from __future__ import annotations

import torch


class Quantised(torch.nn.Module):
    """A layer whose weight nobody can read: eight bits, or two of four in one byte, and a scale per row."""

    def __init__(self, linear: torch.nn.Linear, bits: int) -> None:
        super().__init__()
        top = 2 ** (bits - 1) - 1
        scale = linear.weight.abs().amax(1, keepdim=True) / top
        code = (linear.weight / scale).round().to(torch.int8)
        if bits == 4:
            code = (code[:, ::2] & 15) | (code[:, 1::2] << 4)
        self.bits, self.bias = bits, linear.bias
        self.register_buffer("weight", code)
        self.register_buffer("scale", scale)

    def full(self) -> torch.Tensor:
        if self.bits == 8:
            return self.weight * self.scale
        low, high = (self.weight << 4) >> 4, self.weight >> 4
        return torch.stack([low, high], -1).flatten(1) * self.scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.full(), self.bias)
