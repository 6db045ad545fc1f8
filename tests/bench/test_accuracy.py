"""The accuracy bench: metrics by hand, budgets met, a killed run goes on, shards join."""

from __future__ import annotations

import json
import lzma
import sys
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tqdm")


from bench.accuracy import __main__ as command  # noqa: E402
from bench.accuracy import data, metrics, summary, tables  # noqa: E402
from bench.accuracy import run as running  # noqa: E402
from bench.accuracy.canvas import CornerOnly, ZoomOnly, corner, shrink, unshrink, unzoom, zoom, zoomed  # noqa: E402
from bench.accuracy.contenders import WholeStaysWhole, jobs  # noqa: E402
from bench.pictures import BUDGETS, GROUPS, SEEDS  # noqa: E402
from bench.records import read_jsonl  # noqa: E402
from crop.geometry.layout import VisionLayout  # noqa: E402
from crop.geometry.region import Region  # noqa: E402
from crop.methods import Compose, InnerLLMPruning, PreLLMCompression, registry  # noqa: E402


@pytest.mark.parametrize(
    "metric,answer,truths,score",
    [
        (metrics.exact, "The  Total!", ["total"], 1), (metrics.exact, "3.50", ["350"], 0), (metrics.exact, "b", ["a", "B"], 1),
        (metrics.anls, "25/12/2018", ["25/12/2018"], 1), (metrics.anls, "25/12/2019", ["25/12/2018"], 0.9),
        (metrics.anls, "no", ["yes"], 0), (metrics.anls, "", [""], 1), (metrics.anls, "abcd", ["ab", "abcx"], 0.75),
        (metrics.relaxed, "104", ["100"], 1), (metrics.relaxed, "106", ["100"], 0), (metrics.relaxed, "RM 1,000.00", ["1000"], 1),
        (metrics.relaxed, "50%", ["0.5"], 1), (metrics.relaxed, "cat", ["Cat"], 1), (metrics.relaxed, "0.1", ["0"], 0),
    ],
)  # fmt: skip
def test_metrics_by_hand(metric, answer, truths, score):
    assert metric(answer, truths) == pytest.approx(score)


def test_edit_distance_and_boxes():
    assert metrics.edit_distance("kitten", "sitting") == 3 and metrics.edit_distance("", "abc") == 3
    assert metrics.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert metrics.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert metrics.parse_box("[0.1, 0.2, 0.5, 0.9]") == (0.1, 0.2, 0.5, 0.9)
    assert metrics.parse_box("100 200 500 900") == (0.1, 0.2, 0.5, 0.9)
    assert metrics.parse_box("1 2 3") is None and metrics.parse_box("0.5 0.2 0.1 0.9") is None


def asked(count: int, **more) -> list[data.Item]:
    """The first questions of the first set."""
    return list(islice(data.rendered(SEEDS["1"], **more), count))


def test_rendered_questions_are_stable_and_of_every_group():
    items, groups = asked(80), set(GROUPS.values())
    assert [i.key for i in items] == [i.key for i in asked(80)]
    assert len({i.key for i in items}) == len(items)
    assert {i.group for i in items} == groups
    assert all(item.score(item.answers[0]) == 1 and item.score("") == 0 for item in items)
    assert {i.group for i in asked(80, grounding=False)} == groups - {"grounding"}
    assert {i.group for i in asked(80, whole=False)} == groups - {"global"}


def test_the_sets_of_pictures_are_disjoint():
    """Two sets of headlines, one to try, and what is trained on: 100,000 pictures each."""
    seeds = sorted(SEEDS.values())
    assert len(seeds) == 5 and min(b - a for a, b in zip(seeds[:-1], seeds[1:], strict=True)) >= 100_000


