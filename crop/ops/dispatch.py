"""Which implementation of an operator runs, and its registration with `torch.library`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from torch.nn import Parameter

from crop.backend import chosen, native

library = torch.library.Library("crop", "DEF")
Target = tuple[int, int]  # number of the CUDA device and a stream of it, or -1 and the number of threads on a CPU


_PLAIN = frozenset((type(None), int, float, str, list))  # spares them isinstance, which is slow for tensors


def _observed(args: tuple[Any, ...]) -> bool:
    """Whether anyone beside the kernel must see a call: a gradient, a compiler, a transform, a mode, a profiler."""
    if is_compiling() or _len_torch_dispatch_stack() or peek_interpreter_stack() is not None or _profiler_enabled():
        return True
    grad = is_grad_enabled()
    for value in args[0] if type(args[0]) is list else args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if grad and value.requires_grad:
                return True
        elif kind not in _PLAIN and isinstance(value, Tensor):
            return True
    return False


def register(name: str, schema: str, twin: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operator; the decorated function launches the compiled kernel.

    It receives the arguments of the schema and the ``Target``; the twin receives the former by name. What the decorator
    returns takes the arguments of the schema alone and goes through torch's dispatcher only where someone observes the
    call: for a kernel of microseconds the dispatcher is the larger part.
    """
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"crop::{name}", fake, lib=library)
    dispatch = getattr(torch.ops.crop, name).default
    names = [argument.name for argument in dispatch._schema.arguments]

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        def cpu(*args: Any) -> Any:
            backend = chosen.get()
            if backend == "twin" or (native is None and backend == "auto"):
                return twin(**dict(zip(names, args, strict=True)))
            if native is None:
                raise RuntimeError(
                    f'{name}: use_backend must be "auto" or "twin" without compiled kernels, {_REINSTALL}'
                )
            return launch(*args, (-1, get_num_threads()))

        def cuda(*args: Any) -> Any:
            if chosen.get() == "twin":
                return twin(**dict(zip(names, args, strict=True)))
            if native is None or not native.has_cuda:
                raise RuntimeError(
                    f"{name}: the tensors are on a GPU but crop was built without CUDA kernels, {_REINSTALL}"
                )
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            with torch.cuda.device(first.device):
                return launch(*args, (first.device.index, torch.cuda.current_stream().cuda_stream))

        library.impl(name, cpu, "CPU")
        library.impl(name, cuda, "CUDA")

        def call(*args: Any) -> Any:
            first = args[0][0] if type(args[0]) is list else args[0]
            run = cpu if first.is_cpu else cuda if first.is_cuda else dispatch
            return dispatch(*args) if _observed(args) else run(*args)

        return call

    return decorate


_REINSTALL = (
    "reinstall with a C++ compiler (and nvcc for GPU kernels: `CROP_BUILD=cuda pip install --force-reinstall crop-vlm`)"
    ' or choose plain torch with `crop.ops.use_backend("twin")`'
)


def raise_error(code: int) -> None:
    if code:
        error = ValueError if code < 0 else RuntimeError  # below 0: bad argument; above 0: CUDA error
        raise error(native.last_error())


def as_int64(tensor: Tensor | None) -> Tensor | None:
    """Index tensors are small: one layout keeps the kernels simple, and it is the one the package itself produces."""
    if tensor is None or (tensor.dtype == torch.int64 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.int64).contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """The address of the memory, 0 for None and for a tensor without elements."""
    return 0 if tensor is None else tensor.data_ptr()
