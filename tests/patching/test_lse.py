"""The log-sum-exp that attention returns: what it covers, that taking it changes nothing, where there is none."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from crop import ops
from crop.methods import InnerLLMPruning, Pyramid
from crop.models import attention_hook
from tests.support.batches import standard_batch
from tests.support.cases import get_model, patched, regions_of
from tests.support.tiny_families import FAMILIES, SUPPORTED, get_config

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize


@pytest.fixture
def scored(monkeypatch):
    """Per scoring: the log-sum-exp it was given, and the masses with it and without."""
    found = []

    def both(*args, lse, **kwargs):
        own = attention_mass(*args, lse=None, **kwargs)
        mass = own if lse is None else attention_mass(*args, lse=lse, **kwargs)
        found.append((lse, mass, own))
        return mass

    attention_mass = ops.attention_mass
    monkeypatch.setattr(ops, "attention_mass", both)
    return found


def narrow(family: str) -> bool:
    """Values narrower than keys: torch's kernel on the CPU that tells its log-sum-exp wants them alike."""
    config = get_config(family).get_text_config()
    return getattr(config, "v_head_dim", 0) < getattr(config, "qk_head_dim", 0)


@matrix("padding", ["left", "none"])
@matrix("family,attention", SUPPORTED)
def test_scores_are_the_same(family, attention, padding, scored):
    """Before a cut and after one, with and without padding: given or computed, the mass is one."""
    model, batch = get_model(family, attention), standard_batch(family, padding, 1)
    cuts = [InnerLLMPruning(keep=0.6 / layer, layer=layer) for layer in FAMILIES[family].cuts[:2]]
    with patched(model, Pyramid(tuple(cuts)), batch, regions_of(batch)):
        model(**batch.inputs)
    assert len(scored) == len(cuts)
    for given, mass, own in scored:
        assert (given is None) == (attention == "eager" or (attention == "sdpa" and narrow(family)))
        assert own.max() > 1e-3
        torch.testing.assert_close(mass, own, atol=1e-6, rtol=1e-5)


def test_not_where_the_scores_ask_something_else(scored):
    """Without positions the attention of this call has another denominator."""
    model, batch = get_model("llava"), standard_batch("llava", "left", 1)
    for rope in (False, True):
        with patched(model, InnerLLMPruning(keep=0.3, rope=rope), batch, regions_of(batch)):
            model(**batch.inputs)
    assert [given is None for given, _, _ in scored] == [True, False]


class Attention(torch.nn.Linear):
    def __init__(self, groups: int, name: str) -> None:
        super().__init__(1, 1)
        self.num_key_value_groups, self.is_causal = groups, True
        self.config = type("Config", (), {"_attn_implementation": name})()


