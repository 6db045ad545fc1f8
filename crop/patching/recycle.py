"""Two refinements of a cut inside the decoder: which text rows judge, and what becomes of tokens that leave.

Source: SparseVLM (arXiv 2410.04417), text raters and token recycling, in forms of our own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


def raters(
    query: Tensor,
    key: Tensor,
    candidate: Tensor,
    sample: Tensor,
    scale: float | None,
    start: Tensor | None,
    stop: Tensor,
) -> Tensor:
    """Rows that look at the image at least as much as the rows of their sample do on average.

    Args:
        query: (batch, num_heads, M, d) text rows. key: (batch, num_kv_heads, T, d).
        candidate: (num_images, N) int64 keys of the vision tokens, -1 = filler. sample: (num_images,) their batch row.
        scale, start, stop: as in ``attention_mass``; a row that sees nothing is padding.
    Returns:
        (batch, M) bool.
    """
    batch, heads, _, dim = query.shape
    key = key.repeat_interleave(heads // key.shape[1], 1).float()
    logits = query.float() @ key.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    place = torch.arange(key.shape[2], device=key.device)
    seen = place < stop.unsqueeze(2)
    if start is not None:
        seen = seen & (place >= start.view(-1, 1, 1))
    # One spare column at the end swallows the fillers.
    vision = torch.zeros(batch, key.shape[2] + 1, dtype=torch.bool, device=key.device)
    vision[sample.unsqueeze(1), candidate] = True
    weights = logits.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num(0.0)
    mass = (weights * vision[:, None, None, :-1]).sum(3).mean(1)
    real = stop > (0 if start is None else start.unsqueeze(1))
    mean = (mass * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    return real & (mass >= mean * (1 - 1e-6))  # rounding must not leave equal rows without a judge


@dataclass(frozen=True)
class Recycling:
    """What takes part in it at a cut; (num_images, n) int64 positions each, ascending, -1 = filler at the end.

    Args:
        kept: all that stay. core: those of them that stay as they are; the others are seeds.
        reach: those that stay, and those that are merged into seeds before they leave.
        counts: tokens in each of the three, per image.
    """

    kept: Tensor
    core: Tensor
    reach: Tensor
    counts: Sequence[tuple[int, int, int]]


def recycle(hidden: Tensor, sample: Sequence[int], plan: Recycling) -> Tensor:
    """Merge tokens that leave into the most similar seed, as a plain mean in float32.

    Args:
        hidden: (batch, slots, dim) at the cut. sample: batch row of each image.
    Returns:
        Like ``hidden``, seeds changed.
    """
    hidden = hidden.clone()
    for image, (row, (kept, core, reach)) in enumerate(zip(sample, plan.counts, strict=True)):
        if reach == kept:
            continue
        mark = torch.zeros(hidden.shape[1], dtype=torch.int8, device=hidden.device)
        mark = mark.index_add(0, plan.kept[image, :kept], torch.ones(kept, dtype=torch.int8, device=hidden.device))
        in_core = torch.zeros_like(mark).index_fill(0, plan.core[image, :core], 1)
        everyone = plan.reach[image, :reach]
        # 2: stays as it is, 1: a seed, 0: is taken in. A stable sort keeps each sort in its order.
        order = everyone[(mark + in_core)[everyone].argsort(stable=True)]
        taken, seeds = order[: reach - kept], order[reach - kept : reach - core]
        before = hidden[row].float()
        nearest = (normalize(before[taken], dim=-1) @ normalize(before[seeds], dim=-1).T).argmax(1)
        total = before[seeds].index_add(0, nearest, before[taken])
        count = torch.ones(len(seeds), device=hidden.device).index_add(0, nearest, torch.ones(1).to(hidden.device).expand(len(taken)))  # fmt: skip
        hidden[row, seeds] = (total / count.unsqueeze(1)).to(hidden.dtype)
    return hidden