def test_json_lines(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "q", "answers": ["3"], "box": [0, 0, 100, 50], "group": "g"},
            {"image": "a.png", "question": "where", "box": [100, 0, 200, 100]}]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, place = data.json_lines(path, "anls")
    assert text.region == Region.box(0, 0, 0.5, 0.5) and (text.metric, text.group) == ("anls", "g")
    assert place.metric == "iou" and place.score("0.5 0 1 1") == 1 and place.score("nowhere") == 0
    assert text.picture().size == (200, 100)
    path.write_text(json.dumps({"image": "a.png", "question": "q"}))
    with pytest.raises(ValueError, match="questions.jsonl:1: answers must be text, unless there is a box, got null"):
        list(data.json_lines(path, "exact"))


ODD = {  # what stands in the file -> the answers that are meant
    "text": (b'{"image": "a.png", "question": "q", "answers": "45.00"}', ("45.00",)),
    "number": (b'{"image": "a.png", "question": "q", "answers": 45.00}', ("45.00",)),
    "numbers": (b'{"image": "a.png", "question": "q", "answers": [7, "7.0"]}', ("7", "7.0")),
    "blank lines and BOM": (b'\xef\xbb\xbf\r\n{"image": "a.png", "question": "q", "answers": ["x"]}\r\n\r\n', ("x",)),
    "array": (b'\n[{"image": "a.png", "question": "q", "answers": ["x"], "box": null}]', ("x",)),
    "line separators": ('{"image": "a.png", "question": "q\u2028q\x85", "answers": ["x\u2028y"]}'.encode(), ("x\u2028y",)),
}  # fmt: skip