def padding_mask(kind: str, length: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Nothing, or a first sample with three tokens of padding: (2, length), or four axes as sdpa gets them."""
    if kind == "none":
        return None
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, :3] = False
    if kind == "flash":
        return real
    seen = real[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen | torch.eye(length, dtype=torch.bool)
    return seen if kind == "bool" else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@matrix("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@matrix("dtype", [torch.float32, torch.bfloat16])
@matrix("function,kind", [(sdpa_attention_forward, kind) for kind in ("none", "bool", "float")]
        + [(flash_attention_forward, kind) for kind in ("none", "flash")])  # fmt: skip
def test_what_it_covers(function, kind, dtype, mode, flash):
    """The output keeps its bits; the log-sum-exp is that of the logits which the mask leaves."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, length, dim = 6, 2, 11, 16
    query, key, value = (torch.randn(2, n, length, dim, generator=generator).to(dtype) for n in (6, 2, 2))
    query.requires_grad_(mode is torch.enable_grad)
    mask = padding_mask(kind, length, dtype)
    module = Attention(heads // kv_heads, "flash_attention_2")
    with mode():
        plain, _ = function(module, query, key, value, mask, scaling=0.3)
        (out, _), found = attention_hook.call_with_lse(
            function, query, lambda attend: attend(module, query, key, value, mask, scaling=0.3)
        )
    assert torch.equal(out, plain) and out.requires_grad == plain.requires_grad
    assert found.dtype == torch.float32 and not found.requires_grad
    logits = query.detach().float() @ key.float().repeat_interleave(heads // kv_heads, 1).mT * 0.3
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    if kind != "none":
        logits[0, :, :, :3] = -torch.inf
    wanted = logits.logsumexp(-1)
    first = 0 if kind == "none" else 3
    near = 1e-5 if dtype == torch.float32 else 1e-3  # torch's CPU kernel has a quicker exponential for half types
    torch.testing.assert_close(found[0, :, first:], wanted[0, :, first:], atol=near, rtol=near)
    torch.testing.assert_close(found[1], wanted[1], atol=near, rtol=near)


@matrix("name,more,axis", [("efficient", "tt", False), ("cudnn", "ttiittt", True)])
@matrix("mode", [torch.no_grad, torch.inference_mode])
def test_kernels_that_must_be_asked(name, more, axis, mode):
    """cuDNN's and the efficient kernel write it on demand: asked for, and cut to the rows there are."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
    query, asked = torch.randn(2, 3, 5, 16), []

    def kernel(query, key, value, bias, compute_log_sumexp, *args, **kwargs):
        asked.append(compute_log_sumexp)
        lse = (query @ key.mT).logsumexp(-1)
        lse = lse[..., None] if axis else torch.nn.functional.pad(lse, (0, 27), value=7.0)
        lse = lse if compute_log_sumexp else lse[..., :0]
        return query + 1, lse, *[torch.zeros(()) if kind == "t" else 5 for kind in more]

    def attend(_):
        return operator(query, query, query, None, False)[0]

    library = torch.library.Library("aten", "IMPL")
    library.impl(operator, kernel, "CPU")
    try:
        with mode():
            out, found = attention_hook.call_with_lse(sdpa_attention_forward, query, attend)
            attend(None)
    finally:
        library._destroy()
    assert asked == [True, False] and torch.equal(out, query + 1)
    torch.testing.assert_close(found, (query @ query.mT).logsumexp(-1))


def test_asked_once_and_left_as_it_was(flash):
    """Only this call asks flash attention for it; transformers' functions stay what they are."""
    module, states = Attention(1, "flash_attention_2"), torch.zeros(1, 2, 5, 16)
    names = dict(vars(sys.modules["transformers.modeling_flash_attention_utils"]))
    flash.arguments.clear()
    attention_hook.call_with_lse(
        flash_attention_forward, states, lambda attend: attend(module, states, states, states, None)
    )
    flash_attention_forward(module, states, states, states, None)
    with pytest.raises(ZeroDivisionError):
        attention_hook.call_with_lse(flash_attention_forward, states, lambda _: 1 / 0)
    attention_hook.call_with_lse(
        flash_attention_forward, states, lambda attend: attend(module, states, states, states, None, dropout=0.1)
    )
    assert [call["return_attn_probs"] for call in flash.arguments] == [True, False, False]
    assert vars(sys.modules["transformers.modeling_flash_attention_utils"]) == names


def test_none_where_there_is_none():
    """A kernel that does not know the option, heads packed into rows, a backend that is not flash."""
    asked = []

    def kernel(q, k, v, softmax_scale=None):
        return q

    assert (
        attention_hook._asked(kernel, asked) is kernel
        and attention_hook._asked(None, asked) is None
        and attention_hook._asked(len, asked) is len
    )
    query, key = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 7, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert attention_hook.call_with_lse(sdpa_attention_forward, query, lambda _: attend(key, key, key))[1] is None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, found = attention_hook.call_with_lse(
            sdpa_attention_forward, key, lambda attend: attend(Attention(1, "sdpa"), key, key, key, None)
        )
    assert found is None
