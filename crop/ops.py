"""The operators: checks, `torch.library` registration and the calls into the compiled kernels.

One order for every operator: checks -> allocation with torch -> launcher of `crop._C` with raw pointers and the current
stream -> an exception on an error code. The kernels know nothing of torch, so one build serves every torch version.
`reference.py` holds the specification of each operator under the same name.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crop import reference

if TYPE_CHECKING:
    from crop.region import PoolPlan

__all__ = ["adaptive_pool", "attention_mass", "compact", "region_topk", "select", "use_backend"]

# None where no kernel was compiled. Any other import failure is a broken installation and must be seen.
native: Any = importlib.import_module("crop._C") if importlib.util.find_spec("crop._C") else None

_backend: ContextVar[str] = ContextVar("crop_backend", default="auto")
_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTS = (torch.int64, torch.int32)
_MODE = {"mean": 0, "weighted": 1, "max": 2}
_MAX_HEAD_DIM = 256


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation of the operators inside a `with` block (per thread and per asyncio task).

    Args:
        name: "auto": compiled kernels; plain torch for CPU tensors where nothing was compiled. "native": compiled kernels
            or RuntimeError. "twin": plain torch (`crop.reference`).
    Raises:
        ValueError: unknown name.
    """
    if name not in ("auto", "native", "twin"):
        raise ValueError(f'use_backend: name must be "auto", "native" or "twin", got {name!r}')
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


# --- checks, in the order users err: device, dtype, rank, shape, stride ---------------------------------------------


def _check(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int | None, ...],  # None: any size
    device: torch.device | None = None,
    unit_stride: bool = False,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}, got {tensor.dtype}")
    got = tensor.shape
    if len(got) != len(shape):
        raise ValueError(f"{op}: {name} must have {len(shape)} dimensions, got shape {tuple(got)}")
    for size, want in zip(got, shape, strict=True):
        if want is not None and size != want:
            expected = tuple("any" if want is None else want for want in shape)
            raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(got)}".replace("'", ""))
    if unit_stride and tensor.stride(-1) != 1 and got[-1] > 1:
        raise ValueError(f"{op}: {name} must have a last stride of 1, got strides {tensor.stride()}")


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
    op, device = "attention_mass", query.device
    _check(op, "query", query, tuple(_DTYPE), (None, None, None, None), unit_stride=True)
    batch, heads, rows, dim = query.shape
    _check(op, "key", key, (query.dtype,), (batch, None, None, dim), device, unit_stride=True)
    if not 1 <= dim <= _MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be in [1, {_MAX_HEAD_DIM}], got {dim}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{op}: num_heads must be a multiple of num_kv_heads={key.shape[1]}, got {heads}")
    _check(op, "vision_index", vision_index, _INTS, (None, None), device)
    if sample is not None:
        _check(op, "sample", sample, _INTS, (vision_index.shape[0],), device)
    elif vision_index.shape[0] != batch:
        raise ValueError(f"{op}: sample must be given unless images={vision_index.shape[0]} equals batch={batch}, got None")
    if lse is not None:
        _check(op, "lse", lse, (torch.float32,), (batch, heads, rows), device)
    if visible_start is not None:
        _check(op, "visible_start", visible_start, _INTS, (batch,), device)
    if visible_len is not None:
        _check(op, "visible_len", visible_len, _INTS, (batch, rows), device)
    scale = dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return torch.ops.crop.attention_mass(query, key, vision_index, sample, lse, scale, visible_start, visible_len)


def select(
    score: Tensor,  # (I, N)
    num_keep: int | Sequence[int],
    *,
    weight: Tensor | None = None,  # (I, N)
    priority: Tensor | None = None,  # (I, N)
    index: Tensor | None = None,  # (I, N)
) -> Tensor:  # (I, K)
    op, device = "select", score.device
    _check(op, "score", score, (torch.float32,), (None, None))
    images, tokens = score.shape
    budget = _budget(op, num_keep, images, tokens)
    for name, tensor, dtypes in (
        ("weight", weight, (torch.float32,)),
        ("priority", priority, (torch.int8,)),
        ("index", index, _INTS),
    ):
        if tensor is not None:
            _check(op, name, tensor, dtypes, (images, tokens), device)
    return torch.ops.crop.select(score, budget, weight, priority, index)


