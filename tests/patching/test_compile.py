"""Compiled layers inside a block: right, whole outside of the attention hook, and not compiled again for another region."""

from __future__ import annotations

import pytest
import torch

from crop.geometry.region import Region
from crop.methods import InnerLLMPruning
from tests.support.batches import standard_batch
from tests.support.cases import ATOL, families, patched
from tests.support.tiny_families import THOROUGH, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = InnerLLMPruning(0.25, layer=2)
REGIONS = (Region.box(0.1, 0.1, 0.5, 0.5), Region.box(0.4, 0.4, 0.9, 0.9), Region.box(0.2, 0.5, 0.6, 0.9))


@families(THOROUGH)
def test_compiled_layers(family):
    """Compiled before the block, as servers do it; the only breaks are those at the attention hook of the scoring layer."""
    model, batch = build_model(family), standard_batch(family, "single", 1)
    wanted = []
    for region in REGIONS:
        with torch.no_grad(), patched(model, METHOD, batch, region):
            wanted.append(model(**batch.inputs).logits)
    torch._dynamo.reset()
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    counters, broken, compiled = torch._dynamo.utils.counters, set(), []
    with torch.no_grad():
        model(**batch.inputs)
        for region, logits in zip(REGIONS, wanted, strict=True):
            counters.clear()
            with patched(model, METHOD, batch, region):
                got = model(**batch.inputs).logits
            torch.testing.assert_close(got, logits, atol=ATOL, rtol=0)
            broken |= set(counters["graph_break"])
            compiled.append(counters["frames"]["total"])
    assert broken and all(
        "torch.compiler.disable" in reason and "attention_hook.<locals>" in reason for reason in broken
    )
    assert compiled[0] > 0 and compiled[-1] == 0  # the second run adds what the first left to be interpreted
    torch._dynamo.reset()
