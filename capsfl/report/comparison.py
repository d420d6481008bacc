"""Trainings of a study side by side: over rounds, by accuracy, from site to site, and without one hospital.

Kumar et al. 2020 draw the first two (Figures 8 and 9). The other two ask what a federation is for: how a hospital's
own model does elsewhere, and what a hospital can expect that was not there.
"""

import statistics
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from capsfl.report import figures
from capsfl.report.drawing import Drawing
from capsfl.report.figures import Estimate
from capsfl.report.formats import decimals
from capsfl.report.matrix import Cell, Matrix, matrix
from capsfl.report.paired import auc_differences
from capsfl.report.spreads import Spread, spreads
from capsfl.report.study import Arm, Record, Study, number_at, numbers, record_at, rows_at, text
from capsfl.report.tables import METRIC, arm_colours

MAX_SITES = 16
"""A matrix of more hospitals cannot be read."""
NAMES = {"classification": "AUC", "segmentation": "Dice"}
CHANCE = {"classification": 0.5, "segmentation": 0.0}
NORMAL_QUANTILE = 1.959964
"""Of a 95 % interval."""


def comparison(study: Study) -> list[Drawing]:
    """Every drawing of the page's section; none where there is nothing to compare."""
    single = (sensitivity_over_rounds(study), accuracy_by_training(study), against_others(study))
    return [*(drawing for drawing in single if drawing is not None), *from_site_to_site(study), *left_out(study)]


def sensitivity_over_rounds(study: Study) -> Drawing | None:
    """Figure 8 of the paper."""
    lines, colours = sensitivity_lines(study), arm_colours(study)
    if not lines:
        return None
    drawing = spreads(lines, title="sensitivity", label="round", colours=colours, unit_interval=True, size=(300, 210))
    return Drawing(
        "Sensitivity over rounds",
        Markup(drawing),
        "On images of validation patients, called by the most probable class. Mean over hospitals; the interval goes "
        "from the lowest hospital to the highest. Where there is a model for every hospital, each counts at all "
        "hospitals it is judged at.",
        tuple((f"{name}: {decimals(points[-1].value, 2)}", colours[name]) for name, points in lines.items()),
    )


def accuracy_by_training(study: Study) -> Drawing | None:
    """Figure 9 of the paper; None of a single training."""
    rows = accuracy_rows(study)
    if len(rows) < 2:
        return None
    return Drawing(
        "Accuracy",
        Markup(figures.forest(rows, quantity="accuracy", reference=frequent_share(study))),
        "On test patients, as in the table, with Wilson's 95 % interval; of trainings with a model for every hospital "
        "the mean, from the lowest model to the highest. Dashed: calling everybody the most frequent class.",
    )


def against_others(study: Study) -> Drawing | None:
    """The leading training against each other one on the same patients; None where no other judged them."""
    rows, lead = paired_rows(study), study.lead("classification")
    if not rows or lead is None:
        return None
    drawing = figures.differences(rows, quantity="difference of AUC", title="AUC minus that of every other training")
    return Drawing(
        f"{lead.name} against each other training",
        Markup(drawing),
        f"AUC of {lead.name} minus that of the row, on the same test patients: to the right {lead.name} is better. "
        "Intervals by drawing patients and asking all trainings about the drawn ones, wide enough that all hold "
        "together with 95 %; one that holds zero shows neither to be better.",
    )


def from_site_to_site(study: Study) -> list[Drawing]:
    """By task, who trained against whom it was tested on."""
    tables = {task: table for task in METRIC if (table := cross_site(study, task)) is not None}
    return [
        Drawing(
            f"{NAMES[task]} from site to site",
            Markup(matrix(table, quantity=NAMES[task], floor=CHANCE[task])),
            "Trained at the row, tested on the column's test patients; framed, a hospital at home. Below the gap, "
            "trainings that saw all hospitals. Small: the 95 % interval over the column's patients; a dash where a "
            "figure is not defined.",
        )
        for task, table in tables.items()
    ]


def left_out(study: Study) -> list[Drawing]:
    """By task, each hospital's patients judged with it and without it."""
    found = {task: rows for task in METRIC if (rows := left_out_rows(study, task))}
    return [
        Drawing(
            f"{NAMES[task]} of a hospital that was not there",
            Markup(figures.forest(rows, quantity=NAMES[task], reference=CHANCE[task] or None)),
            "Each hospital's test patients judged twice: by the study's own training, in which the hospital took part, "
            "and by a federation without it, whose weights and threshold come from the others.",
        )
        for task, rows in found.items()
    ]


def is_left_out(arm: Arm) -> bool:
    """Whether the members of an arm are federations that each lack the hospital they are named after."""
    return text(arm.results.get("partition")) == "leave-one-out"


def sensitivity_lines(study: Study) -> dict[str, list[Spread]]:
    """Sensitivity on validation images by round: the mean over hospitals, from the lowest to the highest.

    Of an arm with several models each counts at the hospitals it was judged at: one that a hospital trains alone at
    that hospital, one that lacks a hospital at the others.
    """
    lines = {}
    for arm in _primary_first(study)[: figures.MAX_LINES]:
        found: dict[float, list[float]] = {}
        for row in arm.rounds_of("classification"):
            place, hospitals = number_at(row, "round"), record_at(row, "hospitals")
            values = [value for name in hospitals if (value := number_at(hospitals, name, "sensitivity")) is not None]
            if place is not None and values:
                found.setdefault(place, []).extend(values)
        points = [
            Spread(place, statistics.fmean(values), *((min(values), max(values)) if len(values) > 1 else ()))
            for place, values in sorted(found.items())
        ]
        if points:
            lines[arm.name] = points
    return lines


