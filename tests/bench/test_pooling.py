"""Benches that ask one model in several ways: what each way changes, cuts by layer, real pages."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tqdm")


from bench.accuracy import layers, pooling, real  # noqa: E402
from bench.accuracy.asking import Reply, Run, answers  # noqa: E402
from bench.accuracy.data import Item, rendered  # noqa: E402
from bench.pictures import SEEDS, ask_model  # noqa: E402
from crop.geometry.layout import VisionLayout  # noqa: E402
from crop.geometry.region import Region  # noqa: E402
from crop.methods import PreLLMCompression  # noqa: E402
from crop.patching.patch import patch  # noqa: E402

LAYOUT = VisionLayout.grid(24, 24)
PLC = PreLLMCompression(keep=0.2, mode="mean")


@pytest.fixture(scope="module")
def run():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Run(SEEDS["try"], ask_model(None, "cpu", "auto"), 4, None)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def items(run) -> list[Item]:
    return list(islice(rendered(run.first, whole=False), 3))


def seen(run, items, method, around, inside: bool = False) -> dict:
    """What the decoder, or its first attention, is called with in the prefill."""
    images, regions = [item.picture() for item in items], [item.region for item in items]
    inputs = run.asker.encode_batch([[image] for image in images], [item.question for item in items])
    found = {}

    def note(module, args, kwargs):
        found.update(kwargs)

    language = pooling.decoder(run)
    sizes = [image.size for image in images]
    with (
        torch.no_grad(),
        patch(run.asker.model, method, regions, processor=run.asker.processor, image_size=sizes) as stats,
        around.batch(run, inputs, regions, stats),
        pooling.hooked([language.layers[0].self_attn if inside else language], note),
    ):
        run.asker.model(**inputs)
    return found | {"image": inputs["input_ids"] == run.asker.model.config.image_token_id, "stats": stats}


def test_blurred_tokens_are_the_means_of_their_cells_where_they_were(run, items):
    plain, blurred = (seen(run, items, None, way) for way in (pooling.Around(), pooling.Blurred(PLC)))
    pooled = seen(run, items, PLC, pooling.Around())
    for row, item in enumerate(items):
        plan = PLC.plan(LAYOUT, item.region)
        before, after = (one["inputs_embeds"][row][one["image"][row]] for one in (plain, blurred))
        text = ~plain["image"][row]
        assert torch.equal(plain["inputs_embeds"][row][text], blurred["inputs_embeds"][row][text])
        assert after.shape == before.shape and not torch.allclose(before, after)
        cells = pooled["inputs_embeds"][row, pooled["stats"].pooled[row].position]
        torch.testing.assert_close(after, cells[plan.inverse.long()])


def test_outside_blank_leaves_the_region_as_it_is(run, items):
    plain, blank = (seen(run, items, None, way) for way in (pooling.Around(), pooling.Blurred(pooling.Blank())))
    for row, item in enumerate(items):
        before, after = (one["inputs_embeds"][row][one["image"][row]] for one in (plain, blank))
        inside = LAYOUT.inside(item.region)
        torch.testing.assert_close(after[inside], before[inside])
        assert torch.equal(after[~inside], after[~inside][:1].expand(int((~inside).sum()), -1))


def test_centred_positions_are_the_means_of_the_members(run, items):
    plain, centred = (seen(run, items, PLC, way) for way in (pooling.Around(), pooling.Centred()))
    for row, item in enumerate(items):
        plan, position = PLC.plan(LAYOUT, item.region), plain["stats"].pooled[row].position
        leader, middle = (one["position_ids"][row, position].float() for one in (plain, centred))
        first = leader[0] - plan.leader[0]
        for cell in range(0, plan.num_out, 7):
            members = torch.nonzero(plan.inverse == cell).flatten()
            assert middle[cell] == pytest.approx(float(first + members.float().mean()))


def test_the_log_of_the_size_is_added_to_what_every_row_sees(run, items):
    kwargs = seen(run, items, PLC, pooling.SizeBias(), inside=True)
    for row, item in enumerate(items):
        counts, position = PLC.plan(LAYOUT, item.region).counts, kwargs["stats"].pooled[row].position
        last = kwargs["attention_mask"][row, 0, -1]
        torch.testing.assert_close(last[position], counts.float().log())
        assert float(last[position[-1] + 1 :].abs().max()) == 0


def test_sizes_of_one_change_no_answer(run, items):
    where = [item.region for item in items]
    same = [answers(run, items, pooling.Near(1), where, way) for way in (pooling.Around(), pooling.SizeBias())]
    assert same[0] == same[1]


def test_ways_keep_what_they_say(run):
    region = Region.box(0.25, 0.25, 0.5, 0.5)
    inside = int(LAYOUT.inside(region).sum())
    cells = PLC.plan(LAYOUT, region)
    leaders = pooling.Leaders(PLC).plan(LAYOUT, region)
    assert (
        leaders.num_out == cells.num_out
        and torch.equal(leaders.leader, cells.leader)
        and int(leaders.counts.max()) == 1
    )
    assert [pooling.Near(ring).plan(LAYOUT, region).num_out for ring in (0, 1)] == [inside, inside + 28]
    left = pooling.Thinned(0.5).plan(LAYOUT, region).num_out - inside
    assert 0.4 < left / (576 - inside) < 0.6
    assert set(pooling.ways(0.2, 12)) >= {"PLC", "region alone, from layer 3", "region alone, from layer 9"}


def test_sides_of_a_place_are_told_apart():
    item = Item("k", "i", "q", ("1234",), "grounding", "iou", Region.whole(), lambda: None, (0, 0, 1, 1))
    replies = [Reply(text, 0.0, 1, 1, 1.0) for text in ("1 2 3 4", "1035", "")]
    found = pooling.sides([item] * 3, replies)
    assert found == pytest.approx({"left": 2 / 3, "top": 1 / 3, "right": 2 / 3, "bottom": 1 / 3, "all four": 1 / 3})


def test_cuts_by_layer_and_group(monkeypatch, tmp_path):
    out = tmp_path / "layers.json"
    words = ["--questions", "4", "--layers", "2", "6", "--budgets", "0.11", "--json", str(out), "--source", "oracle"]
    monkeypatch.setattr(sys, "argv", ["layers", *words])
    layers.main()
    content = json.loads(out.read_text())
    assert [row["layer"] for row in content["rows"]] == [0, 2, 6]
    average = [row["average"] for row in content["rows"]]
    assert average == pytest.approx([63 / 576, (2 * 576 + 10 * 63) / 12 / 576, (6 * 576 + 6 * 63) / 12 / 576], abs=1e-3)
    assert content["run"][0]["region"] == "oracle" and list(content["unpruned"][0])[0] == "overall"


def test_real_pages_are_shown_in_three_ways(tmp_path):
    page, box = Image.new("RGB", (600, 1200), "white"), (100.0, 900.0, 300.0, 930.0)
    page.paste("black", tuple(map(int, box)))
    for view, show in real.VIEWS.items():
        shown, region = show(page, box, 384)
        x0, y0, x1, y1 = (round(value * side) for value, side in zip(region.boxes[0], shown.size * 2, strict=True))
        part = shown.crop((x0 + 2, y0 + 2, x1 - 2, y1 - 2))
        assert np.asarray(part.convert("L")).max() < 60, view
        assert (shown.size == page.size) == (view == "whole page")
    shown, region = real.near(page, box, 384)
    assert region.boxes[0][3] - region.boxes[0][1] == pytest.approx(real.LETTERS / 384, rel=0.01)


def test_answers_about_real_pages_are_compared_in_the_models_letters(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 120), "white").save(tmp_path / "images" / "1.jpg")
    rows = [{"image": "1.jpg", "field": field, "question": "?", "answer": answer, "box": [1, 2, 30, 20]}
            for field, answer in (("company", "Mr. D.I.Y. (M)"), ("address", "x"), ("total amount", "RM 9.00"))]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = list(real.questions(Path(tmp_path), "whole page", 384))
    assert [(item.question, item.answers) for item in items] == [
        ("what is the shop", ("MR.D.I.Y.M",)), ("what is the total", ("RM9.00",))]  # fmt: skip
    assert items[0].picture().size == (60, 120) and items[0].region.boxes[0] == (1 / 60, 2 / 120, 0.5, 20 / 120)
    found = {
        row["field"]: row for row in real.figures(items * 2, [Reply(t, 0.0, 1, 1, 1.0) for t in ("X", "RM9.00")] * 2)
    }
    assert found["total amount"]["exact"] == found["total amount"]["characters"] == 1 and found["company"]["exact"] == 0
    assert found["all"]["n"] == 4 and found["all"]["exact"] == 0.5
    assert real.alike("abcd", "abxd") == 0.75 and real.alike("", "") == 1
