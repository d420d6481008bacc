"""A trained study applied to one new scan: mask in the scan's own geometry, probability, overlay."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from capsfl.audit import run_places
from capsfl.checkpoint import latest_parameters
from capsfl.ct.dicom import read_dicom
from capsfl.ct.export import write_nifti_mask, write_overlay_png
from capsfl.ct.lungs import body_mask
from capsfl.ct.nifti import read_nifti
from capsfl.ct.normalize import standardize, to_scan_space
from capsfl.ct.scan import Scan
from capsfl.learning.classification import Classifier, make_classification_task, masked_slices
from capsfl.learning.patients import central_field
from capsfl.learning.segmentation import Segmenter, make_segmentation_task
from capsfl.ledger.chain import Ledger
from capsfl.report.page import build_page
from capsfl.study import load_study_config, write_json


def predict(study: Path, scan_path: Path, *, out: Path | None, series: str | None, console: Console) -> Path:
    """Segments and classifies one scan with a study's own arm.

    Args:
        study: folder that `capsfl train` wrote.
        scan_path: DICOM series folder or NIfTI file.
        out: where results go; by default `study/predictions/<name>`, from where the page shows them.
        series: SeriesInstanceUID, where the folder holds several.
        console: for messages.

    Returns:
        The folder with `mask.nii.gz`, `probability.nii.gz`, `overlay.png` and `prediction.json`.

    Raises:
        ValueError: no study, an unfinished one, or a scan that cannot be read; the message names it.
    """
    config = load_study_config(study)
    arm, place_of_run = run_places(study, config)[0]
    run, config = study / place_of_run, config.arm(arm)
    assert config.segmentation is not None
    scan = read_scan(scan_path, series=series)
    volume = standardize(scan, config=config.data.volumes)
    field = central_field(volume.hu.shape, config.data.field)
    task = make_segmentation_task(config.segmentation, seed=config.seed)
    segmenter = Segmenter(task, config.segmentation)
    probability = np.zeros(volume.hu.shape, np.float32)
    hu = np.asarray(volume.hu[field], np.float32)
    with Ledger.open(run / "ledger") as ledger:
        recorded, head = ledger.rounds(), ledger.blocks()[-1].hash().hex()
    weights = latest_parameters(run / "checkpoints" / task.name, task.parameters, recorded)
    body = body_mask(volume.hu, volume.spacing_mm)[field]
    fused = segmenter.fused(segmenter.planes(weights, hu, body))
    probability[field] = fused
    in_scan = to_scan_space(probability, volume.affine, scan.affine, scan.hu.shape)
    mask = (in_scan >= config.segmentation.threshold) & scan.valid
    out = out or study / "predictions" / safe_name(scan_path)
    out.mkdir(parents=True, exist_ok=True)
    write_nifti_mask(out / "mask.nii.gz", mask, scan)
    write_nifti_mask(out / "probability.nii.gz", in_scan, scan)
    write_overlay_png(out / "overlay.png", scan, mask)
    row: dict[str, Any] = {
        "scan": safe_name(scan_path),
        "target": config.segmentation.target,
        "mask_ml": float(mask.sum() * np.prod(scan.spacing_mm) / 1000.0),
        "threshold": config.segmentation.threshold,
        "probability": None,
        "arm": arm.name,
        "ledger_head": head,
        "notice": "not for clinical use",
    }
    if config.classification is not None:
        stage = config.classification
        classifier_task = make_classification_task(stage, seed=config.seed + 1)
        classifier = Classifier(classifier_task, stage)
        place = run / "checkpoints" / classifier_task.name
        weights = latest_parameters(place, classifier_task.parameters, recorded)
        row["probability"] = classifier.score(weights, masked_slices(hu, fused, stage))
    write_json(out / "prediction.json", row)
    if (study / "report.html").exists() and out.parent == study / "predictions":
        build_page(study)
    console.print_json(json.dumps(row))
    return out


def read_scan(path: Path, *, series: str | None) -> Scan:
    """Reads a NIfTI file or a DICOM series, told apart by the file name."""
    if path.name.endswith((".nii", ".nii.gz")):
        return read_nifti(path)
    return read_dicom(path, series=series)


def safe_name(path: Path) -> str:
    """A folder name from a scan's: letters, digits, dots and dashes only."""
    name = path.resolve().name.removesuffix(".gz").removesuffix(".nii")
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip(".-") or "scan"
