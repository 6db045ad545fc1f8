"""What tests over the tiny families share: methods, regions, models, and what the oracle says of batches, each made once."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, PreLLMCompression
from crop.patching.hf import cache_of
from crop.patching.patch import patch
from tests.support.batches import Batch, Sample, standard_batch
from tests.support.decision import Decision, Steps
from tests.support.flash import flash_on_cpu
from tests.support.oracle import Oracle
from tests.support.tiny_families import FAMILIES, build_model, get_config

ATOL = 1e-5  # patched against oracle; the pruning itself moves the logits by tenths
STEPS = 4
LEAVES = torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear
METHODS = {
    "plc": PreLLMCompression(inside=1, context=2, outside=4, ring=1),
    "budget": InnerLLMPruning(keep=0.25, layer=2, ring=1),
    "strict": InnerLLMPruning(mode="strict", layer=3),
    "compose": Compose(PreLLMCompression(inside=1, context=2, outside=2, ring=1), InnerLLMPruning(keep=0.15, layer=2)),
}
# By sample (in turn) and image: every image asks for another place.
REGIONS = (
    (Region.box(0.1, 0.15, 0.55, 0.6), Region.from_blocks(4, 3, 7, 6)),
    (Region.box(0.4, 0.0, 1.0, 0.35), Region.box(0.0, 0.5, 0.3, 1.0).union(Region.box(0.7, 0.1, 0.95, 0.4))),
)


# --------------------------------------------------------------------------------------------------- parameters
def families(names: Sequence[str] = tuple(FAMILIES), fast: bool = False) -> Any:
    """A test per family; `fast`: those of the families that say so belong to `pytest -m fast`."""
    chosen = [pytest.param(name, marks=pytest.mark.fast) if fast and FAMILIES[name].fast else name for name in names]
    return pytest.mark.parametrize("family", chosen)


def one_per_decoder() -> Any:
    """A test per kind of text model, on the first family that has it."""
    chosen: dict[str, str] = {}
    for name in FAMILIES:
        chosen.setdefault(get_config(name).get_text_config().model_type, name)
    return families(list(chosen.values()))


def skip_what_transformers_cannot(family: str, way: str, model: Any) -> None:
    """Skip, with the reason, a way of use that is wrong without a patch, too."""
    reason = FAMILIES[family].unable.get(way, lambda _: None)(model)
    if reason:
        pytest.skip(f"{reason}: wrong without a patch, too")


# --------------------------------------------------------------------------------------------- models and blocks
@functools.cache
def get_model(family: str, attention: str = "sdpa") -> Any:
    """The tiny model, built once per session: whoever changes one builds or copies it."""
    model = build_model(family, attention)
    with flash_on_cpu():  # the first forward installs transformers' own recording hooks
        model(**standard_batch(family, "single", 1).inputs)
    return model


@functools.cache
def get_oracle(family: str) -> Oracle:
    """The reference on a second model of the same weights."""
    return Oracle(build_model(family, "eager"), FAMILIES[family])


def regions_for(row: int, sample: Sample) -> list[Region]:
    """One region per image of the sample in this row of a batch."""
    return list(REGIONS[row % 2][: len(sample.images)])


def regions_of(batch: Batch) -> list[Region]:
    """One region per image, in prompt order over the batch."""
    return [region for row, sample in enumerate(batch.samples) for region in regions_for(row, sample)]


def elsewhere(regions: Sequence[Region]) -> list[Region]:
    """Other places in the same images."""
    return [Region.box(1 - x1, 1 - y1, 1 - x0, 1 - y0) for region in regions for x0, y0, x1, y1 in region.boxes[:1]]


def where(batch: Batch) -> dict[str, Any]:
    """What `patch` and `estimate` need to know of the images of `batch`, if it holds some."""
    sizes = [image.size for sample in batch.samples for image in sample.images]
    processor = FAMILIES[batch.family].processor
    return ({"image_size": sizes} if sizes else {}) | ({"processor": processor()} if sizes and processor else {})


def patched(model: Any, method: Any, batch: Batch, regions: Any = None, **more: Any) -> Any:
    """`crop.patch` with what the family's geometry needs for the images of `batch`."""
    known = where(batch)
    return patch(model, method, **({"region": regions} if known else {}), **(known | more))