def _budget(op: str, num_keep: int | Sequence[int], images: int, tokens: int) -> list[int]:
    if isinstance(num_keep, Tensor):
        raise TypeError(f"{op}: num_keep must be an int or a list of ints on the host, got a Tensor")
    budget = list(num_keep) if isinstance(num_keep, Sequence) else [num_keep] * images
    if len(budget) != images:
        raise ValueError(f"{op}: num_keep must have one entry per image ({images}), got {len(budget)}")
    for image, keep in enumerate(budget):
        if isinstance(keep, (bool, float)):
            raise TypeError(f"{op}: num_keep[{image}] must be an int, got {keep!r}")
        if not 0 <= keep <= tokens:
            raise ValueError(f"{op}: num_keep[{image}] must be in [0, num_vision={tokens}], got {keep}")
    return budget


def region_topk(
    query: Tensor,  # (B, num_heads, M, d)
    key: Tensor,  # (B, num_kv_heads, T, d)
    vision_index: Tensor,  # (I, N)
    num_keep: int | Sequence[int],
    *,
    weight: Tensor | None = None,  # (I, N)
    priority: Tensor | None = None,  # (I, N)
    sample: Tensor | None = None,  # (I,)
    lse: Tensor | None = None,  # (B, num_heads, M)
    scale: float | None = None,
    visible_start: Tensor | None = None,  # (B,)
    visible_len: Tensor | None = None,  # (B, M)
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (I, K) [, (I, N)]
    if isinstance(vision_index, Tensor) and vision_index.dim() == 2:
        _budget("region_topk", num_keep, *vision_index.shape)  # refuse before the expensive half
    mass = attention_mass(
        query,
        key,
        vision_index,
        sample=sample,
        lse=lse,
        scale=scale,
        visible_start=visible_start,
        visible_len=visible_len,
    )
    kept = select(mass, num_keep, weight=weight, priority=priority, index=vision_index)
    return (kept, mass) if return_scores else kept


def compact(
    tensors: Sequence[Tensor],
    index: Tensor,  # (B, K)
    *,
    token_dim: int | Sequence[int] = 1,
) -> list[Tensor]:
    op = "compact"
    if isinstance(tensors, Tensor) or len(tensors) == 0:
        raise ValueError(f"{op}: tensors must be a non-empty sequence of tensors, got {type(tensors).__name__}")
    tensors = list(tensors)
    dims = [token_dim] * len(tensors) if isinstance(token_dim, int) else list(token_dim)
    if len(dims) != len(tensors):
        raise ValueError(f"{op}: token_dim must have one entry per tensor ({len(tensors)}), got {len(dims)}")
    _check(op, "index", index, _INTS, (None, None))
    for i, tensor in enumerate(tensors):
        if tensor.device != index.device:
            raise ValueError(f"{op}: tensors[{i}] must be on {index.device}, got {tensor.device}")
        dims[i] = dims[i] + tensor.dim() if dims[i] < 0 else dims[i]
        if not 1 <= dims[i] < tensor.dim():
            raise ValueError(f"{op}: token_dim[{i}] must be in [1, {tensor.dim()}), got {dims[i]}")
        if tensor.shape[0] != index.shape[0]:
            raise ValueError(f"{op}: tensors[{i}] must have batch size {index.shape[0]}, got shape {tuple(tensor.shape)}")
        _outer(tensor, dims[i], i)
        _row(tensor, dims[i], i)
    return torch.ops.crop.compact(tensors, index, dims)


def _outer(tensor: Tensor, dim: int, i: int) -> tuple[int, int]:
    """Size and stride in elements of the axes between batch and token axis, merged into one."""
    if dim == 1:
        return 1, 0
    size, stride = tensor.shape[dim - 1], tensor.stride(dim - 1)
    for axis in range(dim - 2, 0, -1):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != size * stride:
            raise ValueError(f"compact: tensors[{i}] must have axes 1..{dim - 1} that merge into one, got strides {tensor.stride()}")
        size *= tensor.shape[axis]
    return size, stride


def _row(tensor: Tensor, dim: int, i: int) -> int:
    """Number of elements of a row: the axes after the token axis, contiguous among themselves."""
    size = 1
    for axis in range(tensor.dim() - 1, dim, -1):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != size:
            raise ValueError(f"compact: tensors[{i}] must be contiguous after axis {dim}, got strides {tensor.stride()}")
        size *= tensor.shape[axis]
    return size


def adaptive_pool(
    tokens: Tensor,  # (num_tokens, D)
    plan: PoolPlan,
    mode: str = "mean",
    weight: Tensor | None = None,  # (num_tokens,)
) -> Tensor:  # (C, D)
    op = "adaptive_pool"
    if mode not in _MODE:
        raise ValueError(f"{op}: mode must be one of {', '.join(_MODE)}, got {mode!r}")
    if (weight is not None) != (mode == "weighted"):
        got = "None" if weight is None else "a tensor"
        raise ValueError(f'{op}: weight must be given if and only if mode is "weighted", got {got} with mode {mode!r}')
    _check(op, "tokens", tokens, tuple(_DTYPE), (plan.num_tokens, None), unit_stride=True)
    if weight is not None:
        _check(op, "weight", weight, (torch.float32,), (plan.num_tokens,), tokens.device)
    plan = plan.to(tokens.device)
    grad = torch.is_grad_enabled() and (tokens.requires_grad or (weight is not None and weight.requires_grad))
    inverse = plan.inverse if grad else None
    return torch.ops.crop.adaptive_pool(tokens, plan.members, plan.offsets, inverse, weight, mode)[0]


# --- registration ------------------------------------------------------------------------------------------------------

_library = torch.library.Library("crop", "DEF")


def _register(name: str, schema: str, twin: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operator; the decorated function launches the compiled kernel.

    It receives the arguments of the schema, whether the tensors are on a CUDA device, and the stream (CUDA) or the number
    of threads (CPU).
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"crop::{name}", fake, lib=_library)

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        def cpu(*args: Any) -> Any:
            backend = _backend.get()
            if backend == "twin" or (native is None and backend == "auto"):
                return twin(*args)
            if native is None:
                raise RuntimeError(f"{name}: use_backend must be \"auto\" or \"twin\" without compiled kernels, {_REINSTALL}")
            return launch(*args, False, torch.get_num_threads())

        def cuda(*args: Any) -> Any:
            if _backend.get() == "twin":
                return twin(*args)
            if native is None or not native.has_cuda:
                raise RuntimeError(f'{name}: the tensors are on a GPU but crop was built without CUDA kernels, {_REINSTALL}')
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            with torch.cuda.device(first.device):
                return launch(*args, True, torch.cuda.current_stream().cuda_stream)

        _library.impl(name, cpu, "CPU")
        _library.impl(name, cuda, "CUDA")
        return launch

    return decorate


_REINSTALL = (
    "reinstall with a C++ compiler (and nvcc for GPU kernels: `CROP_BUILD=cuda pip install --force-reinstall crop-vlm`)"
    ' or choose plain torch with `crop.ops.use_backend("twin")`'
)


def _raise(code: int) -> None:
    if code:
        error = ValueError if code < 0 else RuntimeError  # below 0: bad argument; above 0: CUDA error
        raise error(native.last_error())


def _int64(tensor: Tensor | None) -> Tensor | None:
    """Index tensors are small: one layout keeps the kernels simple, and it is the one the package itself produces."""
    return None if tensor is None else tensor.to(torch.int64).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@_register(
    "attention_mass",
    "(Tensor query, Tensor key, Tensor vision_index, Tensor? sample, Tensor? lse, float scale, Tensor? visible_start,"
    " Tensor? visible_len) -> Tensor",
    twin=lambda query, key, index, sample, lse, scale, start, length: reference.attention_mass(
        query, key, index, sample=sample, lse=lse, scale=scale, visible_start=start, visible_len=length
    ),
    fake=lambda query, key, index, *_: index.new_empty(index.shape, dtype=torch.float32),
)
def _attention_mass(
    query: Tensor,
    key: Tensor,
    vision_index: Tensor,
    sample: Tensor | None,
    lse: Tensor | None,
    scale: float,
    visible_start: Tensor | None,
    visible_len: Tensor | None,
    cuda: bool,
    target: int,
) -> Tensor:
    mass = torch.empty(vision_index.shape, dtype=torch.float32, device=query.device)
    if mass.numel() == 0:
        return mass
    index, sample, start, length = (_int64(t) for t in (vision_index, sample, visible_start, visible_len))
    lse = None if lse is None else lse.contiguous()
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3], *vision_index.shape)
    num_bytes = native.attention_mass_scratch(cuda, sizes, lse is None)
    scratch = torch.empty(num_bytes, dtype=torch.uint8, device=query.device)
    _raise(
        native.attention_mass(
            cuda,
            target,
            query.data_ptr(),
            key.data_ptr(),
            _pointer(index),
            _pointer(sample),
            _pointer(lse),
            _pointer(start),
            _pointer(length),
            mass.data_ptr(),
            scratch.data_ptr(),
            num_bytes,
            sizes,
            query.stride()[:3],
            key.stride()[:3],
            scale,
            _DTYPE[query.dtype],
        )
    )
    return mass


