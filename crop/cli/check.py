"""Does crop work here, and with this model? Every answer is a ``Finding``."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from crop.cli.ask import Asker
from crop.cli.options import REFUSED
from crop.cost.estimate import estimate
from crop.geometry.region import Region
from crop.localizers.attention import AttentionLocalizer
from crop.localizers.base import encode, template_reads
from crop.localizers.pretrained import one_line
from crop.methods import Compose, InnerLLMPruning, PreLLMCompression
from crop.methods.registry import by_name
from crop.models import ModelFamily, family_of
from crop.patching.hf import refuse_transformers
from crop.patching.patch import patch
from crop.selftest.check import Finding, Status

PACKAGE = "crop-vlm"
DEVELOPERS = ("test", "bench")  # extras that no user needs
LARGE = (1024, 768)  # the picture whose cost is predicted
KEEP, STEPS = 0.25, 3
REGION = Region.box(0.2, 0.3, 0.6, 0.7)
QUESTION = "What is in the picture?"
# Largest difference of logits, as a share of the largest logit: other shapes are summed in another order.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# Differences of up to this share of what pruning changes prove that the right tokens were pruned; larger ones hide it.
SHARE = 0.25
Result = tuple[Status, str]  # and its detail


def check_packages() -> Iterator[Finding]:
    """transformers, and what the extras of this package bring."""
    try:
        refuse_transformers()
        yield Finding("ok", "transformers", importlib.metadata.version("transformers"))
    except (ImportError, RuntimeError) as error:
        yield Finding("refused", "transformers", one_line(error))
    try:
        required = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("missing", "extras", f"unknown: {PACKAGE} runs from a folder and is not installed")
        return
    wanted: dict[str, list[str]] = {}
    for line in required:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name and extra and extra[1] not in DEVELOPERS:
            wanted.setdefault(extra[1], []).append(name[0])
    for extra, names in wanted.items():
        absent = [name for name in names if not _installed(name)]
        if absent:
            detail = f'without {", ".join(absent)}: pip install "{PACKAGE}[{extra}]"'
            yield Finding("missing", f"extra {extra}", detail)
        else:
            yield Finding("ok", f"extra {extra}", ", ".join(names))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@torch.no_grad()
def check_model(asker: Asker, picture: Image) -> Iterator[Finding]:
    """A loaded model from its family to its first tokens: layout, defaults, equality unpruned and pruned, cost.

    Args:
        picture: what it is asked about; any size.
    """
    model, family = asker.model, family_of(asker.model)
    yield Finding("ok", "family", f"{family.model_type}, {type(model).__name__}, {model.dtype}, on {model.device}")
    if asker.prompt is not None:
        yield Finding("ok", "prompt", "the model's own")
    else:
        thinks = "; thinking is switched off" if template_reads(asker.processor, "enable_thinking") else ""
        yield Finding("ok", "processor", f"{type(asker.processor).__name__}, with a chat template{thinks}")
    for subject, check in CHECKS.items():
        try:
            status, detail = check(asker, picture)
        except (*REFUSED, AssertionError) as error:  # AssertionError: of the model's code
            yield Finding("refused", subject, one_line(error) or type(error).__name__)
            return
        except Exception as error:  # no refusal: crop, its kernels or transformers are not as the rest expects
            yield Finding("WRONG", subject, f"{type(error).__name__}: {one_line(error)}")
            return
        yield Finding(status, subject, detail)


def _inputs(asker: Asker, picture: Image) -> tuple[Any, dict[str, Any]]:
    """Of the test question, on the model's device; what the patch needs to know of the picture."""
    inputs = encode(asker.processor, picture, QUESTION, asker.prompt).to(asker.model.device, dtype=asker.model.dtype)
    return inputs, {"processor": asker.processor, "image_size": picture.size}


def _layout(asker: Asker, picture: Image) -> Result:
    inputs, where = _inputs(asker, picture)
    with patch(asker.model, InnerLLMPruning(KEEP), REGION, **where) as stats:
        asker.model(**inputs, use_cache=False)
    (layout,) = stats.layouts
    views, rows, columns = layout.extent
    inside = int((layout.levels(REGION, 0) == 0).sum())
    many = f"{views} views of up to " if views > 1 else ""
    return (
        "ok",
        f"{picture.width} x {picture.height} pixels: {len(layout)} tokens, {many}{rows} x {columns}; {inside} in the test region",
    )


def _defaults(asker: Asker, picture: Image) -> Result:
    family = family_of(asker.model)
    config = family.language_model(asker.model).config
    cut, read = family.default_layer(config), AttentionLocalizer(asker.model, asker.processor).scoring_layer
    return "ok", (
        f"cut at layer {cut} of {asker.num_layers}; localizer {asker.default_localizer}, attention read in layer {read}"
    )


