"""TRIO-like saliency: the gradient of what a layer would answer by itself says which vision tokens matter."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from crop.methods import InnerLLMPruning
from crop.methods.base import ScoreView
from crop.models import family_of

CACHE = ("cache", "past_key_values", "use_cache")  # a second run must not write there


class Probe:
    """A copy of one decoder layer, and what the layer itself last got: enough to ask how its answer depends on its input.

    Args:
        model: that no patch holds. layer: of its decoder.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        language = family_of(model).language_model(model)
        self.layer = copy.deepcopy(language.layers[layer]).requires_grad_(False)
        self.norm, self.head = language.norm, model.get_output_embeddings()
        self.seen: dict[str, Any] = {}
        language.layers[layer].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("hidden_states", args[0] if args else None).shape[1] > 1:  # decoding has nothing to prune
            kept = {name: value for name, value in kwargs.items() if name not in CACHE}
            self.seen = {"args": args, "kwargs": kept}

    @torch.enable_grad()
    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, entries, dim) input of the layer, and the gradient of the loss: each row's own likeliest token.

        Args:
            rows: (batch, M) int64 entries whose answers count, -1 = filler.
        """
        hidden = self.seen["args"][0].detach().requires_grad_(True)
        out = self.layer(hidden, *self.seen["args"][1:], **self.seen["kwargs"])
        out = out[0] if isinstance(out, tuple) else out
        sample = torch.arange(len(rows), device=rows.device).unsqueeze(1).expand_as(rows)[rows >= 0]
        logits = self.head(self.norm(out[sample, rows[rows >= 0]])).float()
        (grad,) = torch.autograd.grad(cross_entropy(logits, logits.detach().argmax(1)), hidden)
        return hidden.detach(), grad


@dataclass(frozen=True)
class Trio(InnerLLMPruning):
    """Tokens stay by the gradient of the answer that the layer before the cut would give, without near copies of each other.

    The loss is the cross entropy of the likeliest tokens of the text rows, through final norm and output matrix; a token's
    saliency is the length of its gradient. From the most salient on, one is taken unless it is too like one taken before.

    Args:
        keep, layer: as in ``InnerLLMPruning``. probe: of the layer before ``layer``.
        alike: cosine similarity of hidden states from which a token is suppressed.
    Source: TRIO (arXiv 2602.04657), without an encoder method in front. Departures: the gradient is that of the layer before
        the cut, whose input the score can know, run a second time; one cut.
    """

    ring: int = 0
    probe: Probe | None = field(default=None, compare=False)
    alike: float = 0.8

    def score(self, query: Tensor, key: Tensor, view: ScoreView) -> Tensor:
        """Minus the place in the order in which tokens are taken."""
        rows = view.visible_len - 1 if view.row_key is None else view.row_key
        hidden, grad = self.probe.gradient(torch.where(view.visible_len > 0, rows, -1))
        found = torch.full(view.candidates.shape, -torch.inf)
        for image, (sample, own) in enumerate(zip(view.sample.tolist(), view.candidates.cpu(), strict=True)):
            own = own[own >= 0]
            order = grad[sample, own].float().norm(dim=-1).argsort(descending=True)
            states = normalize(hidden[sample, own].float(), dim=-1)
            near, open_, taken = states @ states.T >= self.alike, torch.ones(len(own), dtype=torch.bool), []
            for token in order.tolist():
                if open_[token]:
                    taken.append(token)
                    open_ &= ~near[token]
            rest = [token for token in order.tolist() if token not in set(taken)]
            found[image, torch.tensor([*taken, *rest])] = -torch.arange(len(own), dtype=torch.float32)
        return found.to(query.device)
