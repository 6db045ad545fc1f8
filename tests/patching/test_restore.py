"""After the block nothing of `crop.patch` is left on the model, however the block ends."""

from __future__ import annotations

import copy

import pytest
import torch

import crop
from crop.patching.patch import patch
from tests.support.batches import standard_batch
from tests.support.cases import METHODS, families, get_model, greedy, patched, regions_of
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

methods_ = pytest.mark.parametrize("name", list(METHODS))


class Stop(Exception):
    """Raised by the tests."""


def assert_same_outputs(model, batch, plain, generated):
    assert torch.equal(model(**batch.inputs).logits, plain)
    out = greedy(model, batch, max_new_tokens=3)
    assert torch.equal(out.sequences, generated.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, generated.logits, strict=True))


def test_the_public_name():
    assert crop.patch is patch


@pytest.mark.parametrize(
    "attention,name",
    [("sdpa", name) for name in METHODS] + [("eager", "compose"), ("flash_attention_2", "compose")],
)
@families(THOROUGH)
def test_normal_exit(family, attention, name):
    model = get_model(family, attention)
    batch = standard_batch(family, "left", 2)
    plain, generated = model(**batch.inputs).logits, greedy(model, batch, max_new_tokens=3)
    before = snapshot(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        with patched(model, METHODS[name], batch, regions_of(batch)):
            model(**batch.inputs)
            greedy(model, batch, max_new_tokens=2)
        assert_unchanged(before, model)
    assert_same_outputs(model, batch, plain, generated)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])


@methods_
@families(THOROUGH)
def test_the_snapshot_sees_the_patch(family, name):
    """The check above can fail: inside the block the snapshot differs."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "single", 1)
    before = snapshot(model)
    with patched(model, METHODS[name], batch, regions_of(batch)), pytest.raises(AssertionError, match="left"):
        assert_unchanged(before, model)
    assert_unchanged(before, model)


@methods_
@families(THOROUGH)
def test_unused_block(family, name):
    model = get_model(family, "sdpa")
    before = snapshot(model)
    with patched(model, METHODS[name], standard_batch(family, "single", 1)):
        pass
    assert_unchanged(before, model)


@methods_
@families(THOROUGH)
def test_exception_in_the_block(family, name):
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "single", 1)
    plain, generated = model(**batch.inputs).logits, greedy(model, batch, max_new_tokens=3)
    before = snapshot(model)
    with pytest.raises(Stop, match="mine"), patched(model, METHODS[name], batch, regions_of(batch)):
        model(**batch.inputs)
        raise Stop("mine")
    assert_unchanged(before, model)
    assert_same_outputs(model, batch, plain, generated)


PLACES = {
    "vision": lambda m: m.model.vision_tower if hasattr(m.model, "vision_tower") else m.model.visual,
    "scoring_attention": lambda m: m.model.language_model.layers[1].self_attn.o_proj,
    "layer_before": lambda m: m.model.language_model.layers[0],
    "pruning_layer": lambda m: m.model.language_model.layers[2].input_layernorm,
    "layer_after": lambda m: m.model.language_model.layers[3].mlp,
    "norm": lambda m: m.model.language_model.norm,
    "head": lambda m: m.lm_head,
}


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("name", ["plc", "compose"])
@families(THOROUGH)
def test_exception_inside_the_model(family, name, place):
    """An error in the prefill, an interrupt in the second decoding step (the vision tower has none)."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "left", 1)
    plain, generated = model(**batch.inputs).logits, greedy(model, batch, max_new_tokens=3)
    for error, fatal_call in ((Stop, 1), (KeyboardInterrupt, 1 if place == "vision" else 3)):
        count = 0

        def fail(module, args, output, error=error, fatal_call=fatal_call):
            nonlocal count
            count += 1
            if count == fatal_call:
                raise error("from a hook")

        handle = PLACES[place](model).register_forward_hook(fail)
        try:
            before = snapshot(model)
            with pytest.raises(error, match="from a hook"):
                with patched(model, METHODS[name], batch, regions_of(batch)):
                    greedy(model, batch)
            assert_unchanged(before, model)
        finally:
            handle.remove()
        assert_same_outputs(model, batch, plain, generated)


@methods_
@families(THOROUGH)
def test_usable_again_inside_the_block(family, name):
    """A forward that fails leaves no half-finished state for the next one in the same block."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "left", 1)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        wanted = model(**batch.inputs).logits

    def fail(module, args, output):
        raise Stop("once")

    with patched(model, METHODS[name], batch, regions_of(batch)):
        for place in PLACES.values():
            handle = place(model).register_forward_hook(fail)
            with pytest.raises(Stop):
                model(**batch.inputs)
            handle.remove()
            assert torch.equal(model(**batch.inputs).logits, wanted)


@families(THOROUGH)
def test_other_models_are_untouched(family):
    """A second model of the same class runs as ever while the first is patched, and both may be."""
    model, other = get_model(family, "sdpa"), get_model(family, "eager")
    batch = standard_batch(family, "left", 1)
    plain, before = other(**batch.inputs).logits, snapshot(other)
    with patched(model, METHODS["compose"], batch, regions_of(batch)):
        wanted = model(**batch.inputs).logits
        assert torch.equal(other(**batch.inputs).logits, plain)
        with patched(other, METHODS["plc"], batch, regions_of(batch)):
            pruned = other(**batch.inputs).logits
            assert torch.equal(model(**batch.inputs).logits, wanted)
        assert torch.equal(model(**batch.inputs).logits, wanted)
        assert torch.equal(other(**batch.inputs).logits, plain)
    assert not torch.equal(pruned, plain)
    assert set(before) == set(snapshot(other))


@families(THOROUGH)
def test_attention_may_change_inside_the_block(family):
    """set_attn_implementation between two calls is honoured, and stays after the block."""
    model = copy.deepcopy(get_model(family, "sdpa"))
    batch = standard_batch(family, "left", 1)
    with patched(model, METHODS["compose"], batch, regions_of(batch)):
        first = model(**batch.inputs).logits
        model.set_attn_implementation("eager")
        second = model(**batch.inputs).logits
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(first[real], second[real], atol=1e-5, rtol=0)
    language_model = model.model.language_model
    for layer in language_model.layers:
        assert layer.self_attn.config is language_model.config
        assert layer.self_attn.config._attn_implementation == "eager"


@methods_
@families(THOROUGH)
def test_hooks_of_others_stay(family, name):
    """Hooks that were there before, or came inside the block, keep their order and their place."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "single", 1)
    layer = model.model.language_model.layers[3]
    seen = []
    early = layer.register_forward_pre_hook(lambda m, a: seen.append("early"))
    with patched(model, METHODS[name], batch, regions_of(batch)):
        late = layer.register_forward_pre_hook(lambda m, a: seen.append("late"))
        model(**batch.inputs)
    model(**batch.inputs)
    assert seen == ["early", "late"] * 2
    early.remove()
    late.remove()
    assert not layer._forward_pre_hooks


@families(THOROUGH)
def test_copy_after_the_block(family):
    """The model can be copied and its cache dropped after the block."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "single", 1)
    with patched(model, METHODS["compose"], batch, regions_of(batch)):
        model(**batch.inputs)
    plain = model(**batch.inputs).logits
    assert torch.equal(copy.deepcopy(model)(**batch.inputs).logits, plain)
