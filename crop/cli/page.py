"""The page of ``crop app`` in Gradio (extra ``app``); ``page.js`` draws the box on the picture."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from crop.cli.app import App
from crop.cli.ask import EMBEDDED
from crop.cli.images import MAX_BYTES
from crop.cli.options import REFUSED, UsageError
from crop.embedded import scenes
from crop.localizers.pretrained import one_line
from crop.methods.registry import method_names

if tuple(map(int, gr.__version__.split(".")[:2])) < (6, 31):
    raise ImportError(f'crop app needs gradio from 6.31 on, got {gr.__version__}: pip install "crop-vlm[app]"')

EXAMPLES = 6
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
STYLE = """
#picture img { object-fit: contain; touch-action: none; user-select: none; cursor: crosshair }
#boxes { position: absolute; pointer-events: none; z-index: 2 }
#boxes div { position: absolute; border: 2px solid rgb(255, 140, 0); box-shadow: 0 0 0 1px black, inset 0 0 0 1px black }
#question button { background: var(--button-primary-background-fill); color: var(--button-primary-text-color) }
#refusal:not(:has(p)) { display: none }
#refusal p { padding: 0.6rem 0.8rem; border-left: 4px solid rgb(200, 40, 40); background: rgba(200, 40, 40, 0.1) }
#seen .image-container { padding-top: 2.5rem }
#numbers table { width: 100%; border: 0 }
#numbers :is(tr, th, td) { border: 0; background: none; padding: 0.2rem 0.4rem; text-align: right }
#numbers tr { border-bottom: 1px solid var(--border-color-primary) }
#numbers :is(th, td):not(:first-child) { white-space: nowrap; word-break: normal }
#numbers :is(th, td):first-child { text-align: left }
"""
ABOUT_EMBEDDED = (
    "The model is the small one that comes with crop: it answers questions about rendered pictures such as the examples, in "
    "the words of their questions. `crop app --model NAME` takes another one."
)


def page(app: App, model: str) -> gr.Blocks:
    """The page; ``model`` is what the user called the model."""

    def answer(uploaded: dict[str, Any] | None, *chosen: Any) -> tuple:
        try:
            return "", *app.answer(uploaded.get("path") if isinstance(uploaded, dict) else None, *chosen)
        except REFUSED as error:
            return f'<p role="alert">{html.escape(one_line(error))}</p>', "", "", None, ""

    first = app.asker.default_localizer
    about = ABOUT_EMBEDDED if model == EMBEDDED else f"Model: `{model}`"
    with gr.Blocks(title="crop", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(
            f"# crop\nAsk about a picture, with most of its vision tokens pruned away and with all of them. {about}"
        )
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", show_label=False, format="png", height=380, sources=["upload", "clipboard"],
                                   buttons=[], elem_id="picture")  # fmt: skip
                question = gr.Textbox(label="Question", submit_btn="Ask", elem_id="question")
                examples = [[scene.image, asked.text] for scene, asked in scenes.examples(EXAMPLES)]
                gr.Examples(examples, [picture, question], visible_columns=[0])
                names = [first, *(name for name in app.localizers if name != first), "box"]
                localizer = gr.Radio(names, value=first, label="Who finds the region", elem_id="localizer")
                box = gr.Textbox(label="Box", placeholder="drag one on the picture: X0,Y0,X1,Y1", elem_id="box")
                with gr.Row():
                    methods = [name for name in method_names() if name != "none"]
                    method = gr.Dropdown(methods, value="crop", label="Method")
                    percent = gr.Slider(
                        0.5, 100, 11, step=0.5, label="Vision tokens kept, %", buttons=[], min_width=240
                    )
            with gr.Column(elem_id="answers"):
                refusal = gr.HTML(elem_id="refusal")
                with gr.Row():
                    pruned = gr.Textbox(label="Answer, pruned", lines=2, elem_id="pruned")
                    plain = gr.Textbox(label="Answer, unpruned", lines=2, elem_id="plain")
                seen = gr.Image(label="What the model saw", format="png", interactive=False,
                                buttons=["download", "fullscreen"], elem_id="seen")  # fmt: skip
                table = gr.Markdown(elem_id="numbers")
        chosen, shown = [picture, question, localizer, box, method, percent], [refusal, pruned, plain, seen, table]
        # Without ``preprocess`` a picture comes as the uploaded file, which Gradio has not opened: open_image does.
        question.submit(answer, chosen, shown, api_name="ask", preprocess=False)
        question.submit(None, js="() => showAnswers()")
        picture.change(None, None, box, js="() => ''")
        follow = f"(text, name) => {{ drawBoxes(); return text ? 'box' : name === 'box' ? '{first}' : name }}"
        box.change(None, [box, localizer], localizer, js=follow)
        blocks.load(None, js=SCRIPT)
    return blocks


def serve(app: App, model: str, host: str, port: int | None) -> None:
    """Serve the page until Ctrl-C. UsageError: host or port cannot be used."""
    blocks = page(app, model)
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, ssr_mode=False, prevent_thread_lock=True, quiet=True,
            show_error=True, max_file_size=MAX_BYTES, css=STYLE, footer_links=[],
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--host {host} --port {port or 'any'} cannot be used: {one_line(error)}") from error
    print(f"crop app: {address} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
