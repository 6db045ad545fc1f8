"""Layers at the end that take keys and values of earlier ones (Gemma 4 E2B and E4B): what the contract does not show.

For the sake of the last logits transformers runs them on the last tokens alone.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

from crop.methods import InnerLLMPruning
from crop.models import families as known
from tests.support.batches import standard_batch
from tests.support.cases import ATOL, METHODS, expected, get_model, greedy, patched, regions_of
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import decoder_of

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = "gemma4_small"


ON_THE_LAST = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24.0.dev0"), reason="this transformers runs them on all tokens"
)


def rows_of_last_layer(model, run) -> list[int]:
    """How many tokens the last layer got in each call."""
    seen: list[int] = []
    handle = (
        decoder_of(FAMILY, model).layers[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    )
    try:
        run()
    finally:
        handle.remove()
    return seen


@ON_THE_LAST
@pytest.mark.parametrize("name", list(METHODS))
def test_generate_runs_them_on_the_last_token(name):
    """As without a patch."""
    model, batch = get_model(FAMILY), standard_batch(FAMILY, "left", 1)
    plain = rows_of_last_layer(model, lambda: greedy(model, batch, 3))
    with patched(model, METHODS[name], batch, regions_of(batch)):
        assert rows_of_last_layer(model, lambda: greedy(model, batch, 3)) == plain


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(METHODS))
def test_the_last_logits_are_those_of_all(name, attention, padding):
    """Of text alone, of more than the text behind an image, of padding: as many as asked for, and right."""
    model, batch = get_model(FAMILY, attention), standard_batch(FAMILY, padding, 1)
    length = batch.inputs["input_ids"].shape[1]
    with patched(model, METHODS[name], batch, regions_of(batch)):
        every = model(**batch.inputs).logits
        for count in (1, 4, 12, length - 3, length):
            last = model(**batch.inputs, logits_to_keep=count).logits
            real = batch.inputs["attention_mask"][:, -count:].bool()
            torch.testing.assert_close(last[real], every[:, -count:][real], atol=ATOL, rtol=0)
            assert last.shape[1] == count


@ON_THE_LAST
@pytest.mark.parametrize("name", list(METHODS))
def test_a_tail_within_the_text_is_all_that_runs(name):
    """Several tokens, on a cache that goes on to be used."""
    model, batch = get_model(FAMILY, "eager"), standard_batch(FAMILY, "left", 1)
    samples = expected(batch, name)
    plain = rows_of_last_layer(model, lambda: model(**batch.inputs, logits_to_keep=5))
    with patched(model, METHODS[name], batch, regions_of(batch)):
        out: list = []
        rows = rows_of_last_layer(model, lambda: out.append(model(**batch.inputs, logits_to_keep=5)))
    assert rows == plain
    for row, expect in enumerate(samples):
        places = range(len(expect.sample.ids) - 5, len(expect.sample.ids))
        wanted = torch.stack([expect.logits[place] for place in places])
        torch.testing.assert_close(out[0].logits[row], wanted, atol=ATOL, rtol=0)


def test_a_cut_behind_what_they_take_is_refused():
    model, batch = get_model(FAMILY), standard_batch(FAMILY, "single", 1)
    before = snapshot(model)
    for layer in (4, 5, 6):
        late = InnerLLMPruning(mode="strict", layer=layer)
        with pytest.raises(
            ValueError, match=rf"layer must be <= 3 .*'gemma4', got {layer}: the last 2 layers reuse the keys"
        ):
            patched(model, late, batch, regions_of(batch)).__enter__()
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    "layers,period,shared,default,last",
    [(35, 5, 20, 5, 13), (42, 6, 18, 6, 22), (30, 6, 0, 6, 29), (60, 6, 0, 6, 59)],
    ids=["E2B", "E4B", "26B-A4B", "31B"],
)
def test_the_default_cut(layers, period, shared, default, last):
    """A full layer ends every period, and the last two layers with keys of their own serve the shared ones."""
    kinds = [("sliding_attention", "full_attention")[(layer + 1) % period == 0] for layer in range(layers)]
    config = transformers.Gemma4TextConfig(
        num_hidden_layers=layers, layer_types=kinds, num_kv_shared_layers=shared, num_attention_heads=8
    )
    family = known()["gemma4"]
    assert (family.default_layer(config), family.last_cut(config)) == (default, last)
    assert max(family.scoring_layers(config)) < layers - shared
