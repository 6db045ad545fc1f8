"""Tables of answers and regions, from the JSON of the benches that measure them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.accuracy.summary import AVERAGED, CONTROLS, HARD, NO_PLACES, OVERALL, SHARES, at_time, grid
from bench.common import markdown


def _percent(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None or cell["relative"] is None else f"{100 * cell['relative']:.1f}"


def _label(budget: float, content: dict[str, Any]) -> str:
    """A budget as its tokens, where the file knows of how many."""
    tokens = content.get("pictures", {}).get("tokens")
    return f"{budget:.1%}" if tokens is None else f"{round(budget * tokens)} tokens"


def accuracy(content: dict[str, Any], group: str = OVERALL, way: str = "average") -> list[str]:
    """A group of questions, by layer average, or after the last cut ("kept"); a cell that spent more than its budget says how much.

    The best of each column is bold, among cells that do not know the true region and kept to the budget. What enters the
    decoder stands beside it where that is more than the budget; so does the number of questions where rows differ in it.
    """
    rows = content["rows"]
    budgets = sorted({row["budget"] for row in rows if row["counted"] == "average"}, reverse=True)
    plain = next(row for row in rows if row["contender"] == "unpruned" and row["group"] == OVERALL)
    cells = grid(rows, group, way, budgets)
    if way == "average" and group == OVERALL:  # those that cannot meet any budget
        cells |= {name: {} for name in grid(rows, group, "kept", budgets) if name not in cells}

    def fair(name: str, cell: dict[str, Any] | None, budget: float) -> bool:
        knows = name.endswith(("oracle", "shifted")) or cell is None or cell["relative"] is None
        return not knows and cell["average"] <= 1.05 * budget

    best = {
        b: max((found[b]["relative"] for name, found in cells.items() if fair(name, found.get(b), b)), default=None)
        for b in budgets
    }
    counts = {name: sorted({cell["n"] for cell in found.values()}) for name, found in cells.items()}
    counted = len({n for found in counts.values() for n in found}) > 1 and group == OVERALL
    most = {b: max((found[b]["n"] for found in cells.values() if b in found), default=0) for b in budgets}
    table = []
    for name, found in cells.items():
        line = []
        for budget in budgets:
            cell = found.get(budget)
            text = _percent(cell)
            if cell is not None and cell["average"] > 1.05 * budget:
                text += f" (spent {cell['average']:.0%})"
            elif cell is not None and cell.get("entering", 0) > 1.05 * budget:
                text += f" ({cell['entering']:.0%} enter)"
            bold = fair(name, cell, budget) and cell["relative"] == best[budget]
            line.append(f"**{text}**" if bold else text)
        asked = "-".join(map(str, dict.fromkeys((*counts[name][:1], *counts[name][-1:])))) or "-"
        table.append([name, *([asked] if counted else []), *line])
    if group == OVERALL:
        head, labels = f" ({plain['score']:.3f}, {plain['n']} questions)", [_label(b, content) for b in budgets]
    else:
        head, labels = f" of the same questions, {group}", [f"{_label(b, content)}, n = {most[b]}" for b in budgets]
    return markdown([f"% of the unpruned score{head}", *["questions"] * counted, *labels], table)


def accuracy_kept(content: dict[str, Any]) -> list[str]:
    """Methods that drop inside the decoder, by the tokens that stay after their last cut; what they spend on average beside it."""
    return accuracy(content, way="kept")


def accuracy_hard(content: dict[str, Any]) -> list[str]:
    """The same of the questions that are wrong after down-sampling to the same budget."""
    return accuracy(content, HARD)


def accuracy_averaged(content: dict[str, Any]) -> list[str]:
    """The same of the questions that are wrong after averaging."""
    return accuracy(content, AVERAGED)


def accuracy_time(content: dict[str, Any]) -> list[str]:
    """Best score of every contender within shares of the unpruned time, encoder and localizer included."""
    table = []
    for row in at_time(content["rows"], OVERALL, SHARES):
        cells = (row[f"{share:g}"] for share in SHARES)
        table.append([row["contender"], *("-" if cell is None else f"{100 * cell:.1f}" for cell in cells)])
    return markdown(
        ["best % of the unpruned score within a share of its time", *(f"{share:.0%}" for share in SHARES)], table
    )


def _lead(row: dict[str, Any]) -> str:
    return f"{100 * row['lead']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def _table_of_leads(
    content: dict[str, Any], name: str, title: str, chosen: Callable[[dict[str, Any]], bool]
) -> list[str]:
    """Points by which ours are ahead of the strongest of some rivals, over all questions, with 95 % intervals."""
    leads = [row for row in content[name] if row["group"] == OVERALL and chosen(row)]
    budgets = list(dict.fromkeys(row["budget"] for row in leads))
    found: dict[str, dict[float, str]] = {}
    for row in leads:  # the strongest rival of a cell comes first
        against = "" if row["against"] == row["budget"] else f" with {_label(row['against'], content)}"
        found.setdefault(row["contender"], {}).setdefault(row["budget"], f"{_lead(row)}, {row['baseline']}{against}")
    table = [[name, *(cells.get(budget, "-") for budget in budgets)] for name, cells in found.items()]
    return markdown([title, *(_label(budget, content) for budget in budgets)], table)


def leads_in_time(content: dict[str, Any]) -> list[str]:
    """Ours against rivals that keep as many tokens as they can in the same time, encoder and localizer included."""
    title = "points ahead of the best rival that takes no longer"
    return _table_of_leads(content, "leads in time", title, lambda row: True)


def leads_of_the_region(content: dict[str, Any]) -> list[str]:
    """Ours against themselves without a region."""
    return _table_of_leads(
        content, "the region's part", "points ahead of the same without a region",
        lambda row: row["contender"].split(",")[0] == row["baseline"].split(",")[0],
    )  # fmt: skip


def leads_of_two(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Ours against rivals of the same budget on two disjoint sets of pictures, with what would show the difference.

    A lead holds where the intervals over every rival exclude zero on both sets; "behind" is where one rival's do on the other side.
    """
    table = []

    def rivals(content: dict[str, Any], where: tuple) -> dict[str, dict[str, Any]]:
        rows = (row for row in content["leads"] if (row["contender"], row["budget"], row["group"]) == where)
        return {row["baseline"]: row for row in rows}

    for where in dict.fromkeys((row["contender"], row["budget"], row["group"]) for row in first["leads"]):
        both = [rivals(content, where) for content in (first, second)]
        if not all(both):
            continue
        ahead = all(row["low"] > 0 for found in both for row in found.values())
        behind = any(all(found[name]["high"] < 0 for found in both) for name in both[0].keys() & both[1].keys())
        cells = []
        for found in both:
            row = next(iter(found.values()))  # the strongest
            needed = "-" if row["needed"] is None else str(row["needed"])
            cells += [f"{_lead(row)}, {row['baseline']}", str(row["n"]), f"{row['p']:.2g}", needed]
        name, budget, group = where
        table.append([_label(budget, first), name, group, *cells, "yes" if ahead else "behind" if behind else "no"])
    head = ["budget", "ours", "questions", *(h for n in (1, 2) for h in (f"set {n}: points ahead of the best rival", "n", "p", "n needed")),
            "ahead on both"]  # fmt: skip
    return markdown(head, table)


