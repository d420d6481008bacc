"""A sweep as one HTML page that compares its studies, and as a picture of its frontier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from capsfl.report import figures
from capsfl.report.drawing import Drawing
from capsfl.report.formats import decimals
from capsfl.report.frontier import effect_svg, frontier_svg, write_pictures
from capsfl.report.page import distinct_names, environment, flatten, write_whole
from capsfl.report.providers import FIELD as HOSPITALS
from capsfl.report.providers import SCORED, providers
from capsfl.report.studies import (
    Summary,
    best_within,
    by_group,
    frontier,
    numeric_fields,
    private,
    read_sweep,
    summarise,
)
from capsfl.report.study import Record, number_at, record_at, rows_at, text

MAX_ROWS = 400
MAX_EFFECTS = 6
MAX_CURVES = 8
BUDGETS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
TIERS = (("strong", 1.0), ("reasonable", 10.0))
"""Epsilon up to which Ponomareva et al. 2023, "How to DP-fy ML", section 5.2, call a guarantee so."""


def build_sweep_page(folder: Path) -> Path:
    """Write `report.html`, `frontier.png` and `frontier.svg` into a sweep's folder; return the page's path.

    The page shows what is finished; it depends on nothing but the files of the folder.

    Raises:
        StudyError: the folder is no sweep, or one of its files is damaged.
    """
    record, rows, facts = read_sweep(folder)
    summaries = summarise(rows)
    groups = by_group(summaries)
    colours = colour_groups(groups)
    utility = text(record.get("utility")) or "utility"
    scored = text(record.get("scored"))
    write_pictures(folder, groups, colours, utility=utility)
    page = (
        environment()
        .get_template("sweep.html.j2")
        .render(
            name=text(record.get("name")) or folder.name,
            record=record,
            light=figures.LIGHT,
            dark=figures.DARK,
            utility=utility,
            finished=len(rows),
            seeds=len({row.get("seed") for row in rows}),
            settings=len(summaries),
            headlines=_headlines(summaries),
            groups=groups,
            colours=colours,
            frontier=draw_against_epsilon(summaries, utility=utility),
            budgets=_budgets(groups),
            providers=providers(summaries, utility=utility, scored=scored, words=words),
            scored=scored if scored in SCORED and scored else "records",
            effects=_effects(summaries, groups, colours, utility),
            curves=_curves(summaries, utility),
            table=_table(summaries),
            hidden=max(0, len(summaries) - MAX_ROWS),
            statements=_statements(rows),
            work=[
                {"part": fact.get("part"), "device": fact.get("device"), **row}
                for fact in facts
                for row in rows_at(fact, "groups")
            ],
            seconds=sum(number_at(fact, "seconds") or 0.0 for fact in facts),
            cpu_seconds=sum(number_at(fact, "cpu_seconds") or 0.0 for fact in facts),
            configuration=flatten(record_at(record, "configuration")),
            words=words,
        )
    )
    return write_whole(folder / "report.html", distinct_names(page))


def draw_against_epsilon(rows: Sequence[Summary], *, utility: str) -> Drawing | None:
    """Utility against epsilon, a colour for every group; None where no setting has an epsilon."""
    if not private(rows):
        return None
    groups = by_group(rows)
    colours = colour_groups(groups)
    return Drawing(
        f"{utility[0].upper()}{utility[1:]} against ε",
        Markup(frontier_svg(groups, colours, utility=utility)),
        "Every setting with an ε is a dot; the line goes through the best within each ε, with its interval over seeds. "
        "A dashed line is the best without noise. Intervals are 95 % t-intervals of the mean over seeds; none is drawn "
        "for a single seed. The best of many settings looks better than it is: judge a chosen setting on data that the "
        "sweep has not seen.",
        tuple((name or "base", colour) for name, colour in colours.items()) if len(groups) > 1 else (),
    )


def colour_groups(groups: Mapping[str, Sequence[Summary]]) -> dict[str, str]:
    """A colour of the page for every group."""
    return {name: f"series-{place % 8}" for place, name in enumerate(groups)}


def words(setting: Mapping[str, Any]) -> str:
    """A setting in words: `learning rate 0.1, clip norm 0.5`."""
    return ", ".join(f"{_short(field)} {_word(value)}" for field, value in setting.items()) or "the base study"


def _short(field: str) -> str:
    """The end of a dotted name: `training.server.learning_rate` is the server learning rate."""
    parts = [part for part in field.split(".")[1:] if part not in ("local", "kind")] or [field]
    return " ".join(parts[-2:]).replace("_", " ")


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _headlines(rows: Sequence[Summary]) -> list[dict[str, Any]]:
    bare = max((row for row in rows if row.noiseless and row.mean is not None), key=_mean, default=None)
    found: list[tuple[str, Summary | None]] = [("without noise", bare)]
    found += [(f"within ε ≤ {budget:g}, a {tier} guarantee", best_within(rows, budget)) for tier, budget in TIERS]
    return [_headline(label, row, bare) for label, row in found if row is not None]


def _headline(label: str, row: Summary, bare: Summary | None) -> dict[str, Any]:
    cost = ""
    if bare is not None and row is not bare:
        cost = f"{decimals(_mean(row) - _mean(bare))} against no noise"
    return {
        "label": f"Best {label}",
        "value": decimals(row.mean),
        "interval": _interval(row),
        "margin": cost,
        "words": words(row.setting),
    }


def _budgets(groups: Mapping[str, Sequence[Summary]]) -> list[dict[str, Any]]:
    """The best setting of every group within each budget that changes anything."""
    rows = []
    for budget in BUDGETS:
        cells = {name: best_within(members, budget) for name, members in groups.items()}
        if any(cells.values()) and (not rows or cells != rows[-1]["cells"]):
            rows.append({"budget": budget, "cells": cells})
    return [
        {
            "budget": row["budget"],
            "cells": [_cell(cell) for cell in row["cells"].values()],
        }
        for row in rows
    ]


def _cell(row: Summary | None) -> dict[str, str]:
    if row is None:
        return {"value": "–", "interval": "", "words": ""}
    return {"value": decimals(row.mean), "interval": _interval(row), "words": words(row.setting)}


def _effects(
    rows: Sequence[Summary], groups: Mapping[str, Sequence[Summary]], colours: Mapping[str, str], utility: str
) -> list[Markup]:
    # The number of hospitals has charts of its own.
    fields = [name for name in numeric_fields(rows) if name != HOSPITALS][:MAX_EFFECTS]
    return [Markup(effect_svg(name, groups, colours, utility=utility)) for name in fields]


def _curves(rows: Sequence[Summary], utility: str) -> dict[str, Any] | None:
    """Utility per round of the settings on the frontier, and of the best one without noise."""
    chosen = frontier(rows)[-(MAX_CURVES - 1) :]
    chosen += sorted((row for row in rows if row.noiseless), key=_mean)[-1:]
    lines = {words(row.setting): row.curve(utility) for row in chosen}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    colours = {name: f"series-{place % 8}" for place, name in enumerate(lines)}
    drawing = figures.curves(lines, title=utility, colours=colours)
    return {"drawing": Markup(drawing), "legend": list(colours.items())}


def _table(rows: Sequence[Summary]) -> list[dict[str, Any]]:
    on_frontier = {id(row) for members in by_group(rows).values() for row in frontier(members)}
    ordered = sorted(rows, key=_mean, reverse=True)[:MAX_ROWS]
    return [
        {
            "words": words(row.setting),
            "frontier": id(row) in on_frontier,
            "epsilon": row.epsilon,
            "privacy": "no noise" if row.noiseless else "not accounted" if row.epsilon is None else "",
            "mean": row.mean,
            "interval": _interval(row),
            "seeds": len(row.values),
            "diverged": row.diverged,
            "left_out": sum(number_at(each, "left_out") or 0 for each in row.rows),
            "loss": _average([number_at(each, "loss") for each in row.rows]),
        }
        for row in ordered
    ]


def _statements(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """The distinct kinds of guarantee, each with the range of its epsilons."""
    kinds: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        epsilon = number_at(row, "epsilon")
        if epsilon is not None:
            key = tuple(row.get(name) for name in ("unit", "relation", "delta", "accountant"))
            kinds.setdefault(key, []).append(epsilon)
    return [
        {"unit": unit, "relation": text(relation).replace("_", " "), "delta": delta, "accountant": accountant}
        | {"low": min(values), "high": max(values)}
        for (unit, relation, delta, accountant), values in kinds.items()
    ]


def _interval(row: Summary) -> str:
    return "" if row.low is None or row.high is None else f"{decimals(row.low)} to {decimals(row.high)}"


def _mean(row: Summary) -> float:
    return float("-inf") if row.mean is None else row.mean


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
