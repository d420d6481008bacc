"""A trained study applied to new scans: masks in each scan's own geometry, probabilities, pictures, one page.

one series, a NIfTI file, or a folder tree of many -> scans, one after the other -> standard volumes -> masks and
probabilities -> back to the scan's own grid -> a folder per series, and a table, a CSV and a page of all of them
"""

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from capsfl.ct.dicom_seg import SegError, require_highdicom, write_dicom_seg
from capsfl.ct.errors import ScanError
from capsfl.ct.export import NOTICE, write_nifti_mask, write_overlay_png
from capsfl.ct.reader import ReaderConfig
from capsfl.predict.model import Model
from capsfl.predict.scans import Found, find_scans
from capsfl.report.page import build_page
from capsfl.report.predictions import write_summary
from capsfl.study import write_json

Format = Literal["nifti", "seg", "png"]


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
) -> tuple[Path, int]:
    """Segments and classifies every series of a place with a study's own arm.

    A series that cannot be used is named and left out. Results appear whole: a folder per series is renamed to its
    place when everything in it is written, then the summary of all that lie there. A folder takes the place of the same
    scan's older result and of nothing else: where another scan's lies under the name, it gets a number.

    Args:
        study: folder that `capsfl train` wrote.
        place: a DICOM file or series, a NIfTI file, or a folder tree of many of them.
        console: for progress and the table.
        out: where results go; by default `study/predictions`, from where the page shows them.
        series: number or SeriesInstanceUID of the only series to predict.
        formats: what is written beside `prediction.json`; when None NIfTI, PNG, and SEG where highdicom is installed.
        identified: whether a SEG carries the patient's identity, see `write_dicom_seg`.
        reader: what the reader may mend.
        scanner: which scanner of Table II made the scans, see `Model`.

    Returns:
        The results' folder, and how many series were left out.

    Raises:
        ValueError: no study, an unfinished one, or nothing that could be predicted; the message names it.
    """
    wanted: Sequence[Format] = formats or ("nifti", "png", *(("seg",) if find_spec("highdicom") else ()))
    if formats is not None and "seg" in formats:
        require_highdicom()
    model = Model(study, scanner=scanner)
    found = list(find_scans(place, series=series, reader=reader))
    out = out or study / "predictions"
    rows, refused = [], []
    with Progress(console=console, transient=True, disable=len(found) < 2) as bar:
        for one in bar.track(found, description="predict"):
            try:
                rows.append(predict_one(model, one, out, wanted, identified))
            except ScanError as error:
                refused.append((one.name, str(error)))
    rows.sort(key=lambda row: row["scan"])
    if not rows:
        raise ValueError(refused[0][1] if len(refused) == 1 else _nothing(place, refused))
    write_summary(out, _patients(model, rows), refused, study=study.resolve().name)
    if (study / "report.html").exists() and out == study / "predictions":
        build_page(study)
    _show(rows, refused, console)
    if formats is None and "seg" not in wanted and any(one.series is not None for one in found):
        console.print("DICOM SEG files too: pip install 'capsfl[seg]'", markup=False, highlight=False)
    if identified and any("mask.dcm" in row["files"] for row in rows):
        console.print("mask.dcm names the patient: keep it as confidential as the scan", highlight=False)
    return out, len(refused)


def predict_one(model: Model, found: Found, out: Path, formats: Sequence[Format], identified: bool) -> dict[str, Any]:
    scan, slices = found.read()
    answer = model.answer(scan)
    digest = found.digest()
    name = _free_name(out, found.name, digest)
    row: dict[str, Any] = {
        "scan": name,
        "source": digest,
        "patient": scan.source.pseudonym,
        "slices": scan.source.shape[0],
        "target": model.target,
        "mask_ml": None,
        "threshold": None,
        "probability": None,
        "files": {},
        "remarks": [],
        **model.facts,
        "notice": NOTICE,
    }
    if not scan.source.patient_known:
        row["remarks"].append("no usable PatientID: pooled with series of the same study alone")
    draft = out / f".{name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
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
            write_overlay_png(draft / "overlay.png", scan, mask, title=marked)
        if answer.images is not None:
            row["image_probabilities"] = answer.images.tolist()
            row["class_probabilities"] = model.judge(answer.images)
            row["probability"] = 1 - row["class_probabilities"][0]
        row["files"] = sorted(path.name for path in draft.iterdir())
        write_json(draft / "prediction.json", row)
        _replace(draft, out / name)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return row


def _free_name(out: Path, wanted: str, digest: str) -> str:
    """The name under which a scan's older result lies, or the next one under which nothing does."""
    name, turn = wanted, 1
    while (out / name).exists() and _source_of(out / name) != digest:
        turn += 1
        name = f"{wanted}-{turn}"
    return name


def _source_of(folder: Path) -> str | None:
    """The digest of the scan whose result a folder holds; None where it holds something else."""
    try:
        return json.loads((folder / "prediction.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(draft: Path, place: Path) -> None:
    """Renames a folder to its place; what stood there goes first, since a folder cannot be renamed over another."""
    old = draft.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    draft.rename(place)
    shutil.rmtree(old, ignore_errors=True)


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


def _nothing(place: Path, refused: Sequence[tuple[str, str]]) -> str:
    return f"{place}: none of {len(refused)} series can be used; the first: {refused[0][1]}"


def _show(rows: Sequence[dict[str, Any]], refused: Sequence[tuple[str, str]], console: Console) -> None:
    table = Table("scan", "slices", "marked mL", "probability", "remark", box=None, pad_edge=False)
    for row in rows:
        volume = "–" if row["mask_ml"] is None else f"{row['mask_ml']:.0f} {row['target']}"
        chance = "–" if row["probability"] is None else f"{row['probability']:.3f}"
        words = (row["scan"], str(row["slices"]), volume, chance, "; ".join(row["remarks"]))
        table.add_row(*map(escape, words))
    console.print(table)
    for name, fault in refused:
        console.print(f"[red]left out[/] {escape(name)}: {escape(fault)}", soft_wrap=True, highlight=False)
    console.print(f"[bold]{NOTICE}[/]")
