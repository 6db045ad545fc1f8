"""``crop serve``: a model behind an OpenAI-compatible server of vLLM, with a region per request."""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crop.cli.options import UsageError, fraction, number
from crop.integrations.vllm.families import ENTRIES
from crop.integrations.vllm.settings import LOCALIZERS, Settings
from crop.methods.base import POOL_MODES
from crop.patching.positions import POLICIES

EXAMPLES = """\
examples:
  crop serve Qwen/Qwen2.5-VL-7B-Instruct --keep 0.11
  crop serve Qwen/Qwen2.5-VL-7B-Instruct --localizer ocr
      requests that say nothing are localized, too; one that says "crop_keep": 1.0 is not
  crop serve llava-hf/llava-1.5-13b-hf -- --tensor-parallel-size 2 --dtype bfloat16
      what stands behind -- are vLLM's own options
"""
SERVER = "vllm.entrypoints.openai.api_server"
DEFAULTS = Settings()
OWN = ("--model", "--host", "--port")  # this command needs to know them


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``crop serve``."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hugging Face hub name, or embedded")
    parser.add_argument("vllm", nargs="*", metavar="-- OPTION", help="further options of vLLM's server")
    parser.add_argument("--keep", type=fraction, default=DEFAULTS.keep, metavar="F",
                        help="budget of requests that bring a region and none of their own (default %(default)s)")  # fmt: skip
    parser.add_argument("--mode", choices=POOL_MODES, default=DEFAULTS.mode, help="how tokens are pooled")
    parser.add_argument("--localizer", choices=LOCALIZERS, help="for requests that say nothing; needs its extra")
    parser.add_argument("--positions", choices=POLICIES, default=DEFAULTS.positions)
    parser.add_argument("--feature-cache", type=number(float, 0, 1e6, "a number of GiB from 0 on"), metavar="GIB",
                        default=DEFAULTS.feature_cache, help="vision features that are kept (default %(default)s)")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default %(default)s)")
    parser.add_argument("--port", type=number(int, 1, 65535, "a port from 1 to 65535"), default=8000, metavar="N")


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the exit status of the server. UsageError: no vLLM, or a model that it cannot serve pruned."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError('crop serve needs vllm: pip install "crop-vlm[vllm]"')
    command = server_command(options)
    further, _ = vllm_options(options.vllm)
    check_model(command[command.index("--model") + 1], further.revision, bool(further.trust_remote_code))
    if listening(options, further):
        raise UsageError(f"--port must be free, got {options.port}, where something listens already")
    print(shlex.join(command), flush=True)
    before = signal.signal(signal.SIGTERM, _end)  # whoever ends this command ends the server
    server = subprocess.Popen(command)
    try:
        while server.poll() is None and not listening(options, further):
            time.sleep(1)
        if server.poll() is None:
            print(f"\nready; try:\n\n{curl(options, further)}\n", flush=True)
        return server.wait()
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.wait()
        signal.signal(signal.SIGTERM, before)


