"""From the journal to figures: means with intervals by picture, paired leads, a table, JSON and plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.accuracy.contenders import DOWNSAMPLED
from bench.accuracy.statistics import difference_interval, exact_test, interval, questions_needed

OVERALL = "overall"
HARD = (
    "wrong after down-sampling"  # to the same budget: where pruning has to earn its keep (VTC-Bench, arXiv 2510.07143)
)


def _by_job(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """job -> question -> row; of a run that is not through, the questions that every contender has answered.

    Raises:
        ValueError: no such question.
    """
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["job"] != "region":
            found[row["job"]][row["item"]] = row
    everywhere = set.intersection(*map(set, found.values())) if found else set()
    if not everywhere:
        raise ValueError("summarise: rows must hold a question that every contender has answered, got none")
    return {job: {item: answers[item] for item in answers if item in everywhere} for job, answers in found.items()}


def leads(rows: Sequence[dict[str, Any]], ours: Sequence[str], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """How far each of ours is ahead of the best baseline of the same budget, by layer average, on the same questions.

    Args:
        rows: of the journal. ours, baselines: contenders.
    Returns:
        Rows with contender, budget, group (all questions, or those that are wrong after down-sampling), n, baseline (the best
        one), lead, low, high (its interval, by picture), in parts of the unpruned score, p (exact paired test), needed
        (questions for a power of 80 %); none where no baseline meets the budget. The baseline was chosen by its score on
        these very questions, which favours it.
    """
    by_job = _by_job(rows)
    unpruned = next(answers for job, answers in by_job.items() if job.startswith("unpruned|"))
    scores: dict[tuple[str, float], dict[str, float]] = {}
    for job, answers in by_job.items():
        contender, budget, counted = job.split("|")
        if counted == "average":
            scores[contender, float(budget)] = {item: row["score"] for item, row in answers.items()}
    out = []
    for budget in sorted({budget for _, budget in scores}, reverse=True):
        rivals = [name for name in baselines if (name, budget) in scores]
        easy = scores.get((DOWNSAMPLED, budget))
        groups = {OVERALL: list(unpruned)}
        if easy is not None:
            groups[HARD] = [item for item in unpruned if easy[item] < 1]
        for group, items in groups.items():
            plain = np.mean([unpruned[item]["score"] for item in items]) if items else 0
            if not plain:
                continue

            def of(name: str, items: list[str] = items, budget: float = budget) -> np.ndarray:
                return np.array([scores[name, budget][item] for item in items])

            best = max(rivals, key=lambda name: of(name).mean(), default=None)
            for name in ours if best is not None else ():
                if (name, budget) not in scores:
                    continue
                ahead = (of(name) - of(best)) / plain
                low, high = difference_interval(ahead, [unpruned[item]["picture"] for item in items])
                out.append(
                    {
                        "contender": name, "budget": budget, "group": group, "n": len(items), "baseline": best,
                        "lead": round(float(ahead.mean()), 4), "low": round(low, 4), "high": round(high, 4),
                        "p": float(f"{exact_test(ahead):.2g}"), "needed": questions_needed(ahead),
                    }
                )  # fmt: skip
    return out


def summarise(rows: Sequence[dict[str, Any]], times: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One row per job and group of questions.

    Args:
        rows: of the journal. times: of ``timing.measure``, may be empty.
    Returns:
        Rows with contender, budget, counted, group (of the questions; of contenders with a budget also those questions that
        are wrong after down-sampling to it), n, score, relative (to the unpruned model), low, high (its interval),
        tokens, average (layer average of vision tokens), both as fractions of the image's, ms and time (relative).
    Raises:
        ValueError: no unpruned answers to compare with, or no question that all have answered.
    """
    by_job = _by_job(rows)
    plain = next((found for job, found in by_job.items() if job.startswith("unpruned|")), None)
    if plain is None:
        raise ValueError("summarise: rows must hold the unpruned model's answers, got none")
    out = []
    for job, answers in by_job.items():
        contender, budget, counted = job.split("|")
        easy = by_job.get(f"{DOWNSAMPLED}|{budget}|average", {})
        groups: dict[str, list[str]] = defaultdict(list)
        for item, row in answers.items():
            groups[OVERALL].append(item)
            groups[row["group"]].append(item)
            if item in easy and easy[item]["score"] < 1:
                groups[HARD].append(item)
        for group, items in groups.items():
            mine = [answers[item] for item in items]
            scores = np.array([row["score"] for row in mine])
            base = np.array([plain[item]["score"] for item in items])
            low, high = interval(scores, base, [row["picture"] for row in mine])
            out.append(
                {
                    "contender": contender, "budget": float(budget), "counted": counted, "group": group,
                    "n": len(items), "score": round(float(scores.mean()), 4),
                    "relative": round(float(scores.mean() / base.mean()), 4) if base.any() else None,
                    "low": round(low, 4), "high": round(high, 4),
                    "tokens": round(float(np.mean([row["tokens"] / row["before"] for row in mine])), 4),
                    "average": round(float(np.mean([row["average"] / row["before"] for row in mine])), 4),
                    "whole": round(float(np.mean([row["whole"] for row in mine])), 4),
                    "ms": times.get(job, {}).get("ms"), "time": times.get(job, {}).get("ratio"),
                }
            )  # fmt: skip
    return out


