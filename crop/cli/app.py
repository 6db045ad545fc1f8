"""The page of ``crop app``: a picture and a question, answered with and without pruning."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crop.cli.ask import EMBEDDED, STAGES, Answer, Asker
from crop.cli.images import MAX_BYTES, open_image
from crop.cli.options import REFUSED, SECOND_MODELS, UsageError, parse_region
from crop.cli.output import speed, where
from crop.cli.visualize import overlay
from crop.embedded import scenes
from crop.localizers.base import Localizer
from crop.localizers.pretrained import one_line
from crop.localizers.registry import localizer_names
from crop.methods.registry import by_name, method_names

if TYPE_CHECKING:
    import gradio
    from PIL.Image import Image

EXAMPLES = 6
SCRIPT = Path(__file__).with_name("app.js")
STYLE = """
#picture img { touch-action: none; cursor: crosshair }
#boxes { position: absolute; pointer-events: none; z-index: 2 }
#boxes div { position: absolute; border: 2px solid rgb(255, 140, 0); box-shadow: 0 0 0 1px black, inset 0 0 0 1px black }
"""
ABOUT_EMBEDDED = (
    "The model is the small one that comes with crop. It answers questions about rendered pictures such as the examples, "
    "in the words of their questions, and no others; `crop app --model NAME` takes another one."
)
STAGE_TITLES = {"vision": "vision encoder", "prefill": "language model, prefill", "decode": "language model, decode"}


class App:
    """What the page asks: one model for all who open it, one question at a time; what they chose comes with each call.

    Args:
        asker: the model.
        max_new_tokens: length of an answer at most.
    Attributes:
        localizers: name -> localizer, of those that need nothing but the model.
        missing: name -> why it is not among them, where an extra is not installed.
    """

    def __init__(self, asker: Asker, max_new_tokens: int = 32) -> None:
        self.asker, self.max_new_tokens = asker, max_new_tokens
        self.localizers: dict[str, Localizer] = {}
        self.missing: dict[str, str] = {}
        self._turn = threading.Lock()  # a block is alone on its model, and times are of one question
        for name in localizer_names():
            if name in (*SECOND_MODELS, "box") or (name == "head" and asker.head is None):
                continue
            try:
                self.localizers[name] = asker.localizer(name)
            except ImportError as error:
                self.missing[name] = one_line(error)

    def answer(
        self, picture: str | None, question: str, localizer: str, region: str, method: str, percent: float
    ) -> tuple[str, str, Image, str]:
        """Ask with and without pruning.

        Args:
            picture: file name, None where there is none yet.
            question: plain text.
            localizer: name among ``localizers``, or "box" for ``region``: X0,Y0,X1,Y1 as for ``parse_region``.
            method: name as for ``by_name``. percent: of the vision tokens that stay, in (0, 100].
        Returns:
            Answers with and without pruning, what the model saw, counts and times in Markdown.
        Raises:
            UsageError: no picture, no question, no box. What the package refuses: ``REFUSED``.
        """
        if not picture:
            raise UsageError("There is no picture yet: drop one, or click on an example.")
        if not question.strip():
            raise UsageError("There is no question yet: type one.")
        if localizer == "box" and not region.strip():
            raise UsageError("There is no box yet: drag one on the picture, or choose who finds the region.")
        image = open_image(picture, Path(picture).name)
        if localizer == "box":
            find = self.asker.localizer("box", parse_region([region.strip()], image.size, "Region"))
        else:
            find = self.localizers[localizer]
        prune = by_name(method, percent / 100, self.asker.num_layers)
        with self._turn:
            pruned, plain = self.asker.compare(
                image, question, method=prune, localizer=find, max_new_tokens=self.max_new_tokens
            )
        return pruned.text, plain.text, overlay(image, *pruned.images[0].drawing), numbers(pruned, plain, localizer)


def numbers(pruned: Answer, plain: Answer, localizer: str) -> str:
    """Counts, times and the region, in Markdown."""
    tokens = {
        "vision tokens of the picture": "before",
        "that enter the language model": "after_plc",
        "that reach its last layer": "after_ilp",
    }
    rows = [(title, *(getattr(answer.tokens, name) for answer in (pruned, plain))) for title, name in tokens.items()]
    for stage in STAGES:
        times = (f"{1000 * answer.seconds[stage]:.1f} ms" for answer in (pruned, plain))
        rows.append((STAGE_TITLES.get(stage, stage), *times))
    rows[-1] = tuple(f"**{cell}**" for cell in rows[-1])
    table = "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [("", "pruned", "unpruned"), ("---", "--:", "--:"), *rows]
    )
    region = pruned.region
    because = f": {region.reason}" if region.reason else ""
    return f"{table}\n\n{speed(pruned, plain)}.\n\nRegion: {where(region, localizer)}{because}."


def page(app: App, model: str) -> gradio.Blocks:
    """The page; ``model`` is what the user called the model."""
    import gradio as gr

    def answer(*chosen: Any) -> tuple[str, str, Image, str]:
        try:
            return app.answer(*chosen)
        except REFUSED as error:
            raise gr.Error(one_line(error), duration=None, print_exception=False) from error

    first = app.asker.default_localizer
    with gr.Blocks(title="crop", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("# crop\nAsk about a picture, with most of its vision tokens pruned away and with all of them.")
        gr.Markdown(ABOUT_EMBEDDED if model == EMBEDDED else f"Model: `{model}`")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", type="filepath", image_mode=None, format="png", height=380,
                                   sources=["upload", "clipboard"], buttons=[], elem_id="picture")  # fmt: skip
                question = gr.Textbox(label="Question", placeholder="what is the total")
                ask = gr.Button("Ask", variant="primary")
                names = [first, *(name for name in app.localizers if name != first), "box"]
                localizer = gr.Radio(names, value=first, label="Who finds the region")
                region = gr.Textbox(label="Box", placeholder="drag one on the picture: X0,Y0,X1,Y1", elem_id="region")
                with gr.Row():
                    methods = [name for name in method_names() if name != "none"]
                    method = gr.Dropdown(methods, value="crop", label="Method")
                    percent = gr.Slider(0.5, 100, 11, step=0.5, label="Vision tokens that stay, %")
            with gr.Column():
                with gr.Row():
                    pruned = gr.Textbox(label="Answer, pruned", lines=2)
                    plain = gr.Textbox(label="Answer, unpruned", lines=2)
                seen = gr.Image(label="What the model saw", format="png", interactive=False)
                table = gr.Markdown()
        gr.Examples([[scene.image, asked.text] for scene, asked in scenes.examples(EXAMPLES)], [picture, question])
        gr.on(
            [ask.click, question.submit],
            answer,
            [picture, question, localizer, region, method, percent],
            [pruned, plain, seen, table],
            api_name="ask",
        )
        picture.change(None, None, region, js="() => ''")
        chosen = f"(text, name) => {{ drawBoxes(); return text ? 'box' : name === 'box' ? '{first}' : name }}"
        region.change(None, [region, localizer], localizer, js=chosen)
        blocks.load(None, js=SCRIPT.read_text())
    return blocks


def serve(app: App, model: str, host: str, port: int | None) -> None:
    """Serve the page until Ctrl-C. OSError: the port is taken."""
    blocks = page(app, model)
    blocks.launch(
        server_name=host,
        server_port=port,
        css=STYLE,
        footer_links=[],
        show_error=True,
        max_file_size=MAX_BYTES,
    )