def _select_fake(score: Tensor, num_keep: list[Any], *_: Any) -> Tensor:
    width = 0
    for keep in num_keep:
        width = torch.sym_max(width, keep)
    return score.new_empty((score.shape[0], width), dtype=torch.int64)


@_register(
    "select",
    "(Tensor score, SymInt[] num_keep, Tensor? weight, Tensor? priority, Tensor? index) -> Tensor",
    twin=lambda score, num_keep, weight, priority, index: reference.select(
        score, num_keep, weight=weight, priority=priority, index=index
    ),
    fake=_select_fake,
)
def _select(
    score: Tensor,
    num_keep: list[int],
    weight: Tensor | None,
    priority: Tensor | None,
    index: Tensor | None,
    cuda: bool,
    target: int,
) -> Tensor:
    width = max(num_keep, default=0)
    kept = torch.empty((score.shape[0], width), dtype=torch.int64, device=score.device)
    if kept.numel() == 0:
        return kept
    score, index = score.contiguous(), _int64(index)
    weight = None if weight is None else weight.contiguous()
    priority = None if priority is None else priority.contiguous()
    num_bytes = native.select_scratch(cuda, *score.shape)
    scratch = torch.empty(num_bytes, dtype=torch.uint8, device=score.device)
    _raise(
        native.select(
            cuda,
            target,
            score.data_ptr(),
            _pointer(weight),
            _pointer(priority),
            _pointer(index),
            num_keep,
            kept.data_ptr(),
            scratch.data_ptr(),
            num_bytes,
            *score.shape,
            width,
        )
    )
    return kept


