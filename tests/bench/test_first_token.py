"""FLOPs of encoders by formula are those that torch counts, pruned and unpruned."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import crop
from bench.latency.first_token import Everything, encoder_of
from crop.localizers.reading import Stop, run_until_stop
from crop.patching.planner import Planner
from tests.support.batches import standard_batch
from tests.support.cases import families, get_model, patched
from tests.support.tiny_families import FAMILIES

REGION = crop.Region.box(0.05, 0.05, 0.4, 0.45)


@pytest.mark.fast
@families(["llava", "llava_next", "internvl", "qwen2_5_vl", "qwen2_vl"])
def test_flops_are_those_that_are_counted(family):
    """But for rotary angles, which torch counts as products of batches where there are any."""
    model, batch, found = get_model(family, "eager"), standard_batch(family, "single", 1), []
    known = FAMILIES[family]
    sizes, processor = [batch.samples[0].images[0].size], known.processor and known.processor()
    aten, decoder = torch.ops.aten, getattr(model.model, known.decoder)

    def stop(*_):
        raise Stop

    for method in (Everything(), crop.EncoderPruning(ring=0)):
        plan = Planner(model, method, REGION, processor, sizes).plan(batch.inputs)
        with patched(model, method, batch, [REGION]):
            handle = decoder.register_forward_pre_hook(stop)
            with FlopCounterMode(display=False) as counter:
                run_until_stop(model.model, batch.inputs)
            handle.remove()
        counts = counter.get_flop_counts()["Global"]
        names = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
        counted = sum(flops for name, flops in counts.items() if name in names)
        assert encoder_of(model).flops([image.encoding for image in plan.images]) == counted
        found.append(counted)
    assert found[1] < found[0] or family == "llava"  # the tiny one's features are of the layer before its last
