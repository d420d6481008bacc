"""A trained study applied to new scans or pictures: masks in each scan's own geometry, probabilities, one page.

one series, a NIfTI file, a picture, or a folder tree of many -> one after the other -> standard volumes or squares as
the study was trained on -> masks and probabilities -> back to the scan's own grid -> a folder each, and a table, a CSV
and a page of all of them
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress

from capsfl.ct.dicom_seg import SegError, require_highdicom, write_dicom_seg
from capsfl.ct.errors import ScanError
from capsfl.ct.export import NOTICE, write_nifti_mask, write_overlay_png
from capsfl.ct.reader import ReaderConfig
from capsfl.predict.console import show
from capsfl.predict.model import Model
from capsfl.predict.picture_result import predict_pictures
from capsfl.predict.pictures import FoundPictures
from capsfl.predict.results import free_name, result_folder
from capsfl.predict.scans import Found
from capsfl.predict.sources import check_options, find_sources
from capsfl.report.page import build_page
from capsfl.report.predictions import OVERLAY, write_summary
from capsfl.study import write_json

Format = Literal["nifti", "seg", "png"]
WORTH_A_WORD = 0.005
"""Share of the lungs outside the field, below which a page that rounds to percents would say nothing."""


def predict(
    study: Path,
    place: Path,
    *,
    console: Console,
    out: Path | None = None,
    series: str | None = None,
    formats: Sequence[Format] | None = None,
    identified: bool = False,
    reader: ReaderConfig | None = None,
    scanner: str | None = None,
    arm: str | None = None,
) -> tuple[Path, int]:
    """Segments and classifies every series of a place, or judges every patient's pictures, with a study's own arm.

    What cannot be used is named and left out. Results appear whole: a folder per series or patient is renamed to its
    place when everything in it is written, then the summary of all that lie there. A folder takes the place of the same
    source's older result and of nothing else: where another's lies under the name, it gets a number.

    Args:
        study: folder that `capsfl train` wrote.
        place: a DICOM file or series, a NIfTI file, or a folder tree of many of them; for a study of pictures a
            picture or a folder tree of them, see `find_pictures`.
        console: for progress and the table.
        out: where results go; by default `study/predictions`, from where the page shows them.
        series: number or SeriesInstanceUID of the only series to predict.
        formats: what is written beside `prediction.json`; when None NIfTI, PNG, and SEG where highdicom is installed.
        identified: whether a SEG carries the patient's identity, see `write_dicom_seg`.
        reader: what the reader may mend.
        scanner: which scanner of Table II made the scans, see `Model`.
        arm: whose models predict, see `Model`.

    Returns:
        The results' folder, and how many series or patients were left out.

    Raises:
        ValueError: no study, an unfinished one, options of scans for a study of pictures, or nothing that the study
            could answer for; the message names it.
    """
    wanted: Sequence[Format] = formats or ("nifti", "png", *(("seg",) if find_spec("highdicom") else ()))
    if formats is not None and "seg" in formats:
        require_highdicom()
    model = Model(study, scanner=scanner, arm_name=arm)
    check_options(model.kinds, formats, series=series, identified=identified, scanner=scanner)
    out = out or study / "predictions"
    found = find_sources(model.kinds, place, out=out, series=series, reader=reader)
    rows, refused = [], []
    with Progress(console=console, transient=True, disable=len(found) < 2) as bar:
        for one in bar.track(found, description="predict"):
            try:
                if isinstance(one, FoundPictures):
                    rows.append(predict_pictures(model, one, out, wanted))
                else:
                    rows.append(predict_one(model, one, out, wanted, identified))
            except ScanError as error:
                refused.append((one.name, str(error)))
    rows.sort(key=lambda row: row["scan"])
    if not rows:
        raise ValueError(refused[0][1] if len(refused) == 1 else _nothing(place, found, refused))
    write_summary(out, _patients(model, rows), refused, study=study.resolve().name)
    if (study / "report.html").exists() and out == study / "predictions":
        build_page(study)
    show(rows, refused, console)
    if formats is None and "seg" not in wanted and any(isinstance(one, Found) and one.series for one in found):
        console.print("DICOM SEG files too: pip install 'capsfl[seg]'", markup=False, highlight=False)
    if identified and any("mask.dcm" in row["files"] for row in rows):
        console.print("mask.dcm names the patient: keep it as confidential as the scan", highlight=False)
    return out, len(refused)


def predict_one(model: Model, found: Found, out: Path, formats: Sequence[Format], identified: bool) -> dict[str, Any]:
    """Predicts one scan, writes its folder, and returns its record.

    Raises:
        ScanError: the scan cannot be used.
    """
    scan, slices = found.read()
    answer = model.answer(scan)
    digest = found.digest()
    name = free_name(out, found.name, digest)
    row: dict[str, Any] = {
        "kind": "volume",
        "scan": name,
        "source": digest,
        "patient": scan.source.pseudonym,
        "slices": scan.source.shape[0],
        "target": model.target,
        "mask_ml": None,
        "threshold": None,
        "probability": None,
        "classes": list(model.classes),
        "outside_field": answer.outside_field,
        "files": {},
        "remarks": _remarks_on_field(answer.outside_field),
        **model.facts,
        "notice": NOTICE,
    }
    if not scan.source.patient_known:
        row["remarks"].append("no usable PatientID: pooled with series of the same study alone")
    with result_folder(out, name) as draft:
        if answer.mask is not None and answer.probability is not None:
            row["mask_ml"] = float(answer.mask.sum() * np.prod(scan.spacing_mm) / 1000.0)
            assert model.config.segmentation is not None
            row["threshold"] = model.config.segmentation.decision
            if "nifti" in formats:
                write_nifti_mask(draft / "mask.nii.gz", answer.mask, scan)
                write_nifti_mask(draft / "probability.nii.gz", answer.probability, scan)
            if "seg" in formats and slices:
                try:
                    write_dicom_seg(
                        draft / "mask.dcm", answer.mask, scan, slices,
                        target=model.target, algorithm=model.algorithm, identified=identified,
                    )  # fmt: skip
                    row["patient_identity"] = "source" if identified else "removed"
                except SegError as error:
                    row["remarks"].append(f"no SEG: {error.fault}")
        if "png" in formats:
            marked = "" if row["mask_ml"] is None else f"{model.target} {row['mask_ml']:.0f} mL"
            mask = np.zeros(scan.hu.shape, bool) if answer.mask is None else answer.mask
            write_overlay_png(draft / OVERLAY, scan, mask, title=marked, field=answer.field)
        if answer.images is not None:
            row["image_probabilities"] = answer.images.tolist()
            row["class_probabilities"] = model.judge(answer.images)
            row["probability"] = 1 - row["class_probabilities"][0]
        row["files"] = sorted(path.name for path in draft.iterdir())
        write_json(draft / "prediction.json", row)
    return row


def _remarks_on_field(outside: float | None) -> list[str]:
    """What a reader of the scan must know about the part of it that the networks did not see."""
    if outside is None:
        return ["no lungs were found in the scan"]
    if outside < WORTH_A_WORD:
        return []
    return [f"{outside:.0%} of the lungs lie outside the region that was examined: nothing there is marked or counted"]


def _patients(model: Model, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per patient: the mean over the images of all its series that look least healthy."""
    by_patient: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_patient.setdefault(row["patient"], []).append(row)
    found = []
    for patient, own in by_patient.items():
        images = [row["image_probabilities"] for row in own if "image_probabilities" in row]
        probability = 1 - model.judge(np.concatenate(images))[0] if images else None
        found.append({"patient": patient, "scans": [row["scan"] for row in own], "probability": probability})
    return found


def _nothing(place: Path, found: Sequence[Found | FoundPictures], refused: Sequence[tuple[str, str]]) -> str:
    kind = "series" if any(isinstance(one, Found) for one in found) else "patients' pictures"
    return f"{place}: none of {len(refused)} {kind} can be used; the first: {refused[0][1]}"
