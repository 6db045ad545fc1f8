"""``crop app``: its options, and what it does."""

from __future__ import annotations

import argparse

from crop.cli.options import add_model_options, load_plugin, need_packages, number

EXAMPLES = """\
examples:
  crop app                                           the embedded model, and pictures that it can read
  crop app --model Qwen/Qwen2.5-VL-3B-Instruct --device cuda --dtype bfloat16
"""

port_number = number(int, 1, 65535, "a port from 1 to 65535")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``crop app``."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="where to listen (default 127.0.0.1: this machine alone); whoever reaches it can use the page")  # fmt: skip
    parser.add_argument("--port", type=port_number, metavar="N", help="default: the first free one from 7860 on")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. UsageError and what the package refuses."""
    need_packages("app", "app")
    for name in options.plugin:
        load_plugin(name)
    from crop.cli.app import App
    from crop.cli.ask import load_chosen

    app = App(load_chosen(options), options.max_new_tokens)
    for name, why in app.missing.items():
        print(f"without localizer {name}: {why}")
    from crop.cli.page import serve

    serve(app, options.model, options.host, options.port)
    return 0
