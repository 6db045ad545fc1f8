"""``output_hidden_states`` inside a block: every state at the length of the input."""

from __future__ import annotations

import pytest
import torch

from crop.methods import Pyramid
from tests.support.batches import standard_batch
from tests.support.cases import METHODS, get_model, patched, regions_of
from tests.support.tiny_families import THOROUGH

ALL = METHODS | {"pyramid": Pyramid.steps((1, 3), keep=0.5)}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.fast]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("family", THOROUGH)
def test_every_state_has_the_input_length(family, name):
    """Up to the first cut or pooling they are the unpatched ones; the last is the output; dropped tokens keep what they had."""
    model, batch = get_model(family), standard_batch(family, "left", 1)
    length = batch.inputs["input_ids"].shape[1]
    plain = model(**batch.inputs, output_hidden_states=True).hidden_states
    with patched(model, ALL[name], batch, regions_of(batch)) as stats:
        out = model(**batch.inputs, output_hidden_states=True)
        alone = model(**batch.inputs).logits
    assert torch.equal(out.logits, alone)
    assert [state.shape[1] for state in out.hidden_states] == [length] * len(plain)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, atol=1e-5, rtol=0)
    if stats.tokens_before != stats.tokens_after_plc:
        return
    real = batch.inputs["attention_mask"].bool()
    layers = [layer for layer in stats.tokens_from if layer]
    for before in range(layers[0] + 1):
        torch.testing.assert_close(out.hidden_states[before][real], plain[before][real], atol=1e-5, rtol=0)
    # What leaves at the first cut keeps, behind every later layer, what it had there.
    position = stats.layouts[0].position
    gone = torch.tensor(sorted(set(range(len(position))) - set(stats.kept_at(layers[0])[0].tolist())))
    assert len(gone)
    for behind in range(layers[0] + 1, len(plain) - 1):
        found, wanted = (out.hidden_states[index][0, position[gone]] for index in (behind, layers[0]))
        assert torch.equal(found, wanted)
