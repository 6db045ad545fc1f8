"""Pooling that needs features: the count is known on the host, the members on the device.

The batch is planned with a stand-in of the promised number of tokens per image, so that shapes, masks and the cache are
settled without looking at the device; ``settle`` writes the decisions in.
"""

from __future__ import annotations

from dataclasses import replace

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
    flat, leader_of, leaders = embeds.flatten(0, 1), plan.leader_of.flatten(), list(plan.leaders)
    decisions: dict[int, Assignment] = {}
    for step in plan.features:
        tokens, text = flat[step.places].split([step.num_tokens, len(step.places) - step.num_tokens])
        seen = None if observed is None else observed[step.image]
        found = step.pooling.decide(Features(tokens, text, seen), *step.pooling.given)
        got = len(found.leader) if isinstance(found, Assignment) else type(found).__name__
        if got != step.pooling.num_out:
            raise TypeError(
                f"patch: decide() of a FeaturePooling must return an Assignment of {step.pooling.num_out} cells, got {got}"
            )
        place = step.places[: step.num_tokens]
        decisions[step.image], leaders[step.image] = found, place[found.leader]
        # The entry behind the last leader is that of tokens in no cell, -1.
        leader_of = leader_of.scatter(0, place, pad(leaders[step.image], (0, 1), value=-1)[found.cell])
    # The same number of cells as planned, elsewhere.
    pool = pool_step(leader_of.view(plan.valid.shape), plan.pool.kept_index.shape[1], plan.pool.full)
    positions = [pool.slot_of.flatten()[one] for one in leaders]
    prunes = {layer: _settled(step, pool.real, positions, decisions) for layer, step in plan.prunes.items()}
    return replace(plan, pool=pool, positions=positions, prunes=prunes), decisions


def _settled(step: PruneStep, real: Tensor, positions: list[Tensor], decisions: dict[int, Assignment]) -> PruneStep:
    """A cut, for the tokens that are left."""
    candidates, priority = step.candidates.clone(), step.priority.clone()
    weight = None if step.weight is None else step.weight.clone()
    stays = real.clone()
    for row, (number, sample) in enumerate(zip(step.images, step.owners, strict=True)):
        count = len(positions[number])
        candidates[row, :count] = positions[number]
        if number in decisions:
            of_token, factor = step.by_features[row]
            priority[row, :count] = of_token[decisions[number].leader]
            if factor is not None:
                weight[row, :count] = factor[decisions[number].leader]
        stays[sample].index_fill_(0, positions[number], False)
    return replace(step, stays=stays, candidates=candidates, priority=priority, weight=weight)