def accuracy_rows(study: Study) -> list[Estimate]:
    """Accuracy on test patients by arm: with Wilson's interval, or of members from the lowest to the highest."""
    colours, rows = arm_colours(study), []
    for arm in study.arms:
        overall = record_at(arm.results, "classification", "overall")
        value, patients = number_at(overall, "accuracy"), number_at(overall, "patients")
        if value is None:
            continue
        members = record_at(arm.results, "members")
        own = [number_at(row, "classification", "overall", "accuracy") for row in members.values()]
        known = [each for each in own if each is not None]
        interval = (min(known), max(known)) if known else wilson(value, patients) if patients else (None, None)
        rows.append(Estimate(arm.name, value, *interval, colours[arm.name]))
    return rows


def paired_rows(study: Study) -> list[Estimate]:
    """The AUC of the leading training minus that of every other one that judged the same patients, by arm."""
    lead, colours = study.lead("classification"), arm_colours(study)
    judged = {} if lead is None else _judged(lead)
    others = {arm.name: rows for arm in study.arms if arm is not lead and (rows := _judged(arm))}
    others = {name: rows for name, rows in others.items() if rows.keys() == judged.keys()}
    if not others:
        return []
    people = [text(row.get("person")) or "/".join(key) for key, row in judged.items()]
    found = auc_differences(
        np.array([_probabilities(row) for row in judged.values()]),
        {name: np.array([_probabilities(rows[key]) for key in judged]) for name, rows in others.items()},
        np.array([int(number_at(row, "label") or 0) for row in judged.values()]),
        people=np.unique(people, return_inverse=True)[1],
    )
    return [Estimate(name, *difference, colours[name]) for name, difference in found.items()]


def _judged(arm: Arm) -> dict[tuple[str, str], Record]:
    rows = rows_at(arm.results, "classification", "scores")
    return {(text(row.get("hospital")), text(row.get("patient"))): row for row in rows}


def _probabilities(row: Record) -> Sequence[float]:
    score = number_at(row, "score") or 0.0
    return numbers(row.get("probabilities")) or [1 - score, score]


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` patients (Wilson 1927)."""
    square = NORMAL_QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_QUANTILE * (share * (1 - share) / count + square / (4 * count**2)) ** 0.5 / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def frequent_share(study: Study) -> float | None:
    """The accuracy of calling every test patient the most frequent class."""
    lead = study.lead("classification")
    overall = record_at(lead.results, "classification", "overall") if lead else {}
    patients, positives = number_at(overall, "patients"), number_at(overall, "positives")
    if not patients or positives is None:
        return None
    classes = [number_at(row, "patients") or 0.0 for row in rows_at(overall, "classes")]
    return max(classes or [positives, patients - positives]) / patients


def cross_site(study: Study, task: str) -> Matrix | None:
    """Who trained, in rows, against whose test patients, in columns: every hospital alone, then the other arms."""
    alone = next((arm for arm in study.arms if arm.results.get("members") and not is_left_out(arm)), None)
    if alone is None:
        return None
    members = record_at(alone.results, "members")
    own: list[tuple[str, Record]] = [(name, record_at(members, name, task, "hospitals")) for name in sorted(members)]
    others = [
        (arm.name, record_at(arm.results, task, "hospitals")) for arm in study.arms if not arm.results.get("members")
    ]
    own, others = [row for row in own if row[1]], [row for row in others if row[1]]
    columns = sorted({name for _, row in own for name in row})
    if not own or not 1 < len(columns) <= MAX_SITES:
        return None
    others = others[: figures.MAX_LINES]
    cells = [[_cell(record_at(row, column), METRIC[task]) for column in columns] for _, row in (*own, *others)]
    return Matrix([name for name, _ in (*own, *others)], columns, cells, len(own) if others else None)


def left_out_rows(study: Study, task: str) -> list[Estimate]:
    """Each hospital's test patients twice: under the leading arm, and under a federation without that hospital."""
    absent = next((arm for arm in study.arms if is_left_out(arm)), None)
    lead = study.lead(task)
    if absent is None or lead is None:
        return []
    members, metric, colours, rows = record_at(absent.results, "members"), METRIC[task], arm_colours(study), []
    for name in sorted(members)[:MAX_SITES]:
        there = _cell(record_at(lead.results, task, "hospitals", name), metric)
        missing = _cell(record_at(members, name, task, "overall"), metric)
        for words, cell, colour in (
            (name, there, colours[lead.name]),
            (f"without {name}", missing, colours[absent.name]),
        ):
            if cell.value is not None:
                rows.append(Estimate(words, cell.value, cell.low, cell.high, colour))
    return rows


def _cell(values: Record, metric: str) -> Cell:
    return Cell(*(number_at(values, name) for name in (metric, f"{metric}_low", f"{metric}_high")))


def _primary_first(study: Study) -> Sequence[Arm]:
    return sorted(study.arms, key=lambda arm: arm.name != study.primary)