def _compact_fake(tensors: list[Tensor], index: Tensor, token_dim: list[int]) -> list[Tensor]:
    shapes = ((*t.shape[:dim], index.shape[1], *t.shape[dim + 1 :]) for t, dim in zip(tensors, token_dim, strict=True))
    return [t.new_empty(shape) for t, shape in zip(tensors, shapes, strict=True)]


@_register(
    "compact",
    "(Tensor[] tensors, Tensor index, int[] token_dim) -> Tensor[]",
    twin=lambda tensors, index, token_dim: reference.compact(tensors, index, token_dim=token_dim),
    fake=_compact_fake,
)
def _compact(tensors: list[Tensor], index: Tensor, token_dim: list[int], cuda: bool, target: int) -> list[Tensor]:
    index = _int64(index)
    outs, table = [], []
    for i, (tensor, dim) in enumerate(zip(tensors, token_dim, strict=True)):
        shape = list(tensor.shape)
        shape[dim] = index.shape[1]
        out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        outs.append(out)
        if out.numel():
            size = tensor.element_size()
            outer, outer_stride = _outer(tensor, dim, i)
            strides = (tensor.stride(0) * size, outer_stride * size, tensor.stride(dim) * size)
            row = _row(tensor, dim, i) * size
            table.append((tensor.data_ptr(), out.data_ptr(), outer, tensor.shape[dim], row, *strides))
    _raise(native.compact(cuda, target, table, index.data_ptr(), *index.shape))
    return outs


