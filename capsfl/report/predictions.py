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

from capsfl.report.formats import NO_VALUE, decimals
from capsfl.report.study import Record, number, rows_at, text, texts

MAX_PREDICTIONS = 12
"""Newest names that the study's own page shows; the predictions' page shows more."""
MAX_PICTURES = 60
MAX_PICTURE_ROWS = 400
"""Of the table of single pictures; the CSV beside the page has all."""
MAX_PICTURE_BYTES = 5_000_000
PICTURE_SIDE = 900
NOTICE = "not for clinical use"
OVERLAY = "overlay.png"
SHEET = "pictures.png"
COLUMNS = (
    *("kind", "scan", "patient", "slices", "pictures", "target", "mask_ml", "threshold", "outside_field"),
    *("probability", "class_probabilities", "fault"),
)
PICTURE_COLUMNS = ("patient", "picture", "file", "height", "width", "probability", "class_probabilities", "counted")
DIGESTS = ("model_segmentation", "model_classification", "ledger_head")


@dataclass(frozen=True)
class Prediction:
    """One new scan, or one patient's pictures: the record, and what shows it as a data address (empty without)."""

    record: Record
    picture: str

    @property
    def is_pictures(self) -> bool:
        """Whether pictures were judged, and no scan."""
        return self.record.get("kind") == "pictures"

    @property
    def pictures(self) -> list[Record]:
        """A row per picture, numbered as on the patient's sheet."""
        rows = rows_at(self.record, "pictures") if self.is_pictures else []
        return [
            {**row, "picture": place, "chances": _chances({**row, "classes": self.record.get("classes")})}
            for place, row in enumerate(rows, start=1)
        ]

    @property
    def examined(self) -> str:
        """How much of the lungs lay within the field that the networks saw, in words."""
        if "outside_field" not in self.record:
            return NO_VALUE
        outside = number(self.record["outside_field"])
        if outside is None:
            return "no lungs found"
        return "all" if outside < 0.005 else f"{1 - outside:.0%}"

    @property
    def chances(self) -> str:
        """The probability of each class, where there are more than two, the likeliest first."""
        return _chances(self.record)


def _chances(record: Record) -> str:
    """The probability of each of three or more classes, the likeliest first; empty for two, which one number tells."""
    names, values = texts(record.get("classes")), record.get("class_probabilities")
    if not isinstance(values, list) or len(values) < 3 or len(names) != len(values):
        return ""
    ordered = sorted(zip(names, values, strict=True), key=lambda pair: -(number(pair[1]) or 0))
    return ", ".join(f"{name}\u00a0{decimals(value)}" for name, value in ordered)


def read_predictions(study_folder: Path) -> list[Prediction]:
    """Reads a study's predictions by name; what is damaged, too large or not a picture is left out."""
    found = read_records(study_folder / "predictions")[:MAX_PREDICTIONS]
    return [Prediction(record, shown_picture(folder)) for folder, record in found]


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

    Where pictures are among it, `predictions-pictures.csv` has a row for each.

    Args:
        out: with a folder per series, or per patient whose pictures were judged.
        patients: of this call, with a probability over all of a patient's series.
        refused: names of the series or patients of this call that were left out, with the reason.
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
        Prediction(record, shown_picture(folder) if place < MAX_PICTURES else "")
        for place, (folder, record) in enumerate(found)
    ]
    pictured = [item for item in shown if item.is_pictures]
    rows = [{"patient": item.record.get("scan"), **row} for item in pictured for row in item.pictures]
    if rows:
        write_whole(out / "predictions-pictures.csv", _picture_table(pictured))
    page = environment().get_template("predictions.html.j2")
    return write_whole(
        out / "predictions.html",
        page.render(
            study=study,
            predictions=shown,
            scans=[item for item in shown if not item.is_pictures],
            pictured=pictured,
            rows=rows[:MAX_PICTURE_ROWS],
            all_rows=len(rows),
            pictures=sum(bool(item.picture) for item in shown),
            patients=[row for row in patients if len(row["scans"]) > 1],
            refused=faults,
            notice=NOTICE,
            light=figures.LIGHT,
            dark=figures.DARK,
        ),
    )


def shown_picture(folder: Path) -> str:
    """What shows a result, as a data address; empty where there is nothing to show."""
    return picture_of(folder / OVERLAY) or picture_of(folder / SHEET)


def _table(records: Sequence[Record], faults: Sequence[Mapping[str, str]]) -> str:
    stream = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(
        stream, (*COLUMNS, *DIGESTS, "notice"), extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for record in records:
        cells = {"class_probabilities": _classes(record), "pictures": len(rows_at(record, "pictures")) or None}
        writer.writerow({**record, **cells, **_digests(record), "notice": NOTICE})
    for fault in faults:
        writer.writerow({**fault, "notice": NOTICE})
    return stream.getvalue()


def _picture_table(pictured: Sequence[Prediction]) -> str:
    stream = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(
        stream, (*PICTURE_COLUMNS, *DIGESTS, "notice"), extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for item in pictured:
        same = {"patient": item.record.get("scan"), "ledger_head": text(item.record.get("ledger_head"))}
        same |= {**_digests(item.record), "notice": NOTICE}
        for row in item.pictures:
            named = _classes({**row, "classes": item.record.get("classes")})
            writer.writerow({**row, **same, "class_probabilities": named})
    return stream.getvalue()


def _classes(record: Record) -> str:
    """The probability of every class by name, for a cell: `non-COVID=0.2;COVID=0.8`."""
    names, values = texts(record.get("classes")), record.get("class_probabilities")
    if not isinstance(values, list) or len(names) != len(values):
        return ""
    return ";".join(f"{name}={value}" for name, value in zip(names, values, strict=True))


def _digests(record: Record) -> dict[str, str]:
    """The model of each task as its own column."""
    models = record.get("models")
    return {
        f"model_{task}": text(row.get("digest"))
        for task, row in (models.items() if isinstance(models, dict) else ())
        if isinstance(row, dict)
    }


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
