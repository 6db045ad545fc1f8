"""The operators as calls into the compiled kernels.

One order for every operator: allocate with torch -> launcher of `crop._C` with raw pointers and the current stream ->
an exception on an error code. The kernels know nothing of torch, so one build serves every torch version. The public
functions in `crop.ops` check the arguments; the launchers repeat what protects memory. Types of arguments stand in the
schemas.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from crop.ops import dispatch, reference, reference_pooling
from crop.ops.dispatch import Target, as_int64, dense, pointer, raise_error, register

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODES = {"mean": 0, "weighted": 1, "max": 2}


def row_layout(
    shape: tuple[int, ...], strides: tuple[int, ...], element: int, dim: int, batch: int, num_kept: int, i: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How `compact` sees tensors[i] of `element` bytes an element: the axes between batch and token axis merge into one
    (outer), the axes after it into a row.

    Returns:
        The shape of its output; size of outer, number of tokens, bytes of a row, bytes from one sample, outer and token
        to the next.
    """
    axes = len(shape)
    dim = dim + axes if dim < 0 else dim
    if not 1 <= dim < axes:
        raise ValueError(f"compact: token_dim[{i}] must be in [1, {axes}), got {dim}")
    if shape[0] != batch:
        raise ValueError(f"compact: tensors[{i}] must have batch size {batch}, got shape {tuple(shape)}")
    row = 1
    for axis in range(axes - 1, dim, -1):
        if shape[axis] != 1:
            if strides[axis] != row:
                raise ValueError(f"compact: tensors[{i}] must be contiguous after axis {dim}, got strides {strides}")
            row *= shape[axis]
    outer, stride = 1, 0
    for axis in range(dim - 1, 0, -1):
        if shape[axis] != 1:
            if outer == 1:
                stride = strides[axis]
            elif strides[axis] != outer * stride:
                raise ValueError(
                    f"compact: tensors[{i}] must have axes 1..{dim - 1} that merge into one, got strides {strides}"
                )
            outer *= shape[axis]
    steps = (strides[0] * element, stride * element, strides[dim] * element)
    return (*shape[:dim], num_kept, *shape[dim + 1 :]), (outer, shape[dim], row * element, *steps)


_known_layout = functools.lru_cache(maxsize=1024)(row_layout)  # sizes repeat from layer to layer


@register(
    "attention_mass",
    "(Tensor query, Tensor key, Tensor vision_index, Tensor? sample, Tensor? lse, float scale, Tensor? visible_start,"
    " Tensor? visible_len) -> Tensor",
    twin=reference.attention_mass,
    fake=lambda query, key, index, *_: index.new_empty(index.shape, dtype=torch.float32),
)
def attention_mass(query, key, vision_index, sample, lse, scale, visible_start, visible_len, target: Target) -> Tensor:
    mass = vision_index.new_empty(*vision_index.shape, dtype=torch.float32)
    if mass.numel() == 0:
        return mass
    index, sample, start, length = (as_int64(t) for t in (vision_index, sample, visible_start, visible_len))
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3], *vision_index.shape)
    num_bytes = dispatch.native.attention_mass_scratch(target[0], sizes, lse is None)
    scratch = mass.new_empty(num_bytes, dtype=torch.uint8)
    lse = dense(lse)
    pointers = map(pointer, (query, key, index, sample, lse, start, length, mass, scratch))
    layout = (sizes, query.stride()[:3], key.stride()[:3])
    raise_error(dispatch.native.attention_mass(*target, *pointers, num_bytes, *layout, scale, DTYPES[query.dtype]))
    return mass


def _select_fake(score: Tensor, num_keep: list[Any], *_: Any) -> Tensor:
    width = 0
    for keep in num_keep:
        width = torch.sym_max(width, keep)
    return score.new_empty((score.shape[0], width), dtype=torch.int64)


@register(
    "select",
    "(Tensor score, SymInt[] num_keep, Tensor? weight, Tensor? priority, Tensor? index) -> Tensor",
    twin=lambda **given: reference.select(**given),  # looked up at the call, so that a test can stand in for it
    fake=_select_fake,
)
def select(score, num_keep, weight, priority, index, target: Target) -> Tensor:
    width = max(num_keep, default=0)
    kept = score.new_empty(score.shape[0], width, dtype=torch.int64)
    if kept.numel() == 0:
        return kept
    score, weight, priority, index = dense(score), dense(weight), dense(priority), as_int64(index)
    pointers = map(pointer, (score, weight, priority, index))
    raise_error(dispatch.native.select(*target, *pointers, num_keep, kept.data_ptr(), *score.shape, width))
    return kept


