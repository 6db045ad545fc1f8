"""What is done to one image, and how that travels from the process that plans to those that run the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import crop
from crop import ops
from crop.geometry.layout import PATCH, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.methods.base import POOL_MODES

FORMAT = 1  # of ``PlaceholderPlan.pack``; another one at every change
FIELD = "crop_plan"  # its name among the model's arguments
STAMP = f"{crop.__version__}, format {FORMAT}"  # what planner and workers must have in common
_PICTURE = 8  # int32 words of a picture's digest
_HEAD = 8 + _PICTURE  # int32 words before the arrays


def digest(name: str) -> tuple[int, ...]:
    """vLLM's name of a picture as 8 int32."""
    words = hashlib.blake2b(name.encode(), digest_size=4 * _PICTURE).digest()
    return tuple(torch.frombuffer(bytearray(words), dtype=torch.int32).tolist())


@dataclass(frozen=True, eq=False)
class PlaceholderPlan:
    """One image of a prompt.

    Args:
        pool: cells over the rows that the encoder gives for the image.
        patches: (n,) int64, which of these rows are patches: they have a say in "distinct" pooling.
        mode: how a cell is pooled, see ``PreLLMCompression``.
        full: length of its placeholder without pruning, markers between tiles or rows included.
        places: (m,) int64 places of the placeholder that stay, ascending.
        picture: digest of the picture, whatever is done to it; zeros: not known.
    """

    pool: PoolPlan
    patches: Tensor
    mode: str
    full: int
    places: Tensor
    picture: tuple[int, ...] = (0,) * _PICTURE

    @staticmethod
    def whole(is_embed: Tensor, picture: tuple[int, ...] = (0,) * _PICTURE) -> PlaceholderPlan:
        """Nothing is pruned.

        Args:
            is_embed: (full,) bool, places of the placeholder that take a row of the encoder's.
        """
        count, full = int(is_embed.sum()), len(is_embed)
        return PlaceholderPlan(
            PoolPlan.identity(count), torch.arange(count), POOL_MODES[0], full, torch.arange(full), picture
        )

    @staticmethod
    def of(
        plan: PoolPlan, layout: VisionLayout, mode: str, is_embed: Tensor, picture: tuple[int, ...] = (0,) * _PICTURE
    ) -> PlaceholderPlan:
        """From a plan over a layout, some of whose tokens may be text to the model (breaks between rows).

        Args:
            layout: positions are places of the placeholder.
        """
        leader = plan.leader.long()
        stays = torch.ones(len(is_embed), dtype=torch.bool)
        stays[layout.position] = False
        stays[layout.position[leader]] = True
        row = torch.where(is_embed, is_embed.cumsum(0) - 1, -1)[layout.position]
        pooled = row[leader] >= 0  # a cell of breaks is its leader: all of them are the same token
        members = row[plan.members.long()[pooled.repeat_interleave(plan.counts)]]
        offsets = torch.nn.functional.pad(plan.counts[pooled].cumsum(0), (1, 0))
        cells = PoolPlan(
            members.int(), offsets.int(), row[leader[pooled]].int(), plan.level[pooled], int(is_embed.sum())
        )
        patches = row[(row >= 0) & (layout.kind == PATCH)]
        return PlaceholderPlan(cells, patches, mode, len(is_embed), torch.nonzero(stays).flatten(), picture)

    @property
    def prunes(self) -> bool:
        """Whether anything is pooled or dropped."""
        return len(self.places) < self.full

    def pack(self) -> Tensor:
        """(n,) int32."""
        pool = self.pool
        parts = pool.members, pool.offsets, pool.leader, self.patches, self.places
        sizes = len(pool.members), pool.num_out, len(self.patches), len(self.places)
        head = FORMAT, pool.num_tokens, POOL_MODES.index(self.mode), self.full, *sizes, *self.picture
        return torch.cat([part.to(torch.int32) for part in (torch.tensor(head), *parts)])

    @staticmethod
    def unpack(flat: Tensor, device: torch.device | None = None) -> PlaceholderPlan:
        """What ``pack`` made, of a CPU tensor; its arrays on ``device``, by one copy.

        Raises:
            RuntimeError: another format.
        """
        version, tokens, mode, full, members, cells, patches, places, *picture = flat[:_HEAD].tolist()
        if version != FORMAT:
            raise RuntimeError(f"crop: plans must be of format {FORMAT}, got {version}; install one version everywhere")
        arrays = (flat if device is None else flat.to(device, non_blocking=True))[_HEAD:]
        parts = arrays.split([members, cells + 1, cells, patches, places])
        level = torch.zeros(cells, dtype=torch.uint8, device=arrays.device)
        pool = PoolPlan(*parts[:3], level, tokens, check=False)
        return PlaceholderPlan(pool, parts[3].long(), POOL_MODES[mode], full, parts[4].long(), tuple(picture))

    def apply(self, features: Tensor, width: int) -> Tensor:
        """Pool an image's features as ``crop.patch`` does.

        Args:
            features: (num_tokens, columns) as the encoder gave them. width: columns that the decoder's input has, which
                tell what stands out; what follows (further levels of features) is pooled along.
        """
        if not self.prunes:
            return features
        mode, weight = self.mode, None
        if mode == "distinct":
            # A token in no cell has inverse -1: its weight is not used.
            alone = self.pool.counts[self.pool.inverse.long()] == 1
            mode, weight = "weighted", ops.saliency(features[:, :width], self.patches[None], alone=alone)
        return ops.adaptive_pool(features, self.pool, mode, weight)


def check_stamp(config: Any) -> None:
    """Refuse to run, in a worker, what another version planned in front: RuntimeError."""
    got = getattr(config, "crop_stamp", None)
    if got != STAMP:
        raise RuntimeError(
            f"crop: all processes must have the same version of crop-vlm, got {got or 'none'} in front and {STAMP} in a "
            "worker; install one version on every machine"
        )
