"""How well the localizer "ocr" finds the answers on real receipts: coverage, area, time.

    python -m bench.accuracy.receipts --pages FOLDER                  # the part that nothing was tuned on
    python -m bench.accuracy.receipts --pages FOLDER --development    # the other part

Reading takes seconds per image; the pages are kept in FOLDER, so that a run that was stopped goes on where it was.
"all lines read" leaves no line unread; "given text" is that ranking on the annotated text, a perfect OCR; "similarity" takes the
lines whose sentence embedding is nearest to the question's, up to the mean area of the localizer. "attention" is the embedded
model's, which has never seen a real page; "cascade" and "union" join it with "ocr". "head" needs a model that reads receipts.
Controls: the answer's box (oracle), the whole image, a box of the oracle's size in the centre and at random. coverage: share of
the answer's box in the region; containment: answers wholly inside; "sound": the same without the annotations whose box holds far
more text than the answer; read: share of the lines recognised.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from tqdm import tqdm

from bench.common import ROOT, header, save, table
from bench.localizers import receipts
from crop.cli.ask import EMBEDDED, load
from crop.cli.images import open_image
from crop.geometry.region import Region
from crop.localizers import BoxLocalizer, CascadeLocalizer, UnionLocalizer
from crop.localizers.ocr.localizer import OCRLocalizer, Ranked
from crop.localizers.ocr.reader import Page, Reader

LIMITS = (0.01, 0.03, 0.06, 0.1, 0.17, 0.3)
STEPS = ("find the lines", "the first question", "recognise the rest", "embed the rest", "every question")
SCALES = (1, 2, 4, 6, 8)  # of the oracle's sides, for the controls' curve


@dataclass(frozen=True)
class Case:
    """One question, and its lines as the localizer ranked them."""

    receipt: receipts.Receipt
    asked: receipts.Asked
    group: str
    page: Page
    hasty: Ranked  # after reading no more lines than the localizer does
    read: float  # share of the lines it read
    ranked: Ranked  # all lines read
    given: Ranked  # the same on the annotated text
    meaning: np.ndarray  # (num_lines,) similarity of line and question
    attention: Region | None  # of the embedded model; None where it was not asked
    milliseconds: float  # of its pass


def cases(localizer: OCRLocalizer, reader: Reader, found: list[receipts.Receipt]) -> Iterator[Case]:
    attend = load(EMBEDDED, "cpu", "auto").localizer("attention")
    for receipt in tqdm(found, "receipts", disable=None):
        page, perfect, image = receipt.read(reader), receipt.annotated(), open_image(receipt.path)
        groups = (("", receipt.asked), (", other words", receipt.rephrased), ("further", receipt.further))
        for group, questions in groups:
            for asked in questions:
                ranked = localizer.rank(page, asked.text)
                hasty, read = hurried(localizer, page, asked.text)
                name = group if group == "further" else asked.field + group
                meanings = np.stack([page.notes["meanings"][text] for text in ranked.texts])
                meaning = meanings @ localizer.encode([asked.text])[0]
                start = time.perf_counter()
                region = None if group else attend(image, asked.text)
                spent = 1000 * (time.perf_counter() - start)
                given = localizer.rank(perfect, asked.text)
                yield Case(receipt, asked, name, page, hasty, read, ranked, given, meaning, region, spent)


def hurried(localizer: OCRLocalizer, page: Page, question: str) -> tuple[Ranked, float]:
    """What the localizer sees when the question is the first about a page, and the share of the lines it reads."""
    fresh = Page(page.size, page.quads, notes=dict(page.notes))
    for lines in (localizer.likely(fresh, question), page.texts):
        fresh.texts.update({line: page.texts[line] for line in lines})
        ranked = localizer.rank(fresh, question)
        if localizer.select(ranked, page.size).confidence >= localizer.enough:
            break
    return ranked, len(fresh.texts) / max(len(page), 1)


def overlap(region: Region, box: receipts.Box) -> tuple[float, float, float]:
    """Share of the box inside the region, intersection over union, area of the region."""
    x0, y0, x1, y1 = np.array((*region.boxes, box)).T
    xs, ys = np.unique([x0, x1]), np.unique([y0, y1])  # all borders cut the image into pieces
    x, y = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    held = ((x0[:, None] < x) & (x < x1[:, None]))[:, None, :] & ((y0[:, None] < y) & (y < y1[:, None]))[:, :, None]
    size = np.diff(ys)[:, None] * np.diff(xs)
    inside, answer = held[:-1].any(0), held[-1]
    both = float(size[inside & answer].sum())
    return both / float(size[answer].sum()), both / float(size[inside | answer].sum()), float(size[inside].sum())


def sound(receipt: receipts.Receipt, asked: receipts.Asked) -> bool:
    """Whether the annotated lines in the answer's box say little beyond the answer."""
    if not asked.answer:
        return True
    x0, y0, x1, y1 = receipt.boxes.T
    left, top, right, bottom = asked.box
    middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
    inside = (left <= middle_x) & (middle_x <= right) & (top <= middle_y) & (middle_y <= bottom)
    said = sum(len(re.sub(r"\W", "", receipt.texts[line])) for line in np.flatnonzero(inside))
    longer = 45 if asked.field == "date" else 15
    return said <= 2 * len(re.sub(r"\W", "", asked.answer)) + longer


