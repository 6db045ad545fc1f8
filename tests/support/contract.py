"""What the contract tests share: methods, regions, memoised expectations, snapshots of a model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, PreLLMCompression
from crop.patching.patch import patch
from tests.support.oracle import Decision, Oracle, Steps
from tests.support.tiny_models import NUM_LAYERS, Batch, Sample, image_processor

ATOL = 1e-5  # patched against oracle; the pruning itself moves the logits by tenths
STEPS = 5

METHODS = {
    "plc": PreLLMCompression(inside=1, context=2, outside=4, ring=1),
    "ilp_budget": InnerLLMPruning(keep=0.25, layer=2, ring=1, floor=4),
    "ilp_strict": InnerLLMPruning(mode="strict", layer=3),
    "compose": Compose(PreLLMCompression(inside=1, context=2, outside=2, ring=1),
                       InnerLLMPruning(keep=0.15, layer=2, floor=3)),
}  # fmt: skip

# By sample and image: every image asks for another place.
REGIONS = (
    (Region.box(0.1, 0.15, 0.55, 0.6), Region.from_blocks(4, 3, 7, 6)),
    (Region.box(0.4, 0.0, 1.0, 0.35),
     Region.box(0.0, 0.5, 0.3, 1.0).union(Region.box(0.7, 0.1, 0.95, 0.4))),
)  # fmt: skip


def regions_of(batch: Batch) -> list[Region]:
    """One region per image, in prompt order over the batch."""
    return [r for row, count in enumerate(batch.num_images) for r in REGIONS[row][:count]]


def layouts_of(sample: Sample) -> list[VisionLayout]:
    """Token geometry of each image when the processor only resizes."""
    return [VisionLayout.grid(h, w, start=s) for (h, w), s in zip(sample.grids, sample.starts, strict=True)]


@functools.cache
def _resize() -> Any:
    return image_processor("resize")


def patched(model: Any, method: Any, regions: Any = None, **more: Any) -> Any:
    """`crop.patch` with the processor that LLaVA's geometry needs."""
    if model.config.model_type == "llava":
        more.setdefault("processor", _resize())
    return patch(model, method, regions, **more)


def greedy(model: Any, batch: Batch, **more: Any) -> Any:
    """Greedy generation with logits; HF's defaults otherwise."""
    more.setdefault("max_new_tokens", STEPS)
    return model.generate(**batch.inputs, do_sample=False, output_logits=True, return_dict_in_generate=True, **more)


class Expected:
    """What the oracle says about one sample under one method, computed when asked for."""

    def __init__(self, oracle: Oracle, sample: Sample, method: Any, regions: list[Region]) -> None:
        self.oracle, self.sample, self.method, self.regions = oracle, sample, method, regions

    @functools.cached_property
    def decision(self) -> Decision:
        decision = self.oracle.decide(self.sample, self.method, self.regions, layouts_of(self.sample))
        assert not decision.near_tie, "the test's own data is too close to call: change a seed"
        return decision

    @functools.cached_property
    def logits(self) -> dict[int, torch.Tensor]:
        return self.oracle.text_logits(self.sample, self.decision)

    @functools.cached_property
    def plain(self) -> torch.Tensor:
        return self.oracle.forward(self.sample, self.oracle.keep_all(self.sample))[0]

    @functools.cached_property
    def steps(self) -> Steps:
        return self.oracle.greedy(self.sample, self.decision, STEPS)


_MEMO: dict[tuple, Expected] = {}


def expected(get_oracle: Callable, batch: Batch, name: str) -> list[Expected]:
    """Expectations for each sample of a standard batch under METHODS[name] and REGIONS."""
    found = []
    for row, sample in enumerate(batch.samples):
        key = (batch.family, sample.ids, sample.grids, name, row)
        if key not in _MEMO:
            regions = list(REGIONS[row][: len(sample.grids)])
            _MEMO[key] = Expected(get_oracle(batch.family), sample, METHODS[name], regions)
        found.append(_MEMO[key])
    return found


def text_positions(sample: Sample) -> list[int]:
    """Positions of the text tokens of a sample."""
    vision = {p for span in sample.spans() for p in span}
    return [p for p in range(len(sample.ids)) if p not in vision]


def assert_logits(logits: torch.Tensor, batch: Batch, wanted: list[Expected], *, kept: bool) -> None:
    """Every text row, and with `kept` every surviving vision row, equals the oracle."""
    for row, (sample, expect) in enumerate(zip(batch.samples, wanted, strict=True)):
        positions = sorted(expect.logits) if kept else text_positions(sample)
        reference = torch.stack([expect.logits[p] for p in positions])
        columns = torch.tensor(positions) + batch.offsets[row]
        torch.testing.assert_close(logits[row, columns], reference, atol=ATOL, rtol=0)


def assert_steps(out: Any, batch: Batch, steps: list[Steps]) -> None:
    """Generated tokens and the logits of every step equal the oracle's."""
    prompt = batch.inputs["input_ids"].shape[1]
    assert len(out.logits) == len(steps[0].logits)
    for row, wanted in enumerate(steps):
        for number, logits in enumerate(wanted.logits):
            error = (out.logits[number][row] - logits).abs().max()
            assert error <= ATOL, f"sample {row} step {number}: logits differ by {error:.2e}"
        assert out.sequences[row, prompt:].tolist() == wanted.tokens


