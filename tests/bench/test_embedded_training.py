"""Training of the embedded model on a tiny one: packing, aids, files, and a run that stops and resumes."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoProcessor, LlavaForConditionalGeneration  # noqa: E402

from bench.training.embedded import data, labels, model, scores, train  # noqa: E402
from bench.training.embedded.__main__ import evaluate  # noqa: E402
from crop.embedded import scenes  # noqa: E402

TINY = model.Geometry(tower=128, tower_layers=1, tower_inner=32, width=160, layers=7, inner=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return model.build(TINY).eval()


def seen(llava, item):
    """What the decoder gets of a picture."""
    return llava.model.multi_modal_projector(model.tower_features(llava, item.patches[None]))


@pytest.fixture(scope="module")
def item():
    return data.encode(scenes.scene(3, picture="shapes"))


def test_tower_and_localizer_take_at_most_15_percent():
    parts = model.flops()
    assert sum(v for k, v in parts.items() if k != "decoder") <= 0.15 * sum(parts.values())


def test_model_fits_in_24_megabytes():
    size = sum(2 * p.numel() for p in model.build().parameters())
    assert size < 23.8e6 and model.GEOMETRY.layers >= 12


@torch.no_grad()
def test_packed_questions_equal_separate_ones(tiny, item):
    lines, keep = item.lines[:5], torch.arange(0, model.NUM_PATCHES, 3)[None]
    vision = seen(tiny, item)[:, keep[0]]
    packed = data.pack([lines])
    together = model.text_hidden(tiny, vision, keep, packed.ids, packed.block, packed.place)[0]
    for i, line in enumerate(lines):
        alone = data.pack([[line]])
        hidden = model.text_hidden(tiny, vision, keep, alone.ids, alone.block, alone.place)[0]
        torch.testing.assert_close(together[packed.block[0] == i], hidden, atol=2e-5, rtol=1e-4)


def test_spots_are_patches_of_the_characters(item):
    words = list(data.WORDS)
    for line in item.lines:
        for row, patch in enumerate(line.spot.tolist()):
            if patch >= 0:
                character = words[line.target[row] if line.target[row] >= 0 else line.ids[row]]
                assert character == scenes.CHARACTERS[item.labels[patch, 3] - 1]


@pytest.mark.parametrize("picture", scenes.PICTURES)
def test_a_patch_holds_the_centre_of_one_character_at_most(picture):
    for seed in range(20):
        scene = scenes.scene(seed, picture=picture)
        assert (labels.patch_labels(scene)[:, 3] > 0).sum() == sum(len(run.text) for run in scene.runs)


def test_export_answers_as_training_sees_it(tiny, tmp_path):
    """Files, processor and ``generate`` give the token that packed training would."""
    model.export(tiny, tmp_path / "weights")
    carried = LlavaForConditionalGeneration.from_pretrained(tmp_path / "weights", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "weights")
    scene = scenes.scene(3)
    question = next(q for q in scene.questions if q.clues)
    inputs = processor(images=scene.image, text=f"<image> {question.text} ?", return_tensors="pt")
    assert inputs["input_ids"][0, 1 + model.NUM_PATCHES :].tolist() == data.tokens(question.text + " ?")
    line, item = data.encode_line(question, 1.0), data.encode(scene)
    rows = len(data.tokens(question.text + " ?"))
    alone = data.pack(
        [[dataclasses.replace(line, ids=line.ids[:rows], target=line.target[:rows], spot=line.spot[:rows])]]
    )
    with torch.no_grad():
        every = torch.arange(model.NUM_PATCHES)[None]
        vision = seen(carried, item)
        hidden = model.text_hidden(carried, vision, every, alone.ids, alone.block, alone.place)
        logits = carried(**inputs).logits[0, -1]
    torch.testing.assert_close(carried.lm_head(hidden[0, -1]), logits, atol=1e-3, rtol=1e-3)


def test_held_out_figures_count_every_question(tiny, tmp_path, capsys):
    heads = torch.nn.Linear(TINY.tower, sum(labels.HEADS.values()))
    named = scores.patch_scores(tiny, heads, 8)
    assert named.keys() == {*labels.HEADS, "none"} and all(0 <= share <= 1 for share in named.values())
    found = scores.answer_scores(tiny, 3, questions=4, pruned=4)
    counts = {way: sum(map(len, kinds.values())) for way, kinds in found.items()}
    local = [line.local for s in range(3) for line in chosen(scores.HELD_OUT + s)]
    assert counts["all"] == counts["third"] == 12 and counts["region"] == counts["without"] == sum(local)
    model.export(tiny, tmp_path / "weights")
    evaluate(tmp_path / "weights", 1)
    printed = capsys.readouterr().out
    assert printed.startswith("all: ") and "third: " in printed and "local 0.000 (n=" in printed


def chosen(seed):
    """The questions that are asked of a held-out picture."""
    return data.choose(data.encode(scenes.scene(seed)), random.Random(seed), count=4)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options of a stage by name, on the tiny model with the smallest batches; nothing is scored."""
    monkeypatch.setattr(train, "build", lambda: model.build(TINY))
    monkeypatch.setattr(train.Trainer, "score", lambda self: None)
    small = {"batch": 2, "store": 8, "full": 2.0, "some": 0.0}
    stages = {n: dataclasses.replace(s, aside=min(s.aside, 2), **small) for n, s in train.STAGES.items()}

    def build(stage, minutes=0.001, **settings):
        return train.Options(tmp_path, stage, minutes, save_every=0, log_every=1, stages=stages, **settings)

    return build


