"""What only a GPU can show: graphs, synchronisation, streams, and patched models on torch's own flash attention."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import crop
from crop import ops
from tests.support.batches import standard_batch
from tests.support.cases import families
from tests.support.operators import BACKENDS, mass_inputs, random_plan
from tests.support.tiny_families import THOROUGH, build_model

DEVICE = "cuda"
MISSING = BACKENDS["cuda"].missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


class Cut:
    """Score, select, move and choose greedily: everything a layer does, and pooling, on buffers that keep their place."""

    def __init__(self, rows: int, tokens: int, heads: int = 8, kv_heads: int = 2) -> None:
        query, key = mass_inputs(2, heads, kv_heads, rows, tokens, 64, dtype=torch.bfloat16)
        self.query, self.key = query.to(DEVICE), key.to(DEVICE)
        self.index = torch.arange(tokens, device=DEVICE).expand(2, tokens).contiguous()
        self.length = torch.full((2, rows), tokens, device=DEVICE)
        self.hidden = torch.randn(2, tokens, 96, device=DEVICE)
        self.lse = torch.full((2, heads, rows), 3.0, device=DEVICE)
        self.alike = torch.randn(tokens, tokens, device=DEVICE)

    def __call__(self, given: bool) -> tuple[Tensor, ...]:
        lse = self.lse if given else None
        mass = ops.attention_mass(self.query, self.key, self.index, lse=lse, visible_len=self.length)
        kept = ops.select(mass, [100, 60], index=self.index)
        return mass, kept, ops.compact([self.hidden], kept)[0], ops.spread(self.alike, mass[0], 40, 3)


@pytest.mark.parametrize("heads", [(8, 2), (32, 32)])  # the second in clusters, from sm_90 on
@pytest.mark.parametrize("given", [True, False])
def test_graph_replays_other_values_and_lengths(given: bool, heads: tuple[int, int]) -> None:
    cut = Cut(9, 700, *heads)
    cut(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cut(given)
    for seed in range(3):
        torch.manual_seed(seed)
        for tensor in (cut.query, cut.key, cut.hidden, cut.alike):
            tensor.normal_()
        cut.length.random_(200, 701)
        graph.replay()
        replayed = [t.clone() for t in captured]
        for a, b in zip(replayed, cut(given), strict=True):
            assert torch.equal(a, b)


def test_no_synchronisation_and_any_stream() -> None:
    cut, plan = Cut(3, 300), random_plan(300, 40).to(DEVICE)
    tokens = torch.randn(300, 64, device=DEVICE)
    expected = (*cut(False), ops.adaptive_pool(tokens, plan))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append((*cut(False), ops.adaptive_pool(tokens, plan)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for result in results:
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)


FIRST = """
import torch
from crop import ops
torch.manual_seed(0)
query, key = (torch.randn(1, 8, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 300))
index = torch.arange(300, device="cuda")[None]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = ops.region_topk(query, key, index, 100, return_scores=True)
graph.replay()
for a, b in zip(captured, ops.region_topk(query, key, index, 100, return_scores=True)):
    assert torch.equal(a, b)
"""


def test_a_graph_may_hold_the_first_call_of_all() -> None:
    """Kernels are loaded when they are asked for first, here inside the capture."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_name_the_device() -> None:
    query, key = (t.to(torch.bfloat16) for t in mass_inputs(1, 8, 2, 4, 300, 64))
    index = torch.arange(300)[None]
    results = []
    for device in ("cuda:0", "cuda:1"):  # the current one is the first
        given = (t.to(device) for t in (query, key, index))
        kept, mass = ops.region_topk(*given, 100, return_scores=True)
        assert kept.device == mass.device == torch.device(device)
        results.append((kept.cpu(), mass.cpu()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


FLASH = ["sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]


@pytest.mark.parametrize("attention", FLASH)
@families(THOROUGH)
def test_patch_on_flash_attention(family: str, attention: str) -> None:
    """Keeping all changes nothing; pruning keeps what was asked for, and the kernels choose what plain torch chooses."""
    model = build_model(family, "sdpa").to(DEVICE, torch.bfloat16)
    model.set_attn_implementation(attention)
    inputs = {name: value.to(DEVICE) if isinstance(value, Tensor) else value
              for name, value in standard_batch(family, "single", 1).inputs.items()}  # fmt: skip
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    inputs.pop("attention_mask", None)  # one sample without padding: a mask would forbid torch's flash kernel
    region = crop.Region.box(0.2, 0.2, 0.7, 0.7)
    processor = type("Resize", (), {"do_resize": True, "do_center_crop": False, "do_pad": False})()

    def run(method: Any, backend: str = "native") -> tuple[Tensor, Any]:
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with torch.no_grad(), ops.use_backend(backend), sdpa_kernel(kernels, set_priority=True):
            if method is None:
                return model(**inputs).logits, None
            with crop.patch(model, method, region, processor=processor) as stats:
                return model(**inputs).logits, stats

    plain, _ = run(None)
    torch.testing.assert_close(run(crop.InnerLLMPruning(keep=1.0))[0], plain, rtol=0, atol=0)
    method = crop.InnerLLMPruning(keep=0.5)
    (native, stats), (_, wanted) = run(method), run(method, "twin")
    assert native.isfinite().all() and stats.tokens_after_ilp == wanted.tokens_after_ilp
    same = {int(i) for i in stats.kept[0]} & {int(i) for i in wanted.kept[0]}
    assert len(same) >= 0.9 * len(stats.kept[0])  # equal but for rounding at the threshold
