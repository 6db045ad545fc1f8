"""A light trained head on the image features that the model computes anyway."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.localizers.base import blank
from crop.localizers.boxes import Raster, box_settings, check_ranges
from crop.localizers.pretrained import damage
from crop.localizers.reading import Embeddings, embeddings
from crop.methods.base import Method
from crop.models import family_of

if TYPE_CHECKING:
    from PIL.Image import Image

OCTAVES = 3  # of the sine waves that tell a token's place
NUM_CLUES = 3  # what the confidence is made of, see ``clues``


class Head(nn.Module):
    """Which vision tokens does the question need?

    The question's token embeddings pass a convolution over neighbours (word order) and are averaged by ``probes``
    learned attentions into one vector, which scales and shifts the projected image features; two small layers make a
    logit of each. A second output says whether any part of the image is enough.

    Args:
        dim: width of the language model's embeddings.
        width: width inside the head.
        probes: attentions over the question.
    Source: own choice; conditioning by scale and shift as in FiLM (arXiv 1709.07871).
    """

    def __init__(self, dim: int, width: int = 48, probes: int = 4) -> None:
        super().__init__()
        self.dim, self.width, self.probes = dim, width, probes
        self.vision_norm, self.text_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.vision, self.text = nn.Linear(dim, width), nn.Linear(dim, width)
        self.place = nn.Linear(4 * OCTAVES, width, bias=False)
        self.order = nn.Conv1d(width, width, 3, padding=1)
        self.probe = nn.Linear(width, probes)
        self.film = nn.Linear(probes * width, 2 * width)
        self.hidden, self.token = nn.Linear(width, width), nn.Linear(width, 1)
        self.local = nn.Sequential(nn.Linear(probes * width, width), nn.GELU(), nn.Linear(width, 1))
        # Bias and weights of the clues in the logit of the confidence; fitted after training.
        self.register_buffer("calibration", torch.tensor([0.0, 1.0, 0.0, 0.0]))

    def see(self, vision: Tensor, place: Tensor) -> Tensor:
        """The part that knows no question: (..., N, dim) features, (N, 4 * OCTAVES) ``waves`` -> (..., N, width)."""
        return self.vision(self.vision_norm(vision)) + self.place(place.to(vision.dtype))

    def read(self, text: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The part that knows no image.

        Args:
            text: (B, T, dim) token embeddings of the question.
            length: (B,) int64 real tokens, the first ones; None: all.
        Returns:
            (B, 2 * width) scale and shift, (B,) logit of "a part of the image is enough".
        """
        words = self.text(self.text_norm(text))
        real = None if length is None else torch.arange(text.shape[1], device=text.device) < length.unsqueeze(1)
        if real is not None:
            words = words.masked_fill(~real.unsqueeze(-1), 0)  # what the convolution sees beyond the end
        words = words + F.gelu(self._neighbours(words))
        weight = self.probe(words)
        if real is not None:
            weight = weight.masked_fill(~real.unsqueeze(-1), -math.inf)
        asked = (weight.softmax(1).mT @ words).flatten(1)
        return self.film(asked), self.local(asked).squeeze(-1)

    def _neighbours(self, words: Tensor) -> Tensor:
        """``order`` as one matrix product: a convolution this small takes longer to set up than to run."""
        around = F.pad(words, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2)  # (B, T, width * 3)
        return F.linear(around, self.order.weight.flatten(1), self.order.bias)

    def match(self, seen: Tensor, film: Tensor) -> Tensor:
        """Logits (B, Q, N) of Q questions about each image, from ``see`` (B, N, width), ``read`` (B, Q, 2 * width)."""
        scale, shift = film.unsqueeze(2).chunk(2, -1)
        mixed = F.relu(torch.addcmul(shift, seen.unsqueeze(1), 1 + scale))
        return self.token(F.relu(self.hidden(mixed))).squeeze(-1)

    def save(self, path: str | Path) -> None:
        """Write weights and sizes as one safetensors file, weights in bfloat16 but for the calibration."""
        from safetensors.torch import save_file

        sizes = {"dim": self.dim, "width": self.width, "probes": self.probes}
        state = {k: v if k == "calibration" else v.bfloat16() for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, path, {"crop_head": json.dumps(sizes)})

    @staticmethod
    def load(path: str | Path) -> Head:
        """A head from a file that ``save`` wrote; float32, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such file. ValueError: a file of another kind.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"Head.load: path must be an existing file, got {str(path)!r}")
        try:
            with safe_open(path, "pt") as file:
                sizes = (file.metadata() or {}).get("crop_head")
                state = {name: file.get_tensor(name).float() for name in file.keys()}
        except SafetensorError as error:
            cause = damage(path) or f"{path}: {error}"
            raise ValueError(f"Head.load: path must be a safetensors file, but {cause}") from error
        if sizes is None:
            raise ValueError(f"Head.load: path must be a file that Head.save wrote, got {str(path)!r}")
        try:
            head = Head(**json.loads(sizes))
            head.load_state_dict(state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Head.load: {path} must hold a head of this version, got other sizes or weights; train it anew"
            ) from error
        return head.eval()


@dataclass(frozen=True)
class HeadLocalizer:
    """A small head trained on (question, box) records ("head"): no second model, no second vision pass.

    The model runs up to the entrance of its decoder; with ``cache_vision`` the answer reuses that vision pass.

    Args:
        model: vision-language model of a supported family. processor: its processor.
        head: trained for this model, e.g. by ``bench.training.head``; float32, moved to the model's device by the
            caller.
        prompt: as in ``encode``; the one the head was trained with.
        threshold: probability from which a token belongs to the region, in (0, 1).
        gap, max_boxes, dilate, min_confidence: as ``find_region``.
    Raises:
        ValueError, TypeError: an argument out of its range; a head of another width than the model; a family without
            an adapter.
    Source: own choice.
    """

    model: nn.Module
    processor: Any
    head: Head
    prompt: Callable[[str], str] | None = None
    threshold: float = 0.2
    gap: int = 0
    max_boxes: int = 8
    dilate: int = 0
    min_confidence: float = 0.5

    def __post_init__(self) -> None:
        op = "HeadLocalizer"
        dim = family_of(self.model).language_model(self.model).config.hidden_size
        if self.head.dim != dim:
            raise ValueError(f"{op}: head must be made for embeddings of width {dim}, got one for {self.head.dim}")
        check_ranges(op, self)

    def __call__(self, image: Image, question: str) -> Region:
        return self.region(embeddings(self.model, self.processor, image, question, self.prompt))

    def glance(self, size: tuple[int, int]) -> tuple[Any, tuple[int, int], Method, int]:
        """As of ``AttentionLocalizer``: the encoder alone."""
        return blank(self.processor, size, self.prompt), size, Method(), 0

    def region(self, read: Embeddings) -> Region:
        """The head's own part: from what enters the decoder to the region."""
        logits, local = judge(self.head, read.layout, read.vision, read.text)
        return head_region(read.layout, logits, local, self.head.calibration, **box_settings(self))


