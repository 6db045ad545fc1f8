"""Scores without positions: query and key as they were before the rotary embedding."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.glm4v import modeling_glm4v
from transformers.models.llama import modeling_llama

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression, Pyramid
from crop.models.attention_hook import undo_rope
from tests.support.batches import standard_batch
from tests.support.cases import (
    as_argument,
    assert_kept,
    assert_steps,
    decide,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
    regions_for,
    regions_of,
)
from tests.support.oracle import Oracle
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

METHODS = {
    "ilp": InnerLLMPruning(keep=0.25, layer=2, rope=False),
    "last": InnerLLMPruning(keep=0.25, layer=3, rows="last", rope=False),
    "composed": Compose(PreLLMCompression(1, 2, 2), InnerLLMPruning(keep=0.2, rope=False)),
}


class NoPositions(Oracle):
    """Scores from the projections of the scoring layer alone, which never see an angle."""

    def attention(self, sample, decision, cut):
        layer, seen = self.decoder.layers[cut.layer - 1], []
        handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        _, places, _ = self.run(sample, decision, cut.layer)
        handle.remove()
        attention, hidden = layer.self_attn, layer.input_layernorm(seen[0])[0]
        query, key = (
            project(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1).double()
            for project in (attention.q_proj, attention.k_proj)
        )
        logits = query @ key.repeat_interleave(len(query) // len(key), 0).mT / attention.head_dim**0.5
        later = torch.ones(len(places), len(places)).triu(1).bool()
        return logits.masked_fill(later, -torch.inf).softmax(-1), places


@pytest.mark.parametrize("attention,padding,images", [("sdpa", "left", 2), ("flash_attention_2", "single", 1)])
@pytest.mark.parametrize("name", list(METHODS))
@families(THOROUGH)
def test_scores_without_positions(family, name, attention, padding, images):
    model, oracle = get_model(family, attention), NoPositions(get_oracle(family).model, get_oracle(family).family)
    batch, method = standard_batch(family, padding, images), METHODS[name]
    with patched(model, method, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, 2)
    decisions, with_positions = (
        [decide(judge, sample, method, regions_for(row, sample)) for row, sample in enumerate(batch.samples)]
        for judge in (oracle, get_oracle(family))
    )
    assert_kept(stats, decisions)
    assert_steps(out, [oracle.greedy(sample, d, 2) for sample, d in zip(batch.samples, decisions, strict=True)])
    assert any(a.kept != b.kept for a, b in zip(decisions, with_positions, strict=True))


@families(THOROUGH)
def test_every_cut_may_score_without_positions(family):
    """After a cut the angles are those of the tokens that are left: equal scores from an untouched second layer."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    cuts = tuple(InnerLLMPruning(keep, layer=layer, rope=False) for keep, layer in ((0.5, 1), (0.2, 2)))
    with patched(model, Pyramid(cuts), batch, regions_of(batch)) as stats:
        model(**batch.inputs)
    for once, twice in zip(stats.kept_at(1), stats.kept, strict=True):
        assert set(twice.tolist()) < set(once.tolist())


@families(["cohere2_vision"])
def test_nothing_to_turn_back(family):
    """Full layers of Command A have no rotary embedding: scores with and without positions are the same."""
    model, batch, found = get_model(family, "sdpa"), standard_batch(family, "left", 1), []
    for rope in (True, False):
        with patched(model, InnerLLMPruning(keep=0.3, layer=2, rope=rope), batch, regions_of(batch)) as stats:
            found.append(model(**batch.inputs).logits)
    assert torch.equal(*found) and sum(stats.tokens_after_ilp) < sum(stats.tokens_before)


@pytest.mark.parametrize("module,rotary", [(modeling_llama, 16), (modeling_glm4v, 8), (modeling_gemma4, 16)])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_turned_back(module, rotary, scale):
    """Halves (Llama; Gemma 4, one tensor a call), interleaved pairs of a part of the head (GLM-4V); scaled, as YaRN does."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 7, 16, generator=generator) for heads in (4, 2))
    angle = torch.rand(2, 7, rotary // 2, generator=generator) * 6
    angle = angle.repeat_interleave(2, -1) if module is modeling_glm4v else torch.cat([angle, angle], -1)
    tables = angle.cos() * scale, angle.sin() * scale
    turn = module.apply_rotary_pos_emb
    single = module is modeling_gemma4
    turned = (turn(query, *tables), turn(key, *tables)) if single else turn(query, key, *tables)
    attention = type("Attention", (torch.nn.Module,), {"__module__": module.__name__})()
    for got, wanted in zip(undo_rope(attention, *turned, tables), (query, key), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_an_attention_without_the_function():
    attention = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="rope must be True for Linear, .* got False"):
        undo_rope(attention, *torch.zeros(2, 1, 1, 1, 2), tuple(torch.zeros(2, 1, 1, 2)))


def test_refused_after_a_cache():
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "single", 1)
    with patched(model, METHODS["ilp"], batch, regions_of(batch)):
        cache = model(torch.tensor([[5, 6, 7]])).past_key_values
        inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
        with pytest.raises(ValueError, match="rope must be True for an image that follows a cache, got .* 3 cached"):
            model(**inputs, **as_argument(model, cache))
    with pytest.raises(TypeError, match="rope must be True or False, got 'no'"):
        InnerLLMPruning(rope="no")