def _pool_fake(
    tokens: Tensor, members: Tensor, offsets: Tensor, inverse: Tensor | None, weight: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    num_out = offsets.shape[0] - 1
    out = tokens.new_empty((num_out, tokens.shape[1]))
    if inverse is None or mode == "mean":
        return out, tokens.new_empty(0, dtype=torch.float32)
    if mode == "weighted":
        return out, tokens.new_empty(num_out, dtype=torch.float32)
    return out, tokens.new_empty((num_out, tokens.shape[1]), dtype=torch.int32)


def _pool_twin(
    tokens: Tensor, members: Tensor, offsets: Tensor, inverse: Tensor | None, weight: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    out, saved = reference.pool(tokens, members, offsets, weight, mode)
    return out, tokens.new_empty(0, dtype=torch.float32) if inverse is None else saved


@_register(
    "adaptive_pool",
    # Second result, for the backward pass only (inverse given): see reference.pool.
    "(Tensor tokens, Tensor members, Tensor offsets, Tensor? inverse, Tensor? weight, str mode) -> (Tensor, Tensor)",
    twin=_pool_twin,
    fake=_pool_fake,
)
def _adaptive_pool(
    tokens: Tensor,
    members: Tensor,
    offsets: Tensor,
    inverse: Tensor | None,
    weight: Tensor | None,
    mode: str,
    cuda: bool,
    target: int,
) -> tuple[Tensor, Tensor]:
    out, saved = _pool_fake(tokens, members, offsets, inverse, weight, mode)
    if out.numel():
        weight = None if weight is None else weight.contiguous()
        _raise(
            native.adaptive_pool(
                cuda,
                target,
                tokens.data_ptr(),
                members.data_ptr(),
                offsets.data_ptr(),
                _pointer(weight),
                out.data_ptr(),
                saved.data_ptr() if saved.numel() else 0,
                *tokens.shape,
                members.shape[0],
                out.shape[0],
                tokens.stride(0),
                _DTYPE[tokens.dtype],
                _MODE[mode],
            )
        )
    return out, saved


def _pool_backward_fake(
    grad: Tensor, tokens: Any, out: Any, saved: Tensor, offsets: Tensor, inverse: Tensor, weight: Any, mode: str
) -> tuple[Tensor, Tensor]:
    num_tokens = inverse.shape[0]
    grad_weight = grad.new_empty(num_tokens if mode == "weighted" else 0, dtype=torch.float32)
    return grad.new_empty((num_tokens, grad.shape[1])), grad_weight


@_register(
    "adaptive_pool_backward",
    "(Tensor grad, Tensor? tokens, Tensor? out, Tensor saved, Tensor offsets, Tensor inverse, Tensor? weight, str mode)"
    " -> (Tensor, Tensor)",
    twin=reference.pool_backward,
    fake=_pool_backward_fake,
)
def _adaptive_pool_backward(
    grad: Tensor,
    tokens: Tensor | None,
    out: Tensor | None,
    saved: Tensor,
    offsets: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    mode: str,
    cuda: bool,
    target: int,
) -> tuple[Tensor, Tensor]:
    grad_tokens, grad_weight = _pool_backward_fake(grad, tokens, out, saved, offsets, inverse, weight, mode)
    if grad_tokens.numel():
        grad = grad.contiguous()
        weight = None if weight is None else weight.contiguous()
        _raise(
            native.adaptive_pool_backward(
                cuda,
                target,
                grad.data_ptr(),
                _pointer(tokens),
                _pointer(out),
                saved.data_ptr() if saved.numel() else 0,
                offsets.data_ptr(),
                inverse.data_ptr(),
                _pointer(weight),
                grad_tokens.data_ptr(),
                grad_weight.data_ptr() if grad_weight.numel() else 0,
                *grad_tokens.shape,
                grad.shape[0],
                0 if tokens is None else tokens.stride(0),
                _DTYPE[grad.dtype],
                _MODE[mode],
            )
        )
    else:
        grad_weight.zero_()
    return grad_tokens, grad_weight


# --- gradients: pure gathers, so every gradient is written once and the result is deterministic -----------------------


def _compact_save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, index, ctx.token_dim = inputs
    ctx.num_tokens = [tensor.shape[dim] for tensor, dim in zip(tensors, ctx.token_dim, strict=True)]
    ctx.save_for_backward(index)


def _compact_grad(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, None, None]:
    # The gradient of a gather of unique rows is a gather by the inverse map: dropped rows read -1, hence zero.
    (index,) = ctx.saved_tensors
    place = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    result: list[Tensor | None] = []
    for grad, dim, size in zip(grads, ctx.token_dim, ctx.num_tokens, strict=True):
        if grad is None:
            result.append(None)
            continue
        inverse = torch.full((index.shape[0], size + 1), -1, dtype=torch.int64, device=index.device)
        inverse = inverse.scatter(1, torch.where(index < 0, size, index).long(), place)[:, :size]
        result += torch.ops.crop.compact([grad.contiguous()], inverse, [dim])
    return result, None, None


def _pool_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, _, offsets, inverse, weight, ctx.mode = inputs
    extra = (tokens, weight, output[0]) if ctx.mode == "weighted" else (None, None, None)
    ctx.save_for_backward(offsets, inverse, output[1], *extra)
    ctx.set_materialize_grads(False)


def _pool_grad(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
    offsets, inverse, saved, tokens, weight, out = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None
    gx, gw = torch.ops.crop.adaptive_pool_backward(grad, tokens, out, saved, offsets, inverse, weight, ctx.mode)
    return gx, None, None, None, gw if ctx.mode == "weighted" else None, None


torch.library.register_autograd("crop::compact", _compact_grad, setup_context=_compact_save, lib=_library)
torch.library.register_autograd("crop::adaptive_pool", _pool_grad, setup_context=_pool_save, lib=_library)

for _name in ("adaptive_pool", "attention_mass", "compact", "region_topk", "select"):
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