@register(
    "pack",
    "(Tensor stays, SymInt width, Tensor? kept, Tensor? sample) -> (Tensor, Tensor)",
    twin=reference.pack,
    fake=lambda stays, width, *_: (
        stays.new_empty((stays.shape[0], width), dtype=torch.int64),
        stays.new_empty(stays.shape, dtype=torch.int64),
    ),
)
def pack(stays, width, kept, sample, target: Target) -> tuple[Tensor, Tensor]:
    batch, num_tokens = stays.shape
    kept_index = stays.new_empty(batch, width, dtype=torch.int64)
    slot_of = stays.new_empty(batch, num_tokens, dtype=torch.int64)
    stays, kept, sample = dense(stays), as_int64(kept), as_int64(sample)
    pointers = map(pointer, (stays, kept, sample, kept_index, slot_of))
    images = (0, 0) if kept is None else kept.shape
    raise_error(dispatch.native.pack(*target, *pointers, batch, num_tokens, *images, width))
    return kept_index, slot_of


def _compact_fake(tensors: list[Tensor], index: Tensor, token_dim: list[int]) -> list[Tensor]:
    layouts = (
        row_layout(tensor.shape, tensor.stride(), 1, dim, *index.shape, i)
        for i, (tensor, dim) in enumerate(zip(tensors, token_dim, strict=True))
    )
    return [tensor.new_empty(shape) for tensor, (shape, _) in zip(tensors, layouts, strict=True)]


def _compact_twin(tensors: list[Tensor], index: Tensor, token_dim: list[int]) -> list[Tensor]:
    _compact_fake(tensors, index, token_dim)  # refuses what the kernels refuse
    return reference.compact(tensors, index, token_dim=token_dim)


@register(
    "compact",
    "(Tensor[] tensors, Tensor index, int[] token_dim) -> Tensor[]",
    twin=_compact_twin,
    fake=_compact_fake,
)
def compact(tensors: list[Tensor], index: Tensor, token_dim: list[int], target: Target) -> list[Tensor]:
    index = as_int64(index)
    batch, num_kept = index.shape
    outs, table = [], []
    for i, tensor in enumerate(tensors):
        shape, layout = _known_layout(
            tensor.shape, tensor.stride(), tensor.element_size(), token_dim[i], batch, num_kept, i
        )
        out = tensor.new_empty(*shape)
        outs.append(out)
        table.append((tensor.data_ptr(), out.data_ptr(), *layout))
    raise_error(dispatch.native.compact(*target, table, index.data_ptr(), batch, num_kept))
    return outs


@register(
    "invert_index",
    "(Tensor index, SymInt num_tokens) -> Tensor",
    twin=reference.invert_index,
    fake=lambda index, num_tokens: index.new_empty((index.shape[0], num_tokens), dtype=torch.int64),
)
def invert_index(index: Tensor, num_tokens: int, target: Target) -> Tensor:
    index = as_int64(index)
    inverse = index.new_empty(index.shape[0], num_tokens)
    raise_error(dispatch.native.invert_index(*target, pointer(index), pointer(inverse), *index.shape, num_tokens))
    return inverse


@register(
    "spread",
    "(Tensor alike, Tensor near, SymInt count, SymInt at_once, bool fresh) -> Tensor",
    twin=reference.spread,
    fake=lambda alike, near, count, *_: near.new_empty(count, dtype=torch.int64),
)
def spread(alike, near, count, at_once, fresh, target: Target) -> Tensor:
    chosen = near.new_empty(count, dtype=torch.int64)
    near = dense(near)
    pointers = map(pointer, (alike, near, chosen))
    raise_error(dispatch.native.spread(*target, *pointers, len(near), count, at_once, alike.stride(0), fresh))
    return chosen


@register(
    "saliency",
    "(Tensor tokens, Tensor index, Tensor? alone, float sharpness, float farthest, float flat) -> Tensor",
    twin=reference.saliency,
    fake=lambda tokens, *_: tokens.new_empty(tokens.shape[:1], dtype=torch.float32),
)
def saliency(tokens, index, alone, sharpness, farthest, flat, target: Target) -> Tensor:
    num_tokens, dim = tokens.shape
    if not (index.numel() and tokens.numel()):
        return tokens.new_ones(num_tokens, dtype=torch.float32)
    weight = tokens.new_empty(num_tokens, dtype=torch.float32)
    mean = weight.new_empty(index.shape[0], dim)
    index, alone = as_int64(index), dense(alone)
    pointers = map(pointer, (tokens, index, alone, mean, weight))
    sizes = (num_tokens, dim, *index.shape, tokens.stride(0))
    constants = (sharpness, farthest, flat)
    raise_error(dispatch.native.saliency(*target, *pointers, *sizes, constants, DTYPES[tokens.dtype]))
    return weight


