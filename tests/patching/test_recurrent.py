"""Decoders some of whose layers carry a state on (Qwen3.5): what the contract does not show."""

from __future__ import annotations

import pytest
import torch
import transformers

from crop.methods import InnerLLMPruning
from crop.models.registry import families as known
from tests.support.batches import Batch, make_batch, make_sample, standard_batch
from tests.support.cases import ATOL, METHODS, REGIONS, as_argument, decide, get_model, get_oracle, patched

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = "qwen3_5"


def turns(rows: int) -> tuple[Batch, list]:
    """First turns with an image each, and second ones with another."""
    first = [make_sample(FAMILY, [5, (48, 32), 9], seed=40 + row) for row in range(rows)]
    sizes = [(24, 40), (48, 32)]
    return make_batch(first, "none"), [make_sample(FAMILY, [3, sizes[row], 6], seed=50 + row) for row in range(rows)]


@pytest.mark.parametrize("name", list(METHODS))
def test_second_image(name):
    """A state that already holds a pruned image goes on with another one."""
    model, oracle = get_model(FAMILY), get_oracle(FAMILY)
    batch, (turn,) = turns(1)
    together = batch.samples[0].joined(turn)
    one, other = REGIONS[0]
    decision = decide(oracle, batch.samples[0], METHODS[name], [one])
    decision = decide(oracle, together, METHODS[name], [other], previous=decision)
    positions = oracle.positions(together)[:, None, -len(turn.ids) :]
    with patched(model, METHODS[name], batch, [one]):
        cache = model(**batch.inputs).past_key_values
    second = make_batch([turn], "none")
    inputs = second.inputs | {"attention_mask": torch.ones(1, len(together.ids)), "position_ids": positions}
    with patched(model, METHODS[name], second, [other]):
        logits = model(**inputs, **as_argument(model, cache)).logits
    wanted = oracle.forward(together, decision)[0]
    torch.testing.assert_close(logits[0, -6:], wanted[-6:], atol=ATOL, rtol=0)


def test_a_ragged_batch_behind_a_cache_is_refused():
    """Fillers would stand behind a state that is not empty, which decays over them."""
    model, (batch, second) = get_model(FAMILY), turns(2)
    with patched(model, METHODS["budget"], batch, list(REGIONS[0])):
        cache = model(**batch.inputs).past_key_values
    later = make_batch(second, "left")
    mask = torch.cat([batch.inputs["attention_mask"], later.inputs["attention_mask"]], 1)
    with (
        patched(model, METHODS["budget"], later, list(REGIONS[0])),
        pytest.raises(
            ValueError, match="equally many tokens in every sample .* got a ragged batch; process the samples"
        ),
    ):
        model(**later.inputs | {"attention_mask": mask}, **as_argument(model, cache))


@pytest.mark.parametrize(
    "method,message",
    [
        (InnerLLMPruning(keep=0.3, layer=3), r"i.e. be one of \[2\], got 3: layer 2 is recurrent and cannot score"),
        (InnerLLMPruning(mode="strict", layer=1), r"layer must be > 1, the first with attention, for 'qwen3_5', got 1"),
    ],
)
def test_where_cuts_are_refused(method, message):
    model, batch = get_model(FAMILY), standard_batch(FAMILY, "single", 1)
    with pytest.raises(ValueError, match=message), patched(model, method, batch, list(REGIONS[0][:1])):
        model(**batch.inputs)


def test_the_default_cut():
    """Every fourth layer of the real models is one of full attention."""
    config = transformers.Qwen3_5Config().text_config
    assert known()[FAMILY].default_layer(config) == 4 and known()[FAMILY].scoring_layers(config)[:2] == [3, 7]
