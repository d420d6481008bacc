"""What `capsfl predict` left in a folder: the table of all of it, and the page with its pictures."""

import base64
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from capsfl.report.study import Record, text

MAX_PREDICTIONS = 12
"""Newest names that the study's own page shows; the predictions' page shows more."""
MAX_PICTURES = 60
MAX_PICTURE_BYTES = 5_000_000
PICTURE_SIDE = 900
NOTICE = "not for clinical use"
COLUMNS = ("scan", "patient", "slices", "target", "mask_ml", "threshold", "probability", "fault")
DIGESTS = ("model_segmentation", "model_classification", "ledger_head")


@dataclass(frozen=True)
class Prediction:
    """One new scan: its record, and the overlay as a data address (empty where there is none)."""

    record: Record
    picture: str


def read_predictions(study_folder: Path) -> list[Prediction]:
    """Reads a study's predictions by name; what is damaged, too large or not a picture is left out."""
    found = read_records(study_folder / "predictions")[:MAX_PREDICTIONS]
    return [Prediction(record, picture_of(folder / "overlay.png")) for folder, record in found]


def read_records(out: Path) -> list[tuple[Path, Record]]:
    """The folders of an output folder that hold a prediction, by name."""
    found = []
    for folder in sorted(out.glob("[!.]*")):
        try:
            record = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            found.append((folder, record))
    return found


def write_summary(
    out: Path, patients: Sequence[Mapping[str, Any]], refused: Sequence[tuple[str, str]], *, study: str
) -> Path:
    """Writes `predictions.json`, `predictions.csv` and `predictions.html` about everything that lies in a folder.

    Args:
        out: with a folder per series.
        patients: of this call, with a probability over all of a patient's series.
        refused: names of the series of this call that were left out, with the reason.
        study: name of the study.

    Returns:
        The page.
    """
    # Here, so that the study's page can read predictions through this module.
    from capsfl.report import figures
    from capsfl.report.page import environment, write_whole

    found = read_records(out)
    records = [record for _, record in found]
    faults = [{"scan": name, "fault": fault} for name, fault in refused]
    summary = {"notice": NOTICE, "study": study, "scans": records, "patients": list(patients), "left_out": faults}
    write_whole(out / "predictions.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_whole(out / "predictions.csv", _table(records, faults))
    shown = [
        Prediction(record, picture_of(folder / "overlay.png") if place < MAX_PICTURES else "")
        for place, (folder, record) in enumerate(found)
    ]
    page = environment().get_template("predictions.html.j2")
    return write_whole(
        out / "predictions.html",
        page.render(
            study=study,
            predictions=shown,
            pictures=sum(bool(item.picture) for item in shown),
            patients=[row for row in patients if len(row["scans"]) > 1],
            refused=faults,
            notice=NOTICE,
            light=figures.LIGHT,
            dark=figures.DARK,
        ),
    )


def _table(records: Sequence[Record], faults: Sequence[Mapping[str, str]]) -> str:
    stream = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(
        stream, (*COLUMNS, *DIGESTS, "notice"), extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for record in records:
        models = record.get("models")
        digests = {
            f"model_{task}": text(row.get("digest"))
            for task, row in (models.items() if isinstance(models, dict) else ())
            if isinstance(row, dict)
        }
        writer.writerow({**record, **digests, "notice": NOTICE})
    for fault in faults:
        writer.writerow({**fault, "notice": NOTICE})
    return stream.getvalue()


def picture_of(path: Path) -> str:
    """A PNG as a data address of moderate size; empty where it is none, or too large."""
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return ""
        with Image.open(path, formats=["PNG"]) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return ""
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def safe_name(name: str) -> str:
    """A folder name from a scan's: letters, digits, dots and dashes, without NIfTI's ending; at most 100 characters."""
    name = name.removesuffix(".gz").removesuffix(".nii")
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)[-100:].strip(".-") or "scan"