def at_time(rows: Sequence[dict[str, Any]], group: str, times: Sequence[float]) -> list[dict[str, Any]]:
    """Score of every contender when it may take no longer than a share of the unpruned time.

    Args:
        rows: of ``summarise``, with times. times: shares of the unpruned time.
    Returns:
        One row per contender: share -> best relative score of its budgets that take no longer; None: none is so quick.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["group"] != group or row["time"] is None or row["contender"] == "unpruned":
            continue
        best = found.setdefault(row["contender"], {"contender": row["contender"], **{f"{t:g}": None for t in times}})
        for limit in times:
            if row["time"] <= limit and (best[f"{limit:g}"] is None or row["relative"] > best[f"{limit:g}"]):
                best[f"{limit:g}"] = row["relative"]
    return list(found.values())


def grid(
    rows: Sequence[dict[str, Any]], group: str, counted: str, budgets: Sequence[float]
) -> dict[str, dict[float, dict[str, Any]]]:
    """contender -> budget -> row, for one group and one way of counting."""
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if row["group"] == group and row["counted"] == counted and row["budget"] in budgets:
            found.setdefault(row["contender"], {})[row["budget"]] = row
    return found


def plot(rows: Sequence[dict[str, Any]], group: str, path: Path, axis: str) -> None:
    """Relative score against ``axis`` ("average" or "time"), one line per contender, intervals as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["group"] == group and row["counted"] == "average" and row[axis] is not None:
            lines[row["contender"]].append(row)
    ours = ("ILP", "PLC", "both")
    colours = {"ILP": "#c26a00", "PLC": "#1b7f4b", "both": "#1f4fbf"}
    greys = ["#8a8f98", "#b06c9b", "#5aa5a8", "#a88c52", "#7c7cc0", "#c28079", "#6f9a6a", "#4d4d4d", "#b5b54a"]
    markers = "osv^D<>PX*"
    for number, (name, points) in enumerate(sorted(lines.items(), key=lambda pair: pair[0].startswith(ours))):
        points.sort(key=lambda row: row[axis])
        x, y = ([100 * row[key] for row in points] for key in (axis, "relative"))
        error = np.clip(
            [[100 * (row["relative"] - row["low"]) for row in points],
             [100 * (row["high"] - row["relative"]) for row in points]], 0, None)  # fmt: skip
        mine = name.startswith(ours)
        colour = colours[name.split(",")[0]] if mine else greys[number % len(greys)]
        style = {"oracle": ":", "predicted": "-"}.get(name.split(", ")[-1], "-." if mine else "-")
        axes.errorbar(
            x, y, error, label=name, color=colour, linestyle=style, linewidth=2 if mine else 1.1,
            marker=markers[number % len(markers)], markersize=5, capsize=2, elinewidth=0.7, alpha=1 if mine else 0.8,
        )  # fmt: skip
    axes.axhline(100, color="#999999", linewidth=0.8)
    if axis == "average":
        axes.set_xscale("log")
        ticks = [5.5, 11, 22, 33, 50]
        axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    axes.set_xlabel(
        "vision tokens, average over the decoder layers, of the unpruned" if axis == "average"
        else "time per question, localizer included, % of the unpruned"
    )  # fmt: skip
    axes.set_ylabel(f"score, {group}, % of the unpruned")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