def _keep_all(asker: Asker, picture: Image) -> Result:
    inputs, where = _inputs(asker, picture)
    plain = asker.model(**inputs).logits
    every = Compose(PreLLMCompression(inside=1, context=1, outside=1), InnerLLMPruning(keep=1.0))
    with patch(asker.model, every, REGION, **where):
        kept = asker.model(**inputs).logits
    if not torch.equal(plain, kept):
        return "WRONG", f"logits must be those of the unpatched model, got {_far(kept, plain):.2g} off"
    return "ok", "the bits of the unpatched model"


def _pruned(asker: Asker, picture: Image) -> Result:
    """A pruned answer with its cache, against the unpatched model that is made to lose the same tokens, without a cache."""
    model, (inputs, where) = asker.model, _inputs(asker, picture)
    family = family_of(model)
    layer = family.default_layer(family.language_model(model).config)
    # Where prompts see themselves, an answer must not be read as one.
    steps = 1 if family.traits.mask == "prefix" else STEPS
    with patch(model, InnerLLMPruning(KEEP), REGION, **where) as stats:
        out = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
    (layout,), (kept,) = stats.layouts, stats.kept
    length, ids = inputs["input_ids"].shape[1], out.sequences[:, :-1]
    stays = torch.ones(ids.shape[1], dtype=torch.bool)
    stays[layout.position] = False
    stays[layout.position[kept.cpu()]] = True
    longer = dict(inputs) | {"input_ids": ids}
    for name, value in inputs.items():  # masks and token types go on with the text
        if isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape and name != "input_ids":
            fill = torch.full_like(ids[:, length:], int(name == "attention_mask"), dtype=value.dtype)
            longer[name] = torch.cat([value, fill], 1)
    with _without(family, family.language_model(model), layer, stays):
        rows = model(**longer, use_cache=False).logits[0, -steps:]
    plain = model(**longer, use_cache=False).logits[0, -steps:]
    found = torch.cat(out.logits)
    limit, far, effect = TOLERANCE[model.dtype], _far(found, rows), _far(rows, plain)
    if not far <= limit:  # NaN, too
        return "WRONG", f"logits must be those of a recomputation, got {far:.2g} off (at most {limit:g})"
    if far > SHARE * effect:
        return "missing", (
            f"cannot tell: logits are {far:.1g} from a recomputation, and pruning changes them by {effect:.1g} only; "
            "check with --dtype float32, or with another model of the family"
        )
    return "ok", (
        f"{stats.tokens_after_ilp[0]} of {len(layout)} tokens from layer {layer} on, {steps} of an answer: "
        f"{far:.1g} from a recomputation without cache and patch, which is {effect:.1g} from the unpruned model"
    )


@contextmanager
def _without(family: ModelFamily, decoder: nn.Module, layer: int, stays: Tensor) -> Iterator[None]:
    """Let a decoder go on with some tokens alone, ``stays`` (seq_len,), from a layer on; nothing of the patch takes part."""
    kept = torch.nonzero(stays).flatten()

    def part(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(part, value))
        if not isinstance(value, Tensor) or value.dim() < 1:
            return value
        index = kept.to(value.device)
        if value.dim() == 4:  # masks: rows and columns
            return value.index_select(2, index).index_select(3, index)
        # Positions and masks end with the tokens; states and angles have their channels behind them.
        return value.index_select(-2 if value.is_floating_point() else -1, index)

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        first, *rest = args
        shorter = first if module is not decoder.layers[layer] else part(first)
        return (shorter, *map(part, rest)), {name: part(value) for name, value in kwargs.items()}

    name = family.traits.deepstack_method
    add = getattr(decoder, name) if name else None

    def added(states: Tensor, vision: Tensor, features: Tensor) -> Tensor:
        """Features of the tokens that are left."""
        if states.shape[1] != vision.shape[1]:
            vision, features = part(vision), features[stays.to(vision.device)[vision[0]]]
        return add(states, vision, features)

    handles = [each.register_forward_pre_hook(enter, with_kwargs=True) for each in decoder.layers[layer:]]
    if name:
        setattr(decoder, name, added)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if name:
            delattr(decoder, name)


def _far(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def _cost(asker: Asker, picture: Image) -> Result:
    inputs, where = _inputs(asker, picture.resize(LARGE))
    found = estimate(asker.model, inputs, by_name("crop", 0.11), REGION, **where)
    before, after = found.before, found.after
    return "ok", (
        f"{LARGE[0]} x {LARGE[1]} pixels, 11 %: {before.tokens[0]:.0f} vision tokens, {after.tokens[0]:.0f} over the layers, "
        f"{before.flops / after.flops:.1f} times fewer FLOPs; {found.advice}"
    )


CHECKS: dict[str, Callable[[Asker, Image], Result]] = {
    "layout": _layout,
    "defaults": _defaults,
    "keeping all": _keep_all,
    "pruned": _pruned,
    "cost": _cost,
}
