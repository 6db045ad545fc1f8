"""`crop serve` with the embedded model: its curl line, streams, broken requests and lost clients from 16 connections, a restart."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from crop import embedded
from tests.integrations.vllm.engine import cases
from tests.integrations.vllm.test_request import BOX, WRONG

FIRST = embedded.scenes.UNSEEN + 200
ENGINE = ["--dtype", "float32", "--block-size", "32", "--max-num-seqs", "16", "--enforce-eager"]


class Server:
    """`crop serve embedded` in a process of its own."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self.process: Any = None

    def start(self) -> None:
        """Until it is ready; ``said``: what it has printed since it began."""
        command = [sys.executable, "-m", "crop", "serve", "embedded", "--keep", "0.11", "--port", str(self.port)]
        with self.log.open("w") as out:
            self.process = subprocess.Popen([*command, "--", *ENGINE], stdout=out, stderr=subprocess.STDOUT)
        for _ in range(400):
            if "ready; try:" in self.said() or self.process.poll() is not None:
                break
            time.sleep(1)
        assert "ready; try:" in self.said(), self.said()[-3000:]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.refuses()

    def refuses(self) -> None:
        """vLLM's server has ended with the command."""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server") / "log")
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def asked() -> list[tuple[dict[str, Any], str]]:
    """(body, answer of `crop.patch`) of questions about rendered pictures."""
    model, processor = embedded.load()
    found = []
    for seed in range(FIRST, FIRST + 8):
        scene = embedded.scene(seed)
        question = next(question for question in scene.questions if question.boxes)
        case = cases.Case(1, [[list(box) for box in question.boxes]], 0.11)
        tokens, *_ = cases.answer(model, processor, embedded.prompt(question.text), [scene.image], case)
        stop = tokens.index(2) if 2 in tokens else len(tokens)
        answer = processor.decode(tokens[:stop], skip_special_tokens=True)
        found.append((body(scene.image, question.text, crop_region=case.regions), answer.strip()))
    return found


def body(image: Any, question: str, **wishes: Any) -> dict[str, Any]:
    data = io.BytesIO()
    image.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    found = {"model": "embedded", "messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
    return found | {"mm_processor_kwargs": wishes}


def post(server: Server, given: dict[str, Any]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(given), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def text_of(found: tuple[int, bytes]) -> str:
    assert found[0] == 200, found
    return json.loads(found[1])["choices"][0]["message"]["content"].strip()


def test_the_printed_line_works(server):
    line = re.search(r"^curl .*$", server.said(), re.M).group()
    found = json.loads(subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout)
    assert found["usage"]["prompt_tokens"] < 100 and found["choices"][0]["message"]["content"]


def test_answers_whole_and_streamed(server, asked):
    for given, answer in asked:
        assert text_of(post(server, given)) == answer
    given, answer = asked[0]
    status, stream = post(server, given | {"stream": True})
    parts = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: {")]
    assert status == 200 and "".join(p["choices"][0]["delta"].get("content") or "" for p in parts).strip() == answer


def test_the_ocr_localizer_says_what_it_took(server):
    page = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(page).text((30, 200), "Date 2026-05-01", "black", ImageFont.load_default(40))
    status, found = post(server, body(page, "what is the date ?", crop_localizer="ocr"))
    assert status == 200 and json.loads(found)["usage"]["prompt_tokens"] < 100
    assert re.search(r"crop: localizer ocr took \d+ ms for 1 images", server.said())


def test_what_is_malformed_is_a_400_that_says_so(server, asked):
    for count, wishes, error in WRONG:
        try:
            text = json.dumps(wishes)
        except ValueError:  # more digits than Python writes
            continue
        if count != 1:
            continue
        given = asked[0][0] | {"mm_processor_kwargs": {f"crop_{name}": value for name, value in wishes.items()}}
        status, found = post(server, given)
        assert status == 400, (wishes, status, found)
        if "NaN" not in text and "Infinity" not in text:  # no JSON: that is said before anyone looks
            assert re.search(error, json.loads(found)["error"]["message"]), (wishes, found)


def lose(server: Server, given: dict[str, Any]) -> None:
    """A client that goes away: before the answer, or in the middle of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    stream = json.dumps(given | {"stream": True, "max_tokens": 200, "ignore_eos": True})
    connection.request("POST", "/v1/chat/completions", stream, {"Content-Type": "application/json"})
    if random.random() < 0.5:
        connection.getresponse().read(20)
    connection.close()


def test_200_requests_good_bad_and_lost_from_16_connections(server, asked):
    def one(number: int) -> str:
        given, answer = asked[number % len(asked)]
        if number % 4 == 1:
            status, found = post(server, given | {"mm_processor_kwargs": {"crop_region": [BOX, BOX]}})
            return "" if status == 400 and b"one entry per image, got 2 for 1" in found else f"{status} {found}"
        if number % 10 == 2:
            lose(server, given)
            return ""
        got = text_of(post(server, given))
        return "" if got == answer else f"{got!r} instead of {answer!r}"

    with ThreadPoolExecutor(16) as pool:
        assert [text for text in pool.map(one, range(200)) if text] == []
    assert server.process.poll() is None
    assert text_of(post(server, asked[0][0])) == asked[0][1]
    for _ in range(100):  # those of clients that went away end, too
        if running(server) == 0:
            break
        time.sleep(1)
    assert running(server) == 0


def running(server: Server) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_an_engine_that_is_killed_is_started_again_and_right(server, asked):
    """Clients get right answers or errors while it dies, the command ends, and its next start serves the same port."""
    import psutil  # comes with vLLM

    def client(number: int) -> tuple[int, list[str]]:
        wrong: list[str] = []
        for turn in range(1000):
            given, answer = asked[(number + turn) % len(asked)]
            try:
                found = post(server, given)
            except (OSError, http.client.HTTPException):
                break
            if found[0] != 200:
                break
            wrong += [] if text_of(found) == answer else [text_of(found)]
        return turn, wrong

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        time.sleep(5)
        family = psutil.Process(server.process.pid).children(recursive=True)
        next(one for one in family if "EngineCore" in " ".join(one.cmdline())).kill()
        found = [one.result() for one in clients]
    assert all(wrong == [] for _, wrong in found) and sum(turns for turns, _ in found) > 0
    server.process.wait(timeout=300)
    server.refuses()
    server.start()
    for given, answer in asked:
        assert text_of(post(server, given)) == answer
    other = asked[0][0] | {"mm_processor_kwargs": {"crop_region": [0.0, 0.0, 0.2, 0.2], "crop_keep": 0.05}}
    assert post(server, other)[0] == 200 and text_of(post(server, asked[0][0])) == asked[0][1]