def moved(box: receipts.Box, scale: float, rng: random.Random | None) -> Region:
    """A box of the answer's shape, ``scale`` times its sides, in the centre or anywhere."""
    width, height = (min(1.0, scale * (box[axis + 2] - box[axis])) for axis in (0, 1))
    x, y = (rng.uniform(0, 1 - side) if rng else (1 - side) / 2 for side in (width, height))
    return Region.box(x, y, x + width, y + height)


def similar(localizer: OCRLocalizer, limit: float) -> Callable[[Case], Region]:
    """Lines nearest to the question in meaning, up to an area."""

    def find(case: Case) -> Region:
        boxes = localizer.padded(case.ranked.boxes, case.page.size)
        area, taken = 0.0, []
        for line in np.argsort(-case.meaning):
            size = float((boxes[line, 2:] - boxes[line, :2]).prod())
            if taken and area + size > limit:
                break
            taken.append(tuple(boxes[line].tolist()))
            area += size
        return Region(tuple(taken)) if taken else Region.whole()

    return find


def measure(found: Iterable[Case], find: Callable[[Case], Region]) -> dict[str, float]:
    rows = []
    for case in found:
        region = find(case)
        inside, iou, area = overlap(region, case.asked.box)
        rows.append((inside, inside > 0.999, sound(case.receipt, case.asked), area, iou, region.is_whole))
    inside, complete, fair, area, iou, whole = np.array(rows, dtype=float).T
    return {
        "n": len(rows),
        "coverage": float(inside.mean()),
        "containment": float(complete.mean()),
        "sound": float(complete[fair > 0].mean()),
        "area": float(area.mean()),
        "IoU": float(iou.mean()),
        "whole": float(whole.mean()),
    }


def curves(localizer: OCRLocalizer, found: list[Case]) -> dict[str, list[tuple[float, float]]]:
    """(area, share of answers wholly inside) for every contender at every size."""
    rng = random.Random(0)
    contenders: dict[str, list[Callable[[Case], Region]]] = {
        "ocr": [_hasty(_sized(localizer, limit)) for limit in LIMITS],
        "attention": [lambda case: case.attention],
        "cascade": [_joined(CascadeLocalizer, replace(localizer, limit=limit)) for limit in LIMITS],
        "union": [_joined(UnionLocalizer, replace(localizer, limit=limit)) for limit in LIMITS],
        "ocr, given text": [_given(_sized(localizer, limit)) for limit in LIMITS],
        "similarity": [similar(localizer, limit) for limit in LIMITS],
        "centre": [lambda case, scale=scale: moved(case.asked.box, scale, None) for scale in SCALES],
        "random": [lambda case, scale=scale: moved(case.asked.box, scale, rng) for scale in SCALES],
    }
    points = {}
    for name, finders in contenders.items():
        results = [measure(found, find) for find in tqdm(finders, name, disable=None)]
        points[name] = [(result["area"], result["containment"]) for result in results]
    return points


def _sized(localizer: OCRLocalizer, limit: float) -> OCRLocalizer:
    """Lines up to an area, whatever their probability."""
    return replace(localizer, limit=limit, tail=min(localizer.tail, limit / 6), sure=0.999)


def _ocr(localizer: OCRLocalizer) -> Callable[[Case], Region]:
    return lambda case: localizer.select(case.ranked, case.page.size)


def _hasty(localizer: OCRLocalizer) -> Callable[[Case], Region]:
    return lambda case: localizer.select(case.hasty, case.page.size)


def _joined(kind: type, localizer: OCRLocalizer) -> Callable[[Case], Region]:
    """ "cascade" or "union" of what attention and ocr found."""

    def find(case: Case) -> Region:
        members = case.attention, localizer.select(case.hasty, case.page.size)
        return kind(tuple(map(BoxLocalizer, members)))(None, case.asked.text)

    return find


def _given(localizer: OCRLocalizer) -> Callable[[Case], Region]:
    return lambda case: localizer.select(case.given, case.receipt.size)


