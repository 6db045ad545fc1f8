"""What holds for every operator: repeatable, known to torch's compiler, and a clear error for bad input."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from crop import backend, ops
from crop.ops import dispatch, reference
from tests.support.operators import (
    NAN,
    Backend,
    mass_inputs,
    random_plan,
    same,
)

MODES = ["mean", "weighted", "max"]


@contextlib.contextmanager
def threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """One substantial call of every operator: function, arguments, keyword arguments."""
    query, key = mass_inputs(2, 8, 2, 40, 700, 64, dtype=torch.bfloat16)
    index = torch.arange(600).expand(2, 600).contiguous()
    plan, tokens = random_plan(2000, 700), torch.randn(2000, 200)
    hidden = torch.randn(2, 600, 300)
    kept = torch.arange(0, 600, 3).expand(2, 200).contiguous()
    scores = torch.randn(40, 3000).round(decimals=1)
    return {
        "attention_mass": (ops.attention_mass, (query, key, index), {}),
        "attention_mass lse": (ops.attention_mass, (query, key, index), {"lse": torch.ones(2, 8, 40)}),
        "attention_mass few": (ops.attention_mass, (query[:, :, :1], key, index), {}),
        "region_topk": (ops.region_topk, (query, key, index, 100), {}),
        "select": (ops.select, (scores, list(range(0, 2000, 50))), {}),
        "pack": (ops.pack, (scores > 0.5, 3000), {"kept": torch.arange(40)[:, None]}),
        "compact": (ops.compact, ([hidden, hidden[..., 0].contiguous()], kept), {}),
        "spread": (ops.spread, (tokens[:200], tokens[0], 90, 4), {"fresh": True}),
        "saliency": (ops.saliency, (tokens, torch.arange(2000).view(4, 500)), {}),
        "pool mean": (ops.adaptive_pool, (tokens, plan), {}),
        "pool weighted": (ops.adaptive_pool, (tokens, plan, "weighted", torch.rand(2000)), {}),
        "pool max": (ops.adaptive_pool, (tokens, plan, "max"), {}),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_repeatable_and_thread_independent(native: Backend, name: str) -> None:
    function, args, kwargs = operator_calls()[name]
    before = [t.clone() for t in args if isinstance(t, Tensor)]

    def run() -> list[Tensor]:
        result = native(function, *args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    with threads(1):
        expected = run()
    for count in (1,) if native.emulated else (1, 2, 8):  # of CPU threads
        with threads(count):
            for a, b in zip(run(), expected, strict=True):
                same(a, b)
    for a, b in zip([t for t in args if isinstance(t, Tensor)], before, strict=True):
        assert torch.equal(a, b)  # inputs are never written


def test_pool_of_threads_survives_fork() -> None:
    """A child inherits the pool but not its threads; it must start its own instead of waiting for ever."""
    import os

    function, args, kwargs = operator_calls()["pool mean"]
    with threads(2):
        expected = function(*args, **kwargs)
        child = os.fork()
        if child == 0:
            ok = False
            with contextlib.suppress(BaseException):
                tokens, plan = args
                out, code = torch.empty_like(expected), 0
                code = dispatch.native and dispatch.native.adaptive_pool(
                    -1, 2, tokens.data_ptr(), plan.members.data_ptr(), plan.offsets.data_ptr(), 0, out.data_ptr(), 0,
                    *tokens.shape, len(plan.members), plan.num_out, tokens.stride(0), 0, 0,
                )  # fmt: skip
                ok = dispatch.native is None or (code == 0 and out.numpy().tobytes() == expected.numpy().tobytes())
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_opcheck() -> None:
    query, key = mass_inputs(2, 4, 2, 5, 40, 16)
    index, score = torch.arange(30).expand(2, 30).contiguous(), torch.randn(2, 30)
    plan = random_plan(30, 8, dropped=2)
    tokens, weight = torch.randn(30, 6, requires_grad=True), torch.rand(30, requires_grad=True)
    hidden = torch.randn(2, 30, 6, requires_grad=True)
    crop, priority = torch.ops.crop, torch.zeros(2, 30, dtype=torch.int8)
    check = torch.library.opcheck
    check(crop.attention_mass.default, (query, key, index, None, None, 0.25, None, None))
    permuted = query.transpose(1, 2).contiguous().transpose(1, 2)
    check(crop.attention_mass.default, (permuted, key, index, torch.tensor([1, 0]), torch.ones(2, 4, 5), 0.25,
                                        torch.tensor([0, 2]), torch.full((2, 5), 30)))  # fmt: skip
    check(crop.select.default, (score, [3, 7], None, None, None))
    check(crop.select.default, (score, [3, 7], score, priority, index))
    check(crop.pack.default, (score > 0, 30, None, None))
    check(crop.pack.default, (score > 0, 30, index[:1, :4], torch.tensor([1])))
    check(crop.compact.default, ([hidden, hidden.detach().transpose(1, 2)], index[:, ::3].contiguous(), [1, 2]))
    check(crop.invert_index.default, (index, 40))
    check(crop.spread.default, (score.mT @ score, score[0], 9, 2, True))
    check(crop.saliency.default, (tokens.detach(), index[:, ::2], tokens[:, 0] > 0, 4.0, 8.0, 1e-3))
    for mode in MODES:
        w = weight if mode == "weighted" else None
        check(crop.adaptive_pool.default, (tokens, plan.members, plan.offsets, plan.inverse, w, mode))
    check(crop.adaptive_pool.default, (tokens.detach(), plan.members, plan.offsets, None, None, "max"))


def test_compile_without_graph_breaks() -> None:
    query, key = mass_inputs(1, 4, 2, 5, 40, 16)
    index = torch.arange(30)[None]

    def step(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
        kept = ops.region_topk(query, key, index, 9)
        return ops.compact([hidden * 2], kept)[0].sum(1)

    hidden = torch.randn(1, 40, 8, requires_grad=True)
    expected = step(query, key, hidden)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, hidden), expected)


# --- errors ---------------------------------------------------------------------------------------------------------

Q, K = mass_inputs(2, 4, 2, 3, 20, 8)
V = torch.arange(10).expand(2, 10)
PLAN = random_plan(10, 4)
X = torch.randn(10, 4)
A = torch.randn(10, 10)
BAD = [  # call, exception, what the message must say
    (lambda: ops.attention_mass(Q.double(), K.double(), V), TypeError, "query must be float32 or bfloat16 or float16, got"),
    (lambda: ops.attention_mass(Q, K.half(), V), TypeError, "key must be float32, got torch.float16"),
    (lambda: ops.attention_mass(Q[0], K, V), ValueError, r"query must have 4 dimensions, got shape \(4, 3, 8\)"),
    (lambda: ops.attention_mass(Q, K[:1], V), ValueError, r"key must have shape \(2, any, any, 8\), got \(1, 2, 20, 8\)"),
    (lambda: ops.attention_mass(Q, K[..., :4], V), ValueError, "key must have shape"),
    (lambda: ops.attention_mass(Q[:, :3], K, V), ValueError, "num_heads must be a multiple of num_kv_heads=2, got 3"),
    (lambda: ops.attention_mass(Q.transpose(2, 3), K[..., :3], V), ValueError, "query must have a last stride of 1"),
    (lambda: ops.attention_mass(torch.zeros(1, 1, 1, 257), torch.zeros(1, 1, 1, 257), V[:1]), ValueError, "head_dim"),
    (lambda: ops.attention_mass(Q, K, V.float()), TypeError, "vision_index must be int64 or int32, got torch.float32"),
    (lambda: ops.attention_mass(Q, K, V + 11), ValueError, "vision_index must be at least -1 and less than 20, got 20"),
    (lambda: ops.attention_mass(Q, K, V - 2), ValueError, "vision_index must be at least -1 and less than 20, got -2"),
    (lambda: ops.attention_mass(Q, K, V[:1]), ValueError, "sample must be given unless images=1 equals batch=2, got None"),
    (lambda: ops.attention_mass(Q, K, V, sample=torch.tensor([0, 2])), ValueError, "sample must be at least 0 and less than 2"),
    (lambda: ops.attention_mass(Q, K, V, lse=torch.zeros(2, 3, 4)), ValueError, r"lse must have shape \(2, 4, 3\)"),
    (lambda: ops.attention_mass(Q, K, V, lse=torch.zeros(2, 4, 3).half()), TypeError, "lse must be float32"),
    (lambda: ops.attention_mass(Q, K, V, visible_len=torch.zeros(2, 4)), TypeError, "visible_len must be int64 or int32"),
    (lambda: ops.attention_mass(Q, K, V, scale=NAN), ValueError, "scale must be finite, got nan"),
    (lambda: ops.attention_mass(Q, K, V.to("meta")), ValueError, "vision_index must be on cpu, got meta"),
    (lambda: ops.attention_mass(Q.numpy(), K, V), TypeError, "query must be a Tensor, got ndarray"),
    (lambda: ops.select(V.float(), 11), ValueError, r"select: num_keep\[0\] must be in \[0, num_vision=10\], got 11"),
    (lambda: ops.select(V.float(), [1, -1]), ValueError, r"num_keep\[1\] must be in \[0, num_vision=10\], got -1"),
    (lambda: ops.select(V.float(), [1]), ValueError, r"num_keep must have one entry per image \(2\), got 1"),
    (lambda: ops.select(V.float(), 0.5), TypeError, r"num_keep\[0\] must be an int, got 0.5"),
    (lambda: ops.select(V.float(), torch.tensor([1, 1])), TypeError, "num_keep must be an int or a list of ints"),
    (lambda: ops.select(V, 1), TypeError, "score must be float32, got torch.int64"),
    (lambda: ops.select(V.float(), 1, priority=V), TypeError, "priority must be int8, got torch.int64"),
    (lambda: ops.select(V.float(), 1, weight=X), ValueError, r"weight must have shape \(2, 10\), got \(10, 4\)"),
    (lambda: ops.region_topk(Q, K, V, 11), ValueError, r"region_topk: num_keep\[0\] must be in \[0, num_vision=10\], got 11"),
    (lambda: ops.pack(V, 3), TypeError, "pack: stays must be bool, got torch.int64"),
    (lambda: ops.pack(V > 4, 4), ValueError, "pack: width must be at least 5, the tokens of a sample that stay, got 4"),
    (lambda: ops.pack(V > 4, 5, kept=V[:, :1]), ValueError, "pack: width must be at least 6, the tokens of a sample that"),
    (lambda: ops.pack(V > 4, -1), ValueError, "pack: width must be at least 0, got -1"),
    (lambda: ops.pack(V > 4, 7.0), TypeError, "pack: width must be an int, got 7.0"),
    (lambda: ops.pack(V > 4, 10, kept=V + 1), ValueError, "pack: kept must be less than 10, got 10"),
    (lambda: ops.pack(V > 4, 10, kept=V.float()), TypeError, "pack: kept must be int64 or int32, got torch.float32"),
    (lambda: ops.pack(V > 4, 10, kept=V[:1]), ValueError, "sample must be given unless images=1 equals batch=2, got None"),
    (lambda: ops.pack(V > 4, 10, kept=V[:1], sample=torch.tensor([2])), ValueError, "sample must be at least 0 and less than 2"),
    (lambda: ops.pack(V > 4, 10, sample=torch.tensor([0])), ValueError, "sample must be left out without kept, got a tensor"),
    (lambda: ops.compact([], V), ValueError, "tensors must be a non-empty sequence"),
    (lambda: ops.compact(X, V), ValueError, "tensors must be a non-empty sequence of tensors, got Tensor"),
    (lambda: ops.compact([K], V, token_dim=4), ValueError, r"token_dim\[0\] must be in \[1, 4\), got 4"),
    (lambda: ops.compact([K], V, token_dim=[2, 2]), ValueError, r"token_dim must have one entry per tensor \(1\), got 2"),
    (lambda: ops.compact([K[:1]], V, token_dim=2), ValueError, r"tensors\[0\] must have batch size 2"),
    (lambda: ops.compact([K], V.float(), token_dim=2), TypeError, "index must be int64 or int32"),
    (lambda: ops.compact([K], V + 15, token_dim=2), ValueError, "index must be less than 20, got"),
    (lambda: ops.compact([K], V.flip(1), token_dim=2), ValueError, "index must be strictly ascending where not negative"),
    (lambda: ops.compact([K], V * 0, token_dim=2), ValueError, "index must be strictly ascending where not negative"),
    (lambda: ops.compact([K.unsqueeze(-1)[..., ::2, :]], V, token_dim=2), ValueError, "must be contiguous after axis 2"),
    (lambda: ops.compact([torch.zeros(2, 3, 4, 20)[:, :, :3]], V, token_dim=3), ValueError, "axes 1..2 that merge into one"),
    (lambda: ops.compact([K.to("meta")], V, token_dim=2), ValueError, r"tensors\[0\] must be on cpu, got meta"),
    (lambda: ops.spread(A.double(), A[0], 3), TypeError, "spread: alike must be float32, got torch.float64"),
    (lambda: ops.spread(A, A[0].int(), 3), TypeError, "spread: near must be float32, got torch.int32"),
    (lambda: ops.spread(A[:9], A[0], 3), ValueError, r"spread: alike must have shape \(10, 10\), got \(9, 10\)"),
    (lambda: ops.spread(A[0], A[0], 3), ValueError, r"spread: alike must have 2 dimensions, got shape \(10,\)"),
    (lambda: ops.spread(A, A, 3), ValueError, r"spread: near must have 1 dimensions, got shape \(10, 10\)"),
    (lambda: ops.spread(A.T, A[0], 3), ValueError, r"spread: alike must have a last stride of 1, got strides \(1, 10\)"),
    (lambda: ops.spread(A.to("meta"), A[0], 3), ValueError, "spread: alike must be on cpu, got meta"),
    (lambda: ops.spread(A, A[0], 11), ValueError, r"spread: count must be in \[0, num_tokens=10\], got 11"),
    (lambda: ops.spread(A[:0, :0], A[0, :0], 1), ValueError, r"spread: count must be in \[0, num_tokens=0\], got 1"),
    (lambda: ops.spread(A, A[0], -1), ValueError, r"spread: count must be in \[0, num_tokens=10\], got -1"),
    (lambda: ops.spread(A, A[0], 0.5), TypeError, "spread: count must be an int, got 0.5"),
    (lambda: ops.spread(A, A[0], 3, 0), ValueError, "spread: at_once must be at least 1, got 0"),
    (lambda: ops.spread(A, A[0], 3, True), TypeError, "spread: at_once must be an int, got True"),
    (lambda: ops.saliency(X.double(), V), TypeError, "saliency: tokens must be float32 or bfloat16 or float16, got"),
    (lambda: ops.saliency(X, V + 1), ValueError, "saliency: index must be at least -1 and less than 10, got 10"),
    (lambda: ops.saliency(X, V - 2), ValueError, "saliency: index must be at least -1 and less than 10, got -2"),
    (lambda: ops.saliency(X, V[0]), ValueError, r"saliency: index must have 2 dimensions, got shape \(10,\)"),
    (lambda: ops.saliency(X, V, alone=X > 0), ValueError, "saliency: alone must have 1 dimensions"),
    (lambda: ops.saliency(X, V, alone=X[:, 0]), TypeError, "saliency: alone must be bool, got torch.float32"),
    (lambda: ops.saliency(X, V, flat=0), ValueError, "saliency: flat must be above 0 and finite, got 0.0"),
    (lambda: ops.adaptive_pool(X[:9], PLAN), ValueError, r"tokens must have shape \(10, any\), got \(9, 4\)"),
    (lambda: ops.adaptive_pool(X.double(), PLAN), TypeError, "tokens must be float32 or bfloat16 or float16"),
    (lambda: ops.adaptive_pool(X, PLAN, "median"), ValueError, "mode must be one of mean, weighted, max, got 'median'"),
    (lambda: ops.adaptive_pool(X, PLAN, "weighted"), ValueError, "weight must be given if and only if"),
    (lambda: ops.adaptive_pool(X, PLAN, "mean", torch.ones(10)), ValueError, "weight must be given if and only if"),
    (lambda: ops.adaptive_pool(X, PLAN, "weighted", torch.ones(9)), ValueError, r"weight must have shape \(10,\), got \(9,\)"),
    (lambda: ops.adaptive_pool(X.T.contiguous().T, PLAN), ValueError, "tokens must have a last stride of 1"),
    (lambda: ops.use_backend("fast").__enter__(), ValueError, 'name must be "auto", "native" or "twin", got \'fast\''),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, error, message = BAD[case]
    for name in ("twin", "auto"):
        with (
            pytest.raises(error, match=message),
            ops.use_backend(name) if case != len(BAD) - 1 else contextlib.nullcontext(),
        ):
            call()


def test_memory_is_protected_below_the_checks() -> None:
    """The launchers refuse plans and sizes that the public functions would have caught, without reading memory."""
    if dispatch.native is None:
        pytest.skip("no kernels were compiled")
    plan = PLAN
    far = plan.members + 100
    with pytest.raises(ValueError, match="plan members must be in"):
        torch.ops.crop.adaptive_pool(X, far, plan.offsets, None, None, "mean")
    with pytest.raises(ValueError, match="plan offsets must ascend"):
        torch.ops.crop.adaptive_pool(X, plan.members, plan.offsets + 100, None, None, "mean")
    with pytest.raises(ValueError, match="num_keep must be in"):
        torch.ops.crop.select(V.float(), [11, 0], None, None, None)
    with pytest.raises(ValueError, match="count must be in"):
        torch.ops.crop.spread(A, A[0], 11, 1, False)
    assert dispatch.native.set_isa("mmx") < 0 and "set_isa" in dispatch.native.last_error()


def test_backends() -> None:
    seen = []
    original = reference.select
    reference.select = lambda *a, **k: seen.append("twin") or original(*a, **k)  # type: ignore[assignment]
    try:
        with ops.use_backend("twin"):
            ops.select(V.float(), 1)
        assert seen == ["twin"]
        ops.select(V.float(), 1)
        assert len(seen) == (1 if dispatch.native else 2)
        if dispatch.native is None:
            with pytest.raises(RuntimeError, match="reinstall"), ops.use_backend("native"):
                ops.select(V.float(), 1)
    finally:
        reference.select = original
    assert backend.chosen.get() == "auto"