@contextlib.contextmanager
def count_vision_calls(family: str, model: Any) -> Iterator[list[int]]:
    """A list that grows with every call of the tower's first weights, below the forward that may be cached."""
    calls: list[int] = []
    tower = getattr(model.model, FAMILIES[family].tower)
    first = next(module for module in tower.modules() if isinstance(module, LEAVES))
    handle = first.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def greedy(model: Any, batch: Batch, steps: int = STEPS, **more: Any) -> Any:
    """Greedy generation with logits; transformers' defaults otherwise."""
    asked = dict(max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return model.generate(**{**batch.inputs, **asked, **more})


def next_turn(model: Any, batch: Batch, out: Any, question: Sequence[int], steps: int = 3, **more: Any) -> Any:
    """Generate on, with the whole conversation's ids, a question behind the answers and the same cache; no pixels."""
    ids = torch.cat([out.sequences, torch.tensor([list(question)] * len(out.sequences))], 1)
    mask = torch.ones_like(ids)
    mask[:, : batch.inputs["attention_mask"].shape[1]] = batch.inputs["attention_mask"]
    asked = dict(max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return model.generate(ids, attention_mask=mask, **as_argument(model, cache_of(out)), **asked, **more)


def as_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument of the model, under the name that this version of transformers has for it."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


# -------------------------------------------------------------------------------------------- what the oracle says
def decide(oracle: Oracle, sample: Sample, method: Any, regions: Sequence[Region], **more: Any) -> Decision:
    """The oracle's decision, which must not hang on rounding."""
    layouts = sample.layouts()[len(sample.images) - len(regions) :]
    decision = oracle.decide(sample, method, regions, layouts, **more)
    assert not decision.near_tie, "the test's own data is too close to call: change a seed"
    return decision


class Expected:
    """What the oracle says about one sample under one method, computed when asked for."""

    def __init__(self, sample: Sample, method: Any, regions: Sequence[Region]) -> None:
        self.oracle, self.sample = get_oracle(sample.family), sample
        self.method, self.regions = method, regions

    @functools.cached_property
    def decision(self) -> Decision:
        return decide(self.oracle, self.sample, self.method, self.regions)

    @functools.cached_property
    def logits(self) -> dict[int, torch.Tensor]:
        return self.oracle.logits_by_position(self.sample, self.decision)

    @functools.cached_property
    def plain(self) -> torch.Tensor:
        return self.oracle.forward(self.sample, self.oracle.keep_all(self.sample))[0]

    @functools.cached_property
    def steps(self) -> Steps:
        return self.oracle.greedy(self.sample, self.decision, STEPS)


def expected(batch: Batch, name: str) -> list[Expected]:
    """Expectations for each sample of a batch under METHODS[name] and REGIONS, each made once."""
    return [_expected(sample, row % 2, name) for row, sample in enumerate(batch.samples)]


@functools.cache
def _expected(sample: Sample, row: int, name: str) -> Expected:
    return Expected(sample, METHODS[name], regions_for(row, sample))


def text_positions(sample: Sample) -> list[int]:
    """Positions of the text tokens of a sample."""
    vision = {p for span in sample.spans() for p in span}
    return [p for p in range(len(sample.ids)) if p not in vision]


def assert_kept(stats: Any, decisions: Sequence[Decision]) -> None:
    """The kept tokens of a prefill, sample by sample."""
    found = [kept.tolist() for kept in stats.kept]
    assert found == [d.kept_original(image) for d in decisions for image in range(len(d.cells))]


def assert_logits(logits: torch.Tensor, batch: Batch, wanted: Sequence[Expected], *, kept: bool = False) -> None:
    """Every text row, and with `kept` every surviving vision row, equals the oracle."""
    for row, (sample, expect) in enumerate(zip(batch.samples, wanted, strict=True)):
        positions = sorted(expect.logits) if kept else text_positions(sample)
        reference = torch.stack([expect.logits[p] for p in positions])
        columns = torch.tensor(positions) + batch.offsets[row]
        torch.testing.assert_close(logits[row, columns], reference, atol=ATOL, rtol=0)


def assert_steps(out: Any, steps: Sequence[Steps]) -> None:
    """Generated tokens and the logits of as many steps as were taken equal the oracle's."""
    taken = len(out.logits)
    for row, wanted in enumerate(steps):
        assert taken <= len(wanted.logits)
        for number, logits in enumerate(wanted.logits[:taken]):
            error = (out.logits[number][row] - logits).abs().max()
            assert error <= ATOL, f"sample {row} step {number}: logits differ by {error:.2e}"
        assert out.sequences[row, -taken:].tolist() == wanted.tokens[:taken]


def assert_stats(stats: Any, decisions: Sequence[Decision]) -> None:
    """Counts, averages, plans and kept indices of one prefill."""
    assert_kept(stats, decisions)
    counts = [count for decision in decisions for count in decision.counts()]
    assert list(zip(stats.tokens_before, stats.tokens_after_plc, stats.tokens_after_ilp, strict=True)) == counts
    assert all(kept.dtype == torch.int64 and kept.device.type == "cpu" for kept in stats.kept)
    for (before, pooled, _), plan in zip(counts, stats.plans, strict=True):
        assert (plan is None) == (before == pooled) or plan.num_out == pooled
    every = [(decision, image) for decision in decisions for image in range(len(decision.cells))]
    for (decision, image), average in zip(every, stats.layer_average, strict=True):
        tokens = [len(decision.kept_at(layer)[image]) for layer in range(stats.num_layers)]
        assert abs(average - sum(tokens) / stats.num_layers) < 1e-9
    assert stats.seconds and all(value >= 0 for value in stats.seconds.values())


def cache_lengths(cache: Any) -> list[int]:
    """Physical number of keys per layer that holds any."""
    return [layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None]


def expected_lengths(batch: Batch, decisions: Sequence[Decision], appended: int) -> list[int]:
    """Keys per layer after a prefill and `appended` single tokens: those of the longest sample, all columns of the prompt
    where nothing has left, and in a layer with a window no more than the next token may see."""
    oracle, lengths = get_oracle(batch.family), []
    shared = getattr(oracle.decoder.config, "num_kv_shared_layers", 0)
    for layer, kind in enumerate(oracle.kinds[: oracle.num_layers - shared]):
        if kind not in ("full_attention", "sliding_attention"):
            continue
        kept = [sum(map(len, decision.kept_at(layer))) for decision in decisions]
        held = [len(text_positions(s)) + count for s, count in zip(batch.samples, kept, strict=True)]
        whole = kept == [sum(map(len, sample.spans())) for sample in batch.samples]
        length = (batch.inputs["input_ids"].shape[1] if whole else max(held)) + appended
        window = oracle.decoder.config.sliding_window if kind == "sliding_attention" else length + 1
        lengths.append(min(length, window - 1))
    return lengths


def position_arguments(oracle: Oracle, samples: Sequence[Sample], size: int) -> dict[str, torch.Tensor]:
    """Position ids of the last `size` tokens, for a forward that is given a chunk and a mask of the full length: families
    with several axes of positions cannot make them from that, the others need none."""
    ids = [oracle.positions(sample)[..., -size:] for sample in samples]
    return {"position_ids": torch.stack(ids, 1)} if ids[0].dim() == 2 else {}