def test_every_stage_takes_up_what_the_ones_before_learnt(options, tmp_path):
    """Tower and decoder do not know each other; the bridge trains the projector alone, then the tower with it, the last stage everything."""
    runs = {}
    for stage in train.STAGES:
        runs[stage] = train.Trainer(options(stage))
        begun = {n: p.detach().clone() for n, p in parameters(runs[stage]).items()}
        assert runs[stage].run()
        moved = {n.split(".")[0] for n, p in parameters(runs[stage]).items() if not torch.equal(p, begun[n])}
        parts = {
            "tower": "vision heads",
            "decoder": "text named",
            "bridge": "projector",
            "fit": "vision heads projector",
        }
        assert moved == set(parts.get(stage, "vision heads projector text").split())
        for earlier in train.STAGES[stage].starts_from:
            for name, value in torch.load(tmp_path / f"{earlier}.pt")["parameters"].items():
                torch.testing.assert_close(begun[name], value)
    assert not list(tmp_path.glob("*.part"))
    logs = [(tmp_path / f"{stage}.txt").read_text() for stage in train.STAGES]
    terms = (
        ("patch",),
        ("answer", "before0", "spot2", "mass3"),
        ("distance",),
        ("distance", "patch"),
        ("answer", "aside"),
        ("answer", "aside"),
    )
    for log, names in zip(logs, terms, strict=True):
        assert all(name in log for name in names)


