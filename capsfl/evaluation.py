"""How good a run is on patients never trained on, beside the controls that make the figures mean something."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.config import StudyConfig
from capsfl.learning import controls as untrained
from capsfl.learning import metrics
from capsfl.learning.classification import Classifier, masked_slices
from capsfl.learning.patients import Patient
from capsfl.learning.segmentation import Segmenter, false_positive_volume_ml
from capsfl.privacy.plan import PrivacyStatement
from capsfl.study import Split

OVERLAY_PATIENTS = 3
"""Test patients whose slices the page shows."""


@dataclass(frozen=True)
class Controls:
    """Figures that train nothing, computed once for all arms."""

    threshold_hu: float
    threshold_dice: Mapping[str, float]
    dense_fraction: Mapping[str, float]
    dense_cut: float


class Segmented:
    """The fused probabilities of scans under one set of weights, computed once per patient."""

    def __init__(self, segmenter: Segmenter, parameters: Any) -> None:
        self.segmenter = segmenter
        self._parameters = parameters
        self._planes: dict[str, dict[str, np.ndarray]] = {}

    def planes(self, patient: Patient) -> dict[str, np.ndarray]:
        """The probability volume of every plane."""
        if patient.key not in self._planes:
            found = self.segmenter.planes(self._parameters, patient.hu, patient.body)
            self._planes[patient.key] = {plane: p.astype(np.float16) for plane, p in found.items()}
        return {plane: p.astype(np.float32) for plane, p in self._planes[patient.key].items()}

    def fused(self, patient: Patient) -> np.ndarray:
        """The fused probability volume `(z, y, x)`."""
        return self.segmenter.fused(self.planes(patient))


@dataclass(frozen=True)
class Scores:
    """A probability per patient, for those whose label is known."""

    validation: tuple[tuple[Patient, float], ...]
    test: tuple[tuple[Patient, float], ...]


def seed_of(seed: int, name: str) -> int:
    """A seed that depends on the patient and not on the order of patients."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def score_controls(split: Split, config: StudyConfig) -> Controls:
    """Scores the HU threshold (fitted to the training patients) and the dense-lung fraction."""
    threshold = untrained.fit_threshold(split.train)
    dices = {
        p.key: metrics.dice(untrained.segment_by_threshold(p, threshold), p.truth)
        for p in split.test
        if p.truth is not None and p.truth.any()
    }
    labelled = [p for p in (*split.validation, *split.test) if p.label is not None]
    fractions = {}
    if config.classification is not None:
        fractions = {p.key: untrained.dense_lung_fraction(p) for p in labelled}
    cut = threshold_of([(p, fractions[p.key]) for p in split.validation if p.key in fractions], otherwise=0.5)
    return Controls(threshold, dices, fractions, cut)


def threshold_of(scored: Sequence[tuple[Patient, float]], *, otherwise: float) -> float:
    """The threshold that finds 90 % of the positives among these patients; `otherwise` where there are none."""
    labels = np.array([int(patient.label or 0) > 0 for patient, _ in scored], bool)
    if not labels.any():
        return otherwise
    return metrics.threshold_for_sensitivity(np.array([score for _, score in scored]), labels, target=0.9)


def score_patients(classifier: Classifier, parameters: Any, scans: Segmented, split: Split) -> Scores:
    """Gives every labelled validation and test patient its probability."""

    def score(patient: Patient) -> float:
        slices = masked_slices(patient.hu, scans.fused(patient), classifier.config)
        return classifier.score(parameters, slices)

    def part(patients: Sequence[Patient]) -> tuple[tuple[Patient, float], ...]:
        return tuple((p, score(p)) for p in patients if p.label is not None)

    return Scores(part(split.validation), part(split.test))


def results(
    split: Split,
    scans: Segmented,
    scores: Scores | None,
    controls: Controls,
    config: StudyConfig,
    statement: PrivacyStatement,
) -> dict[str, Any]:
    """Everything the page says about one run, as JSON values."""
    table: dict[str, Any] = {
        "privacy": None if statement.epsilon is None else statement.to_json(),
        "segmentation": _segmentation_results(split, scans, controls, config),
    }
    if scores is not None:
        table["classification"] = _classification_results(scores, controls, config)
    return table