TARGETS = {0.3333: 0.995, 0.2222: 0.99, 0.1111: 0.98, 0.0556: 0.95}  # share of the unpruned score, by budget
AHEAD = (0.1111, 0.0556)  # budgets at which every rival is to be behind
GROUNDING_TARGET = (0.2222, 0.95)


def targets(first: dict[str, Any], second: dict[str, Any], mine: str = "both, predicted") -> list[str]:
    """What was aimed at with a found region, on two sets of pictures, and who is ahead where it is missed."""

    def cell(content: dict[str, Any], budget: float, group: str) -> dict[str, Any] | None:
        return grid(content["rows"], group, "average", [budget]).get(mine, {}).get(budget)

    def kept(content: dict[str, Any], budget: float, group: str = OVERALL) -> tuple[str, bool]:
        found = cell(content, budget, group)
        if found is None or found["relative"] is None:
            return "-", False
        bar = GROUNDING_TARGET[1] if group != OVERALL else TARGETS[budget]
        text = f"{100 * found['relative']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
        return text, found["relative"] >= bar

    def worst(content: dict[str, Any], budget: float) -> tuple[str, bool]:
        rows = [r for r in content["leads"] if (r["contender"], r["budget"], r["group"]) == (mine, budget, OVERALL)]
        if not rows:
            return "-", False
        row = min(rows, key=lambda row: row["low"])
        return f"{_lead(row)}, {row['baseline']}", row["low"] > 0

    table = []

    def add(what: str, made: list[tuple[str, bool]]) -> None:
        table.append([what, *(text for text, _ in made), "met" if all(ok for _, ok in made) else "missed"])

    both = first, second
    for budget, bar in TARGETS.items():
        add(f"{_label(budget, first)}: at least {100 * bar:g} %", [kept(content, budget) for content in both])
    for budget in AHEAD:
        what = f"{_label(budget, first)}: ahead of every rival (the one with the lowest interval)"
        add(what, [worst(content, budget) for content in both])
    budget, bar = GROUNDING_TARGET
    what = f"{_label(budget, first)}, grounding: at least {100 * bar:g} %"
    add(what, [kept(content, budget, "grounding") for content in both])
    return markdown([f"target for {mine}", "set 1", "set 2", ""], table)


def accuracy_groups(content: dict[str, Any]) -> list[str]:
    """By kind of question, at the budget next to 11 % on average over the layers, with bootstrap intervals."""
    rows = content["rows"]
    budget = min({row["budget"] for row in rows if row["counted"] == "average"}, key=lambda b: abs(b - 0.11))
    groups = sorted({row["group"] for row in rows} - {OVERALL, NO_PLACES, *CONTROLS})
    by_group = {group: grid(rows, group, "average", [budget]) for group in groups}
    table = []
    for name in dict.fromkeys(name for found in by_group.values() for name in found):
        cells = (by_group[group].get(name, {}).get(budget) for group in groups)
        table.append(
            [name, *(f"{_percent(c)} ({100 * c['low']:.0f} to {100 * c['high']:.0f})" if c else "-" for c in cells)]
        )
    return markdown([f"{budget:.0%} of the tokens, layer average", *groups], table)


