"""The pictures of one patient through a study's network: a probability of each and of the patient."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.ct.errors import printable
from capsfl.ct.export import NOTICE
from capsfl.predict.model import Model
from capsfl.predict.pictures import FoundPictures
from capsfl.predict.results import free_name, result_folder
from capsfl.predict.sheet import write_picture_sheet
from capsfl.report.predictions import SHEET
from capsfl.study import write_json


def predict_pictures(model: Model, found: FoundPictures, out: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Predicts the pictures of one patient, writes their folder, and returns their record.

    Raises:
        ScanError: one of the pictures cannot be used.
    """
    pictures = found.read(model.square)
    seen, answers = model.look(pictures)
    counted = model.counted(len(found.files))
    digest = found.digest()
    name = free_name(out, found.name, digest)
    judged = model.judge(answers[counted])
    chances = [1 - float(answer[0]) for answer in answers]
    sizes = pictures.original_sizes
    row: dict[str, Any] = {
        "kind": "pictures",
        "scan": name,
        "source": digest,
        "patient": name,
        "slices": None,
        "target": "",
        "mask_ml": None,
        "threshold": None,
        "probability": 1 - judged[0],
        "class_probabilities": judged,
        "classes": list(model.classes),
        "image_probabilities": answers[counted].tolist(),
        "pictures": [
            {
                "file": printable(path.name),
                "height": int(height),
                "width": int(width),
                "probability": chance,
                "class_probabilities": answer.tolist(),
                "counted": index in counted,
            }
            for index, (path, (height, width), chance, answer) in enumerate(
                zip(found.files, sizes, chances, answers, strict=True)
            )
        ],
        "preparation": model.square,
        "files": {},
        "remarks": _remarks(model, len(counted), sizes),
        **model.facts,
        "notice": NOTICE,
    }
    with result_folder(out, name) as draft:
        if "png" in formats:
            write_picture_sheet(draft / SHEET, found.files, seen, chances)
        row["files"] = sorted(path.name for path in draft.iterdir())
        write_json(draft / "prediction.json", row)
    return row


def _remarks(model: Model, counted: int, sizes: np.ndarray) -> list[str]:
    """What a reader must know of these pictures; `sizes` are the files' heights and widths `(n, 2)`."""
    found, side = [], model.square["side"]
    if counted < len(sizes):
        found.append(f"{counted} of {len(sizes)} pictures count, taken evenly as in the study")
    if small := int(np.sum(sizes.min(axis=1) < side)):
        found.append(f"{small} smaller than the {side} pixels that the network was trained on")
    if model.cuts_boxes:
        found.append("the study's pictures were cut to their collection's boxes around the body: cut these likewise")
    return found
