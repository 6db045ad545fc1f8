"""Muon for the matrices inside layers, AdamW for everything else."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn


class Muon:
    """Momentum made orthogonal by Newton-Schulz steps for matrices inside layers, AdamW for the rest.

    Args:
        named: parameters; matrices whose name holds one of ``inside`` are orthogonalised.
        matrix_lr, other_lr: learning rates of the two.
        slow: factor of both for parameters whose name begins with "vision." or "heads.".
    """

    def __init__(
        self,
        named: list[tuple[str, nn.Parameter]],
        matrix_lr: float,
        other_lr: float,
        slow: float = 1.0,
        inside: tuple[str, ...] = (".layers.",),
    ) -> None:
        found = [p for n, p in named if p.ndim == 2 and any(part in n for part in inside)]
        self.factor = {id(p): slow if n.startswith(("vision.", "heads.")) else 1.0 for n, p in named}
        chosen = set(map(id, found))
        self.groups: dict[tuple, list[nn.Parameter]] = collections.defaultdict(list)
        for p in found:
            self.groups[tuple(p.shape)].append(p)
        self.momentum = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }
        self.matrix_lr, self.other_lr = matrix_lr, other_lr
        rest = [p for _, p in named if id(p) not in chosen]
        groups = [[p for p in rest if self.factor[id(p)] == factor] for factor in {1.0: 0, slow: 0}]
        groups = [{"params": group, "factor": self.factor[id(group[0])]} for group in groups if group]
        self.adam = torch.optim.AdamW(groups, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, scale: float) -> None:
        """One update at a share of the learning rates."""
        for shape, group in self.groups.items():
            momentum = self.momentum[shape]
            momentum.lerp_(grad := torch.stack([p.grad for p in group]), 0.05)
            update = shared(orthogonalise, grad.lerp(momentum, 0.95)) * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(group, update, strict=True):
                rate = self.matrix_lr * scale * self.factor[id(p)]
                p.data.mul_(1 - 0.02 * rate).add_(u, alpha=-rate)
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * scale * group["factor"]
        self.adam.step()

    def state_dict(self) -> dict:
        """Momentum and AdamW's state."""
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take up a saved state."""
        for shape, value in state["momentum"].items():
            self.momentum[shape].copy_(value)
        self.adam.load_state_dict(state["adam"])


def shared(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """``function(batch)``, of the shape of ``batch``; where several processes train, each computes a part of it for all."""
    if not distributed.is_initialized():
        return function(batch)
    own = slice(distributed.get_rank(), None, distributed.get_world_size())
    result = torch.zeros_like(batch)
    result[own] = function(batch[own])
    distributed.all_reduce(result)
    return result


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: five quintic Newton-Schulz steps. matrices: (n, rows, columns)."""
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.transpose(1, 2)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.transpose(1, 2) if tall else x