def regions(content: dict[str, Any]) -> list[str]:
    """Exact answers by method and by where the region came from."""
    rows, plain = content["rows"], content["unpruned"][0]["exact"]
    sources = [name for name in rows[0] if name != "method"]
    table = [[row["method"], *(f"{100 * row[source]:.0f}" for source in sources)] for row in rows]
    return markdown([f"exact answers, % (unpruned {100 * plain:.0f})", *sources], table)


def encoder(content: dict[str, Any]) -> list[str]:
    """Exact answers by where in the encoder tokens leave."""
    table = [[row["tokens leave"], f"{100 * row['exact']:.1f}", f"{row['tokens']:.0f}"] for row in content["rows"]]
    return markdown([f"tokens leave ({content['run'][0]['questions']} questions)", "exact answers, %", "tokens"], table)


def _layer(cell: dict[str, Any]) -> str:
    return f"{100 * cell['overall']:.1f} ({100 * cell['low']:.0f} to {100 * cell['high']:.0f}), {cell['average']:.0%}"


def layers(content: dict[str, Any]) -> list[str]:
    """Score by cut layer and budget with intervals, and what all layers see on average."""
    rows, facts = content["rows"], content["run"][0]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    table = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = {row["budget"]: row for row in rows if row["layer"] == layer}
        texts = [_layer(cells[b]) if b in cells else "-" for b in budgets]
        table.append([f"layer {layer}" if layer else "pooled before layer 0", *texts])
    head = f"% of the unpruned score, seen on average; region: {facts['region']}, {facts['questions']} questions"
    return markdown([head, *(f"{round(b * facts['tokens'])} tokens" for b in budgets)], table)


def layers_groups(content: dict[str, Any]) -> list[str]:
    """The same by kind of question, at the budget next to 11 %."""
    rows = content["rows"]
    budget = min({row["budget"] for row in rows}, key=lambda b: abs(b - 0.11))
    rows = [row for row in rows if row["budget"] == budget]
    groups = [name for name in rows[0] if name not in ("budget", "layer", "average", "low", "high")]
    table = [
        [f"layer {row['layer']}" if row["layer"] else "pooled before layer 0", *(f"{100 * row[g]:.1f}" for g in groups)]
        for row in rows
    ]
    return markdown([f"{round(budget * content['run'][0]['tokens'])} tokens stay", *groups], table)


def pooling(content: dict[str, Any]) -> list[str]:
    """What one change costs, by questions and budget."""
    rows = content["rows"]
    columns = list(dict.fromkeys((row["asked"], row["budget"]) for row in rows))
    table = []
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = {(row["asked"], row["budget"]): row for row in rows if row["way"] == way}
        texts = []
        for column in columns:
            row = cells.get(column)
            texts.append("-" if row is None else f"{100 * row['relative']:.1f} ({row['tokens']:.0f})")
        table.append([way, *texts])
    return markdown(["% of the unpruned score (tokens)", *(f"{asked}, {b:.0%}" for asked, b in columns)], table)


def pooling_sides(content: dict[str, Any]) -> list[str]:
    """Which of the four blocks of a place are right, at the smallest budget."""
    rows = [row for row in content["rows"] if row["asked"] == "grounding"]
    least = min(row["budget"] for row in rows)
    sides = ("left", "right", "top", "bottom", "all four")
    table = [[row["way"], *(f"{100 * row[side]:.0f}" for side in sides)] for row in rows if row["budget"] == least]
    return markdown([f"blocks right, %, at {least:.0%}", *sides], table)


def real(content: dict[str, Any]) -> list[str]:
    """Real receipts: exact answers, characters right, and what the same answers are worth about other pages."""
    table = [
        [row["view"], row["pruned"], row["field"], str(row["n"]),
         *(f"{100 * row[key]:.1f}" for key in ("exact", "characters", "others'"))]
        for row in content["rows"]
    ]  # fmt: skip
    return markdown(["view", "pruned", "field", "n", "exact, %", "characters, %", "of another page, %"], table)


def receipts(content: dict[str, Any]) -> list[str]:
    """Answers wholly inside the region per field, and over all fields area, IoU, lines read and time on a new image."""
    rows = {(row["localizer"], row["question"]): row for row in content["rows"]}
    fields = ("company", "date", "address", "total amount")
    head = ["answer's box wholly inside, %", *fields, "all four", "coverage", "mean area", "IoU", "lines read", "ms"]
    table = []
    for name in dict.fromkeys(name for name, question in rows if question == "all four"):
        every = rows[name, "all four"]
        shares = [rows[name, field]["containment"] for field in fields] + [
            every[key] for key in ("containment", "coverage", "area", "IoU", "read")
        ]
        cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        table.append([name, *cells, "-" if every["ms"] is None else f"{every['ms']:.0f}"])
    return markdown(head, table)