def _end(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def vllm_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Of vLLM's own options those that are read here, also from its ``--config`` file, which gives way to words; and the
    words without ``--hf-overrides``, which is a mapping then.

    Raises:
        UsageError: options that crop serve takes itself; overrides that are no JSON object, or have the key "crop"; a file
            that cannot be read.
    """
    parser = argparse.ArgumentParser("crop serve", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("--hf-overrides", default="{}")
    spelled = _spelled(words)
    _, rest = parser.parse_known_args(spelled)
    for name in (*OWN, "--config", "--revision", "--uds", "--ssl-certfile"):
        parser.add_argument(name)
    for name in ("--served-model-name", "--api-key"):
        parser.add_argument(name, nargs="+")
    parser.add_argument("--trust-remote-code", action=argparse.BooleanOptionalAction)
    found, _ = parser.parse_known_args(spelled)
    if found.config is not None:
        found, _ = parser.parse_known_args([*_spelled(config_words(found.config)), *spelled])
    for name in OWN:
        if getattr(found, name[2:]) is not None:
            raise UsageError(f"{name} must stand before --, got it among vLLM's options; crop serve takes it itself")
    text = found.hf_overrides
    try:
        found.hf_overrides = json.loads(text)
    except json.JSONDecodeError:
        found.hf_overrides = None
    if not isinstance(found.hf_overrides, dict):
        raise UsageError(f"--hf-overrides must be a JSON object, got {text}")
    if "crop" in found.hf_overrides:
        raise UsageError('--hf-overrides must come without "crop", which crop serve writes; use --keep, --mode, ...')
    return found, rest


def _spelled(words: Sequence[str]) -> list[str]:
    """With names as vLLM's help has them: it takes underscores, too."""
    names = [word.partition("=")[0].replace("_", "-") for word in words]
    if any(name.startswith("--hf-overrides.") for name in names):
        raise UsageError("--hf-overrides must be one JSON object, got one of its keys as an option")
    return [
        name + word[len(name) :] if name.startswith("--") else word for name, word in zip(names, words, strict=True)
    ]


def config_words(path: str) -> list[str]:
    """The options in a file for vLLM's ``--config``, as they would stand on the command line. UsageError: no such file."""
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config must be a file of vLLM's options, got {path}: {error}") from None
    if not isinstance(given, dict):
        raise UsageError(f"--config must be a mapping of vLLM's options, got {given!r:.80} in {path}")
    words: list[str] = []
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name}", *map(str, values)]
    return words


def server_command(options: argparse.Namespace) -> list[str]:
    """What starts vLLM's server. UsageError: see ``vllm_options``."""
    further, rest = vllm_options(options.vllm)
    model, more = options.model, []
    if model == "embedded":
        from crop import embedded

        model, more = str(embedded.WEIGHTS), ["--max-model-len", "1024", "--served-model-name", "embedded"]
    names = ("keep", "mode", "localizer", "positions", "feature_cache")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    # A request's arguments are read only where the server trusts them: that is where a region stands.
    own = ["--trust-request-mm-kwargs", "--hf-overrides", json.dumps(further.hf_overrides | {"crop": given})]
    listen = ["--host", options.host, "--port", str(options.port)]
    return [sys.executable, "-m", SERVER, "--model", model, *own, *listen, *more, *rest]


def check_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuse a model of a family that would be served unpruned. UsageError."""
    from transformers import AutoConfig

    chosen = {} if revision is None else {"revision": revision}
    # Neither True nor False asks the user, and waits.
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **chosen)
    found = config.architectures or []
    if not any(name.removeprefix("Crop") in ENTRIES for name in found):
        raise UsageError(f"model {model!r} must be of one of {', '.join(ENTRIES)}, got {', '.join(found) or 'none'}")


def listening(options: argparse.Namespace, further: argparse.Namespace) -> bool:
    """Whether a server listens where this one will: vLLM does when its engine is ready, not before."""
    try:
        if further.uds is None:
            socket.create_connection((_here(options.host), options.port), timeout=2).close()
        else:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(further.uds)
    except OSError:
        return False
    return True


def _here(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def curl(options: argparse.Namespace, further: argparse.Namespace) -> str:
    """A request with a region, to be pasted: it brings a small picture along."""
    from PIL import Image

    picture, data = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    picture.paste((200, 30, 30), (8, 8, 32, 32))
    picture.save(data, "PNG", optimize=True)
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what color is the square"}]
    body: dict[str, Any] = {
        "model": (further.served_model_name or [options.model])[0],
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "mm_processor_kwargs": {"crop_region": [0.1, 0.1, 0.55, 0.55]},
    }
    host = "localhost" if further.uds else _here(options.host)
    host = f"[{host}]" if ":" in host else host
    words = ["curl", "-s", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    words += ["--unix-socket", further.uds] if further.uds else []
    words += ["--insecure"] if further.ssl_certfile else []  # the certificate names another host than this one
    words += ["-H", f"Authorization: Bearer {further.api_key[0]}"] if further.api_key else []
    line = shlex.join(words)
    if not further.api_key and os.environ.get("VLLM_API_KEY"):
        line += ' -H "Authorization: Bearer $VLLM_API_KEY"'
    place = "" if further.uds else f":{options.port}"
    return f"{line} {'https' if further.ssl_certfile else 'http'}://{host}{place}/v1/chat/completions"