def plot(points: dict[str, list[tuple[float, float]]], at: tuple[float, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    for name, line in points.items():
        axes.plot(*zip(*[(100 * area, 100 * share) for area, share in line], strict=True), marker=".", label=name)
    axes.plot(100 * at[0], 100 * at[1], "k*", markersize=12, label="ocr, default")
    axes.set(
        xlabel="mean area of the region, % of the image", ylabel="answers wholly inside, %", xlim=(0, 32), ylim=(0, 101)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, metadata={"Software": None})


def timed(found: list[receipts.Receipt]) -> dict[str, float]:
    """Median milliseconds per step, on images that were never seen."""
    localizer, spent = OCRLocalizer(Reader()), defaultdict(list)
    localizer(open_image(found[0].path), "warm up")
    for number, receipt in enumerate(found[1:]):
        image = open_image(receipt.path)
        stops = [time.perf_counter()]
        page = localizer.reader.detect(image)
        stops.append(time.perf_counter())
        localizer(image, receipt.asked[number % len(receipt.asked)].text)
        stops.append(time.perf_counter())
        localizer.reader.read(image, page)
        stops.append(time.perf_counter())
        localizer.rank(page, "What is this?")
        stops.append(time.perf_counter())
        localizer(image, receipt.asked[0].text)
        stops.append(time.perf_counter())
        for name, (start, stop) in zip(STEPS, pairwise(stops), strict=True):
            spent[name].append(1000 * (stop - start))
    return {name: median(values) for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.receipts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pages", type=Path, required=True, help="existing folder where the read pages are kept")
    parser.add_argument("--development", action="store_true", help="measure on the development part instead")
    parser.add_argument("--first", type=int, help="only so many receipts")
    parser.add_argument("--timed", type=int, default=8, help="images on which the steps are timed")
    parser.add_argument("--threads", type=int, default=2, help="of the steps that are timed; all else has one")
    parser.add_argument("--misses", action="store_true", help="print what was missed")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "receipts.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part = [receipt for receipt in receipts.load() if receipt.development == options.development][: options.first]
    localizer = OCRLocalizer()
    found = list(cases(localizer, Reader(folder=options.pages), part))
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in found:
        groups[case.group].append(case)
    own = [case for case in found if case.group in receipts.FIELDS]
    groups["all four"] = own
    rng = random.Random(0)
    area = measure(own, _hasty(localizer))["area"]
    contenders = {
        "ocr": _hasty(localizer),
        "ocr, all lines read": _ocr(localizer),
        "ocr, given text": _given(localizer),
        "similarity": similar(localizer, area),
        "attention": lambda case: case.attention,
        "cascade": _joined(CascadeLocalizer, localizer),
        "union": _joined(UnionLocalizer, localizer),
        "oracle": lambda case: Region((case.asked.box,)),
        "whole": lambda case: Region.whole(),
        "centre": lambda case: moved(case.asked.box, 1, None),
        "random": lambda case: moved(case.asked.box, 1, rng),
    }
    rows = []
    for name, find in contenders.items():
        for group, members in groups.items():
            if name.startswith("ocr") or group in (*receipts.FIELDS, "all four"):
                rows.append({"localizer": name, "question": group, **measure(members, find)})
    beside = [localizer.locate(receipt.annotated(), receipt.beside) for receipt in part]
    rows.append({"localizer": "ocr, given text", "question": "no text answers", "n": len(beside), "coverage": None, "containment": None,
                 "sound": None, "area": mean(region.area for region in beside), "IoU": None,
                 "whole": mean(region.is_whole for region in beside)})  # fmt: skip
    torch.set_num_threads(options.threads)
    steps = timed(part[: options.timed + 1])
    new = steps["find the lines"] + steps["the first question"]
    attention = median(case.milliseconds for case in own)
    milliseconds = {"ocr": new, "attention": attention, "union": attention + new}
    for row in rows:
        name = row["localizer"]
        members = groups.get(row["question"], [])
        row["read"] = mean(case.read for case in members) if name == "ocr" and members else None
        if name == "cascade":  # ocr is asked where attention is not sure
            asked = mean(case.attention.is_whole or case.attention.confidence < 0.5 for case in members)
            milliseconds[name] = attention + asked * new
        row["ms"] = milliseconds.get(name)
    for name, spent in steps.items():
        rows.append({**dict.fromkeys(rows[0]), "localizer": "ocr", "question": name, "n": options.timed, "ms": spent})
    save(options.out, rows)
    at = next(row for row in rows if row["localizer"] == "ocr" and row["question"] == "all four")
    plot(curves(localizer, own), (at["area"], at["containment"]), options.out.with_suffix(".png"))
    print(header(), table(rows), sep="\n\n")
    if options.misses:
        for case in own:
            region = contenders["ocr"](case)
            inside, _, _ = overlap(region, case.asked.box)
            if inside <= 0.999:
                best = sorted(zip(case.ranked.found, case.ranked.texts, strict=True), reverse=True)[:6]
                print(
                    f"{case.receipt.name} {case.group} {case.asked.answer!r}: {inside:.2f}, area {region.area:.3f}, sound {sound(case.receipt, case.asked)}"
                )
                print("   ", " | ".join(f"{share:.2f} {text}" for share, text in best))


if __name__ == "__main__":
    main()