def _segmentation_results(split: Split, scans: Segmented, controls: Controls, config: StudyConfig) -> dict[str, Any]:
    assert config.segmentation is not None
    threshold = config.segmentation.threshold
    rows: list[dict[str, Any]] = []
    for patient in split.test:
        if patient.truth is None:
            continue
        planes = scans.planes(patient)
        fused = scans.segmenter.fused(planes) >= threshold
        row: dict[str, Any] = {
            "patient": patient.name,
            "hospital": patient.hospital,
            "false_positive_ml": false_positive_volume_ml(fused, patient.truth, patient.spacing_mm),
        }
        if patient.truth.any():
            row["fused"] = metrics.dice(fused, patient.truth)
            row |= {plane: metrics.dice(p >= threshold, patient.truth) for plane, p in planes.items()}
        rows.append(row)
    marked = [row for row in rows if "fused" in row]
    empty = [row["false_positive_ml"] for row in rows if "fused" not in row]
    dices = np.array([row["fused"] for row in marked])
    interval = metrics.bootstrap_interval(_mean, dices, seed=config.seed) if len(dices) > 1 else None
    low, high = interval or (None, None)
    return {
        "overall": {
            "dice": _mean(dices),
            "dice_low": low,
            "dice_high": high,
            "patients": len(marked),
            "false_positive_ml": float(np.median(empty)) if empty else None,
        },
        "planes": {plane: _mean([row[plane] for row in marked]) for plane in (*config.segmentation.planes, "fused")},
        "hospitals": {
            name: {"dice": _mean([row["fused"] for row in marked if row["hospital"] == name])}
            for name in sorted({row["hospital"] for row in rows})
        },
        "controls": {
            "HU threshold": {
                "dice": _mean(list(controls.threshold_dice.values())),
                "threshold_hu": controls.threshold_hu,
            }
        },
        "patients": rows,
    }


def _classification_results(scores: Scores, controls: Controls, config: StudyConfig) -> dict[str, Any]:
    labels = np.array([int(p.label or 0) > 0 for p, _ in scores.test], int)
    values = np.array([score for _, score in scores.test])
    hospitals = np.array([p.hospital for p, _ in scores.test])
    threshold = threshold_of(scores.validation, otherwise=0.5)
    dense = np.array([controls.dense_fraction[p.key] for p, _ in scores.test])
    curve = metrics.roc_curve(values, labels)
    overall = metrics.classification_report(values, labels, threshold, hospitals, seed=config.seed)
    return {
        "hospitals": overall.pop("hospitals"),
        "overall": overall,
        "controls": {
            "always positive": metrics.always_positive_row(labels),
            "permuted labels": metrics.permuted_labels_row(values, labels, seed=config.seed, threshold=threshold),
            "dense lung fraction": metrics.classification_report(dense, labels, controls.dense_cut, seed=config.seed),
        },
        "roc": None
        if curve is None
        else {
            "false_positive_rate": [float(v) for v in curve.false_positive_rate],
            "true_positive_rate": [float(v) for v in curve.true_positive_rate],
        },
        "scores": [
            {"patient": p.name, "hospital": p.hospital, "label": p.label, "score": score} for p, score in scores.test
        ],
    }


def average_members(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Averages hospitals that trained alone, each scored on the same test patients."""
    table: dict[str, Any] = {"privacy": None, "members": dict(members)}
    for task, figures in {
        "segmentation": ("dice",),
        "classification": ("auc", "balanced_accuracy", "sensitivity", "specificity", "precision"),
    }.items():
        rows = [row[task] for row in members.values() if task in row]
        if rows:
            overall = {
                figure: _mean([r["overall"][figure] for r in rows if r["overall"][figure] is not None])
                for figure in figures
            }
            table[task] = {"overall": overall, "controls": rows[0]["controls"]}
    return table


def write_overlays(folder: Path, split: Split, scans: Segmented, results: dict[str, Any]) -> None:
    """Writes the slices the page shows: for a few test patients the one with most truth, in two planes."""
    shown = [p for p in split.test if p.truth is not None and p.truth.any()]
    by_key = {f"{row['hospital']}/{row['patient']}": row for row in results["segmentation"]["patients"]}
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for patient in _one_per_hospital(shown)[:OVERLAY_PATIENTS]:
        assert patient.truth is not None
        fused = scans.fused(patient)
        dz, dy, dx = patient.spacing_mm
        for plane, axis, aspect, turn in (("axial", 0, dy / dx, False), ("coronal", 1, dz / dx, True)):
            index = int(np.argmax(patient.truth.sum(axis=tuple(a for a in range(3) if a != axis))))
            key = str(len(rows))
            for name, volume in (("hu", patient.hu), ("truth", patient.truth), ("prediction", fused)):
                picture = np.take(volume, index, axis=axis)
                arrays[f"{name}_{key}"] = picture[::-1] if turn else picture
            arrays[f"aspect_{key}"] = np.asarray(aspect, np.float32)
            rows.append(
                {
                    "patient": patient.name,
                    "hospital": patient.hospital,
                    "plane": plane,
                    "index": index,
                    "dice": by_key[patient.key]["fused"],
                    "truth": True,
                    "key": key,
                }
            )
    results["overlays"] = rows
    partial = folder / ".overlays.npz.partial"
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(folder / "overlays.npz")
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _one_per_hospital(patients: Sequence[Patient]) -> list[Patient]:
    """Orders patients so that the first ones come from different hospitals."""
    seen: dict[str, int] = {}
    ranked = []
    for place, patient in enumerate(patients):
        turn = seen[patient.hospital] = seen.get(patient.hospital, -1) + 1
        ranked.append((turn, place, patient))
    return [patient for _, _, patient in sorted(ranked, key=lambda row: row[:2])]


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
