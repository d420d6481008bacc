"""How good the masks of a run are on patients never trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from capsfl.config import StudyConfig
from capsfl.evaluation.arrays import write_arrays
from capsfl.evaluation.controls import ThresholdControl
from capsfl.learning import metrics
from capsfl.learning.fusion import fusion_to_json, learn_fusion
from capsfl.learning.masks import dice
from capsfl.learning.patients import Patient, people_of
from capsfl.learning.segmentation import PLANE_THRESHOLD, Segmenter, false_positive_volume_ml
from capsfl.study import Split

OVERLAY_PATIENTS = 3
"""Test patients whose slices the page shows."""


class Segmented:
    """The fused probabilities of scans under a run's weights, computed once per patient.

    Args:
        segmenter: the network.
        parameters: the server's weights.
        own: by hospital, the weights that its scans are marked with instead; see `rounds.batch_norm`.
    """

    def __init__(self, segmenter: Segmenter, parameters: Any, own: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.segmenter = segmenter
        self._parameters = parameters
        self._own = own
        self._planes: dict[str, dict[str, np.ndarray]] = {}
        self._fitted: dict[str, Any] = {}

    def learn_fusion(self, patients: Sequence[Patient], *, seed: int) -> dict[str, Any]:
        """Fits the learned rule to patients with a mask, fuses by it from now on, and returns it as JSON values.

        Raises:
            FusionError: see `learn_fusion`.
        """
        masked = [patient for patient in patients if patient.truth is not None]
        planes = self.segmenter.config.planes
        pairs = ((self.planes(p), p.truth) for p in masked if p.truth is not None)
        weights = learn_fusion(pairs, planes, seed=seed)
        self.segmenter = self.segmenter.with_fusion(weights)
        self._fitted = fusion_to_json(weights, planes, [patient.key for patient in masked])
        return self._fitted

    @property
    def fusion(self) -> dict[str, Any]:
        """How the planes are fused, as JSON values."""
        return self.segmenter.fusion_facts() | self._fitted

    def planes(self, patient: Patient) -> dict[str, np.ndarray]:
        """The probability volume of every plane."""
        if patient.key not in self._planes:
            weights = self._own.get(patient.hospital, self._parameters)
            found = self.segmenter.planes(weights, patient.hu, patient.body, patient.window_hu)
            self._planes[patient.key] = {plane: p.astype(np.float16) for plane, p in found.items()}
        return {plane: p.astype(np.float32) for plane, p in self._planes[patient.key].items()}

    def fused(self, patient: Patient) -> np.ndarray:
        """The fused probability volume `(z, y, x)`."""
        return self.segmenter.fused(self.planes(patient))


def segmentation_results(
    split: Split, scans: Segmented, control: ThresholdControl, config: StudyConfig
) -> dict[str, Any]:
    """What the page says about the masks of one run, as JSON values."""
    assert config.segmentation is not None
    rows: list[dict[str, Any]] = []
    for patient in split.test:
        if patient.truth is None:
            continue
        planes = scans.planes(patient)
        fused = scans.segmenter.marked(planes)
        row: dict[str, Any] = {
            "patient": patient.name,
            "hospital": patient.hospital,
            "false_positive_ml": false_positive_volume_ml(fused, patient.truth, patient.spacing_mm),
        }
        if patient.is_marked:
            missed = patient.truth_outside
            row["outside_field"] = missed / (missed + int(patient.truth.sum()))
            row["fused"] = dice(fused, patient.truth, missed=missed)
            row |= {plane: dice(p >= PLANE_THRESHOLD, patient.truth, missed=missed) for plane, p in planes.items()}
        rows.append(row)
    marked = [row for row in rows if "fused" in row]
    empty = [row["false_positive_ml"] for row in rows if "fused" not in row]
    return {
        "overall": {
            **_dice_figures(marked, split.test, seed=config.seed),
            "patients": len(marked),
            "false_positive_ml": float(np.median(empty)) if empty else None,
            "outside_field": outside_field(split.test),
        },
        "fusion": scans.fusion,
        "planes": {plane: mean_of([row[plane] for row in marked]) for plane in (*config.segmentation.planes, "fused")},
        "hospitals": {
            name: _dice_figures([row for row in marked if row["hospital"] == name], split.test, seed=config.seed)
            for name in sorted({row["hospital"] for row in rows})
        },
        "controls": {
            "HU threshold": {
                "dice": mean_of([control.dice[p.key] for p in split.test if p.key in control.dice]),
                "threshold_hu": control.hu,
            }
        },
        "patients": rows,
    }


def outside_field(patients: Sequence[Patient]) -> float | None:
    """Share of the marked voxels that `data.field` leaves out, which count as missed; None where none is marked."""
    outside = sum(p.truth_outside for p in patients)
    marked = outside + sum(int(p.truth.sum()) for p in patients if p.truth is not None)
    return outside / marked if marked else None


def _dice_figures(
    rows: Sequence[Mapping[str, Any]], patients: Sequence[Patient], *, seed: int
) -> dict[str, float | None]:
    """The mean Dice of marked scans, and its bootstrap interval by person where there are two or more."""
    dices = np.array([row["fused"] for row in rows])
    by_key = {patient.key: patient for patient in patients}
    people = people_of([by_key[f"{row['hospital']}/{row['patient']}"] for row in rows])
    several = len(dices) > 1 and (people is None or people.max() > 0)
    interval = metrics.bootstrap_interval(mean_of, dices, patients=people, seed=seed) if several else None
    low, high = interval or (None, None)
    return {"dice": mean_of(dices), "dice_low": low, "dice_high": high}


def write_overlays(folder: Path, split: Split, scans: Segmented, results: dict[str, Any]) -> None:
    """Writes the slices the page shows: for a few test patients the one with most truth, in two planes."""
    shown = [p for p in split.test if p.truth is not None and p.truth.any()]
    by_key = {f"{row['hospital']}/{row['patient']}": row for row in results["segmentation"]["patients"]}
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for patient in one_per_hospital(shown)[:OVERLAY_PATIENTS]:
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
    write_arrays(folder / "overlays.npz", arrays)


def one_per_hospital(patients: Sequence[Patient]) -> list[Patient]:
    """Orders patients so that the first ones come from different hospitals."""
    seen: dict[str, int] = {}
    ranked = []
    for place, patient in enumerate(patients):
        turn = seen[patient.hospital] = seen.get(patient.hospital, -1) + 1
        ranked.append((turn, place, patient))
    return [patient for _, _, patient in sorted(ranked, key=lambda row: row[:2])]


def mean_of(values: Sequence[float] | np.ndarray) -> float | None:
    """The mean, None of nothing."""
    return float(np.mean(values)) if len(values) else None
