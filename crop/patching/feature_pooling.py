"""Pooling that needs features: the count is known on the host, the members on the device.

The batch is planned with a stand-in of the promised number of tokens per image, so that shapes, masks and the cache are
settled without looking at the device; ``settle`` writes the decisions in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from crop.methods.base import Assignment, Features
from crop.patching.batch_plan import BatchPlan, PruneStep
from crop.patching.pool_step import pool_step


def settle(plan: BatchPlan, embeds: Tensor, observed: list[Tensor] | None) -> tuple[BatchPlan, dict[int, Assignment]]:
    """Let features decide, and put the decisions in the place of their stand-ins; nothing is read back.

    Args:
        plan: on the device of ``embeds``.
        embeds: (batch, seq_len, dim) input of the language model.
        observed: per image, what the method observes in the vision tower; None: nothing.
    Returns:
        The plan as decided; the decision for each image, by number.
    Raises:
        TypeError: a method returned something else than an Assignment.
    """
    pool, (batch, seq_len), device = plan.pool, embeds.shape[:2], embeds.device
    # Flat position of the token that leads each token's cell.
    leader = (
        pool.kept_index.gather(1, pool.slot_of.clamp(min=0)) + seq_len * torch.arange(batch, device=device)[:, None]
    )
    leader_of = torch.where(pool.slot_of >= 0, leader, -1).flatten()
    decisions: dict[int, Assignment] = {}
    place: dict[int, Tensor] = {}
    for number, image in enumerate(plan.images):
        if image.by_features is None:
            continue
        where = place[number] = image.layout.position.to(device, non_blocking=True) + image.sample * seq_len
        tokens, text = embeds.flatten(0, 1)[where], embeds[image.sample, plan.text[image.sample]]
        found = image.by_features.decide(Features(tokens, text, None if observed is None else observed[number]))
        got, count = (
            len(found.leader) if isinstance(found, Assignment) else type(found).__name__,
            image.by_features.num_out,
        )
        if got != count:
            raise TypeError(
                f"patch: decide() of a FeaturePooling must return an Assignment of {count} cells, got {got}"
            )
        leader_of[where] = torch.where(found.cell >= 0, where[found.leader][found.cell.clamp(min=0)], -1)
        decisions[number] = found
    # The same number of cells as planned, elsewhere.
    pool = pool_step(leader_of.view(batch, seq_len), pool.kept_index.shape[1], pool.full)
    leaders = [
        place[number][decisions[number].leader]
        if number in decisions
        else image.leaders.to(device) + image.sample * seq_len
        for number, image in enumerate(plan.images)
    ]
    positions = [pool.slot_of.flatten()[one] for one in leaders]
    prunes = {layer: _settled(step, pool.real, positions, decisions) for layer, step in plan.prunes.items()}
    return replace(plan, pool=pool, positions=positions, prunes=prunes), decisions


def _settled(step: PruneStep, real: Tensor, positions: list[Tensor], decisions: dict[int, Assignment]) -> PruneStep:
    """A cut, for the tokens that are left."""
    candidates, priority = step.candidates.clone(), step.priority.clone()
    weight = None if step.weight is None else step.weight.clone()
    # One spare column at the end swallows the fillers.
    stays = pad(real, (0, 1))
    for row, (number, sample) in enumerate(zip(step.images, step.owners, strict=True)):
        count = len(positions[number])
        candidates[row, :count] = positions[number]
        if number in decisions:
            of_token, factor = step.by_features[row]
            priority[row, :count] = of_token[decisions[number].leader]
            if factor is not None:
                weight[row, :count] = factor[decisions[number].leader]
        stays[sample, positions[number]] = False
    return replace(step, stays=stays[:, :-1], candidates=candidates, priority=priority, weight=weight)
