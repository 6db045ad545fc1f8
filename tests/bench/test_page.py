"""The page of answers: what is in it, and that a real browser shows and filters it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from PIL import Image

from bench.page import Card, Reply, write_report

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)  # fmt: skip


def cards() -> list[Card]:
    picture = Image.new("RGB", (64, 48), (90, 160, 90))
    return [
        Card(f"question {n} & <b>?", "yes", "text" if n else "colour", picture,
             [Reply("unpruned", "yes", True), Reply("pruned <9>", "no" if n else "yes", not n, "9 tokens", picture)])
        for n in range(3)
    ]  # fmt: skip


def test_page_holds_everything_itself(tmp_path):
    path = tmp_path / "deep" / "page.html"
    assert write_report(path, "T & t", cards(), "a <note>") == 3
    page = path.read_text()
    assert page.count("<article") == 3 and page.count("data:image/jpeg;base64,") == 6
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    assert "question 1 &amp; &lt;b&gt;?" in page and "pruned &lt;9&gt;" in page and "a &lt;note&gt;" in page
    assert "1 of 3" in page and "33.3 %" in page


def test_page_without_cards_raises(tmp_path):
    with pytest.raises(ValueError, match="at least one question"):
        write_report(tmp_path / "page.html", "T", [])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_page_works_in_a_browser(tmp_path):
    """The page's own script filters, and a click enlarges: a probe at its end acts and writes down what it sees."""
    path = tmp_path / "page.html"
    write_report(path, "T", cards())
    probe = """<script>
    const shown = () => cards.filter(card => card.getBoundingClientRect().height > 0).length, seen = [shown()];
    const set = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("input")); seen.push(shown()); };
    set("name", "pruned <9>"); set("verdict", "wrong"); set("group", "colour"); set("verdict", "right"); set("group", "any");
    set("verdict", "any"); set("text", "QUESTION 2"); set("text", "");
    document.querySelector("article img").click();
    document.title = JSON.stringify([seen, dialog.open, dialog.querySelector("img").naturalWidth, get("count").textContent]);
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True).stdout
    title = re.search(r"<title>(.*?)</title>", page).group(1)
    assert title.startswith("[[3,3,2,0,1,1,3,1,3],true,"), title
    assert title.endswith('"3 of 3"]')
