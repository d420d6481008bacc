"""What `capsfl predict` left in a study's folder, for the page."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from capsfl.report.study import Record

MAX_PREDICTIONS = 12
MAX_PICTURE_BYTES = 2_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Prediction:
    """One new scan: its record, and the overlay as a data address (empty where there is none)."""

    record: Record
    picture: str


def read_predictions(study_folder: Path) -> list[Prediction]:
    """Reads predictions by name; what is damaged, too large or not a picture is left out."""
    found = []
    for folder in sorted((study_folder / "predictions").glob("*"))[:MAX_PREDICTIONS]:
        try:
            record = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            found.append(Prediction(record, _picture(folder / "overlay.png")))
    return found


def _picture(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return ""
        data = path.read_bytes()
    except OSError:
        return ""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}" if data.startswith(_PNG) else ""
