"""How good a run is on patients never trained on, beside the controls that make the figures mean something."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from capsfl.config import StudyConfig
from capsfl.evaluation.classification import Classified as Classified
from capsfl.evaluation.classification import Images as Images
from capsfl.evaluation.classification import classification_results
from capsfl.evaluation.classification import classify as classify
from capsfl.evaluation.controls import Controls as Controls
from capsfl.evaluation.controls import score_controls as score_controls
from capsfl.evaluation.interpretation import Trained as Trained
from capsfl.evaluation.interpretation import write_interpretation as write_interpretation
from capsfl.evaluation.segmentation import Segmented as Segmented
from capsfl.evaluation.segmentation import mean_of, segmentation_results
from capsfl.evaluation.segmentation import outside_field as outside_field
from capsfl.evaluation.segmentation import write_overlays as write_overlays
from capsfl.privacy.plan import PrivacyStatement
from capsfl.study import Split


def seed_of(seed: int, name: str) -> int:
    """A seed that depends on the patient and not on the order of patients."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def results(
    split: Split,
    scans: Segmented | None,
    classified: Classified | None,
    controls: Controls,
    config: StudyConfig,
    statement: PrivacyStatement,
) -> dict[str, Any]:
    """Everything the page says about one run, as JSON values."""
    table: dict[str, Any] = {"seed": config.seed, "privacy": None if statement.epsilon is None else statement.to_json()}
    if scans is not None:
        assert controls.segmentation is not None
        table["segmentation"] = segmentation_results(split, scans, controls.segmentation, config)
    if classified is not None:
        table["classification"] = classification_results(classified, controls, config)
    return table


def average_members(members: Mapping[str, Mapping[str, Any]], *, partition: str = "local") -> dict[str, Any]:
    """Averages the runs of an arm that has one for every hospital.

    Args:
        members: results by hospital; of hospitals alone on the same test patients, else on those of the one left out.
        partition: of the arm.
    """
    seed = next((row["seed"] for row in members.values() if "seed" in row), None)
    table: dict[str, Any] = {"seed": seed, "privacy": None, "partition": partition, "members": dict(members)}
    decisions = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "precision", "brier", "ece")
    for task, figures in {"segmentation": ("dice",), "classification": decisions}.items():
        rows = [row[task] for row in members.values() if task in row]
        if rows:
            controls = rows[0]["controls"]
            if partition != "local":  # each has patients of its own, so that controls differ too
                controls = {name: _average([row["controls"][name] for row in rows], figures) for name in controls}
            kind = {name: rows[0][name] for name in ("auc_interval",) if name in rows[0]}
            table[task] = {**kind, "overall": _average([r["overall"] for r in rows], figures), "controls": controls}
    return table


def _average(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> dict[str, float | None]:
    """The mean of every figure over the rows in which it is defined."""
    return {name: mean_of([row[name] for row in rows if row.get(name) is not None]) for name in figures}
