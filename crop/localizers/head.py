"""A light trained head on the image features that the model computes anyway."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crop.geometry.layout import PATCH, VisionLayout
from crop.geometry.region import Region
from crop.localizers.base import blank
from crop.localizers.boxes import Raster, box_settings, check_ranges
from crop.localizers.pretrained import damage
from crop.localizers.reading import Embeddings, embeddings
from crop.methods.base import Method
from crop.models import family_of

if TYPE_CHECKING:
    from PIL.Image import Image

OCTAVES = 5  # of the sine waves that tell a token's place
NUM_CLUES = 3  # what the confidence is made of, see ``clues``
REACH = (3, 7)  # rows and columns of neighbours that a token knows: letters stand beside each other
NEVER = -1e4  # logit and score of what is not there


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the tokens of B images stand, in V views of H rows and W columns.

    Args:
        token: (B, V * H * W) int64 index of the token at each place, 0 where there is none.
        there: (B, V, H, W) bool, whether there is one; None: at all places, in reading order.
        place: (B, N) int64 place of each token; 0 for those that show no part of the picture. real: (B, N) bool, all others.
        waves: (B, N, 4 * OCTAVES) float32, see ``waves``. shape: V, H, W.
    """

    token: Tensor
    there: Tensor | None
    place: Tensor
    real: Tensor
    waves: Tensor
    shape: tuple[int, int, int]

    @staticmethod
    def of(layouts: Sequence[VisionLayout], device: torch.device | str = "cpu") -> Grid:
        """The grid that holds the tokens of all layouts, padded to the largest."""
        found = [_places(layout) for layout in layouts]
        shape = tuple(int(side) for side in np.max([at.max(1) + 1 for at, _ in found], 0))
        longest, size = max(map(len, layouts)), int(np.prod(shape))
        token, there = np.zeros((len(layouts), size), np.int64), np.zeros((len(layouts), size), bool)
        place, real = np.zeros((len(layouts), longest), np.int64), np.zeros((len(layouts), longest), bool)
        told = torch.zeros(len(layouts), longest, 4 * OCTAVES)
        for row, (layout, (at, patch)) in enumerate(zip(layouts, found, strict=True)):
            flat = np.ravel_multi_index(tuple(at), shape)
            place[row, : len(flat)], real[row, : len(flat)] = flat * patch, patch
            token[row, flat[patch]], there[row, flat[patch]] = patch.nonzero()[0], True
            told[row, : len(flat)] = waves(layout.center)
        full = there.all() and (token == np.arange(size)).all() and longest == size
        arrays = (torch.from_numpy(array).to(device) for array in (token, there.reshape(-1, *shape), place, real))
        token, there, place, real = arrays
        return Grid(token, None if full else there, place, real, told.to(device), shape)

    def repeat(self, count: int) -> Grid:
        """Each image ``count`` times, one after the other."""
        arrays = (self.token, self.there, self.place, self.real, self.waves)
        repeated = (None if array is None else array.repeat_interleave(count, 0) for array in arrays)
        return Grid(*repeated, self.shape)


def _places(layout: VisionLayout) -> tuple[np.ndarray, np.ndarray]:
    """(3, N) view, row and column of each token, counted from the first of its view; (N,) whether it shows a part."""
    view, row, col = (axis.numpy().astype(np.int64) for axis in (layout.view, layout.row, layout.col))
    patch = layout.kind.numpy() == PATCH
    for number in np.unique(view):
        here = (view == number) & patch
        if here.any():
            row[view == number] -= row[here].min()
            col[view == number] -= col[here].min()
    return np.stack([view, row, col]) * patch, patch


class Asked(NamedTuple):
    """What the head knows of M questions.

    Args:
        words: (M, T, width). real: (M, T) bool words that are there, None: all.
        film: (M, 2 * width) scale and shift. local: (M,) logit of "a part of the image is enough".
    """

    words: Tensor
    real: Tensor | None
    film: Tensor
    local: Tensor


