"""`capsfl predict RUN SCAN|PICTURE|FOLDER`: applies a study to scans or pictures."""

from dataclasses import dataclass
from dataclasses import field as option
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from capsfl.arguments import parse
from capsfl.ct.reader import ReaderConfig


@dataclass(frozen=True)
class PredictCommand:
    """Apply a trained study to one scan or a folder tree of many: masks in each scan's own geometry, probabilities.

    A study that was trained on pictures takes pictures (PNG, JPEG, BMP): a picture that is named, or that lies in the
    folder that is named, is a patient; below it the pictures of one folder are one patient's. Exit code 3 when some
    series or patients were left out. Folders of results are named after the scans' or pictures' folders and files; name
    those by pseudonyms if you share the page, and look for names within pictures.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `capsfl train` wrote."""
    scan: Annotated[Path, tyro.conf.Positional]
    """A DICOM series, a NIfTI file, or a folder tree of many; for a study of pictures a picture or a folder tree."""
    out: Path | None = None
    """Where results go, a folder per series or patient; by default RUN/predictions, from where the study's page shows
    them."""
    series: str | None = None
    """The only series to predict: its number in the folder, its SeriesInstanceUID or the ending of that."""
    formats: tuple[Literal["nifti", "seg", "png"], ...] | None = None
    """What is written; by default all, SEG where `pip install 'capsfl[seg]'` was done."""
    identified: bool = False
    """Copy the patient's identity from the scan into the DICOM SEG, as an archive needs it to file the SEG beside
    the scan; the file is then as confidential as the scan. Without, it carries a pseudonym."""
    scanner: str | None = None
    """The scanner of the paper's Table II that made the scans (A1, A2, B3, B4, C5, C6), for a study trained with
    data.volumes.window = "scanner"; by default the scan's own tags tell."""
    arm: str | None = None
    """The arm whose models predict, or ARM/HOSPITAL where every hospital has its own; by default the first arm."""
    reader: ReaderConfig = option(default_factory=ReaderConfig)
    """What the reader may mend."""


def run(words: list[str]) -> int:
    """Applies a study to scans or pictures; exit code 3 when some series or patients were left out."""
    given = parse(PredictCommand, words, prog="capsfl predict")
    from capsfl.predict.run import predict as predict_scans
    from capsfl.study import disk_errors

    console = Console()
    options = {
        name: getattr(given, name) for name in ("out", "series", "formats", "identified", "scanner", "arm", "reader")
    }
    with disk_errors(given.out or given.run):
        place, left_out = predict_scans(given.run, given.scan, console=console, **options)
    console.print(f"written: {place}", soft_wrap=True, highlight=False)
    return 3 if left_out else 0
