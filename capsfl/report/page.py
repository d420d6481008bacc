"""A study as one HTML page that needs nothing else: no network, no second file, and no script but that which checks
the chain it draws against the log it carries.

Read `build_page` for the road from the folder to the page; each function below it prepares one section for
`template.html.j2`, which lays it out. Every value is escaped by the template; only drawings are inserted as
they are, and those escape their own labels.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from capsfl.report import figures
from capsfl.report.chain import MAX_VOTERS, carried_log, script, script_source, votes_of
from capsfl.report.comparison import comparison
from capsfl.report.figures import Scores
from capsfl.report.formats import decimals, duration, interval, power, signed, significant, size
from capsfl.report.interpretation import interpretation
from capsfl.report.overlays import triptych
from capsfl.report.predictions import read_predictions
from capsfl.report.published import PUBLISHED
from capsfl.report.study import (
    TASKS,
    Arm,
    Record,
    Study,
    number,
    number_at,
    read_overlays,
    read_study,
    record_at,
    rows_at,
    text,
    texts,
    value_at,
)
from capsfl.report.tables import (
    METRIC,
    Comparison,
    arm_colours,
    compare,
    costs,
    estimates,
    hospital_colours,
    metric_series,
    overall_series,
    roc_curves,
    training_seconds,
)
from capsfl.workers import is_running

MAX_OVERLAYS = 6
MAX_OVERLAY_BYTES = 3_000_000
MAX_PATIENT_ROWS = 400
MAX_FINDINGS = 200
MAX_BLOCKS = 24
MAX_STRIPS = 8
FEW_HOSPITALS = 30
"""Below this many, a hospital-level guarantee costs most of the accuracy, or protects little."""

CURVES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "dice": "Dice",
    "update_norm": "update norm",
}
UNBOUNDED = {"loss", "update_norm"}


def build_page(study_folder: Path) -> Path:
    """Write `report.html` into a study folder, whole or not at all, and return its path.

    The page shows what is there: one arm or many, one task or both, results or rounds still in progress.
    It depends on nothing but the files of the folder: equal folders give equal bytes.

    Raises:
        StudyError: the folder is no study, or one of its files is damaged.
    """
    study = read_study(Path(study_folder))
    comparisons = {task: compare(study, task) for task in TASKS}
    page = (
        environment()
        .get_template("template.html.j2")
        .render(
            study=study,
            light=figures.LIGHT,
            dark=figures.DARK,
            progress=_progress(study),
            headlines=_headlines(study, comparisons),
            road=_road(study),
            hospitals=hospital_colours(study),
            arms=arm_colours(study),
            segmentation=_segmentation(study, comparisons["segmentation"]),
            classification=_classification(study, comparisons["classification"]),
            comparison=comparison(study),
            interpretation=interpretation(study),
            predictions=read_predictions(study.folder),
            target=text(value_at(study.record, "configuration", "segmentation", "target")) or "lesion",
            privacy=_privacy(study),
            training=_training(study),
            runtime=_runtime(study),
            ledgers=(ledgers := _ledgers(study)),
            chain_script=script() if any(ledger["log"] for ledger in ledgers) else Markup(),
            chain_source=Markup(script_source()),
            configuration=flatten(record_at(study.record, "configuration")),
        )
    )
    return write_whole(study.folder / "report.html", distinct_names(page))


def distinct_names(page: str) -> str:
    """Give each chart's clip paths and markers a name of their own: two equal charts would share theirs."""
    count = itertools.count()

    def rename(chart: re.Match[str]) -> str:
        place = next(count)
        return re.sub(r'(?<=id="|f="#|rl\(#)[0-9a-f]{8}-', f"chart{place}-", chart[0])

    return re.sub(r'<svg class="chart".*?</svg>', rename, page, flags=re.DOTALL)


