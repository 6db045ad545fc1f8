"""The layer that a model's config names: where "auto" cuts, and where the ``attention`` localizer looks."""

from __future__ import annotations

import copy

import pytest

from crop import embedded, patch
from crop.localizers.attention import AttentionLocalizer
from crop.methods import InnerLLMPruning
from crop.models import family_of
from tests.support.batches import standard_batch
from tests.support.cases import get_model, patched


def test_auto_is_what_the_config_names():
    model, batch = copy.deepcopy(get_model("llava")), standard_batch("llava", "single", 1)
    config = model.model.language_model.config
    assert family_of(model).default_layer(config) == 2
    config.crop_layer = 3
    with patched(model, InnerLLMPruning(0.25), batch) as stats:
        auto = model(**batch.inputs).logits
    with patched(model, InnerLLMPruning(0.25, layer=3), batch) as told:
        assert (model(**batch.inputs).logits == auto).all()
    assert stats.layer_average == told.layer_average


@pytest.mark.parametrize("value", [0, 4, -1, "2", True, 2.0])
def test_what_is_no_layer_is_refused(value):
    model = copy.deepcopy(get_model("llava"))
    model.model.language_model.config.crop_layer = value
    with (
        pytest.raises(ValueError, match=r"crop_layer of the config must be an int in \[1, 3\], got"),
        patch(model, InnerLLMPruning(0.25)),
    ):
        pass


def test_the_embedded_model_names_one():
    model, processor = embedded.load()
    family = family_of(model)
    config = family.language_model(model).config
    assert config.crop_layer == family.default_layer(config)
    assert AttentionLocalizer(model, processor).scoring_layer == config.crop_layer - 1
