"""What people give the command line: several pictures, addresses, PDF files, damaged models; and how they stop it."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import crop.cli.ask
import crop.cli.images
from crop import embedded
from crop.cli import main as cli
from crop.cli.ask import Asker
from crop.cli.images import read_pictures
from tests.cli.conftest import SCENE

pytestmark = pytest.mark.usefixtures("one_thread", "loaded_once")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """The embedded model as a folder that anybody could have: its chat template takes several images."""
    return shutil.copytree(embedded.WEIGHTS, tmp_path_factory.mktemp("models") / "chatty")


def with_template(folder: Path, template: str) -> Path:
    shutil.copytree(embedded.WEIGHTS, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def ask(capsys, *words: str) -> dict:
    assert cli.main(["ask", *words, "--json", "--max-new-tokens", "2"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words: str) -> str:
    """The one line on stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and "Traceback" not in err
    return err.splitlines()[-1]


# -------------------------------------------------------------------------------------------------------- pictures
def test_pixels_are_fractions_of_the_picture(capsys, image):
    width, height = SCENE.image.size
    found = ask(capsys, image, "what", "--region", f"px:0,{height // 4},{width // 2},{height}+0,0,8,16")
    assert found["region"]["boxes"] == [[0.0, 0.25, 0.5, 1.0], [0.0, 0.0, 8 / width, 16 / height]]


@pytest.mark.parametrize("mixed", [False, True])
def test_several_images_each_with_its_region(capsys, image, chatty, mixed, tmp_path):
    out = tmp_path / "seen.png"
    first, second = ["--region", "0,0,0.5,0.5"], ["--region", "whole"]
    words = [image, *first, image, *second, "what is it"] if mixed else [image, image, "what is it", *first, *second]
    found = ask(capsys, *words, "--model", str(chatty), "--overlay", str(out))
    assert [entry["region"]["boxes"] for entry in found["images"]] == [[[0, 0, 0.5, 0.5]], [[0, 0, 1, 1]]]
    assert found["tokens"]["before"] == 1152 and found["region"] is None
    assert [entry["tokens"]["before"] for entry in found["images"]] == [576, 576]
    assert Image.open(out).width == 2 * 448
    assert cli.main(["ask", *words, "--model", str(chatty)]) == 0
    assert "region 2" in capsys.readouterr().out


def test_each_of_several_images_is_localized_by_itself(capsys, image, chatty):
    found = ask(capsys, image, image, "what is it", "--model", str(chatty), "--localizer", "attention")
    one, other = (entry["region"] for entry in found["images"])
    assert one == other and found["localizer"] == "attention"