def assert_stats(stats: Any, wanted: list[Expected]) -> None:
    """Counts, averages, plans and kept indices of one prefill."""
    decisions = [(e.decision, image) for e in wanted for image in range(len(e.sample.grids))]
    counts = [decision.counts()[image] for decision, image in decisions]
    assert list(stats.tokens_before) == [c[0] for c in counts]
    assert list(stats.tokens_after_plc) == [c[1] for c in counts]
    assert list(stats.tokens_after_ilp) == [c[2] for c in counts]
    assert len(stats.kept) == len(stats.plans) == len(counts)
    for (decision, image), kept in zip(decisions, stats.kept, strict=True):
        assert kept.dtype == torch.int64 and kept.device.type == "cpu"
        assert kept.tolist() == decision.kept_original(image)
    for (before, pooled, _), plan in zip(counts, stats.plans, strict=True):
        assert (plan is None) == (before == pooled) or plan.num_out == pooled
    for (decision, _), (_, pooled, dropped), average in zip(decisions, counts, stats.layer_average, strict=True):
        layer = NUM_LAYERS if decision.layer is None else decision.layer
        wanted_average = (layer * pooled + (NUM_LAYERS - layer) * dropped) / NUM_LAYERS
        assert abs(average - wanted_average) < 1e-9
    assert stats.seconds and all(value >= 0 for value in stats.seconds.values())


def cache_lengths(cache: Any) -> list[int]:
    """Physical number of keys per layer."""
    return [layer.keys.shape[-2] for layer in cache.layers]


def expected_lengths(batch: Batch, wanted: list[Expected], appended: int) -> list[int]:
    """Keys per layer after a prefill and `appended` single tokens."""
    early, late = [], []
    for expect in wanted:
        counts = expect.decision.counts()
        text = len(text_positions(expect.sample))
        early.append(text + sum(c[1] for c in counts))
        late.append(text + sum(c[2] for c in counts))
    pooled = any(c[0] != c[1] for e in wanted for c in e.decision.counts())
    first = max(early) if pooled else batch.inputs["input_ids"].shape[1]
    layer = wanted[0].decision.layer
    layer = NUM_LAYERS if layer is None else layer
    return [(first if n < layer else max(late)) + appended for n in range(NUM_LAYERS)]


# ------------------------------------------------------------------------------------- snapshots
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
          "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
          "_backward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")  # fmt: skip
_RUN_STATE = ("rope_deltas",)  # the model's own, rewritten by every forward


def _config_state(config: Any) -> dict[str, str]:
    return {key: repr(value) if not hasattr(value, "to_dict") else str(id(value))
            for key, value in vars(config).items()}  # fmt: skip


def snapshot(model: Any) -> dict[str, Any]:
    """Everything a patch could leave behind: hooks, instance attributes, configs, class attributes,
    attention and mask registries, functions of the modules involved, cache classes."""
    state: dict[str, Any] = {}
    classes = set()
    for name, module in model.named_modules():
        state[f"hooks {name}"] = {h: list(getattr(module, h, {}).items()) for h in _HOOKS}
        state[f"attributes {name}"] = {
            key: id(value) for key, value in vars(module).items() if key not in _HOOKS and key not in _RUN_STATE
        }
        state[f"class {name}"] = type(module)
        if hasattr(module, "config"):
            state[f"config {name}"] = (id(module.config), _config_state(module.config))
        classes.update(c for c in type(module).__mro__ if c.__module__.startswith("transformers"))
    state["generation_config"] = _config_state(model.generation_config)
    cache = transformers.cache_utils
    classes.update({cache.Cache, cache.DynamicCache, cache.DynamicLayer, cache.CacheLayerMixin})
    for cls in classes:
        state[f"vars {cls.__qualname__}"] = {key: id(value) for key, value in vars(cls).items()}
    registries = {
        "attention": transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS,
        "masks": transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
    }
    for name, registry in registries.items():
        state[f"registry {name}"] = {key: id(registry[key]) for key in registry}
    modules = {c.__module__ for c in classes} | {"transformers.masking_utils"}
    modules |= {"transformers.modeling_flash_attention_utils"}
    skip = {"_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn",
            "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn"}  # fmt: skip
    for name in sorted(modules):
        functions = vars(sys.modules[name]).items()
        state[f"module {name}"] = {k: id(v) for k, v in functions if callable(v) and k not in skip}
    state["torch"] = (
        list(torch.nn.modules.module._global_forward_hooks),
        list(torch.nn.modules.module._global_forward_pre_hooks),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    return state


def assert_unchanged(before: dict[str, Any], model: Any) -> None:
    """The model is as it was at the snapshot."""
    after = snapshot(model)
    changed = {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }
    assert not changed, f"left behind: {sorted(changed)}: {list(changed.values())[:2]}"
