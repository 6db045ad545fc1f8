"""Another image behind a cache that holds a pruned one, where images see themselves or windows slide: masks over both."""

from __future__ import annotations

import pytest
import torch

from tests.support.batches import make_batch, make_sample
from tests.support.cases import (
    ATOL,
    METHODS,
    REGIONS,
    as_argument,
    cache_of,
    decide,
    families,
    get_model,
    get_oracle,
    patched,
)
from tests.support.tiny_families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

MASKED = [name for name, family in FAMILIES.items() if "image" in family.mask]
TAIL = 6


@pytest.mark.parametrize("name", [None, *METHODS])
@families([*MASKED, "gemma4_small"])
def test_second_image(family, name):
    """Which tokens are of an image is told for the whole conversation, as these models want it; None: without a patch."""
    model, oracle, sizes = get_model(family), get_oracle(family), FAMILIES[family].sizes
    first, turn = make_sample(family, [5, sizes[0], 9], seed=40), make_sample(family, [3, sizes[1], TAIL], seed=51)
    together, (one, other) = first.joined(turn), REGIONS[0]
    before, after = make_batch([first], "none"), make_batch([turn], "none")
    types = FAMILIES[family].types(torch.tensor([together.ids]))
    inputs = after.inputs | types | {"attention_mask": torch.ones(1, len(together.ids))}
    if name is None:
        decision = oracle.keep_all(together)
        logits = model(**inputs, **as_argument(model, cache_of(model(**before.inputs)))).logits
    else:
        decision = decide(oracle, first, METHODS[name], [one])
        decision = decide(oracle, together, METHODS[name], [other], previous=decision)
        with patched(model, METHODS[name], before, [one]):
            cache = cache_of(model(**before.inputs))
        with patched(model, METHODS[name], after, [other]):
            logits = model(**inputs, **as_argument(model, cache)).logits
    wanted = oracle.forward(together, decision)[0]
    torch.testing.assert_close(logits[0, -TAIL:], wanted[-TAIL:], atol=ATOL, rtol=0)