def test_standard_input(capsys, image, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(Path(image).read_bytes())))
    assert ask(capsys, "-", "what")["tokens"]["before"] == 576
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"no picture")))
    assert "must be a picture, got standard input" in refused(capsys, "ask", "-", "what")


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    """The address of a local server."""
    SCENE.image.save(tmp_path / "scene.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_address_is_fetched_within_limits(served, monkeypatch):
    [picture] = read_pictures([f"{served}/scene.png"], allow_url=True)
    assert picture.tobytes() == SCENE.image.tobytes()
    with pytest.raises(OSError, match="nothing.png cannot be fetched: .*404"):
        read_pictures([f"{served}/nothing.png"], allow_url=True)
    with pytest.raises(ValueError, match="scene.png is an address: give --allow-url"):
        read_pictures([f"{served}/scene.png"])
    monkeypatch.setattr(crop.cli.images, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="must serve at most"):
        read_pictures([f"{served}/scene.png"], allow_url=True)
    monkeypatch.setattr(crop.cli.images, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(crop.cli.images, "MAX_SECONDS", -1.0)
    with pytest.raises((OSError, ValueError)):
        read_pictures([f"{served}/scene.png"], allow_url=True)


def test_pages_of_a_pdf_file(tmp_path):
    pytest.importorskip("pypdfium2", reason="extra pdf is not installed")
    pages = [Image.new("RGB", (200, 100), color) for color in ("red", "lime", "blue")]
    pages[0].save(tmp_path / "one.pdf")
    pages[0].save(tmp_path / "three.pdf", save_all=True, append_images=pages[1:])
    [only] = read_pictures([str(tmp_path / "one.pdf")])
    assert only.mode == "RGB" and only.width > 2 * only.height * 0.99
    first, last = read_pictures([str(tmp_path / "three.pdf")], pages=(1, 3))
    assert first.getpixel((50, 50))[0] > 200 and last.getpixel((50, 50))[2] > 200
    with pytest.raises(ValueError, match="has 3 pages: choose with --pages"):
        read_pictures([str(tmp_path / "three.pdf")])
    with pytest.raises(ValueError, match=r"must be in \[1, 3\], got 4"):
        read_pictures([str(tmp_path / "three.pdf")], pages=(4,))
    (tmp_path / "cut.pdf").write_bytes((tmp_path / "three.pdf").read_bytes()[:40])
    with pytest.raises(ValueError, match="cut.pdf must be a readable PDF file"):
        read_pictures([str(tmp_path / "cut.pdf")])


def test_a_pdf_file_without_the_extra_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    (tmp_path / "page.pdf").write_bytes(b"%PDF-1.4")
    assert 'pip install "crop-vlm[pdf]"' in refused(capsys, "ask", str(tmp_path / "page.pdf"), "what")


# ---------------------------------------------------------------------------------------------------------- models
def config_for(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGE = {
    "cut short": (cut, "model.safetensors is cut short: it must have"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "model.safetensors is a pointer of Git LFS"),
    "web page": (lambda f: (f / "tokenizer.json").write_text("<!doctype html><html>"), "tokenizer.json is a web page"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "other shapes": (
        lambda f: config_for(f, image_token_index=4, vision_config={"model_type": "siglip_vision_model", "hidden_size": 32,
                                                                    "num_attention_heads": 2, "num_hidden_layers": 1,
                                                                    "image_size": 384, "patch_size": 16, "intermediate_size": 8}),
        "must have shape"),
    "code of its own": (
        lambda f: config_for(f, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MineConfig"}),
        "--trust-remote-code"),
}  # fmt: skip


@pytest.mark.parametrize("harm, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_one_line_that_names_file_and_cause(
    harm, message, chatty, tmp_path, image, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    folder = shutil.copytree(chatty, tmp_path / "model")
    harm(folder)
    assert message in refused(capsys, "ask", image, "hi", "--model", str(folder))


@pytest.mark.parametrize("template, cause", [
    ("{{ messages[0]['content'] + ' ?' }}", "TypeError"), ("{{ raise_exception('text alone') }}", "text alone"),
    ("{{ messages[0].nobody.knows }}", "UndefinedError"), ("{% for %}", "TemplateSyntaxError"),
])  # fmt: skip
def test_a_chat_template_that_fails_is_named(template, cause, image, tmp_path, capsys):
    folder = with_template(tmp_path / "model", template)
    line = refused(capsys, "ask", image, "hi", "--model", str(folder))
    assert "chat template must take one user turn" in line and cause in line


@pytest.mark.parametrize("family, processor, package", [
    ("qwen2_5_vl", "Qwen2_5_VLProcessor", "torchvision"), ("smolvlm", "SmolVLMProcessor", "num2words"),
])  # fmt: skip
def test_a_processor_that_lacks_a_package_names_the_extra(family, processor, package, image, tmp_path, capsys):
    if all(map(importlib.util.find_spec, ("torchvision", "num2words"))):
        pytest.skip("the extra vision is installed")
    folder = tmp_path / family
    folder.mkdir()
    for file in embedded.WEIGHTS.glob("token*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    kind = {"qwen2_5_vl": "Qwen2VLImageProcessor", "smolvlm": "SmolVLMImageProcessor"}[family]
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"processor_class": processor, "image_processor_type": kind})
    )
    line = refused(capsys, "ask", image, "hi", "--model", str(folder))
    assert 'pip install "crop-vlm[vision]"' in line and "restart your runtime" in line or package in line  # not cut


def test_how_a_model_is_loaded(capsys, image, chatty):
    words = ["--model", str(chatty), "--attn-implementation", "eager", "--device-map", "cpu", "--trust-remote-code"]
    assert ask(capsys, image, "what", *words)["device"] == "cpu"
    model = crop.cli.ask.load(str(chatty), "cpu", "auto", attn_implementation="eager").model
    assert model.config.text_config._attn_implementation == "eager"


def test_a_second_model_that_is_damaged_is_named_too(capsys, image, chatty, tmp_path):
    cut(folder := shutil.copytree(chatty, tmp_path / "model"))
    words = ["ask", image, "what", "--localizer", "vlm", "--localizer-model", str(folder)]
    assert "model.safetensors is cut short" in refused(capsys, *words)
    head = tmp_path / "head.safetensors"
    head.write_bytes(embedded.HEAD.read_bytes()[:-100])
    words = ["ask", image, "what", "--localizer", "head", "--localizer-model", str(head)]
    assert "head.safetensors is cut short" in refused(capsys, *words)


# ------------------------------------------------------------------------------------------------ ends and terminals
def test_ctrl_c_is_one_line(capsys, image, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Asker, "ask", stop)
    assert cli.main(["ask", image, "what"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "crop: interrupted"


def test_no_room_on_the_device_is_one_line(capsys, image, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(Asker, "ask", fail)
    assert "CUDA out of memory. Tried to allocate 2 GiB" in refused(capsys, "ask", image, "what")


def test_an_overlay_that_fails_late_does_not_lose_the_answer(capsys, image, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as ended:
        cli.main(["ask", image, "what", "--json", "--overlay", str(tmp_path / "seen.png")])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and json.loads(out)["tokens"]["before"] == 576 and "no space left on device" in err


def test_a_terminal_of_ascii_shows_codes(image):
    program = [sys.executable, "-m", "crop", "ask", image, "\u5408\u8a08", "--localizer", "whole", "--model", "\u5408"]
    done = subprocess.run(program, capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, cwd=Path(crop.__file__).parents[1])  # fmt: skip
    assert done.returncode == 2 and b"Traceback" not in done.stderr and rb"\u5408" in done.stderr
