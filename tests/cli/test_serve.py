"""`crop serve`: the command it starts, what it refuses, the line it prints. Engines are tests/integrations/vllm/engine."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys

import pytest
import transformers

from crop import embedded
from crop.cli import serve_command
from crop.cli.main import main
from crop.cli.options import UsageError
from crop.integrations.vllm.settings import Settings

pytestmark = pytest.mark.fast
LISTENS = """
import socket, sys
kind, place = sys.argv[1], sys.argv[2]
server = socket.socket(socket.AF_UNIX) if kind == "unix" else socket.socket()
server.bind(place if kind == "unix" else ("127.0.0.1", int(place)))
server.listen()
server.accept()
sys.exit(7)
"""


@pytest.fixture
def vllm(monkeypatch):
    """As if it were installed."""
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == "vllm" else find(name, *more))


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve_command.add_options(parser)
    return parser.parse_intermixed_args(words)


def settings(command: list[str]) -> Settings:
    given = json.loads(command[command.index("--hf-overrides") + 1])
    return Settings(**given["crop"])


def test_the_command_carries_settings_and_vllms_own_options():
    command = serve_command.server_command(parsed("--keep", "0.11", "some/model", "--port", "8123"))
    assert command[:5] == [sys.executable, "-m", serve_command.SERVER, "--model", "some/model"]
    assert "--trust-request-mm-kwargs" in command and command[-4:] == ["--host", "127.0.0.1", "--port", "8123"]
    assert settings(command) == Settings(keep=0.11)
    more = ["--mode", "max", "--localizer", "ocr", "--positions", "compact", "--feature-cache", "0"]
    command = serve_command.server_command(parsed("M", *more, "--", "--tensor-parallel-size", "2"))
    assert settings(command) == Settings(mode="max", localizer="ocr", positions="compact", feature_cache=0)
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    command = serve_command.server_command(parsed("embedded"))
    assert str(embedded.WEIGHTS) in command and command[-2:] == ["--served-model-name", "embedded"]


@pytest.mark.parametrize("name", ["--hf-overrides", "--hf_overrides"])
def test_overrides_of_the_user_and_settings_go_together(name):
    words = ["M", "--keep", "0.11", "--", "-tp", "2", name, '{"text_config": {"x_y": 1}}', "--dtype=auto"]
    command = serve_command.server_command(parsed(*words))
    assert settings(command) == Settings(keep=0.11) and command[-3:] == ["-tp", "2", "--dtype=auto"]
    assert sum("overrides" in word for word in command) == 1
    assert json.loads(command[command.index("--hf-overrides") + 1])["text_config"] == {"x_y": 1}


@pytest.mark.parametrize(
    "words, error",
    [
        (["--hf-overrides", '{"crop": {"keep": 0.2}}'], '--hf-overrides must come without "crop"'),
        (["--hf-overrides=[1]"], r"--hf-overrides must be a JSON object, got \[1\]"),
        (["--hf-overrides", "{"], "--hf-overrides must be a JSON object, got {"),
        (["--hf-overrides.crop.keep", "0.2"], "--hf-overrides must be one JSON object"),
        (["--port", "8001"], "--port must stand before --"),
        (["--host=0.0.0.0"], "--host must stand before --"),
        (["--model", "other"], "--model must stand before --"),
    ],
)
def test_options_of_vllm_that_would_undo_those_of_the_command(words, error):
    with pytest.raises(UsageError, match=error):
        serve_command.server_command(parsed("M", "--", *words))


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], {"trust_remote_code": False}),
        (["--revision", "abc", "--trust_remote_code"], {"trust_remote_code": True, "revision": "abc"}),
    ],
)
def test_the_configuration_is_read_as_the_server_will_and_nobody_is_asked(words, wanted, vllm, monkeypatch):
    asked = []

    def read(model, **given):
        asked.append(given)
        raise OSError("far enough")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", read)
    with pytest.raises(SystemExit):
        main(["serve", "M", "--", *words])
    assert asked == [wanted]
    command = serve_command.server_command(parsed("M", "--", *words))
    assert command[len(command) - len(words) :] == [word.replace("_", "-") for word in words]


def test_what_would_be_served_unpruned_is_refused(tmp_path):
    serve_command.check_model(str(embedded.WEIGHTS))
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="must be of one of LlavaForConditionalGeneration, .*got LlamaForCausalLM"):
        serve_command.check_model(str(tmp_path))


def test_wrong_use_is_one_line(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    for words, error in (
        (["embedded"], r'crop serve needs vllm: pip install "crop-vlm[vllm]"'),
        (["embedded", "--localizer", "attention"], "invalid choice: 'attention'"),
        (["embedded", "--keep", "0"], "must be a number above 0 and at most 1, got 0"),
        (["embedded", "--port", "0"], "must be a port from 1 to 65535, got 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["serve", *words])
        assert ended.value.code == 2 and error in capsys.readouterr().err


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(monkeypatch, capsys, kind: str, place: str, words: list[str]) -> list[str]:
    """Words of the printed curl line, with a stand-in that listens there and ends with 7."""
    stand_in = [sys.executable, "-c", LISTENS, kind, place, "--model", str(embedded.WEIGHTS)]
    monkeypatch.setattr(serve_command, "server_command", lambda options: stand_in)
    assert main(["serve", *words]) == 7
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("curl "))
    return shlex.split(line)


def test_it_waits_until_the_server_answers_prints_a_line_and_ends_with_it(vllm, capsys, monkeypatch, free_port):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    words = serve(monkeypatch, capsys, "port", str(free_port), ["embedded", "--port", str(free_port)])
    body = json.loads(words[words.index("-d") + 1])
    assert words[-1] == f"http://127.0.0.1:{free_port}/v1/chat/completions" and body["model"] == "embedded"
    assert len(body["mm_processor_kwargs"]["crop_region"]) == 4
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "--insecure" not in words and not any("Authorization" in word for word in words)


def test_the_line_follows_vllms_options(vllm, capsys, monkeypatch, free_port, tmp_path):
    more = ["--served-model-name", "mine", "other", "--ssl-certfile", "cert.pem", "--api-key=secret"]
    given = ["M", "--host", "0.0.0.0", "--port", str(free_port), "--", *more]
    monkeypatch.setattr(serve_command, "check_model", lambda *_: None)
    words = serve(monkeypatch, capsys, "port", str(free_port), given)
    assert json.loads(words[words.index("-d") + 1])["model"] == "mine" and "--insecure" in words
    assert "Authorization: Bearer secret" in words
    assert words[-1] == f"https://127.0.0.1:{free_port}/v1/chat/completions"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    path = str(tmp_path / "socket")
    words = serve(monkeypatch, capsys, "unix", path, ["M", "--", "--uds", path])
    assert words[words.index("--unix-socket") + 1] == path and words[-1] == "http://localhost/v1/chat/completions"
    assert "Authorization: Bearer $VLLM_API_KEY" in words  # the shell's, not written out


def test_a_port_in_use_is_refused(vllm, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as used, pytest.raises(SystemExit) as ended:
        main(["serve", "embedded", "--port", str(used.getsockname()[1])])
    assert ended.value.code == 2 and "--port must be free" in capsys.readouterr().err


def test_a_file_of_options_is_read_like_words(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "hf-overrides: {text_config: {x_y: 1}}\ntrust_remote_code: true\nenforce-eager: false\n"
        "served-model-name: [mine, other]\nrevision: abc\n"
    )
    words = ["M", "--", "--revision", "def", "--config", str(path)]
    further, rest = serve_command.vllm_options(words[2:])
    assert further.trust_remote_code and further.revision == "def" and further.served_model_name == ["mine", "other"]
    assert rest == words[2:]
    command = serve_command.server_command(parsed(*words))
    assert json.loads(command[command.index("--hf-overrides") + 1])["text_config"] == {"x_y": 1}
    assert settings(command) == Settings() and command[-4:] == words[2:]


@pytest.mark.parametrize(
    "text, error",
    [
        ("port: 8001", "--port must stand before --"),
        ("hf_overrides: {crop: {keep: 0.2}}", '--hf-overrides must come without "crop"'),
        ("hf-overrides: 5", "--hf-overrides must be a JSON object, got 5"),
        ("hf-overrides.crop.keep: 5", "--hf-overrides must be one JSON object"),
        ("- 1", "--config must be a mapping of vLLM's options"),
        ("a: [", "--config must be a file of vLLM's options"),
        (None, "--config must be a file of vLLM's options, got .*No such file"),
    ],
)
def test_a_file_that_would_undo_the_commands_own(text, error, tmp_path):
    path = tmp_path / "options.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=error):
        serve_command.server_command(parsed("M", "--", "--config", str(path)))


def test_a_server_that_does_not_start_is_its_exit_status(vllm, capsys, monkeypatch):
    stand_in = [sys.executable, "-c", "raise SystemExit(3)", "--model", str(embedded.WEIGHTS)]
    monkeypatch.setattr(serve_command, "server_command", lambda options: stand_in)
    assert main(["serve", "embedded", "--port", "1"]) == 3
    assert "ready" not in capsys.readouterr().out


def test_who_ends_the_command_ends_the_server():
    """The stand-in says its process id and sleeps."""
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"""
import importlib.util, sys
from crop.cli import main, serve_command
importlib.util.find_spec = lambda name: True
serve_command.server_command = lambda options: [sys.executable, "-c", {sleeper!r}, "--model", "M"]
serve_command.check_model = lambda *_: None
main.main(["serve", "M", "--port", "1"])
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    server = int(next(line for line in command.stdout if line.strip().isdigit()))
    command.terminate()
    assert command.wait(timeout=120) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
