"""What another hospital adds: score, loss and time of a round against the number of hospitals of a sweep.

Kumar et al. 2020, Figures 11-13, there of one training each; here with intervals over seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from capsfl.report.drawing import Drawing
from capsfl.report.figures import MAX_LINES
from capsfl.report.formats import decimals
from capsfl.report.spreads import Spread, spreads
from capsfl.report.studies import Summary, mean_interval, numeric_fields
from capsfl.report.study import Record, number_at

FIELD = "problem.hospitals"
"""The swept field that says how many hospitals take part."""
OVER_SEEDS = " Mean and 95 % t-interval over seeds."
CAPTIONS = {
    "training loss": "Of the last round's cohort on its own records.",
    "seconds per round": "Wall time of one machine that simulates all hospitals, compilation left out; where several "
    "studies ran at once, each study's share.",
}
"""What the charts of loss and time show."""
SCORED = {
    "patients": "On held-out patients, each decided once from all of its slices, the same patients throughout.",
    "patches": "On held-out patches, the same throughout.",
    "images": "On held-out images, each by itself, the same throughout.",
    "": "On held-out records, slices or images each by itself and not patients, the same throughout.",
}
"""What the chart of the utility shows, by what a held-out record is."""


def providers(
    rows: Sequence[Summary], *, utility: str, scored: str = "", words: Callable[[Mapping[str, Any]], str]
) -> dict[str, Any] | None:
    """Three charts and their table, a line for every setting of the other fields; None where the number is not swept.

    Args:
        rows: the settings of a sweep.
        utility: name of the score that studies are compared by.
        scored: what held-out records are, as the sweep recorded it; empty where it did not.
        words: says a setting in words.
    """
    if FIELD not in numeric_fields(rows):
        return None
    lines: dict[str, list[Summary]] = {}
    for row in sorted(rows, key=lambda row: row.setting[FIELD]):
        rest = {name: value for name, value in row.setting.items() if name != FIELD}
        lines.setdefault(words(rest) if rest else "", []).append(row)
    shown = dict(list(lines.items())[:MAX_LINES])
    colours = {name: f"series-{place}" if len(shown) > 1 else "accent" for place, name in enumerate(shown)}
    figures = ((utility, _utility), ("training loss", _loss), ("seconds per round", _seconds))
    legend = tuple(colours.items()) if len(shown) > 1 else ()
    charts = [
        Drawing(
            f"{title[0].upper()}{title[1:]} against the number of hospitals",
            Markup(
                spreads(
                    {name: _line(members, figure) for name, members in shown.items()},
                    title=title,
                    label="hospitals",
                    colours=colours,
                    unit_interval=figure is _utility,
                    doubling=True,
                )
            ),
            SCORED.get(scored, SCORED[""]) + OVER_SEEDS if figure is _utility else CAPTIONS[title] + OVER_SEEDS,
            legend,
        )
        for title, figure in figures
    ]
    return {
        "charts": charts,
        "legend": legend,
        "figures": [title for title, _ in figures],
        "rows": [
            {
                "words": name,
                "hospitals": row.setting[FIELD],
                "seeds": len(row.values),
                "cells": [_cell(_figures(row, figure)) for _, figure in figures],
            }
            for name, members in shown.items()
            for row in members
        ],
        "hidden": len(lines) - len(shown),
    }


def _utility(row: Record) -> float | None:
    return number_at(row, "utility")


def _loss(row: Record) -> float | None:
    return number_at(row, "loss")


def _seconds(row: Record) -> float | None:
    """Wall time of a study, its scoring included and its compilation not, by its rounds."""
    seconds, rounds = number_at(row, "seconds"), number_at(row, "rounds")
    return None if seconds is None or not rounds else seconds / rounds


def _figures(row: Summary, figure: Callable[[Record], float | None]) -> tuple[float, float | None, float | None] | None:
    """Mean over the seeds that came to an end, and its 95 % t-interval."""
    finished = [each for each in row.rows if each.get("status") == "finished"]
    return mean_interval([value for each in finished if (value := figure(each)) is not None])


def _line(members: Sequence[Summary], figure: Callable[[Record], float | None]) -> list[Spread]:
    found = [(float(row.setting[FIELD]), _figures(row, figure)) for row in members]
    return [Spread(place, *figures) for place, figures in found if figures is not None]


def _cell(figures: tuple[float, float | None, float | None] | None) -> dict[str, str]:
    if figures is None:
        return {"value": "–", "interval": ""}
    value, low, high = figures
    return {"value": decimals(value), "interval": "" if low is None else f"{decimals(low)} to {decimals(high)}"}