@pytest.mark.parametrize("content, answers", ODD.values(), ids=ODD)
def test_what_is_plainly_meant_is_taken(content, answers, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_bytes(content)
    [item] = data.json_lines(tmp_path / "questions.jsonl", "exact")
    assert item.answers == answers and item.score(answers[0]) == 1


WRONG = {  # a line -> what the error says
    "no JSON": (b"{", "questions.jsonl:2: must be one JSON object: "),
    "no object": (b"5", "questions.jsonl:2: must be a JSON object, got "),
    "no UTF-8": (b'{"question": "\xff"}', "questions.jsonl:2: must be one JSON object: 'utf-8'"),
    "no question": (b'{"image": "a.png", "answers": ["x"]}', "questions.jsonl:2: question must be text, got null"),
    "true": (b'{"image": "a.png", "question": "q", "answers": true}', "questions.jsonl:2: answers must be text, a number"),
    "null in a list": (b'{"image": "a.png", "question": "q", "answers": [null]}', "questions.jsonl:2: answers must be text,"),
    "no file": (b'{"image": "b.png", "question": "q", "answers": "x"}', "questions.jsonl:2: image must be an existing file"),
    "text in a box": (b'{"image": "a.png", "question": "q", "box": [0, 0, "1", 1]}', "questions.jsonl:2: box must be four numbers"),
    "inverted box": (b'{"image": "a.png", "question": "q", "box": [9, 0, 1, 1]}', "questions.jsonl:2: box: .*x0 < x1"),
    "group": (b'{"image": "a.png", "question": "q", "answers": "x", "group": [1]}', "questions.jsonl:2: group must be text"),
}  # fmt: skip


@pytest.mark.parametrize("line, message", WRONG.values(), ids=WRONG)
def test_what_is_not_is_named_by_file_line_and_field(line, message, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\n" + line)
    with pytest.raises(ValueError, match=message):
        list(data.json_lines(path, "exact"))


def test_pictures_of_questions_are_upright_and_on_white(tmp_path):
    turned = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    exif = turned.getexif()
    exif[0x112] = 6
    turned.save(tmp_path / "a.png", exif=exif.tobytes())
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "q", "answers": "x", "box": [0, 0, 10, 10]}')
    [item] = data.json_lines(tmp_path / "q.jsonl", "exact")
    assert item.picture().size == (10, 20) and item.picture().getpixel((0, 0)) == (255, 255, 255)
    assert item.region == Region.box(0, 0, 1, 0.5)


def test_records_name_what_is_wrong(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    path = tmp_path / "records.jsonl"
    path.write_text('{"image": "a.png", "question": "q", "boxes": null}\n{"image": "a.png", "question": "q"}')
    found = read_jsonl(path)
    assert next(found) == (tmp_path / "a.png", "q", None)
    with pytest.raises(ValueError, match="records.jsonl:2: boxes must be a list of boxes"):
        next(found)


def test_receipts_convert(tmp_path):
    (tmp_path / "images").mkdir()
    line = {"image": "7.jpg", "field": "date", "question": "when", "answer": "1/2", "box": [1, 2, 3, 4]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    assert data.convert_receipts(tmp_path, tmp_path / "out.jsonl") == 1
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["answers"] == ["1/2"] and row["group"] == "date" and row["image"].endswith("images/7.jpg")


@pytest.fixture(scope="module")
def asker():
    from crop.cli.ask import EMBEDDED, load

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(EMBEDDED, "cpu", "auto")
    torch.set_num_threads(threads)


def test_every_contender_meets_its_budget(asker, tmp_path):
    """By the model's own count, within one token a layer; rows that cannot meet a budget are absent, not approximated."""
    wanted = jobs(asker.num_layers, (0.33, 0.11), kept=True, model=asker.model)
    items = asked(1, grounding=False)
    running.run(asker, wanted, items, asker.localizer("attention"), tmp_path, max_new_tokens=1)
    rows = {row["job"]: row for row in running.read(tmp_path)}
    assert set(rows) == {job.key for job in wanted} | {"region"}
    for job in wanted:
        if not job.counted or "whole stays whole" in job.key:
            continue
        reached = rows[job.key]["average" if job.counted == "average" else "tokens"]
        slack = 24 if job.contender.prepare else 1  # whole squares and rectangles of tokens
        assert -slack <= reached - 576 * job.budget <= 1, (job.key, reached)
    absent = {job.contender.name for job in wanted} - {j.contender.name for j in wanted if j.budget == 0.11 and j.counted == "average"}  # fmt: skip
    ilp = {f"ILP, {region}" for region in ("oracle", "predicted", "shifted", "no region")}
    strict = {"ILP strict, oracle", "ILP strict, predicted"}
    assert absent == {"unpruned", "fastv", "sparsevlm", "pyramiddrop", "dart", "autoprune", "trio"} | ilp | strict


def test_a_killed_run_goes_on_and_shards_join(asker, tmp_path, monkeypatch):
    items = asked(4, grounding=False)
    wanted = jobs(asker.num_layers, (0.11,), ("PLC, predicted", "uniform"))
    localizer = asker.localizer("attention")
    whole = tmp_path / "whole"
    running.run(asker, wanted, items, localizer, whole, batch=3)
    complete = {(row["job"], row["item"]): row for row in running.read(whole)}
    assert len(complete) == 4 * (len(wanted) + 1)
    # Killed in the middle of a line: what stands before is kept, the rest is asked again, nothing twice.
    killed = tmp_path / "killed"
    killed.mkdir()
    text = (whole / "answers.0.jsonl").read_text()
    (killed / "answers.0.jsonl").write_text(text[: len(text) // 2])
    before = len(running.read(killed))
    running.run(asker, wanted, items, localizer, killed, batch=3)
    again = {(row["job"], row["item"]): row for row in running.read(killed)}
    assert 0 < before < len(complete) and again == complete
    assert len((killed / "answers.0.jsonl").read_text().splitlines()) == len(complete) + 1  # and the torn line
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "answers.old.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    running.run(asker, wanted, items, localizer, packed, batch=3)
    assert {(row["job"], row["item"]): row for row in running.read(packed)} == complete
    assert (packed / "answers.0.jsonl").read_text() == ""  # nothing was left to ask
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        running.run(asker, wanted, items, localizer, tmp_path / "shards", batch=3)
    joined = {(row["job"], row["item"]): row for row in running.read(tmp_path / "shards")}
    assert joined == complete and len(list((tmp_path / "shards").iterdir())) == 2


def test_a_folder_holds_answers_of_one_thing(tmp_path):
    running.begin(tmp_path / "new", {"model": "a"})  # no localizer was needed
    running.begin(tmp_path / "new", {"model": "a", "localizer": "head"})
    running.begin(tmp_path / "new", {"model": "a"})
    assert running.settings(tmp_path / "new") == {"model": "a", "localizer": "head"}
    with pytest.raises(
        ValueError, match="holds answers with .'localizer': 'head'., got .'localizer': 'ocr'.; take another --out"
    ):
        running.begin(tmp_path / "new", {"model": "a", "localizer": "ocr"})


def test_the_best_are_asked_more_and_the_file_says_so(tmp_path, monkeypatch):
    """From the command line to the tables, with one budget: two questions for everybody, a third for the best."""
    words = [
        "--questions",
        "3",
        "--rest",
        "2",
        "--budgets",
        "0.11",
        "--out",
        str(tmp_path),
        "--json",
        str(tmp_path / "s.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["accuracy", *words])
    threads = torch.get_num_threads()
    command.main()
    torch.set_num_threads(threads)
    made = json.loads((tmp_path / "s.json").read_text())
    asked = {row["contender"]: row["n"] for row in made["rows"] if row["group"] == summary.OVERALL}
    more = {name for name, n in asked.items() if n == 3}
    ours, rivals = command.sides(2)
    assert set(asked.values()) == {2, 3} and more >= {
        "unpruned",
        "down-sampled image",
        "PLC, predicted",
        "diverse, predicted",
        "both, predicted",
    }
    assert len(more & set(rivals) - {"down-sampled image"}) == 3
    assert not {name for name in rivals if name.endswith(("oracle", "shifted"))} and "zoom, predicted" in rivals
    assert made["pictures"] == {"first seed": SEEDS["1"], "tokens": 576} and made["run"]["localizer"] == "head"
    assert {row["baseline"] for row in made["the region's part"]} == {
        f"{name}, no region" for name in ("PLC", "diverse", "both")
    }
    before = (tmp_path / "answers.0.jsonl").read_text()
    command.main()  # the best are chosen again by what everybody was asked
    torch.set_num_threads(threads)
    assert (tmp_path / "answers.0.jsonl").read_text() == before
    monkeypatch.setattr(sys, "argv", ["accuracy", *words, "--localizer", "attention"])
    with pytest.raises(ValueError, match="'localizer': 'head'.+, got .+'attention'.+; take another --out"):
        command.main()
    torch.set_num_threads(threads)
    assert {row["contender"] for row in made["leads"]} <= set(ours) and tables.accuracy(made)[0].count("questions") == 2


def test_whole_stays_whole_and_corner():
    layout = VisionLayout.grid(24, 24)
    method = WholeStaysWhole(Compose(PreLLMCompression(keep=0.5), InnerLLMPruning(0.2, layer=2)))
    assert method.plan(layout, Region.whole()) is None and method.select(layout, Region.whole()) is None
    assert method.plan(layout, Region.box(0, 0, 0.2, 0.2)).num_out == 288 and method.layer == 2
    auto = WholeStaysWhole(Compose(PreLLMCompression(keep=0.5), InnerLLMPruning(0.2)))
    assert auto.layer == "auto" and auto.with_layer(3).layer == 3
    plan = CornerOnly(0.25).plan(layout, Region.whole())
    assert (
        plan.num_out == 144
        and int(layout.row[plan.leader.long()].max()) == int(layout.col[plan.leader.long()].max()) == 11
    )
    assert [corner(tokens, 24) for tokens in BUDGETS] == [
        13,
        11,
        8,
        5,
    ]  # the largest squares in 192, 128, 64 and 32 tokens
    picture = asked(1)[0].picture()
    canvas = np.asarray(shrink(picture, 0.25, Region.whole(), 24))
    ground = canvas[-1, -1]
    assert canvas.shape == (384, 384, 3) and abs(ground - np.asarray(picture).mean((0, 1))).max() <= 1
    assert (canvas[192:] == ground).all() and (canvas[:, 192:] == ground).all() and canvas[:192, :192].std() > 1
    assert unshrink((0.1, 0.2, 0.3, 0.5), 0.25, Region.whole(), 24) == pytest.approx((0.2, 0.4, 0.6, 1.0))


def test_zoom_shows_overview_and_region_and_keeps_their_tokens():
    layout, region = VisionLayout.grid(24, 24), Region.box(0.5, 0.25, 0.75, 0.3)
    image = Image.new("RGB", (384, 384), "red")
    image.paste("white", (192, 96, 288, 115))
    for keep in (0.3333, 0.0556):
        plan, cells = zoomed(region, keep, 24), ZoomOnly(keep).plan(layout, region)
        assert plan.side**2 + plan.rows * plan.cols == cells.num_out <= round(576 * keep)
        canvas = np.asarray(zoom(image, keep, region, 24))
        left, right = plan.side * 16, (plan.side + plan.cols) * 16
        assert (canvas[: plan.rows * 16, left:right] == 255).all(2).mean() > 0.3  # the region, and a margin around it
        assert canvas[:left, :left, 0].min() > 200 and (canvas[:, right:] == canvas[-1, -1]).all()
        kept = cells.leader.long()
        assert set(layout.row[kept].tolist()) == set(range(max(plan.side, plan.rows)))
        # A box on the canvas is the same place in the picture, seen in the overview or in the cut-out.
        there, side = (0.55, 0.26, 0.7, 0.29), plan.side / 24
        assert unzoom(tuple(side * v for v in there), keep, region, 24) == pytest.approx(there)
        (x0, y0, x1, y1), (x, y) = there, plan.box[:2]
        cut = tuple(plan.scale * v for v in (x0 - x, y0 - y, x1 - x, y1 - y))
        assert unzoom((side + cut[0], cut[1], side + cut[2], cut[3]), keep, region, 24) == pytest.approx(there)
    assert (
        zoomed(region, 0.3333, 24).scale == 1 > zoomed(Region.box(0, 0, 0.9, 0.9), 0.3333, 24).scale
    )  # never enlarged
    assert zoomed(region, 0.3333, 24).side > 10  # what the cut-out leaves is the overview's
    assert zoomed(Region.whole(), 0.11, 24) is None
    assert zoom(image, 0.11, Region.whole(), 24).tobytes() == shrink(image, 0.11, region, 24).tobytes()


def test_gradients_find_the_token_that_alone_decides(asker):
    """A question about one thing: the tokens with the longest gradients lie where the answer is, more than by chance."""
    item = next(item for item in asked(40) if item.group == "local text")
    (job,) = (
        job for job in jobs(asker.num_layers, (0.5,), ("trio",), model=asker.model) if job.contender.name == "trio"
    )
    with patched(asker, job.method, item) as stats:
        pass
    (layout,), (kept,) = stats.layouts, stats.kept
    inside = layout.inside(item.region)
    assert len(kept) == round(576 * job.method.keep)
    assert inside[kept].float().mean() > 1.2 * inside.float().mean()


@contextmanager
def patched(asker, method, item):
    """Statistics of one prefill."""
    from crop.patching.patch import patch

    image = item.picture()
    inputs = asker.encode_batch([[image]], [item.question])
    with (
        torch.no_grad(),
        patch(asker.model, method, item.region, processor=asker.processor, image_size=image.size) as stats,
    ):
        asker.model(**inputs)
    yield stats


def test_registered_methods_take_part(monkeypatch):
    monkeypatch.setattr(registry, "_builds", dict(registry._builds))
    registry.register_method("mine", lambda keep, _: InnerLLMPruning(keep, rows="last"))
    (average, kept) = (job for job in jobs(8, (0.5,), ("mine",), kept=True) if job.contender.name == "mine")
    assert (kept.counted, kept.method.keep, kept.method.layer) == ("kept", 0.5, 2)
    assert average.method.keep == pytest.approx(1 / 3, abs=1e-6)  # two layers of eight see all