def waves(center: Tensor) -> Tensor:
    """What tells the head a place: (N, 2) float32 x, y in sides of the image -> (N, 4 * OCTAVES) sines and cosines."""
    angle = center.unsqueeze(-1) * (math.pi * 2.0 ** torch.arange(OCTAVES, device=center.device))
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


@torch.inference_mode()
def judge(head: Head, layout: VisionLayout, vision: Tensor, text: Tensor) -> tuple[Tensor, float]:
    """(N,) float32 logits of the tokens of one image, on the CPU; logit of "a part of the image is enough".

    Args:
        head: float32, on the device of ``vision``. layout, vision, text: as in ``Embeddings``.
    """
    seen = head.see(vision.float(), waves(layout.center.to(vision.device)))
    film, local = head.read(text.float().unsqueeze(0))
    return head.match(seen.unsqueeze(0), film.unsqueeze(1))[0, 0].cpu(), float(local)


def clues(raster: Raster, inside: np.ndarray, local: float) -> list[float]:
    """What tells whether boxes hold all that the question needs.

    Args:
        raster: probabilities. inside: places in the boxes. local: logit of "a part of the image is enough".
    Returns:
        NUM_CLUES logits: ``local``; the mean probability at the peaks (the upper half of the places in the boxes); the
        share of all probability that is inside.
    """
    held = np.sort(raster.values[inside])
    peaks = held[-max(1, len(held) // 2) :].mean() if len(held) else 0.0
    share = held.sum() / max(raster.values.sum(), 1e-6)
    sure = (min(max(clue, 1e-4), 1 - 1e-4) for clue in (float(peaks), float(share)))
    return [local, *(math.log(clue / (1 - clue)) for clue in sure)]


def head_region(
    layout: VisionLayout,
    logits: Tensor,
    local: float,
    calibration: Tensor,
    *,
    threshold: float,
    min_confidence: float,
    **shape: int,
) -> Region:
    """Boxes around the tokens that are probable enough.

    Args:
        layout: N tokens. logits: (N,) float32. local: see ``Head.read``.
        calibration: (1 + NUM_CLUES,) bias and weights of the ``clues``.
        threshold, min_confidence: see ``HeadLocalizer``. shape: gap, max_boxes, dilate as there.
    Returns:
        Region; its confidence is the calibrated probability that the boxes hold all that the question needs. The whole
        image where that is below ``min_confidence``.
    """
    raster = Raster.of(layout, logits.sigmoid())
    boxes = raster.boxes(raster.values >= threshold, **shape)
    if not boxes:
        return Region.whole(0.0, "no token is probable enough")
    bias, *weights = calibration.tolist()
    logit = bias + sum(map(operator.mul, weights, clues(raster, raster.inside(boxes), local)))
    confidence = 0.5 + 0.5 * math.tanh(0.5 * logit)  # the sigmoid, which cannot overflow
    if confidence < min_confidence:
        return Region.whole(confidence, f"the head is unsure: {confidence:.2f} < {min_confidence}")
    return raster.region(boxes, confidence)