def one_of_two(rank: int, out: Path, meeting: str) -> None:
    """A process of a run that two share; it writes what it has in the end."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    train.build, train.Trainer.score = (lambda: model.build(TINY)), (lambda self: None)
    tower = dataclasses.replace(train.STAGES["tower"], batch=2, store=8, full=2.0)
    run = train.Trainer(train.Options(out, "tower", 0.001, log_every=1, stages={"tower": tower}))
    run.run()
    torch.save({"state": run.state, "parameters": dict(run.trained)}, out / f"rank{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_train_one_model(tmp_path):
    """Each draws pictures of its own; steps, clock and parameters are the same in both, and one of them keeps the books."""
    torch.multiprocessing.spawn(one_of_two, (tmp_path, str(tmp_path / "meeting")), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert one["state"] == two["state"] and one["state"]["step"] > 0
    torch.testing.assert_close(one["parameters"], two["parameters"], rtol=0, atol=0)
    saved = torch.load(tmp_path / "tower.pt")["parameters"]
    assert all(torch.equal(saved[name], one["parameters"][name]) for name in saved)
    assert (tmp_path / "tower.txt").read_text().count("done") == 1


def test_processes_must_divide_the_batch(options, monkeypatch):
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 3}.items():
        monkeypatch.setattr(train.distributed, name, lambda value=value: value)
    with pytest.raises(ValueError, match="processes must divide the batch of 2, got 3"):
        train.Trainer(options("tower"))


def parameters(run):
    return {f"{part}.{n}": p for part, module in run.modules().items() for n, p in module.named_parameters()}


def test_run_stops_and_resumes(options, tmp_path):
    run = train.Trainer(options("decoder", 10.0))
    (tmp_path / "stop-decoder").touch()
    assert not run.run() and run.state["step"] == 1
    again = train.Trainer(options("decoder", 10.0))
    assert again.state == run.state
    torch.testing.assert_close(dict(again.trained), dict(run.trained))


def test_aids_are_lowest_where_heads_look_at_what_they_should():
    """By hand: two rows of three, keys as unit vectors, a query that points at the right one costs nothing."""
    aids = model.Aids()
    spot = torch.tensor([[1, -1]])
    nothing = torch.full((1, 4), -1)
    regions, named = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    named[0, 1, 0] = True  # the second row's word calls what the first key shows
    aids.start(2, nothing, regions, torch.zeros(1, 2, dtype=torch.bool), spot, named)
    mask, key = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), torch.eye(4)[None, None].expand(1, 5, 4, 4)
    right = torch.zeros(1, 5, 4, 4)
    right[:, :, 2, 1] = right[:, 3:, 3, 0] = 50.0
    aids.collect(2, right, key, mask, 1.0)
    assert float(aids.losses["spot2"]) < 1e-6 and float(aids.losses["word2"]) < 1e-6
    aids.collect(2, right.roll(1, 3), key, mask, 1.0)
    assert float(aids.losses["spot2"]) == 12.0 and float(aids.losses["word2"]) == 12.0


def test_words_call_what_patches_show(item):
    head, number = (table[torch.tensor(data.tokens("is the red circles sign ?"))] for table in data.CALLED)
    assert head.tolist() == [-1, -1, 1, 2, 0, -1]
    kinds = list(labels.HEADS)
    assert [kinds[h] for h in (0, 1, 2)] == ["kind", "color", "shape"]
    assert number[2] == 1 + list(scenes.COLORS).index("red") and number[3] == 1 + scenes.SHAPES.index("circle")


@torch.no_grad()
def test_later_layers_begin_as_identities(item, tmp_path):
    """The first layers alone answer as all do, and files written meanwhile hold all."""
    small = model.build(dataclasses.replace(TINY, layers=model.EARLY_LAYERS + 2)).eval()
    every = torch.arange(model.NUM_PATCHES)[None]
    vision, packed = seen(small, item), data.pack([item.lines[:2]])
    hidden = model.text_hidden(small, vision, every, packed.ids, packed.block, packed.place)
    assert len(model.use_layers(small, model.EARLY_LAYERS)) == 2 * len(
        list(small.model.language_model.layers[0].parameters())
    )
    early = model.text_hidden(small, vision, every, packed.ids, packed.block, packed.place)
    torch.testing.assert_close(early, hidden)
    model.export(small, tmp_path / "weights")
    assert small.model.language_model.config.num_hidden_layers == model.EARLY_LAYERS
    carried = LlavaForConditionalGeneration.from_pretrained(tmp_path / "weights")
    assert len(carried.model.language_model.layers) == model.EARLY_LAYERS + 2


def test_ways_of_pruning(item):
    line = next(line for line in item.lines if line.kind == "text" and len(line.target) > 0)
    left = scores.ways(line)
    assert left["third"].sum() == model.NUM_PATCHES // 3
    assert not (left["region"] & left["without"]).any()
