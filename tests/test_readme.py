"""README and the pages beside it hold what they say: their code runs outside the package, the files they name exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import crop
from crop import embedded
from crop.cli.main import main
from crop.geometry.layout import VisionLayout
from crop.localizers import registry as localizers
from crop.methods import registry as methods
from crop.models import Prompt, registry
from crop.models import registry as models

ROOT = Path(crop.__file__).resolve().parents[1]
README, FAMILIES, CONTRIBUTING = "README.md", "crop/models/README.md", ".github/CONTRIBUTING.md"
WAYS, INSIDE = "crop/patching/README.md", "crop/README.md"
PAGES = {
    README: ["", "crop/patching"],
    FAMILIES: ["", "crop/models"],
    CONTRIBUTING: [""],
    WAYS: ["", "crop/patching"],
    INSIDE: ["", "crop"],
}  # page -> what paths start from
NOT_OURS = {"FILE.py", "center.py", "modular_X.py", "modeling_X.py", "processing_X.py"}  # of users, of transformers
KEPT = 63  # 11 % of the embedded model's 576 vision tokens

pytestmark = pytest.mark.fast


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def block_of(page: str, words: str) -> str:
    """The one block of Python that holds ``words``."""
    (found,) = (block for block in re.findall(r"```python\n(.*?)```", text_of(page), re.S) if words in block)
    return found


@pytest.fixture(autouse=True)
def outside(monkeypatch: Any, tmp_path: Path) -> None:
    """Work in an empty folder; what a test registers is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    for module, name in ((methods, "_builds"), (localizers, "_registered"), (models, "_families")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, processor = embedded.load()
    yield model, processor
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------------- what stands there
def test_lengths():
    assert len(text_of(README).splitlines()) < 200 and len(text_of(README).split()) < 2000
    assert len(text_of(FAMILIES).splitlines()) < 120
    assert len(block_of(README, "register_method").splitlines()) <= 12
    assert sum(map(bool, block_of(README, "register_localizer").splitlines())) <= 6


def test_the_two_commands():
    begin = "python3 -m venv .venv && . .venv/bin/activate && pip install torch==2.13.0 && pip install -e "
    commands = [block.strip() for block in re.findall(r"```bash\n(.*?)```", text_of(README), re.S)]
    assert commands[:2] == [begin + '".[demo]" && crop demo', begin + '".[test,demo,ocr]" && pytest -n auto']


def test_figures_of_the_introduction_are_the_tables():
    introduction, rest = text_of(README).split("## Two commands")
    table = rest.split("<!-- table headline -->")[1].split("<!-- end headline -->")[0]
    (row,) = (line for line in table.splitlines() if line.startswith("| both, 64 of 576 ") and "score left" in line)
    figures = re.findall(r"\b\d+\.\d\b", introduction)
    assert len(figures) >= 2 and all(figure in row for figure in figures)
    assert len(table.strip().splitlines()) == 2 + 5


@pytest.mark.parametrize(
    "page", [*PAGES, "bench/README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("c*/**/README.md"))]
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES)
def test_files_named_exist(page):
    for name in named_files(page):
        places = [ROOT / start / name for start in PAGES[page]]
        assert any(place.exists() for place in places), name


def named_files(page: str) -> set[str]:
    """Files and folders in backticks; a bare name stands in the folder of the last path of its line, if in no other."""
    found: set[str] = set()
    for line in text_of(page).splitlines():
        folder = ""
        for name in re.findall(r"`([\w./-]+)`", line):
            if (
                name in NOT_OURS
                or "OP." in name
                or not re.search(r"\.(py|md|cpp|h|cu|cuh|png)$|^(crop|bench|tests|csrc)/", name)
            ):
                continue
            bare = "/" not in name and not any((ROOT / start / name).exists() for start in PAGES[page])
            found.add(f"{folder}/{name}" if bare else name)
            folder = folder if "/" not in name else str(Path(name).parent)
    return found


def test_nine_steps_name_every_file_of_a_prefill():
    steps = text_of(README).split("## How it works")[1].split("## Limits")[0]
    assert re.findall(r"^(\d)\. ", steps, re.M) == list("123456789")
    patching = ROOT / "crop" / "patching"
    for path in patching.rglob("*.py"):
        assert path.name == "__init__.py" or f"`{path.relative_to(patching)}`" in steps, path.name
    packages = text_of(INSIDE).split("## Packages")[1].split("## ")[0]
    for path in (ROOT / "crop").iterdir():
        assert not path.is_dir() or path.name.startswith("__") or f"`crop/{path.name}`" in packages, path.name


def test_public_names():
    space: dict[str, Any] = {}
    exec("from crop import *\nimport crop.baselines, crop.ops, crop.reference", space)
    assert set(crop.__all__) <= set(space) and crop.__all__ == sorted(crop.__all__)
    for name in ("attention_mass", "select", "compact", "adaptive_pool"):
        assert callable(getattr(crop.reference, name)) and callable(getattr(crop.ops, name))
    rows = text_of(README).split("| `crop.baselines` |")[1].split("|")[0]
    assert set(re.findall(r"`([a-z]+)`", rows)) == set(crop.baselines.BASELINES)


GONE = {
    "readmit=True": (lambda model: crop.patch(model, None, readmit=True).__enter__(), "crop.cache_vision"),
    "auto=True": (lambda model: crop.patch(model, None, auto=True).__enter__(), "crop.estimate"),
    'positions="centroid"': (lambda model: crop.patch(model, None, positions="centroid").__enter__(), "compact"),
    "plan=False": (lambda model: crop.estimate(model, {}, crop.Method(), plan=False), "leave region out"),
    'mode="soft"': (lambda model: crop.InnerLLMPruning(mode="soft"), "budget"),
    "region_weight=": (lambda model: crop.InnerLLMPruning(region_weight=2.0), "come first"),
    "floor=": (lambda model: crop.InnerLLMPruning(floor=4), "leave it out"),
    'rows="raters"': (lambda model: crop.InnerLLMPruning(rows="raters"), "crop.baselines.SparseVLM"),
}


@pytest.mark.parametrize("name", GONE)
def test_what_is_gone_says_what_to_write_instead(name, loaded):
    use, advice = GONE[name]
    assert name in text_of(CONTRIBUTING).split("### 0.2.0")[1]
    with pytest.raises((TypeError, ValueError), match=re.escape(advice)):
        use(loaded[0])


# -------------------------------------------------------------------------------------------------------------- what runs
def test_your_model(loaded, capsys):
    space: dict[str, Any] = {}
    exec(block_of(README, "crop.cache_vision"), space)
    stats = space["stats"]
    assert stats.tokens_before == [576] and stats.tokens_after_ilp == [KEPT] and len(stats.kept[0]) == KEPT
    assert capsys.readouterr().out.startswith(f"[576] {stats.tokens_after_plc} [{KEPT}] {{")


def test_own_method(loaded):
    model, processor = loaded
    exec(block_of(README, "register_method"), {})
    scene = embedded.scene(embedded.scenes.UNSEEN + 4)
    inputs = crop.encode(processor, scene.image, scene.questions[0].text)
    keys: list[torch.Tensor] = []
    hook = model.model.language_model.layers[
        model.config.text_config.crop_layer - 1
    ].self_attn.k_proj.register_forward_hook(lambda module, args, out: keys.append(out))
    with torch.no_grad(), crop.patch(model, crop.by_name("small-keys", 0.11)) as stats:
        model(**inputs)
    hook.remove()
    heads = model.config.text_config.num_key_value_heads
    norms = keys[0].unflatten(-1, (heads, -1)).norm(dim=-1).mean(-1)[inputs["input_ids"] == model.config.image_token_id]
    smallest = norms.sort(stable=True).indices[:KEPT].sort().values  # a rotation changes no norm
    assert stats.kept[0].tolist() == smallest.tolist()
    region = scene.questions[0].region
    with torch.no_grad(), crop.patch(model, crop.by_name("small-keys", 0.11), region, processor=processor) as stats:
        model(**inputs)
    inside = torch.nonzero(stats.layouts[0].inside(region)).flatten()
    assert len(stats.kept[0]) == KEPT and set(inside[:KEPT].tolist()) <= set(stats.kept[0].tolist())


def test_own_localizer(loaded):
    model, processor = loaded
    exec(block_of(README, "register_localizer"), {})
    localizer, scene = crop.get_localizer("totals"), embedded.scene(embedded.scenes.UNSEEN + 5)
    assert localizer(scene.image, "what is the Total").boxes == ((0.0, 0.5, 1.0, 1.0),)
    region = localizer(scene.image, "what is the date")
    assert region.is_whole and region.confidence == 0.1 and region.reason
    inputs = crop.encode(processor, scene.image, "what is the total")
    lower = localizer(scene.image, "what is the total")
    with torch.no_grad(), crop.patch(model, crop.InnerLLMPruning(0.25, ring=0), lower, processor=processor) as stats:
        model(**inputs)
    assert len(stats.kept[0]) == 144 and (stats.kept[0] >= 288).all()  # rows of 24 tokens, the lower twelve


def test_own_method_and_localizer_on_the_command_line(capsys, tmp_path):
    plugin, picture = tmp_path / "mine.py", tmp_path / "picture.png"
    plugin.write_text(block_of(README, "register_method") + block_of(README, "register_localizer"))
    embedded.scene(embedded.scenes.UNSEEN + 6).image.save(picture)
    words = ["ask", str(picture), "what is the total", "--method", "small-keys", "--localizer", "totals", "--json"]
    with pytest.raises(SystemExit):
        main(words)
    assert "got 'small-keys'" in capsys.readouterr().err
    assert main([*words, "--plugin", str(plugin), "--max-new-tokens", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["localizer"], found["tokens"]["after_ilp"]) == ("small-keys", "totals", KEPT)


def test_own_family(monkeypatch):
    monkeypatch.delitem(registry._families, "qwen3_vl_moe")  # as if crop did not know it
    with pytest.raises(ValueError, match="model_type must be one of"):
        crop.patch(tiny_experts(), None).__enter__()
    exec(block_of(FAMILIES, "crop.register_family("), {})
    model, inputs = tiny_experts(), experts_prompt()
    with torch.no_grad():
        plain = model(**inputs).logits
        with crop.patch(model, crop.by_name("crop", 1.0)):
            assert torch.equal(model(**inputs).logits, plain)
        with crop.patch(model, crop.by_name("crop", 0.25), crop.Region.box(0.0, 0.0, 0.5, 0.5)) as stats:
            assert not torch.equal(model(**inputs).logits, plain)
    assert stats.tokens_before == [24] and stats.tokens_after_ilp == [6] and len(stats.kept[0]) == 6


def tiny_experts() -> Any:
    """Qwen3-VL's mixture of experts, random and tiny."""
    text = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]),
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, temporal_patch_size=2,
        spatial_merge_size=2, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    markers = dict(image_token_id=90, vision_start_token_id=91, vision_end_token_id=92, video_token_id=93)
    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **markers)
    return transformers.Qwen3VLMoeForConditionalGeneration(config).eval()


def experts_prompt() -> dict[str, torch.Tensor]:
    """One picture of 4 x 6 tokens, four patches each, and a question."""
    ids = torch.tensor([[1, 2, 91, *[90] * 24, 92, 3, 4, 5]])
    return dict(
        input_ids=ids,
        mm_token_type_ids=(ids == 90).int(),
        image_grid_thw=torch.tensor([[1, 8, 12]]),
        pixel_values=torch.randn(96, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
    )


def test_own_layout():
    space: dict[str, Any] = dict(crop=crop)
    exec(block_of(FAMILIES, "def images"), space)
    config = SimpleNamespace(image_token_id=90, vision_config=SimpleNamespace(image_size=8, patch_size=4))
    ids = torch.tensor([[1, 90, 90, 90, 90, 2, 90, 90, 90, 90, 3]])
    found = space["images"](Prompt(config, ids, {}))
    assert [sample for sample, _ in found] == [0, 0]
    assert [layout.position.tolist() for _, layout in found] == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert torch.equal(found[0][1].center, VisionLayout.grid(2, 2).center)
