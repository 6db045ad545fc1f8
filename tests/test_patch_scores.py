"""Scores without positions: query and key as they were before the rotary embedding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import ATOL, REGIONS, greedy, layouts_of, patched, regions_of
from oracle import Oracle
from tiny_models import FAMILIES, standard_batch
from transformers.models.glm4v import modeling_glm4v
from transformers.models.llama import modeling_llama

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression, Pyramid
from crop.models.attention_hook import unrotated

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

families = pytest.mark.parametrize("family", FAMILIES)
METHODS = {
    "ilp": InnerLLMPruning(keep=0.25, layer=2, rope=False),
    "soft_last": InnerLLMPruning(keep=0.25, mode="soft", layer=3, rows="last", rope=False),
    "composed": Compose(PreLLMCompression(1, 2, 2), InnerLLMPruning(keep=0.2, rope=False)),
}


class NoPositions(Oracle):
    """Scores from the projections of the scoring layer alone, which never see an angle."""

    def _masses(self, sample, decision, method, fresh, first, stop):
        rows, _ = self._layout(sample, decision)
        leaders = [leader for _, leader in rows]
        layer, seen = self.language_model.layers[method.layer - 1], []
        handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        self._forward(sample, replace(decision, layer=None), False)
        handle.remove()
        attention, hidden = layer.self_attn, layer.input_layernorm(seen[0])[0]
        query, key = (
            project(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1).double()
            for project in (attention.q_proj, attention.k_proj)
        )
        key = key.repeat_interleave(len(query) // len(key), 0)
        logits = query @ key.mT / attention.head_dim**0.5
        weights = logits.masked_fill(torch.ones(len(rows), len(rows)).triu(1).bool(), -torch.inf).softmax(-1)
        last = max(sample.spans()[number].stop for number in fresh)
        asking = [len(rows) - 1] if method.rows == "last" else [r for r, leader in enumerate(leaders) if leader >= last]
        mean = weights[:, asking].mean((0, 1)).tolist()
        return [tuple(mean[r] for r, leader in enumerate(leaders) if leader in sample.spans()[n]) for n in fresh]


@pytest.mark.parametrize("attention,padding,images", [("sdpa", "left", 2), ("flash_attention_2", "single", 1)])
@pytest.mark.parametrize("name", list(METHODS))
@families
def test_scores_without_positions(family, name, attention, padding, images, get_model, get_oracle):
    model, oracle = get_model(family, attention), NoPositions(get_oracle(family).model)
    batch, method = standard_batch(family, padding, images), METHODS[name]
    with patched(model, method, regions_of(batch)) as stats:
        out = greedy(model, batch, max_new_tokens=2)
    kept, differs = iter(stats.kept), False
    for row, sample in enumerate(batch.samples):
        regions, layouts = list(REGIONS[row][:images]), layouts_of(sample)
        decision = oracle.decide(sample, method, regions, layouts)
        assert not decision.near_tie
        assert [next(kept).tolist() for _ in sample.grids] == [decision.kept_original(n) for n in range(images)]
        for got, logits in zip(out.logits, oracle.greedy(sample, decision, 2).logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)
        differs |= get_oracle(family).decide(sample, method, regions, layouts).kept != decision.kept
    assert differs  # with positions it would have been another choice


@families
def test_every_cut_may_score_without_positions(family, get_model):
    """After a cut the angles are those of the tokens that are left: equal scores from an untouched second layer."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    cuts = tuple(InnerLLMPruning(keep, layer=layer, rope=False, floor=0) for keep, layer in ((0.5, 1), (0.2, 2)))
    with patched(model, Pyramid(cuts), regions_of(batch)) as stats:
        model(**batch.inputs)
    for once, twice in zip(stats.kept_at(1), stats.kept, strict=True):
        assert set(twice.tolist()) < set(once.tolist())


@pytest.mark.parametrize("module,rotary", [(modeling_llama, 16), (modeling_glm4v, 8)])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_turned_back(module, rotary, scale):
    """Halves (Llama) and interleaved pairs of a part of the head (GLM-4V), with a scale as YaRN has."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 7, 16, generator=generator) for heads in (4, 2))
    angle = torch.rand(2, 7, rotary // 2, generator=generator) * 6
    angle = angle.repeat_interleave(2, -1) if module is modeling_glm4v else torch.cat([angle, angle], -1)
    tables = angle.cos() * scale, angle.sin() * scale
    turned = module.apply_rotary_pos_emb(query, key, *tables)
    attention = type("Attention", (torch.nn.Module,), {"__module__": module.__name__})()
    for got, wanted in zip(unrotated(attention, *turned, tables), (query, key), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_an_attention_without_the_function():
    attention = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="rope must be True for Linear, .* got False"):
        unrotated(attention, *torch.zeros(2, 1, 1, 1, 2), tuple(torch.zeros(2, 1, 1, 2)))


def test_refused_after_a_cache(get_model):
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "single", 1)
    with patched(model, METHODS["ilp"], regions_of(batch)):
        cache = model(torch.tensor([[5, 6, 7]])).past_key_values
        inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
        with pytest.raises(ValueError, match="rope must be True for an image that follows a cache, got .* 3 cached"):
            model(**inputs, past_key_values=cache)
    with pytest.raises(TypeError, match="rope must be True or False, got 'no'"):
        InnerLLMPruning(rope="no")
