"""The operators in plain torch: specification, oracle of the tests, and fallback where nothing was compiled.

Every function has the name, the arguments and the result of its counterpart in :mod:`crop.ops`. Written for clarity:
whole intermediate matrices are materialised, arithmetic is float32 (float64 stays float64, so the twins can be
differentiated numerically). Letters: B samples, I images, N candidates, M scoring rows, T keys, d head_dim, K tokens
kept, C pooled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crop.ops.reference_pooling import adaptive_pool

__all__ = ["adaptive_pool", "attention_mass", "compact", "pack", "region_topk", "saliency", "select", "spread"]

_INF = float("inf")

SHARPNESS = 4.0  # a standard deviation more weighs exp(4) = 55 times
FARTHEST = 8.0  # standard deviations that still make a difference: float32 holds the weights
FLAT = 1e-3  # spread of cosine distances below which an image has nothing that stands out


def attention_mass(
    query: Tensor,  # (B, num_heads, M, d)
    key: Tensor,  # (B, num_kv_heads, T, d)
    vision_index: Tensor,  # (I, N)
    *,
    sample: Tensor | None = None,  # (I,)
    lse: Tensor | None = None,  # (B, num_heads, M)
    scale: float | None = None,
    visible_start: Tensor | None = None,  # (B,)
    visible_len: Tensor | None = None,  # (B, M)
) -> Tensor:  # (I, N)
    """Share of the softmax attention that each vision token receives from the scoring rows.

    ``mass[i, n] = mean over counted rows r and query heads h of exp(scale * <query[b, h, r], key[b, h // g, j]> -
    lse[b, h, r])`` with ``b = sample[i]``, ``j = vision_index[i, n]`` and ``g = num_heads // num_kv_heads``; 0 where
    row r does not see key j.

    Row r of sample b sees the keys ``visible_start[b] <= j < visible_len[b, r]``; a row that sees none is padding and
    is not counted. Without a counted row the mass is 0. A row whose lse is infinite contributes 0 to every finite
    logit; a NaN or +inf logit makes the mass of its key NaN, and a NaN logit makes a computed lse NaN as well. The
    masses of all keys of a sample sum to 1 (to less where the given lse includes a sink).

    Args:
        query: (B, num_heads, M, d) float32, bfloat16 or float16 scoring rows; unit last stride, any other strides.
        key: (B, num_kv_heads, T, d), dtype of ``query``; all keys the softmax runs over.
        vision_index: (I, N) int32 or int64 key positions of each image's vision tokens; -1 is filler and gets mass 0.
        sample: (I,) int32 or int64 batch row of each image; default ``arange(B)``, which requires I == B.
        lse: (B, num_heads, M) float32 natural log of the softmax denominator from the same inputs; default: computed.
        scale: factor of the logits; default ``d ** -0.5``.
        visible_start: (B,) int32 or int64 first visible key (left padding); default 0.
        visible_len: (B, M) int32 or int64 end of the visible keys; default T.
    Returns:
        (I, N) float32, no gradient. float32 arithmetic; a sample's result does not depend on its batch neighbours.
    Raises:
        ValueError: device, rank, shape, stride or an index out of range. TypeError: unsupported or differing dtype.
    Source: the attention score of Inner-LLM Pruning; mean over heads and rows is our own choice, the paper leaves it
    open.
    """
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    check_index("attention_mass", "vision_index", vision_index, num_keys, lowest=-1)
    if sample is None:
        sample = torch.arange(batch, device=query.device)
    check_index("attention_mass", "sample", sample, batch)
    real = torch.promote_types(query.dtype, torch.float32)
    scale = head_dim**-0.5 if scale is None else scale

    grouped = query.to(real).unflatten(1, (num_kv_heads, num_heads // num_kv_heads))  # (B, Hkv, g, M, d)
    logit = torch.einsum("bkgmd,bktd->bkgmt", grouped, key.to(real)).flatten(1, 2) * scale  # (B, Hq, M, T)

    position = torch.arange(num_keys, device=query.device)
    visible = torch.ones(batch, query.shape[2], num_keys, dtype=torch.bool, device=query.device)
    if visible_start is not None:
        visible &= position >= visible_start[:, None, None]
    if visible_len is not None:
        visible &= position < visible_len[:, :, None]
    counted = visible.any(-1).sum(-1)  # (B,) rows that see at least one key
    visible = visible[:, None]

    logit = logit.masked_fill(~visible, -_INF)
    lse = torch.logsumexp(logit, -1) if lse is None else lse.to(real)
    lse = torch.where(lse.isinf(), _INF, lse)  # exp(finite - inf) = 0
    share = torch.exp(logit - lse[..., None])
    share = share.masked_fill(logit == _INF, float("nan")).masked_fill(~visible, 0)
    column = share.sum((1, 2)) / (counted * num_heads).clamp(min=1)[:, None]  # (B, T)

    padded = torch.cat([column, column.new_zeros(batch, 1)], 1)[sample]  # filler reads the added zero
    slot = torch.where((vision_index < 0) | (vision_index >= num_keys), num_keys, vision_index)
    return padded.gather(1, slot.long()).to(torch.float32 if real == torch.float32 else real)


def select(
    score: Tensor,  # (I, N)
    num_keep: int | Sequence[int],
    *,
    weight: Tensor | None = None,  # (I, N)
    priority: Tensor | None = None,  # (I, N)
    index: Tensor | None = None,  # (I, N)
) -> Tensor:  # (I, K)
    """Exact top-k under a total order, returned in reading order.

    Best first: priority descending, ``score * weight`` descending (-0 equals +0, NaN ranks as -inf), position
    ascending.

    Args:
        score: (I, N) float32.
        num_keep: tokens to keep, one host int for all images or one per image, each in [0, N].
        weight: (I, N) float32 factor of the score, e.g. the region weight; default 1.
        priority: (I, N) int8; a higher one wins whatever the score, a negative one is never selected; default 0.
        index: (I, N) int32 or int64; an entry below 0 is filler and never selected, and the result holds ``index[i,
            n]`` instead of ``n``.
    Returns:
        (I, K) int64 with K = max(num_keep): the selected ``n`` in ascending order, then -1 where an image keeps fewer
        than K.
    Raises:
        ValueError: device, rank, shape or num_keep out of range. TypeError: unsupported dtype.
    Source: own choice; budget rule of Inner-LLM Pruning with a strict region priority.
    """
    num_images, num_tokens = score.shape
    budget = [num_keep] * num_images if isinstance(num_keep, int) else list(num_keep)
    width = max(budget, default=0)
    value = score if weight is None else score * weight
    value = torch.where(value.isnan(), -_INF, value) + 0.0  # -0 + 0 = +0
    rank = torch.zeros_like(score, dtype=torch.int16) if priority is None else priority.to(torch.int16)
    if index is not None:
        rank = torch.where(index < 0, -1, rank)
    rank = rank.clamp(min=-1)

    by_value = value.argsort(dim=1, descending=True, stable=True)
    order = by_value.gather(1, rank.gather(1, by_value).argsort(dim=1, descending=True, stable=True))
    place = torch.arange(num_tokens, device=score.device)
    limit = torch.tensor(budget, dtype=torch.int64, device=score.device)
    limit = torch.minimum(limit, (rank >= 0).sum(1))
    taken = torch.empty_like(order).scatter_(1, order, place.expand_as(order)) < limit[:, None]

    slot = torch.where(taken, place, num_tokens).sort(dim=1).values[:, :width]
    if index is None:
        return torch.where(slot == num_tokens, -1, slot)
    padded = torch.cat([index.long(), index.new_full((num_images, 1), -1, dtype=torch.int64)], 1)
    return padded.gather(1, slot)


def region_topk(
    query: Tensor,  # (B, num_heads, M, d)
    key: Tensor,  # (B, num_kv_heads, T, d)
    vision_index: Tensor,  # (I, N)
    num_keep: int | Sequence[int],
    *,
    weight: Tensor | None = None,  # (I, N)
    priority: Tensor | None = None,  # (I, N)
    return_scores: bool = False,
    **scoring: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # (I, K) [, (I, N)]
    """Sequence positions of the vision tokens to keep: :func:`attention_mass`, then :func:`select`.

    ``kept = select(attention_mass(query, key, vision_index, ...), num_keep, weight=..., priority=...,
    index=vision_index)``

    Args:
        query, key, vision_index: see :func:`attention_mass`. num_keep, weight, priority: see :func:`select`.
        return_scores: also return the mass.
        scoring: sample, lse, scale, visible_start, visible_len of :func:`attention_mass`.
    Returns:
        (I, K) int64 positions, ascending where ``vision_index`` is, -1 tail; with ``return_scores`` also the (I, N)
        mass.
    Raises:
        ValueError, TypeError: as the two halves.
    Source: Inner-LLM Pruning (the cut), with our budget rule.
    """
    mass = attention_mass(query, key, vision_index, **scoring)
    kept = select(mass, num_keep, weight=weight, priority=priority, index=vision_index)
    return (kept, mass) if return_scores else kept


def pack(
    stays: Tensor,  # (B, L)
    width: int,
    *,
    kept: Tensor | None = None,  # (I, K)
    sample: Tensor | None = None,  # (I,)
) -> tuple[Tensor, Tensor]:  # (B, width), (B, L)
    """Where the tokens of every sample go that stay: in order, to the right end of ``width`` entries.

    Token l of sample b stays if ``stays[b, l]``, or if an image i with ``sample[i] == b`` names it in ``kept[i]``.

    Args:
        stays: (B, L) bool. width: entries of a sample, at least as many as stay in any.
        kept: (I, K) int32 or int64 tokens, as by :func:`select`; no token twice, a negative one is filler; default none.
        sample: (I,) int32 or int64 sample of each image; default ``arange(B)``, which requires I == B.
    Returns:
        kept_index (B, width) int64, the token of each entry, -1 = filler; slot_of (B, L) int64, its inverse: the entry of
        each token, -1 = does not stay.
    Raises:
        ValueError: device, rank, shape, a width too small or an index out of range. TypeError: unsupported dtype.
    Source: own choice; right ends keep causal order.
    """
    batch, num_tokens = stays.shape
    if kept is not None:
        check_index("pack", "kept", kept, num_tokens, lowest=None)
        sample = torch.arange(batch, device=stays.device) if sample is None else sample.long()
        check_index("pack", "sample", sample, batch)
        # One spare entry at the end swallows the fillers.
        flags = torch.cat([stays.flatten(), stays.new_zeros(1)])
        there = (kept >= 0) & (kept < num_tokens)
        flags[torch.where(there, kept.long() + sample[:, None] * num_tokens, batch * num_tokens).flatten()] = True
        stays = flags[:-1].view(batch, num_tokens)
    rank = stays.flip(1).cumsum(1).flip(1)  # from the right end
    if stays.device.type == "cpu" and stays.numel() and (most := int(rank[:, 0].max())) > width:
        raise ValueError(f"pack: width must be at least {most}, the tokens of a sample that stay, got {width}")
    slot_of = torch.where(stays & (rank <= width), width - rank, -1)
    place = torch.arange(num_tokens, device=stays.device).expand(batch, -1)
    kept_index = torch.full((batch, width + 1), -1, dtype=torch.int64, device=stays.device)
    kept_index.scatter_(1, torch.where(slot_of >= 0, slot_of, width), place)
    return kept_index[:, :width].contiguous(), slot_of


def compact(
    tensors: Sequence[Tensor],
    index: Tensor,  # (B, K)
    *,
    token_dim: int | Sequence[int] = 1,
) -> list[Tensor]:
    """Gather the kept tokens of several tensors at once.

    ``out[t][b, ..., k, ...] = tensors[t][b, ..., index[b, k], ...]`` with the token axis at ``token_dim``; bitwise
    copies.

    Args:
        tensors: each with batch axis 0 and a token axis; element type of any kind. The axes after the token axis form a
            row and must be contiguous among themselves; the axes between batch and token axis must merge into one.
        index: (B, K) int32 or int64 token numbers, strictly ascending where not negative; a negative one gives a zero
            row.
        token_dim: the token axis, one for all tensors or one per tensor; at least 1.
    Returns:
        Contiguous tensors with the token axis shortened to K. Gradients flow back to the kept rows, dropped rows get 0.
    Raises:
        ValueError: device, rank, shape, stride or index out of range or order. TypeError: index dtype.
    Source: own choice; the physical removal behind Inner-LLM Pruning.
    """
    dims = [token_dim] * len(tensors) if isinstance(token_dim, int) else list(token_dim)
    return [_gather_rows(tensor, index, dim % tensor.dim()) for tensor, dim in zip(tensors, dims, strict=True)]


def _gather_rows(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    num_tokens = tensor.shape[dim]
    check_index("compact", "index", index, num_tokens, lowest=None)
    check_ascending(index)
    shape = list(tensor.shape)
    shape[dim] = index.shape[1]
    if 0 in shape or num_tokens == 0:
        return tensor.new_zeros(shape)
    # Bits move as integers: gather does not know every element type.
    bits = tensor if tensor.requires_grad else tensor.view(_BITS[tensor.element_size()])
    view = [index.shape[0], *[1] * (dim - 1), index.shape[1], *[1] * (tensor.dim() - dim - 1)]
    rows = index.long().clamp(0, num_tokens - 1).view(view).expand(shape)
    return bits.gather(dim, rows).masked_fill((index < 0).view(view), 0).view(tensor.dtype)


def invert_index(index: Tensor, num_tokens: int) -> Tensor:  # (B, K) -> (B, num_tokens)
    """Where each token went: ``inverse[b, index[b, k]] = k`` and -1 for a token that was dropped, int64.

    The gradient of :func:`compact` is :func:`compact` by the inverse; an index that is negative or too large is left out.
    """
    place = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    slot = torch.where((index < 0) | (index >= num_tokens), num_tokens, index).long()
    inverse = torch.full((index.shape[0], num_tokens + 1), -1, dtype=torch.int64, device=index.device)
    return inverse.scatter(1, slot, place)[:, :num_tokens].contiguous()


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def saliency(
    tokens: Tensor,  # (num_tokens, D)
    index: Tensor,  # (I, N)
    *,
    alone: Tensor | None = None,  # (num_tokens,)
    sharpness: float = SHARPNESS,
    farthest: float = FARTHEST,
    flat: float = FLAT,
) -> Tensor:  # (num_tokens,)
    """Weights for :func:`adaptive_pool`: a token counts the more, the less it looks like the rest of its image.

    With d the cosine distance of a token to the mean of its image, and z its standard deviations from the average distance,
    ``z = (d - mean(d)) / (std(d) + flat)``, a token weighs ``exp(sharpness * clamp(z, -farthest, farthest))``.

    Args:
        tokens: (num_tokens, D) float32, bfloat16 or float16; unit last stride, any row stride.
        index: (I, N) int32 or int64 tokens of each image, no token twice; -1 is filler. Each image is judged by itself.
        alone: (num_tokens,) bool, tokens that weigh 1.
        sharpness, farthest, flat: constants, above 0.
    Returns:
        (num_tokens,) float32, no gradient; 1 for tokens of no image.
    Raises:
        ValueError: device, rank, shape, stride, a constant or an index out of range. TypeError: unsupported dtype.
    Source: own choice.
    """
    check_index("saliency", "index", index, len(tokens), lowest=-1)
    real = torch.promote_types(tokens.dtype, torch.float32)
    weight = tokens.new_ones(len(tokens), dtype=real)
    for row in index.long():
        place = row[(row >= 0) & (row < len(tokens))]
        if len(place) == 0 or tokens.shape[1] == 0:
            continue
        own = tokens[place].to(real)
        mean = own.mean(0)
        norm = torch.linalg.vector_norm(own, dim=1) * torch.linalg.vector_norm(mean)
        distance = 1 - own @ mean / norm.clamp(min=1e-12)
        spread, middle = torch.var_mean(distance, correction=0)
        z = (distance - middle) / (spread.sqrt() + flat)
        weight[place] = (sharpness * z.clamp(-farthest, farthest)).exp()
    return weight if alone is None else weight.masked_fill(alone, 1)


def spread(
    alike: Tensor,  # (N, N)
    near: Tensor,  # (N,)
    count: int,
    at_once: int = 1,
    *,
    fresh: bool = False,
) -> Tensor:  # (count,)
    """Greedy choice of tokens that are least alike: each as far as possible from those chosen before it.

    By rounds: of the tokens not chosen yet the ``at_once`` with the least ``near`` are chosen (as many as are missing in the
    last round), which do not know of each other; then ``near = max(near, alike[each of them])``. Only compares: -0 equals +0,
    NaN is the largest, equal ones go to the smaller index.

    Args:
        alike: (N, N) float32 similarity of each pair; unit last stride, any row stride.
        near: (N,) float32 similarity to what was chosen before.
        count: tokens to choose, in [0, N]. at_once: of a round, at least 1.
        fresh: nothing was chosen before; ``near`` ranks the first round only and is forgotten after it.
    Returns:
        (count,) int64 tokens in the order of choice, no gradient.
    Raises:
        ValueError: device, rank, shape, stride, count or at_once out of range; more than 8192 tokens on CUDA.
        TypeError: unsupported dtype.
    Source: greedy max-min choice (DivPrune, arXiv 2503.02175), several at a time.
    """
    return spread_rounds(lambda chosen: alike[chosen], near, count, at_once, fresh)


def spread_rounds(alike_to: Callable[[Tensor], Tensor], near: Tensor, count: int, at_once: int, fresh: bool) -> Tensor:
    """:func:`spread` where no matrix of all pairs exists; alike_to: (k,) tokens -> (k, N) similarity to them."""
    rank, chosen = _order(near), [near.new_empty(0, dtype=torch.int64)]
    for start in range(0, count, at_once):
        chosen.append(rank.argsort(stable=True)[: min(at_once, count - start)])
        now = _order(alike_to(chosen[-1])).amax(0)
        rank = now if fresh and start == 0 else torch.maximum(rank, now)
        rank = rank.index_fill(0, torch.cat(chosen), _CHOSEN)
    return torch.cat(chosen)


_CHOSEN = 2**31 - 1  # behind NaN


def _order(values: Tensor) -> Tensor:
    """int32 that compare as float32 values do: -0 as +0, NaN largest."""
    bits = (values + 0.0).view(torch.int32)
    return torch.where(values.isnan(), _CHOSEN - 1, torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


def check_index(op: str, name: str, index: Tensor, limit: int, lowest: int | None = 0) -> None:
    """Refuse values outside [lowest, limit); on the CPU only, because reading a device tensor would synchronise."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if high >= limit or (lowest is not None and low < lowest):
        bound = "less than" if lowest is None else f"at least {lowest} and less than"
        raise ValueError(f"{op}: {name} must be {bound} {limit}, got {high if high >= limit else low}")


def check_ascending(index: Tensor) -> None:
    """Refuse rows whose non-negative entries do not ascend strictly; on the CPU only."""
    if index.device.type != "cpu":
        return
    seen = index.long().cummax(1).values if index.shape[1] else index
    if bool(((index[:, 1:] >= 0) & (index[:, 1:] <= seen[:, :-1])).any()):
        raise ValueError(f"compact: index must be strictly ascending where not negative, got {index.tolist()}")
