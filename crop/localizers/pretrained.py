"""Models and processors from folders, and what is wrong where they cannot be loaded: one line that names file and cause."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from torch import nn

REMEDIES = {  # package that transformers asks for -> how to get it
    "torchvision": 'pip install "crop-vlm[vision]"',
    "num2words": 'pip install "crop-vlm[vision]"',
    "accelerate": "pip install accelerate",
}


def model_source(op: str, path: str | Path) -> str:
    """What transformers may load a model from: an existing folder, or what can only be a name on the hub.

    Raises:
        FileNotFoundError: it looks like a folder, and there is none.
    """
    name = str(path)
    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).is_dir():
        raise FileNotFoundError(f"{op}: path must be an existing folder or a name on the hub, got {name!r}")
    return name


def load_pretrained(op: str, path: str | Path, auto: str, device: str, **how: Any) -> tuple[nn.Module, Any]:
    """A second model, in evaluation mode, and its processor; code that comes with it is not run.

    Args:
        op: the caller, for errors.
        path: a folder or the name of a model on the hub, which transformers then downloads.
        auto: class of transformers, e.g. "AutoModel". device: where the model goes. how: as for ``from_pretrained``.
    Raises:
        FileNotFoundError: no such folder. ValueError: what is there cannot be loaded.
    """
    import transformers

    name = model_source(op, path)
    try:
        model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=False, **how)
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # readers of damaged files raise anything
        raise ValueError(f"{op}: path must hold a model, got {name!r}: {damage(name) or explain(error)}") from error
    return model.to(device).eval(), processor


def one_line(error: BaseException) -> str:
    """All that an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def explain(error: BaseException) -> str:
    """What transformers said, whole, and what helps."""
    text = one_line(error)
    remedy = next((remedy for package, remedy in REMEDIES.items() if package in text.lower()), None)
    return text if remedy is None else f"{text} Remedy: {remedy}"


def damage(path: str | Path) -> str | None:
    """The first file, in a folder or alone, that is not what its name says, and why; None: none is found."""
    path = Path(path)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in (".safetensors", ".bin", ".json") and file.is_file():
            cause = _cause(file)
            if cause is not None:
                return f"{file} {cause}"
    return None


def _cause(file: Path) -> str | None:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(1024)
        if not start:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return "is a pointer of Git LFS, not the file: run git lfs pull in its folder"
        if start.lstrip()[:1] == b"<":
            return "is a web page, not the file: download it again"
        if file.suffix == ".json":
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:  # also bytes that are no UTF-8
                return f"is no JSON: {error}"
        if file.suffix == ".safetensors":
            length = struct.unpack("<Q", start[:8])[0] if size >= 8 else size
            if 8 + length > size:
                return f"is cut short or no safetensors file: it has {size} bytes"
            opened.seek(8)
            try:
                header = json.loads(opened.read(length))
            except ValueError:
                return "is no safetensors file: its header is no JSON"
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            if 8 + length + end > size:
                return f"is cut short: it must have {8 + length + end} bytes, got {size}"
    return None
