"""A page of questions and answers that needs nothing but itself: filter by right and wrong, click to enlarge."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Reply:
    """One answer to the question of a card.

    Args:
        name: who answers, e.g. "unpruned". text: the answer. right: whether it counts as right.
        note: token counts and the like. seen: what the model got to see, or None.
    """

    name: str
    text: str
    right: bool
    note: str = ""
    seen: Image | None = None


@dataclass(frozen=True)
class Card:
    """One question.

    Args:
        question, truth: text. group: kind of question. picture: the image, e.g. with its region.
        replies: answers, the reference first.
    """

    question: str
    truth: str
    group: str
    picture: Image
    replies: list[Reply] = field(default_factory=list)


def write_report(path: Path, title: str, cards: Iterable[Card], note: str = "") -> int:
    """Write the page.

    Args:
        path: of the HTML file; its folder is made. title, note: heading and the line under it.
        cards: questions.
    Returns:
        Number of cards.
    Raises:
        ValueError: no cards.
    """
    cards = list(cards)
    if not cards:
        raise ValueError("write_report: cards must hold at least one question, got none")
    names = list(dict.fromkeys(reply.name for card in cards for reply in card.replies))
    groups = sorted({card.group for card in cards})
    rows = []
    for name in names:
        mine = [reply.right for card in cards for reply in card.replies if reply.name == name]
        share = f"{100 * sum(mine) / len(mine):.1f} %"
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{sum(mine)} of {len(mine)}</td><td>{share}</td></tr>")

    def options(values: list[str]) -> str:
        return "".join(f"<option>{html.escape(value)}</option>" for value in values)

    page = _PAGE.format(
        title=html.escape(title),
        note=html.escape(note),
        rows="".join(rows),
        number=len(names),
        open=" open" if len(names) <= 8 else "",
        names=options(names),
        groups=options(groups),
        cards="".join(map(_card, cards)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return len(cards)


def _card(card: Card) -> str:
    verdicts = html.escape(json.dumps({reply.name: reply.right for reply in card.replies}), quote=True)
    answers = "".join(
        f'<li class="{"right" if reply.right else "wrong"}"><b>{html.escape(reply.text) or "&nbsp;"}</b>'
        f"<span>{html.escape(reply.name)}</span><i>{html.escape(reply.note)}</i></li>"
        for reply in card.replies
    )
    pictures = _picture(card.picture, card.question) + "".join(
        _picture(reply.seen, f"{card.question} - as seen by {reply.name}")
        for reply in card.replies
        if reply.seen is not None
    )
    return (
        f'<article data-group="{html.escape(card.group, quote=True)}" data-right="{verdicts}"><div class="pictures">'
        f"{pictures}</div><h2>{html.escape(card.question)}</h2><p>truth: <b>{html.escape(card.truth)}</b>"
        f"<small>{html.escape(card.group)}</small></p><ul>{answers}</ul></article>"
    )


def _picture(image: Image, text: str) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img tabindex="0" alt="{html.escape(text, quote=True)}" src="data:image/jpeg;base64,{data}">'


# One file, no script or style from elsewhere. Doubled braces: str.format.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ --ink: #20222a; --faint: #70747e; --line: #dcdcd6; --paper: #fafaf7; --right: #1b7f4b; --wrong: #b3261e; }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 1500px; padding: 24px; font: 15px/1.45 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }}
h1 {{ margin: 0; font-size: 24px }} header p {{ margin: 4px 0 12px; color: var(--faint) }}
table {{ border-collapse: collapse; margin-bottom: 16px }} td {{ padding: 2px 18px 2px 0 }}
td + td {{ text-align: right; font-variant-numeric: tabular-nums }}
nav {{ position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 10px; align-items: center;
  padding: 10px 0; background: var(--paper); border-bottom: 1px solid var(--line) }}
nav output {{ margin-left: auto; color: var(--faint) }}
select, input {{ font: inherit; padding: 3px 6px }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 18px; margin-top: 18px }}
article {{ background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px }}
article[hidden] {{ display: none }}
h2 {{ margin: 10px 0 2px; font-size: 16px }} p {{ margin: 0 }} small {{ float: right; color: var(--faint) }}
.pictures {{ display: flex; gap: 8px; overflow-x: auto; align-items: flex-start }}
.pictures img {{ flex: 1 1 0; width: 0; min-width: 130px; border-radius: 4px; cursor: zoom-in }}
ul {{ list-style: none; margin: 8px 0 0; padding: 0 }}
li {{ display: flex; gap: 10px; padding: 2px 0 2px 8px; border-left: 4px solid var(--right) }}
li.wrong {{ border-color: var(--wrong) }} li.wrong b {{ color: var(--wrong) }} li.right b {{ color: var(--right) }}
li b {{ min-width: 90px }} li i {{ margin-left: auto; color: var(--faint); font-style: normal; font-size: 13px }}
dialog {{ border: 0; padding: 0; max-width: 96vw; max-height: 96vh; background: none }}
dialog::backdrop {{ background: rgba(0, 0, 0, .8) }}
dialog img {{ display: block; max-width: 96vw; max-height: 90vh; min-width: min(70vw, 70vh); cursor: zoom-out }}
dialog p {{ color: #fff; text-align: center; padding: 8px }}
</style></head><body>
<header><h1>{title}</h1><p>{note}</p><details{open}><summary>right answers of {number}</summary><table>{rows}</table></details></header>
<nav><label>answers of <select id="name">{names}</select></label>
<label>are <select id="verdict"><option>any</option><option>right</option><option>wrong</option></select></label>
<label>about <select id="group"><option>any</option>{groups}</select></label>
<input id="text" type="search" placeholder="question contains"><output id="count"></output></nav>
<main>{cards}</main><dialog><img alt=""><p></p></dialog>
<script>
const get = id => document.getElementById(id), cards = [...document.querySelectorAll("article")];
function filter() {{
  const name = get("name").value, verdict = get("verdict").value, group = get("group").value;
  const text = get("text").value.toLowerCase();
  let shown = 0;
  for (const card of cards) {{
    const right = JSON.parse(card.dataset.right)[name];
    const fits = (verdict === "any" || right === (verdict === "right")) && (group === "any" || card.dataset.group === group)
      && card.querySelector("h2").textContent.toLowerCase().includes(text);
    card.hidden = !fits;
    shown += fits;
  }}
  get("count").textContent = shown + " of " + cards.length;
}}
for (const id of ["name", "verdict", "group", "text"]) get(id).addEventListener("input", filter);
const dialog = document.querySelector("dialog");
function enlarge(image) {{
  dialog.querySelector("img").src = image.src;
  dialog.querySelector("p").textContent = image.alt;
  dialog.showModal();
}}
document.querySelector("main").addEventListener("click", event => event.target.matches("img") && enlarge(event.target));
document.querySelector("main").addEventListener("keydown", event => event.key === "Enter" && event.target.matches("img")
  && enlarge(event.target));
dialog.addEventListener("click", () => dialog.close());
filter();
</script></body></html>
"""