def _pool_fake(tokens, members, offsets, inverse, weight, mode) -> tuple[Tensor, Tensor]:
    num_out = offsets.shape[0] - 1
    out = tokens.new_empty((num_out, tokens.shape[1]))
    if inverse is not None and mode == "max":
        return out, tokens.new_empty((num_out, tokens.shape[1]), dtype=torch.int32)
    kept = num_out if inverse is not None and mode == "weighted" else 0
    return out, tokens.new_empty(kept, dtype=torch.float32)


def _pool_twin(tokens, members, offsets, inverse, weight, mode) -> tuple[Tensor, Tensor]:
    out, saved = reference_pooling.pool(tokens, members, offsets, weight, mode)
    return out, tokens.new_empty(0, dtype=torch.float32) if inverse is None else saved


@register(
    "adaptive_pool",
    # Second result, for the backward pass only (inverse given): see reference_pooling.pool.
    "(Tensor tokens, Tensor members, Tensor offsets, Tensor? inverse, Tensor? weight, str mode) -> (Tensor, Tensor)",
    twin=_pool_twin,
    fake=_pool_fake,
)
def adaptive_pool(tokens, members, offsets, inverse, weight, mode, target: Target) -> tuple[Tensor, Tensor]:
    out, saved = _pool_fake(tokens, members, offsets, inverse, weight, mode)
    if out.numel():
        weight = dense(weight)
        pointers = map(pointer, (tokens, members, offsets, weight, out, saved))
        sizes = (*tokens.shape, members.shape[0], out.shape[0], tokens.stride(0))
        raise_error(dispatch.native.adaptive_pool(*target, *pointers, *sizes, DTYPES[tokens.dtype], MODES[mode]))
    return out, saved


def _pool_backward_fake(grad, tokens, out, saved, offsets, inverse, weight, mode) -> tuple[Tensor, Tensor]:
    num_tokens = inverse.shape[0]
    grad_weight = grad.new_empty(num_tokens if mode == "weighted" else 0, dtype=torch.float32)
    return grad.new_empty((num_tokens, grad.shape[1])), grad_weight


@register(
    "adaptive_pool_backward",
    "(Tensor grad, Tensor? tokens, Tensor? out, Tensor saved, Tensor offsets, Tensor inverse, Tensor? weight, str mode)"
    " -> (Tensor, Tensor)",
    twin=reference_pooling.pool_backward,
    fake=_pool_backward_fake,
)
def adaptive_pool_backward(
    grad, tokens, out, saved, offsets, inverse, weight, mode, target: Target
) -> tuple[Tensor, Tensor]:
    grad_tokens, grad_weight = _pool_backward_fake(grad, tokens, out, saved, offsets, inverse, weight, mode)
    if not grad_tokens.numel():
        return grad_tokens, grad_weight.zero_()
    grad, weight = dense(grad), dense(weight)
    given = (grad, tokens, out, saved, offsets, inverse, weight, grad_tokens, grad_weight)
    sizes = (*grad_tokens.shape, grad.shape[0], 0 if tokens is None else tokens.stride(0))
    modes = (DTYPES[grad.dtype], MODES[mode])
    raise_error(dispatch.native.adaptive_pool_backward(*target, *map(pointer, given), *sizes, *modes))
    return grad_tokens, grad_weight


def _compact_save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, index, ctx.token_dim = inputs
    ctx.num_tokens = [tensor.shape[dim] for tensor, dim in zip(tensors, ctx.token_dim, strict=True)]
    ctx.save_for_backward(index)


def _compact_grad(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, None, None]:
    # The gradient of a gather of unique rows is a gather by the inverse map: dropped rows read -1, hence zero.
    (index,) = ctx.saved_tensors
    moved = [
        None if grad is None else compact([grad.contiguous()], invert_index(index, num_tokens), [dim])[0]
        for grad, num_tokens, dim in zip(grads, ctx.num_tokens, ctx.token_dim, strict=True)
    ]
    return moved, None, None


def _pool_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, _, offsets, inverse, weight, ctx.mode = inputs
    extra = (tokens, weight, output[0]) if ctx.mode == "weighted" else (None, None, None)
    ctx.save_for_backward(offsets, inverse, output[1], *extra)
    ctx.set_materialize_grads(False)


def _pool_grad(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
    offsets, inverse, saved, tokens, weight, out = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None
    gx, gw = adaptive_pool_backward(grad, tokens, out, saved, offsets, inverse, weight, ctx.mode)
    return gx, None, None, None, gw if ctx.mode == "weighted" else None, None


torch.library.register_autograd("crop::compact", _compact_grad, setup_context=_compact_save, lib=dispatch.library)


torch.library.register_autograd("crop::adaptive_pool", _pool_grad, setup_context=_pool_save, lib=dispatch.library)
