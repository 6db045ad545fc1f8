"""The page of ``crop app`` in headless Chromium, served by the command itself."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="extra app is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from crop.cli.ask import load
from crop.embedded import LONGEST, scenes
from crop.methods.registry import by_name

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or its driver is not installed")
EXAMPLES = list(scenes.examples(3))
PATIENCE = 120  # seconds; the machine may be busy
RED = (220, 20, 30)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen]]:
    """Address and process of the command, ended by Ctrl-C."""
    command = [sys.executable, "-m", "crop", "app", "--device", "cpu", "--max-new-tokens", str(LONGEST)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"crop app: (http://\S+)", line):
                break
        else:
            pytest.fail(process.stderr.read())
        yield found[1], process
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    finally:
        process.kill()


class Page:
    """A browser with the page in it, and what people do there."""

    def __init__(self, address: str, width: int = 1280, height: int = 1000) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        self.browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.address = address

    def load(self) -> None:
        self.browser.get(self.address)
        self.wait(lambda: self.run("return Boolean(window.drawBoxes) && Boolean(document.querySelector('#question'))"))

    def run(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, true) -> None:
        WebDriverWait(self.browser, PATIENCE, 0.1).until(lambda _: true())

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def value(self, selector: str) -> str:
        return self.find(f"{selector} :is(input, textarea)").get_attribute("value")

    def type(self, selector: str, text: str) -> None:
        field = self.find(f"{selector} :is(input, textarea)")
        field.clear()
        field.send_keys(text)

    @property
    def localizer(self) -> str:
        return self.find("#localizer input:checked").get_attribute("value")

    @property
    def refusal(self) -> str:
        return self.run("return document.querySelector('#refusal p')?.innerText ?? ''")

    @property
    def outcome(self) -> tuple[str, str]:
        return self.refusal, self.run("return document.querySelector('#numbers table')?.innerText ?? ''")

    @property
    def shown(self) -> tuple[int, int]:
        """Size of the picture that was given, (0, 0) where there is none."""
        image = "document.querySelector('#picture img')"
        return tuple(self.run(f"return [{image}?.naturalWidth ?? 0, {image}?.naturalHeight ?? 0]"))

    def upload(self, path: Path, size: tuple[int, int]) -> None:
        if self.browser.find_elements(By.CSS_SELECTOR, "#picture button[aria-label=Clear]"):
            self.find("#picture button[aria-label=Clear]").click()
            self.wait(lambda: self.shown == (0, 0))
        self.find("#picture input[type=file]").send_keys(str(path))
        self.wait(lambda: self.shown == size)

    def ask(self) -> None:
        """Click, and wait for what comes of it: other numbers (times differ) or another refusal."""
        before = self.outcome
        self.find("#question button").click()
        self.wait(lambda: any(self.outcome) and self.outcome != before)

    def screenshot(self) -> np.ndarray:
        """(height, width, 3) uint8."""
        return np.asarray(Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB"))


@pytest.fixture(scope="module")
def opened(server) -> Iterator[Page]:
    page = Page(server[0])
    yield page
    page.browser.quit()


@pytest.fixture
def page(opened) -> Page:
    opened.load()
    return opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for number, (scene, _) in enumerate(EXAMPLES):
        scene.image.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(EXAMPLES))]


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, str]]:
    """What the model says about each example, pruned and unpruned."""
    asker = load("embedded", "cpu", "auto")
    ways = (by_name("crop", 0.11), asker.localizer("head")), (None, asker.localizer("whole"))
    return [
        tuple(
            asker.ask(scene.image, question.text, method=method, localizer=find, max_new_tokens=LONGEST).text
            for method, find in ways
        )
        for scene, question in EXAMPLES
    ]


def test_a_picture_and_a_question_bring_two_answers_the_overlay_and_numbers(page, pictures, answers):
    question = EXAMPLES[2][1]
    page.upload(pictures[2], (384, 384))
    page.type("#question", question.text)
    page.ask()
    assert (page.value("#pruned"), page.value("#plain")) == answers[2] and page.refusal == ""
    page.wait(lambda: page.run("return document.querySelector('#seen img')?.naturalWidth") == 448)
    rows = [row.text for row in page.browser.find_elements(By.CSS_SELECTOR, "#numbers tr")]
    assert rows[1] == "vision tokens 576 576" and rows[3] == "that reach its last layer 63 576"
    assert [row.split(" ms")[0].rstrip(" 0123456789.") for row in rows[4:]] == [
        "preprocess", "localizer", "plan", "vision encoder", "language model, prefill", "language model, decode", "total",
    ]  # fmt: skip
    assert "by head" in page.find("#numbers").text
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_nothing_is_fetched_from_elsewhere(page):
    names = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names and {urlparse(name).hostname for name in names} == {"127.0.0.1"}


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_box_is_dragged_where_the_eye_sees_it(page, tmp_path, large):
    """A red field of a picture that a camera turned: the corners are taken from a screenshot."""
    scale = 8 if large else 1
    upright = Image.new("RGB", (200 * scale, 100 * scale), "white")
    upright.paste(RED, tuple(scale * edge for edge in (120, 30, 160, 60)))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    page.upload(tmp_path / "turned.jpg", upright.size)
    page.type("#question", "what color is the square")
    assert page.localizer == "head"
    around = page.find("#picture").rect
    red = (np.abs(page.screenshot().astype(int) - RED) < 40).all(-1)[: int(around["y"] + around["height"])]
    rows, columns = np.nonzero(red[:, : int(around["x"] + around["width"])])
    (left, right), (top, bottom) = (columns.min(), columns.max()), (rows.min(), rows.max())
    mouse = ActionChains(page.browser, duration=0)
    mouse.w3c_actions.pointer_action.move_to_location(int(right), int(bottom))  # from below, which is right, too
    mouse.click_and_hold().move_by_offset(int(left - right), int(top - bottom)).release().perform()
    page.wait(lambda: page.localizer == "box")
    assert np.abs(np.array(page.value("#box").split(","), float) - (0.6, 0.3, 0.8, 0.6)).max() < 0.015
    frame = page.run("return document.querySelector('#boxes div').getBoundingClientRect().toJSON()")
    edges = [frame[side] for side in ("left", "top", "right", "bottom")]
    assert np.abs(np.array(edges) - (left, top, right, bottom)).max() < 3
    page.ask()
    assert "by box" in page.find("#numbers").text and "confidence 1.00" in page.find("#numbers").text

    page.find("#picture img").click()  # takes it away
    page.wait(lambda: page.localizer == "head")
    assert page.value("#box") == "" and not page.browser.find_elements(By.CSS_SELECTOR, "#boxes div")


def test_another_picture_takes_the_box_away(page, pictures, answers):
    page.upload(pictures[0], (384, 384))
    page.type("#box", "px:96,96,192,288")
    page.wait(lambda: page.localizer == "box")
    style = page.find("#boxes div").get_attribute("style")
    assert "left: 25%" in style and "top: 25%" in style and "width: 25%" in style and "height: 50%" in style
    page.find(".gallery-item:nth-child(2)").click()  # an example
    page.wait(lambda: page.localizer == "head" and page.value("#box") == "")
    page.wait(lambda: page.value("#question") == EXAMPLES[1][1].text)
    page.ask()
    assert page.value("#pruned") == answers[1][0]


def test_what_goes_wrong_is_one_sentence(page, pictures, tmp_path):
    page.upload(pictures[2], (384, 384))
    page.ask()
    assert page.refusal == "There is no question yet: type one."
    page.type("#question", EXAMPLES[2][1].text)
    page.ask()
    assert page.refusal == "" and page.value("#pruned")
    page.type("#box", "1,2,<b>3</b>")
    page.wait(lambda: page.localizer == "box")
    page.ask()
    assert page.refusal == "box must be four numbers X0,Y0,X1,Y1, got '1,2,<b>3</b>'"
    assert page.value("#pruned") == page.value("#plain") == "" and not page.browser.find_elements(
        By.CSS_SELECTOR, "#seen img"
    )

    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:200])
    page.upload(tmp_path / "broken.png", (384, 384))  # its header is whole
    page.wait(lambda: page.value("#box") == "")
    page.ask()
    assert page.refusal.startswith("The file must be ") and "broken.png" in page.refusal
    assert not page.browser.find_elements(By.CSS_SELECTOR, ".toast-body")
    assert "Traceback" not in page.browser.page_source


def test_two_users_at_once(server, page, pictures, answers):
    other = Page(server[0])
    try:
        other.load()
        for one, number in ((page, 1), (other, 2)):
            one.upload(pictures[number], (384, 384))
            one.type("#question", EXAMPLES[number][1].text)
        for one in (page, other):
            one.find("#question button").click()
        for one, number in ((page, 1), (other, 2)):
            one.wait(lambda one=one: "localizer included" in one.find("#numbers").text)
            assert (one.value("#pruned"), one.value("#plain")) == answers[number]
    finally:
        other.browser.quit()


def test_a_narrow_page_shows_the_answers(server, pictures):
    narrow = Page(server[0], 390, 844)
    try:
        narrow.load()
        narrow.upload(pictures[2], (384, 384))
        narrow.type("#question", EXAMPLES[2][1].text)
        narrow.ask()
        narrow.wait(lambda: 0 <= narrow.find("#pruned").rect["y"] - narrow.run("return scrollY") < 600)
        assert narrow.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        narrow.browser.quit()


def test_files_of_the_server_stay_there(server, pictures):
    address = server[0].rstrip("/") + "/gradio_api/call/ask"
    picture = {"path": str(pictures[0]), "meta": {"_type": "gradio.FileData"}}
    data = json.dumps({"data": [picture, "what is this", "head", "", "crop", 11]}).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    answer = urllib.request.urlopen(f"{address}/{event}").read().decode()
    assert answer.startswith("event: error") and "complete" not in answer


def test_only_this_machine_is_served(server):
    port = urlparse(server[0]).port
    with socket.create_connection(("127.0.0.1", port)):
        pass
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass


def test_a_port_that_is_taken(server):
    port = str(urlparse(server[0]).port)
    done = subprocess.run([sys.executable, "-m", "crop", "app", "--port", port], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"--host 127.0.0.1 --port {port} cannot be used: " in done.stderr.splitlines()[-1]
