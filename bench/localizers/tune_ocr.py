"""How much the localizer "ocr" should take, by cross-validation on the development part of the receipts.

    python -m bench.localizers.tune_ocr --pages FOLDER

The ranking is fitted on three quarters of the receipts and asked about the fourth, in the receipts' words and in others. A
row tells, for one choice of settings, how many answers are missed (without the annotations whose box holds far more than the
answer), the mean area, and the share of answers wholly inside per field.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from bench.accuracy.receipts import hurried, overlap, sound
from bench.common import header, table
from bench.localizers import fit_ocr, receipts
from crop.localizers.ocr.localizer import OCRLocalizer, Ranked
from crop.localizers.ocr.reader import Reader

FOLDS = 4
CHOICES = {"limit": (0.11, 0.15, 0.18, 0.22), "tail": (0.008, 0.005, 0.003), "sure": (0.25, 0.15)}


@dataclass(frozen=True)
class Seen:
    """One question, and its lines as a localizer ranked them that was fitted on other receipts."""

    receipt: receipts.Receipt
    asked: receipts.Asked
    ranked: Ranked


def seen(found: list[receipts.Receipt], reader: Reader) -> list[Seen]:
    cases = {receipt.name: fit_ocr.cases([receipt], reader) for receipt in tqdm(found, "features", disable=None)}
    result = []
    for fold in range(FOLDS):
        others = [receipt for number, receipt in enumerate(found) if number % FOLDS != fold]
        weights = fit_ocr.fit([case for receipt in others for case in cases[receipt.name]], 10.0)
        localizer = OCRLocalizer(weights=weights)
        for receipt in tqdm(found[fold::FOLDS], f"fold {fold}", disable=None):
            page = receipt.read(reader)
            for asked in (*receipt.asked, *receipt.rephrased):
                localizer.rank(page, asked.text)
                result.append(Seen(receipt, asked, hurried(localizer, page, asked.text)[0]))
    return result


def row(localizer: OCRLocalizer, every: list[Seen]) -> dict[str, float]:
    held, areas, missed = defaultdict(list), [], 0
    for one in every:
        inside, _, area = overlap(localizer.select(one.ranked, one.receipt.size), one.asked.box)
        held[one.asked.field].append(inside > 0.999)
        areas.append(area)
        missed += inside <= 0.999 and sound(one.receipt, one.asked)
    return {"missed": missed, "area": mean(areas), **{field: mean(held[field]) for field in receipts.FIELDS}}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.localizers.tune_ocr",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pages", type=Path, required=True, help="existing folder where the read pages are kept")
    options = parser.parse_args()
    every = seen([receipt for receipt in receipts.load() if receipt.development], Reader(folder=options.pages))
    rows = []
    for values in tqdm(list(itertools.product(*CHOICES.values())), "choices", disable=None):
        settings = dict(zip(CHOICES, values, strict=True))
        rows.append({**settings, **row(replace(OCRLocalizer(), **settings), every)})
    rows.sort(key=lambda found: (found["missed"], found["area"]))
    print(header(), table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