class Near(nn.Module):
    """Tokens see their neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.near = nn.Conv2d(width, width, REACH, padding=(REACH[0] // 2, REACH[1] // 2), groups=width)

    def forward(self, seen: Tensor, there: Tensor | None) -> Tensor:
        """(B, V, H, W, width), (B, V, H, W) -> (B, V, H, W, width)."""
        views = self.norm(seen) if there is None else self.norm(seen) * there.unsqueeze(-1)
        around = self.near(views.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return seen + self.mix(F.gelu(around)).view_as(seen)


class Block(nn.Module):
    """Tokens read the question, then each its row and its column: "the price of X" stands in the row of X."""

    heads = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.ask, self.words, self.told = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.zeros(2 * width))  # key and value of no word at all
        self.look, self.found = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, seen: Tensor, there: Tensor | None, asked: Asked) -> Tensor:
        """(M, V, H, W, width), (M, V, H, W) and M questions -> (M, V, H, W, width)."""
        seen = seen + self.told(self._read(self.norms[0](seen), asked))
        seen = seen + self.found(self._lines(self.norms[1](seen), there))
        return seen + self.inner(self.norms[2](seen))

    def _read(self, seen: Tensor, asked: Asked) -> Tensor:
        """What each token finds in the words: (M, V, H, W, width), and so is the result."""
        count, width = len(seen), seen.shape[-1]
        pairs = torch.cat([self.nothing.expand(count, 1, -1), self.words(asked.words)], 1)
        query, (key, value) = self.ask(seen).view(count, -1, width), pairs.chunk(2, -1)
        query, key, value = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in (query, key, value))
        mask = None if asked.real is None else F.pad(asked.real, (1, 0), value=True)[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape_as(seen)

    def _lines(self, seen: Tensor, there: Tensor | None) -> Tensor:
        """What each token finds in its row and in its column, half of the width each; shapes as in ``_read``."""
        parts = self.look(seen).unflatten(-1, (3, 2, self.heads // 2, -1))  # (M, V, H, W, 3, 2, heads / 2, d)
        found = []
        for axis, half in ((3, 0), (2, 1)):  # along the columns of a row, along the rows of a column
            lines = parts[..., half, :, :].movedim(axis, 3).flatten(0, 2)  # (lines, length, 3, heads / 2, d)
            mask = None
            if there is not None:
                held = there.movedim(axis, 3).flatten(0, 2)[:, None, None]
                mask = torch.where(held, 0.0, NEVER).to(seen.dtype)
            query, key, value = lines.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
            across = [side for place, side in enumerate(seen.shape[:4]) if place != axis]
            found.append(out.view(*across, -1, out.shape[-1]).movedim(3, axis))
        return torch.cat(found, -1)


class Head(nn.Module):
    """Which vision tokens does the question need?

    Projected image features see their neighbours; then they read the words of the question and look along their rows and
    columns, twice. A convolution over neighbours tells the words their order. What all words say together, averaged by
    ``probes`` learned attentions, scales and shifts the features, and says whether any part of the image is enough.

    Args:
        dim: width of the language model's embeddings.
        width: width inside the head, a multiple of 4.
        probes: attentions over the question.
    Raises:
        ValueError: another width.
    Source: own choice; conditioning by scale and shift as in FiLM (arXiv 1709.07871), rows and columns as in axial attention
        (arXiv 1912.12180).
    """

    def __init__(self, dim: int, width: int = 64, probes: int = 4) -> None:
        super().__init__()
        if width % Block.heads:
            raise ValueError(f"Head: width must be a multiple of {Block.heads}, got {width}")
        self.dim, self.width, self.probes = dim, width, probes
        self.vision_norm, self.text_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.vision, self.text = nn.Linear(dim, width), nn.Linear(dim, width)
        self.place = nn.Linear(4 * OCTAVES, width, bias=False)
        self.near = nn.ModuleList(Near(width) for _ in range(2))
        self.order = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(2))
        self.probe = nn.Linear(width, probes)
        self.film = nn.Linear(probes * width, 2 * width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.token = nn.LayerNorm(width), nn.Linear(width, 1)
        self.local = nn.Sequential(nn.Linear(probes * width, width), nn.GELU(), nn.Linear(width, 1))
        # Bias and weights of the clues in the logit of the confidence; fitted after training.
        self.register_buffer("calibration", torch.tensor([0.0, 1.0, 0.0, 0.0]))

    def see(self, vision: Tensor, grid: Grid) -> Tensor:
        """The part that knows no question: (B, N, dim) features -> (B, V, H, W, width)."""
        seen = self.vision(self.vision_norm(vision)) + self.place(grid.waves.to(vision.dtype))
        if grid.there is not None:
            seen = seen.gather(1, grid.token.unsqueeze(-1).expand(-1, -1, self.width))
        seen = seen.view(len(vision), *grid.shape, self.width)
        for near in self.near:
            seen = near(seen, grid.there)
        return seen

    def read(self, text: Tensor, length: Tensor | None = None) -> Asked:
        """The part that knows no image.

        Args:
            text: (M, T, dim) token embeddings of the questions.
            length: (M,) int64 real tokens, the first ones; None: all.
        """
        words = self.text(self.text_norm(text))
        real = None if length is None else torch.arange(text.shape[1], device=text.device) < length.unsqueeze(1)
        for order in self.order:
            if real is not None:
                words = words.masked_fill(~real.unsqueeze(-1), 0)  # what the convolution sees beyond the end
            words = words + F.gelu(order(F.pad(words, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2)))
        weight = self.probe(words)
        if real is not None:
            weight = weight.masked_fill(~real.unsqueeze(-1), -math.inf)
        asked = (weight.softmax(1).mT @ words).flatten(1)
        return Asked(words, real, self.film(asked), self.local(asked).squeeze(-1))

    def match(self, seen: Tensor, grid: Grid, asked: Asked) -> Tensor:
        """(M, N) logits of each question about its image, from ``see`` and ``read``."""
        scale, shift = asked.film[:, None, None, None].chunk(2, -1)
        seen = torch.addcmul(shift, seen, 1 + scale)
        for block in self.blocks:
            seen = block(seen, grid.there, asked)
        logits = self.token(self.norm(seen)).flatten(1)
        return logits if grid.there is None else logits.gather(1, grid.place).masked_fill(~grid.real, NEVER)

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
    grid, asked = Grid.of([layout], vision.device), head.read(text.float().unsqueeze(0))
    return head.match(head.see(vision.float().unsqueeze(0), grid), grid, asked)[0].cpu(), float(asked.local)


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