def write_whole(path: Path, page: str) -> Path:
    """Writes a page beside its place and renames it."""
    # A name in the data may hold a lone surrogate, which no encoding can carry.
    contents = page.encode(errors="replace")
    for left in path.parent.glob(f".{path.name}.*.partial"):
        if not is_running(int(left.suffixes[-2][1:])):
            left.unlink(missing_ok=True)  # by a process that was killed
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def environment() -> Environment:
    """Templates of this package, with the formats of numbers as filters."""
    templates = Environment(
        loader=PackageLoader("capsfl.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "decimals": decimals,
        "signed": signed,
        "significant": significant,
        "duration": duration,
        "size": size,
        "power": power,
        "interval": interval,
        "count": lambda value: decimals(value, 0),
    }
    return templates


def _progress(study: Study) -> str:
    """What is still missing, in words; empty for a finished study."""
    waiting = [arm.name for arm in study.arms if not any(record_at(arm.results, task) for task in TASKS)]
    if not waiting:
        return ""
    rounds = {name: sum(1 for arm in study.arms if arm.name == name for _ in arm.rounds) for name in waiting}
    return "No results yet from " + ", ".join(f"{name} ({count} rounds logged)" for name, count in rounds.items())


def _headlines(study: Study, comparisons: Mapping[str, Comparison | None]) -> list[dict[str, Any]]:
    headlines = []
    for task, label in (("classification", "AUC"), ("segmentation", "Dice")):
        comparison = comparisons[task]
        row = comparison.row(comparison.lead) if comparison else None
        if comparison is None or row is None:
            continue
        metric, (tone, words) = METRIC[task], comparison.verdict()
        best = comparison.best_control
        headlines.append(
            {
                "label": f"{label}, {row.name}",
                "value": decimals(row.values.get(metric)),
                "interval": interval(row.values, metric),
                "margin": f"{signed(row.margin)} over {best.name}" if best and row.margin is not None else "",
                "tone": tone,
                "words": words,
            }
        )
    return [*headlines, _privacy_headline(study, comparisons)]


def _privacy_headline(study: Study, comparisons: Mapping[str, Comparison | None]) -> dict[str, Any]:
    arm = _private_arm(study)
    if arm is None:
        words = "no arm of this study carries a privacy guarantee"
        label = "ε, privacy budget"
        return {"label": label, "value": "none", "interval": "", "margin": "", "tone": "warn", "words": words}
    privacy = record_at(arm.results, "privacy")
    costs = []
    for task, label in (("classification", "AUC"), ("segmentation", "Dice")):
        comparison = comparisons[task]
        private, lead = (comparison.row(arm.name), comparison.row(comparison.lead)) if comparison else (None, None)
        if private and lead and private is not lead:
            values = [number_at(row.values, METRIC[task]) for row in (private, lead)]
            if None not in values:
                costs.append(f"{label} {signed(values[0] - values[1])}")  # type: ignore[operator]
    epsilon = number_at(privacy, "epsilon")
    tone, words = _epsilon_words(epsilon)
    return {
        "label": f"ε, {arm.name}, per {text(privacy.get('unit')) or 'unit not recorded'}",
        "value": significant(epsilon),
        "interval": f"δ = {power(privacy.get('delta'))}",
        "margin": f"{', '.join(costs)} against {study.primary}" if costs else "",
        "tone": tone,
        "words": words,
    }


def _epsilon_words(epsilon: float | None) -> tuple[str, str]:
    """The three tiers of Ponomareva et al. 2023, "How to DP-fy ML", section 5.2."""
    if epsilon is None:
        return "none", "no finite epsilon was recorded"
    if epsilon <= 1:
        return "good", "a strong formal guarantee (ε ≤ 1)"
    if epsilon <= 10:
        return "none", "a reasonable formal guarantee (1 < ε ≤ 10)"
    return "warn", "a weak formal guarantee (ε > 10)"


def _road(study: Study) -> list[dict[str, Any]]:
    stages = rows_at(study.record, "stages")
    longest = max((number_at(stage, "seconds") or 0.0 for stage in stages), default=0.0)
    return [
        {
            "name": text(stage.get("name")),
            "seconds": stage.get("seconds"),
            "share": round(100 * (number_at(stage, "seconds") or 0.0) / longest, 1) if longest > 0 else 0,
        }
        for stage in stages
    ]


def _forest(study: Study, comparison: Comparison, quantity: str, reference: float | None) -> Markup:
    rows = estimates(study, comparison)
    return Markup(figures.forest(rows, quantity=quantity, reference=reference)) if rows else Markup()


def _segmentation(study: Study, comparison: Comparison | None) -> dict[str, Any] | None:
    lead = study.lead("segmentation")
    if comparison is None or lead is None:
        return None
    result = record_at(lead.results, "segmentation")
    overlays, total = [], 0
    for overlay in read_overlays(lead, limit=MAX_OVERLAYS):
        drawing = triptych(overlay)
        if total + len(drawing) > MAX_OVERLAY_BYTES:
            continue
        total += len(drawing)
        overlays.append({"overlay": overlay, "drawing": Markup(drawing)})
    return {
        "comparison": comparison,
        "verdict": comparison.verdict(),
        "forest": _forest(study, comparison, "Dice", None),
        "planes": {name: value for name, value in record_at(result, "planes").items() if number(value) is not None},
        "hospitals": record_at(result, "hospitals"),
        "overlays": overlays,
    }


def _classification(study: Study, comparison: Comparison | None) -> dict[str, Any] | None:
    lead = study.lead("classification")
    if comparison is None or lead is None:
        return None
    result = record_at(lead.results, "classification")
    curves = roc_curves(study)
    scores = [row for row in rows_at(result, "scores") if number_at(row, "score") is not None]
    threshold = number_at(result, "overall", "threshold")
    return {
        "comparison": comparison,
        "verdict": comparison.verdict(),
        "forest": _forest(study, comparison, "AUC", 0.5),
        "roc": Markup(figures.roc([curve for _, _, curve in curves])) if curves else Markup(),
        "roc_legend": [(name, curve.colour, overall) for name, overall, curve in curves],
        "hospitals": record_at(result, "hospitals"),
        "classes": rows_at(result, "overall", "classes"),
        "newcombe": text(result.get("auc_interval")) == "newcombe",
        "published": PUBLISHED if rows_at(result, "overall", "classes") else (),
        "costs": costs(study),
        "strip": Markup(figures.strip(_strips(scores), threshold=threshold)) if scores else Markup(),
        "threshold": threshold,
        "patients": _patients(scores, threshold),
        "patients_total": len(scores),
    }


def _strips(scores: Sequence[Record]) -> list[Scores]:
    names = sorted({text(row.get("hospital")) for row in scores})
    if len(names) > MAX_STRIPS:  # more columns than a reader tells apart: all hospitals in one
        scores, names = [{**row, "hospital": "all hospitals"} for row in scores], ["all hospitals"]
    groups = []
    for name in names:
        own = [row for row in scores if text(row.get("hospital")) == name]
        by_label = {
            label: [float(row["score"]) for row in own if bool(row.get("label")) is label] for label in (True, False)
        }
        groups.append(Scores(name, by_label[True], by_label[False]))
    return groups


def _patients(scores: list[Record], threshold: float | None) -> list[dict[str, Any]]:
    """Patients by falling score, and whether the threshold decides them rightly."""
    rows = []
    for row in sorted(scores, key=lambda row: -float(row["score"]))[:MAX_PATIENT_ROWS]:
        decided = None if threshold is None else (row["score"] >= threshold) == bool(row.get("label"))
        rows.append({**row, "right": decided})
    return rows


def _private_arm(study: Study) -> Arm | None:
    arms = sorted(study.arms, key=lambda arm: arm.name != study.primary)
    return next((arm for arm in arms if record_at(arm.results, "privacy")), None)


def _privacy(study: Study) -> dict[str, Any]:
    spending, colours = {}, {}
    for arm in study.arms:
        for task in TASKS:
            points = overall_series(arm.rounds_of(task), "epsilon")
            if points:
                name = f"{arm.name}, {task}"
                colours[name] = f"series-{len(spending) % 8}"
                spending[name] = points
    arm = _private_arm(study)
    hospitals = len(study.hospitals())
    privacy = record_at(arm.results, "privacy") if arm else {}
    return {
        "arm": arm.name if arm else "",
        "record": privacy,
        "patients": rows_at(privacy, "patients"),
        "tier": _epsilon_words(number_at(privacy, "epsilon"))[1],
        "curve": Markup(figures.curves(spending, title="ε spent", colours=colours)) if spending else Markup(),
        "legend": [(name, colours[name], points[-1][1]) for name, points in spending.items()],
        "hospitals": hospitals,
        "few": hospitals < FEW_HOSPITALS and text(privacy.get("unit")) in {"", "hospital"},
        "bare": [other.name for other in study.arms if not record_at(other.results, "privacy")],
    }


def _training(study: Study) -> list[dict[str, Any]]:
    """Curves of every arm, the primary first; the page opens that one only."""
    colours, groups = hospital_colours(study), []
    for arm in sorted(study.arms, key=lambda arm: arm.name != study.primary):
        for task in TASKS:
            rounds, drawings, names = arm.rounds_of(task), [], set()
            for metric, title in CURVES.items():
                series, overall = metric_series(rounds, metric), overall_series(rounds, metric)
                if series or overall:
                    bounded = metric not in UNBOUNDED
                    drawing = figures.curves(
                        series, title=title, colours=colours, overall=overall, unit_interval=bounded
                    )
                    drawings.append(Markup(drawing))
                    names.update(series)
            if drawings:
                groups.append(
                    {
                        "arm": arm.name,
                        "task": task,
                        "rounds": len({number_at(row, "round") for row in rounds}),
                        "drawings": drawings,
                        "hospitals": sorted(names) if len(names) <= figures.MAX_LINES else [],
                        "open": arm.name == study.primary,
                    }
                )
    return groups


def _runtime(study: Study) -> dict[str, Any]:
    stages = []
    for stage in rows_at(study.record, "stages"):
        wall, cpu = number_at(stage, "seconds"), number_at(stage, "cpu_seconds")
        if wall is not None:
            stages.append((text(stage.get("name")), [wall, cpu or 0.0]))
    work, memory = [], []
    for arm in study.arms:
        for task in TASKS:
            rounds = arm.rounds_of(task)
            if not rounds:
                continue
            totals = {
                key: sum(found) if (found := [n for row in rounds if (n := number_at(row, key)) is not None]) else None
                for key in ("seconds", "compile_seconds", "cpu_seconds")
            } | {"training": training_seconds(rounds)}
            peak = max((n for row in rounds if (n := number_at(row, "peak_memory_bytes")) is not None), default=None)
            count = len(rounds)
            work.append({"arm": arm.name, "task": task, "rounds": count, "peak": peak, **totals})
            if peak is not None:
                memory.append((f"{arm.name}, {task}", [peak / 2**20]))
    drawings = []
    if stages:
        drawings.append(figures.bars(stages, quantity="seconds, wall / process CPU", colours=("accent", "negative")))
    if memory:
        drawings.append(figures.bars(memory, quantity="peak memory in MiB", colours=("accent",)))
    return {"drawings": [Markup(drawing) for drawing in drawings], "work": work}


def _ledgers(study: Study) -> list[dict[str, Any]]:
    ledgers = []
    for arm in sorted(study.arms, key=lambda arm: arm.name != study.primary):
        if arm.ledger is None:
            continue
        findings = [
            {key: text(row.get(key)) for key in ("check", "status", "round", "task", "leaf", "detail")}
            | {"tone": _tone(text(row.get("status")))}
            for row in rows_at(arm.ledger, "findings")
        ]
        bad = {(row["task"], row["round"]) for row in findings if row["tone"] == "bad"}
        blocks = [
            {
                "height": text(row.get("height")),
                "task": text(row.get("task")),
                "round": text(row.get("round")),
                "digest": text(row.get("digest")),
                "epsilon": row.get("epsilon"),
                "cohort": texts(row.get("cohort")),
                "votes": votes_of(row),
                "approvals": row.get("approvals"),
                "bad": (text(row.get("task")), text(row.get("round"))) in bad,
            }
            for row in rows_at(arm.ledger, "rounds")
        ]
        shown = blocks
        if len(blocks) > MAX_BLOCKS:  # the beginning, the end, and every block that failed a check
            tail = len(blocks) - (MAX_BLOCKS - 6)
            shown = [block for place, block in enumerate(blocks) if place < 6 or place >= tail or block["bad"]]
        findings.sort(key=lambda row: ("bad", "warn", "good").index(row["tone"]))
        ledgers.append(
            {
                "arm": arm.name,
                "record": arm.ledger,
                "log": carried_log(arm.folder),
                "voters": sorted({vote["hospital"] for block in shown for vote in block["votes"]})[:MAX_VOTERS],
                "blocks": shown[: 4 * MAX_BLOCKS],
                "hidden": len(blocks) - len(shown[: 4 * MAX_BLOCKS]),
                "problems": [row for row in findings if row["tone"] != "good"][:MAX_FINDINGS],
                "passed": [row for row in findings if row["tone"] == "good"][:MAX_FINDINGS],
                "counts": {tone: sum(row["tone"] == tone for row in findings) for tone in ("good", "warn", "bad")},
            }
        )
    return ledgers


def _tone(status: str) -> str:
    """Only a plain success counts as one; what is unverifiable or unknown is never shown as fine."""
    word = status.strip().lower()
    if word in {"ok", "pass", "passed", "verified", "valid"}:
        return "good"
    return "warn" if word in {"unverifiable", "warning", "warn", "skipped"} else "bad"


def flatten(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of a nested configuration."""
    rows = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows.extend(flatten(value, f"{name}."))
        elif isinstance(value, list):
            rows.append((name, ", ".join(str(each) for each in value)))
        else:
            rows.append((name, "" if value is None else str(value)))
    return rows
