"""Maps between the three coordinates of a token: input (the caller's), pooled (after pooling), layer (after the cuts).

    input    0 1 2 3 4 5 6 7 8     what the caller counts: position ids, attention mask, outputs
    pooled   0 1   2   3 4 5       what the language model gets: one entry per cell
    layer    0     1     2 3       what a decoder layer behind a cut holds, also in its key-value cache

A :class:`TokenMap` goes back along one arrow: for every entry on the lower line, its place on the line above. Entries are
packed to the right end ("left-padded", :func:`crop.ops.pack`), so the real tokens of a sample are contiguous and causal
order is entry order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of (batch, n) at (batch, m) places; -1 stays -1."""
    return torch.where(index >= 0, table.gather(1, index.clamp(min=0)), -1)


@dataclass(frozen=True)
class TokenMap:
    """Source position of every entry: (batch, num_entries) int64, -1 = filler; later positions follow one to one.

    Args:
        index: source positions, ascending where >= 0.
        num_sources: number of source positions that ``index`` accounts for.
        full: no filler in ``index``, known on the host.
    """

    index: Tensor
    num_sources: int
    full: bool

    @property
    def dropped(self) -> int:
        """Source positions without an entry of their own."""
        return self.num_sources - self.index.shape[1]

    def sources(self, total: int) -> Tensor:
        """Source position of every entry once ``total`` source positions were seen: (batch, total - dropped)."""
        if total == self.num_sources:
            return self.index
        new = torch.arange(self.num_sources, total, device=self.index.device)
        return torch.cat([self.index, new.expand(self.index.shape[0], -1)], dim=1)

    @staticmethod
    def extended(old: TokenMap | None, past: int, kept_index: Tensor, added: int, full: bool) -> TokenMap:
        """Append a pruned call: ``kept_index`` (batch, n) into its ``added`` source positions, -1 = filler."""
        if past == 0:
            return TokenMap(kept_index, added, full)
        shifted = torch.where(kept_index >= 0, kept_index + past, -1)
        old = old or TokenMap(shifted[:, :0], 0, True)
        merged = torch.cat([old.sources(past), shifted], dim=1)
        return TokenMap(merged, past + added, old.full and full)

    def after(self, first: TokenMap | None) -> TokenMap:
        """This map behind another one: from entries straight to the source of ``first``."""
        if first is None:
            return self
        source = first.sources(self.num_sources + first.dropped)
        index = torch.where(self.index >= 0, source.gather(1, self.index.clamp(min=0)), -1)
        return TokenMap(index, source.shape[1] + first.dropped, self.full)
