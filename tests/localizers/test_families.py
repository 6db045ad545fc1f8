"""The localizers that read the model itself, on every family."""

from __future__ import annotations

import pytest
import torch

from crop.geometry.region import Region
from crop.localizers import AttentionLocalizer, Head, HeadLocalizer
from crop.localizers.reading import embeddings
from tests.support.cases import families, get_model
from tests.support.families.entry import HIDDEN
from tests.support.localizing import StandIn, state
from tests.support.tiny_families import decoder_of, get_config

pytestmark = pytest.mark.usefixtures("one_thread")


@families()
def test_attention_is_that_of_a_layer_that_sees_the_whole_prompt(family: str) -> None:
    model, processor = get_model(family, "eager"), StandIn(family)
    attention = model(**processor.batch.inputs, output_attentions=True).attentions
    before = state(model)
    localizer = AttentionLocalizer(model, processor, prompt=str)
    config = get_config(family).get_text_config()
    kinds = getattr(config, "layer_types", None)
    layer = localizer.scoring_layer
    assert layer >= 1 and (not kinds or kinds[layer] == "full_attention")
    found = localizer.attend(processor.picture, "?")
    (layout,) = processor.batch.samples[0].layouts()
    assert torch.equal(found.layout.position, layout.position)
    rows = [weights for weights in attention if weights is not None][sum(_attends(family)[:layer])][0]
    first = int(layout.position[-1]) + 1
    torch.testing.assert_close(found.prior, rows[:, first][:, layout.position], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found.question, rows[:, -2:].mean(1)[:, layout.position], atol=2e-6, rtol=1e-4)
    region = AttentionLocalizer(model, processor, prompt=str)(processor.picture, "?")
    assert isinstance(region, Region) and state(model) == before


def _attends(family: str) -> list[bool]:
    """Which layers return attention weights."""
    return [hasattr(layer, "self_attn") for layer in decoder_of(family, get_model(family, "eager")).layers]


@families()
def test_a_layer_that_cannot_score_is_refused(family: str) -> None:
    model, config = get_model(family), get_config(family).get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    own = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    for layer, kind in enumerate(kinds):
        if kind == "full_attention" and layer < own:
            assert AttentionLocalizer(model, None, layer=layer).scoring_layer == layer
            continue
        with pytest.raises(
            ValueError, match=f"layer must be one that sees the whole prompt, .*: one of .*, got {layer}"
        ):
            AttentionLocalizer(model, None, layer=layer)


@families()
def test_head_reads_what_enters_the_decoder(family: str) -> None:
    model, processor = get_model(family), StandIn(family)
    entered: list[torch.Tensor] = []
    hook = decoder_of(family, model).register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"][0].clone()), with_kwargs=True
    )
    model(**processor.batch.inputs)
    hook.remove()
    before = state(model)
    read = embeddings(model, processor, processor.picture, "?", str)
    assert torch.equal(read.vision, entered[0][read.layout.position])
    assert torch.equal(read.text, entered[0][int(read.layout.position[-1]) + 1 :])
    torch.manual_seed(0)
    localizer = HeadLocalizer(model, processor, Head(HIDDEN, width=16).eval(), str)
    assert isinstance(localizer(processor.picture, "?"), Region) and state(model) == before
