"""Tensors that claim to be on a CUDA device while their data are on the CPU, and a log of what that device would be asked.

For tests of *where* data is: which copies a call makes between host and device, and whether it waits for the device. Values
are computed as on the CPU; nothing is learned about time.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from bench.common import ROOT
from crop.models import attention_hook

DEVICE = torch.device("cuda:0")
# Operators whose result the host must read before it can go on.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal"}
VIEWS = {"view", "_unsafe_view", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "alias",
         "detach", "as_strided", "split", "unbind", "split_with_sizes", "diagonal", "unfold", "lift_fresh", "_reshape_alias"}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Event:
    """Something asked of the device.

    Args:
        kind: "kernel", "wait" (the host reads a result), "to host", "to device" (from pageable memory: the host waits) or
            "to device, pinned".
        operator: its name. where: file and line of this package that asked, or "model".
    """

    kind: str
    operator: str
    where: str


class Log(list[Event]):
    """What happened, in order."""

    def note(self, kind: str, operator: str) -> None:
        package = str(ROOT / "crop")
        # The model runs inside a hook of ours that calls it: who is nearest asked.
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.startswith(package) and frame.name != "__torch_dispatch__":  # which passes the model's on
                self.append(Event(kind, operator, f"{frame.filename[len(package) + 1 :]}:{frame.lineno}"))
                return
            if "/transformers/" in frame.filename:
                break
        self.append(Event(kind, operator, "model"))

    def ours(self, *kinds: str) -> list[Event]:
        """Events of these kinds that this package asked for."""
        return [event for event in self if event.kind in kinds and event.where != "model"]


class OnDevice(Tensor):
    """A tensor that says it is on the device."""

    log: Log

    @staticmethod
    def __new__(cls, inner: Tensor, log: Log) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: Tensor, log: Log) -> None:
        self.inner, self.log = inner, log

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = (value for value in tree_flatten((args, kwargs))[0] if isinstance(value, OnDevice))
        return _run(func, args, kwargs or {}, next(tensors).log)


class _Factories(TorchDispatchMode):
    """Catches what makes tensors on the device from nothing."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {}, self.log)


def _run(func: Any, args: tuple, kwargs: dict[str, Any], log: Log) -> Any:
    namespace, name = func._schema.name.split("::")
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there, target = [isinstance(value, OnDevice) for value in tensors], kwargs.get("device")
    to_device = target is not None and torch.device(target).type in ("cuda", "meta")
    if not any(there) and not to_device:
        return func(*args, **kwargs)
    inner_args, inner = tree_map(lambda value: value.inner if isinstance(value, OnDevice) else value, (args, kwargs))
    if target is not None:
        inner["device"] = torch.device("cpu")
    if inner.get("pin_memory"):
        inner["pin_memory"] = False
    if name == "_to_copy" and any(there) and target is not None and not to_device:
        log.note("to host", name)
        return func(*inner_args, **inner)
    if name == "_to_copy" and any(there) and kwargs.get("dtype", tensors[0].dtype) == tensors[0].dtype:
        return tensors[0]  # it is there already
    pinned = getattr(tensors[0], "pretends_pinned", False) if tensors else False
    if name == "_to_copy" and not any(there):
        log.note("to device, pinned" if pinned else "to device", name)
    elif name == "copy_" and there == [True, False]:
        log.note("to device", name)
    elif name == "copy_" and there == [False, True]:
        log.note("to host", name)
    elif name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        log.note("wait", name)
    elif name in INDEXED and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]):
        log.note("wait", f"{name} by a mask")
    elif name in INDEXED and not all(isinstance(one, OnDevice) for one in args[1] if one is not None):
        log.note("to device", f"{name} by an index of the host")
    elif (name not in VIEWS or namespace == "crop") and not name.startswith(("empty", "new_empty")):
        log.note("kernel", name)
    out = func(*inner_args, **inner)
    if name == "copy_" or name.endswith("_") and tensors and out is tensors[0]:
        return args[0]
    return tree_map(lambda value: OnDevice(value, log) if isinstance(value, Tensor) else value, out)


def move(model: nn.Module, log: Log) -> None:
    """Put parameters and buffers of a model on the device, for good."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = OnDevice(tensor.data, log)


class _Timer:
    """A CUDA event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: _Timer) -> float:
        return 1.0


def _pin(self: Tensor, *args: Any) -> Tensor:
    copy = self.clone()
    copy.pretends_pinned = True
    return copy


@contextmanager
def pretended(log: Log) -> Iterator[None]:
    """A CUDA device seems to be there; what is asked of it goes to ``log``."""
    make, attention = torch.tensor, torch.nn.functional.scaled_dot_product_attention
    call_with_lse = attention_hook.call_with_lse

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        def read(value: Any) -> Any:
            return value.item() if isinstance(value, OnDevice) else value

        made = make(tree_map(read, data), *args, **kwargs)
        if device is None or torch.device(device).type != "cuda":
            return made
        log.note("to device", "tensor")
        return OnDevice(made, log)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(query, OnDevice):
            return attention(query, key, value, attn_mask, *args, **kwargs)
        log.note("kernel", "scaled_dot_product_attention")
        mask = attn_mask.inner if isinstance(attn_mask, OnDevice) else attn_mask
        return OnDevice(attention(query.inner, key.inner, value.inner, mask, *args, **kwargs), log)

    def with_lse(function: Any, query: Tensor, call: Any) -> tuple[Any, Tensor | None]:
        out, lse = call_with_lse(function, query, call)  # of the CPU's kernel
        return out, OnDevice(lse, log) if isinstance(query, OnDevice) and lse is not None else lse

    with (
        mock.patch.object(attention_hook, "call_with_lse", with_lse),
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "Event", _Timer),
        mock.patch.object(torch.cuda, "synchronize", lambda *args: log.note("wait", "synchronize")),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa),
        mock.patch.object(Tensor, "pin_memory", _pin),
        _Factories(log),
        torch.no_grad(),
    ):
        yield
