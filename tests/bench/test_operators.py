"""What the benches of operators and receipts do before and around their figures: checks, rounds, areas."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from bench.kernels import cpu, cuda
from bench.kernels.peers import peers_of
from bench.kernels.torch_forms import ROUGH, forms_of, in_order
from crop.geometry.region import Region
from crop.selftest.cases import CASES


class Clock:
    """Time passes by what calls are said to take, so that no result depends on the machine."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, result: torch.Tensor):
        def call() -> torch.Tensor:
            self.now += seconds
            return result

        return call


def case(peer: torch.Tensor, clock: Clock):
    ours = clock.takes(1.0, torch.ones(3))
    return cpu.Case("op", "shape", "float32", ours, {"peer": clock.takes(3.0, peer)}, torch.equal, 1.0)


@pytest.mark.fast
def test_a_wrong_contender_is_not_timed() -> None:
    with pytest.raises(SystemExit, match="op shape float32: peer disagrees with crop"):
        cpu.measure(case(torch.zeros(3), clock := Clock()), 2, 1.0, clock)


@pytest.mark.parametrize(("limit", "rounds"), [(1e6, 7), (0.0, 5)])
def test_rounds_end_after_some_seconds_but_not_before_the_fifth(limit: float, rounds: int) -> None:
    row = cpu.measure(case(torch.ones(3), clock := Clock()), 7, limit, clock)
    assert row["rounds"] == rounds and row["met"] == "yes" and row["ratio"] == 3


@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_cases_hold_what_crop_and_torch_compute(name: str) -> None:
    """Every case on small tensors: crop exactly, plain torch up to its rounding, and a wrong result noticed."""
    for case in CASES[name](torch.device("cpu"), full=False):
        assert case.error(case.crop()) == 0, (case.op, case.shape)
        forms = forms_of(case)
        for call in forms.values():
            assert case.error(in_order(case, call())) <= ROUGH.get(case.op, 0), (case.op, case.shape)
        wrong = case.crop()
        first = wrong[0] if isinstance(wrong, list | tuple) else wrong
        first[..., :1] += 1
        assert case.error(wrong) > 0, (case.op, case.shape)
        assert set(cuda.goals(case).least) <= {*forms, *peers_of(case)} and cuda.floor_us(case, 1e12) > 0


@pytest.mark.parametrize(
    ("boxes", "answer", "expected"),
    [
        (((0.0, 0.0, 0.5, 0.5),), (0.0, 0.0, 0.5, 0.5), (1.0, 1.0, 0.25)),
        (((0.0, 0.0, 1.0, 1.0),), (0.2, 0.2, 0.4, 0.7), (1.0, 0.1, 1.0)),
        (((0.0, 0.0, 0.5, 0.5),), (0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.25)),
        # Overlapping boxes count once; half of the answer lies inside.
        (((0.0, 0.0, 0.4, 0.2), (0.2, 0.0, 0.6, 0.2)), (0.5, 0.0, 0.7, 0.2), (0.5, 0.02 / 0.14, 0.12)),
    ],
)
def test_overlap_of_region_and_answer(boxes: tuple, answer: tuple, expected: tuple) -> None:
    pytest.importorskip("rapidocr", reason="extra ocr")
    found = importlib.import_module("bench.accuracy.receipts").overlap(Region(boxes), answer)
    assert found == pytest.approx(expected)


def test_answers_on_annotated_receipts() -> None:
    """The row that settings are chosen by, on the words that are really there."""
    for module in ("rapidocr", "onnxruntime", "all_minilm_l6_v2"):
        pytest.importorskip(module, reason="extra ocr")
    receipts, tune = (
        importlib.import_module("bench.localizers.receipts"),
        importlib.import_module("bench.localizers.tune_ocr"),
    )
    try:
        some = [receipt for receipt in receipts.load() if not receipt.development][:3]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    localizer = importlib.import_module("crop.localizers.ocr").OCRLocalizer()
    every = [tune.Seen(one, asked, localizer.rank(one.annotated(), asked.text)) for one in some for asked in one.asked]
    row = tune.row(localizer, every)
    assert row["missed"] == 0 and 0.02 < row["area"] < 0.2
    turned = [replace(one, ranked=replace(one.ranked, found=one.ranked.found[::-1])) for one in every]
    assert tune.row(localizer, turned)["missed"] > len(every) // 2  # the same lines, each with another's probability
