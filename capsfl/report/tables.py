"""Comparisons of a study: arms beside arms, and always beside the controls that need no network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from capsfl.report.figures import Estimate, Points, RocCurve
from capsfl.report.study import Arm, Record, Study, number_at, numbers, record_at, text

CONTROLS = {
    "classification": {
        "always positive": "calls every patient positive",
        "permuted labels": "labels shuffled between patients",
        "dense lung fraction": "one number: the share of dense lung",
    },
    "segmentation": {"HU threshold": "no network, one threshold in the lung"},
}
"""Rows that every table carries, whether or not the study recorded them."""

MEANINGS = {
    "local": "each hospital alone, averaged",
    "pooled": "all records in one place",
    "federated": "records stay, updates travel",
    "private": "federated, clipped and noised",
}

METRIC = {"segmentation": "dice", "classification": "auc"}


@dataclass(frozen=True)
class Row:
    """One line of a comparison: the metrics as recorded; `margin` is None where it means nothing."""

    name: str
    kind: Literal["primary", "arm", "member", "control"]
    note: str = ""
    values: Record = field(default_factory=dict)
    margin: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Arms and controls of one task; margins are against `best_control`."""

    task: str
    lead: str
    rows: Sequence[Row]
    best_control: Row | None

    def row(self, name: str) -> Row | None:
        """The row of an arm."""
        return next((row for row in self.rows if row.name == name and row.kind in {"primary", "arm"}), None)

    def verdict(self) -> tuple[Literal["good", "warn", "none"], str]:
        """Whether the leading arm's interval lies above the best control, in words."""
        metric, lead = METRIC[self.task], self.row(self.lead)
        if lead is None or self.best_control is None or lead.margin is None:
            return "none", "no control was recorded to compare with"
        low, control = number_at(lead.values, f"{metric}_low"), number_at(self.best_control.values, metric)
        if low is None or control is None:
            return "none", "no interval was recorded, so the margin is not yet evidence"
        if low > control:
            return "good", f"the whole interval lies above {self.best_control.name}"
        return "warn", f"the interval reaches down to {self.best_control.name}: not shown to be better"


def compare(study: Study, task: str) -> Comparison | None:
    """Set every arm with results for `task` beside the controls; None before any arm has results."""
    lead = study.lead(task)
    if lead is None:
        return None
    metric = METRIC[task]
    controls = _controls(lead, task)
    scored = [row for row in controls if number_at(row.values, metric) is not None]
    best = max(scored, key=lambda row: number_at(row.values, metric) or 0.0, default=None)
    ceiling = number_at(best.values, metric) if best else None
    lead_value = number_at(lead.results, task, "overall", metric)

    rows = []
    for arm in study.arms:
        overall = record_at(arm.results, task, "overall")
        if overall:
            kind = "primary" if arm is lead else "arm"
            margin = _difference(number_at(overall, metric), ceiling)
            rows.append(Row(arm.name, kind, MEANINGS.get(arm.name, ""), overall, margin))
        for member in record_at(arm.results, "members"):
            values = record_at(arm.results, "members", member, task, "overall")
            if values:
                margin = _difference(number_at(values, metric), ceiling)
                rows.append(Row(member, "member", "alone", values, margin))
    for row in controls:
        margin = _difference(lead_value, number_at(row.values, metric))
        rows.append(Row(row.name, "control", row.note, row.values, margin))
    return Comparison(task, lead.name, rows, best)


def _controls(arm: Arm, task: str) -> list[Row]:
    recorded = record_at(arm.results, task, "controls")
    rows = []
    for name in dict.fromkeys([*CONTROLS[task], *recorded]):
        values, note = record_at(recorded, name), CONTROLS[task].get(name, "")
        if not values and name == "always positive":
            values = always_positive(record_at(arm.results, task, "overall"))
        if not values:
            note = "not recorded"
        rows.append(Row(name, "control", note, values))
    return rows


def always_positive(overall: Record) -> Record:
    """The metrics of calling every patient positive, which follow from the counts alone."""
    patients, positives = number_at(overall, "patients"), number_at(overall, "positives")
    if not patients or positives is None:
        return {}
    return {
        "auc": 0.5,
        "balanced_accuracy": 0.5,
        "sensitivity": 1.0,
        "specificity": 0.0,
        "precision": positives / patients,
        "patients": patients,
        "positives": positives,
    }


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def hospital_colours(study: Study) -> dict[str, str]:
    """One colour for each hospital, the same all over the page."""
    return {name: f"series-{place % 8}" for place, name in enumerate(study.hospitals())}


def arm_colours(study: Study) -> dict[str, str]:
    """The accent for the primary arm, other colours for the others."""
    others = [arm.name for arm in study.arms if arm.name != study.primary]
    return {study.primary: "accent"} | {name: f"series-{(2 * place + 1) % 8}" for place, name in enumerate(others)}


def estimates(study: Study, comparison: Comparison) -> list[Estimate]:
    """The arms and controls of a comparison as rows of a forest plot; controls in grey, members left out."""
    metric, colours, rows = METRIC[comparison.task], arm_colours(study), []
    for row in comparison.rows:
        value = number_at(row.values, metric)
        if value is not None and row.kind != "member":
            low, high = number_at(row.values, f"{metric}_low"), number_at(row.values, f"{metric}_high")
            colour = "muted" if row.kind == "control" else colours[row.name]
            rows.append(Estimate(row.name, value, low, high, colour))
    return rows


def metric_series(rounds: Sequence[Record], metric: str) -> dict[str, Points]:
    """Points `(round, value)` of a metric for each hospital, or for each hospital that trained alone."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rounds:
        place, member = number_at(row, "round"), text(row.get("member"))
        hospitals = record_at(row, "hospitals")
        values = {name: number_at(hospitals, name, metric) for name in hospitals if not member or name == member}
        if member and values.get(member) is None:
            values[member] = number_at(row, metric)
        for name, value in values.items():
            if place is not None and value is not None:
                series.setdefault(name, []).append((place, value))
    return {name: series[name] for name in sorted(series)}


def overall_series(rounds: Sequence[Record], metric: str) -> Points:
    """Points `(round, value)` of a metric of the whole cohort; empty if every hospital trained alone."""
    pairs = [(number_at(row, "round"), number_at(row, metric)) for row in rounds if not row.get("member")]
    return [(place, value) for place, value in pairs if place is not None and value is not None]


def roc_curves(study: Study) -> list[tuple[str, Record, RocCurve]]:
    """The arm, its overall metrics and its ROC for every arm that has one; the leading arm comes first."""
    lead, colours, found = study.lead("classification"), arm_colours(study), []
    for arm in sorted(study.arms, key=lambda arm: arm is not lead):
        overall = record_at(arm.results, "classification", "overall")
        curve = record_at(arm.results, "classification", "roc")
        false, true = numbers(curve.get("false_positive_rate")), numbers(curve.get("true_positive_rate"))
        if len(false) < 2 or len(false) != len(true):
            continue
        specificity, sensitivity = number_at(overall, "specificity"), number_at(overall, "sensitivity")
        point = None if specificity is None or sensitivity is None else (1 - specificity, sensitivity)
        found.append((arm.name, overall, RocCurve(false, true, colours[arm.name], point if arm is lead else None)))
    return found
