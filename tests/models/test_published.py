"""Full-size models of real checkpoints, without their weights: patched and planned for one picture with the defaults."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

import crop
from crop.cost.geometry import DecoderGeometry
from crop.geometry.region import Region
from crop.models import families, family_of
from tests.support import published
from tests.support.published import PICTURE, PUBLISHED
from tests.support.snapshot import assert_unchanged, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
KEEP = 0.11
REGION = Region.box(0.2, 0.3, 0.6, 0.5)


@pytest.mark.fast
def test_every_family_has_published_sizes() -> None:
    missing = set(families()) - set(map(published.model_type, PUBLISHED)) - set(published.UNKNOWN)
    assert not missing, f"add published sizes to tests/support/published.json: {', '.join(sorted(missing))}"


class Real(NamedTuple):
    """One checkpoint, prepared once for all tests."""

    entry: dict[str, Any]
    model: Any
    inputs: dict[str, Any]
    where: dict[str, Any]
    parameters: float

    @property
    def config(self) -> Any:
        """Of the text model."""
        return family_of(self.model).language_model(self.model).config

    @property
    def running(self) -> int:
        """Its first layers that run on all tokens for the sake of one answer."""
        geometry = DecoderGeometry.of(family_of(self.model).language_model(self.model))
        return sum(not layer.last for layer in geometry.layers)


@pytest.fixture(scope="module", params=PUBLISHED)
def real(request: pytest.FixtureRequest) -> Real:
    try:
        model = published.build(request.param)
    except published.Missing as error:
        pytest.skip(str(error))
    processor = published.image_processor(request.param)
    inputs = published.inputs(request.param, model.config, processor)
    where = {"processor": processor, "image_size": PICTURE}
    return Real(PUBLISHED[request.param], model, inputs, where, published.parameters(request.param, model))


def test_it_is_the_published_model(real: Real) -> None:
    assert real.parameters == pytest.approx(real.entry["parameters"], rel=0.005, abs=real.entry.get("rounded"))


@pytest.mark.parametrize("name", ["crop", "plc", "ilp"])
def test_a_picture_is_planned(real: Real, name: str) -> None:
    method, tokens = crop.by_name(name, KEEP), real.entry["tokens"]
    found = crop.estimate(real.model, real.inputs, method, REGION, **real.where)
    before, after = found.before, found.after
    assert before.tokens == [tokens]
    (average,), depth = after.tokens, real.config.num_hidden_layers
    cut, running = family_of(real.model).default_layer(real.config), real.running
    assert cut <= 0.25 * depth
    # Pooled to the budget, or to keep ** 0.75 and pruned; whole up to the cut without pooling.
    first = {"crop": KEEP**0.75, "plc": KEEP, "ilp": 1.0}[name]
    seen = [tokens * (first if layer < cut else KEEP) for layer in range(depth)]
    assert average == pytest.approx(sum(seen) / depth, rel=0.03, abs=1)
    text = real.inputs["input_ids"].numel() - tokens
    # Attention saves more than in proportion; a recurrent layer takes whole chunks. Layers that reuse keys are nearly free.
    share = (sum(seen[:running]) / running + text) / (tokens + text)
    assert 0.8 * share < after.decoder_flops / before.decoder_flops < 1.05 * share
    assert after.kv_bytes < before.kv_bytes
    assert found.prune and "no weights to time" in found.advice


def test_counted_flops_are_those_of_its_parameters(real: Real) -> None:
    """Two for every parameter that a token meets, and attention on top; what reuses keys meets the last token alone."""
    layers = family_of(real.model).language_model(real.model).layers
    layers = layers[: real.running]
    held = sum(p.numel() for p in layers.parameters() if p.dim() > 1)
    config = real.config
    routed = sum(p.numel() for name, p in layers.named_parameters() if ".experts." in name)
    if routed:
        experts = getattr(config, "num_experts", None) or config.n_routed_experts
        met = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
        held -= routed * (1 - met / experts)
    length = real.inputs["input_ids"].numel()
    flops = crop.estimate(real.model, real.inputs, crop.by_name("plc", KEEP), **real.where).before.decoder_flops
    assert 1 < flops / (2 * held * length) < 1.5


def test_entering_and_leaving_a_block_changes_nothing(real: Real) -> None:
    before = snapshot(real.model)
    for name in ("crop", "plc", "ilp"):
        with crop.patch(real.model, crop.by_name(name, KEEP), REGION, **real.where):
            pass
    assert_unchanged(before, real.model)


def test_attention_is_read_early_in_a_layer_that_has_it(real: Real) -> None:
    layer = crop.AttentionLocalizer(real.model, None).scoring_layer
    assert layer in family_of(real.model).scoring_layers(real.config)
    assert layer <= 0.2 * real.config.num_hidden_layers
