"""From the journal to figures: means with intervals by picture, paired leads, a table, JSON and plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.accuracy.contenders import DOWNSAMPLED
from bench.accuracy.statistics import difference_interval, exact_test, interval, questions_needed
from bench.pictures import GROUNDING

OVERALL, UNPRUNED = "overall", "unpruned|1|"
NO_PLACES = "without grounding"
# Questions without grounding that a plain control gets wrong at the same budget: there pruning has to earn its keep
# (VTC-Bench, arXiv 2510.07143).
HARD, AVERAGED = "wrong after down-sampling", "wrong after averaging"
CONTROLS = {HARD: DOWNSAMPLED, AVERAGED: "average"}

SHARES = (0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3)  # of the unpruned time
TIE = 1.05  # times that differ by less are called the same: that is how well medians of some rounds tell them apart
Answers = dict[str, dict[str, dict[str, Any]]]  # job -> question -> row of the journal


def by_job(rows: Sequence[dict[str, Any]]) -> Answers:
    """The journal by job and question.

    Raises:
        ValueError: no unpruned answers to compare with.
    """
    found: Answers = defaultdict(dict)
    for row in rows:
        if row["job"] != "region":
            found[row["job"]][row["item"]] = row
    if UNPRUNED not in found:
        raise ValueError("summarise: rows must hold the unpruned model's answers, got none")
    plain = found[UNPRUNED]
    # Of a run that is not through: only what has something to be compared with.
    return {job: {item: row for item, row in answers.items() if item in plain} for job, answers in found.items()}


def _cells(answers: Answers) -> dict[float, dict[str, dict[str, float]]]:
    """budget -> contender -> question -> score, of the rows that meet it on average over the layers."""
    found: dict[float, dict[str, dict[str, float]]] = defaultdict(dict)
    for job, of_job in answers.items():
        contender, budget, counted = job.split("|")
        if counted == "average" and of_job:
            found[float(budget)][contender] = {item: row["score"] for item, row in of_job.items()}
    return dict(sorted(found.items(), reverse=True))


def belongs(group: str, row: dict[str, Any], controls: dict[str, dict[str, float]]) -> bool:
    """Whether an answer counts in a group that more than the kind of its question decides.

    Args:
        row: of the journal. controls: contender -> question -> score, at the budget of the group.
    """
    if group == OVERALL:
        return True
    if row["group"] == GROUNDING:
        return False
    return group == NO_PLACES or controls.get(CONTROLS[group], {}).get(row["item"], 1) < 1


def finalists(rows: Sequence[dict[str, Any]], ours: Sequence[str], rivals: Sequence[str], best: int = 3) -> set[str]:
    """Jobs that are worth more questions: the unpruned model, ours, down-sampling, and at every budget the best rivals.

    Args:
        rows: of the journal, of questions that were asked of everybody. ours, rivals: contenders. best: rivals beside down-sampling.
    """
    answers = by_job(rows)
    plain = {item: row["score"] for item, row in answers[UNPRUNED].items()}
    chosen = {UNPRUNED}
    for budget, cells in _cells(answers).items():
        kept = {name: np.sum(list(of.values())) / sum(plain[item] for item in of) for name, of in cells.items()}
        order = sorted((name for name in cells if name in rivals and name != DOWNSAMPLED), key=lambda name: -kept[name])
        names = {*order[:best], *(name for name in cells if name in ours), DOWNSAMPLED}
        chosen |= {f"{name}|{budget:g}|average" for name in names if name in cells}
    return chosen


def leads(
    rows: Sequence[dict[str, Any]],
    ours: Sequence[str],
    rivals: Sequence[str],
    times: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """How far each of ours is ahead of each rival, on the questions of both.

    Args:
        rows: of the journal. ours, rivals: contenders.
        times: of ``timing.measure``: rivals may keep as many tokens as they can in the time that ours takes; None: as ours, by
            layer average.
    Returns:
        Rows with contender, budget, group (``OVERALL``, ``NO_PLACES``, ``HARD`` or ``AVERAGED``), n, baseline and its budget
        ("against"), lead, low, high (its interval, by picture), in parts of the unpruned score, p (exact paired test), needed
        (questions for a power of 80 %). Of a contender, budget and group the strongest rival comes first; it was found on these
        very questions, which favours it.
    """
    answers = by_job(rows)
    every, out = _cells(answers), []
    for budget, cells in every.items():
        for group in (OVERALL, NO_PLACES, *CONTROLS):
            chosen = {item for item, row in answers[UNPRUNED].items() if belongs(group, row, cells)}
            for name in (name for name in ours if name in cells):
                found = []
                for rival in rivals:
                    against = (
                        budget if times is None else _affordable(rival, f"{name}|{budget:g}|average", every, times)
                    )
                    scores = every.get(against, {}).get(rival, {})
                    items = [item for item in cells[name] if item in scores and item in chosen]
                    lead = _lead(answers[UNPRUNED], items, cells[name], scores)
                    if lead is not None:
                        found.append({"contender": name, "budget": budget, "group": group, "n": len(items),
                                      "baseline": rival, "against": against, **lead})  # fmt: skip
                out += sorted(found, key=lambda row: row["lead"])
    return out


def _affordable(
    rival: str, job: str, cells: dict[float, dict[str, dict[str, float]]], times: dict[str, dict[str, float]]
) -> float | None:
    """The largest budget at which a rival takes no longer than a job, or as good as; None: there is none."""
    unknown = {"ratio": float("inf")}
    limit = TIE * times.get(job, {"ratio": 0.0})["ratio"]
    fits = (b for b in cells if times.get(f"{rival}|{b:g}|average", unknown)["ratio"] <= limit)
    return max(fits, default=None)


def _lead(
    plain: dict[str, dict[str, Any]], items: list[str], mine: dict[str, float], theirs: dict[str, float]
) -> dict[str, Any] | None:
    """Of paired scores; None where the unpruned model scores nothing."""
    base = float(np.mean([plain[item]["score"] for item in items])) if items else 0.0
    if not base:
        return None
    ahead = np.array([mine[item] - theirs[item] for item in items]) / base
    pictures = [plain[item]["picture"] for item in items]
    low, high = difference_interval(ahead, pictures)
    return {
        "lead": round(float(ahead.mean()), 4), "low": round(low, 4), "high": round(high, 4),
        "p": float(f"{exact_test(ahead, pictures):.2g}"), "needed": questions_needed(ahead, pictures),
    }  # fmt: skip


def summarise(rows: Sequence[dict[str, Any]], times: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One row per job and group of questions.

    Args:
        rows: of the journal. times: of ``timing.measure``, may be empty.
    Returns:
        Rows with contender, budget, counted, group (kind of the questions, and as of ``leads``), n, score, relative (to the unpruned model), low, high (its interval),
        entering (vision tokens that enter the decoder), tokens (after the last cut), average (over the layers), all as
        fractions of the image's, ms and time (relative). Each job is compared on the questions that it answered.
    Raises:
        ValueError: no unpruned answers to compare with.
    """
    found = by_job(rows)
    plain = found[UNPRUNED]
    out = []
    for job, answers in found.items():
        contender, budget, counted = job.split("|")
        controls = {
            name: {item: row["score"] for item, row in found.get(f"{name}|{budget}|average", {}).items()}
            for name in CONTROLS.values()
        }
        groups: dict[str, list[str]] = defaultdict(list)
        for item, row in answers.items():
            groups[row["group"]].append(item)
            for group in (OVERALL, NO_PLACES, *CONTROLS):
                if belongs(group, row, controls):
                    groups[group].append(item)
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
                    **{
                        key: round(float(np.mean([row[key] / row["before"] for row in mine])), 4)
                        for key in ("entering", "tokens", "average")
                    },
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
        crowd = row["contender"].endswith(("shifted", "no region"))
        if row["group"] == group and row["counted"] == "average" and row[axis] is not None and not crowd:
            lines[row["contender"]].append(row)
    colours = {"ILP": "#c26a00", "PLC": "#1b7f4b", "diverse": "#8a2a8a", "both": "#1f4fbf"}
    ours = tuple(colours)
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
