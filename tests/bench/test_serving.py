"""The bench of a server under load, without one."""

from __future__ import annotations

import pytest
import transformers

from bench.latency import serving

pytestmark = pytest.mark.fast


def test_requests_hold_what_the_bench_says(tmp_path):
    serving.write_model(str(tmp_path))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    one, other = serving.request(1, {}), serving.request(2, {})
    inputs = processor(text=one["prompt"], images=one["multi_modal_data"]["image"], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == serving.TOKENS + serving.QUESTION
    assert int((inputs["input_ids"] == serving.WORDS).sum()) == serving.TOKENS
    assert one["prompt"] != other["prompt"]
    assert one["multi_modal_data"]["image"].tobytes() != other["multi_modal_data"]["image"].tobytes()


def test_ratios_are_of_the_same_round():
    def run(rate: float) -> dict:
        return {"rate": rate, "first": [1 / rate, 2 / rate], "blocks": 3.4}

    runs = {"whole": [run(1.0), run(4.0)], "11 %": [run(3.0), run(8.0)]}
    row = serving.row(8, "11 %", runs, 2)
    assert row["times as many"] == 2.5 and row["requests"] == 4 and row["KV blocks"] == 3
    assert row["TTFT p95, s"] == pytest.approx(2 / 3) and serving.row(8, "whole", runs, 2)["times as many"] == 1
