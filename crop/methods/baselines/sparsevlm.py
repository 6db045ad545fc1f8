"""SparseVLM: text rows that look at the image judge; some of the tokens that leave are recycled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crop.methods.base import MergeView, ScoreView
from crop.methods.ilp import InnerLLMPruning


@dataclass(frozen=True)
class SparseVLM(InnerLLMPruning):
    """Tokens stay by the attention of the text rows that look at the image most; some of the others are recycled.

    Of the tokens that leave, the best ``recycled`` are merged into the most similar of the ``seeds``, the last of those
    that stay.

    Args:
        keep, layer: as in ``InnerLLMPruning``. seeds: share of the kept tokens that take others in, in [0, 1).
        recycled: share of the others that they take in, in [0, 1].
    Source: SparseVLM (arXiv 2410.04417). Departures: one cut of a given size, not sizes by the rank of the attention;
        raters are the rows whose attention to the image is at least average in the scoring layer, not by similarity of
        embeddings; recycled tokens join the nearest seed, not a cluster found by density peaks.
    """

    ring: int = 0
    seeds: float = 0.1
    recycled: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.seeds < 1 and 0 <= self.recycled <= 1):
            raise ValueError(
                f"SparseVLM: seeds must be in [0, 1) and recycled in [0, 1], got {self.seeds} and {self.recycled}"
            )

    def score(self, query: Tensor, key: Tensor, view: ScoreView) -> Tensor:
        """Attention mass from the raters alone."""
        judges = raters(query, key, view)
        return super().score(query, key, replace(view, visible_len=torch.where(judges, view.visible_len, 0)))

    def merge(self, hidden: Tensor, view: MergeView) -> Tensor:
        """Recycled tokens enter their nearest seed as a plain mean in float32."""
        seeds = [min(round(self.seeds * kept), kept - 1) for kept in view.num_keep]
        taken = [
            round(self.recycled * (candidates - kept)) if some else 0
            for kept, candidates, some in zip(view.num_keep, view.num_candidates, seeds, strict=True)
        ]
        if not any(taken):
            return hidden
        core = [kept - some for kept, some in zip(view.num_keep, seeds, strict=True)]
        reach = [kept + more for kept, more in zip(view.num_keep, taken, strict=True)]
        places = view.best(list(view.num_keep)), view.best(core), view.best(reach)
        hidden = hidden.clone()
        for image, row in enumerate(view.sample):
            if taken[image]:
                counts = view.num_keep[image], core[image], reach[image]
                own = (place[image, :count] for place, count in zip(places, counts, strict=True))
                _recycle(hidden[row], *own)
        return hidden


def raters(query: Tensor, key: Tensor, view: ScoreView) -> Tensor:
    """Rows that look at the image at least as much as the rows of their sample do on average.

    Args:
        query: (batch, num_heads, M, d) text rows. key: (batch, num_kv_heads, T, d).
        view: as for ``Method.score``; a row that sees nothing is padding.
    Returns:
        (batch, M) bool.
    """
    batch, heads, _, dim = query.shape
    start, stop = view.visible_start, view.visible_len
    key = key.repeat_interleave(heads // key.shape[1], 1).float()
    logits = query.float() @ key.transpose(2, 3) * (dim**-0.5 if view.scale is None else view.scale)
    place = torch.arange(key.shape[2], device=key.device)
    seen = place < stop.unsqueeze(2)
    if start is not None:
        seen = seen & (place >= start.view(-1, 1, 1))
    # One spare column at the end swallows the fillers.
    vision = torch.zeros(batch, key.shape[2] + 1, dtype=torch.bool, device=key.device)
    vision[view.sample.unsqueeze(1), view.candidates] = True
    weights = logits.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num(0.0)
    mass = (weights * vision[:, None, None, :-1]).sum(3).mean(1)
    real = stop > (0 if start is None else start.unsqueeze(1))
    mean = (mass * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    return real & (mass >= mean * (1 - 1e-6))  # rounding must not leave equal rows without a judge


def _recycle(rows: Tensor, kept: Tensor, core: Tensor, reach: Tensor) -> None:
    """Merge tokens that leave into the most similar seed, in place.

    Args:
        rows: (entries, dim) of one sample. kept: places of the tokens that stay. core: of those that stay as they are; the
            others are seeds. reach: of those that stay and those that are merged into seeds. Ascending each.
    """
    mark = torch.zeros(len(rows), dtype=torch.int8, device=rows.device).index_fill(0, kept, 1).index_fill(0, core, 2)
    # 2: stays as it is, 1: a seed, 0: is taken in. A stable sort keeps each sort in its order.
    order = reach[mark[reach].argsort(stable=True)]
    taken, seeds = order[: len(reach) - len(kept)], order[len(reach) - len(kept) : len(reach) - len(core)]
    before = rows.float()
    nearest = (normalize(before[taken], dim=-1) @ normalize(before[seeds], dim=-1).T).argmax(1)
    total = before[seeds].index_add(0, nearest, before[taken])
    ones = torch.ones(len(taken), device=rows.device)
    count = torch.ones(len(seeds), device=rows.device).index_add(0, nearest, ones)
    rows[seeds] = (total / count.unsqueeze(1)).to(rows.dtype)
