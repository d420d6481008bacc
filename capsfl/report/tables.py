"""Comparisons of a study: arms beside arms, and always beside the controls that need no network."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from capsfl.report.figures import Estimate, Points, RocCurve
from capsfl.report.study import Record, Study, number_at, numbers, record_at, rows_at, text

CONTROLS = {
    "classification": {
        "always positive": "calls every patient positive",
        "permuted labels": "labels shuffled between patients",
        "dense lung fraction": "one number: the share of dense lung",
    },
    "segmentation": {"HU threshold": "no network, one threshold in the lung"},
}
"""Rows that every table carries, whether or not the study recorded them."""

LEAK = "size and sharpness"
"""The row that a table about pictures carries in the place of the dense lung, which pictures do not show in HU."""

NOTES = {LEAK: "logistic regression on the files' height, width, aspect, mean grey value and high frequencies"}
"""What rows mean that some tables carry."""

MEANINGS = {
    "local": "each hospital alone, averaged",
    "pooled": "all records in one place",
    "federated": "records stay, updates travel",
    "private": "federated, clipped and noised",
    "leave-one-out": "each hospital judged by the others, averaged",
    "permuted": "trained on shuffled labels: chance, or something leaks",
}

METRIC = {"segmentation": "dice", "classification": "auc"}


@dataclass(frozen=True)
class Row:
    """One line of a comparison: the metrics as recorded; `margin` is None where it means nothing."""

    name: str
    kind: Literal["primary", "arm", "member", "seeds", "control"]
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
    controls = _controls(lead.results, task)
    lead_value = number_at(lead.results, task, "overall", metric)

    rows = []
    for arm in study.arms:
        overall = record_at(arm.results, task, "overall")
        if overall:
            kind = "primary" if arm is lead else "arm"
            rows.append(Row(arm.name, kind, MEANINGS.get(arm.name, ""), overall, _margin(arm.results, task)))
        left_out = text(arm.results.get("partition")) == "leave-one-out"
        for name, member in record_at(arm.results, "members").items():
            values = record_at(member, task, "overall")
            if values:
                rows.append(Row(name, "member", "left out" if left_out else "alone", values, _margin(member, task)))
    for names in arms_by_seed(study):
        own = [row for row in rows if row.name in names and row.kind in ("primary", "arm")]
        if len(own) > 1:
            after = rows.index(own[-1]) + 1
            while after < len(rows) and rows[after].kind == "member":
                after += 1
            rows.insert(after, _over_seeds(own, metric, _best(controls, metric)))
    for row in controls:
        margin = _difference(lead_value, number_at(row.values, metric))
        rows.append(Row(row.name, "control", row.note, row.values, margin))
    return Comparison(task, lead.name, rows, _best(controls, metric))


def arms_by_seed(study: Study) -> list[list[str]]:
    """The names of arms that differ in their seeds alone, where there are two or more."""
    groups: dict[str, list[str]] = {}
    for arm in rows_at(study.record, "configuration", "arms"):
        rest = {field: value for field, value in arm.items() if field not in ("name", "seed")}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(text(arm.get("name")))
    return [names for names in groups.values() if len(names) > 1]


def _over_seeds(rows: Sequence[Row], metric: str, best: Row | None) -> Row:
    """The mean of each figure over trainings from several seeds; of the metric also the lowest and the highest."""
    figures = dict.fromkeys(name for row in rows for name in row.values)
    means = {}
    for name in figures:
        known = [number_at(row.values, name) for row in rows]
        if None not in known:
            means[name] = statistics.fmean(value for value in known if value is not None)
    values = [value for row in rows if (value := number_at(row.values, metric)) is not None]
    if values:
        means |= {f"{metric}_low": min(values), f"{metric}_high": max(values)}
    note = "mean; as interval the lowest and the highest"
    margin = _difference(means.get(metric), number_at(best.values, metric) if best else None)
    return Row(f"{rows[0].name}, {len(rows)} seeds", "seeds", note, means, margin)


def _margin(results: Record, task: str) -> float | None:
    """How far results lie above the best control on the same patients, such as those of a hospital left out."""
    metric = METRIC[task]
    best = _best(_controls(results, task), metric)
    return _difference(number_at(results, task, "overall", metric), number_at(best.values, metric) if best else None)


def _best(controls: Sequence[Row], metric: str) -> Row | None:
    scored = [row for row in controls if number_at(row.values, metric) is not None]
    return max(scored, key=lambda row: number_at(row.values, metric) or 0.0, default=None)


def _controls(results: Record, task: str) -> list[Row]:
    recorded = record_at(results, task, "controls")
    expected = [name for name in CONTROLS[task] if name != "dense lung fraction" or LEAK not in recorded]
    rows = []
    for name in dict.fromkeys([*expected, *recorded]):
        values, note = record_at(recorded, name), (CONTROLS[task] | NOTES).get(name, "")
        if not values and name == "always positive":
            values = always_positive(record_at(results, task, "overall"))
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
        "accuracy": positives / patients,
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
        if value is not None and row.kind not in ("member", "seeds"):
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


def costs(study: Study) -> list[dict[str, Any]]:
    """What each arm's classifier cost to train, and how much of the scanner shows in what its last layer sees.

    Seconds are summed over the rounds, those of compiling apart where they were recorded, in wall time; processor
    seconds hold both. `memory` is what the compiler plans for a round, where it was asked; `peak` the most that the
    process held until the last round, of an arm that had a process of its own. Hospitals
    that train alone keep rounds of their own, which are not added up here.
    """
    rows = []
    for arm in study.arms:
        found = record_at(arm.results, "classification")
        rounds = [row for row in arm.rounds_of("classification") if not row.get("member")]
        if not found:
            continue
        first = next((record_at(member, "classification") for member in record_at(arm.results, "members").values()), {})
        trials = rows_at(arm.chunks, "classification", "trials")
        chunk = number_at(arm.chunks, "classification", "chunk")
        peaks = [number_at(trial, "peak_bytes") for trial in trials if number_at(trial, "chunk") == chunk]
        probe = record_at(found, "scanner")
        rows.append(
            {
                "arm": arm.name,
                "network": text(found.get("network") or first.get("network")),
                "parameters": found.get("parameters") or first.get("parameters"),
                "rounds": len(rounds) or None,
                "seconds": training_seconds(rounds),
                "compile_seconds": _total(rounds, "compile_seconds"),
                "cpu_seconds": _total(rounds, "cpu_seconds"),
                "memory": next((peak for peak in peaks if peak is not None), None),
                "peak": max(
                    (n for row in rounds if (n := number_at(row, "peak_memory_bytes")) is not None), default=None
                ),
                "probe": probe,
            }
        )
    return rows


def training_seconds(rounds: Sequence[Record]) -> float | None:
    """Wall time of rounds without compiling; with it where that was not recorded."""
    total = _total(rounds, "seconds")
    return None if total is None else max(0.0, total - (_total(rounds, "compile_seconds") or 0.0))


def _total(rounds: Sequence[Record], figure: str) -> float | None:
    found = [value for row in rounds if (value := number_at(row, figure)) is not None]
    return sum(found) if found else None
