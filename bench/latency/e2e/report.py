"""Rows as a table for people, and the bars they are measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.common import table

MS, MB = 1e3, 1e-6
OURS = ("ILP", "PLC", "diverse", "both")
SLACK = 0.02  # slower than unpatched by less than this is not slower


def lines(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The contenders of one row, one line each: milliseconds, megabytes, ratios.

    "first" is the time to the first token with the localizer and without the image processor; "x" against unpatched,
    "x with preprocess" with the image processor on both sides; "over ideal" leaves the localizer out.
    """
    plain = row["contenders"]["unpatched"]
    found = []
    for name, one in row["contenders"].items():
        line: dict[str, Any] = {"contender": name}
        if "reason" in one:
            found.append(line | {"tokens": one["reason"]})
            continue
        parts = one["parts"]
        line |= {"tokens": one["tokens"], "first ms": one["first"] * MS}
        line["p10 to p90"] = f"{one['first_p10'] * MS:.4g} to {one['first_p90'] * MS:.4g}"
        line["x"] = ratio(plain, one, "first")
        line["x with preprocess"] = None
        if "first" in plain:
            images = row["batch"] * row["preprocess"]
            line["x with preprocess"] = (plain["first"] + images) / (one["first"] + images)
        line["prefill x"] = None if "first" not in plain else prefill(plain) / prefill(one)
        line["FLOPs x"] = ratio(plain, one, "flops")
        line["over ideal %"] = over_ideal(one)
        line |= {f"{part} ms": seconds * MS for part, seconds in parts.items()}
        line["of it select ms"] = one["select"] * MS
        line["token ms"] = None if one["per_token"] is None else one["per_token"] * MS
        line["peak MB"] = None if one["memory"] is None else (row["weights"] + one["memory"]) * MB
        line["above weights MB"] = None if one["memory"] is None else one["memory"] * MB
        line["KV MB"] = one["kv_bytes"] * MB
        line["advice"] = {None: None, True: "prune", False: "do not"}[one["advice"]]
        found.append(line)
    return found


def ratio(plain: dict[str, Any], one: dict[str, Any], figure: str) -> float | None:
    """How many times less than the unpatched model; None where one of them is not known."""
    return plain[figure] / one[figure] if plain.get(figure) and one.get(figure) else None


def prefill(one: dict[str, Any]) -> float:
    """Seconds from the embeddings to the last norm, planning, pooling and selecting included."""
    own = one["parts"]["plan"] if one["advice"] is not None else 0.0
    return own + sum(one["parts"][part] for part in ("PLC", "before", "after"))


def over_ideal(one: dict[str, Any]) -> float | None:
    """Per cent above the FLOP-proportional time, localizer left out."""
    return 100 * ((one["first"] - one["parts"]["localizer"]) / one["ideal"] - 1) if "ideal" in one else None


def title(row: dict[str, Any]) -> str:
    """What a row is about, in one line."""
    size = "full size" if row["full"] else f"widths / {row['reduce'][0]}, depths / {row['reduce'][1]}"
    attention = " + ".join(f"{count} {name}" for name, count in (row.get("attention") or {}).items())
    return (
        f"{row['geometry']}, {size}, {row['tokens']} vision tokens, batch {row['batch']}, keep {row['keep']:.0%}, "
        f"localizer {row['localizer']}, {row['timed']} rounds, {row['dtype']} on {row['device']}; image processor "
        f"{row['preprocess'] * MS:.3g} ms per picture;{_step(row)} fused attentions of the unpatched model: "
        f"{attention or 'none'}; regions {row['regions']}"
    )


def _step(row: dict[str, Any]) -> str:
    """A decode step of the unpatched model has next to nothing to compute: the host's time for a forward."""
    seconds = row["contenders"]["unpatched"].get("per_token")
    return "" if seconds is None else f" decode step {seconds * MS:.3g} ms, the host's floor of a forward;"


def text(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, then the bars."""
    blocks = []
    for row in rows:
        problems = "".join(f"PROBLEM: {problem}\n" for problem in row.get("problems", ()))
        blocks.append(
            f"{row_title(row)}\n{row['reason']}" if "reason" in row else f"{title(row)}\n{problems}{table(lines(row))}"
        )
    return "\n\n".join([*blocks, table([vars_of(bar) for bar in bars(rows)])])


def row_title(row: dict[str, Any]) -> str:
    """As ``title``, of a row without figures."""
    return f"{row['geometry']}, batch {row['batch']}, keep {row['keep']:.0%}"


def vars_of(bar: tuple[str, str, str, str]) -> dict[str, str]:
    """A bar as a line of the table."""
    return dict(zip(("bar (H100, full size, localizer included)", "wanted", "measured", "verdict"), bar, strict=True))


def bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(what, wanted, measured, verdict) of every bar; only full-size rows from a GPU count."""
    counted = [row for row in rows if row.get("full") and row.get("device", "cpu") != "cpu" and "contenders" in row]
    target = [r for r in counted if r["geometry"] == "llava-next-7b" and r["keep"] == 0.11 and r["localizer"] != "none"]

    def best(figure: Callable[[dict[str, Any], dict[str, Any]], float | None], names: Sequence[str]) -> float | None:
        """The best of some contenders at batch 1."""
        found = [figure(plain, one) for r in target if r["batch"] == 1 for plain, one in pairs(r, names)]
        return max((value for value in found if value is not None), default=None)

    def pairs(row: dict[str, Any], names: Sequence[str] = OURS) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        plain = row["contenders"]["unpatched"]
        for name in names:
            one = row["contenders"].get(name, {})
            if "first" in plain and "first" in one:
                yield plain, one

    def saved(figure: str) -> Callable[[dict[str, Any], dict[str, Any]], float | None]:
        return lambda plain, one: 1 - one[figure] / plain[figure] if plain[figure] and one[figure] else None

    over = [over_ideal(one) for row in counted for _, one in pairs(row)]
    slower = [(one["first"] / plain["first"] - 1, one["advice"]) for row in counted for plain, one in pairs(row)]
    against_advice = [share for share, advice in slower if advice]
    where = "LLaVA-NeXT-7B 2880 -> 11 %"
    return [
        _bar(f"{where}: latency to first token", 0.60, best(saved("first"), OURS), "{:.0%} lower"),
        _bar(f"{where}: peak memory above weights", 0.60, best(saved("memory"), OURS), "{:.0%} lower"),
        _bar(f"{where}: PLC prefill", 7.0, best(lambda p, o: prefill(p) / prefill(o), ["PLC"]), "{:.2f} x"),
        _bar(f"{where}: ILP prefill", 3.0, best(lambda p, o: prefill(p) / prefill(o), ["ILP"]), "{:.2f} x"),
        _bar("over the FLOP-proportional ideal, at most", 3.0, max(over, default=None), "{:.1f} %", lower=True),
        _bar("slower than unpatched against the advice", SLACK, max(against_advice, default=None if not slower else 0.0),
             "{:+.1%}", lower=True),
    ]  # fmt: skip


def _bar(what: str, wanted: float, measured: float | None, form: str, lower: bool = False) -> tuple[str, str, str, str]:
    if measured is None:
        return what, form.format(wanted), "-", "not measured"
    met = measured <= wanted if lower else measured >= wanted
    return what, form.format(wanted), form.format(measured), "met" if met else "NO"
